//! Host memory beyond the engine's own buffers: prompt cache, context checkpoints, the process, and
//! what loading takes for a moment.

use super::cache::Shape;
use super::facts::Facts;
use super::settings::Settings;
use super::weights::Placed;
use super::{Extras, Parts};
use crate::bytes::MIB;

/// A llama-server without slots, buffers, vocabulary and page tables. With prompts of 600 to 7,000 tokens
/// in each slot, 11 MiB were measured with one slot, 13 with four, 21 with sixteen (0.7.0 on two
/// processors, anonymous memory of models with a tiny vocabulary); some is on top for the kernel's share.
const PROCESS: u64 = 16 * MIB;
/// A slot with its prompt, request and answer.
const SLOT: u64 = MIB;
/// What an entry of the vocabulary takes while it is loaded: 225 bytes were measured over 152,000 short
/// ones.
const TOKEN: u64 = 260;
/// The same for a line of the table of merges: 160 bytes were measured.
const MERGE: u64 = 170;
/// A page table maps 512 pages of its own size: 8 bytes for each 4 KiB.
const PAGES_OF_TABLE: u64 = 512;
/// What comes with a cell in a checkpoint: its position, up to three more for images, its sequences.
const CELL: u64 = 32;
/// What comes with a layer in a checkpoint: types and sizes of its rows.
const LAYER: u64 = 64;

/// The process itself, which a draft model doesn't bring with it.
pub(super) fn process(slots: u32) -> u64 {
    PROCESS + SLOT * u64::from(slots)
}

/// Sizes what comes on top at run time of what is on the host already, and of what loading takes.
pub(super) fn extras(
    facts: &Facts,
    settings: &Settings,
    shape: &Shape,
    placed: &Placed,
    host: &Parts,
) -> Extras {
    let prompt_cache_bytes = prompt_cache(settings);
    let checkpoint_bytes = checkpoints(facts, settings, shape);
    // The context is made, and prompts are kept, once the weights are there.
    let later = [host.kv_bytes, host.state_bytes, host.compute_bytes, host.output_bytes];
    let later =
        later.iter().fold(prompt_cache_bytes.saturating_add(checkpoint_bytes), |n, b| n.saturating_add(*b));
    let loading_bytes = staging(facts, placed).saturating_sub(later);
    let (tokens, merges) = facts.texts;
    let vocabulary = tokens.saturating_mul(TOKEN).saturating_add(merges.saturating_mul(MERGE));
    let mapped_in = host.weights_bytes.saturating_add(later) / PAGES_OF_TABLE;
    let runtime_bytes = process(shape.slots).saturating_add(vocabulary).saturating_add(mapped_in);
    Extras { prompt_cache_bytes, checkpoint_bytes, runtime_bytes, loading_bytes }
}

/// The prompt cache at its limit; no limit counts as the default one, since nothing better is known.
fn prompt_cache(settings: &Settings) -> u64 {
    let limit = settings.prompt_cache_mib.unwrap_or(8192);
    limit.saturating_mul(MIB)
}

/// The copy of one tensor that is made while weights are read (not mapped) into a buffer that isn't
/// plain host memory: repacked, or on a device (`llama_model_loader::load_all_data`). The largest
/// tensor stands for the one.
fn staging(facts: &Facts, placed: &Placed) -> u64 {
    let mapped = placed.mapped_by_shard.iter().any(|bytes| *bytes > 0);
    let elsewhere = placed.repacked > 0 || placed.devices.iter().any(|bytes| *bytes > 0);
    if elsewhere && !mapped { facts.largest } else { 0 }
}

/// Checkpoints are made for models whose past can't be cut off at any token: recurrent or windowed ones.
/// Each has the state, and of windowed layers the cells that are within the window.
///
/// As many as `--ctx-checkpoints` allows: `--checkpoint-min-step` doesn't hold at the end of a prompt and
/// at a user's messages, so it bounds nothing. While a draft is verified, recurrent models have one more.
fn checkpoints(facts: &Facts, settings: &Settings, shape: &Shape) -> u64 {
    let recurrent = facts.layers.iter().filter(|l| l.recurrent).count() as u64;
    let state =
        recurrent.saturating_mul(4).saturating_mul(facts.state.rolling.saturating_add(facts.state.recurrent));
    let (k, v) = facts.head_windowed;
    let row = |layer: &super::Layer| {
        let k = settings.cache_type_k.row_bytes(k.saturating_mul(layer.kv_heads));
        k.saturating_add(settings.cache_type_v.row_bytes(v.saturating_mul(layer.kv_heads)))
    };
    let windowed: Vec<u64> = match settings.swa_full {
        true => Vec::new(),
        false => facts.layers.iter().filter(|l| l.windowed && l.cached).map(row).collect(),
    };
    let layers = recurrent.saturating_add(windowed.len() as u64);
    if layers == 0 {
        return 0;
    }
    let cells = if windowed.is_empty() { 1 } else { facts.window.min(shape.window_cells) };
    let rows = windowed.iter().fold(CELL, |sum, row| sum.saturating_add(*row));
    let each = state.saturating_add(cells.saturating_mul(rows)).saturating_add(layers * LAYER);
    let verifying = u64::from(recurrent > 0 && settings.drafted() > 0);
    let count = u64::from(settings.context_checkpoints) + verifying;
    each.saturating_mul(count).saturating_mul(u64::from(shape.slots))
}

//! Host memory beyond the engine's own buffers: prompt cache, context checkpoints, the process.

use super::Extras;
use super::cache::Shape;
use super::facts::Facts;
use super::settings::Settings;
use crate::bytes::MIB;

/// A llama-server without its buffers: 44 MiB were measured, with a vocabulary of 150k tokens.
const RUNTIME: u64 = 44 * MIB;

/// Sizes what comes on top at run time.
pub(super) fn extras(facts: &Facts, settings: &Settings, shape: &Shape) -> Extras {
    Extras {
        prompt_cache_bytes: prompt_cache(settings),
        checkpoint_bytes: checkpoints(facts, settings, shape),
        runtime_bytes: RUNTIME,
    }
}

/// The prompt cache at its limit; no limit counts as the default one, since nothing better is known.
fn prompt_cache(settings: &Settings) -> u64 {
    let limit = settings.prompt_cache_mib.unwrap_or(8192);
    limit.saturating_mul(MIB)
}

/// Checkpoints are made for models whose past can't be cut off at any token: recurrent or windowed ones.
fn checkpoints(facts: &Facts, settings: &Settings, shape: &Shape) -> u64 {
    let recurrent = facts.layers.iter().filter(|l| l.recurrent).count() as u64;
    let state = recurrent.saturating_mul(4).saturating_mul(facts.state.rolling + facts.state.recurrent);
    let windowed = if settings.swa_full {
        0
    } else {
        facts
            .layers
            .iter()
            .filter(|l| l.windowed && l.cached)
            .map(|l| {
                let (k, v) = facts.head_windowed;
                settings.cache_type_k.row_bytes(k * l.kv_heads)
                    + settings.cache_type_v.row_bytes(v * l.kv_heads)
            })
            .sum()
    };
    let cells = facts.window.min(shape.window_cells);
    let each = state.saturating_add(cells.saturating_mul(windowed));
    let by_step = match settings.checkpoint_step {
        0 => u64::MAX,
        step => shape.cells.div_ceil(step).saturating_add(1),
    };
    let count = u64::from(settings.context_checkpoints).min(by_step);
    each.saturating_mul(count).saturating_mul(u64::from(shape.slots))
}

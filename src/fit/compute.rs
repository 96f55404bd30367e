//! Compute buffers and the output buffer.

use super::arch::Indexer;
use super::cache::Shape;
use super::facts::Facts;
use super::graph;
use super::settings::{Device, Settings};
use super::weights::{Assigned, Placed};
use super::{FitError, product};

/// Sizes of compute buffers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Computed {
    pub host: u64,
    pub devices: Vec<u64>,
    pub output: u64,
    pub exact: bool,
    pub notes: Vec<String>,
}

/// Sizes the compute buffers by the engine's own graph where that is known, otherwise from above.
///
/// # Errors
/// The graph would not fit into what the engine makes room for.
pub(super) fn compute(
    facts: &Facts,
    settings: &Settings,
    shape: &Shape,
    assigned: &Assigned,
    placed: &Placed,
    used: &[&Device],
) -> Result<Computed, FitError> {
    let output = output(facts, settings, shape);
    if let Some(buffers) = graph::buffers(facts, settings, shape, assigned, placed, used) {
        if graph::capacity(facts).is_some_and(|most| buffers.tensors > most) {
            return Err(FitError::Rejected(format!(
                "its graph would have {} tensors, more than the engine makes room for: use fewer slots \
                 (--parallel) or one cache for all (--kv-unified)",
                buffers.tensors
            )));
        }
        let (host, devices) = (buffers.host, buffers.devices);
        return Ok(Computed { host, devices, output, exact: true, notes: Vec::new() });
    }
    let bound = bound(facts, shape);
    let holds = |i: usize| assigned.layers.contains(&Some(i)) || assigned.output == Some(i);
    Ok(Computed {
        host: bound,
        devices: (0..used.len()).map(|i| if holds(i) { bound } else { 0 }).collect(),
        output,
        exact: false,
        notes: vec![format!(
            "the compute buffers of {} are bounded from above: its graph isn't known",
            facts.architecture
        )],
    })
}

/// More than any layer can have live at once: all of its tensors together, the masks and the logits.
fn bound(facts: &Facts, shape: &Shape) -> u64 {
    let n = shape.ubatch.max(u64::from(shape.slots));
    let wide = facts.window > 0;
    let masks = 4 * (shape.cells + if wide { shape.window_cells } else { 0 });
    let worst = facts.layers.iter().map(|l| {
        let head = facts.head.0.max(facts.head.1) + facts.latent.map_or(0, |_| 1024);
        let heads = product([6, l.heads.max(1), head]);
        let experts = l.experts_used * (2 * facts.embedding + 3 * l.expert_feed_forward) + 8 * facts.experts;
        let dense = 8 * facts.embedding + 3 * l.feed_forward;
        heads.saturating_add(dense + experts).saturating_mul(4)
    });
    let worst = worst.max().unwrap_or(0);
    let heads = facts.layers.iter().map(|l| l.heads).max().unwrap_or(0);
    let attention = if shape.flash_attention { 0 } else { product([8, heads, shape.cells]) };
    let state =
        product([16, u64::from(shape.slots), facts.state.recurrent.saturating_add(facts.state.rolling)]);
    let logits = product([4, facts.vocabulary, shape.outputs]);
    // Indexers score every cell for every token, several times over; decays are squares of the batch.
    let scores =
        if facts.arch.indexer == Indexer::None { 0 } else { 32 * (1 + u64::from(shape.slots)) * shape.cells };
    let decays = if facts.state.recurrent > 0 { 32 * n } else { 0 };
    let each =
        worst.saturating_add(masks).saturating_add(attention).saturating_add(scores).saturating_add(decays);
    n.saturating_mul(each).saturating_add(logits).saturating_add(state)
}

/// The buffer of logits, one row for each slot; embeddings too where they are asked for.
fn output(facts: &Facts, settings: &Settings, shape: &Shape) -> u64 {
    let row = facts.vocabulary.saturating_add(if settings.embedding { facts.embedding } else { 0 });
    // Beside embeddings the logits of a batch aren't kept; drafted tokens have theirs.
    let rows =
        if settings.embedding { u64::from(shape.slots) } else { shape.outputs.max(u64::from(shape.slots)) };
    product([4, row, rows])
}

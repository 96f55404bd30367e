//! Compute buffers and the output buffer.

use super::cache::Shape;
use super::facts::Facts;
use super::settings::Settings;
use super::weights::{Assigned, Placed};

/// Sizes of compute buffers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Computed {
    pub host: u64,
    pub devices: Vec<u64>,
    pub output: u64,
    pub exact: bool,
    pub notes: Vec<String>,
}

/// Sizes compute buffers from above: the worst layer's tensors together, and the masks.
pub(super) fn compute(
    facts: &Facts,
    settings: &Settings,
    shape: &Shape,
    assigned: &Assigned,
    _placed: &Placed,
    devices: usize,
) -> Computed {
    let n = shape.ubatch;
    let masks = 2 * (shape.cells + if facts.window > 0 { shape.window_cells } else { 0 });
    let worst = facts
        .layers
        .iter()
        .map(|l| {
            let heads = l.heads * facts.head.0.max(facts.head.1);
            let experts = l.experts_used * (facts.embedding + 3 * l.expert_feed_forward);
            4 * (6 * facts.embedding + 3 * l.feed_forward + 4 * heads + experts)
        })
        .max()
        .unwrap_or(0);
    let attention = if shape.flash_attention {
        0
    } else {
        let heads = facts.layers.iter().map(|l| l.heads).max().unwrap_or(0);
        4 * heads * shape.cells * 2
    };
    let recurrent = if facts.layers.iter().any(|l| l.recurrent) { 8 * facts.state.recurrent } else { 0 };
    let logits = 4 * facts.vocabulary * shape.outputs;
    let total = n.saturating_mul(worst + masks + attention).saturating_add(logits + recurrent);
    let host_only = assigned.count() == 0;
    Computed {
        host: if host_only { total } else { n * (16 * facts.embedding + masks) },
        devices: (0..devices)
            .map(|i| if assigned.layers.contains(&Some(i)) || assigned.output == Some(i) { total } else { 0 })
            .collect(),
        output: output(facts, settings, shape),
        exact: false,
        notes: Vec::new(),
    }
}

/// The buffer of logits, one row for each slot; embeddings too where they are asked for.
fn output(facts: &Facts, settings: &Settings, shape: &Shape) -> u64 {
    let row = facts.vocabulary + if settings.embedding { facts.embedding } else { 0 };
    row.saturating_mul(4 * u64::from(shape.slots))
}

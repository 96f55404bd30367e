//! The compute graph of a prompt batch, as llama.cpp builds it, and the buffers that it takes.
//!
//! llama-server reserves compute buffers for the largest prompt batch with every cell of the cache in use.
//! Here the same graph is built with shapes alone, scheduled over the devices and allocated, by the rules
//! of ggml. Layers that repeat are built a few times only: what is live at once doesn't change any more.

mod alloc;
mod attention;
mod build;
mod ffn;
mod models;
mod recurrent;
mod sched;
mod tensor;

use super::cache::Shape;
use super::facts::Facts;
use super::settings::{Device, Settings, SplitMode};
use super::weights::{Assigned, Placed};

/// What a graph takes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Buffers {
    pub host: u64,
    pub devices: Vec<u64>,
    /// Operations and other tensors of the whole graph, against which the engine has a limit.
    pub tensors: u64,
}

/// ggml's number of copies for pipelining.
const PIPELINE_COPIES: usize = 4;

/// The buffers of a model's graph; none for an architecture whose graph isn't known.
pub(super) fn buffers(
    facts: &Facts,
    settings: &Settings,
    shape: &Shape,
    assigned: &Assigned,
    placed: &Placed,
    used: &[&Device],
) -> Option<Buffers> {
    let layers = chosen(facts, assigned, placed);
    measure(facts, settings, shape, assigned, placed, used, &layers)
}

fn measure(
    facts: &Facts,
    settings: &Settings,
    shape: &Shape,
    assigned: &Assigned,
    placed: &Placed,
    used: &[&Device],
    layers: &[usize],
) -> Option<Buffers> {
    let backends = sched::Backends {
        offloads: used.iter().map(|d| d.offloads_operations && settings.op_offload).collect(),
        copies: if pipelines(facts, settings, assigned, used) { PIPELINE_COPIES } else { 1 },
    };
    let full = assigned.count() > facts.layer_count_all;
    let mut builder = build::Builder::new(facts, settings, shape, assigned, placed, used.len(), full);
    let each = models::build(&mut builder, layers)?;
    let mut graph = builder.graph;
    let built = (graph.nodes.len() + graph.leafs.len()) as u64;
    let tensors = built.saturating_add(left_out(facts, layers, &each));
    let mut devices = sched::schedule(&mut graph, &backends);
    let host = devices.pop().unwrap_or(0);
    Some(Buffers { host, devices, tensors })
}

/// How many tensors the layers have that weren't built: each as many as the last one like it.
fn left_out(facts: &Facts, built: &[usize], each: &[usize]) -> u64 {
    let like = |i: usize| (facts.kinds.of_layer[i], facts.layers[i]);
    let of = |i: usize| {
        let mut latest_first = built.iter().zip(each).rev();
        latest_first.find(|(b, _)| like(**b) == like(i)).map_or(0, |(_, n)| *n as u64)
    };
    let missing = (0..facts.layer_count as usize).filter(|i| !built.contains(i));
    missing.map(of).fold(0, u64::saturating_add)
}

/// How many tensors a graph of this model may have: what the engine makes room for (`graph_max_nodes`,
/// `ggml_hash_size`). None where it makes room enough.
pub(super) fn capacity(facts: &Facts) -> Option<u64> {
    const ROOMY: [&str; 11] = [
        "kimi-k3",
        "glm5-next",
        "hrm_text",
        "qwen3next",
        "kimi-linear",
        "bailingmoe3",
        "qwen35",
        "qwen35moe",
        "nanbeige",
        "minimax-01",
        "minimax-m3",
    ];
    if ROOMY.contains(&facts.architecture.as_str()) {
        return None;
    }
    let wanted = (8 * facts.tensor_count).max(1024);
    // The next primes after powers of two.
    let primes = [1031, 2053, 4099, 8209, 16411, 32771, 65537, 131_101, 262_147, 524_309];
    primes.into_iter().find(|p| *p >= wanted)
}

/// Whether batches are pipelined over several devices (`llama_context`).
fn pipelines(facts: &Facts, settings: &Settings, assigned: &Assigned, used: &[&Device]) -> bool {
    used.len() > 1
        && assigned.count() > facts.layer_count_all
        && settings.split_mode == SplitMode::Layer
        && settings.kv_offload
        && settings.overrides.is_empty()
}

/// Layers that stand for all: of layers alike in a row, and of periods alike, the first few; and the last.
fn chosen(facts: &Facts, assigned: &Assigned, placed: &Placed) -> Vec<usize> {
    let count = facts.layer_count as usize;
    let signature = |i: usize| {
        (
            facts.kinds.of_layer[i],
            facts.layers[i],
            assigned.layers[i],
            placed.split_experts[i],
            placed.split_dense[i],
        )
    };
    let signatures: Vec<_> = (0..count).map(signature).collect();
    let mut kept: Vec<usize> = Vec::new();
    let mut at = 0;
    while at < count {
        // The shortest period from here on that repeats, and how often.
        let period = (1..=8)
            .find(|p| at + 3 * p <= count && (at..at + 2 * p).all(|i| signatures[i] == signatures[i + p]));
        let Some(period) = period else {
            kept.push(at);
            at += 1;
            continue;
        };
        let mut end = at + period;
        while end < count && signatures[end] == signatures[end - period] {
            end += 1;
        }
        let repeats = (end - at) / period;
        kept.extend(at..at + 2 * period);
        at += repeats * period;
        kept.extend(at - period..at);
    }
    if kept.last() != Some(&(count.saturating_sub(1))) && count > 0 {
        kept.push(count - 1);
    }
    kept
}

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

/// Layers that stand for all: of layers alike in a row the first two and the last, and of what is left the first
/// two periods and the last one.
fn chosen(facts: &Facts, assigned: &Assigned, placed: &Placed) -> Vec<usize> {
    let count = facts.layer_count as usize;
    let alike = |a: usize, b: usize| {
        facts.kinds.of_layer[a] == facts.kinds.of_layer[b]
            && facts.layers[a] == facts.layers[b]
            && assigned.layers[a] == assigned.layers[b]
            && placed.split_experts[a] == placed.split_experts[b]
            && placed.split_dense[a] == placed.split_dense[b]
    };
    let inner =
        |i: &usize| *i > 1 && i + 1 < count && alike(*i, i - 1) && alike(*i, i - 2) && alike(*i, i + 1);
    let ends: Vec<usize> = (0..count).filter(|i| !inner(i)).collect();
    let same = |a: usize, b: usize| alike(ends[a], ends[b]);
    let mut kept: Vec<usize> = Vec::new();
    let mut at = 0;
    while at < ends.len() {
        let repeats = |p: &usize| at + 4 * p <= ends.len() && (at..at + 3 * p).all(|i| same(i, i + p));
        let Some(period) = (2..=12).find(repeats) else {
            kept.push(ends[at]);
            at += 1;
            continue;
        };
        let mut end = at + period;
        while end < ends.len() && same(end, end - period) {
            end += 1;
        }
        let whole = (end - at) / period * period;
        kept.extend(&ends[at..at + 2 * period]);
        kept.extend(&ends[at + whole - period..at + whole]);
        at += whole;
    }
    kept
}

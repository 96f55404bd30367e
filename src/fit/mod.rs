//! The fit calculator: what llama-server will allocate for a model with given settings.
//!
//! [`Facts`] are taken from a model's header once; [`estimate`] is a pure function of them, the
//! [`Settings`] and the [`Devices`]. Weights, cache and state follow llama.cpp's own rules to the byte.

mod arch;
pub mod args;
mod beside;
mod cache;
mod companions;
mod compute;
mod extras;
mod facts;
pub mod flags;
mod graph;
mod hyper;
mod matched;
mod pattern;
mod place;
mod settings;
mod throughput;
mod weights;

use serde::Serialize;

pub use arch::Arch;
pub use beside::{Adapter, Beside, Projector};
pub use cache::Shape;
pub use companions::BesideBytes;
pub use facts::{Facts, Layer};
pub use place::{Budget, Placement, max_context, place};
pub use settings::{
    Device, DeviceKind, Devices, Draft, FlashAttention, GpuLayers, LoadMode, Override, Settings, SplitMode,
};
pub use throughput::{DISK_SPEEDS, Reading, millitokens_per_second, reading};
pub use weights::FileRange;

/// The version of llama.cpp whose rules these are.
pub const ENGINE_VERSION: &str = "0.7.0 (build 11669)";

/// What no machine has (1 PiB). An estimate that comes to more is made of numbers that mean nothing, and sums that
/// stop at the largest number are far above.
const MAX_BYTES: u64 = 1 << 50;

/// Why there is no estimate. Each is one sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FitError {
    /// A projector, an adapter, or a file without an architecture.
    #[error("this is no language model ({})", if architecture.is_empty() { "it names no architecture" } else { architecture.as_str() })]
    NotALanguageModel {
        /// What the file says that it is.
        architecture: String,
    },
    /// Metadata that llama.cpp needs as well.
    #[error("metadata {key} {problem}")]
    Metadata {
        /// The key.
        key: String,
        /// What is wrong.
        problem: String,
    },
    /// A file beside the model that is not what it should be.
    #[error("{0}")]
    Beside(String),
    /// Settings that the engine would refuse, or abort on.
    #[error("llama-server refuses these settings: {0}")]
    Rejected(String),
    /// Settings that are not understood well enough for a number.
    #[error("no estimate is possible: {0}")]
    Unknown(String),
}

/// Bytes by what they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Parts {
    /// Weights, mapped or not.
    pub weights_bytes: u64,
    /// Caches of K and V, and of an indexer's keys.
    pub kv_bytes: u64,
    /// Recurrent state.
    pub state_bytes: u64,
    /// Compute buffers.
    pub compute_bytes: u64,
    /// The buffer of logits.
    pub output_bytes: u64,
    /// Prompt cache, context checkpoints and the process itself.
    pub extras_bytes: u64,
    /// Draft model, projector, adapters, control vector.
    pub beside_bytes: u64,
    /// All of them.
    pub total_bytes: u64,
}

impl Parts {
    /// Sets the total to the sum.
    fn summed(mut self) -> Self {
        self.total_bytes = [
            self.weights_bytes,
            self.kv_bytes,
            self.state_bytes,
            self.compute_bytes,
            self.output_bytes,
            self.extras_bytes,
            self.beside_bytes,
        ]
        .iter()
        .fold(0, |n: u64, part| n.saturating_add(*part));
        self
    }

    fn add(self, other: Self) -> Self {
        Self {
            weights_bytes: self.weights_bytes.saturating_add(other.weights_bytes),
            kv_bytes: self.kv_bytes.saturating_add(other.kv_bytes),
            state_bytes: self.state_bytes.saturating_add(other.state_bytes),
            compute_bytes: self.compute_bytes.saturating_add(other.compute_bytes),
            output_bytes: self.output_bytes.saturating_add(other.output_bytes),
            extras_bytes: self.extras_bytes.saturating_add(other.extras_bytes),
            beside_bytes: self.beside_bytes.saturating_add(other.beside_bytes),
            total_bytes: 0,
        }
        .summed()
    }
}

/// Where the bytes are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Split {
    /// On all devices together.
    pub gpu: Parts,
    /// On the host.
    pub host: Parts,
}

/// Host memory beyond the engine's own buffers; each part is in `extras_bytes`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Extras {
    /// The prompt cache at its limit (`--cache-ram`).
    pub prompt_cache_bytes: u64,
    /// Context checkpoints of all slots at their most (`--ctx-checkpoints`).
    pub checkpoint_bytes: u64,
    /// The process: vocabulary, buffers of the server, page tables.
    pub runtime_bytes: u64,
    /// What loading takes for a moment beyond everything that is there afterwards: a copy of a tensor.
    pub loading_bytes: u64,
}

impl Extras {
    /// All of it.
    fn total(&self) -> u64 {
        [self.prompt_cache_bytes, self.checkpoint_bytes, self.runtime_bytes, self.loading_bytes]
            .iter()
            .fold(0, |sum: u64, part| sum.saturating_add(*part))
    }
}

/// What llama-server will allocate.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Estimate {
    /// Context of all slots together, after rounding.
    pub context: u64,
    /// Context of one slot (of all of them together with a unified cache).
    pub context_per_slot: u64,
    /// Slots.
    pub slots: u32,
    /// Whether all slots share one cache.
    pub kv_unified: bool,
    /// Whether flash attention is used.
    pub flash_attention: bool,
    /// The bytes.
    #[serde(flatten)]
    pub bytes: Parts,
    /// Where they are.
    pub split: Split,
    /// Each device's bytes, in the order of [`Devices::touched`].
    pub devices: Vec<Parts>,
    /// What `extras_bytes` is made of.
    pub extras: Extras,
    /// What `beside_bytes` is made of.
    pub beside: BesideBytes,
    /// Weights on the host that stay backed by the files: reclaimable, read again from disk. Those of a
    /// draft model too.
    pub mapped_bytes: u64,
    /// `mapped_bytes` for each file of the model, and behind them of the draft model.
    pub mapped_by_shard: Vec<u64>,
    /// The part of `mapped_bytes` that every token touches: attention, routers, shared experts and the output,
    /// but neither experts, of which few are used, nor the rows of the embedding.
    pub mapped_always_bytes: u64,
    /// The part of `mapped_bytes` that is routed experts, of which each token uses a few.
    pub mapped_experts_bytes: u64,
    /// Weights on the host in anonymous memory.
    pub anonymous_weights_bytes: u64,
    /// The part of `anonymous_weights_bytes` that is routed experts, of which each token uses a few.
    pub anonymous_experts_bytes: u64,
    /// The part of `anonymous_weights_bytes` that is repacked: its mapped originals stay as page cache.
    pub repacked_bytes: u64,
    /// Layers on devices, the output counted as one.
    pub gpu_layers: u32,
    /// Whether weights, cache and state are exact and compute follows the engine's own rules; false where a
    /// bound stands in.
    pub exact: bool,
    /// Whether the architecture is known; if not, all is a bound and admission fails closed.
    pub known: bool,
    /// What the reader of the figures should know, one sentence each.
    pub notes: Vec<String>,
}

/// What llama-server will allocate for a model and what is loaded beside it ([`Facts::beside`]).
///
/// # Errors
/// The settings are such that the engine would refuse them, or nothing is known of what they ask for.
pub fn estimate(facts: &Facts, settings: &Settings, devices: &Devices) -> Result<Estimate, FitError> {
    if settings.speculative.iter().any(|kind| kind == "draft-mtp") {
        return Err(FitError::Unknown(
            "drafts from prediction layers (--spec-type draft-mtp) take memory that isn't worked out; declare it with \
             the key memory"
                .to_owned(),
        ));
    }
    let overridden = overridden(facts, settings)?;
    let mut estimate = alone(facts, settings, devices)?;
    if let Some(note) = overridden {
        estimate.exact = false;
        estimate.notes.push(note);
    }
    if !facts.beside.is_empty() || settings.control_vector {
        companions::add(&mut estimate, facts, settings, devices)?;
    }
    sensible(estimate)
}

/// The estimate, where its sum is one that a machine could have.
fn sensible(estimate: Estimate) -> Result<Estimate, FitError> {
    if estimate.bytes.total_bytes > MAX_BYTES {
        return Err(FitError::Unknown(
            "it would come to more than a PiB: the model's header or the settings have numbers that make no sense"
                .to_owned(),
        ));
    }
    Ok(estimate)
}

/// A product of dimensions, which a header may have made up: it never wraps round to a small one.
fn product<const N: usize>(factors: [u64; N]) -> u64 {
    factors.into_iter().fold(1, u64::saturating_mul)
}

/// What every token touches of a model's mapped weights (attention, routers, shared experts, norms, output): where
/// it lies in the files. Experts come and go, and of the embedding a token reads one row. Empty where nothing is mapped.
///
/// # Errors
/// The settings are such that the engine would refuse them.
pub fn always_touched(
    facts: &Facts,
    settings: &Settings,
    devices: &Devices,
) -> Result<Vec<FileRange>, FitError> {
    let used = devices.used(settings);
    let assigned = weights::assign(facts, settings, &used);
    weights::always_touched(facts, settings, &used, &assigned)
}

/// What is to be said where metadata is replaced that memory depends on (`--override-kv`). Facts are those of the
/// file: fewer experts for a token take no more than those, and all else is not worked out.
fn overridden(facts: &Facts, settings: &Settings) -> Result<Option<String>, FitError> {
    let mut note = None;
    for (key, value) in &settings.metadata_overrides {
        let own = key.strip_prefix(facts.architecture.as_str()).and_then(|rest| rest.strip_prefix('.'));
        let Some(own) = own else { continue };
        let used = facts.layers.iter().map(|layer| layer.experts_used).max().unwrap_or(0);
        let number = value.strip_prefix("int:").and_then(|number| number.parse::<u64>().ok());
        if own != "expert_used_count" || number.is_none_or(|number| number > used) {
            return Err(FitError::Unknown(format!(
                "--override-kv {key} replaces what memory is worked out from; declare it with the key memory"
            )));
        }
        note =
            Some(format!("--override-kv {key}: compute buffers are those of the file's own {used} experts"));
    }
    Ok(note)
}

/// What llama-server will allocate for one model by itself.
fn alone(facts: &Facts, settings: &Settings, devices: &Devices) -> Result<Estimate, FitError> {
    let used = devices.used(settings);
    let shape = Shape::new(facts, settings)?;
    let assigned = weights::assign(facts, settings, &used);
    let placed = weights::weights(facts, settings, &used, &assigned)?;
    let cached = cache::cache(facts, settings, &shape, &assigned, used.len())?;
    let computed = compute::compute(facts, settings, &shape, &assigned, &placed, &used)?;
    let mut host = Parts {
        weights_bytes: placed.host_bytes(),
        kv_bytes: cached.host.kv,
        state_bytes: cached.host.state,
        compute_bytes: computed.host,
        output_bytes: computed.output,
        ..Parts::default()
    };
    let extras = extras::extras(facts, settings, &shape, &placed, &host);
    host.extras_bytes = extras.total();
    let host = host.summed();
    let per_device: Vec<Parts> = (0..used.len())
        .map(|i| {
            Parts {
                weights_bytes: placed.devices[i],
                kv_bytes: cached.devices[i].kv,
                state_bytes: cached.devices[i].state,
                compute_bytes: computed.devices[i],
                ..Parts::default()
            }
            .summed()
        })
        .collect();
    let gpu = per_device.iter().fold(Parts::default(), |sum, part| sum.add(*part));
    let mut notes = computed.notes;
    if settings.prompt_cache_mib.is_none() {
        notes.push("the prompt cache has no limit (--cache-ram -1): 8 GiB are counted for it".to_owned());
    }
    if !facts.known {
        notes.push(format!(
            "the architecture {} is unknown: all but the weights is a bound",
            facts.architecture
        ));
    }
    sensible(Estimate {
        context: shape.context,
        context_per_slot: shape.cells,
        slots: shape.slots,
        kv_unified: shape.unified,
        flash_attention: shape.flash_attention,
        bytes: host.add(gpu),
        split: Split { gpu, host },
        devices: per_device,
        extras,
        beside: BesideBytes::default(),
        mapped_bytes: placed.mapped_by_shard.iter().fold(0, |sum, bytes| sum.saturating_add(*bytes)),
        mapped_by_shard: placed.mapped_by_shard,
        mapped_always_bytes: placed.mapped_always,
        mapped_experts_bytes: placed.mapped_experts,
        anonymous_experts_bytes: placed.anonymous_experts,
        anonymous_weights_bytes: placed.anonymous,
        repacked_bytes: placed.repacked,
        gpu_layers: assigned.count(),
        exact: computed.exact && cached.exact && facts.known && settings.prompt_cache_mib.is_some(),
        known: facts.known,
        notes,
    })
}

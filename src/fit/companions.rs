//! Sizes what an engine loads beside a model, where that goes.

use serde::Serialize;

use super::cache::Shape;
use super::extras;
use super::facts::Facts;
use super::settings::{Device, Devices, FlashAttention, Settings, SplitMode};
use super::weights::{self, Assigned};
use super::{Estimate, FitError, Parts, alone};
use crate::bytes::MIB;

/// What is loaded beside a model, in bytes on the host and on devices together; in `beside_bytes`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BesideBytes {
    /// The draft model: weights, cache and buffers, and its vocabulary.
    pub draft_bytes: u64,
    /// The projector: its tensors exactly, and a bound for its buffers.
    pub projector_bytes: u64,
    /// LoRA adapters: their tensors exactly, and a bound for what they add to the buffers.
    pub adapter_bytes: u64,
    /// The control vector, and a bound for what it adds to the buffers.
    pub control_vector_bytes: u64,
}

/// The host memory of a projector beside its buffers: its graph's description for 8192 nodes.
const PROJECTOR: u64 = 4 * MIB;

/// Bytes on the host and on each device.
#[derive(Debug, Default)]
struct Taken {
    host: u64,
    devices: Vec<u64>,
}

impl Taken {
    fn none(devices: usize) -> Self {
        Self { host: 0, devices: vec![0; devices] }
    }

    fn put(&mut self, place: Option<usize>, bytes: u64) {
        let sum = place.and_then(|device| self.devices.get_mut(device)).unwrap_or(&mut self.host);
        *sum = sum.saturating_add(bytes);
    }

    fn total(&self) -> u64 {
        self.devices.iter().fold(self.host, |sum, bytes| sum.saturating_add(*bytes))
    }
}

/// Adds what is loaded beside the model of `estimate`.
///
/// # Errors
/// The engine would refuse the draft model with these settings, or its size can't be told.
pub(super) fn add(
    estimate: &mut Estimate,
    facts: &Facts,
    settings: &Settings,
    devices: &Devices,
) -> Result<(), FitError> {
    let touched = devices.touched(&facts.beside, settings);
    estimate.devices.resize(touched.len(), Parts::default());
    let shape = Shape::new(facts, settings)?;
    let used = devices.used(settings);
    let assigned = weights::assign(facts, settings, &used);

    if let Some(draft) = &facts.beside.draft {
        let taken = draft_model(estimate, draft, settings, devices, &touched)?;
        estimate.beside.draft_bytes = put(estimate, &taken);
    }
    let caches = estimate.extras.prompt_cache_bytes.saturating_add(estimate.extras.checkpoint_bytes);
    let mut staged = 0;
    if let Some(projector) = &facts.beside.projector {
        let mut taken = Taken::none(touched.len());
        let fused = settings.flash_attention != FlashAttention::Off;
        let buffers = projector.compute_bound(settings.image_max_tokens, fused);
        let first = devices.list.first().filter(|_| settings.mmproj_offload);
        let place = first.and_then(|first| touched.iter().position(|device| device.name == first.name));
        taken.put(place, projector.weights.saturating_add(buffers));
        taken.put(None, PROJECTOR);
        staged = projector.largest;
        estimate.beside.projector_bytes = put(estimate, &taken);
        estimate.exact = false;
        estimate.notes.push(format!(
            "the projector's buffers are bounded from above{}",
            if fused { ", with flash attention" } else { "" }
        ));
    }
    if !facts.beside.adapters.is_empty() {
        let mut taken = Taken::none(touched.len());
        for adapter in &facts.beside.adapters {
            let (host, on_devices) = weights::adapter(settings, &used, &assigned, &adapter.tensors)?;
            taken.put(None, host);
            on_devices.iter().enumerate().for_each(|(device, bytes)| taken.put(Some(device), *bytes));
            everywhere(&mut taken, &assigned, &shape, adapter.width);
            staged = staged.max(adapter.largest);
        }
        estimate.beside.adapter_bytes = put(estimate, &taken);
        estimate.exact = false;
        estimate.notes.push("what adapters add to the compute buffers is bounded from above".to_owned());
    }
    if settings.control_vector {
        let mut taken = Taken::none(touched.len());
        // Every layer but the first has a row of 32-bit floats.
        let row = (4 * facts.embedding).next_multiple_of(256);
        assigned.layers.iter().skip(1).for_each(|place| taken.put(*place, row));
        everywhere(&mut taken, &assigned, &shape, facts.embedding);
        estimate.beside.control_vector_bytes = put(estimate, &taken);
        estimate.exact = false;
        estimate
            .notes
            .push("what the control vector adds to the compute buffers is bounded from above".to_owned());
    }
    // Each is loaded when the model's context is there already, but no prompt is kept yet.
    let loading = staged.saturating_sub(caches).max(estimate.extras.loading_bytes);
    let more = loading - estimate.extras.loading_bytes;
    estimate.extras.loading_bytes = loading;
    estimate.split.host.extras_bytes = estimate.split.host.extras_bytes.saturating_add(more);

    estimate.split.host = estimate.split.host.summed();
    estimate.split.gpu = estimate.devices.iter().fold(Parts::default(), |sum, part| sum.add(*part));
    estimate.bytes = estimate.split.host.add(estimate.split.gpu);
    Ok(())
}

/// `width` floats for each token of a batch, wherever a layer is computed.
fn everywhere(taken: &mut Taken, assigned: &Assigned, shape: &Shape, width: u64) {
    let bytes = shape.ubatch.saturating_mul(width).saturating_mul(4);
    taken.put(None, bytes);
    for device in 0..taken.devices.len() {
        if assigned.layers.contains(&Some(device)) || assigned.output == Some(device) {
            taken.put(Some(device), bytes);
        }
    }
}

/// Counts what was taken into the estimate's parts; returns its sum.
fn put(estimate: &mut Estimate, taken: &Taken) -> u64 {
    let host = &mut estimate.split.host;
    host.beside_bytes = host.beside_bytes.saturating_add(taken.host);
    for (parts, bytes) in estimate.devices.iter_mut().zip(&taken.devices) {
        parts.beside_bytes = parts.beside_bytes.saturating_add(*bytes);
        *parts = parts.summed();
    }
    taken.total()
}

/// The draft model is an estimate of its own: its context is as large as the model's, in as many
/// slots, with one output each; its caches, layers and devices are set apart, the rest is as for the
/// model (`common_base_params_to_speculative`, `common_speculative_init_result`).
fn draft_model(
    estimate: &mut Estimate,
    draft: &Facts,
    settings: &Settings,
    devices: &Devices,
    touched: &[&Device],
) -> Result<Taken, FitError> {
    let own = &settings.draft;
    // Where the model makes checkpoints, the draft's state is part of each.
    let checkpoints =
        if estimate.extras.checkpoint_bytes > 0 { settings.context_checkpoints.saturating_add(1) } else { 0 };
    let drafting = Settings {
        context: estimate.context,
        parallel: Some(estimate.slots),
        kv_unified: Some(estimate.kv_unified),
        context_per_slot: None,
        ubatch: if own.ubatch > 0 { own.ubatch } else { settings.ubatch },
        cache_type_k: own.cache_type_k,
        cache_type_v: own.cache_type_v,
        gpu_layers: own.gpu_layers,
        overrides: own.overrides.clone(),
        devices: own.devices.clone().or_else(|| settings.devices.clone()),
        split_mode: match &own.devices {
            Some(names) if names.len() == 1 => SplitMode::Layer,
            _ => settings.split_mode,
        },
        embedding: false,
        backend_sampling: false,
        prompt_cache_mib: Some(0),
        context_checkpoints: checkpoints,
        adapters: Vec::new(),
        control_vector: false,
        speculative: Vec::new(),
        ..settings.clone()
    };
    let drafted = alone(draft, &drafting, devices).map_err(|error| match error {
        FitError::Rejected(why) => FitError::Rejected(format!("{why} (for the draft model)")),
        FitError::Unknown(why) => FitError::Unknown(format!("{why} (for the draft model)")),
        other => other,
    })?;
    if !settings.speculative.iter().any(|kind| kind.starts_with("draft-")) {
        estimate.notes.push(
            "the draft model is loaded but not used: name a type, such as --spec-type draft-simple"
                .to_owned(),
        );
    }
    estimate.exact &= drafted.exact;
    estimate.known &= drafted.known;
    estimate.notes.extend(drafted.notes.iter().map(|note| format!("{note} (for the draft model)")));
    estimate.mapped_bytes = estimate.mapped_bytes.saturating_add(drafted.mapped_bytes);
    estimate.mapped_always_bytes = estimate.mapped_always_bytes.saturating_add(drafted.mapped_bytes);
    estimate.mapped_by_shard.extend(&drafted.mapped_by_shard);

    let extras = &mut estimate.extras;
    extras.checkpoint_bytes = extras.checkpoint_bytes.saturating_add(drafted.extras.checkpoint_bytes);
    let loading = extras.loading_bytes.max(drafted.extras.loading_bytes);
    let more = (loading - extras.loading_bytes).saturating_add(drafted.extras.checkpoint_bytes);
    extras.loading_bytes = loading;
    estimate.split.host.extras_bytes = estimate.split.host.extras_bytes.saturating_add(more);

    let mut taken = Taken::none(touched.len());
    let host = drafted.split.host;
    taken.put(None, host.total_bytes.saturating_sub(host.extras_bytes));
    taken.put(None, drafted.extras.runtime_bytes.saturating_sub(extras::process(drafted.slots)));
    for (device, parts) in devices.used(&drafting).iter().zip(&drafted.devices) {
        let place = touched.iter().position(|d| d.name == device.name);
        taken.put(place, parts.total_bytes);
    }
    Ok(taken)
}

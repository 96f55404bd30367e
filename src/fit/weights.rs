//! Where weights go: layers over devices, overrides, repacking, mapping.

use std::sync::Arc;

use super::FitError;
use super::args::shortened;
use super::facts::{Class, Facts, Group, Named, Place};
use super::matched::{Matched, Tensors};
use super::settings::{Device, DeviceKind, GpuLayers, LoadMode, Override, Settings};
use crate::gguf::TensorType;

/// Which device each layer is on: none is the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Assigned {
    /// One for each layer, prediction layers too.
    pub layers: Vec<Option<usize>>,
    /// That of the output.
    pub output: Option<usize>,
}

impl Assigned {
    /// How many layers are on devices, the output counted as one.
    pub fn count(&self) -> u32 {
        let count = self.layers.iter().chain([&self.output]).filter(|d| d.is_some()).count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }
}

/// The number that `--gpu-layers` comes to.
pub(super) fn gpu_layers(facts: &Facts, settings: &Settings) -> u32 {
    match settings.gpu_layers {
        GpuLayers::Count(n) => n.min(facts.layer_count_all + 1),
        // The engine's own choice without `--fit`, and what it starts from with it.
        GpuLayers::All | GpuLayers::Auto => facts.layer_count_all + 1,
    }
}

/// Assigns layers to devices: the last `--gpu-layers` of them, the output first, in proportion to
/// `--tensor-split` or to free memory (`llama_model_base::load_tensors`).
#[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)] // the engine computes in 32-bit floats
pub(super) fn assign(facts: &Facts, settings: &Settings, used: &[&Device]) -> Assigned {
    let all = facts.layer_count_all;
    let on_devices = if used.is_empty() { 0 } else { gpu_layers(facts, settings) };
    let first = (all + 1).saturating_sub(on_devices);
    let shares = shares(settings, used);
    let device = |layer: u32| {
        if layer < first || on_devices == 0 {
            return None;
        }
        let position = (layer - first) as f32 / on_devices as f32;
        Some(shares.iter().position(|end| position < *end).unwrap_or(used.len() - 1))
    };
    Assigned { layers: (0..all).map(device).collect(), output: device(all) }
}

/// The end of each device's share of the layers, between 0 and 1.
#[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)] // as above
fn shares(settings: &Settings, used: &[&Device]) -> Vec<f32> {
    let given = settings.tensor_split.iter().take(used.len()).any(|s| *s > 0.0);
    let share = |i: usize| match () {
        () if given => settings.tensor_split.get(i).copied().unwrap_or(0.0) as f32,
        () => used[i].free as f32,
    };
    let mut ends = Vec::with_capacity(used.len());
    let mut sum = 0.0;
    for i in 0..used.len() {
        sum += share(i);
        ends.push(sum);
    }
    if sum <= 0.0 {
        return (1..=used.len()).map(|i| i as f32 / used.len() as f32).collect();
    }
    ends.iter().map(|end| end / sum).collect()
}

/// Where all weights are, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Placed {
    /// On each device.
    pub devices: Vec<u64>,
    /// On the host, mapped, by file.
    pub mapped_by_shard: Vec<u64>,
    /// Of those, what every token touches: neither experts nor the rows of the embedding.
    pub mapped_always: u64,
    /// Of those, routed experts.
    pub mapped_experts: u64,
    /// On the host, anonymous, repacked ones too.
    pub anonymous: u64,
    /// Of those, routed experts.
    pub anonymous_experts: u64,
    /// On the host, repacked.
    pub repacked: u64,
    /// Layers whose experts are not where their layer is.
    pub split_experts: Vec<bool>,
    /// Layers whose dense feed-forward weights are not where their layer is.
    pub split_dense: Vec<bool>,
}

impl Placed {
    pub fn host_bytes(&self) -> u64 {
        self.mapped_by_shard.iter().fold(self.anonymous, |n, bytes| n.saturating_add(*bytes))
    }
}

/// A kind of buffer on the host or a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Buffer {
    Host,
    Device(usize),
}

/// The overrides, each with its place in their order, so that none has to be tried for each tensor: there may be
/// thousands of both.
struct Rules {
    experts: First,
    dense: First,
    /// Of each pattern, and where what it matches goes.
    patterns: Vec<(usize, Buffer)>,
    matched: Arc<Matched>,
}

/// Overrides for the first so many layers: their place and that number. Only those that reach further than all before
/// them, so both ascend.
#[derive(Default)]
struct First(Vec<(usize, u32)>);

impl First {
    fn push(&mut self, at: usize, layers: u32) {
        if self.0.last().is_none_or(|(_, last)| *last < layers) {
            self.0.push((at, layers));
        }
    }

    /// The place of the first that reaches a layer.
    fn reaching(&self, layer: u32) -> Option<usize> {
        let short = self.0.partition_point(|(_, layers)| *layers <= layer);
        self.0.get(short).map(|(at, _)| *at)
    }
}

impl Rules {
    /// Those for a list of tensors.
    fn new(settings: &Settings, used: &[&Device], tensors: &Tensors) -> Result<Self, FitError> {
        let (mut experts, mut dense) = (First::default(), First::default());
        let (mut texts, mut patterns) = (Vec::new(), Vec::new());
        for (at, rule) in settings.overrides.iter().enumerate() {
            match rule {
                Override::CpuMoe(n) => experts.push(at, *n),
                Override::CpuFfn(n) => dense.push(at, *n),
                Override::Pattern { pattern, buffer } => {
                    texts.push(pattern.as_str());
                    patterns.push((at, place_of(buffer, used)?));
                }
            }
        }
        Ok(Self { experts, dense, patterns, matched: tensors.matched(&texts)? })
    }

    /// Where the first that applies puts a group; `tensor` is its place in the list, where it is of one tensor.
    fn buffer(&self, group: &Group, tensor: Option<usize>) -> Option<Buffer> {
        let on_host = match (group.class, group.place) {
            (Class::Experts, Place::Layer(layer)) => self.experts.reaching(layer),
            (Class::DenseFeedForward, Place::Layer(layer)) => self.dense.reaching(layer),
            _ => None,
        };
        // The first pattern that matches is enough: a later one would stand behind it.
        let matched = tensor.and_then(|tensor| self.matched.first(tensor));
        match (matched.and_then(|pattern| self.patterns.get(pattern)), on_host) {
            (Some((at, buffer)), Some(host)) if *at < host => Some(*buffer),
            (_, Some(_)) => Some(Buffer::Host),
            (matched, None) => matched.map(|(_, buffer)| *buffer),
        }
    }
}

/// The buffer of the engine's name for it.
fn place_of(buffer: &str, used: &[&Device]) -> Result<Buffer, FitError> {
    let device = used.iter().position(|d| d.name == buffer).map(Buffer::Device);
    let host = buffer.starts_with("CPU").then_some(Buffer::Host);
    device.or(host).ok_or_else(|| {
        FitError::Rejected(format!(
            "'{}' of --override-tensor is no buffer type of this machine",
            shortened(buffer)
        ))
    })
}

/// Places the weights.
pub(super) fn weights(
    facts: &Facts,
    settings: &Settings,
    used: &[&Device],
    assigned: &Assigned,
) -> Result<Placed, FitError> {
    let rules = Rules::new(settings, used, &facts.named)?;
    let mut placing = Placing {
        repacks: settings.repack && (settings.no_host || !used.iter().any(|d| d.host_buffer)),
        avx512: true,
        mapped: is_mapped(settings, used),
        assigned,
        placed: Placed {
            devices: vec![0; used.len()],
            mapped_by_shard: vec![0; facts.shards],
            split_experts: vec![false; facts.layers.len()],
            split_dense: vec![false; facts.layers.len()],
            ..Placed::default()
        },
    };
    if !rules.patterns.is_empty() {
        for (i, named) in facts.named.iter().enumerate() {
            placing.put(&named.group, rules.buffer(&named.group, Some(i)));
        }
    } else {
        for group in &facts.groups {
            placing.put(group, rules.buffer(group, None));
        }
    }
    if let Some(tied) = &facts.tied {
        placing.tied(tied);
    }
    Ok(placing.placed)
}

/// What every token touches of the weights that stay mapped: where it lies in the files, in their order.
/// Together as many bytes as [`Placed::mapped_always`], but for the gaps between neighbours.
pub(super) fn always_touched(
    facts: &Facts,
    settings: &Settings,
    used: &[&Device],
    assigned: &Assigned,
) -> Result<Vec<FileRange>, FitError> {
    let rules = Rules::new(settings, used, &facts.named)?;
    let placing = Placing {
        repacks: settings.repack && (settings.no_host || !used.iter().any(|d| d.host_buffer)),
        avx512: true,
        mapped: is_mapped(settings, used),
        assigned,
        placed: Placed::default(),
    };
    let tied_on_host =
        facts.tied.as_ref().filter(|tied| assigned.output.is_none() && !placing.is_repacked(tied));
    let touched = |(i, named): &(usize, &Named)| match (named.group.class, named.group.place) {
        (Class::Experts, _) => false,
        // A token reads its own row, and an output tied to it all of them.
        (_, Place::Input) => tied_on_host.is_some() && named.name == "token_embd.weight",
        (_, Place::EveryBuffer) => assigned.layers.iter().any(Option::is_none),
        (_, place) => {
            let ruled = rules.buffer(&named.group, Some(*i));
            ruled.unwrap_or_else(|| placing.own(place)) == Buffer::Host && !placing.is_repacked(&named.group)
        }
    };
    if !placing.mapped {
        return Ok(Vec::new());
    }
    let touched = facts.named.iter().enumerate().filter(touched);
    let mut ranges: Vec<FileRange> = touched.map(|(_, named)| FileRange::of(named)).collect();
    ranges.sort_by_key(|range| (range.file, range.offset));
    let mut merged: Vec<FileRange> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if last.file == range.file && range.offset <= last.end().saturating_add(PAGE) => {
                last.bytes = last.bytes.max(range.end() - last.offset);
            }
            _ => merged.push(range),
        }
    }
    Ok(merged)
}

/// Neighbours that are no further apart share a page, or nearly.
const PAGE: u64 = 4096;

/// A part of one of a model's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct FileRange {
    /// Which file, in the order of the shards, from 0.
    pub file: usize,
    /// Where it starts; bytes.
    pub offset: u64,
    /// How long it is; bytes.
    pub bytes: u64,
}

impl FileRange {
    fn of(named: &Named) -> Self {
        Self { file: named.group.shard, offset: named.offset, bytes: named.group.bytes }
    }

    /// Where it ends.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.bytes)
    }
}

/// Places the tensors of an adapter beside those of its model, whose names they bear: bytes on the
/// host and on each device. They are never mapped nor repacked (`llama_adapter_lora_init_impl`).
pub(super) fn adapter(
    settings: &Settings,
    used: &[&Device],
    assigned: &Assigned,
    tensors: &Tensors,
) -> Result<(u64, Vec<u64>), FitError> {
    let rules = Rules::new(settings, used, tensors)?;
    let placed = Placed { devices: vec![0; used.len()], ..Placed::default() };
    let mut placing = Placing { repacks: false, avx512: false, mapped: false, assigned, placed };
    for (i, named) in tensors.iter().enumerate() {
        placing.put(&named.group, rules.buffer(&named.group, Some(i)));
    }
    Ok((placing.placed.anonymous, placing.placed.devices))
}

/// Whether weights on the host are mapped: not with a device that can't be loaded from a mapping (an APU).
fn is_mapped(settings: &Settings, used: &[&Device]) -> bool {
    match settings.load_mode {
        LoadMode::Mmap | LoadMode::MmapMlock => true,
        LoadMode::None | LoadMode::Mlock | LoadMode::DirectIo => false,
        LoadMode::Auto => !used.iter().any(|d| d.kind == DeviceKind::Unified),
    }
}

struct Placing<'a> {
    repacks: bool,
    avx512: bool,
    mapped: bool,
    assigned: &'a Assigned,
    placed: Placed,
}

impl Placing<'_> {
    /// Where a group is without an override.
    fn own(&self, place: Place) -> Buffer {
        let device = match place {
            Place::Input | Place::EveryBuffer => None,
            Place::Layer(layer) => self.assigned.layers.get(layer as usize).copied().flatten(),
            Place::Output => self.assigned.output,
        };
        device.map_or(Buffer::Host, Buffer::Device)
    }

    /// Whether a group that is on the host is repacked there, and so no part of its file any more.
    fn is_repacked(&self, group: &Group) -> bool {
        self.repacks && group.repackable.is_some_and(|t| repacked(t, self.avx512))
    }

    fn put(&mut self, group: &Group, ruled: Option<Buffer>) {
        if group.place == Place::EveryBuffer {
            return self.everywhere(group);
        }
        let own = self.own(group.place);
        let buffer = ruled.unwrap_or(own);
        if let (Place::Layer(layer), true) = (group.place, buffer != own) {
            let flags = match group.class {
                Class::Experts => &mut self.placed.split_experts,
                Class::DenseFeedForward | Class::Other => &mut self.placed.split_dense,
            };
            if let Some(flag) = flags.get_mut(layer as usize) {
                *flag = true;
            }
        }
        self.add(group, buffer);
    }

    fn add(&mut self, group: &Group, buffer: Buffer) {
        match buffer {
            Buffer::Device(i) => more(&mut self.placed.devices[i], group.bytes),
            Buffer::Host if self.is_repacked(group) => {
                self.anonymous(group);
                more(&mut self.placed.repacked, group.bytes);
            }
            Buffer::Host if self.mapped => {
                more(&mut self.placed.mapped_by_shard[group.shard], group.bytes);
                match (group.class, group.place) {
                    (Class::Experts, _) => more(&mut self.placed.mapped_experts, group.bytes),
                    (_, Place::Input) => {}
                    _ => more(&mut self.placed.mapped_always, group.bytes),
                }
            }
            Buffer::Host => self.anonymous(group),
        }
    }

    fn anonymous(&mut self, group: &Group) {
        more(&mut self.placed.anonymous, group.bytes);
        if group.class == Class::Experts {
            more(&mut self.placed.anonymous_experts, group.bytes);
        }
    }

    /// Rotary factors are held once in every kind of buffer that has a layer.
    fn everywhere(&mut self, group: &Group) {
        if self.assigned.layers.iter().any(Option::is_none) {
            self.add(group, Buffer::Host);
        }
        for i in 0..self.placed.devices.len() {
            if self.assigned.layers.contains(&Some(i)) {
                self.add(group, Buffer::Device(i));
            }
        }
    }

    /// An output tied to the embedding is a copy where it isn't in the same kind of buffer.
    fn tied(&mut self, group: &Group) {
        match self.assigned.output {
            Some(device) => self.add(group, Buffer::Device(device)),
            None if self.is_repacked(group) => self.add(group, Buffer::Host),
            None if self.mapped => more(&mut self.placed.mapped_always, group.bytes),
            None => {}
        }
    }
}

/// Counts `bytes` into a sum: those of several files may be more than can be counted.
fn more(sum: &mut u64, bytes: u64) {
    *sum = sum.saturating_add(bytes);
}

/// The types that ggml repacks on x86 with AVX2, and one more with AVX-512.
fn repacked(kind: TensorType, avx512: bool) -> bool {
    match kind {
        TensorType::Q4_0 | TensorType::Q4_K | TensorType::IQ4_NL | TensorType::MXFP4 => true,
        TensorType::Q2_K => avx512,
        _ => false,
    }
}

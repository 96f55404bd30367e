//! What an engine loads beside a model, taken from headers once: a draft model, a projector, adapters.

use super::facts::{Class, Group, Named, Place, class_of};
use super::matched::Tensors;
use super::{Facts, FitError};
use crate::gguf::{Model, Tensor};

/// Buffers place their tensors at multiples of this; the processor's is 32, GPUs have up to 256.
const ALIGNMENT: u64 = 256;
/// No dimension of a real tower comes near; everything stays far from overflowing.
const MAX_DIMENSION: u64 = 1 << 24;
/// Tokens of an image that is seen in its own resolution, where neither the file nor the type of
/// projector sets another limit (`set_limit_image_tokens` in clip.cpp knows none larger but one).
const IMAGE_TOKENS: u64 = 4096;
/// The one that is larger: `youtuvl`.
const MOST_IMAGE_TOKENS: u64 = 62500;
/// Pieces of images are computed together up to so many tokens (`--mtmd-batch-max-tokens`).
const BATCH_TOKENS: u64 = 1024;
/// Frames that an audio tower computes at once: half a minute.
const AUDIO_FRAMES: u64 = 3000;
/// Types whose images are scaled, or cut, to the one size that the file names.
const FIXED_SIZE: [&str; 11] = [
    "adapter",
    "cogvlm",
    "gemma3",
    "idefics3",
    "internvl",
    "janus_pro",
    "ldp",
    "ldpv2",
    "llama4",
    "mlp",
    "resampler",
];

/// All that an engine loads beside a model.
#[derive(Clone, Debug, Default)]
pub struct Beside {
    /// The draft model of speculative decoding.
    pub draft: Option<Box<Facts>>,
    /// The multimodal projector.
    pub projector: Option<Projector>,
    /// LoRA adapters.
    pub adapters: Vec<Adapter>,
}

impl Beside {
    /// Whether there is nothing beside the model.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.draft.is_none() && self.projector.is_none() && self.adapters.is_empty()
    }
}

/// A multimodal projector: the towers of a file for `--mmproj`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Projector {
    /// Bytes of its tensors in their buffer. They are never mapped.
    pub weights: u64,
    /// Bytes of its largest tensor, which is held twice for a moment while it is loaded.
    pub largest: u64,
    towers: Vec<Tower>,
}

/// One tower of a projector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tower {
    embedding: u64,
    feed_forward: u64,
    heads: u64,
    /// Floats of the input behind one position.
    input: u64,
    /// Positions of an image of the size that the file names, or of a piece of sound.
    least: u64,
    /// Positions for each token.
    merged: u64,
    /// Tokens of one image at the most, where `--image-max-tokens` says nothing.
    tokens: u64,
    /// Whether attention has a mask of its own (windows).
    masked: bool,
}

impl Projector {
    /// Takes what matters from the header of a projector.
    ///
    /// # Errors
    /// The file is no projector, or doesn't say how wide its towers are.
    pub fn from_model(model: &Model) -> Result<Self, FitError> {
        if model.architecture() != "clip" {
            return Err(FitError::Beside(format!(
                "a projector has the architecture clip, not {}",
                shown(model.architecture())
            )));
        }
        let towers: Vec<Tower> = [vision(model)?, audio(model)?].into_iter().flatten().collect();
        if towers.is_empty() {
            return Err(FitError::Beside("the projector sees neither images nor sound".to_owned()));
        }
        let sizes = || model.tensors().iter().map(|tensor| tensor.bytes);
        Ok(Self {
            weights: sizes().fold(0, |sum, bytes| sum.saturating_add(padded(bytes))),
            largest: sizes().max().unwrap_or(0),
            towers,
        })
    }

    /// A bound for its compute buffers in bytes: eleven rows of the width and three of the
    /// feed-forward width for each position (more than a layer has live at once), the input three
    /// times, masks. Without flash attention each head has a square of all positions too.
    #[must_use]
    pub fn compute_bound(&self, image_max_tokens: Option<u64>, flash_attention: bool) -> u64 {
        let of = |tower: &Tower| {
            let tokens = image_max_tokens.unwrap_or(tower.tokens).clamp(BATCH_TOKENS, MAX_DIMENSION);
            let n = if tower.merged == 0 { tower.least } else { (tokens * tower.merged).max(tower.least) };
            let row = 4 * (11 * tower.embedding + 3 * tower.feed_forward + 3 * tower.input);
            // A mask of 32-bit floats and its copy in 16-bit ones.
            let mask = if tower.masked { 6 * n } else { 0 };
            let square = if flash_attention { 0 } else { 8 * tower.heads.saturating_mul(n) };
            n.saturating_mul(row.saturating_add(mask).saturating_add(square))
        };
        // The towers have contexts of their own.
        self.towers.iter().map(of).fold(0, u64::saturating_add)
    }
}

/// A dimension of a tower; none where the file doesn't give it.
fn dimension(model: &Model, key: &str) -> Option<u64> {
    model.u64(key).filter(|n| *n < MAX_DIMENSION)
}

fn needed(model: &Model, key: &str) -> Result<u64, FitError> {
    let problem =
        || FitError::Metadata { key: key.to_owned(), problem: "is missing or no sensible number".to_owned() };
    dimension(model, key).filter(|n| *n > 0).ok_or_else(problem)
}

/// `clip.has_vision_encoder` and its kin; sizes alone mean the same.
fn has(model: &Model, tower: &str) -> bool {
    let flag = model.value(&format!("clip.has_{tower}_encoder")).and_then(crate::gguf::Value::as_bool);
    flag.unwrap_or_else(|| model.value(&format!("clip.{tower}.embedding_length")).is_some())
}

fn vision(model: &Model) -> Result<Option<Tower>, FitError> {
    if !has(model, "vision") {
        return Ok(None);
    }
    let (size, patch) = (needed(model, "clip.vision.image_size")?, needed(model, "clip.vision.patch_size")?);
    let side = size.div_ceil(patch);
    let merge = ["clip.vision.spatial_merge_size", "clip.vision.projector.scale_factor"];
    // Four by four is the most that any type merges of its own accord.
    let merge = merge.iter().find_map(|key| dimension(model, key)).filter(|n| *n > 0).unwrap_or(4).min(16);
    let kind = ["clip.projector_type", "clip.vision.projector_type"].iter().find_map(|key| model.str(key));
    let area = (patch * patch).saturating_mul(merge * merge);
    let tokens = match (kind, dimension(model, "clip.vision.image_max_pixels")) {
        (_, Some(pixels)) if pixels > 0 => pixels.div_ceil(area),
        (Some(kind), _) if FIXED_SIZE.contains(&kind) => 0,
        (Some("youtuvl"), _) => MOST_IMAGE_TOKENS,
        _ => IMAGE_TOKENS,
    };
    Ok(Some(Tower {
        embedding: needed(model, "clip.vision.embedding_length")?,
        feed_forward: needed(model, "clip.vision.feed_forward_length")?,
        heads: dimension(model, "clip.vision.attention.head_count").unwrap_or(1),
        input: (3 * patch * patch).min(MAX_DIMENSION),
        least: side.saturating_mul(side).saturating_add(1).min(MAX_DIMENSION),
        merged: merge * merge,
        tokens,
        masked: dimension(model, "clip.vision.n_wa_pattern").unwrap_or(0) > 0,
    }))
}

fn audio(model: &Model) -> Result<Option<Tower>, FitError> {
    if !has(model, "audio") {
        return Ok(None);
    }
    Ok(Some(Tower {
        embedding: needed(model, "clip.audio.embedding_length")?,
        feed_forward: needed(model, "clip.audio.feed_forward_length")?,
        heads: dimension(model, "clip.audio.attention.head_count").unwrap_or(1),
        input: dimension(model, "clip.audio.num_mel_bins").unwrap_or(128),
        least: AUDIO_FRAMES,
        merged: 0,
        tokens: 0,
        masked: false,
    }))
}

/// A LoRA adapter.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// Its tensors, by the names of the model's: they lie beside those.
    pub(super) tensors: Tensors,
    /// Bytes of its largest tensor, of which a copy is made while it is loaded.
    pub largest: u64,
    /// Floats that it adds for each token of a batch, at the most: the low-rank product, and twice
    /// the widest result.
    pub width: u64,
}

impl Adapter {
    /// Takes what matters from the header of an adapter.
    ///
    /// # Errors
    /// The file is no LoRA adapter.
    pub fn from_model(model: &Model) -> Result<Self, FitError> {
        if model.str("general.type") != Some("adapter")
            || model.str("adapter.type").is_some_and(|t| t != "lora")
        {
            return Err(FitError::Beside("the file is no LoRA adapter".to_owned()));
        }
        let rank = model.tensors().iter().filter(|t| t.name.ends_with(".lora_a")).map(|t| t.dims[1]).max();
        let wide = model.tensors().iter().filter(|t| t.name.ends_with(".lora_b")).map(|t| t.dims[1]).max();
        Ok(Self {
            tensors: model.tensors().iter().map(named).collect::<Vec<_>>().into(),
            largest: model.tensors().iter().map(|tensor| tensor.bytes).max().unwrap_or(0),
            width: rank.unwrap_or(0).saturating_add(wide.unwrap_or(0).saturating_mul(2)),
        })
    }
}

/// Where a tensor of an adapter goes: `blk.N.ffn_up_exps.weight.lora_a` is where its model's is.
fn named(tensor: &Tensor) -> Named {
    let (place, class) = match tensor.layer() {
        Some(layer) => (Place::Layer(layer), class_of(tensor.suffix())),
        None if tensor.name.starts_with("token_embd.") => (Place::Input, Class::Other),
        None => (Place::Output, Class::Other),
    };
    let name = tensor.name.trim_end_matches(".lora_a").trim_end_matches(".lora_b").to_owned();
    let group = Group { place, class, repackable: None, shard: 0, bytes: padded(tensor.bytes) };
    Named { name, group, offset: tensor.offset }
}

fn padded(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(ALIGNMENT).unwrap_or(u64::MAX)
}

fn shown(architecture: &str) -> String {
    if architecture.is_empty() {
        "none".to_owned()
    } else {
        architecture.chars().filter(|c| !c.is_control()).take(40).collect()
    }
}

//! What an estimate needs to know of a model, taken from its header once.

use super::FitError;
use super::arch::{Arch, Indexer, Recurrent, Window};
use super::beside::Beside;
use super::hyper::{Hyper, Kinds, texts};
use super::matched::Tensors;
use crate::gguf::{Array, Model, TensorType};

/// llama.cpp's limit on layers.
const MAX_LAYERS: u64 = 512;
/// llama.cpp's limit on the experts of a layer (`LLAMA_MAX_EXPERTS`, as of b10448).
const MAX_EXPERTS: u64 = 1024;
/// No dimension of a real model comes near; everything stays far from overflowing.
const MAX_DIMENSION: u64 = 1 << 32;

/// What a tensor is, as far as its place goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Routed experts, which `--n-cpu-moe` keeps on the host.
    Experts,
    /// Dense feed-forward weights, which `--n-cpu-ffn` keeps on the host.
    DenseFeedForward,
    /// All others.
    Other,
}

/// Where a tensor belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// With the input: always on the host.
    Input,
    /// With a layer.
    Layer(u32),
    /// With the output, behind the last layer.
    Output,
    /// Rotary factors: once in every kind of buffer that has a layer.
    EveryBuffer,
}

/// Tensors that are always together: same place, class, file and chance of being repacked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Where they belong.
    pub place: Place,
    /// What they are.
    pub class: Class,
    /// The type that a processor may repack; none where it can't.
    pub repackable: Option<TensorType>,
    /// Which file they are in.
    pub shard: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// A tensor's name with its place, for patterns, and where in its file it starts.
#[derive(Clone, Debug)]
pub(super) struct Named {
    pub name: String,
    pub group: Group,
    pub offset: u64,
}

/// One layer's dimensions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layer {
    /// Query heads.
    pub heads: u64,
    /// Heads of K and V.
    pub kv_heads: u64,
    /// Width of the feed-forward part; 0 where there is none.
    pub feed_forward: u64,
    /// Width of a routed expert.
    pub expert_feed_forward: u64,
    /// Routed experts used for a token.
    pub experts_used: u64,
    /// Whether it has a sliding window.
    pub windowed: bool,
    /// Whether it has recurrent state.
    pub recurrent: bool,
    /// Whether it has a cache of K and V.
    pub cached: bool,
    /// Whether it has an indexer's keys.
    pub indexed: bool,
}

/// Sizes of a recurrent layer's state, in 32-bit floats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// The rolling part (convolutions, shifted tokens).
    pub rolling: u64,
    /// The recurrent part.
    pub recurrent: u64,
}

/// What an estimate needs to know of a model.
#[derive(Clone, Debug)]
pub struct Facts {
    /// `general.architecture`.
    pub architecture: String,
    /// The rules; those of an unknown architecture are a bound.
    pub arch: &'static Arch,
    /// Whether the architecture is known.
    pub known: bool,
    /// Layers without prediction layers.
    pub layer_count: u32,
    /// Layers with prediction layers (which count for `--gpu-layers`).
    pub layer_count_all: u32,
    /// Every layer, prediction layers too.
    pub layers: Vec<Layer>,
    /// Width of the embedding.
    pub embedding: u64,
    /// Tokens of the vocabulary.
    pub vocabulary: u64,
    /// Context that the model was trained on.
    pub context_train: u64,
    /// Routed experts of a layer.
    pub experts: u64,
    /// Width of a head of K and V in full layers.
    pub head: (u64, u64),
    /// Width of a head of K and V in windowed layers.
    pub head_windowed: (u64, u64),
    /// Multi-head latent attention: K only; widths of a head of K and V after decompression.
    pub latent: Option<(u64, u64)>,
    /// Width of the window, or 0.
    pub window: u64,
    /// State of a recurrent layer.
    pub state: State,
    /// Width of an indexer's key, or 0.
    pub indexer_key: u64,
    /// Whether the output is tied to the embedding: the tensor's size, type and file.
    pub tied: Option<Group>,
    /// The weights that are loaded.
    pub groups: Vec<Group>,
    /// How many files there are.
    pub shards: usize,
    /// What is loaded beside it; set by whoever opens those files.
    pub beside: Beside,
    /// Bytes of its largest tensor.
    pub(super) largest: u64,
    /// Entries of its vocabulary and of its table of merges.
    pub(super) texts: (u64, u64),
    pub(super) named: Tensors,
    pub(super) tensor_count: u64,
    pub(super) kinds: Kinds,
    pub(super) hyper: Hyper,
}

/// Reads keys of the architecture with limits.
struct Keys<'a> {
    model: &'a Model,
}

impl Keys<'_> {
    fn get(&self, key: &str) -> Option<u64> {
        self.model.arch_value(key)?.as_u64().filter(|n| *n < MAX_DIMENSION)
    }

    fn need(&self, key: &str) -> Result<u64, FitError> {
        self.get(key).ok_or_else(|| self.wrong(key, "is missing or no sensible number".to_owned()))
    }

    fn wrong(&self, key: &str, problem: String) -> FitError {
        FitError::Metadata { key: format!("{}.{key}", self.model.architecture()), problem }
    }

    fn list(&self, key: &str) -> Option<Vec<u64>> {
        let list = self.model.arch_value(key)?.as_array().and_then(Array::integers)?;
        Some(list.into_iter().map(|n| u64::try_from(n).unwrap_or(0).min(MAX_DIMENSION)).collect())
    }

    /// A number for all layers, or a list with one for each.
    fn each(&self, key: &str, layers: usize, default: &[u64]) -> Result<Vec<u64>, FitError> {
        if let Some(one) = self.get(key) {
            return Ok(vec![one; layers]);
        }
        match self.list(key) {
            Some(list) if list.len() >= layers => Ok(list),
            Some(list) => Err(self.wrong(key, format!("has {} elements for {layers} layers", list.len()))),
            None => Ok(default.to_vec()),
        }
    }
}

impl Facts {
    /// Takes the facts from a model.
    ///
    /// # Errors
    /// The file is no language model, or lacks what llama.cpp needs as well.
    pub fn from_model(model: &Model) -> Result<Self, FitError> {
        let architecture = model.architecture().to_owned();
        if architecture.is_empty()
            || architecture == "clip"
            || model.str("general.type").is_some_and(|t| t == "adapter")
        {
            return Err(FitError::NotALanguageModel { architecture });
        }
        let known = Arch::find(&architecture);
        let arch = known.unwrap_or(Arch::unknown());
        let keys = Keys { model };

        let block_count = keys.need("block_count")?;
        let nextn = keys.get("nextn_predict_layers").unwrap_or(0);
        if block_count == 0 || block_count > MAX_LAYERS || nextn > block_count {
            return Err(keys.wrong("block_count", format!("is {block_count}, not 1 to {MAX_LAYERS}")));
        }
        let all = usize::try_from(block_count).unwrap_or(0);
        let count = usize::try_from(block_count - nextn).unwrap_or(0);
        let embedding = keys.need("embedding_length")?;

        let layers = layers(&keys, arch, all, count)?;
        let head_of = |key: &str, default: u64| keys.get(key).unwrap_or(default);
        let heads = layers.first().map_or(0, |l| l.heads);
        let by_heads = embedding.checked_div(heads).unwrap_or(0);
        let head = match heads {
            0 => (0, 0),
            _ => (head_of("attention.key_length", by_heads), head_of("attention.value_length", by_heads)),
        };
        let head_windowed =
            (head_of("attention.key_length_swa", head.0), head_of("attention.value_length_swa", head.1));
        let latent = match (keys.get("attention.key_length_mla"), keys.get("attention.value_length_mla")) {
            (Some(k), Some(v)) if arch.mla && k > 0 && v > 0 => Some((k, v)),
            _ => None,
        };
        let mut facts = Self {
            known: known.is_some(),
            arch,
            layer_count: u32::try_from(count).unwrap_or(0),
            layer_count_all: u32::try_from(all).unwrap_or(0),
            state: state(&keys, &architecture, embedding, heads, head.0),
            layers,
            embedding,
            vocabulary: model.vocab_size(),
            context_train: model.context_train(),
            experts: keys.get("expert_count").unwrap_or(0),
            head,
            head_windowed,
            latent,
            window: window_width(&keys, arch, count),
            indexer_key: keys.get("attention.indexer.key_length").unwrap_or(0),
            tied: None,
            groups: Vec::new(),
            shards: model.shards().len(),
            beside: Beside::default(),
            largest: 0,
            texts: texts(model),
            named: Tensors::default(),
            tensor_count: 0,
            kinds: Kinds::new(model, all),
            hyper: Hyper::new(model),
            architecture,
        };
        if facts.hyper.rope == 0 {
            facts.hyper.rope = facts.head.0;
        }
        facts.tensors(model, nextn > 0);
        Ok(facts)
    }

    /// The most that one routed expert has of a tensor, which lies together in the file: bytes; 0 without experts.
    #[must_use]
    pub fn expert_bytes(&self) -> u64 {
        let experts = self.named.iter().filter(|named| named.group.class == Class::Experts);
        experts
            .map(|named| named.group.bytes)
            .max()
            .and_then(|most| most.checked_div(self.experts))
            .unwrap_or(0)
    }

    /// Sorts the tensors into groups.
    fn tensors(&mut self, model: &Model, nextn: bool) {
        let mut has_output = false;
        let mut embedding = None;
        let mut list = Vec::new();
        for tensor in model.tensors() {
            let name = tensor.name.as_str();
            let place = match tensor.layer() {
                // Prediction layers are not loaded.
                Some(layer) if nextn && layer >= self.layer_count => continue,
                Some(layer) => Place::Layer(layer),
                None if name.starts_with("rope_freqs") || name.starts_with("rope_factors") => {
                    Place::EveryBuffer
                }
                // In LFM2 the norm of the output bears the name of the embedding's.
                None if name.starts_with("token_embd_norm") && !self.architecture.starts_with("lfm2") => {
                    Place::Layer(0)
                }
                None if ["token_embd.", "position_embd.", "token_types.", "per_layer_token_embd."]
                    .iter()
                    .any(|p| name.starts_with(p)) =>
                {
                    Place::Input
                }
                None if name.starts_with("per_layer_") => Place::Layer(0),
                None => Place::Output,
            };
            has_output |= name == "output.weight";
            let group = Group {
                place,
                class: class(tensor.suffix()),
                repackable: repackable(tensor, place),
                shard: tensor.shard,
                bytes: tensor.bytes,
            };
            if name == "token_embd.weight" {
                let repackable = Some(tensor.kind).filter(|_| tensor.dims[1].is_multiple_of(8));
                embedding = Some(Group { place: Place::Output, repackable, ..group.clone() });
            }
            let start = model.shards().get(tensor.shard).map_or(0, |shard| shard.data_offset);
            list.push(Named { name: name.to_owned(), group, offset: start.saturating_add(tensor.offset) });
        }
        self.named = Tensors::from(list);
        self.tensor_count = self.named.len() as u64;
        self.largest = self.named.iter().map(|named| named.group.bytes).max().unwrap_or(0);
        self.tied = embedding.filter(|_| !has_output);
        let mut sorted: Vec<Group> = self.named.iter().map(|n| n.group.clone()).collect();
        sorted.sort_by_key(|g| (g.place, g.class, g.repackable, g.shard));
        for group in sorted {
            match self.groups.last_mut() {
                Some(last)
                    if (last.place, last.class, last.repackable, last.shard)
                        == (group.place, group.class, group.repackable, group.shard) =>
                {
                    last.bytes = last.bytes.saturating_add(group.bytes);
                }
                _ => self.groups.push(group),
            }
        }
    }

    /// The bytes of all weights that are loaded, once.
    #[must_use]
    pub fn weights(&self) -> u64 {
        self.groups.iter().fold(0, |n, g| n.saturating_add(g.bytes))
    }
}

/// What a tensor is, by its name behind `blk.N.`.
fn class(suffix: &str) -> Class {
    suffix.split_once('.').map_or(Class::Other, |(stem, _)| class_of(stem))
}

/// What a tensor is, by its name behind `blk.N.` up to the next dot.
pub(super) fn class_of(stem: &str) -> Class {
    let stem = stem.split_once('.').map_or(stem, |(stem, _)| stem);
    match stem.strip_prefix("ffn_") {
        Some("up" | "down" | "gate") => Class::DenseFeedForward,
        Some(
            "up_exps" | "down_exps" | "gate_exps" | "gate_up_exps" | "up_chexps" | "down_chexps"
            | "gate_chexps" | "gate_up_chexps",
        ) => Class::Experts,
        _ => Class::Other,
    }
}

/// Whether a processor could repack a tensor: matrices that are multiplied, with rows in eights.
fn repackable(tensor: &crate::gguf::Tensor, place: Place) -> Option<TensorType> {
    let matrix = tensor.name.ends_with(".weight") && tensor.dims[1] > 1 && tensor.dims[3] == 1;
    let experts = class(tensor.suffix()) == Class::Experts;
    let dimensions = if experts { tensor.dims[2] > 1 } else { tensor.dims[2] == 1 };
    let multiplied = !matches!(place, Place::Input | Place::EveryBuffer);
    (matrix && dimensions && multiplied && tensor.dims[1].is_multiple_of(8)).then_some(tensor.kind)
}

fn layers(keys: &Keys, arch: &Arch, all: usize, count: usize) -> Result<Vec<Layer>, FitError> {
    let none = vec![0; all];
    let heads = keys.each("attention.head_count", all, &none)?;
    let kv_heads = keys.each("attention.head_count_kv", all, &heads)?;
    let feed_forward = keys.each("feed_forward_length", all, &none)?;
    let expert_feed_forward = keys.each("expert_feed_forward_length", all, &none)?;
    let experts_used = keys.each("expert_used_count", all, &none)?;
    let experts = keys.get("expert_count").unwrap_or(0);
    // The engine aborts on either.
    if experts > MAX_EXPERTS {
        return Err(keys.wrong(
            "expert_count",
            format!("is {experts}, more than the {MAX_EXPERTS} that llama.cpp takes"),
        ));
    }
    if let Some(used) = experts_used.iter().find(|used| **used > experts) {
        return Err(keys.wrong(
            "expert_used_count",
            format!("is {used}, more than the {experts} experts that there are"),
        ));
    }
    let recurrent = recurrent(keys, arch, all, count, &kv_heads, &feed_forward);
    let windowed = windowed(keys, arch, all, count, &recurrent);
    let shared_from = match arch.shared_from {
        0 => all,
        u64::MAX => all.saturating_sub(
            usize::try_from(keys.get("attention.shared_kv_layers").unwrap_or(0)).unwrap_or(0),
        ),
        from => usize::try_from(from).unwrap_or(all),
    };
    let dense = usize::try_from(keys.get("leading_dense_block_count").unwrap_or(0)).unwrap_or(0);
    let marked = keys.list("attention.indexer.types");
    let layer = |i: usize| {
        let trunk = i < count || count == 0;
        let attends = match arch.recurrent {
            Recurrent::Only => false,
            Recurrent::Both => true,
            Recurrent::NoHeadsNoFeedForward => !recurrent[i] && feed_forward[i] == 0,
            _ => !recurrent[i],
        };
        let cached = arch.cache && trunk && attends && i < shared_from;
        let indexed = match arch.indexer {
            Indexer::None => false,
            Indexer::AfterDense => i >= dense,
            Indexer::Keys | Indexer::Pooled(_) | Indexer::Unknown => {
                marked.as_ref().is_none_or(|m| m.get(i).is_none_or(|n| *n != 0))
            }
        };
        Layer {
            heads: heads[i],
            kv_heads: kv_heads[i],
            feed_forward: feed_forward[i],
            expert_feed_forward: expert_feed_forward[i],
            experts_used: experts_used[i],
            windowed: windowed[i],
            recurrent: recurrent[i] && trunk,
            cached,
            indexed: indexed && cached,
        }
    };
    Ok((0..all).map(layer).collect())
}

fn recurrent(keys: &Keys, arch: &Arch, all: usize, count: usize, kv_heads: &[u64], ff: &[u64]) -> Vec<bool> {
    let listed = keys.list("attention.recurrent_layers").filter(|l| l.len() >= all);
    (0..all)
        .map(|i| match arch.recurrent {
            Recurrent::Never => false,
            Recurrent::Only | Recurrent::Both => true,
            Recurrent::NoHeads => i < count && kv_heads[i] == 0,
            Recurrent::NoHeadsNoFeedForward => i < count && kv_heads[i] == 0 && ff[i] == 0,
            Recurrent::Interval(default) => match &listed {
                Some(list) => list[i] != 0,
                None => {
                    let interval = keys.get("full_attention_interval").unwrap_or(default).max(1);
                    i < count && !(i as u64 + 1).is_multiple_of(interval)
                }
            },
        })
        .collect()
}

/// The width of the window; 0 where there is none.
fn window_width(keys: &Keys, arch: &Arch, count: usize) -> u64 {
    let key = keys.get("attention.sliding_window");
    match arch.window {
        Window::None => 0,
        Window::Key(_) | Window::KeyDenseFirst(_) | Window::List | Window::EveryAttention => key.unwrap_or(0),
        Window::AlwaysDenseFirst(_) => key.unwrap_or(0),
        Window::KeyFixed(width, _) => key.filter(|w| *w > 0).map_or(0, |_| width),
        Window::Always(width, _) => key.unwrap_or(width),
        Window::Chunked(width, _) => {
            if key == Some(0) {
                0
            } else {
                width
            }
        }
        Window::IfLayers(layers, width, _) => {
            if count as u64 == layers {
                key.unwrap_or(width)
            } else {
                0
            }
        }
    }
}

fn windowed(keys: &Keys, arch: &Arch, all: usize, count: usize, recurrent: &[bool]) -> Vec<bool> {
    if window_width(keys, arch, count) == 0 {
        return vec![false; all];
    }
    let (period, dense_first) = match arch.window {
        Window::None => return vec![false; all],
        Window::EveryAttention => return (0..all).map(|i| i < count && !recurrent[i]).collect(),
        Window::List => (0, false),
        Window::Key(n) | Window::Always(_, n) | Window::Chunked(_, n) | Window::IfLayers(_, _, n) => {
            (n, false)
        }
        Window::KeyDenseFirst(n) | Window::AlwaysDenseFirst(n) | Window::KeyFixed(_, n) => (n, true),
    };
    if let Some(list) = keys.list("attention.sliding_window_pattern") {
        return (0..all).map(|i| list.get(i).is_some_and(|n| *n != 0)).collect();
    }
    let period = keys.get("attention.sliding_window_pattern").unwrap_or(period);
    (0..all)
        .map(|i| {
            let position = (i as u64).checked_rem(period);
            i < count
                && match position {
                    None => true,
                    Some(p) if dense_first => p != 0,
                    Some(p) => p < period - 1,
                }
        })
        .collect()
}

/// The state of a recurrent layer, by the kind whose keys the file has.
fn state(keys: &Keys, architecture: &str, embedding: u64, heads: u64, key_length: u64) -> State {
    let get = |key: &str| keys.get(key).unwrap_or(0);
    if let Some(wkv) = keys.get("wkv.head_size").filter(|n| *n > 0) {
        let shift = keys.get("token_shift_count").unwrap_or(2);
        return State { rolling: shift * embedding, recurrent: embedding.saturating_mul(wkv) };
    }
    if let Some(cache) = keys.get("shortconv.l_cache").filter(|n| *n > 0) {
        return State { rolling: embedding.saturating_mul(cache - 1), recurrent: 0 };
    }
    let conv = get("ssm.conv_kernel");
    if let Some(dim) = keys.get("kda.head_dim").filter(|n| *n > 0) {
        let steps = if conv > 0 { conv - 1 } else { 3 };
        let inner = heads.saturating_mul(dim);
        return State { rolling: (3 * steps).saturating_mul(inner), recurrent: inner.saturating_mul(dim) };
    }
    if architecture == "minimax-01" {
        return State { rolling: 0, recurrent: key_length.saturating_mul(key_length).saturating_mul(heads) };
    }
    let (inner, size, groups) = (get("ssm.inner_size"), get("ssm.state_size"), get("ssm.group_count"));
    let width = inner.saturating_add((2 * groups).saturating_mul(size));
    State { rolling: conv.saturating_sub(1).saturating_mul(width), recurrent: size.saturating_mul(inner) }
}

//! Dimensions that only the compute graph needs, and the tensors that layers have.

use crate::gguf::{Array, Model, Tensor, Value};

/// A layer's tensors, or those outside of layers: names behind `blk.N.` with dimensions and sizes, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kind {
    tensors: Vec<(String, [u64; 4])>,
    bytes: Vec<u64>,
}

impl Kind {
    fn new(mut tensors: Vec<&Tensor>) -> Self {
        tensors.sort_by(|a, b| a.suffix().cmp(b.suffix()));
        Self {
            bytes: tensors.iter().map(|t| t.bytes).collect(),
            tensors: tensors.iter().map(|t| (t.suffix().to_owned(), t.dims)).collect(),
        }
    }

    /// The dimensions and bytes of a tensor.
    pub fn get(&self, name: &str) -> Option<([u64; 4], u64)> {
        let at = self.tensors.binary_search_by(|(n, _)| n.as_str().cmp(name)).ok()?;
        Some((self.tensors[at].1, self.bytes[at]))
    }

    /// As [`Kind::get`], of the name in two parts.
    pub fn part(&self, stem: &str, ending: &str) -> Option<([u64; 4], u64)> {
        let compare = |name: &[u8]| {
            let (head, tail) = name.split_at(name.len().min(stem.len()));
            head.cmp(stem.as_bytes()).then_with(|| tail.cmp(ending.as_bytes()))
        };
        let at = self.tensors.binary_search_by(|(n, _)| compare(n.as_bytes())).ok()?;
        Some((self.tensors[at].1, self.bytes[at]))
    }

    pub fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// Tensors whose types differ count with the larger size.
    fn covers(&mut self, other: &Self) -> bool {
        if self.tensors != other.tensors {
            return false;
        }
        for (bytes, others) in self.bytes.iter_mut().zip(&other.bytes) {
            *bytes = (*bytes).max(*others);
        }
        true
    }
}

/// The kinds of layers that a model has, and which layer is of which kind.
#[derive(Clone, Debug, Default)]
pub(crate) struct Kinds {
    pub kinds: Vec<Kind>,
    pub of_layer: Vec<usize>,
    /// Tensors outside of layers.
    pub outside: Kind,
}

impl Kinds {
    pub fn new(model: &Model, layers: usize) -> Self {
        let mut by_layer: Vec<Vec<&Tensor>> = vec![Vec::new(); layers];
        let mut outside = Vec::new();
        for tensor in model.tensors() {
            match tensor.layer() {
                Some(layer) => {
                    if let Some(list) = by_layer.get_mut(layer as usize) {
                        list.push(tensor);
                    }
                }
                None => outside.push(tensor),
            }
        }
        let mut all = Self { outside: Kind::new(outside), ..Self::default() };
        for tensors in by_layer {
            let kind = Kind::new(tensors);
            let known = all.kinds.iter_mut().position(|k| k.covers(&kind));
            all.of_layer.push(known.unwrap_or_else(|| {
                all.kinds.push(kind);
                all.kinds.len() - 1
            }));
        }
        all
    }

    pub fn layer(&self, layer: usize) -> &Kind {
        &self.kinds[self.of_layer[layer]]
    }
}

/// How the input embedding is scaled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum EmbeddingScale {
    /// It isn't.
    #[default]
    None,
    /// As a whole, by `embedding_scale`.
    Whole,
    /// Row by row, by an input: only tokens, not vectors of other modalities.
    Rows,
}

/// Dimensions that only the compute graph needs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Hyper {
    pub expert_groups: u64,
    pub expert_groups_used: u64,
    pub lora_kv: u64,
    pub rope: u64,
    pub conv_kernel: u64,
    pub inner: u64,
    pub state_size: u64,
    pub time_step_rank: u64,
    pub state_groups: u64,
    pub shortconv: u64,
    /// Positions for each token: 4 with rotary embedding in several dimensions.
    pub positions: u64,
    /// Whether logits are scaled or capped, which may take a copy.
    pub soft_cap: bool,
    pub embedding_scale: EmbeddingScale,
    pub logit_scale: bool,
    /// Whether attention goes without positions altogether.
    pub no_rope: bool,
    /// Whether queries are scaled by a number.
    pub query_scale: bool,
    /// Whether queries are scaled by their position (an input).
    pub temperature: bool,
}

impl Hyper {
    pub fn new(model: &Model) -> Self {
        let get =
            |key: &str| model.arch_value(key).and_then(Value::as_u64).filter(|n| *n < 1 << 32).unwrap_or(0);
        let get_option = |key: &str| model.arch_value(key).and_then(Value::as_u64);
        let number = |key: &str| model.arch_value(key).and_then(Value::as_f64).unwrap_or(0.0);
        let sections = model.arch_value("rope.dimension_sections").and_then(Value::as_array).is_some();
        let several = ["qwen2vl", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "paddleocr", "hunyuan_vl"];
        let with_sections = ["glm4", "glm4moe"];
        let architecture = model.architecture();
        let positions =
            several.contains(&architecture) || (with_sections.contains(&architecture) && sections);
        Self {
            expert_groups: get("expert_group_count"),
            expert_groups_used: get("expert_group_used_count"),
            lora_kv: get("attention.kv_lora_rank"),
            rope: get("rope.dimension_count"),
            conv_kernel: get("ssm.conv_kernel"),
            inner: get("ssm.inner_size"),
            state_size: get("ssm.state_size"),
            time_step_rank: get("ssm.time_step_rank"),
            state_groups: get("ssm.group_count"),
            shortconv: get("shortconv.l_cache"),
            positions: if positions { 4 } else { 1 },
            soft_cap: architecture == "gemma2",
            embedding_scale: match () {
                () if ["gemma", "gemma2", "minicpm3", "afmoe"].contains(&architecture) => {
                    EmbeddingScale::Whole
                }
                () if architecture.starts_with("gemma") => EmbeddingScale::Rows,
                () if number("embedding_scale") != 0.0 => EmbeddingScale::Whole,
                () => EmbeddingScale::None,
            },
            no_rope: ["granite", "granitehybrid"].contains(&architecture)
                && model.arch_value("rope.scaling.finetuned").and_then(Value::as_bool) == Some(false),
            query_scale: ["phi2", "phi3", "phimoe", "gemma", "gemma2", "gemma3"].contains(&architecture),
            logit_scale: number("logit_scale") != 0.0,
            temperature: number("attention.temperature_scale") != 0.0
                || (architecture == "llama4" && get_option("attention.sliding_window") != Some(0)),
        }
    }
}

/// Entries of the vocabulary and of the table of merges; what a header doesn't list is taken to be as
/// long as the vocabulary.
pub(super) fn texts(model: &Model) -> (u64, u64) {
    let length = |key: &str| model.array(key).map(Array::len);
    match length("tokenizer.ggml.tokens") {
        Some(tokens) => (tokens, length("tokenizer.ggml.merges").unwrap_or(0)),
        None => (model.vocab_size(), model.vocab_size()),
    }
}

//! What all graphs share: inputs, weights, norms, the input embedding and the output.

use super::tensor::{Graph, Home, Id, Op};
use crate::fit::cache::Shape;
use crate::fit::facts::{Class, Facts, Layer};
use crate::fit::hyper::{EmbeddingScale, Kind};
use crate::fit::settings::Settings;
use crate::fit::weights::{Assigned, Placed};
use crate::gguf::TensorType;

/// Builds one graph.
pub(super) struct Builder<'a> {
    pub graph: Graph,
    pub facts: &'a Facts,
    pub settings: &'a Settings,
    pub shape: &'a Shape,
    assigned: &'a Assigned,
    placed: &'a Placed,
    host: u8,
    /// Whether every layer is on devices: norms are then pinned to their layer's.
    full: bool,
    /// Tokens of the batch.
    pub tokens: u64,
    /// Sequences in the batch.
    pub sequences: u64,
    /// Outputs of the batch.
    pub outputs: u64,
    /// The layer that is being built.
    pub layer: usize,
    pub out_ids: Id,
    pub positions: Id,
    /// Rotary factors by backend.
    factors: Vec<(u8, Id)>,
    /// Scales of queries by position, where the model has them.
    pub temperature: Id,
}

impl<'a> Builder<'a> {
    pub fn new(
        facts: &'a Facts,
        settings: &'a Settings,
        shape: &'a Shape,
        assigned: &'a Assigned,
        placed: &'a Placed,
        devices: usize,
        full: bool,
    ) -> Self {
        let sequences = u64::from(shape.slots);
        let tokens = shape.context.min(shape.ubatch);
        let outputs = tokens.min(shape.outputs).max(1);
        Self {
            graph: Graph::with_capacity(512),
            facts,
            settings,
            shape,
            assigned,
            placed,
            host: u8::try_from(devices).unwrap_or(u8::MAX),
            full,
            tokens: tokens.next_multiple_of(sequences),
            sequences,
            outputs,
            layer: 0,
            out_ids: super::tensor::NONE,
            positions: super::tensor::NONE,
            temperature: super::tensor::NONE,
            factors: Vec::new(),
        }
    }

    /// Dimensions of the layer that is being built.
    pub fn dims(&self) -> &'a Layer {
        &self.facts.layers[self.layer]
    }

    /// Tensors of the layer that is being built.
    pub fn kind(&self) -> &'a Kind {
        self.facts.kinds.layer(self.layer)
    }

    pub fn has(&self, name: &str) -> bool {
        self.kind().has(name)
    }

    fn device(&self, device: Option<usize>) -> u8 {
        device.and_then(|d| u8::try_from(d).ok()).unwrap_or(self.host)
    }

    /// The backend of the layer that is being built.
    pub fn backend(&self) -> u8 {
        self.device(self.assigned.layers[self.layer])
    }

    /// The backend of the caches of the layer that is being built.
    pub fn cache_backend(&self) -> u8 {
        if self.settings.kv_offload { self.backend() } else { self.host }
    }

    fn leaf_weight(&mut self, (ne, bytes): ([u64; 4], u64), backend: u8) -> Id {
        // What is repacked can't be read by devices; it hardly matters, since repacking is off with them.
        let readable = self.placed.repacked == 0;
        let id = self.graph.leaf(TensorType::F32, ne, Home::Weight { backend, readable }, false);
        self.graph.tensors[id as usize].bytes = bytes;
        id
    }

    /// A weight of the layer that is being built.
    pub fn weight(&mut self, name: &str) -> Option<Id> {
        self.weight_part(name, "")
    }

    /// A weight of the layer that is being built, its name in two parts.
    pub fn weight_part(&mut self, stem: &str, ending: &str) -> Option<Id> {
        let found = self.kind().part(stem, ending)?;
        let split = match crate::fit::facts::class_of(stem) {
            Class::Experts => self.placed.split_experts[self.layer],
            Class::DenseFeedForward => self.placed.split_dense[self.layer],
            Class::Other => false,
        };
        let backend = if split { self.host } else { self.backend() };
        Some(self.leaf_weight(found, backend))
    }

    /// A weight outside of layers.
    pub fn outside(&mut self, name: &str, backend: u8) -> Option<Id> {
        let found = self.facts.kinds.outside.get(name)?;
        Some(self.leaf_weight(found, backend))
    }

    /// The rotary factors of the model, where it has any: once for each backend.
    pub fn rope_factors(&mut self) -> Option<Id> {
        let backend = self.backend();
        if let Some((_, id)) = self.factors.iter().find(|(b, _)| *b == backend) {
            return Some(*id);
        }
        let names = ["rope_factors_short.weight", "rope_freqs.weight"];
        let id = names.iter().find_map(|name| self.outside(name, backend))?;
        self.factors.push((backend, id));
        Some(id)
    }

    /// A cache or state.
    pub fn memory(&mut self, kind: TensorType, ne: [u64; 4]) -> Id {
        let backend = self.cache_backend();
        self.graph.leaf(kind, ne, Home::Memory { backend }, false)
    }

    pub fn input(&mut self, kind: TensorType, ne: [u64; 4]) -> Id {
        self.graph.leaf(kind, ne, Home::Graph, true)
    }

    /// A norm with its weights, where it has any.
    pub fn norm(&mut self, x: Id, name: &str) -> Id {
        let normed = self.graph.in_place(&[x]);
        let weight = self.weight_part(name, ".weight").or_else(|| self.weight(name));
        let bias = self.weight_part(name, ".bias");
        if self.full && (weight.is_some() || bias.is_some()) {
            self.graph.tensors[normed as usize].preset = Some(self.backend());
        }
        let mut cur = normed;
        for weight in [weight, bias].into_iter().flatten() {
            cur = self.graph.in_place(&[cur, weight]);
        }
        cur
    }

    /// A product with a weight and its bias; none where the layer lacks it.
    pub fn linear(&mut self, name: &str, x: Id) -> Option<Id> {
        let weight = self.weight_part(name, ".weight")?;
        let product = self.graph.mul_mat(weight, x);
        Some(match self.weight_part(name, ".bias") {
            Some(bias) => self.graph.in_place(&[product, bias]),
            None => product,
        })
    }

    pub fn add(&mut self, a: Id, b: Id) -> Id {
        self.graph.in_place(&[a, b])
    }

    /// The input embedding with its three ways in (tokens, vectors, both), of which only the first is computed.
    pub fn embed(&mut self) -> Option<Id> {
        let (n, width) = (self.tokens, self.facts.embedding);
        let host = self.host;
        let table = self.outside("token_embd.weight", host)?;
        let tokens = self.input(TensorType::I32, [n, 1, 1, 1]);
        let vectors = self.input(TensorType::F32, [width, n, 1, 1]);
        let rows = self.graph.get_rows(table, tokens);
        self.graph.expand(rows);
        self.graph.expand(vectors);
        let mixed_tokens = self.input(TensorType::I32, [n, 1, 1, 1]);
        let slots = self.input(TensorType::I64, [n, 1, 1, 1]);
        let mixed = self.input(TensorType::F32, [width, n, 1, 1]);
        let copy = self.graph.op(Op::Other, TensorType::F32, [width, n, 1, 1], &[mixed]);
        let mixed_rows = self.graph.get_rows(table, mixed_tokens);
        let set = self.graph.result_in(Op::Other, copy, [width, n, 1, 1], true, &[mixed_rows, slots, copy]);
        self.graph.expand(set);
        let embedded = match self.facts.hyper.embedding_scale {
            EmbeddingScale::None => rows,
            EmbeddingScale::Whole => self.graph.in_place(&[rows]),
            EmbeddingScale::Rows => {
                let scales = self.input(TensorType::F32, [1, n, 1, 1]);
                self.graph.in_place(&[rows, scales])
            }
        };
        self.graph.expand(embedded);
        let embedded = match self.outside("position_embd.weight", host) {
            Some(table) => {
                self.positions = self.input(TensorType::I32, [n, 1, 1, 1]);
                let places = self.graph.get_rows(table, self.positions);
                self.graph.in_place(&[embedded, places])
            }
            None => embedded,
        };
        self.out_ids = self.input(TensorType::I32, [self.outputs, 1, 1, 1]);
        if self.positions == super::tensor::NONE {
            self.positions = self.input(TensorType::I32, [n * self.facts.hyper.positions, 1, 1, 1]);
        }
        if self.facts.hyper.temperature {
            self.temperature = self.input(TensorType::F32, [1, 1, n, 1]);
        }
        Some(embedded)
    }

    pub fn is_last(&self) -> bool {
        self.layer + 1 == self.facts.layer_count as usize
    }

    /// In the last layer only the rows that are asked for go on.
    pub fn outputs_only(&mut self, x: Id) -> Id {
        if self.is_last() {
            let ids = self.out_ids;
            return self.graph.get_rows(x, ids);
        }
        x
    }

    /// The last norm and the product with the vocabulary.
    pub fn finish(&mut self, x: Id) -> Option<()> {
        let backend = self.device(self.assigned.output);
        let mut cur = self.graph.in_place(&[x]);
        for name in ["output_norm.weight", "output_norm.bias", "token_embd_norm.weight"] {
            if name.starts_with("token") && !self.facts.architecture.starts_with("lfm2") {
                continue;
            }
            if let Some(weight) = self.outside(name, backend) {
                cur = self.graph.in_place(&[cur, weight]);
            }
        }
        // It is kept for embeddings.
        self.graph.tensors[cur as usize].output = true;
        let output =
            self.outside("output.weight", backend).or_else(|| self.outside("token_embd.weight", backend))?;
        let mut logits = self.graph.mul_mat(output, cur);
        if self.facts.hyper.logit_scale {
            logits = self.graph.in_place(&[logits]);
        }
        if let Some(bias) = self.outside("output.bias", backend) {
            logits = self.graph.in_place(&[logits, bias]);
        }
        self.graph.tensors[logits as usize].output = true;
        self.graph.expand(logits);
        Some(())
    }
}

//! Attention with its cache (`build_attn`, `build_attn_mha`, `llama_kv_cache`).

use super::build::Builder;
use super::tensor::{Id, NONE, Op};
use crate::fit::arch::Rope;
use crate::fit::product;
use crate::gguf::TensorType;

/// Inputs of attention on one cache.
#[derive(Clone, Copy, Debug)]
pub(super) struct CacheInputs {
    k_ids: Id,
    v_ids: Id,
    mask: Id,
    k_rotation: Id,
    v_rotation: Id,
    cells: u64,
}

/// Inputs of attention: on the full cache, and on that of windowed layers.
#[derive(Clone, Copy, Debug)]
pub(super) struct AttentionInputs {
    full: CacheInputs,
    windowed: Option<CacheInputs>,
}

/// What attention is computed from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Projections {
    pub q: Id,
    /// None: the layer reads another's cache.
    pub k: Option<Id>,
    pub v: Option<Id>,
}

/// The largest rotation (a power of two from 64) that divides a head of K.
fn rotation(head: u64) -> u64 {
    let mut n = 64;
    while head.is_multiple_of(2 * n) && n < 1 << 20 {
        n *= 2;
    }
    n
}

impl Builder<'_> {
    pub fn attention_inputs(&mut self) -> AttentionInputs {
        let windows = self.facts.window > 0;
        AttentionInputs {
            full: self.cache_inputs(false),
            windowed: if windows { Some(self.cache_inputs(true)) } else { None },
        }
    }

    fn cache_inputs(&mut self, windowed: bool) -> CacheInputs {
        let shape = *self.shape;
        let n = self.tokens;
        let cells = if windowed { shape.window_cells } else { shape.cells };
        let widest =
            self.facts.layers.iter().map(|l| product([l.kv_heads, self.facts.head.1])).max().unwrap_or(0);
        let flash = shape.flash_attention;
        let latent = self.facts.latent.is_some();
        let k_ids = self.input(TensorType::I64, [n, 1, 1, 1]);
        let v_ids = self.input(TensorType::I64, [if flash { n } else { product([n, widest]) }, 1, 1, 1]);
        let mask_kind = if flash { TensorType::F16 } else { TensorType::F32 };
        let mask = self.input(mask_kind, [cells, n / shape.streams, 1, shape.streams]);
        // Hybrids with windows go without rotations.
        let hybrid = self.facts.window > 0 && self.facts.layers.iter().any(|l| l.recurrent);
        let (k_rotation, v_rotation) = if latent || hybrid { (0, 0) } else { self.rotations(windowed) };
        let mut square = |n: u64| if n == 0 { NONE } else { self.input(TensorType::F32, [n, n, 1, 1]) };
        let (k_rotation, v_rotation) = (square(k_rotation), square(v_rotation));
        CacheInputs { k_ids, v_ids, mask, k_rotation, v_rotation, cells }
    }

    /// Quantised caches are rotated where the heads allow it: the sizes of the rotations of K and V, or 0.
    fn rotations(&self, windowed: bool) -> (u64, u64) {
        let quantised = |t: TensorType| t.block_elements() > 1;
        let (k, v) = if windowed { self.facts.head_windowed } else { self.facts.head };
        let first = if self.facts.layers.first().is_some_and(|l| l.windowed) {
            self.facts.head_windowed
        } else {
            self.facts.head
        };
        let k_on = quantised(self.settings.cache_type_k) && first.0.is_multiple_of(64) && k > 0;
        let v_on = quantised(self.settings.cache_type_v) && first.1.is_multiple_of(64) && v > 0;
        (if k_on { rotation(k) } else { 0 }, if v_on { 64 } else { 0 })
    }

    fn rotate(&mut self, x: Id, rotation: Id) -> Id {
        if rotation == NONE {
            return x;
        }
        let ne = self.graph.ne(x);
        let n = self.graph.ne(rotation)[0];
        let rows = [n, product(ne) / n, 1, 1];
        let flat =
            if self.graph.get(x).plain { self.graph.reshape(x, rows) } else { self.graph.cont(x, rows) };
        let rotated = self.graph.mul_mat(rotation, flat);
        self.graph.reshape(rotated, ne)
    }

    /// Attention over the cache of the layer, up to the product with the output weights (not included).
    pub fn attend(&mut self, inputs: &AttentionInputs, p: Projections, sinks: bool) -> Id {
        let windowed = self.dims().windowed;
        let cache = if windowed { inputs.windowed.unwrap_or(inputs.full) } else { inputs.full };
        let q = self.rotate(p.q, cache.k_rotation);
        let k = p.k.map(|k| self.rotate(k, cache.k_rotation));
        let v = p.v.map(|v| self.rotate(v, cache.v_rotation));
        self.graph.expand(q);
        // With windows K comes before V; otherwise last, to be written straight into the cache.
        let order = if inputs.windowed.is_some() { [k, v] } else { [v, k] };
        order.into_iter().flatten().for_each(|id| self.graph.expand(id));

        let layer = *self.dims();
        let head = if windowed { self.facts.head_windowed } else { self.facts.head };
        let (streams, cells) = (self.shape.streams, cache.cells);
        let (k_width, v_width) = (product([head.0, layer.kv_heads]), product([head.1, layer.kv_heads]));
        let (k_kind, v_kind) = (self.settings.cache_type_k, self.settings.cache_type_v);
        let k_cache = self.memory(k_kind, [k_width, cells, streams, 1]);
        if let Some(k) = k {
            self.store(k, k_cache, cache.k_ids, k_width);
        }
        let latent = self.facts.latent.is_some();
        let v_cache = if latent { k_cache } else { self.memory(v_kind, [v_width, cells, streams, 1]) };
        if let (Some(v), false) = (v, latent) {
            if self.shape.flash_attention {
                self.store(v, v_cache, cache.v_ids, v_width);
            } else {
                self.store_transposed(v, v_cache, cache.v_ids, v_width);
            }
        }
        let k_all = self.graph.view(k_cache, [head.0, layer.kv_heads, cells, streams], false);
        let v_all = if latent {
            let rank = self.facts.hyper.lora_kv;
            self.graph.view(k_all, [rank, layer.kv_heads, cells, streams], false)
        } else if self.shape.flash_attention {
            self.graph.view(v_cache, [head.1, layer.kv_heads, cells, streams], false)
        } else {
            self.graph.view(v_cache, [cells, layer.kv_heads, head.1, streams], false)
        };
        let out = self.heads(q, k_all, v_all, cache.mask, sinks);
        self.rotate(out, cache.v_rotation)
    }

    fn store(&mut self, x: Id, cache: Id, ids: Id, width: u64) {
        let rows = self.graph.view(x, [width, self.tokens, 1, 1], false);
        let target = self.merged(cache, width);
        let ne = self.graph.ne(target);
        let set = self.graph.result_in(Op::Other, target, ne, true, &[rows, ids, target]);
        self.graph.expand(set);
    }

    /// The cache of all streams as one.
    fn merged(&mut self, cache: Id, width: u64) -> Id {
        let ne = self.graph.ne(cache);
        if ne[2] > 1 { self.graph.reshape(cache, [width, product([ne[1], ne[2]]), 1, 1]) } else { cache }
    }

    /// Without flash attention V is stored element by element.
    fn store_transposed(&mut self, x: Id, cache: Id, ids: Id, width: u64) {
        let n = self.tokens;
        let rows = if self.graph.get(x).plain {
            self.graph.reshape(x, [width, n, 1, 1])
        } else {
            self.graph.cont(x, [width, n, 1, 1])
        };
        let ne = self.graph.ne(cache);
        let flat = self.graph.reshape(cache, [1, product([ne[0], ne[1], ne[2]]), 1, 1]);
        let elements = self.graph.reshape(rows, [1, product([width, n]), 1, 1]);
        let flat_ne = self.graph.ne(flat);
        let set = self.graph.result_in(Op::Other, flat, flat_ne, true, &[elements, ids, flat]);
        self.graph.expand(set);
    }

    /// `build_attn_mha`: the heads side by side, each token's in one row.
    fn heads(&mut self, q: Id, k: Id, v: Id, mask: Id, sinks: bool) -> Id {
        let streams = self.shape.streams;
        let q_ne = self.graph.ne(q);
        let (heads, tokens) = (q_ne[1], product([q_ne[2], q_ne[3]]));
        let q = self.graph.view(q, [q_ne[0], heads, tokens / streams, streams], false);
        let q = self.graph.permute(q, [0, 2, 1, 3]);
        let k = self.graph.permute(k, [0, 2, 1, 3]);
        let v = self.graph.permute(v, [0, 2, 1, 3]);
        let sinks = if sinks { self.weight("attn_sinks.weight") } else { None };
        let out = if self.shape.flash_attention {
            self.flash(q, k, v, mask, sinks, [heads, tokens])
        } else {
            self.unfused(q, k, v, mask, sinks, [heads, tokens])
        };
        self.graph.expand(out);
        out
    }

    fn flash(&mut self, q: Id, k: Id, v: Id, mask: Id, sinks: Option<Id>, [heads, tokens]: [u64; 2]) -> Id {
        let streams = self.shape.streams;
        let (k, v) = (self.halved(k), self.halved(v));
        let width = self.graph.ne(v)[0];
        let sources: Vec<Id> = [q, k, v, mask].into_iter().chain(sinks).collect();
        let ne = [width, heads, tokens / streams, streams];
        let mut out = self.graph.op(Op::Flash, TensorType::F32, ne, &sources);
        let mut width = width;
        if let Some(decompress) = self.latent_values() {
            out = self.graph.permute(out, [0, 2, 1, 3]);
            out = self.graph.mul_mat(decompress, out);
            width = self.graph.ne(out)[0];
            out = self.graph.permute(out, [0, 2, 1, 3]);
            let ne = self.graph.ne(out);
            out = self.graph.cont(out, ne);
        }
        self.graph.reshape(out, [product([width, heads]), tokens, 1, 1])
    }

    /// Flash attention takes no 32-bit cache: it is converted.
    fn halved(&mut self, x: Id) -> Id {
        if self.graph.get(x).kind != TensorType::F32 {
            return x;
        }
        let ne = self.graph.ne(x);
        self.graph.op(Op::Other, TensorType::F16, ne, &[x])
    }

    fn unfused(&mut self, q: Id, k: Id, v: Id, mask: Id, sinks: Option<Id>, [heads, tokens]: [u64; 2]) -> Id {
        let streams = self.shape.streams;
        let cells = self.graph.ne(k)[1];
        let n = tokens / streams;
        let mut scores = self.graph.op(Op::MulMat, TensorType::F32, [cells, n, heads, streams], &[k, q]);
        if self.facts.hyper.soft_cap {
            for _ in 0..3 {
                scores = self.graph.in_place(&[scores]);
            }
        }
        let sources: Vec<Id> = [scores, mask].into_iter().chain(sinks).collect();
        let weights = self.graph.in_place(&sources);
        let latent = self.facts.latent.is_some();
        // The compressed values are stored as rows: they are turned for the product.
        let (v, width) = if latent {
            let ne = self.graph.ne(v);
            let turned = self.graph.view(v, [ne[1], ne[0], ne[2], ne[3]], false);
            (self.graph.cont(turned, [ne[1], ne[0], ne[2], ne[3]]), ne[0])
        } else {
            (v, self.graph.ne(v)[1])
        };
        let mut out = self.graph.op(Op::MulMat, TensorType::F32, [width, n, heads, streams], &[v, weights]);
        if let Some(decompress) = self.latent_values() {
            out = self.graph.mul_mat(decompress, out);
        }
        let width = self.graph.ne(out)[0];
        let out = self.graph.permute(out, [0, 2, 1, 3]);
        let out = self.graph.cont(out, [product([width, heads]), tokens, 1, 1]);
        if !self.settings.kv_offload {
            self.graph.tensors[out as usize].preset = Some(self.cache_backend());
        }
        out
    }

    /// The weights that decompress values of multi-head latent attention.
    fn latent_values(&mut self) -> Option<Id> {
        if self.facts.latent.is_some() { self.weight("attn_v_b.weight") } else { None }
    }

    /// Q, K and V: apart, or parts of one product; normed and rotated.
    pub fn projections(&mut self, x: Id) -> Option<Projections> {
        let layer = *self.dims();
        let head = if layer.windowed { self.facts.head_windowed } else { self.facts.head };
        let n = self.tokens;
        let (q_ne, k_ne, v_ne) =
            ([head.0, layer.heads, n, 1], [head.0, layer.kv_heads, n, 1], [head.1, layer.kv_heads, n, 1]);
        let (q, k, v) = if let Some(qkv) = self.linear("attn_qkv", x) {
            (
                self.graph.view(qkv, q_ne, false),
                self.graph.view(qkv, k_ne, false),
                self.graph.view(qkv, v_ne, false),
            )
        } else {
            let q = self.linear("attn_q", x)?;
            let k = self.linear("attn_k", x);
            let v = self.linear("attn_v", x).or(k);
            let q = self.whole_norm("attn_q_norm", q);
            let k = k.map(|k| self.whole_norm("attn_k_norm", k));
            let v = v?;
            (self.graph.reshape(q, q_ne), self.graph.reshape(k?, k_ne), self.graph.reshape(v, v_ne))
        };
        let q = self.head_norm("attn_q_norm", q);
        let k = self.head_norm("attn_k_norm", k);
        let (q, k) = (self.rope(q), self.rope(k));
        let q = if self.facts.hyper.query_scale { self.graph.in_place(&[q]) } else { q };
        Some(Projections { q, k: Some(k), v: Some(v) })
    }

    /// A norm over all heads together, where its weights are as wide.
    fn whole_norm(&mut self, name: &str, x: Id) -> Id {
        let wide = self.kind().part(name, ".weight").is_some_and(|(ne, _)| ne[0] == self.graph.ne(x)[0]);
        let heads = self.dims().heads;
        if wide && heads > 1 { self.norm(x, name) } else { x }
    }

    /// A norm over each head, where its weights are as wide as a head.
    fn head_norm(&mut self, name: &str, x: Id) -> Id {
        let per_head = self.kind().part(name, ".weight").is_some_and(|(ne, _)| ne[0] == self.graph.ne(x)[0]);
        if per_head { self.norm(x, name) } else { x }
    }

    pub fn rope(&mut self, x: Id) -> Id {
        let layer = self.layer + 1;
        let rotates = match self.facts.arch.rope {
            Rope::All => !self.facts.hyper.no_rope,
            Rope::None => false,
            Rope::Windowed => self.dims().windowed,
            Rope::NotLastOf(n) => !layer.is_multiple_of(n as usize),
            Rope::NotFirstOf(n) => !self.layer.is_multiple_of(n as usize),
        };
        if !rotates {
            return x;
        }
        let ne = self.graph.ne(x);
        let sources: Vec<Id> = [x, self.positions].into_iter().chain(self.rope_factors()).collect();
        self.graph.op(Op::Rope, TensorType::F32, ne, &sources)
    }
}

//! Layers with recurrent state: Mamba 2, gated delta net, short convolutions.

use super::build::Builder;
use super::tensor::{Id, Op};
use crate::fit::product;
use crate::gguf::TensorType;

/// Which state each sequence starts from: all, those of the batch, and the others.
#[derive(Clone, Copy, Debug)]
pub(super) struct StateInputs {
    all: Id,
    batch: Id,
    rest: Id,
}

impl Builder<'_> {
    pub fn state_inputs(&mut self) -> StateInputs {
        let all = self.input(TensorType::I32, [self.sequences, 1, 1, 1]);
        let batch = self.graph.view(all, [self.sequences, 1, 1, 1], true);
        let rest = self.graph.view(all, [self.sequences - 1, 1, 1, 1], true);
        StateInputs { all, batch, rest }
    }

    /// Reads the states of all sequences (`build_rs`), and writes those back that the batch doesn't change.
    fn states(&mut self, copies: StateInputs, width: u64) -> (Id, Id) {
        let sequences = self.sequences;
        let memory = self.memory(TensorType::F32, [width, sequences, 1, 1]);
        let all = self.graph.reshape(memory, [width, sequences, 1, 1]);
        let cleared = self.graph.view(all, [width, 1, 1, 1], true);
        let scaled = self.graph.result_in(Op::InPlace, cleared, [width, 1, 1, 1], true, &[cleared]);
        self.graph.expand(scaled);
        let rows = self.graph.get_rows(all, copies.all);
        let states = self.graph.view(rows, [width, sequences, 1, 1], true);
        self.graph.expand(states);
        self.keep_rest(memory, rows);
        (memory, states)
    }

    fn keep_rest(&mut self, memory: Id, rows: Id) {
        let extra = self.graph.view(rows, [0, 0, 1, 1], true);
        let place = self.graph.view(memory, [0, 0, 1, 1], true);
        self.write(extra, place);
    }

    fn write(&mut self, from: Id, to: Id) {
        let ne = self.graph.ne(to);
        let written = self.graph.result_in(Op::Other, to, ne, true, &[from, to]);
        self.graph.expand(written);
    }

    fn per_sequence(&self) -> u64 {
        self.tokens / self.sequences
    }

    /// The convolution's window: the state before the batch and the batch, transposed; the state is written back.
    fn windowed_input(&mut self, copies: StateInputs, x: Id, channels: u64) -> Id {
        let steps = self.facts.hyper.conv_kernel.max(1) - 1;
        let (sequences, n) = (self.sequences, self.per_sequence());
        let (memory, states) = self.states(copies, product([steps, channels]));
        let states = self.graph.reshape(states, [steps, channels, sequences, 1]);
        let turned = self.graph.permute(x, [1, 0, 2, 3]);
        let joined =
            self.graph.op(Op::Other, TensorType::F32, [steps + n, channels, sequences, 1], &[states, turned]);
        let last = self.graph.view(joined, [steps, channels, sequences, 1], false);
        let place = self.graph.view(memory, [product([steps, channels]), sequences, 1, 1], true);
        self.write(last, place);
        joined
    }

    fn convolve(&mut self, joined: Id, weight: Id, channels: u64) -> Id {
        let ne = [channels, self.per_sequence(), self.sequences, 1];
        self.graph.op(Op::Other, TensorType::F32, ne, &[joined, weight])
    }

    /// Mamba 2 (`build_mamba2_layer`).
    pub fn mamba2(&mut self, copies: StateInputs, x: Id) -> Option<Id> {
        let h = self.facts.hyper;
        let (sequences, n) = (self.sequences, self.per_sequence());
        let heads = h.time_step_rank.max(1);
        let head = h.inner / heads;
        let channels = h.inner.saturating_add(product([2, h.state_groups, h.state_size]));
        let steps = h.conv_kernel.max(1) - 1;
        let (memory, states) = self.states(copies, product([steps, channels]));
        let states = self.graph.reshape(states, [steps, channels, sequences, 1]);
        let projected = self.linear("ssm_in", x)?;
        let width = self.graph.ne(projected)[0];
        let projected = self.graph.reshape(projected, [width, n, sequences, 1]);
        let z = self.graph.view(projected, [head, heads, n, sequences], false);
        let xbc = self.graph.view(projected, [channels, n, sequences, 1], false);
        let dt = self.graph.view(projected, [heads, n, sequences, 1], false);

        let turned = self.graph.permute(xbc, [1, 0, 2, 3]);
        let joined =
            self.graph.op(Op::Other, TensorType::F32, [steps + n, channels, sequences, 1], &[states, turned]);
        let last = self.graph.view(joined, [steps, channels, sequences, 1], false);
        let place = self.graph.view(memory, [product([steps, channels]), sequences, 1, 1], true);
        self.write(last, place);
        let kernel = self.weight("ssm_conv1d.weight")?;
        let mut conv = self.convolve(joined, kernel, channels);
        if let Some(bias) = self.weight("ssm_conv1d.bias") {
            conv = self.graph.in_place(&[conv, bias]);
        }
        let conv = self.graph.in_place(&[conv]);
        let value = self.graph.view(conv, [head, heads, n, sequences], false);
        let b = self.graph.view(conv, [h.state_size, h.state_groups, n, sequences], false);
        let c = self.graph.view(conv, [h.state_size, h.state_groups, n, sequences], false);
        let dt_ne = self.graph.ne(dt);
        let dt = self.graph.cont(dt, dt_ne);
        let bias = self.weight("ssm_dt.bias")?;
        let dt = self.graph.in_place(&[dt, bias]);
        let a = self.weight("ssm_a")?;

        // The scan reads its states straight from the memory.
        let size = product([h.state_size, h.inner]);
        let memory = self.memory(TensorType::F32, [size, sequences, 1, 1]);
        let all = self.graph.reshape(memory, [size, sequences, 1, 1]);
        let cleared = self.graph.view(all, [size, 1, 1, 1], true);
        let scaled = self.graph.result_in(Op::InPlace, cleared, [size, 1, 1, 1], true, &[cleared]);
        self.graph.expand(scaled);
        let rest = self.graph.get_rows(all, copies.rest);
        let by_head = self.graph.reshape(all, [h.state_size, head, heads, sequences]);
        let scanned = self.graph.op(
            Op::Other,
            TensorType::F32,
            [product([h.inner, n, sequences]).saturating_add(product([size, sequences])), 1, 1, 1],
            &[by_head, value, dt, a, b, c, copies.batch],
        );
        self.graph.expand(scanned);
        self.keep_rest(memory, rest);
        let new = self.graph.view(scanned, [size, sequences, 1, 1], true);
        let place = self.graph.view(memory, [size, sequences, 1, 1], true);
        self.write(new, place);
        let y = self.graph.view(scanned, [head, heads, n, sequences], true);
        let d = self.weight("ssm_d")?;
        let skipped = self.graph.op(Op::InPlace, TensorType::F32, [head, heads, n, sequences], &[value, d]);
        let y = self.graph.in_place(&[y, skipped]);
        let z_ne = self.graph.ne(z);
        let z = self.graph.cont(z, z_ne);
        let mut y = self.graph.op(Op::Other, TensorType::F32, z_ne, &[z, y]);
        if self.has("ssm_norm.weight") {
            let groups = h.state_groups.max(1);
            y = self.graph.reshape(y, [h.inner / groups, groups, n, sequences]);
            y = self.norm(y, "ssm_norm");
        }
        let y = self.graph.reshape(y, [h.inner, n * sequences, 1, 1]);
        self.linear("ssm_out", y)
    }

    /// Gated delta net (Qwen3-Next and Qwen3.5).
    pub fn delta_net(&mut self, copies: StateInputs, x: Id) -> Option<Id> {
        let h = self.facts.hyper;
        let (sequences, n) = (self.sequences, self.per_sequence());
        let (k_heads, v_heads) = (h.state_groups.max(1), h.time_step_rank.max(1));
        let (k_head, v_head) = (h.state_size, h.inner / v_heads);
        let channels = h.inner.saturating_add(product([2, h.state_groups, h.state_size]));
        let qkv = self.linear("attn_qkv", x)?;
        let width = self.graph.ne(qkv)[0];
        let qkv = self.graph.reshape(qkv, [width, n, sequences, 1]);
        let z = self.linear("attn_gate", x)?;
        let (beta, gate) = self.delta_gates(x, v_heads)?;
        let joined = self.windowed_input(copies, qkv, channels);
        let (memory, states) = self.states(copies, product([v_head, v_head, v_heads]));
        let states = self.graph.reshape(states, [v_head, v_head, v_heads, sequences]);
        let kernel = self.weight("ssm_conv1d.weight")?;
        let conv = self.convolve(joined, kernel, channels);
        let conv = self.graph.in_place(&[conv]);
        let q = self.graph.view(conv, [k_head, k_heads, n, sequences], false);
        let k = self.graph.view(conv, [k_head, k_heads, n, sequences], false);
        let v = self.graph.view(conv, [v_head, v_heads, n, sequences], false);
        let mut repeated = |x: Id| {
            let normed = self.graph.in_place(&[x]);
            let normed = self.graph.in_place(&[normed]);
            if k_heads == v_heads {
                return normed;
            }
            let flat = self.graph.reshape(normed, [k_head, 1, k_heads, n * sequences]);
            let ne = [k_head, v_heads / k_heads, k_heads, n * sequences];
            let wide = self.graph.op(Op::Other, TensorType::F32, ne, &[flat]);
            self.graph.reshape(wide, [k_head, v_heads, n, sequences])
        };
        let (q, k) = (repeated(q), repeated(k));
        let size = product([v_head, v_head, v_heads]);
        let result = self.graph.op(
            Op::Other,
            TensorType::F32,
            [product([h.inner, n, sequences]).saturating_add(product([size, sequences])), 1, 1, 1],
            &[q, k, v, gate, beta, states],
        );
        let out = self.graph.view(result, [v_head, v_heads, n, sequences], true);
        let new = self.graph.view(result, [size, sequences, 1, 1], true);
        let place = self.graph.view(memory, [size, sequences, 1, 1], true);
        self.write(new, place);
        let z = self.graph.reshape(z, [v_head, v_heads, n, sequences]);
        let normed = self.norm(out, "ssm_norm");
        let gated = self.graph.in_place(&[z]);
        let out = self.graph.in_place(&[normed, gated]);
        let out = self.graph.reshape(out, [h.inner, n, sequences, 1]);
        let out = self.linear("ssm_out", out)?;
        Some(self.graph.reshape(out, [self.facts.embedding, self.tokens, 1, 1]))
    }

    /// The write gate and the decay of a delta net: from one projection, or from two.
    fn delta_gates(&mut self, x: Id, heads: u64) -> Option<(Id, Id)> {
        let (sequences, n) = (self.sequences, self.per_sequence());
        let one = [1, heads, n, sequences];
        let (b, a) = if let Some(both) = self.linear("ssm_ba", x) {
            let b = self.graph.view(both, [heads, n, sequences, 1], false);
            let a = self.graph.view(both, [heads, n, sequences, 1], false);
            let b = self.graph.cont(b, [heads, n, sequences, 1]);
            (b, self.graph.cont(a, [heads, n, sequences, 1]))
        } else {
            let b = self.linear("ssm_beta", x)?;
            let b = self.graph.reshape(b, [heads, n, sequences, 1]);
            let weight = self.weight("ssm_alpha.weight")?;
            let a = self.graph.mul_mat(weight, x);
            (b, self.graph.reshape(a, [heads, n, sequences, 1]))
        };
        let beta = self.graph.in_place(&[b]);
        let dt = self.weight("ssm_dt.bias").or_else(|| self.weight("ssm_dt"))?;
        let a = self.graph.in_place(&[a, dt]);
        let a = self.graph.in_place(&[a]);
        let decay = self.weight("ssm_a")?;
        let gate = self.graph.in_place(&[a, decay]);
        Some((self.graph.reshape(beta, one), self.graph.reshape(gate, one)))
    }

    /// A short convolution (LFM2).
    pub fn short_convolution(&mut self, copies: StateInputs, x: Id) -> Option<Id> {
        let width = self.facts.embedding;
        let (sequences, n) = (self.sequences, self.per_sequence());
        let steps = self.facts.hyper.shortconv.max(1) - 1;
        let x = self.graph.reshape(x, [width, n, sequences, 1]);
        let projected = self.linear("shortconv.in_proj", x)?;
        let ne = [width, n, sequences, 1];
        let b = self.graph.view(projected, ne, false);
        let c = self.graph.view(projected, ne, false);
        let value = self.graph.view(projected, ne, false);
        let gated = self.graph.op(Op::InPlace, TensorType::F32, ne, &[b, value]);
        let turned = self.graph.permute(gated, [1, 0, 2, 3]);
        let (memory, states) = self.states(copies, product([steps, width]));
        let states = self.graph.reshape(states, [steps, width, sequences, 1]);
        let joined =
            self.graph.op(Op::Other, TensorType::F32, [steps + n, width, sequences, 1], &[states, turned]);
        let last = self.graph.view(joined, [steps, width, sequences, 1], false);
        let place = self.graph.view(memory, [product([steps, width]), sequences, 1, 1], true);
        self.write(last, place);
        let kernel = self.weight("shortconv.conv.weight")?;
        let conv = self.convolve(joined, kernel, width);
        let y = self.graph.op(Op::InPlace, TensorType::F32, ne, &[c, conv]);
        let y = self.linear("shortconv.out_proj", y)?;
        Some(self.graph.reshape(y, [width, self.tokens, 1, 1]))
    }
}

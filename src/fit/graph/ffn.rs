//! Feed-forward parts: dense, mixtures of experts, shared experts (`build_ffn` and `build_moe_ffn`).

use super::build::Builder;
use super::tensor::{Id, Op};
use crate::fit::product;
use crate::gguf::TensorType;

impl Builder<'_> {
    /// The feed-forward part of the layer, whatever it is made of.
    pub fn feed_forward(&mut self, x: Id) -> Option<Id> {
        let routed = if self.has("ffn_gate_inp.weight") { Some(self.experts(x)?) } else { None };
        let shared = if self.has("ffn_up_shexp.weight") { Some(self.shared_expert(x)?) } else { None };
        match (routed, shared) {
            (Some(routed), Some(shared)) => Some(self.add(routed, shared)),
            (Some(routed), None) if self.has("ffn_up.weight") => {
                let dense = self.dense(x, "ffn_up", "ffn_gate", "ffn_down")?;
                Some(self.add(routed, dense))
            }
            (Some(routed), None) => Some(routed),
            (None, Some(shared)) => Some(shared),
            (None, None) => self.dense(x, "ffn_up", "ffn_gate", "ffn_down"),
        }
    }

    /// A dense part: with a gate beside, with a gate in the same matrix, or without.
    pub fn dense(&mut self, x: Id, up: &str, gate: &str, down: &str) -> Option<Id> {
        let raised = self.linear(up, x)?;
        let activated = if let Some(gate) = self.linear(gate, x) {
            let ne = self.graph.ne(gate);
            self.graph.op(Op::Other, TensorType::F32, ne, &[gate, raised])
        } else {
            let ne = self.graph.ne(raised);
            let inner = self.kind().part(down, ".weight")?.0[0];
            if ne[0] == product([2, inner]) {
                self.graph.op(Op::Other, TensorType::F32, [inner, ne[1], ne[2], ne[3]], &[raised])
            } else {
                self.graph.in_place(&[raised])
            }
        };
        self.linear(down, activated)
    }

    fn shared_expert(&mut self, x: Id) -> Option<Id> {
        let shared = self.dense(x, "ffn_up_shexp", "ffn_gate_shexp", "ffn_down_shexp")?;
        let Some(weight) = self.weight("ffn_gate_inp_shexp.weight") else { return Some(shared) };
        let gate = self.graph.mul_mat(weight, x);
        let gate = self.graph.in_place(&[gate]);
        Some(self.graph.in_place(&[shared, gate]))
    }

    fn experts(&mut self, x: Id) -> Option<Id> {
        let llama4 = self.facts.architecture == "llama4";
        let n = self.graph.ne(x)[1];
        let (width, used) = (self.facts.embedding, self.dims().experts_used.max(1));
        let count = self.facts.experts;
        let router = self.weight("ffn_gate_inp.weight")?;
        let mut logits = self.graph.mul_mat(router, x);
        if let Some(bias) = self.weight("ffn_gate_inp.bias") {
            logits = self.graph.in_place(&[logits, bias]);
        }
        let by_weight = self.facts.architecture == "gpt-oss";
        let probs = if by_weight { logits } else { self.graph.in_place(&[logits]) };
        let bias = self.weight("exp_probs_b.bias").or_else(|| self.weight("exp_probs_b"));
        let mut choice = match bias {
            Some(bias) => self.graph.in_place(&[probs, bias]),
            None if llama4 => logits,
            None => probs,
        };
        choice = self.grouped(choice, n);
        let sorted = self.graph.op(Op::Other, TensorType::I32, [count, n, 1, 1], &[choice]);
        let selected = self.graph.part(sorted, [used, n, 1, 1], [4 * count, 0, 0]);
        let column = self.graph.reshape(probs, [1, count, n, 1]);
        let mut weights = self.graph.get_rows(column, selected);
        if by_weight {
            weights = self.graph.reshape(weights, [used, n, 1, 1]);
            weights = self.graph.in_place(&[weights]);
            weights = self.graph.reshape(weights, [1, used, n, 1]);
        } else if !llama4 {
            weights = self.graph.reshape(weights, [used, n, 1, 1]);
            let sum = self.graph.op(Op::Other, TensorType::F32, [1, n, 1, 1], &[weights]);
            let sum = self.graph.in_place(&[sum]);
            weights = self.graph.in_place(&[weights, sum]);
            weights = self.graph.reshape(weights, [1, used, n, 1]);
        }
        self.graph.expand(weights);

        let mut cur = self.graph.reshape(x, [width, 1, n, 1]);
        if llama4 {
            let repeated = self.graph.op(Op::Other, TensorType::F32, [width, used, n, 1], &[cur]);
            cur = self.graph.in_place(&[repeated, weights]);
        }
        let activated = self.expert_activation(cur, selected)?;
        let down = self.weight("ffn_down_exps.weight")?;
        let mut experts = self.graph.mul_mat_id(down, activated, selected);
        if let Some(bias) = self.weight("ffn_down_exps.bias") {
            experts = self.graph.in_place(&[experts, bias, selected]);
        }
        if !llama4 {
            experts = self.graph.in_place(&[experts, weights]);
        }
        self.graph.expand(experts);
        Some(self.sum_experts(experts, [width, n, 1, 1], used))
    }

    /// The experts' inner width: gate and up apart, both in one matrix, or up alone.
    fn expert_activation(&mut self, cur: Id, selected: Id) -> Option<Id> {
        let through = |b: &mut Self, name: &str| -> Option<Id> {
            let weight = b.weight_part(name, ".weight")?;
            let product = b.graph.mul_mat_id(weight, cur, selected);
            Some(match b.weight_part(name, ".bias") {
                Some(bias) => b.graph.in_place(&[product, bias, selected]),
                None => product,
            })
        };
        if let Some(both) = through(self, "ffn_gate_up_exps") {
            let ne = self.graph.ne(both);
            let half = [ne[0] / 2, ne[1], ne[2], 1];
            let strides = [product([4, ne[0]]), product([4, ne[0], ne[1]]), 0];
            let (gate, up) = (self.graph.part(both, half, strides), self.graph.part(both, half, strides));
            return Some(self.graph.op(Op::Other, TensorType::F32, half, &[gate, up]));
        }
        let up = through(self, "ffn_up_exps")?;
        let ne = self.graph.ne(up);
        Some(match through(self, "ffn_gate_exps") {
            Some(gate) => self.graph.op(Op::Other, TensorType::F32, ne, &[gate, up]),
            None => {
                let once = self.graph.in_place(&[up]);
                self.graph.in_place(&[once])
            }
        })
    }

    /// Only some groups of experts are let through, where there are groups.
    fn grouped(&mut self, choice: Id, n: u64) -> Id {
        let (count, groups) = (self.facts.experts, self.facts.hyper.expert_groups);
        if groups <= 1 || !count.is_multiple_of(groups) {
            return choice;
        }
        let (each, used) = (count / groups, self.facts.hyper.expert_groups_used);
        let g = &mut self.graph;
        let by_group = g.reshape(choice, [each, groups, n, 1]);
        let sorted = g.op(Op::Other, TensorType::I32, [each, groups, n, 1], &[by_group]);
        let best = g.part(sorted, [2, groups, n, 1], [4 * each, 4 * each * groups, 0]);
        let flat = g.reshape(by_group, [1, each, groups, n]);
        let scores = g.op(Op::GetRows, TensorType::F32, [1, 2, groups, n], &[flat, best]);
        let scores = g.reshape(scores, [2, groups, n, 1]);
        let sums = g.op(Op::Other, TensorType::F32, [1, groups, n, 1], &[scores]);
        let sums = g.reshape(sums, [groups, n, 1, 1]);
        let order = g.op(Op::Other, TensorType::I32, [groups, n, 1, 1], &[sums]);
        let top = g.part(order, [used, n, 1, 1], [4 * groups, 0, 0]);
        let rows = g.op(Op::GetRows, TensorType::F32, [each, used, n, 1], &[by_group, top]);
        let filled = g.in_place(&[by_group]);
        let set = g.result_in(Op::Other, filled, [each, groups, n, 1], true, &[rows, top, filled]);
        g.reshape(set, [count, n, 1, 1])
    }

    fn sum_experts(&mut self, experts: Id, ne: [u64; 4], used: u64) -> Id {
        let views: Vec<Id> = (0..used)
            .map(|_| {
                let view = self.graph.part(experts, ne, [product([4, used, ne[0]]), 0, 0]);
                self.graph.expand(view);
                view
            })
            .collect();
        let mut sum = views[0];
        for view in &views[1..] {
            sum = self.graph.op(Op::InPlace, TensorType::F32, ne, &[sum, *view]);
            self.graph.expand(sum);
        }
        if used == 1 { self.graph.cont(sum, ne) } else { sum }
    }
}

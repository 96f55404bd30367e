//! Which tensors a model of an architecture has, and their shapes, as llama.cpp's converter names them.
//!
//! What differs between architectures is a [`Style`], one line each; layers of other kinds than attention with a
//! feed-forward part (latent attention, recurrent layers) are functions of their own.

use super::keys::Keys;

/// What a tensor is for: its type in a file follows from that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Norms, biases, routers, convolutions: 32-bit floats in every file.
    Float,
    /// The input's embedding.
    Embedding,
    /// The output's matrix.
    Output,
    /// Attention and recurrent layers.
    Attention,
    /// A feed-forward part that every token uses.
    Dense,
    /// A shared expert.
    Shared,
    /// Routed experts.
    Experts,
}

/// A tensor that has no type yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blank {
    /// Its name.
    pub name: String,
    /// Its dimensions; those that it doesn't have are 1.
    pub dims: [u64; 4],
    /// What it is for.
    pub role: Role,
}

/// Norms of queries and keys.
#[derive(Clone, Copy, PartialEq, Eq)]
enum HeadNorm {
    None,
    /// One for all heads.
    Shared,
    /// One over all heads together.
    Whole,
}

/// How a feed-forward part is stored.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Gate {
    /// No gate.
    None,
    /// A matrix of its own.
    Own,
    /// In one matrix with the up-projection.
    Joined,
}

/// What is particular to an architecture.
#[derive(Clone, Copy)]
struct Style {
    name: &'static str,
    /// Queries, keys and values are one matrix.
    joined: bool,
    bias_qkv: bool,
    bias_out: bool,
    /// Norms (and a feed-forward part without gate) have biases.
    bias_norm: bool,
    /// The output has a bias.
    bias_output: bool,
    head_norm: HeadNorm,
    gate: Gate,
    /// The norm before the feed-forward part is called `post_attention_norm`.
    renamed: bool,
    /// Norms behind attention and feed-forward part as well.
    post_norms: bool,
    sinks: bool,
    /// Router and experts have biases.
    bias_experts: bool,
    /// A bias on the experts' probabilities.
    probabilities: bool,
    /// Every layer of experts has a shared one of their width.
    shared: bool,
    /// `rope_freqs.weight`.
    rope_freqs: bool,
    /// `rope_factors_long` and `_short`, where the context was extended.
    rope_factors: bool,
}

const PLAIN: Style = Style {
    name: "llama",
    joined: false,
    bias_qkv: false,
    bias_out: false,
    bias_norm: false,
    bias_output: false,
    head_norm: HeadNorm::None,
    gate: Gate::Own,
    renamed: false,
    post_norms: false,
    sinks: false,
    bias_experts: false,
    probabilities: false,
    shared: false,
    rope_freqs: false,
    rope_factors: false,
};

const PHI: Style = Style { rope_factors: true, ..PLAIN };
const BIASED: Style = Style { bias_qkv: true, bias_out: true, bias_norm: true, ..PLAIN };

#[rustfmt::skip]
const STYLES: &[Style] = &[
    PLAIN,
    Style { name: "mistral3", ..PLAIN },
    Style { name: "qwen2", bias_qkv: true, ..PLAIN },
    Style { name: "qwen3", head_norm: HeadNorm::Shared, ..PLAIN },
    Style { name: "qwen3moe", head_norm: HeadNorm::Shared, ..PLAIN },
    Style { name: "qwen3next", head_norm: HeadNorm::Shared, renamed: true, ..PLAIN },
    Style { name: "glm4moe", bias_qkv: true, head_norm: HeadNorm::Shared, renamed: true, probabilities: true, ..PLAIN },
    Style { name: "minimax-m2", head_norm: HeadNorm::Whole, probabilities: true, ..PLAIN },
    Style { name: "gpt-oss", bias_qkv: true, bias_out: true, renamed: true, sinks: true, bias_experts: true, ..PLAIN },
    Style { name: "llama4", shared: true, rope_freqs: true, ..PLAIN },
    Style { name: "gemma2", post_norms: true, ..PLAIN },
    Style { name: "starcoder2", gate: Gate::None, ..BIASED },
    Style { name: "phi3", joined: true, gate: Gate::Joined, ..PHI },
    Style { name: "phimoe", rope_factors: true, bias_output: true, ..BIASED },
    Style { name: "deepseek2", probabilities: true, ..PLAIN },
    Style { name: "nemotron_h_moe", gate: Gate::None, probabilities: true, ..PLAIN },
];

/// The tensors of a model of `architecture`; none where it isn't known here.
///
/// `tied`: the output is the embedding. `rope_freqs`: the file has a table of rotary frequencies.
pub fn tensors(architecture: &str, keys: &Keys, tied: bool, rope_freqs: bool) -> Option<Vec<Blank>> {
    let style = *STYLES.iter().find(|s| s.name == architecture)?;
    let mut b = Builder { keys, style, prefix: String::new(), out: Vec::new() };
    let (embedding, vocabulary) = (b.key("embedding_length"), b.key("vocab_size"));
    b.weight("token_embd", &[embedding, vocabulary]);
    b.norm("output_norm", embedding);
    if !tied {
        b.weight("output", &[embedding, vocabulary]);
    }
    if style.bias_output {
        b.put("output.bias", &[vocabulary]);
    }
    let half_head = b.rotary() / 2;
    if style.rope_freqs || rope_freqs {
        b.put("rope_freqs.weight", &[half_head]);
    }
    if style.rope_factors && keys.get("rope.scaling.original_context_length").is_some() {
        b.put("rope_factors_long.weight", &[half_head]);
        b.put("rope_factors_short.weight", &[half_head]);
    }
    for layer in 0..b.key("block_count") {
        b.prefix = format!("blk.{layer}.");
        b.layer(layer);
    }
    Some(b.out)
}

struct Builder<'a> {
    keys: &'a Keys,
    style: Style,
    prefix: String,
    out: Vec<Blank>,
}

impl Builder<'_> {
    fn key(&self, key: &str) -> u64 {
        self.keys.get(key).unwrap_or(0)
    }

    fn put(&mut self, name: &str, dims: &[u64]) {
        let name = format!("{}{name}", self.prefix);
        let mut all = [1; 4];
        all.iter_mut().zip(dims).for_each(|(to, from)| *to = *from);
        self.out.push(Blank { role: role(&name, dims.len()), name, dims: all });
    }

    fn weight(&mut self, name: &str, dims: &[u64]) {
        self.put(&format!("{name}.weight"), dims);
    }

    fn bias(&mut self, name: &str, width: u64) {
        self.put(&format!("{name}.bias"), &[width]);
    }

    /// A norm over the embedding, or over heads.
    fn norm(&mut self, name: &str, width: u64) {
        self.weight(name, &[width]);
        if self.style.bias_norm {
            self.bias(name, width);
        }
    }

    fn head(&self) -> u64 {
        let by_heads = self.key("embedding_length") / self.key("attention.head_count").max(1);
        self.keys.get("attention.key_length").unwrap_or(by_heads)
    }

    fn rotary(&self) -> u64 {
        self.keys.get("rope.dimension_count").unwrap_or_else(|| self.head())
    }

    fn layer(&mut self, layer: u64) {
        match self.style.name {
            "nemotron_h_moe" => self.nemotron(layer),
            "deepseek2" => {
                self.latent_attention();
                self.feed_forward(layer);
            }
            "qwen3next" => {
                self.qwen3next_mixer(layer);
                self.feed_forward(layer);
            }
            _ => {
                self.attention(layer, 1);
                self.feed_forward(layer);
            }
        }
    }

    /// Attention with its norm. `wide`: queries are so many times as wide (a gate beside them).
    fn attention(&mut self, layer: u64, wide: u64) {
        let (embedding, head) = (self.key("embedding_length"), self.head());
        let value = self.keys.get("attention.value_length").unwrap_or(head);
        let heads = self.keys.of_layer("attention.head_count", layer);
        let kv_heads = self.keys.of_layer("attention.head_count_kv", layer);
        let (q, k, v) = (head * heads, head * kv_heads, value * kv_heads);
        self.norm("attn_norm", embedding);
        if self.style.joined {
            self.weight("attn_qkv", &[embedding, q + k + v]);
        } else {
            for (name, width) in [("attn_q", q * wide), ("attn_k", k), ("attn_v", v)] {
                self.weight(name, &[embedding, width]);
                if self.style.bias_qkv {
                    self.bias(name, width);
                }
            }
        }
        self.weight("attn_output", &[value * heads, embedding]);
        if self.style.bias_out {
            self.bias("attn_output", embedding);
        }
        let norms = match self.style.head_norm {
            HeadNorm::None => None,
            HeadNorm::Shared => Some((head, head)),
            HeadNorm::Whole => Some((q, k)),
        };
        if let Some((q, k)) = norms {
            self.weight("attn_q_norm", &[q]);
            self.weight("attn_k_norm", &[k]);
        }
        if self.style.sinks {
            self.weight("attn_sinks", &[heads]);
        }
        if self.style.post_norms {
            self.weight("post_attention_norm", &[embedding]);
        }
    }

    /// Multi-head latent attention in the layout whose cache is compressed.
    fn latent_attention(&mut self) {
        let embedding = self.key("embedding_length");
        let heads = self.key("attention.head_count");
        let (q_rank, kv_rank) = (self.key("attention.q_lora_rank"), self.key("attention.kv_lora_rank"));
        let rope = self.key("rope.dimension_count");
        let key = self.key("attention.key_length_mla");
        let value = self.key("attention.value_length_mla");
        self.norm("attn_norm", embedding);
        self.weight("attn_q_a", &[embedding, q_rank]);
        self.weight("attn_q_a_norm", &[q_rank]);
        self.weight("attn_q_b", &[q_rank, heads * key]);
        self.weight("attn_kv_a_mqa", &[embedding, kv_rank + rope]);
        self.weight("attn_kv_a_norm", &[kv_rank]);
        self.weight("attn_k_b", &[key.saturating_sub(rope), kv_rank, heads]);
        self.weight("attn_v_b", &[kv_rank, value, heads]);
        self.weight("attn_output", &[heads * value, embedding]);
    }

    /// Attention in every n-th layer, a gated delta net in the others.
    fn qwen3next_mixer(&mut self, layer: u64) {
        let interval = self.keys.get("full_attention_interval").unwrap_or(4).max(1);
        if (layer + 1).is_multiple_of(interval) {
            return self.attention(layer, 2);
        }
        let (embedding, inner) = (self.key("embedding_length"), self.key("ssm.inner_size"));
        let (state, groups) = (self.key("ssm.state_size"), self.key("ssm.group_count"));
        let (ranks, conv) = (self.key("ssm.time_step_rank"), self.key("ssm.conv_kernel"));
        let qkv = inner + 2 * groups * state;
        self.norm("attn_norm", embedding);
        self.weight("attn_qkv", &[embedding, qkv]);
        self.weight("attn_gate", &[embedding, inner]);
        self.weight("ssm_ba", &[embedding, 2 * ranks]);
        self.weight("ssm_conv1d", &[conv, qkv]);
        self.bias("ssm_dt", ranks);
        self.put("ssm_a", &[ranks]);
        self.weight("ssm_norm", &[state]);
        self.weight("ssm_out", &[inner, embedding]);
    }

    /// A layer is one of three: recurrent, attention, or experts.
    fn nemotron(&mut self, layer: u64) {
        if self.keys.of_layer("attention.head_count_kv", layer) > 0 {
            return self.attention(layer, 1);
        }
        let embedding = self.key("embedding_length");
        self.norm("attn_norm", embedding);
        if self.keys.of_layer("feed_forward_length", layer) > 0 {
            return self.experts();
        }
        let (inner, state) = (self.key("ssm.inner_size"), self.key("ssm.state_size"));
        let (groups, ranks) = (self.key("ssm.group_count"), self.key("ssm.time_step_rank"));
        let width = inner + 2 * groups * state;
        let conv = self.key("ssm.conv_kernel");
        self.weight("ssm_in", &[embedding, inner + width + ranks]);
        self.weight("ssm_conv1d", &[conv, width]);
        self.bias("ssm_conv1d", width);
        self.bias("ssm_dt", ranks);
        self.put("ssm_a", &[1, ranks]);
        self.put("ssm_d", &[1, ranks]);
        self.weight("ssm_norm", &[inner / groups.max(1), groups]);
        self.weight("ssm_out", &[inner, embedding]);
    }

    fn feed_forward(&mut self, layer: u64) {
        let embedding = self.key("embedding_length");
        self.norm(if self.style.renamed { "post_attention_norm" } else { "ffn_norm" }, embedding);
        let step = self.keys.get("interleave_moe_layer_step").unwrap_or(1).max(1);
        let sparse = self.key("expert_count") > 0
            && layer >= self.key("leading_dense_block_count")
            && (layer + 1).is_multiple_of(step);
        if sparse {
            self.experts();
        } else {
            let width = self.keys.of_layer("feed_forward_length", layer);
            self.matrices("", embedding, width, None);
        }
        if self.style.post_norms {
            self.weight("post_ffw_norm", &[embedding]);
        }
    }

    /// Router, routed experts and shared expert.
    fn experts(&mut self) {
        let embedding = self.key("embedding_length");
        let (count, width) = (self.key("expert_count"), self.key("expert_feed_forward_length"));
        self.weight("ffn_gate_inp", &[embedding, count]);
        if self.style.probabilities {
            self.bias("exp_probs_b", count);
        }
        self.matrices("_exps", embedding, width, Some(count));
        if self.style.bias_experts {
            self.bias("ffn_gate_inp", count);
            for (name, width) in
                [("ffn_gate_exps", width), ("ffn_up_exps", width), ("ffn_down_exps", embedding)]
            {
                self.put(&format!("{name}.bias"), &[width, count]);
            }
        }
        let by_count = width * self.key("expert_shared_count").max(u64::from(self.style.shared));
        let shared = self.keys.get("expert_shared_feed_forward_length").unwrap_or(by_count);
        if shared > 0 {
            self.matrices("_shexp", embedding, shared, None);
            if self.style.name == "qwen3next" {
                self.weight("ffn_gate_inp_shexp", &[embedding]);
            }
        }
    }

    /// The two or three matrices of a feed-forward part, for `count` experts where there are such.
    fn matrices(&mut self, suffix: &str, embedding: u64, width: u64, count: Option<u64>) {
        let shape = |rows: u64, columns: u64| match count {
            Some(count) => vec![rows, columns, count],
            None => vec![rows, columns],
        };
        let joined = self.style.gate == Gate::Joined;
        if self.style.gate == Gate::Own {
            self.weight(&format!("ffn_gate{suffix}"), &shape(embedding, width));
        }
        self.weight(&format!("ffn_down{suffix}"), &shape(width, embedding));
        self.weight(&format!("ffn_up{suffix}"), &shape(embedding, if joined { 2 * width } else { width }));
        if self.style.bias_norm && self.style.gate == Gate::None {
            self.bias(&format!("ffn_down{suffix}"), embedding);
            self.bias(&format!("ffn_up{suffix}"), width);
        }
    }
}

/// What a tensor is for, by its name.
fn role(name: &str, dimensions: usize) -> Role {
    let suffix = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).map_or(name, |(_, s)| s);
    let stem = suffix.strip_suffix(".weight");
    let Some(stem) = stem.filter(|s| dimensions > 1 && !s.contains("norm")) else { return Role::Float };
    match stem {
        "ffn_gate_inp" | "ssm_conv1d" => Role::Float,
        "token_embd" => Role::Embedding,
        "output" => Role::Output,
        _ if stem.ends_with("_exps") => Role::Experts,
        _ if stem.ends_with("_shexp") => Role::Shared,
        _ if stem.starts_with("ffn_") => Role::Dense,
        _ => Role::Attention,
    }
}

//! How the parts are put together, by architecture.

use super::attention::{AttentionInputs, Projections};
use super::build::Builder;
use super::recurrent::StateInputs;
use super::tensor::{Id, Op};
use crate::fit::arch::{Layout, Sum};
use crate::fit::product;
use crate::gguf::TensorType;

/// Builds the graph of a model with the given layers and says how many tensors each of them added; none where
/// the architecture's graph isn't known.
pub(super) fn build(b: &mut Builder, layers: &[usize]) -> Option<Vec<usize>> {
    let mut x = b.embed()?;
    b.graph.expand(x);
    // Inputs that nothing reads are no part of the graph.
    let copies = b.state_inputs();
    let inputs = b.attention_inputs();
    let mut added = Vec::with_capacity(layers.len());
    for layer in layers {
        let before = b.graph.nodes.len() + b.graph.leafs.len();
        b.layer = *layer;
        x = match b.facts.arch.layout {
            Layout::OnePart => nemotron(b, &inputs, copies, x)?,
            Layout::AttentionBesideState => falcon_h1(b, &inputs, copies, x)?,
            Layout::Parallel(sum) => parallel(b, &inputs, copies, x, sum)?,
            Layout::Standard => standard(b, &inputs, copies, x)?,
            Layout::Unknown => return None,
        };
        added.push(b.graph.nodes.len() + b.graph.leafs.len() - before);
    }
    b.finish(x)?;
    Some(added)
}

/// Attention or its stand-in, a residual, a feed-forward part, a residual.
fn standard(b: &mut Builder, inputs: &AttentionInputs, copies: StateInputs, x: Id) -> Option<Id> {
    let mut residual = x;
    // LFM2 adds to the residual, all others add the residual.
    let swapped = b.facts.architecture.starts_with("lfm2");
    // Some have norms behind their parts only.
    let norms_behind = !b.has("attn_norm.weight") && b.has("post_attention_norm.weight");
    let normed = if norms_behind { x } else { b.norm(x, "attn_norm") };
    let mut cur = mixer(b, inputs, copies, normed)?;
    cur = b.outputs_only(cur);
    residual = b.outputs_only(residual);
    // A norm behind attention is the feed-forward part's own where that has no other.
    let behind = b.has("post_attention_norm.weight") && (b.has("ffn_norm.weight") || norms_behind);
    if behind {
        cur = b.norm(cur, "post_attention_norm");
    }
    let middle = if swapped { b.add(residual, cur) } else { b.add(cur, residual) };
    let before = if b.has("ffn_norm.weight") { "ffn_norm" } else { "post_attention_norm" };
    let normed = if norms_behind { middle } else { b.norm(middle, before) };
    let mut cur = b.feed_forward(normed)?;
    if b.has("post_ffw_norm.weight") {
        cur = b.norm(cur, "post_ffw_norm");
    }
    Some(if swapped { b.add(middle, cur) } else { b.add(cur, middle) })
}

/// Attention and feed-forward part side by side.
fn parallel(b: &mut Builder, inputs: &AttentionInputs, copies: StateInputs, x: Id, sum: Sum) -> Option<Id> {
    let normed = b.norm(x, "attn_norm");
    // Falcon 40B has a norm of attention's own.
    let own = if b.has("attn_norm_2.weight") { b.norm(x, "attn_norm_2") } else { normed };
    let attended = mixer(b, inputs, copies, own)?;
    let attended = b.outputs_only(attended);
    let residual = b.outputs_only(x);
    let normed = b.outputs_only(normed);
    let raised = b.feed_forward(normed)?;
    let (first, second, third) = match sum {
        Sum::Attention => (attended, raised, residual),
        Sum::FeedForward => (raised, attended, residual),
        Sum::Residual => (raised, residual, attended),
    };
    let both = b.add(first, second);
    Some(b.add(both, third))
}

/// What stands in the place of attention in this layer.
fn mixer(b: &mut Builder, inputs: &AttentionInputs, copies: StateInputs, x: Id) -> Option<Id> {
    if b.dims().recurrent {
        if b.has("shortconv.in_proj.weight") {
            return b.short_convolution(copies, x);
        }
        if b.has("ssm_ba.weight") || b.has("ssm_beta.weight") {
            b.graph.expand(x);
            return b.delta_net(copies, x);
        }
        return b.mamba2(copies, x);
    }
    if b.facts.latent.is_some() {
        return latent(b, inputs, x);
    }
    if b.has("attn_q_a.weight") || b.has("attn_kv_a_mqa.weight") {
        return uncompressed(b, inputs, x);
    }
    let doubled = b
        .kind()
        .get("attn_q.weight")
        .is_some_and(|(ne, _)| ne[1] == product([2, b.facts.head.0, b.dims().heads]));
    if doubled {
        return gated_attention(b, inputs, x);
    }
    let projections = match b.facts.architecture.as_str() {
        "llama4" => llama4_projections(b, x)?,
        _ => {
            let mut p = b.projections(x)?;
            if b.facts.hyper.temperature {
                p.q = b.graph.in_place(&[p.q, b.temperature]);
            }
            p
        }
    };
    let gate = b.linear("attn_gate", x);
    let out = b.attend(inputs, projections, b.has("attn_sinks.weight"));
    // A gate beside attention (AFMoE).
    let out = match gate {
        Some(gate) => {
            let gate = b.graph.in_place(&[gate]);
            b.graph.in_place(&[out, gate])
        }
        None => out,
    };
    b.linear("attn_output", out)
}

/// Llama 4: three layers of four with rotation and norms without weights behind it, the fourth with queries
/// scaled by their position.
fn llama4_projections(b: &mut Builder, x: Id) -> Option<Projections> {
    if b.facts.window > 0 && (b.layer + 1).is_multiple_of(4) {
        let mut p = plain_projections(b, x)?;
        p.q = b.graph.in_place(&[p.q, b.temperature]);
        return Some(p);
    }
    let mut p = b.projections(x)?;
    p.q = b.graph.in_place(&[p.q]);
    p.k = p.k.map(|k| b.graph.in_place(&[k]));
    Some(p)
}

/// Attention whose query projection holds a gate as well (Qwen3-Next).
fn gated_attention(b: &mut Builder, inputs: &AttentionInputs, x: Id) -> Option<Id> {
    b.graph.expand(x);
    let layer = *b.dims();
    let (head, n) = (b.facts.head, b.tokens);
    let both = b.linear("attn_q", x)?;
    let k = b.linear("attn_k", x)?;
    let v = b.linear("attn_v", x)?;
    let both = b.graph.reshape(both, [2 * head.0, layer.heads, n, 1]);
    let strides = [8 * head.0, product([8, head.0, layer.heads]), 0];
    let q = b.graph.part(both, [head.0, layer.heads, n, 1], strides);
    let gate = b.graph.part(both, [head.0, layer.heads, n, 1], strides);
    let k = b.graph.reshape(k, [head.0, layer.kv_heads, n, 1]);
    let v = b.graph.reshape(v, [head.1, layer.kv_heads, n, 1]);
    let q = b.norm(q, "attn_q_norm");
    let k = b.norm(k, "attn_k_norm");
    let p = Projections { q: b.rope(q), k: Some(b.rope(k)), v: Some(v) };
    let out = b.attend(inputs, p, false);
    let gate = b.graph.cont(gate, [product([head.0, layer.heads]), n, 1, 1]);
    let gate = b.graph.in_place(&[gate]);
    let out = b.graph.in_place(&[out, gate]);
    b.linear("attn_output", out)
}

/// Queries of latent attention: in one step or two.
fn latent_queries(b: &mut Builder, x: Id) -> Option<Id> {
    if b.has("attn_q_a.weight") {
        let low = b.linear("attn_q_a", x)?;
        let low = b.norm(low, "attn_q_a_norm");
        return b.linear("attn_q_b", low);
    }
    b.linear("attn_q", x)
}

/// Multi-head latent attention on compressed keys.
fn latent(b: &mut Builder, inputs: &AttentionInputs, x: Id) -> Option<Id> {
    let (heads, n) = (b.dims().heads, b.tokens);
    let (head, _) = b.facts.latent?;
    let (rank, rope) = (b.facts.hyper.lora_kv, b.facts.hyper.rope);
    let plain = head.checked_sub(rope)?;
    let q = latent_queries(b, x)?;
    let q = b.graph.reshape(q, [head, heads, n, 1]);
    let both = b.linear("attn_kv_a_mqa", x)?;
    let compressed = b.graph.view(both, [rank, n, 1, 1], false);
    let k_rope = b.graph.view(both, [rope, 1, n, 1], false);
    let k_rope = b.rope(k_rope);
    let compressed = b.norm(compressed, "attn_kv_a_norm");
    let q_plain = b.graph.view(q, [plain, heads, n, 1], false);
    let q_rope = b.graph.view(q, [rope, heads, n, 1], false);
    let q_rope = b.rope(q_rope);
    let q_plain = b.graph.permute(q_plain, [0, 2, 1, 3]);
    let absorb = b.weight("attn_k_b.weight")?;
    let absorbed = b.graph.mul_mat(absorb, q_plain);
    let absorbed = b.graph.permute(absorbed, [0, 2, 1, 3]);
    let q = b.graph.op(Op::Other, TensorType::F32, [rank + rope, heads, n, 1], &[absorbed, q_rope]);
    let v = b.graph.reshape(compressed, [rank, 1, n, 1]);
    let k = b.graph.op(Op::Other, TensorType::F32, [rank + rope, 1, n, 1], &[v, k_rope]);
    let out = b.attend(inputs, Projections { q, k: Some(k), v: Some(v) }, false);
    b.linear("attn_output", out)
}

/// Latent attention in the older layout of files: keys and values of full size.
fn uncompressed(b: &mut Builder, inputs: &AttentionInputs, x: Id) -> Option<Id> {
    let (heads, n) = (b.dims().heads, b.tokens);
    let head = b.facts.head;
    let (rank, rope) = (b.facts.hyper.lora_kv, b.facts.hyper.rope);
    let plain = head.0.checked_sub(rope)?;
    let q = latent_queries(b, x)?;
    let q = b.graph.reshape(q, [head.0, heads, n, 1]);
    let both = b.linear("attn_kv_a_mqa", x)?;
    let compressed = b.graph.view(both, [rank, n, 1, 1], false);
    let k_rope = b.graph.view(both, [rope, 1, n, 1], false);
    let k_rope = b.rope(k_rope);
    let compressed = b.norm(compressed, "attn_kv_a_norm");
    let kv = b.linear("attn_kv_b", compressed)?;
    let k_plain = b.graph.view(kv, [plain, heads, n, 1], false);
    let v = b.graph.view(kv, [head.1, heads, n, 1], false);
    let v = b.graph.cont(v, [head.1, heads, n, 1]);
    let q = b.rope(q);
    let repeated = b.graph.op(Op::Other, TensorType::F32, [rope, heads, n, 1], &[k_rope]);
    let k = b.graph.op(Op::Other, TensorType::F32, [head.0, heads, n, 1], &[k_plain, repeated]);
    let out = b.attend(inputs, Projections { q, k: Some(k), v: Some(v) }, false);
    b.linear("attn_output", out)
}

/// One part a layer: Mamba 2, attention or feed-forward.
fn nemotron(b: &mut Builder, inputs: &AttentionInputs, copies: StateInputs, x: Id) -> Option<Id> {
    let normed = b.norm(x, "attn_norm");
    let cur = if b.dims().recurrent {
        b.mamba2(copies, normed)?
    } else if b.dims().cached {
        let p = plain_projections(b, normed)?;
        let out = b.attend(inputs, p, false);
        b.linear("attn_output", out)?
    } else {
        b.feed_forward(normed)?
    };
    let cur = b.outputs_only(cur);
    let residual = b.outputs_only(x);
    Some(b.add(cur, residual))
}

/// Projections without rotation.
fn plain_projections(b: &mut Builder, x: Id) -> Option<Projections> {
    let layer = *b.dims();
    let (head, n) = (b.facts.head, b.tokens);
    let q = b.linear("attn_q", x)?;
    let k = b.linear("attn_k", x)?;
    let v = b.linear("attn_v", x)?;
    Some(Projections {
        q: b.graph.reshape(q, [head.0, layer.heads, n, 1]),
        k: Some(b.graph.reshape(k, [head.0, layer.kv_heads, n, 1])),
        v: Some(b.graph.reshape(v, [head.1, layer.kv_heads, n, 1])),
    })
}

/// Attention and Mamba 2 side by side.
fn falcon_h1(b: &mut Builder, inputs: &AttentionInputs, copies: StateInputs, x: Id) -> Option<Id> {
    let normed = b.norm(x, "attn_norm");
    let p = b.projections(normed)?;
    let out = b.attend(inputs, p, false);
    let attended = b.linear("attn_output", out)?;
    let normed = b.norm(x, "attn_norm");
    let scanned = b.mamba2(copies, normed)?;
    let both = b.add(attended, scanned);
    let sum = b.add(both, x);
    let middle = b.outputs_only(sum);
    let normed = b.norm(middle, "ffn_norm");
    let cur = b.feed_forward(normed)?;
    Some(b.add(cur, middle))
}

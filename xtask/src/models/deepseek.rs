//! A header of the size of DeepSeek V3.1 at 1.6 bits: 671 billion weights, 170 GB in four files
//! whose data are holes. For measuring how long it takes to read a large header.

use super::Holes;
use super::gguf::{self, Kind, Metadata, Tensor, Value};
use anyhow::Result;
use std::path::{Path, PathBuf};

const LAYERS: u32 = 61;
const DENSE_LAYERS: u32 = 3;
const EMBEDDING: u64 = 7168;
const HEADS: u64 = 128;
const EXPERTS: u64 = 256;
const EXPERT_FF: u64 = 2048;
const DENSE_FF: u64 = 18432;
const VOCABULARY: u64 = 129_280;

/// Writes the four files below `directory`; returns the first.
pub fn write(directory: &Path) -> Result<PathBuf> {
    gguf::write_model(&directory.join("DeepSeek-V3.1-TQ1_0"), 4, &metadata(), &tensors(), &mut Holes)
}

fn metadata() -> Metadata {
    let mut all: Metadata = vec![("general.architecture".into(), Value::Text("deepseek2".into()))];
    let number = |value: u64| Value::U32(u32::try_from(value).unwrap_or(u32::MAX));
    for (key, value) in [
        ("block_count", u64::from(LAYERS)),
        ("context_length", 163_840),
        ("embedding_length", EMBEDDING),
        ("feed_forward_length", DENSE_FF),
        ("leading_dense_block_count", u64::from(DENSE_LAYERS)),
        ("expert_feed_forward_length", EXPERT_FF),
        ("expert_count", EXPERTS),
        ("expert_used_count", 8),
        ("expert_shared_count", 1),
        ("expert_gating_func", 2),
        ("attention.head_count", HEADS),
        ("attention.head_count_kv", 1),
        ("attention.key_length", 576),
        ("attention.value_length", 512),
        ("attention.key_length_mla", 192),
        ("attention.value_length_mla", 128),
        ("attention.q_lora_rank", 1536),
        ("attention.kv_lora_rank", 512),
        ("rope.dimension_count", 64),
        ("vocab_size", VOCABULARY),
    ] {
        all.push((format!("deepseek2.{key}"), number(value)));
    }
    all.push(("deepseek2.attention.layer_norm_rms_epsilon".into(), Value::F32(1e-6)));
    let tokens: Vec<String> = (0..VOCABULARY).map(|n| format!("token{n}")).collect();
    let merges = (0..VOCABULARY - 1539).map(|n| format!("tok en{n}")).collect();
    all.push(("tokenizer.ggml.model".into(), Value::Text("gpt2".into())));
    all.push(("tokenizer.ggml.pre".into(), Value::Text("deepseek-v3".into())));
    all.push(("tokenizer.ggml.token_type".into(), Value::I32s(vec![1; tokens.len()])));
    all.push(("tokenizer.ggml.tokens".into(), Value::Texts(tokens)));
    all.push(("tokenizer.ggml.merges".into(), Value::Texts(merges)));
    all
}

fn tensors() -> Vec<Tensor> {
    let tensor = |name: String, shape: &[u64], kind| Tensor { name, shape: shape.to_vec(), kind };
    let mut all = vec![
        tensor("token_embd.weight".into(), &[EMBEDDING, VOCABULARY], Kind::Q8_0),
        tensor("output_norm.weight".into(), &[EMBEDDING], Kind::F32),
        tensor("output.weight".into(), &[EMBEDDING, VOCABULARY], Kind::Q8_0),
    ];
    for layer in 0..LAYERS {
        let mut add =
            |name: &str, shape: &[u64], kind| all.push(tensor(format!("blk.{layer}.{name}"), shape, kind));
        add("attn_norm.weight", &[EMBEDDING], Kind::F32);
        add("attn_q_a.weight", &[EMBEDDING, 1536], Kind::Q8_0);
        add("attn_q_a_norm.weight", &[1536], Kind::F32);
        add("attn_q_b.weight", &[1536, HEADS * 192], Kind::Q8_0);
        add("attn_kv_a_mqa.weight", &[EMBEDDING, 576], Kind::Q8_0);
        add("attn_kv_a_norm.weight", &[512], Kind::F32);
        add("attn_k_b.weight", &[128, 512, HEADS], Kind::Q8_0);
        add("attn_v_b.weight", &[512, 128, HEADS], Kind::Q8_0);
        add("attn_output.weight", &[HEADS * 128, EMBEDDING], Kind::Q8_0);
        add("ffn_norm.weight", &[EMBEDDING], Kind::F32);
        if layer < DENSE_LAYERS {
            add("ffn_gate.weight", &[EMBEDDING, DENSE_FF], Kind::Q8_0);
            add("ffn_up.weight", &[EMBEDDING, DENSE_FF], Kind::Q8_0);
            add("ffn_down.weight", &[DENSE_FF, EMBEDDING], Kind::Q8_0);
            continue;
        }
        add("ffn_gate_inp.weight", &[EMBEDDING, EXPERTS], Kind::F32);
        add("exp_probs_b.bias", &[EXPERTS], Kind::F32);
        add("ffn_gate_exps.weight", &[EMBEDDING, EXPERT_FF, EXPERTS], Kind::Tq1_0);
        add("ffn_up_exps.weight", &[EMBEDDING, EXPERT_FF, EXPERTS], Kind::Tq1_0);
        add("ffn_down_exps.weight", &[EXPERT_FF, EMBEDDING, EXPERTS], Kind::Iq2Xxs);
        add("ffn_gate_shexp.weight", &[EMBEDDING, EXPERT_FF], Kind::Q8_0);
        add("ffn_up_shexp.weight", &[EMBEDDING, EXPERT_FF], Kind::Q8_0);
        add("ffn_down_shexp.weight", &[EXPERT_FF, EMBEDDING], Kind::Q8_0);
    }
    all
}

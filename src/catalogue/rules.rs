//! The types that llama.cpp's quantiser gives to tensors when it is asked for a mixture such as `Q4_K_M`
//! (`llama_tensor_get_type` of `llama-quant.cpp`), without an importance matrix and without overrides.

use super::keys::Keys;
use super::mix::fallback;
use super::tensors::{Blank, Role};
use crate::gguf::TensorType as T;

/// What a mixture depends on besides the tensor.
struct Model {
    layers: u64,
    /// Query heads for each head of keys.
    grouped: u64,
    experts: u64,
    tied: bool,
    /// Llama's 70B, whose small V is kept at more bits.
    llama_70b: bool,
}

/// The type of each tensor in the mixture of this name; none where there is no rule for it.
pub fn types(name: &str, architecture: &str, keys: &Keys, tied: bool, tensors: &[Blank]) -> Option<Vec<T>> {
    let base = match name {
        "q2_k" => T::Q2_K,
        "q3_k_s" | "q3_k_m" | "q3_k_l" => T::Q3_K,
        "q4_k_s" | "q4_k_m" => T::Q4_K,
        "q5_k_s" | "q5_k_m" => T::Q5_K,
        "q6_k" => T::Q6_K,
        _ => return None,
    };
    let layers = keys.get("block_count").unwrap_or(0);
    let model = Model {
        layers,
        grouped: keys.of_layer("attention.head_count", 0)
            / keys.of_layer("attention.head_count_kv", 0).max(1),
        experts: keys.get("expert_count").unwrap_or(0),
        tied,
        llama_70b: architecture == "llama" && layers == 80,
    };
    Some(tensors.iter().map(|t| fallback(raised(name, base, &model, t), t)).collect())
}

fn raised(name: &str, base: T, model: &Model, tensor: &Blank) -> T {
    if tensor.role == Role::Float {
        return T::F32;
    }
    let (layer, part) = split(&tensor.name);
    if part == "output" || (part == "token_embd" && model.tied) {
        return T::Q6_K;
    }
    let more = more_bits(layer, model.layers);
    let eight = model.experts == 8;
    let raised = if part == "attn_v" {
        match name {
            _ if eight => T::Q8_0,
            "q2_k" if model.grouped >= 4 => T::Q4_K,
            "q2_k" => T::Q3_K,
            "q3_k_m" if layer < 2 => T::Q5_K,
            "q3_k_m" => T::Q4_K,
            "q3_k_l" => T::Q5_K,
            "q4_k_m" | "q5_k_m" if more => T::Q6_K,
            "q4_k_s" if layer < 4 => T::Q5_K,
            _ => base,
        }
    } else if part == "attn_k" && eight {
        T::Q8_0
    } else if part.starts_with("ffn_down") {
        match name {
            "q2_k" => T::Q3_K,
            "q3_k_m" if layer < model.layers / 16 => T::Q5_K,
            "q3_k_m" => T::Q4_K,
            "q3_k_l" => T::Q5_K,
            "q4_k_m" | "q5_k_m" if more => T::Q6_K,
            "q4_k_s" if layer < model.layers / 8 => T::Q5_K,
            _ => base,
        }
    } else if part == "attn_output" {
        match name {
            "q2_k" => T::Q3_K,
            "q3_k_m" => T::Q4_K,
            "q3_k_l" => T::Q5_K,
            _ => base,
        }
    } else if part == "attn_qkv" {
        match name {
            "q3_k_m" | "q3_k_l" => T::Q4_K,
            "q4_k_m" => T::Q5_K,
            "q5_k_m" => T::Q6_K,
            _ => base,
        }
    } else {
        base
    };
    match raised {
        T::Q3_K | T::Q4_K if part == "attn_v" && model.llama_70b => T::Q5_K,
        other => other,
    }
}

/// The layer and the part of a name: `blk.7.attn_v.weight` is 7 and `attn_v`.
fn split(name: &str) -> (u64, &str) {
    let (layer, suffix) = match name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
        Some((layer, suffix)) => (layer.parse().unwrap_or(0), suffix),
        None => (0, name),
    };
    (layer, suffix.strip_suffix(".weight").unwrap_or(suffix))
}

/// The first and last eighth of the layers, and every third in between.
fn more_bits(layer: u64, layers: u64) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

//! The settings of an estimate, by llama-server's names and as it writes them.

use serde_json::{Map, Value, json};

use super::subject::Subject;
use crate::fit::{FlashAttention, GpuLayers, LoadMode, Override, Settings, SplitMode};

/// Every setting that changes memory: its flag without the dashes, and its value.
pub fn all(settings: &Settings) -> Vec<(&'static str, Value)> {
    let auto = |value: Option<u64>| value.map_or_else(|| json!("auto"), |n| json!(n));
    vec![
        ("parallel", auto(settings.parallel.map(u64::from))),
        ("kv-unified", settings.kv_unified.map_or_else(|| json!("auto"), |on| json!(on))),
        ("batch-size", json!(settings.batch)),
        ("ubatch-size", json!(settings.ubatch)),
        ("cache-type-k", json!(settings.cache_type_k.name())),
        ("cache-type-v", json!(settings.cache_type_v.name())),
        ("flash-attn", json!(flash_attention(settings.flash_attention))),
        ("swa-full", json!(settings.swa_full)),
        ("kv-offload", json!(settings.kv_offload)),
        ("op-offload", json!(settings.op_offload)),
        ("gpu-layers", gpu_layers(settings.gpu_layers)),
        ("override-tensor", json!(overrides(&settings.overrides))),
        ("moe-cache-mib", json!(settings.moe_cache_mib)),
        ("split-mode", json!(split_mode(settings.split_mode))),
        ("tensor-split", json!(settings.tensor_split)),
        ("main-gpu", json!(settings.main_gpu)),
        ("device", json!(settings.devices)),
        ("repack", json!(settings.repack)),
        ("no-host", json!(settings.no_host)),
        ("load-mode", json!(load_mode(settings.load_mode))),
        ("embedding", json!(settings.embedding)),
        ("backend-sampling", json!(settings.backend_sampling)),
        ("cache-ram", settings.prompt_cache_mib.map_or_else(|| json!(-1), |mib| json!(mib))),
        ("ctx-checkpoints", json!(settings.context_checkpoints)),
        ("checkpoint-min-step", json!(settings.checkpoint_step)),
        ("threads", auto(settings.threads.map(u64::from))),
        ("lora", json!(settings.adapters)),
        ("mmproj-offload", json!(settings.mmproj_offload)),
        ("image-max-tokens", auto(settings.image_max_tokens)),
        ("spec-type", json!(settings.speculative)),
        ("spec-draft-n-max", json!(settings.draft.tokens)),
        ("spec-draft-type-k", json!(settings.draft.cache_type_k.name())),
        ("spec-draft-type-v", json!(settings.draft.cache_type_v.name())),
        ("spec-draft-ngl", gpu_layers(settings.draft.gpu_layers)),
        ("spec-draft-device", json!(settings.draft.devices)),
    ]
}

/// The settings as JSON: each with its value and where it came from.
pub fn json(subject: &Subject) -> Value {
    let mut object = Map::new();
    for (name, value) in all(&subject.settings) {
        let source = subject.sources.get(name).map_or("default", String::as_str);
        object.insert(name.to_owned(), json!({ "value": value, "source": source }));
    }
    object.insert("passed-on".to_owned(), json!({ "value": subject.passed_on, "source": "arguments" }));
    Value::Object(object)
}

/// The settings that are not llama-server's default, for people: `--cache-type-k q8_0`.
pub fn changed(subject: &Subject) -> Vec<String> {
    let shown = all(&subject.settings);
    let of = |name: &str| shown.iter().find(|(n, _)| *n == name).map(|(_, value)| value);
    let text = |value: &Value| match value {
        Value::String(text) => format!(" {text}"),
        Value::Bool(true) => String::new(),
        Value::Bool(false) => " off".to_owned(),
        Value::Array(list) => {
            let words = list.iter().map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned));
            format!(" {}", words.collect::<Vec<_>>().join(","))
        }
        other => format!(" {other}"),
    };
    let named = subject
        .sources
        .keys()
        .filter(|name| !matches!(name.as_str(), "ctx-size" | "model" | "host" | "port"));
    named.map(|name| format!("--{name}{}", of(name).map(text).unwrap_or_default())).collect()
}

fn flash_attention(value: FlashAttention) -> &'static str {
    match value {
        FlashAttention::Auto => "auto",
        FlashAttention::On => "on",
        FlashAttention::Off => "off",
    }
}

fn gpu_layers(value: GpuLayers) -> Value {
    match value {
        GpuLayers::Auto => json!("auto"),
        GpuLayers::All => json!("all"),
        GpuLayers::Count(n) => json!(n),
    }
}

fn load_mode(value: LoadMode) -> &'static str {
    match value {
        LoadMode::Auto => "auto",
        LoadMode::None => "none",
        LoadMode::Mmap => "mmap",
        LoadMode::Mlock => "mlock",
        LoadMode::MmapMlock => "mmap+mlock",
        LoadMode::DirectIo => "dio",
    }
}

fn split_mode(value: SplitMode) -> &'static str {
    match value {
        SplitMode::None => "none",
        SplitMode::Layer => "layer",
        SplitMode::Row => "row",
        SplitMode::Tensor => "tensor",
    }
}

fn overrides(overrides: &[Override]) -> Vec<String> {
    let text = |one: &Override| match one {
        Override::CpuMoe(u32::MAX) => "cpu-moe".to_owned(),
        Override::CpuMoe(n) => format!("n-cpu-moe {n}"),
        Override::CpuFfn(n) => format!("n-cpu-ffn {n}"),
        Override::Pattern { pattern, buffer } => format!("{pattern}={buffer}"),
    };
    overrides.iter().map(text).collect()
}

//! What is loaded beside a model: draft models, projectors, adapters, control vectors; and the process.

#![allow(clippy::unwrap_used)] // a test: what is wrong has to stop it

#[path = "oracle/fixture.rs"]
#[allow(dead_code)]
mod fixture;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use plimsoll::fit::{
    Adapter, Device, DeviceKind, Devices, Estimate, Facts, FitError, GpuLayers, Projector, Settings, estimate,
};
use plimsoll::gguf::{Header, Identity, Model, TensorType};

const MIB: u64 = 1 << 20;

/// A header of version 3 with these texts, numbers and 32-bit float tensors.
fn header(texts: &[(&str, &str)], numbers: &[(&str, u32)], tensors: &[(&str, [u64; 2])]) -> Model {
    let text = |out: &mut Vec<u8>, text: &str| {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    };
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend(((texts.len() + numbers.len()) as u64).to_le_bytes());
    for (key, value) in texts {
        text(&mut out, key);
        out.extend(8_u32.to_le_bytes());
        text(&mut out, value);
    }
    for (key, value) in numbers {
        text(&mut out, key);
        out.extend(4_u32.to_le_bytes());
        out.extend(value.to_le_bytes());
    }
    let mut offset = 0_u64;
    for (name, dims) in tensors {
        text(&mut out, name);
        out.extend(2_u32.to_le_bytes());
        dims.iter().for_each(|n| out.extend(n.to_le_bytes()));
        out.extend(0_u32.to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += (4 * dims[0] * dims[1]).next_multiple_of(32);
    }
    let length = out.len() as u64 + offset + 32;
    let header = Header::read(&out[..]).unwrap();
    let identity = Identity::of_name("beside", length);
    Model::from_headers(vec![(PathBuf::from("beside.gguf"), identity, header)]).unwrap()
}

fn projector(kind: &str) -> Model {
    header(
        &[("general.architecture", "clip"), ("clip.projector_type", kind)],
        &[
            ("clip.vision.image_size", 336),
            ("clip.vision.patch_size", 14),
            ("clip.vision.embedding_length", 1024),
            ("clip.vision.feed_forward_length", 4096),
            ("clip.vision.attention.head_count", 16),
        ],
        &[("v.blk.0.attn_q.weight", [1024, 1024]), ("v.patch_embd.bias", [3, 1])],
    )
}

fn adapter() -> Model {
    header(
        &[("general.architecture", "llama"), ("general.type", "adapter"), ("adapter.type", "lora")],
        &[],
        &[
            ("blk.0.attn_q.weight.lora_a", [4096, 16]),
            ("blk.0.attn_q.weight.lora_b", [16, 4096]),
            ("blk.39.ffn_up_exps.weight.lora_a", [4096, 16]),
            ("output.weight.lora_b", [16, 64]),
        ],
    )
}

fn model(name: &str) -> Facts {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let to = std::env::temp_dir().join(format!("plimsoll-beside-{}-{number}", std::process::id()));
    std::fs::create_dir_all(&to).unwrap();
    let description = fixture::directory().join(format!("{name}.txt"));
    let facts = Facts::from_model(&Model::open(&fixture::inflate(&description, &to)).unwrap()).unwrap();
    std::fs::remove_dir_all(&to).unwrap();
    facts
}

fn gpus(count: u32) -> Devices {
    let device = |n| Device::new(&format!("Vulkan{n}"), DeviceKind::Discrete, 1 << 40, 1 << 40);
    Devices { list: (0..count).map(device).collect() }
}

/// A context for two slots, without caches beside it.
fn settings() -> Settings {
    Settings {
        context: 16384,
        parallel: Some(2),
        prompt_cache_mib: Some(0),
        context_checkpoints: 0,
        ..Settings::default()
    }
}

/// All parts add up, and what is beside is in the total once.
fn adds_up(all: &Estimate) {
    let devices: u64 = all.devices.iter().map(|parts| parts.total_bytes).sum();
    assert_eq!(all.split.gpu.total_bytes, devices);
    assert_eq!(all.bytes.total_bytes, all.split.gpu.total_bytes + all.split.host.total_bytes);
    let beside = all.beside;
    let listed =
        [beside.draft_bytes, beside.projector_bytes, beside.adapter_bytes, beside.control_vector_bytes];
    assert_eq!(all.bytes.beside_bytes, listed.iter().sum::<u64>());
    assert_eq!(all.mapped_bytes, all.mapped_by_shard.iter().sum::<u64>());
}

#[test]
fn a_draft_model_is_an_estimate_of_its_own() {
    let mut facts = model("Qwen3-Coder-30B-A3B-Q8_0");
    let draft = model("LFM2-1.2B-Q8_0");
    facts.beside.draft = Some(Box::new(draft.clone()));
    let mut settings = settings();
    settings.speculative = vec!["draft-simple".to_owned()];
    settings.draft.cache_type_k = TensorType::Q8_0;
    settings.draft.cache_type_v = TensorType::Q8_0;
    for devices in [Devices::none(), gpus(1), gpus(2)] {
        let both = estimate(&facts, &settings, &devices).unwrap();
        adds_up(&both);
        let mut without = facts.clone();
        without.beside.draft = None;
        let target = estimate(&without, &settings, &devices).unwrap();
        let own = Settings {
            cache_type_k: TensorType::Q8_0,
            cache_type_v: TensorType::Q8_0,
            speculative: Vec::new(),
            ..settings.clone()
        };
        let alone = estimate(&draft, &own, &devices).unwrap();
        // Weights, cache, state and buffers of the one beside those of the other.
        let buffers = alone.bytes.total_bytes - alone.bytes.extras_bytes;
        let vocabulary = both.beside.draft_bytes - buffers;
        assert!(vocabulary < 100 * MIB, "{vocabulary}");
        assert_eq!(both.bytes.weights_bytes, target.bytes.weights_bytes);
        assert_eq!(both.mapped_bytes, target.mapped_bytes + alone.mapped_bytes);
        assert!(both.exact && both.known && both.notes.is_empty(), "{:?}", both.notes);
    }
}

#[test]
fn a_draft_model_goes_where_it_is_told() {
    let mut facts = model("Qwen3-Coder-30B-A3B-Q8_0");
    facts.beside.draft = Some(Box::new(model("LFM2-1.2B-Q8_0")));
    let mut settings = settings();
    settings.devices = Some(vec!["Vulkan0".to_owned()]);
    settings.draft.devices = Some(vec!["Vulkan1".to_owned()]);
    let devices = gpus(2);
    let apart = estimate(&facts, &settings, &devices).unwrap();
    adds_up(&apart);
    let names: Vec<&str> =
        devices.touched(&facts.beside, &settings).iter().map(|device| device.name.as_str()).collect();
    assert_eq!(names, ["Vulkan0", "Vulkan1"]);
    assert_eq!(apart.devices[0].beside_bytes, 0);
    assert!(apart.devices[1].beside_bytes > 1000 * MIB);
    assert!(apart.notes.iter().any(|note| note.contains("--spec-type")), "{:?}", apart.notes);
    settings.draft.gpu_layers = GpuLayers::Count(0);
    let host = estimate(&facts, &settings, &devices).unwrap();
    assert!(host.split.host.beside_bytes > 1000 * MIB);
    assert!(host.devices[1].beside_bytes < apart.devices[1].beside_bytes / 4);
}

#[test]
fn drafted_tokens_have_outputs() {
    let facts = model("Qwen3-Coder-30B-A3B-Q8_0");
    let output = |kinds: &[&str], tokens: u32| {
        let mut settings = settings();
        settings.speculative = kinds.iter().map(|kind| (*kind).to_owned()).collect();
        settings.draft.tokens = tokens;
        estimate(&facts, &settings, &Devices::none()).unwrap().bytes.output_bytes
    };
    let one = output(&[], 9) / 2;
    assert_eq!(output(&["draft-simple"], 7), 2 * 8 * one);
    assert_eq!(output(&["ngram-simple"], 7), 2 * 49 * one);
    assert_eq!(output(&["ngram-mod", "draft-simple"], 7), 2 * 65 * one);
    assert_eq!(output(&["none"], 7), 2 * one);
    let mut settings = settings();
    settings.speculative = vec!["draft-mtp".to_owned()];
    assert!(matches!(estimate(&facts, &settings, &Devices::none()), Err(FitError::Unknown(_))));
}

#[test]
fn a_projector_is_its_tensors_and_a_bound() {
    let mut facts = model("Qwen3-Coder-30B-A3B-Q8_0");
    let fixed = Projector::from_model(&projector("mlp")).unwrap();
    let tensors = 4 * 1024 * 1024 + 256;
    assert_eq!((fixed.weights, fixed.largest), (tensors, 4 * 1024 * 1024));
    let dynamic = Projector::from_model(&projector("qwen2.5vl_merger")).unwrap();
    assert!(dynamic.compute_bound(None, true) > fixed.compute_bound(None, true));
    assert!(fixed.compute_bound(None, false) > 4 * fixed.compute_bound(None, true));
    assert!(dynamic.compute_bound(Some(8192), true) > dynamic.compute_bound(None, true));
    facts.beside.projector = Some(fixed.clone());
    let settings = settings();
    let on_gpu = estimate(&facts, &settings, &gpus(1)).unwrap();
    adds_up(&on_gpu);
    assert_eq!(on_gpu.devices[0].beside_bytes, tensors + fixed.compute_bound(None, true));
    assert!(!on_gpu.exact);
    let kept = Settings { mmproj_offload: false, ..settings };
    let on_host = estimate(&facts, &kept, &gpus(1)).unwrap();
    assert_eq!(on_host.devices[0].beside_bytes, 0);
    assert_eq!(on_host.beside, on_gpu.beside);
    // With --device none the model is on the host; the projector takes the first GPU all the same.
    let none = Settings { mmproj_offload: true, devices: Some(Vec::new()), ..kept };
    let apart = estimate(&facts, &none, &gpus(1)).unwrap();
    assert_eq!(apart.devices[0].total_bytes, on_gpu.devices[0].beside_bytes);
    assert!(Projector::from_model(&adapter()).is_err());
}

#[test]
fn adapters_are_where_their_models_tensors_are() {
    let mut facts = model("Qwen3-Coder-30B-A3B-Q8_0");
    let lora = Adapter::from_model(&adapter()).unwrap();
    assert_eq!((lora.largest, lora.width), (4 * 4096 * 16, 16 + 2 * 4096));
    facts.beside.adapters = vec![lora.clone(), lora];
    let mut settings = settings();
    let tensors = 2 * (3 * 4 * 4096 * 16 + 4 * 16 * 64);
    let buffers = 2 * 512 * 4 * (16 + 2 * 4096);
    let host = estimate(&facts, &settings, &Devices::none()).unwrap();
    adds_up(&host);
    assert_eq!(host.beside.adapter_bytes, tensors + buffers);
    assert!(!host.exact);
    settings.gpu_layers = GpuLayers::Count(10);
    let split = estimate(&facts, &settings, &gpus(1)).unwrap();
    adds_up(&split);
    // Layer 39 and the output are among the last ten, layer 0 is not.
    assert_eq!(split.devices[0].beside_bytes, 2 * (4 * 4096 * 16 + 4 * 16 * 64) + buffers);
    assert_eq!(split.beside.adapter_bytes, tensors + 2 * buffers);
    assert!(Adapter::from_model(&projector("mlp")).is_err());
}

#[test]
fn a_control_vector_is_a_row_for_each_layer_but_the_first() {
    let facts = model("Qwen3-Coder-30B-A3B-Q8_0");
    let settings = Settings { control_vector: true, ..settings() };
    let all = estimate(&facts, &settings, &Devices::none()).unwrap();
    adds_up(&all);
    let row = 4 * facts.embedding;
    assert_eq!(all.beside.control_vector_bytes, row * u64::from(facts.layer_count - 1) + 512 * row);
}

#[test]
fn checkpoints_are_as_many_as_are_allowed() {
    let checkpoints = |name: &str, count: u32, context: u64| {
        let settings = Settings { context_checkpoints: count, context, ..settings() };
        estimate(&model(name), &settings, &Devices::none()).unwrap().extras.checkpoint_bytes
    };
    assert_eq!(checkpoints("Qwen3-Coder-30B-A3B-Q8_0", 32, 16384), 0);
    for name in ["gpt-oss-20b-MXFP4", "LFM2-1.2B-Q8_0"] {
        let one = checkpoints(name, 1, 4096);
        assert!(one > 0);
        // However close together they are: --checkpoint-min-step doesn't hold at the end of prompts.
        assert_eq!(checkpoints(name, 32, 4096), 32 * one, "{name}");
        assert_eq!(checkpoints(name, 32, 65536), 32 * one, "{name}: a window is a window");
    }
}

#[test]
fn loading_counts_where_it_is_more_than_what_follows() {
    let facts = model("Qwen3-Coder-30B-A3B-Q8_0");
    let loading = |context: u64, settings: Settings| {
        let settings = Settings { context, ..settings };
        estimate(&facts, &settings, &gpus(1)).unwrap().extras.loading_bytes
    };
    // The context and its buffers are on the GPU: a copy of the largest tensor is all there is.
    let read = Settings { load_mode: plimsoll::fit::LoadMode::None, ..settings() };
    let copied = loading(512, read.clone());
    assert!(copied > 100 * MIB, "{copied}");
    // On the host they come later, and take more than the copy did.
    assert_eq!(loading(65536, Settings { kv_offload: false, ..read.clone() }), 0);
    assert_eq!(loading(512, Settings { prompt_cache_mib: Some(8192), ..read }), 0);
}

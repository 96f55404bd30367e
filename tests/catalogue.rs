//! The catalogue against the headers that the engine was measured with.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)] // a test: what is wrong has to stop it

#[allow(dead_code)] // cells belong to the other test
#[path = "oracle/fixture.rs"]
mod fixture;

use std::collections::BTreeMap;

use plimsoll::catalogue;
use plimsoll::fit::{self, Device, DeviceKind, Devices, Facts, Settings};
use plimsoll::gguf::Model;

/// Names of measured headers, of the catalogue, and whether the types of all tensors are known.
const COVERED: &[(&str, &str, bool)] = &[
    ("GLM-4.7-Flash-Q8_0", "glm-4.7-flash:q8_0", true),
    ("GLM-4.7-REAP-218B-Q3_K", "glm-4.7-reap-218b:q3_k", false),
    ("Qwen3-Coder-30B-A3B-Q8_0", "qwen3-coder-30b:q8_0", true),
    ("Qwen3-Coder-480B-A35B-IQ1_M", "qwen3-coder-480b:iq1_m", false),
    ("Qwen3-Next-80B-A3B-Q8_0", "qwen3-next-80b:q8_0", true),
    ("Qwen2.5-72B-Q8_0", "qwen2.5-72b:q8_0", true),
    ("gpt-oss-20b-MXFP4", "gpt-oss-20b:mxfp4", true),
    ("DeepSeek-V3.1-TQ1_0", "deepseek-v3.1:tq1_0", false),
    ("MiniMax-M2.1-Q3_K_XL", "minimax-m2.1:q3_k_xl", false),
    ("Llama-4-Scout-17B-16E-Q4_K_M", "llama-4-scout-17b-16e:q4_k_m", false),
    ("Mistral-Nemo-12B-Q8_0", "mistral-nemo-12b:q8_0", true),
    ("Ministral-3-14B-2512-Q8_0", "ministral-3-14b:q8_0", true),
    ("gemma-2-27b-Q8_0", "gemma-2-27b:q8_0", true),
    ("starcoder2-15b-Q8_0", "starcoder2-15b:q8_0", true),
    ("Phi-3-medium-128k-Q8_0", "phi-3-medium:q8_0", true),
    ("Nemotron-3-Nano-30B-A3B-Q8_0", "nemotron-3-nano-30b:q8_0", true),
];

struct Temporary(std::path::PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Each covered model as measured and from the catalogue.
fn pairs(test: &str) -> Vec<(&'static str, bool, Model, Model)> {
    let to =
        Temporary(std::env::temp_dir().join(format!("plimsoll-catalogue-{test}-{}", std::process::id())));
    std::fs::create_dir_all(&to.0).unwrap();
    let open = |header: &str| {
        let description = fixture::directory().join(format!("{header}.txt"));
        Model::open(&fixture::inflate(&description, &to.0)).unwrap()
    };
    let pair = |(header, name, exact): &(&str, &'static str, bool)| {
        (*name, *exact, open(header), catalogue::find(name).unwrap().model().unwrap())
    };
    COVERED.iter().map(pair).collect()
}

#[test]
fn tensors_are_those_of_the_measured_headers() {
    for (name, exact, measured, ours) in pairs("tensors") {
        let sorted = |model: &Model| -> BTreeMap<String, ([u64; 4], String)> {
            let kind =
                |t: &plimsoll::gguf::Tensor| if exact { t.kind.name().to_owned() } else { String::new() };
            model.tensors().iter().map(|t| (t.name.clone(), (t.dims, kind(t)))).collect()
        };
        let (measured, ours) = (sorted(&measured), sorted(&ours));
        for (tensor, shape) in &measured {
            assert_eq!(Some(shape), ours.get(tensor), "{name}: {tensor}");
        }
        assert_eq!(measured.len(), ours.len(), "{name}: more tensors than were measured");
    }
}

#[test]
fn estimates_are_those_of_the_measured_headers() {
    let gpu = Device::new("ROCm0", DeviceKind::Unified, 120 << 30, 120 << 30);
    for (name, exact, measured, ours) in pairs("estimates") {
        let size = catalogue::find(name).unwrap().file.size.clone();
        let (measured, ours) = (Facts::from_model(&measured).unwrap(), Facts::from_model(&ours).unwrap());
        let apart = measured.weights().abs_diff(ours.weights());
        // A published size leaves its rounding open, and the vocabulary in the header.
        let allowed = size.map_or(0, |size| size.rounding + 12_000_000 + size.bytes / 2000);
        assert!(apart <= if exact { 0 } else { allowed }, "{name}: {apart} bytes apart");
        for devices in [Devices::none(), Devices { list: vec![gpu.clone()] }] {
            for context in [4096, 16384, 65536] {
                for parallel in [None, Some(1), Some(3)] {
                    let settings = Settings { context, parallel, ..Settings::default() };
                    let of = |facts: &Facts| fit::estimate(facts, &settings, &devices).unwrap();
                    let (measured, ours) = (of(&measured), of(&ours));
                    assert_eq!(measured.bytes.kv_bytes, ours.bytes.kv_bytes, "{name} KV at {context}");
                    assert_eq!(
                        measured.bytes.state_bytes, ours.bytes.state_bytes,
                        "{name} state at {context}"
                    );
                    assert_eq!(measured.bytes.output_bytes, ours.bytes.output_bytes, "{name} output");
                    if exact {
                        // The process depends on the vocabulary's texts, which only a whole header has.
                        let buffers = |estimate: &fit::Estimate| {
                            let host = estimate.split.host;
                            (estimate.split.gpu, host.weights_bytes, host.compute_bytes)
                        };
                        assert_eq!(buffers(&measured), buffers(&ours), "{name} at {context}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_token_reads_what_is_not_in_memory_of_the_experts_that_it_uses() {
    let model = catalogue::find("deepseek-v3.1:tq1_0").unwrap().model().unwrap();
    let facts = Facts::from_model(&model).unwrap();
    let settings = Settings { context: 4096, load_mode: fit::LoadMode::Mmap, ..Settings::default() };
    let estimate = fit::estimate(&facts, &settings, &Devices::default()).unwrap();
    let (always, experts) = (estimate.mapped_always_bytes, estimate.mapped_experts_bytes);
    // All but the embedding's rows, of which a token reads one.
    assert!(always + experts < estimate.mapped_bytes && experts > 9 * always, "{always} {experts}");
    let reading = |resident| fit::reading(&facts, &estimate, resident);
    assert_eq!(reading(always - 1), None, "what every token touches is not all there");
    // Eight of 256 experts.
    assert_eq!(reading(always).unwrap().read_bytes, experts.div_ceil(32));
    assert_eq!(reading(always).unwrap().touched_bytes, always + experts.div_ceil(32));
    assert_eq!(reading(always + experts / 2).unwrap().read_bytes, (experts - experts / 2).div_ceil(32));
    let whole = reading(estimate.mapped_bytes).unwrap();
    assert_eq!((whole.read_bytes, fit::millitokens_per_second(&whole, 1)), (0, None));
    assert_eq!(fit::millitokens_per_second(&reading(always).unwrap(), experts.div_ceil(32)), Some(1000));
}

//! Arguments as llama-server reads them, placement, and what holds for every estimate.

#![allow(clippy::unwrap_used, clippy::panic)] // a test: what is wrong has to stop it

#[path = "oracle/fixture.rs"]
#[allow(dead_code)]
mod fixture;

use std::collections::BTreeMap;
use std::sync::OnceLock;

use plimsoll::fit::args::{ArgError, Origin, Parsed, parse};
use plimsoll::fit::{
    Budget, Device, DeviceKind, Devices, Facts, FlashAttention, GpuLayers, LoadMode, Override, Settings,
    always_touched, estimate, max_context, place,
};
use plimsoll::gguf::{Model, TensorType};
use proptest::prelude::*;

const GIB: u64 = 1 << 30;

fn read(line: &str, env: &[(&str, &str)]) -> Result<Parsed, ArgError> {
    let args: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    let env: BTreeMap<String, String> = env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    parse(&args, &env)
}

#[test]
fn a_pasted_command_line_is_read_whole() {
    let parsed = read(
        "/usr/bin/llama-server -m /m/x.gguf -c 16384 -ngl 999 -ctk q8_0 -ctv q8_0 -np 4 -ub 2048 --swa-full \
         -fa off --n-cpu-moe 10 --host 0.0.0.0 --port 8003 --jinja --temp 0.7 --cache_ram -1 -nkvo",
        &[],
    )
    .unwrap();
    let s = &parsed.settings;
    assert_eq!((s.context, s.parallel, s.ubatch, s.batch), (16384, Some(4), 2048, 2048));
    assert_eq!((s.cache_type_k, s.cache_type_v), (TensorType::Q8_0, TensorType::Q8_0));
    assert_eq!((s.gpu_layers, s.flash_attention), (GpuLayers::Count(999), FlashAttention::Off));
    assert!(s.swa_full && !s.kv_offload && s.prompt_cache_mib.is_none());
    assert_eq!(s.overrides, [Override::CpuMoe(10)]);
    assert_eq!(parsed.model.unwrap().to_str(), Some("/m/x.gguf"));
    assert_eq!((parsed.host.as_deref(), parsed.port), (Some("0.0.0.0"), Some(8003)));
    assert_eq!(parsed.origins["ctx-size"], Origin::Argument("-c".to_owned()));
    assert!(parsed.passed_on.is_empty());
}

#[test]
fn nothing_said_is_llama_servers_default() {
    let parsed = read("", &[]).unwrap();
    assert_eq!(parsed.settings, Settings::default());
    assert!(parsed.origins.is_empty());
}

#[test]
fn arguments_win_over_variables_and_variables_over_defaults() {
    let env = [
        ("LLAMA_ARG_CTX_SIZE", "8192"),
        ("LLAMA_ARG_N_PARALLEL", "2"),
        ("LLAMA_ARG_NO_KV_OFFLOAD", "anything"),
        ("LLAMA_ARG_KV_UNIFIED", "off"),
        ("LLAMA_ARG_SWA_FULL", "0"),
        ("LLAMA_ARG_CPU_MOE", "1"),
        ("LLAMA_ARG_LOAD_MODE", "mlock"),
        ("LLAMA_ARG_SOMETHING_NEW", "7"),
        ("PATH", "/bin"),
    ];
    let parsed = read("-c 4096", &env).unwrap();
    let s = &parsed.settings;
    assert_eq!((s.context, s.parallel, s.kv_unified), (4096, Some(2), Some(false)));
    assert!(!s.kv_offload && !s.swa_full);
    assert_eq!(
        (s.load_mode, s.overrides.as_slice()),
        (LoadMode::Mlock, [Override::CpuMoe(u32::MAX)].as_slice())
    );
    assert_eq!(parsed.origins["parallel"], Origin::Variable("LLAMA_ARG_N_PARALLEL".to_owned()));
    assert_eq!(parsed.origins["kv-offload"], Origin::Variable("LLAMA_ARG_NO_KV_OFFLOAD".to_owned()));
    assert_eq!(parsed.passed_on, ["LLAMA_ARG_SOMETHING_NEW"]);
    assert!(read("", &[("LLAMA_ARG_KV_UNIFIED", "perhaps")]).is_err());
}

#[test]
fn what_is_unknown_goes_with_its_value() {
    let parsed = read("--brand-new 7 -c 512 --another -zz -5 --flag", &[]).unwrap();
    assert_eq!(parsed.passed_on, ["--brand-new", "7", "--another", "-zz", "-5", "--flag"]);
    assert_eq!(parsed.settings.context, 512);
}

#[test]
fn near_misses_get_the_right_spelling() {
    for (line, expected) in [
        ("-mmp 0", "--load-mode"),
        ("--no-mmap", "--load-mode none"),
        ("--mlock", "--load-mode mlock"),
        ("--fit", "--fit on or --fit off"),
        ("--fit -c 4096", "--fit on or --fit off"),
        ("-fa", "--flash-attn on"),
        ("--ctx-size=4096", "--ctx-size 4096"),
        ("--ctx-sizes 4096", "--ctx-size"),
        ("--n-cpu-mo 4", "--n-cpu-moe"),
        ("-ctx-size 4096", "--ctx-size"),
        ("-c", "needs a value"),
        ("-c 16k", "'16k'"),
        ("-np 0", "slots"),
        ("-ctk q3_K", "q8_0"),
        ("-ngl many", "auto or all"),
        ("-sm sideways", "layer"),
        ("--load-mode map", "mmap"),
        ("--port 99999", "port"),
        ("-ts 3,x", "proportions"),
        ("-ot (=CPU", "regular expression"),
        ("-ot exps", "PATTERN=BUFFER"),
        ("stray", "'stray'"),
        ("--draft-max 4", "removed"),
        ("-hfd a/b", "-hfd would make the engine download a model"),
        ("--hf-repo-draft a/b", "draft-model"),
        ("-mmu https://x/p.gguf", "--mmproj FILE"),
        ("--gpt-oss-20b-default", "write what it sets"),
    ] {
        let error = read(line, &[]).unwrap_err().to_string();
        assert!(error.contains(expected), "{line}: {error}");
    }
}

#[test]
fn flags_that_stand_for_others_are_read_as_those() {
    let spec = read("--spec-default", &[]).unwrap();
    let spelled = read("--spec-type ngram-mod --spec-ngram-mod-n-max 64", &[]).unwrap();
    assert_eq!(spec.settings, spelled.settings);
    assert_eq!(spec.settings.drafted(), 64);
    assert!(spec.origins.contains_key("spec-type"));
    // As in a command line, what comes later wins.
    let fewer = read("--spec-default --spec-ngram-mod-n-max 8", &[]).unwrap();
    assert_eq!(fewer.settings.drafted(), 8);
    // Each preset of a model, and nothing else, brings a model of its own.
    for flag in plimsoll::fit::flags::FLAGS {
        let name = flag.name();
        let preset = name != "--spec-default" && (name.ends_with("-default") || name.ends_with("b-spec"));
        assert_eq!(plimsoll::fit::flags::PRESETS.contains(&name), preset, "{name}");
        assert!(!preset || read(name, &[]).is_err(), "{name}");
    }
    let by_variable = read("", &[("LLAMA_ARG_SPEC_DRAFT_HF_REPO", "a/b")]).unwrap_err().to_string();
    assert!(by_variable.starts_with("LLAMA_ARG_SPEC_DRAFT_HF_REPO would make"), "{by_variable}");
    assert!(read("", &[("LLAMA_ARG_MMPROJ_URL", "https://x/p.gguf")]).is_err());
}

fn overriding(values: &[String]) -> Result<Parsed, ArgError> {
    let flags = values.iter().flat_map(|value| ["-ot".to_owned(), value.clone()]);
    parse(&flags.collect::<Vec<_>>(), &BTreeMap::new())
}

#[test]
fn hostile_patterns_get_a_short_sentence() {
    for (value, expected) in [
        ("^{99999}=CPU".to_owned(), "can't be repeated"),
        ("(^){99999}=CPU".to_owned(), "a count is larger than 1000, at byte 3"),
        (format!("{}=CPU", "^".repeat(50_000)), "at most 4096 bytes"),
        (format!("{}=CPU", "(a)".repeat(10 << 20)), "at most 128 KiB"),
        ("exps=CPU,".repeat(1 << 20), "at most 2048 patterns"),
        (format!("exps={}", "x".repeat(1 << 20)), "at most 128 KiB"),
    ] {
        let error = overriding(&[value]).unwrap_err().to_string();
        assert!(error.starts_with("-ot: '") && error.contains(expected), "{error}");
        assert!(error.len() < 512, "{} bytes", error.len());
    }
    // What counts is all of a command line.
    let many = vec!["exps=CPU,".repeat(1000); 3];
    assert!(overriding(&many[..2]).is_ok());
    assert!(overriding(&many).unwrap_err().to_string().contains("at most 2048 patterns"));
    let long = vec![format!("{}=CPU", "x".repeat(4000)); 40];
    assert!(overriding(&long[..32]).is_ok());
    assert!(overriding(&long).unwrap_err().to_string().contains("at most 128 KiB"));
}

#[test]
fn a_pattern_for_each_tensor_is_as_good_as_one_for_all() {
    let coder = &models()[0];
    let kinds =
        ["attn_k", "attn_output", "attn_q", "attn_v", "ffn_down_exps", "ffn_gate_exps", "ffn_up_exps"];
    let each: Vec<String> = (0..48)
        .flat_map(|layer| kinds.map(|kind| format!(r"blk\.{layer}\.{kind}\.weight={}", place_of(layer))))
        .collect();
    let one = [r"blk\.(\d|1\d|2[0-3])\.(attn_([kqv]|output)|ffn_(up|gate|down)_exps)\.weight=CPU".to_owned()];
    let price = |values: &[String]| {
        let settings = Settings { context: 4096, ..overriding(values).unwrap().settings };
        estimate(coder, &settings, &one_device()).unwrap()
    };
    let whole = price(&[]);
    assert_eq!(price(&each), price(&one));
    assert!(price(&one).split.gpu.weights_bytes < whole.split.gpu.weights_bytes * 6 / 10);
    // The first that applies counts, of patterns and of layers.
    let line = |line: &str| {
        let settings = Settings { context: 4096, ..read(line, &[]).unwrap().settings };
        estimate(coder, &settings, &one_device()).unwrap().split.gpu.weights_bytes
    };
    assert_eq!(line("-ot exps=ROCm0 -cmoe"), whole.split.gpu.weights_bytes);
    assert_eq!(line("-cmoe -ot exps=ROCm0"), line("-ncmoe 48"));
    assert_eq!(line("-ncmoe 7 -ncmoe 3 -ot exps=ROCm0 -ncmoe 48"), line("-ncmoe 7"));
    assert_eq!(line("-ncmoe 3 -ncmoe 7"), line("-ncmoe 7"));
    // What was asked before is not what is answered now.
    assert_eq!(price(&[]), whole);
    assert_eq!(price(&["nothing=CPU".to_owned()]).split.gpu.weights_bytes, whole.split.gpu.weights_bytes);
}

fn place_of(layer: u32) -> &'static str {
    if layer < 24 { "CPU" } else { "ROCm0" }
}

/// One model of each kind: plain with experts, latent, windowed, recurrent.
fn models() -> &'static [Facts] {
    static MODELS: OnceLock<Vec<Facts>> = OnceLock::new();
    MODELS.get_or_init(|| {
        let to = std::env::temp_dir().join(format!("plimsoll-fit-{}", std::process::id()));
        std::fs::create_dir_all(&to).unwrap();
        let names = ["Qwen3-Coder-30B-A3B-Q8_0", "GLM-4.7-Flash-Q8_0", "gpt-oss-20b-MXFP4", "LFM2-1.2B-Q8_0"];
        let facts = |name: &&str| {
            let description = fixture::directory().join(format!("{name}.txt"));
            Facts::from_model(&Model::open(&fixture::inflate(&description, &to)).unwrap()).unwrap()
        };
        let all = names.iter().map(facts).collect();
        std::fs::remove_dir_all(&to).unwrap();
        all
    })
}

fn one_device() -> Devices {
    Devices { list: vec![Device::new("ROCm0", DeviceKind::Unified, 96 * GIB, 96 * GIB)] }
}

#[test]
fn placement_fills_the_device_and_spells_itself_out() {
    let coder = &models()[0];
    let settings = Settings { context: 32768, parallel: Some(1), ..Settings::default() };
    let budget = |gpu: u64| Budget { host: 128 * GIB, gpu: gpu * GIB, unified: false, mapped_resident: true };
    let whole = place(coder, &settings, &one_device(), &budget(96)).unwrap();
    assert!(whole.fits && whole.cpu_moe == 0 && whole.gpu_layers == coder.layer_count_all + 1);
    assert_eq!(whole.args(), ["--fit", "off", "-ngl", "49"]);

    let less = place(coder, &settings, &one_device(), &budget(20)).unwrap();
    assert!(less.fits && less.cpu_moe > 0 && less.gpu_layers == 49, "{} {}", less.cpu_moe, less.fits);
    assert!(less.estimate.split.gpu.total_bytes <= 20 * GIB);
    let mut more = less.settings.clone();
    more.overrides = vec![Override::CpuMoe(less.cpu_moe - 1)];
    let more = estimate(coder, &more, &one_device()).unwrap();
    assert!(more.split.gpu.total_bytes > 20 * GIB, "one more layer's experts would have fitted");

    let tiny = place(coder, &settings, &one_device(), &budget(2)).unwrap();
    assert!(tiny.gpu_layers < 49 && tiny.estimate.split.gpu.total_bytes <= 2 * GIB);

    let said = Settings { gpu_layers: GpuLayers::Count(7), ..settings.clone() };
    assert_eq!(place(coder, &said, &one_device(), &budget(1)).unwrap().gpu_layers, 7);
    assert_eq!(place(coder, &settings, &Devices::none(), &budget(0)).unwrap().gpu_layers, 0);
}

#[test]
fn the_largest_context_is_the_last_that_fits() {
    let coder = &models()[0];
    let settings = Settings { parallel: Some(1), prompt_cache_mib: Some(0), ..Settings::default() };
    let limit = 40 * GIB;
    let found = max_context(coder, &settings, &Devices::none(), None, |e| e.bytes.total_bytes <= limit)
        .unwrap()
        .unwrap();
    assert!(found.bytes.total_bytes <= limit);
    let next = Settings { context: found.context + 256, ..settings.clone() };
    assert!(estimate(coder, &next, &Devices::none()).unwrap().bytes.total_bytes > limit);
    let none = max_context(coder, &settings, &Devices::none(), None, |_| false).unwrap();
    assert!(none.is_none());
    let all = max_context(coder, &settings, &Devices::none(), None, |_| true).unwrap().unwrap();
    assert_eq!(all.context, coder.context_train);
}

#[test]
fn mapped_weights_are_told_from_anonymous_ones() {
    let oss = &models()[2];
    let with = |mode| {
        let settings = Settings { load_mode: mode, context: 4096, ..Settings::default() };
        estimate(oss, &settings, &Devices::none()).unwrap()
    };
    let (mapped, read) = (with(LoadMode::Auto), with(LoadMode::None));
    assert_eq!(mapped.mapped_bytes + mapped.anonymous_weights_bytes, mapped.bytes.weights_bytes);
    assert_eq!(mapped.anonymous_weights_bytes, mapped.repacked_bytes);
    assert!(mapped.repacked_bytes > 9 * GIB && mapped.mapped_bytes > GIB);
    assert_eq!((read.mapped_bytes, read.anonymous_weights_bytes), (0, read.bytes.weights_bytes));
    assert_eq!(mapped.mapped_by_shard.iter().sum::<u64>(), mapped.mapped_bytes);
}

#[test]
fn one_expert_of_a_tensor_lies_together() {
    // 2048 by 768 in blocks of 34 bytes for 32.
    assert_eq!(models()[0].expert_bytes(), 2048 * 768 / 32 * 34);
    assert_eq!(models()[3].expert_bytes(), 0, "it has none");
}

#[test]
fn replaced_metadata_is_bounded_or_unknown() {
    let coder = &models()[0];
    let with = |overrides: &str| {
        let parsed = read(&format!("-c 4096 --override-kv {overrides}"), &[]).unwrap();
        estimate(coder, &parsed.settings, &Devices::none())
    };
    let plain = estimate(coder, &read("-c 4096", &[]).unwrap().settings, &Devices::none()).unwrap();
    let fewer = with("qwen3moe.expert_used_count=int:4").unwrap();
    assert_eq!((fewer.bytes.total_bytes, fewer.exact), (plain.bytes.total_bytes, false));
    assert!(with("tokenizer.ggml.add_bos_token=bool:false").unwrap().exact);
    for unknown in [
        "qwen3moe.expert_used_count=int:16",
        "qwen3moe.block_count=int:4",
        "qwen3moe.expert_used_count=str:4",
    ] {
        assert!(matches!(with(unknown), Err(plimsoll::fit::FitError::Unknown(_))), "{unknown}");
    }
}

fn settings() -> impl Strategy<Value = Settings> {
    let types = prop::sample::select(vec![TensorType::F16, TensorType::Q8_0, TensorType::Q4_0]);
    let layers = prop_oneof![Just(GpuLayers::All), (0_u32..60).prop_map(GpuLayers::Count)];
    let flash = prop::sample::select(vec![FlashAttention::Auto, FlashAttention::On]);
    (256_u64..200_000, prop::option::of(1_u32..9), 32_u32..3000, types, layers, flash, any::<(bool, bool)>())
        .prop_map(|(context, parallel, ubatch, kind, gpu_layers, flash_attention, (swa_full, kv_offload))| {
            Settings {
                context,
                parallel,
                ubatch,
                cache_type_k: kind,
                cache_type_v: kind,
                gpu_layers,
                flash_attention,
                swa_full,
                kv_offload,
                ..Settings::default()
            }
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn the_split_adds_up(settings in settings(), model in 0_usize..4) {
        if let Ok(e) = estimate(&models()[model], &settings, &one_device()) {
            let (gpu, host) = (e.split.gpu, e.split.host);
            prop_assert_eq!(gpu.total_bytes + host.total_bytes, e.bytes.total_bytes);
            prop_assert_eq!(gpu.weights_bytes + host.weights_bytes, e.bytes.weights_bytes);
            prop_assert_eq!(gpu.kv_bytes + host.kv_bytes, e.bytes.kv_bytes);
            prop_assert_eq!(e.devices.iter().map(|d| d.total_bytes).sum::<u64>(), gpu.total_bytes);
            prop_assert_eq!(e.mapped_bytes + e.anonymous_weights_bytes, host.weights_bytes);
        }
    }

    #[test]
    fn what_every_token_touches_is_named_to_the_byte(settings in settings(), model in 0_usize..4, (repack, cpu_moe) in any::<(bool, bool)>()) {
        let mut settings = Settings { load_mode: LoadMode::Mmap, repack, ..settings };
        if cpu_moe {
            settings = settings.with_experts_on_host(60);
        }
        let facts = &models()[model];
        if let Ok(e) = estimate(facts, &settings, &one_device()) {
            let ranges = always_touched(facts, &settings, &one_device()).unwrap();
            let sum: u64 = ranges.iter().map(|range| range.bytes).sum();
            // Neighbours are one range, with the gap between them; those of GGUF are of 31 bytes at most.
            prop_assert!(sum >= e.mapped_always_bytes && sum < e.mapped_always_bytes + 64 * 4096, "{} {}", sum, e.mapped_always_bytes);
            prop_assert!(ranges.windows(2).all(|w| (w[0].file, w[0].end()) < (w[1].file, w[1].offset)), "in order, apart");
            prop_assert!(ranges.iter().all(|range| range.file < facts.shards && range.offset > 0));
        }
    }

    #[test]
    fn more_context_never_costs_less(settings in settings(), more in 1_u64..100_000, model in 0_usize..4, device in any::<bool>()) {
        let larger = Settings { context: settings.context + more, ..settings.clone() };
        let facts = &models()[model];
        let devices = if device { one_device() } else { Devices::none() };
        let both = (estimate(facts, &settings, &devices), estimate(facts, &larger, &devices));
        if let (Ok(small), Ok(large)) = both {
            prop_assert!(large.bytes.kv_bytes >= small.bytes.kv_bytes);
            prop_assert!(large.bytes.extras_bytes >= small.bytes.extras_bytes);
            // With the cache apart from its layers, each of its tensors is copied for its layer, and ggml's allocator, which
            // takes the first gap that fits, finds one more or one less: the engine's own compute buffer may then
            // shrink as the context grows.
            if settings.kv_offload || !device {
                prop_assert!(
                    large.bytes.total_bytes >= small.bytes.total_bytes,
                    "{:?} and {:?}", small.bytes, large.bytes
                );
            }
        }
    }

    #[test]
    fn a_larger_cache_type_never_costs_less(settings in settings(), model in 0_usize..4, device in any::<bool>()) {
        let with = |kind| {
            let s = Settings { cache_type_k: kind, cache_type_v: kind, ..settings.clone() };
            let devices = if device { one_device() } else { Devices::none() };
            estimate(&models()[model], &s, &devices).map(|e| e.bytes.total_bytes)
        };
        if let (Ok(small), Ok(middle), Ok(large)) =
            (with(TensorType::Q4_0), with(TensorType::Q8_0), with(TensorType::F16))
        {
            prop_assert!(small <= middle && middle <= large, "{small} {middle} {large}");
        }
    }

    #[test]
    fn made_up_arguments_never_panic(args in prop::collection::vec("[-a-z0-9=_,.]{0,12}", 0..8)) {
        let _ = parse(&args, &BTreeMap::new());
    }
}

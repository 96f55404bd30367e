//! The roadmap's tables beside ours: `docs/roadmap-tables.md` is what this test renders.
//!
//! `PLIMSOLL_WRITE_DOCS=1 cargo test --test roadmap` writes the page anew.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test: what is wrong has to stop it

use std::fmt::Write as _;
use std::path::Path;

use plimsoll::bytes::Bytes;
use plimsoll::catalogue;
use plimsoll::fit::{self, Budget, Device, DeviceKind, Devices, Estimate, Facts, Settings};
use plimsoll::ledger::{FileId, Footprint, Gpu, GpuKind, Machine, Memory, PerPool};
use plimsoll::policy::Verdict;
use plimsoll::policy::verdict::{self, Judgement, Room};

/// The roadmap's machine, and what is kept of it for the system.
const MEMORY: Bytes = Bytes::gib(128);
const GPU: Bytes = Bytes::gib(120);
const RESERVE: Bytes = Bytes::gib(4);

struct Priced {
    file: u64,
    estimate: Estimate,
    footprint: Footprint,
    judgement: Judgement,
}

fn machine() -> Machine {
    let gpu = Gpu { name: "GPU".to_owned(), kind: GpuKind::Unified, total: GPU, used: Bytes::ZERO };
    let memory = Memory { total: MEMORY, available: MEMORY, free: MEMORY, ..Memory::default() };
    Machine { memory, gpus: vec![gpu], ..Machine::default() }
}

/// Prices a model of the catalogue alone: one slot, 16-bit cache, no prompt cache; `taken` of the machine is gone.
fn price(name: &str, context: u64, taken: u64) -> Priced {
    let model = catalogue::find(name).unwrap().model().unwrap();
    let facts = Facts::from_model(&model).unwrap();
    let devices = Devices { list: vec![Device::new("GPU0", DeviceKind::Unified, GPU.0, GPU.0)] };
    let settings = Settings { context, parallel: Some(1), prompt_cache_mib: Some(0), ..Settings::default() };
    let room = Room::of(&machine(), RESERVE, &PerPool::default());
    let budget = Budget {
        host: room.emptied.memory.0.saturating_sub(taken),
        gpu: GPU.0.saturating_sub(taken),
        unified: true,
        mapped_resident: true,
    };
    let estimate = fit::place(&facts, &settings, &devices, &budget).unwrap().estimate;
    let identity = model.shards()[0].identity;
    let files = [FileId { device: identity.device, inode: identity.inode }];
    let footprint = verdict::footprint(&estimate, &files, &[0]);
    let judgement =
        verdict::judge(&footprint, Bytes(estimate.mapped_always_bytes), estimate.known, &machine(), &room);
    Priced { file: model.file_bytes(), estimate, footprint, judgement }
}

fn gib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 30))
}

fn gb(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e9)
}

fn fits(judgement: &Judgement) -> String {
    match (judgement.verdict, judgement.short) {
        (Verdict::Fits, _) => "yes".to_owned(),
        (_, Some((_, short))) => format!("no, {} GiB short", gib(short.0)),
        _ => "unknown".to_owned(),
    }
}

/// A file's size: what, the roadmap's words, ours, why they differ.
type Size = (&'static str, &'static str, &'static str, &'static str);

const UNIT: &str = "the roadmap counts in GiB and writes GB";
const SAME: &str = "";

const TESTED: &[Size] = &[
    (
        "GLM-4.7-Flash Q8",
        "33 GB",
        "glm-4.7-flash:q8_0",
        "33 GB is Q8_0's size in neither unit; perhaps a larger mixture such as Q8_K_XL",
    ),
    ("GLM-4.7-Flash BF16", "56 GB", "glm-4.7-flash:bf16", UNIT),
    ("GLM-4.7-REAP-218B Q3", "92 GB", "glm-4.7-reap-218b:q3_k", UNIT),
    (
        "Qwen3-Next-80B Q8",
        "87 GB",
        "qwen3-next-80b:q8_0",
        "87 GB is Q8_0's size in neither unit; perhaps a larger mixture such as Q8_K_XL",
    ),
    ("Qwen3-235B Q3", "97 GB", "qwen3-235b:q3_k_s", "GiB; between Q3_K_S and Q3_K_M (104.7 GiB)"),
    ("GPT-OSS-20B F16", "13 GB", "gpt-oss-20b:f16", UNIT),
];

const LARGE: &[Size] = &[
    ("DeepSeek-V3.1 TQ1_0", "170 GB", "deepseek-v3.1:tq1_0", SAME),
    ("DeepSeek-V3.1 IQ1_S", "192 GB", "deepseek-v3.1:iq1_s", SAME),
    ("DeepSeek-V3.1 IQ1_M", "", "deepseek-v3.1:iq1_m", "assumed: scaled from IQ1_S"),
    ("DeepSeek-V3.1 2 bits", "250 to 300 GB", "deepseek-v3.1:q2_k_xl", "Q2_K_XL is at the lower end"),
    (
        "DeepSeek-V3.1 3 bits",
        "350 to 400 GB",
        "deepseek-v3.1:q3_k_xl",
        "assumed: scaled from Q2_K_XL; 3 bits of 671 B parameters are 252 GB before anything is raised",
    ),
    ("DeepSeek-V3.1 5 bits", "500 GB", "deepseek-v3.1:q5_k_xl", SAME),
    ("Qwen3-Coder-480B IQ1_M", "150 GB", "qwen3-coder-480b:iq1_m", SAME),
    ("MiniMax-M2.1 Q3_K_XL", "101 GB", "minimax-m2.1:q3_k_xl", SAME),
    (
        "GPT-OSS-120B Q3/Q4",
        "120 GB",
        "gpt-oss-120b:q4_k_m",
        "the experts are published at 4.25 bits, and stay so in every file: half of what its parameters suggest",
    ),
    (
        "GPT-OSS-120B Q2_K",
        "150 to 160 GB",
        "gpt-oss-120b:q2_k",
        "the same; and 2 bits can't be more than the 120 GB guessed for 3 and 4",
    ),
    (
        "Mistral-Large-2 Q3",
        "120 GB",
        "mistral-large-2:q3_k_m",
        "120 GB is about Q8_0 (130.3 GB): 123 B parameters at 3.9 bits are 59 GB",
    ),
    (
        "Mistral-Large-2 Q2_K",
        "160 to 170 GB",
        "mistral-large-2:q2_k",
        "123 B parameters at 2.9 bits are 45 GB",
    ),
    ("Qwen3-235B Q2", "130 to 140 GB", "qwen3-235b:q2_k", "smaller than Q3 of the same model, not larger"),
    (
        "Llama-4, largest, Q2",
        "varies",
        "llama-4-maverick-17b-128e:q2_k_xl",
        "there is no 405B of Llama 4; the largest with open weights is Maverick (400 B)",
    ),
];

const MIDDLE: &[Size] = &[
    ("Qwen3-Coder-30B Q8", "30 to 40 GB", "qwen3-coder-30b:q8_0", SAME),
    ("Qwen3-Coder-14B Q8", "15 to 20 GB", "qwen3-coder-14b:q8_0", "never published; of Qwen3-14B"),
    ("Qwen3-Coder-70B Q8", "70 to 80 GB", "qwen3-coder-70b:q8_0", "never published; of Qwen2.5-72B"),
    (
        "Llama-4-Scout-17B-16E Q4",
        "20 GB",
        "llama-4-scout-17b-16e:q4_k_m",
        "17 B are used for a token; all 16 experts are in memory, 108 B parameters",
    ),
    ("Llama-4-Scout-17B-16E Q8", "35 GB", "llama-4-scout-17b-16e:q8_0", "the same"),
    (
        "Llama-4-Scout-70B Q4",
        "80 GB",
        "llama-4-scout-70b:q4_k_m",
        "never published; of Llama-3.1-70B: 80 GB would be Q8",
    ),
    (
        "DeepSeek-Coder-V3-33B Q8",
        "35 GB",
        "deepseek-coder-v3-33b:q8_0",
        "never published; of DeepSeek-Coder-33B",
    ),
    ("Mistral-Nemo-12B Q8", "13 GB", "mistral-nemo-12b:q8_0", SAME),
    ("Gemma-2-27B Q8", "28 GB", "gemma-2-27b:q8_0", SAME),
    ("Gemma-2-9B Q8", "10 GB", "gemma-2-9b:q8_0", SAME),
    ("Gemma-2-2B Q8", "", "gemma-2-2b:q8_0", SAME),
    ("Yi-Coder-34B Q8", "35 GB", "yi-coder-34b:q8_0", "never published (Yi-Coder has 9B); of Yi-34B"),
    ("Qwen2.5-72B Q8", "75 GB", "qwen2.5-72b:q8_0", SAME),
    ("Qwen2.5-32B Q8", "33 GB", "qwen2.5-32b:q8_0", UNIT),
    ("StarCoder2-15B Q8", "16 GB", "starcoder2-15b:q8_0", UNIT),
    ("StarCoder2-3B Q8", "4 GB", "starcoder2-3b:q8_0", SAME),
    ("Codestral-22B Q8", "23 GB", "codestral-22b:q8_0", SAME),
    ("Nemotron-3-Nano-30B Q8", "30 to 35 GB", "nemotron-3-nano-30b:q8_0", SAME),
    (
        "Nemotron-3-Nano-30B Q4",
        "15 to 20 GB",
        "nemotron-3-nano-30b:q4_k_m",
        "its rows are no whole blocks of the 4-bit types: most tensors fall back to larger ones",
    ),
    ("Apriel-1.5-15B Q8", "15 to 18 GB", "apriel-1.5-15b-thinker:q8_0", SAME),
    ("Apriel-1.5-15B Q4", "8 to 10 GB", "apriel-1.5-15b-thinker:q4_k_m", SAME),
    ("Ministral-3-14B Q8", "14 to 16 GB", "ministral-3-14b:q8_0", SAME),
    ("Ministral-3-14B Q4", "8 GB", "ministral-3-14b:q4_k_m", SAME),
    ("Phi-3-mini Q8", "3 to 14 B", "phi-3-mini:q8_0", SAME),
    ("Phi-3-medium Q8", "3 to 14 B", "phi-3-medium:q8_0", SAME),
    ("Phi-3.5-mini Q8", "3 to 14 B", "phi-3.5-mini:q8_0", SAME),
    ("Phi-3.5-MoE Q8", "3 to 14 B", "phi-3.5-moe:q8_0", "42 B parameters in 16 experts"),
    ("Llama-3.1-8B Q8", "", "llama-3.1-8b:q8_0", SAME),
    ("Llama-3.2-3B Q8", "", "llama-3.2-3b:q8_0", SAME),
];

/// A model with a context: what, the catalogue's name, context, the roadmap's words, why they differ.
type At = (&'static str, &'static str, u64, &'static str, &'static str);

const MLA: &str = "latent attention caches one row of 576 for all 128 heads: 69 KiB a token; compute buffers are the larger part";
const MLA_HOST: &str = "it does not fit the GPU: with experts on the host compute buffers grow";

const CONTEXTS: &[At] = &[
    ("DeepSeek-V3.1 TQ1_0", "deepseek-v3.1:tq1_0", 4096, "172 GB", MLA),
    ("DeepSeek-V3.1 TQ1_0", "deepseek-v3.1:tq1_0", 16384, "174 GB", MLA_HOST),
    ("DeepSeek-V3.1 TQ1_0", "deepseek-v3.1:tq1_0", 32768, "178 GB", MLA_HOST),
    ("DeepSeek-V3.1 IQ1_S", "deepseek-v3.1:iq1_s", 16384, "196 GB", MLA_HOST),
    (
        "Qwen3-Coder-480B IQ1_M",
        "qwen3-coder-480b:iq1_m",
        4096,
        "152 GB",
        "62 layers of 8 heads: 248 KiB a token",
    ),
    (
        "Qwen3-Coder-480B IQ1_M",
        "qwen3-coder-480b:iq1_m",
        16384,
        "154 GB",
        "3.9 GiB of cache is right; compute comes on top",
    ),
    (
        "Qwen3-Coder-480B IQ1_M",
        "qwen3-coder-480b:iq1_m",
        32768,
        "158 GB",
        "7.8 GiB of cache is right; compute comes on top",
    ),
    (
        "GPT-OSS-120B Q2_K",
        "gpt-oss-120b:q2_k",
        16384,
        "159 GB",
        "the size of the file; half of its layers see 128 tokens only",
    ),
    ("Mistral-Large-2 Q2_K", "mistral-large-2:q2_k", 16384, "169 GB", "the size of the file"),
    ("Qwen3-235B Q2", "qwen3-235b:q2_k", 16384, "139 GB", "the size of the file"),
    (
        "MiniMax-M2.1 Q3_K_XL",
        "minimax-m2.1:q3_k_xl",
        65536,
        "121 GB (20 of context)",
        "62 layers of 8 heads: 15.5 GiB at 65536",
    ),
    ("Llama-4-Scout-17B Q8", "llama-4-scout-17b-16e:q8_0", 102_400, "40 GB", "the size of the file"),
    (
        "Llama-4-Scout-17B Q4",
        "llama-4-scout-17b-16e:q4_k_m",
        1_048_576,
        "100 GB",
        "the size of the file; three of four layers see chunks of 8192 only, so a million tokens take 48 GiB",
    ),
    (
        "Llama-4-Scout-17B Q4",
        "llama-4-scout-17b-16e:q4_k_m",
        10_485_760,
        "250 GB (200 of context)",
        "12 full layers of 8 heads: 480 GiB at ten million",
    ),
];

/// Models that run at once: what, names, the roadmap's sum, its verdict, why they differ.
type Combination = (&'static str, &'static [&'static str], &'static str, &'static str);

const OSS: &str = "gpt-oss-20b:f16";
const CODER: &str = "qwen3-coder-30b:q8_0";
const SMALL: &str = "qwen3-coder-14b:q8_0";
const STAR: &str = "starcoder2-15b:q8_0";
const NEMO: &str = "mistral-nemo-12b:q8_0";
const GLM: &str = "glm-4.7-flash:q8_0";
const REAP: &str = "glm-4.7-reap-218b:q3_k";
const NEXT: &str = "qwen3-next-80b:q8_0";
const MINISTRAL: &str = "ministral-3-14b:q8_0";
const APRIEL: &str = "apriel-1.5-15b-thinker:q8_0";

const TOGETHER: &[Combination] = &[
    ("Strategy 1: Ask, Code", &[OSS, CODER], "48 GB", SAME),
    ("Strategy 2: Ask, Code, Autocomplete", &[NEMO, CODER, STAR], "64 GB", SAME),
    (
        "Strategy 3: Qwen3-Coder-30B and REAP-218B",
        &[CODER, REAP],
        "125 GB, tight",
        "the cache of REAP's 92 layers is 5.8 GiB at 16K, which the sum of files leaves out",
    ),
    ("Strategy 3: GLM Q8 and REAP-218B", &[GLM, REAP], "125 GB, tight", "the same"),
    (
        "Strategy 4: Qwen3-Coder-14B three times",
        &[SMALL, SMALL, SMALL],
        "54 GB",
        "GPU weights are not shared: each instance has its own",
    ),
    ("Speed machine", &[OSS, CODER, SMALL, STAR], "82 GB", SAME),
    ("Reasoning machine", &[REAP], "92 GB", "with its cache and buffers"),
    (
        "Small 2: Nemo and DeepSeek-Coder-V3-33B",
        &[NEMO, "deepseek-coder-v3-33b:q8_0"],
        "48 GB",
        "the latter was never published",
    ),
    ("Medium 2: GPT-OSS-20B, GLM Q8, StarCoder2", &[OSS, GLM, STAR], "62 GB", SAME),
    ("Medium 3: Qwen3-Coder-14B and Qwen3-80B", &[SMALL, NEXT], "105 GB, tight", SAME),
    ("Large 3: Qwen3-80B and Nemo", &[NEXT, NEMO], "100 GB", SAME),
    ("Large 4: Mistral-Large-2 alone", &["mistral-large-2:q3_k_m"], "120 GB", "the size of the file"),
    ("Nemotron and GPT-OSS-20B", &["nemotron-3-nano-30b:q8_0", OSS], "48 GB", SAME),
    ("Nemotron and Qwen3-Coder-30B", &["nemotron-3-nano-30b:q8_0", CODER], "70 GB", SAME),
    ("Qwen3-Coder-30B and StarCoder2", &[CODER, STAR], "51 GB", SAME),
    ("Qwen3-Coder-14B and GLM Q8", &[SMALL, GLM], "51 GB", SAME),
    ("Qwen3-Coder-14B and REAP-218B", &[SMALL, REAP], "110 GB", "with REAP's cache"),
    ("Apriel and Qwen3-Coder-30B", &[APRIEL, CODER], "53 GB", SAME),
    ("Apriel twice", &[APRIEL, APRIEL], "36 GB", SAME),
    ("StarCoder2 and GLM Q8", &[STAR, GLM], "49 GB", SAME),
    ("StarCoder2 and REAP-218B", &[STAR, REAP], "108 GB", "with REAP's cache"),
    ("Nemo and Qwen3-Coder-30B", &[NEMO, CODER], "48 GB", SAME),
    ("Nemo, GLM Q8 and StarCoder2", &[NEMO, GLM, STAR], "62 GB", SAME),
    ("Nemo and REAP-218B", &[NEMO, REAP], "105 GB", "with REAP's cache"),
    ("Ministral and Qwen3-Coder-30B", &[MINISTRAL, CODER], "51 GB", SAME),
    ("Ministral and GLM Q8", &[MINISTRAL, GLM], "49 GB", SAME),
    ("Ministral four times", &[MINISTRAL, MINISTRAL, MINISTRAL, MINISTRAL], "64 GB", SAME),
];

fn sizes(out: &mut String, title: &str, rows: &[Size]) {
    let _ = writeln!(out, "\n## {title}\n");
    out.push_str("| model | roadmap | file, GB | file, GiB | why |\n|---|---|---:|---:|---|\n");
    for (what, theirs, name, why) in rows {
        let choice = catalogue::find(name).unwrap();
        let bytes = choice.model().unwrap().file_bytes();
        assert!(!choice.is_assumed() || why.contains("never published") || why.contains("assumed"), "{name}");
        let _ = writeln!(out, "| {what} | {theirs} | {} | {} | {why} |", gb(bytes), gib(bytes));
    }
}

fn contexts(out: &mut String) {
    out.push_str("\n## With context\n\n");
    out.push_str(
        "Cache is K, V and state in 16 bits (state in 32); all is everything that the engine allocates.\n\n",
    );
    out.push_str("| model | context | roadmap | file, GB | cache, GiB | compute, GiB | all, GB | all, GiB | fits | why |\n");
    out.push_str("|---|---:|---|---:|---:|---:|---:|---:|---|---|\n");
    for (what, name, context, theirs, why) in CONTEXTS {
        let priced = price(name, *context, 0);
        let bytes = &priced.estimate.bytes;
        let _ = writeln!(
            out,
            "| {what} | {context} | {theirs} | {} | {} | {} | {} | {} | {} | {why} |",
            gb(priced.file),
            gib(bytes.kv_bytes + bytes.state_bytes),
            gib(bytes.compute_bytes + bytes.output_bytes),
            gb(bytes.total_bytes),
            gib(bytes.total_bytes),
            fits(&priced.judgement),
        );
    }
}

/// The footprints of models at once, each placed in the room that those before it leave.
fn together(names: &[&str], context: u64) -> (u64, Judgement) {
    let mut sum = Footprint::default();
    sum.gpus.push(Bytes::ZERO);
    let (mut known, mut always) = (true, Bytes::ZERO);
    for name in names {
        let priced = price(name, context, sum.gpus[0].0 + sum.private.0);
        sum.private += priced.footprint.private;
        sum.gpus[0] += priced.footprint.gpus.first().copied().unwrap_or_default();
        sum.mapped.extend(priced.footprint.mapped);
        always += Bytes(priced.estimate.mapped_always_bytes);
        known &= priced.estimate.known;
    }
    let room = Room::of(&machine(), RESERVE, &PerPool::default());
    (sum.total().0, verdict::judge(&sum, always, known, &machine(), &room))
}

fn combinations(out: &mut String) {
    out.push_str("\n## Several at once\n\nEvery model with a context of 16384, and what that takes with a context of 65536 (which is \
        beyond what StarCoder2 and DeepSeek-Coder were trained on).\n\n");
    out.push_str("| models | roadmap | 16K, GB | 16K, GiB | fits | 65K, GiB | fits | why |\n|---|---|---:|---:|---|---:|---|---|\n");
    for (what, names, theirs, why) in TOGETHER {
        let (total, judgement) = together(names, 16384);
        let (longer, judged) = together(names, 65536);
        let _ = writeln!(
            out,
            "| {what} | {theirs} | {} | {} | {} | {} | {} | {why} |",
            gb(total),
            gib(total),
            fits(&judgement),
            gib(longer),
            fits(&judged)
        );
    }
}

/// What a shorter context saves: what, name, from, to, the roadmap's words.
const SAVINGS: &[(&str, &str, u64, u64, &str)] = &[
    ("DeepSeek-V3.1", "deepseek-v3.1:tq1_0", 65536, 16384, "10 to 20 GB"),
    ("Qwen3-Coder-480B", "qwen3-coder-480b:iq1_m", 65536, 16384, "10 to 20 GB"),
    ("DeepSeek-V3.1", "deepseek-v3.1:tq1_0", 131_072, 32768, "20 to 40 GB"),
    ("DeepSeek-V3.1", "deepseek-v3.1:tq1_0", 131_072, 65536, "20 to 40 GB"),
];

fn savings(out: &mut String) {
    out.push_str("\n## What a shorter context saves\n\nOf the cache alone.\n\n");
    out.push_str("| model | from | to | roadmap | ours, GB | ours, GiB |\n|---|---:|---:|---|---:|---:|\n");
    for (what, name, from, to, theirs) in SAVINGS {
        let cache = |context| price(name, context, 0).estimate.bytes.kv_bytes;
        let saved = cache(*from) - cache(*to);
        let _ = writeln!(out, "| {what} | {from} | {to} | {theirs} | {} | {} |", gb(saved), gib(saved));
    }
}

fn page() -> String {
    let mut out = "# The roadmap's figures beside ours\n\n\
        Written by `PLIMSOLL_WRITE_DOCS=1 cargo test --test roadmap`; the same test fails when the code says something \
        else. The models are those of the catalogue (`plimsoll catalogue`), which names the source of each size. \
        Figures hold for llama-server 0.7.0 with one slot, a 16-bit cache, flash attention, no prompt cache, and as \
        much on the GPU as there is room for; the machine has 128 GiB, of which 4 are kept for the system and the \
        GPU may use 120, and no swap.\n\n\
        Most differences have one of four reasons:\n\n\
        - **GB and GiB.** Publishers' sizes are decimal (170 GB), memory is binary (158.4 GiB): 7 % between them. A \
        machine \"of 128 GB\" has 128 GiB, less what firmware keeps.\n\
        - **Context is not a fixed surcharge.** It depends on layers, heads and windows: at 16K from 0.4 GiB \
        (GPT-OSS) to 5.8 GiB (REAP-218B). Latent attention (DeepSeek, GLM-4.7-Flash) takes far less than thought, grouped \
        heads in many layers more.\n\
        - **A mixture of experts is in memory whole.** Names tell what a token uses (17B, A3B), files hold everything.\n\
        - **Sizes guessed from a name.** Fewer bits are never larger; and a model that was never published has no size.\n"
        .to_owned();
    sizes(&mut out, "Tested models", TESTED);
    sizes(&mut out, "Very large models", LARGE);
    sizes(&mut out, "Large and middle-sized models", MIDDLE);
    contexts(&mut out);
    savings(&mut out);
    combinations(&mut out);
    let _ = writeln!(
        out,
        "\nPhi-3-small has no files: llama.cpp has no block-sparse attention. Everything above is one command each: \
         `plimsoll fit deepseek-v3.1:tq1_0 -c 16384 --ram 128GiB --gpu 120GiB -- -np 1 --cache-ram 0`, and for several \
         `plimsoll fit --set nemo-12b,qwen3-coder-30b,starcoder2-15b -c 16384 --ram 128GiB --gpu 120GiB`."
    );
    out
}

#[test]
fn the_page_says_what_the_code_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/roadmap-tables.md");
    let page = page();
    if std::env::var_os("PLIMSOLL_WRITE_DOCS").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    let different = page.lines().zip(committed.lines()).find(|(ours, theirs)| ours != theirs);
    assert!(
        page == committed,
        "docs/roadmap-tables.md is not what the code gives ({different:?}): write it anew with \
         PLIMSOLL_WRITE_DOCS=1 cargo test --test roadmap"
    );
}

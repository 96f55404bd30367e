//! The engine's second opinion: what the llama-fit-params of the same build would allocate.
//!
//! `llama-fit-params --fit-print on` loads a model without its data and prints, for each device and for
//! the host, MiB (rounded down) of weights, of cache and state, and of compute buffers. It knows fewer
//! settings than llama-server and takes every token of a batch for one with an output. So it is asked
//! in terms of its own ([`in_its_terms`]), and compared with an estimate in the same terms, part by
//! part: by what it is above that, a model is charged more.

use std::path::{Path, PathBuf};

use super::effective::override_arguments;
use super::locate::check_executable;
use crate::bytes::MIB;
use crate::fit::{Draft, Estimate, FlashAttention, GpuLayers, LoadMode, Parts, Settings, SplitMode};

/// The tool's name.
pub const TOOL: &str = "llama-fit-params";
/// The keys under which a question and its answer go to the daemon, among what an engine says of itself: the
/// arguments as a JSON list, and what the tool has printed.
pub const QUESTION: &str = "fit-question";
/// See [`QUESTION`].
pub const ANSWER: &str = "fit-answer";
/// Where distributions install it.
const DIRECTORY: &str = "/usr/bin";
/// Lines of an answer that are looked at; a real one has as many as there are devices, and the host's.
const MOST_LINES: usize = 200;
/// Devices in an answer.
const MOST_DEVICES: usize = 64;
/// No machine has more than this: a PiB, in MiB.
const MOST_MIB: u64 = 1 << 30;

/// The tool beside the engine's `program`, or else that of the distribution; none where there is none
/// that this process may run.
#[must_use]
pub fn tool(program: Option<&Path>) -> Option<PathBuf> {
    let beside = program.and_then(Path::parent).filter(|directory| directory.is_absolute());
    let found = [beside, Some(Path::new(DIRECTORY))].into_iter().flatten().map(|at| at.join(TOOL));
    found.into_iter().find(|path| check_executable(path).is_ok())
}

/// The settings that the tool is asked for in place of `settings`: one slot where slots share a cache,
/// since it knows no unified one; nothing beside the model; weights read into plain memory; an output
/// for each token.
#[must_use]
pub fn in_its_terms(settings: &Settings) -> Settings {
    let unified = settings.parallel.is_none() || settings.kv_unified == Some(true);
    Settings {
        parallel: if unified { Some(1) } else { settings.parallel },
        kv_unified: None,
        context_per_slot: None,
        load_mode: LoadMode::None,
        repack: false,
        fit: false,
        embedding: false,
        all_outputs: true,
        backend_sampling: false,
        prompt_cache_mib: Some(0),
        context_checkpoints: 0,
        adapters: Vec::new(),
        control_vector: false,
        mmproj_offload: false,
        speculative: Vec::new(),
        draft: Draft::default(),
        ..settings.clone()
    }
}

/// What the tool is run with for `model`, whose settings have nothing left to choose but the context (0
/// is what the model was trained on). The environment's LLAMA_ARG_* shall not reach it.
#[must_use]
pub fn question(model: &Path, settings: &Settings) -> Vec<String> {
    let s = in_its_terms(settings);
    let mut words: Vec<String> = Vec::new();
    let mut say = |flag: &str, value: String| words.extend([flag.to_owned(), value]);
    say("--fit-print", "on".to_owned());
    say("--fit", "off".to_owned());
    say("--model", model.to_string_lossy().into_owned());
    say("--ctx-size", s.context.to_string());
    say("--parallel", s.parallel.unwrap_or(1).to_string());
    say("--batch-size", s.batch.to_string());
    say("--ubatch-size", s.ubatch.to_string());
    say("--cache-type-k", s.cache_type_k.name().to_owned());
    say("--cache-type-v", s.cache_type_v.name().to_owned());
    let flash_attention = match s.flash_attention {
        FlashAttention::Auto => "auto",
        FlashAttention::On => "on",
        FlashAttention::Off => "off",
    };
    say("--flash-attn", flash_attention.to_owned());
    let layers = match s.gpu_layers {
        GpuLayers::Auto => "-1".to_owned(),
        GpuLayers::All => "999".to_owned(),
        GpuLayers::Count(n) => n.to_string(),
    };
    say("--gpu-layers", layers);
    let split = match s.split_mode {
        SplitMode::None => Some("none"),
        SplitMode::Layer => None,
        SplitMode::Row => Some("row"),
        SplitMode::Tensor => Some("tensor"),
    };
    if let Some(split) = split {
        say("--split-mode", split.to_owned());
    }
    if s.main_gpu != 0 {
        say("--main-gpu", s.main_gpu.to_string());
    }
    if !s.tensor_split.is_empty() {
        let shares: Vec<String> = s.tensor_split.iter().map(ToString::to_string).collect();
        say("--tensor-split", shares.join(","));
    }
    if let Some(devices) = &s.devices {
        say("--device", if devices.is_empty() { "none".to_owned() } else { devices.join(",") });
    }
    if s.moe_cache_mib > 0 {
        say("--moe-cache-mib", s.moe_cache_mib.to_string());
    }
    for (key, value) in &s.metadata_overrides {
        say("--override-kv", format!("{key}={value}"));
    }
    words.push("--no-repack".to_owned());
    for (given, switch) in [
        (s.swa_full, "--swa-full"),
        (!s.kv_offload, "--no-kv-offload"),
        (!s.op_offload, "--no-op-offload"),
        (s.no_host, "--no-host"),
    ] {
        if given {
            words.push(switch.to_owned());
        }
    }
    words.extend(override_arguments(&s.overrides));
    words
}

/// Takes a question apart: its context, and all the rest of it.
#[must_use]
pub fn context_apart(question: &[String]) -> Option<(u64, Vec<String>)> {
    let at = question.iter().position(|word| word == "--ctx-size")?;
    let context = question.get(at + 1)?.parse().ok()?;
    Some((context, [&question[..at], &question[at + 2..]].concat()))
}

/// Bytes in one place, of the three kinds that the tool tells apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kinds {
    /// Weights.
    pub weights: u64,
    /// Caches of K and V, and recurrent state.
    pub context: u64,
    /// Compute buffers.
    pub compute: u64,
}

impl Kinds {
    fn of(parts: &Parts) -> Self {
        Self {
            weights: parts.weights_bytes,
            context: parts.kv_bytes.saturating_add(parts.state_bytes),
            compute: parts.compute_bytes,
        }
    }

    /// Each kind with its name.
    #[must_use]
    pub fn named(&self) -> [(&'static str, u64); 3] {
        [("weights", self.weights), ("context", self.context), ("compute", self.compute)]
    }
}

/// What the tool says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Opinion {
    /// Its devices, in its order, each with its name; whole MiB, rounded down.
    pub devices: Vec<(String, Kinds)>,
    /// The host; whole MiB, rounded down.
    pub host: Kinds,
}

/// Reads what the tool prints on its standard output; lines that are none of its table are log. None
/// where there is no line for the host, or something in it makes no sense.
///
/// ```text
/// Vulkan0 30679 1536 344
/// Host 166 0 40
/// ```
#[must_use]
pub fn parse(text: &str) -> Option<Opinion> {
    let mut devices = Vec::new();
    for line in text.lines().take(MOST_LINES) {
        let words: Vec<&str> = line.split_whitespace().take(5).collect();
        let [name, weights, context, compute] = words[..] else { continue };
        let mib = |word: &str| word.parse::<u64>().ok().filter(|mib| *mib <= MOST_MIB);
        let (Some(weights), Some(context), Some(compute)) = (mib(weights), mib(context), mib(compute)) else {
            continue;
        };
        let kinds = Kinds { weights: weights * MIB, context: context * MIB, compute: compute * MIB };
        if name == "Host" {
            return Some(Opinion { devices, host: kinds });
        }
        if devices.len() == MOST_DEVICES || name.len() > 64 {
            return None;
        }
        devices.push((name.to_owned(), kinds));
    }
    None
}

/// One kind of bytes in one place, beside each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The device's name, or `Host`.
    pub place: String,
    /// `weights`, `context` or `compute`.
    pub kind: &'static str,
    /// What the estimate says.
    pub estimate: u64,
    /// What the tool says, in whole MiB, rounded down.
    pub tool: u64,
}

impl Row {
    /// Whether they say the same, as far as the tool's MiB tell.
    #[must_use]
    pub fn agrees(&self) -> bool {
        self.estimate / MIB * MIB == self.tool
    }

    /// By how much the tool is above the estimate, at the most: it rounds down.
    #[must_use]
    pub fn excess(&self) -> u64 {
        if self.tool > self.estimate { self.tool + MIB - self.estimate } else { 0 }
    }
}

/// By how much an opinion is above an estimate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Excess {
    /// On the host.
    pub host: u64,
    /// On each device that the estimate uses, in its order.
    pub devices: Vec<u64>,
}

impl Excess {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.devices.iter().fold(self.host, |sum, bytes| sum.saturating_add(*bytes))
    }
}

/// An estimate and an opinion, in the same terms, beside each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Devices first, then the host; each with its three kinds.
    pub rows: Vec<Row>,
    /// What the model is charged more.
    pub excess: Excess,
}

/// Puts an opinion beside an estimate that was made [`in_its_terms`], without anything beside the model.
///
/// # Errors
/// The tool sees another number of devices: one sentence.
pub fn compare(opinion: &Opinion, estimate: &Estimate) -> Result<Comparison, String> {
    if opinion.devices.len() != estimate.devices.len() {
        return Err(format!(
            "{TOOL} sees {} devices where the estimate has {}",
            opinion.devices.len(),
            estimate.devices.len()
        ));
    }
    let mut comparison = Comparison::default();
    let mut beside = |place: &str, tool: &Kinds, parts: &Parts| {
        let pairs = Kinds::of(parts).named().into_iter().zip(tool.named());
        let rows =
            pairs.map(|((kind, estimate), (_, tool))| Row { place: place.to_owned(), kind, estimate, tool });
        let rows: Vec<Row> = rows.collect();
        let excess = rows.iter().map(Row::excess).fold(0, u64::saturating_add);
        comparison.rows.extend(rows);
        excess
    };
    let of_device = |((name, kinds), parts): (&(String, Kinds), &Parts)| beside(name, kinds, parts);
    let devices = opinion.devices.iter().zip(&estimate.devices).map(of_device).collect();
    let host = beside("Host", &opinion.host, &estimate.split.host);
    comparison.excess = Excess { host, devices };
    Ok(comparison)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fit::Split;

    #[test]
    fn reads_the_table_among_the_log() {
        let text = "0.00.010.893 I llama_fit_params: printing estimated memory in MiB to stdout ...\n\
                    Vulkan0 30679 1536 344 \nHost 166 0 40 \nwhatever\n";
        let opinion = parse(text).unwrap();
        assert_eq!(opinion.devices.len(), 1);
        assert_eq!(opinion.devices[0].0, "Vulkan0");
        assert_eq!(opinion.devices[0].1.weights, 30679 * MIB);
        assert_eq!(opinion.host, Kinds { weights: 166 * MIB, context: 0, compute: 40 * MIB });
    }

    #[test]
    fn what_makes_no_sense_is_no_opinion() {
        for text in [
            "",
            "Vulkan0 1 2 3\n",
            "Host 1 2\n",
            "Host 1 2 3 4\n",
            "Host -1 2 3\n",
            "Host 1 2 99999999999999999999\n",
            "Host 1 2 1073741825\n",
            "error: invalid argument: --fit-print\n",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
        assert_eq!(parse(&"\n".repeat(MOST_LINES).replace("\n", "x 1 2 3\n")), None, "a flood of devices");
        assert_eq!(parse(&format!("{} 1 2 3\nHost 1 2 3\n", "x".repeat(1000))), None);
    }

    #[test]
    fn only_what_is_above_the_estimate_counts() {
        let parts = |weights: u64, kv: u64, compute: u64| Parts {
            weights_bytes: weights,
            kv_bytes: kv,
            compute_bytes: compute,
            ..Parts::default()
        };
        let estimate = Estimate {
            devices: vec![parts(100 * MIB + 5, 10 * MIB, 8 * MIB)],
            split: Split { host: parts(7 * MIB, 0, 3 * MIB), ..Split::default() },
            ..Estimate::default()
        };
        let opinion = parse("GPU 100 12 7\nHost 7 0 3\n").unwrap();
        let comparison = compare(&opinion, &estimate).unwrap();
        let agree: Vec<bool> = comparison.rows.iter().map(Row::agrees).collect();
        assert_eq!(agree, [true, false, false, true, true, true]);
        // It rounds down, so that up to a MiB more may be meant.
        assert_eq!(comparison.excess, Excess { host: 0, devices: vec![3 * MIB] });
        let blind = compare(&parse("Host 7 0 3\n").unwrap(), &estimate).unwrap_err();
        assert!(blind.contains("sees 0 devices"), "{blind}");
    }

    #[test]
    fn it_is_asked_in_terms_that_it_knows() {
        let settings = Settings {
            context: 4096,
            embedding: true,
            speculative: vec!["draft-simple".to_owned()],
            gpu_layers: GpuLayers::Count(7),
            ..Settings::default()
        };
        let words = question(Path::new("/m/a.gguf"), &settings);
        let pairs = |flag: &str| words.iter().position(|w| w == flag).map(|at| words[at + 1].clone());
        assert_eq!(pairs("--parallel"), Some("1".to_owned()), "four slots share one cache");
        assert_eq!(pairs("--gpu-layers"), Some("7".to_owned()));
        for unknown in ["--embedding", "--spec-type", "--cache-ram", "--kv-unified", "--load-mode"] {
            assert!(!words.iter().any(|word| word == unknown), "{unknown}");
        }
        let slots = Settings { parallel: Some(4), ..settings };
        assert_eq!(in_its_terms(&slots).parallel, Some(4));
    }
}

//! llama-server's arguments and variables, read as llama-server reads them.
//!
//! Variables first, then arguments, which win; `--some_flag` is `--some-flag`; a value stands behind its
//! flag, never after `=`. What changes memory becomes a [`Settings`]; the rest is passed on.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::flags::{FLAGS, Flag, PRESETS, Takes};
use super::matched::MAX_PATTERNS;
use super::settings::{FlashAttention, GpuLayers, LoadMode, Override, Settings, SplitMode};
use crate::gguf::TensorType;

/// Where the value of a setting came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A variable of the environment, by name.
    Variable(String),
    /// An argument, by the flag as it was spelled.
    Argument(String),
}

/// Why arguments can't be used. Each is one sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArgError {
    /// A flag that needs a value stands last.
    #[error("{flag} needs a value{hint}")]
    NoValue {
        /// The flag as spelled.
        flag: String,
        /// What to write.
        hint: String,
    },
    /// A value that the engine would refuse.
    #[error("{source_name}: '{value}' is not {wanted}")]
    Value {
        /// The flag or variable.
        source_name: String,
        /// The value.
        value: String,
        /// What it should be.
        wanted: String,
    },
    /// A flag of another program, or one that is gone, whose right spelling is known.
    #[error("{flag} is not a flag of llama-server: {advice}")]
    NotAFlag {
        /// The flag as spelled.
        flag: String,
        /// What to write.
        advice: String,
    },
    /// A flag of llama-server that would load, or set, what nothing is known about here.
    #[error("{source_name} would {does}: {advice}")]
    Unseen {
        /// The flag or variable.
        source_name: String,
        /// What it would have the engine do.
        does: &'static str,
        /// What to write.
        advice: String,
    },
    /// Something that is neither a flag nor a value of one.
    #[error("'{0}' is neither a flag of llama-server nor the value of one")]
    Stray(String),
}

/// What arguments and variables say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parsed {
    /// The settings that change memory.
    pub settings: Settings,
    /// Where each setting came from that is not the default, by the long name of its flag (`ctx-size`).
    pub origins: BTreeMap<String, Origin>,
    /// Flags with their values, and variables, that nothing is known about: the engine gets them as they are.
    pub passed_on: Vec<String>,
    /// `--model`.
    pub model: Option<PathBuf>,
    /// `--mmproj`.
    pub mmproj: Option<PathBuf>,
    /// `--spec-draft-model`.
    pub draft_model: Option<PathBuf>,
    /// `--host`.
    pub host: Option<String>,
    /// `--port`.
    pub port: Option<u16>,
    /// `--alias`.
    pub alias: Option<String>,
    /// Other files that the engine will read: templates, grammars, keys, control vectors.
    pub files: Vec<PathBuf>,
    /// A model that the engine would download: what was asked for.
    pub download: Option<String>,
}

/// Reads arguments (without the program's name, or with it when it ends in `llama-server`) and variables.
///
/// # Errors
/// What llama-server would refuse, and near-misses, with the right spelling.
pub fn parse(args: &[String], env: &BTreeMap<String, String>) -> Result<Parsed, ArgError> {
    let mut parsed = Parsed::default();
    variables(&mut parsed, env)?;
    let mut args = args;
    if args.first().is_some_and(|a| a.rsplit('/').next() == Some("llama-server")) {
        args = &args[1..];
    }
    let mut rest = args.iter().peekable();
    while let Some(arg) = rest.next() {
        if !arg.starts_with('-') || arg.len() < 2 {
            return Err(ArgError::Stray(arg.clone()));
        }
        let spelling = if arg.starts_with("--") { arg.replace('_', "-") } else { arg.clone() };
        let Some((flag, on)) = Flag::find(&spelling) else {
            if let Some(advice) = advice(&spelling) {
                return Err(ArgError::NotAFlag { flag: arg.clone(), advice });
            }
            parsed.passed_on.push(arg.clone());
            // It can't be known whether it takes a value; what looks like one goes with it.
            if let Some(value) = rest.next_if(|next| !is_flag(next)) {
                parsed.passed_on.push(value.clone());
            }
            continue;
        };
        let value = match flag.takes {
            Takes::Nothing | Takes::Switch => None,
            Takes::Removed => {
                let advice = "it was removed: use --spec-draft-n-max and its kin".to_owned();
                return Err(ArgError::NotAFlag { flag: arg.clone(), advice });
            }
            Takes::One | Takes::Two => {
                let value = rest.next().cloned().filter(|v| Flag::find(v).is_none());
                let no_value = || ArgError::NoValue { flag: arg.clone(), hint: hint(flag.name()) };
                let value = value.ok_or_else(no_value)?;
                if flag.takes == Takes::Two {
                    rest.next().ok_or_else(no_value)?;
                }
                Some(value)
            }
        };
        let origin = Origin::Argument(arg.clone());
        apply(&mut parsed, flag, on, value.as_deref(), &origin)?;
    }
    Ok(parsed)
}

/// Applies the variables in the order of the flags, as llama-server does.
fn variables(parsed: &mut Parsed, env: &BTreeMap<String, String>) -> Result<(), ArgError> {
    for flag in FLAGS.iter().filter(|f| !f.variable.is_empty()) {
        let negative = flag.variable.replacen("LLAMA_ARG_", "LLAMA_ARG_NO_", 1);
        let (variable, value) = if flag.takes == Takes::Switch && env.contains_key(&negative) {
            (negative, "0".to_owned())
        } else if let Some(value) = env.get(flag.variable) {
            (flag.variable.to_owned(), value.clone())
        } else {
            continue;
        };
        let origin = Origin::Variable(variable.clone());
        match flag.takes {
            Takes::Nothing if truth(&value) == Some(true) => apply(parsed, flag, true, None, &origin)?,
            Takes::Nothing | Takes::Removed => {}
            Takes::Switch => {
                let on = truth(&value).ok_or_else(|| ArgError::Value {
                    source_name: variable.clone(),
                    value: value.clone(),
                    wanted: "on, off, true, false, enabled, disabled, 1 or 0".to_owned(),
                })?;
                apply(parsed, flag, on, None, &origin)?;
            }
            Takes::One | Takes::Two => apply(parsed, flag, true, Some(&value), &origin)?,
        }
    }
    let known = |name: &str| {
        FLAGS.iter().any(|f| {
            f.variable == name || (f.takes == Takes::Switch && f.variable == name.replacen("_NO_", "_", 1))
        })
    };
    let unknown = env.keys().filter(|name| name.starts_with("LLAMA_ARG_") && !known(name));
    parsed.passed_on.extend(unknown.cloned());
    Ok(())
}

/// Whether an argument is a flag rather than a value (a negative number is a value).
fn is_flag(arg: &str) -> bool {
    arg.starts_with('-') && arg.len() > 1 && !arg[1..].starts_with(|c: char| c.is_ascii_digit() || c == '.')
}

/// llama.cpp's truth values.
fn truth(value: &str) -> Option<bool> {
    match value {
        "on" | "enabled" | "true" | "1" => Some(true),
        "off" | "disabled" | "false" | "0" => Some(false),
        _ => None,
    }
}

/// Flags of other programs and older builds, and what to write instead.
const NEAR_MISSES: &[(&str, &str)] = &[
    ("-mmp", "that is llama-bench's; write --load-mode mmap, or --load-mode none to read instead of map"),
    ("--mmap", "write --load-mode mmap"),
    ("--no-mmap", "write --load-mode none"),
    ("--mlock", "write --load-mode mlock"),
    ("--direct-io", "write --load-mode dio"),
    ("-dio", "write --load-mode dio"),
    ("-nkvu", "write -no-kvu"),
    ("--flash-attention", "write --flash-attn on, off or auto"),
    ("--context", "write --ctx-size N"),
    ("--context-size", "write --ctx-size N"),
    ("--ctx", "write --ctx-size N"),
    ("--n-ctx", "write --ctx-size N"),
    ("--num-ctx", "that is Ollama's; write --ctx-size N"),
    ("--n-parallel", "write --parallel N"),
    ("--ngl", "write -ngl N, or --gpu-layers N"),
    ("--np", "write -np N, or --parallel N"),
    ("--cache-type", "write --cache-type-k TYPE and --cache-type-v TYPE"),
    ("--kv-type", "write --cache-type-k TYPE and --cache-type-v TYPE"),
    ("-p", "llama-server takes prompts over HTTP"),
    ("-pg", "that is llama-bench's; llama-server takes prompts over HTTP"),
    ("-d", "that is llama-bench's; write -c N for the context"),
    ("--prompt", "llama-server takes prompts over HTTP"),
    ("--draft-model", "write --spec-draft-model FILE"),
];

/// What to write instead of a flag that llama-server doesn't have, where that is plain.
fn advice(spelling: &str) -> Option<String> {
    if let Some((_, advice)) = NEAR_MISSES.iter().find(|(miss, _)| *miss == spelling) {
        return Some((*advice).to_owned());
    }
    if let Some((name, value)) = spelling.split_once('=') {
        let (_, _) = Flag::find(name)?;
        return Some(format!("the value stands behind a space: {name} {value}"));
    }
    let all = FLAGS.iter().flat_map(|f| f.names.split(' ').chain(f.negative.split(' ')));
    // A slip of one letter in a long name; a single dash where there should be two, or the reverse.
    let slip = |name: &&str| {
        (name.len() > 6 && spelling.starts_with("--") && one_edit(name, spelling))
            || (name.trim_start_matches('-') == spelling.trim_start_matches('-') && !name.is_empty())
    };
    all.into_iter().find(slip).map(|name| format!("did you mean {name}?"))
}

/// Whether two texts differ by one character inserted, removed or replaced.
fn one_edit(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let same = a.iter().zip(b).take_while(|(x, y)| x == y).count();
    let tail = |a: &[u8], b: &[u8]| a == b;
    match a.len().cmp(&b.len()) {
        std::cmp::Ordering::Equal => same < a.len() && tail(&a[same + 1..], &b[same + 1..]),
        std::cmp::Ordering::Less => b.len() - a.len() == 1 && tail(&a[same..], &b[same + 1..]),
        std::cmp::Ordering::Greater => a.len() - b.len() == 1 && tail(&a[same + 1..], &b[same..]),
    }
}

/// What to write behind a flag whose value is missing.
fn hint(name: &str) -> String {
    match name {
        "--fit" => ": --fit on or --fit off".to_owned(),
        "--flash-attn" => ": --flash-attn on, off or auto".to_owned(),
        _ => String::new(),
    }
}

/// Reads values for one flag, with messages that name it.
struct Field<'a> {
    name: String,
    value: &'a str,
}

impl Field<'_> {
    fn wrong(&self, wanted: &str) -> ArgError {
        let (source_name, value) = (self.name.clone(), shortened(self.value));
        ArgError::Value { source_name, value, wanted: wanted.to_owned() }
    }

    fn number<T: std::str::FromStr>(&self, wanted: &str) -> Result<T, ArgError> {
        self.value.trim().parse().map_err(|_| self.wrong(wanted))
    }

    fn cache_type(&self) -> Result<TensorType, ArgError> {
        TensorType::from_name(self.value)
            .filter(|t| CACHE_TYPES.contains(t))
            .ok_or_else(|| self.wrong("one of f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0, q5_1"))
    }

    fn layers(&self) -> Result<GpuLayers, ArgError> {
        Ok(match self.value {
            "auto" => GpuLayers::Auto,
            "all" => GpuLayers::All,
            _ => match self.number::<i64>("a number of layers, auto or all")? {
                -1 => GpuLayers::Auto,
                n if n < 0 => GpuLayers::All,
                n => GpuLayers::Count(u32::try_from(n).unwrap_or(u32::MAX)),
            },
        })
    }

    /// Appends a list of patterns to the overrides before it. How many there are, and how long they are together, is
    /// asked before anything is made of them: over the bus anybody may send megabytes.
    fn overrides(&self, to: &mut Vec<Override>) -> Result<(), ArgError> {
        let parts = || self.value.split(',').filter(|p| !p.is_empty());
        let before = to.iter().filter_map(|o| match o {
            Override::Pattern { pattern, buffer } => Some(pattern.len() + buffer.len() + 1),
            Override::CpuMoe(_) | Override::CpuFfn(_) => None,
        });
        if before.clone().count() + parts().count() > MAX_PATTERNS {
            return Err(self.wrong(&format!("a list that makes at most {MAX_PATTERNS} patterns in all")));
        }
        if before.sum::<usize>() + self.value.len() > MAX_PATTERNS_BYTES {
            let kib = MAX_PATTERNS_BYTES >> 10;
            return Err(self.wrong(&format!("a list that makes at most {kib} KiB of patterns in all")));
        }
        for part in parts() {
            let (pattern, buffer) =
                part.split_once('=').ok_or_else(|| self.wrong("a list of PATTERN=BUFFER-TYPE"))?;
            let of_list = Field { name: self.name.clone(), value: pattern };
            super::pattern::Pattern::new(pattern).map_err(|why| of_list.wrong(&why))?;
            to.push(Override::Pattern { pattern: pattern.to_owned(), buffer: buffer.to_owned() });
        }
        Ok(())
    }
}

/// A value as messages show it, which are for people: its beginning, where it is long.
pub(super) fn shortened(value: &str) -> String {
    const LONGEST: usize = 200;
    match value.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &value[..end]),
        None => value.to_owned(),
    }
}

/// The most bytes of all patterns of a command line; Linux has no longer argument.
const MAX_PATTERNS_BYTES: usize = 128 << 10;

/// The types that llama-server allows for a cache.
pub const CACHE_TYPES: [TensorType; 9] = [
    TensorType::F32,
    TensorType::F16,
    TensorType::BF16,
    TensorType::Q8_0,
    TensorType::Q4_0,
    TensorType::Q4_1,
    TensorType::IQ4_NL,
    TensorType::Q5_0,
    TensorType::Q5_1,
];

/// How many tokens `--spec-default` has ngram-mod draft at the most.
const SPEC_DEFAULT_TOKENS: u32 = 64;

/// A model that is loaded beside the model, and that the engine would download.
fn companion(source: &str, what: &str, key: &str, flag: &str) -> ArgError {
    ArgError::Unseen {
        source_name: source.to_owned(),
        does: "make the engine download a model",
        advice: format!("download it, and name the file of {what} in '{key}', or with {flag} FILE"),
    }
}

/// Applies one flag or variable.
#[allow(clippy::too_many_lines)] // one match, one line for each flag
fn apply(
    p: &mut Parsed,
    flag: &Flag,
    on: bool,
    value: Option<&str>,
    origin: &Origin,
) -> Result<(), ArgError> {
    let (Origin::Variable(source) | Origin::Argument(source)) = origin;
    let v = Field { name: source.clone(), value: value.unwrap_or_default() };
    let s = &mut p.settings;
    const WHOLE: &str = "a whole number";
    const COUNT: &str = "a whole number that isn't negative";
    match flag.name() {
        "--ctx-size" => s.context = v.number(COUNT)?,
        "--batch-size" => s.batch = v.number(COUNT)?,
        "--ubatch-size" => s.ubatch = v.number(COUNT)?,
        "--parallel" => {
            s.parallel = match v.number::<i64>(WHOLE)? {
                0 => return Err(v.wrong("a number of slots: at least 1, or -1 for automatic")),
                n => u32::try_from(n).ok(),
            }
        }
        "--kv-unified" => s.kv_unified = Some(on),
        "--kv-unified-per-slot" => {
            s.context_per_slot = u64::try_from(v.number::<i64>(WHOLE)?).ok().filter(|n| *n > 0)
        }
        "--cache-type-k" => s.cache_type_k = v.cache_type()?,
        "--cache-type-v" => s.cache_type_v = v.cache_type()?,
        "--flash-attn" => {
            s.flash_attention = match (v.value, truth(v.value)) {
                ("auto" | "-1", _) => FlashAttention::Auto,
                (_, Some(true)) => FlashAttention::On,
                (_, Some(false)) => FlashAttention::Off,
                _ => return Err(v.wrong("on, off or auto")),
            }
        }
        "--swa-full" => s.swa_full = on,
        "--kv-offload" => s.kv_offload = on,
        "--op-offload" => s.op_offload = on,
        "--repack" => s.repack = on,
        "--no-host" => s.no_host = on,
        "--gpu-layers" => s.gpu_layers = v.layers()?,
        "--cpu-moe" => s.overrides.push(Override::CpuMoe(u32::MAX)),
        "--n-cpu-moe" => s.overrides.push(Override::CpuMoe(v.number(COUNT)?)),
        "--n-cpu-ffn" => s.overrides.push(Override::CpuFfn(v.number(COUNT)?)),
        "--override-tensor" => v.overrides(&mut s.overrides)?,
        "--moe-cache-mib" => s.moe_cache_mib = v.number(COUNT)?,
        "--split-mode" => {
            s.split_mode = match v.value {
                "none" => SplitMode::None,
                "layer" => SplitMode::Layer,
                "row" => SplitMode::Row,
                "tensor" => SplitMode::Tensor,
                _ => return Err(v.wrong("none, layer, row or tensor")),
            }
        }
        "--tensor-split" => {
            let parts = v.value.split([',', '/']).filter(|p| !p.is_empty());
            let share = |p: &str| p.trim().parse::<f64>().ok().filter(|x| x.is_finite() && *x >= 0.0);
            s.tensor_split = parts
                .map(|p| share(p).ok_or_else(|| v.wrong("a list of proportions such as 3,1")))
                .collect::<Result<_, _>>()?;
        }
        "--main-gpu" => s.main_gpu = v.number(COUNT)?,
        "--device" => {
            let names: Vec<String> = v.value.split(',').map(str::to_owned).collect();
            s.devices = Some(if v.value == "none" { Vec::new() } else { names });
        }
        "--load-mode" => {
            s.load_mode = match v.value {
                "auto" => LoadMode::Auto,
                "none" => LoadMode::None,
                "mmap" => LoadMode::Mmap,
                "mlock" => LoadMode::Mlock,
                "mmap+mlock" => LoadMode::MmapMlock,
                "dio" => LoadMode::DirectIo,
                _ => return Err(v.wrong("auto, none, mmap, mlock, mmap+mlock or dio")),
            }
        }
        "--fit" => s.fit = truth(v.value).ok_or_else(|| v.wrong("on or off"))?,
        "--embedding" | "--rerank" => s.embedding = true,
        "--backend-sampling" => s.backend_sampling = true,
        "--cache-ram" => s.prompt_cache_mib = u64::try_from(v.number::<i64>(WHOLE)?).ok(),
        "--ctx-checkpoints" => s.context_checkpoints = u32::try_from(v.number::<i64>(WHOLE)?).unwrap_or(0),
        "--checkpoint-min-step" => s.checkpoint_step = v.number(COUNT)?,
        "--threads" => s.threads = u32::try_from(v.number::<i64>(WHOLE)?).ok().filter(|n| *n > 0),
        "--override-kv" => {
            for part in v.value.split(',') {
                let wanted = "KEY=TYPE:VALUE";
                let (key, value) = part.split_once('=').ok_or_else(|| v.wrong(wanted))?;
                s.metadata_overrides.push((key.to_owned(), value.to_owned()));
            }
        }
        "--lora" => s.adapters.extend(v.value.split(',').map(PathBuf::from)),
        "--lora-scaled" => {
            let file = |p: &str| PathBuf::from(p.rsplit_once(':').map_or(p, |(file, _)| file));
            s.adapters.extend(v.value.split(',').map(file));
        }
        "--control-vector" => {
            s.control_vector = true;
            p.files.extend(v.value.split(',').map(PathBuf::from));
        }
        "--control-vector-scaled" => {
            let file = |part: &str| PathBuf::from(part.rsplit_once(':').map_or(part, |(file, _)| file));
            s.control_vector = true;
            p.files.extend(v.value.split(',').map(file));
        }
        "--mmproj-offload" => s.mmproj_offload = on,
        "--image-max-tokens" => {
            s.image_max_tokens = u64::try_from(v.number::<i64>(WHOLE)?).ok().filter(|n| *n > 0);
        }
        "--spec-ngram-mod-n-max"
        | "--spec-ngram-simple-size-m"
        | "--spec-ngram-map-k-size-m"
        | "--spec-ngram-map-k4v-size-m" => {
            let kind = flag.name().trim_start_matches("--spec-");
            let kind = kind.trim_end_matches("-n-max").trim_end_matches("-size-m").to_owned();
            s.ngram_tokens.insert(kind, v.number(COUNT)?);
        }
        "--spec-type" => s.speculative = v.value.split(',').map(str::to_owned).collect(),
        "--spec-draft-type-k" => s.draft.cache_type_k = v.cache_type()?,
        "--spec-draft-type-v" => s.draft.cache_type_v = v.cache_type()?,
        "--spec-draft-device" => {
            let names: Vec<String> = v.value.split(',').map(str::to_owned).collect();
            s.draft.devices = Some(if v.value == "none" { Vec::new() } else { names });
        }
        "--spec-draft-ngl" => s.draft.gpu_layers = v.layers()?,
        "--spec-draft-n-max" => s.draft.tokens = v.number(COUNT)?,
        "--spec-draft-n-ubatch" => s.draft.ubatch = v.number(COUNT)?,
        "--spec-draft-cpu-moe" => s.draft.overrides.push(Override::CpuMoe(u32::MAX)),
        "--spec-draft-n-cpu-moe" => s.draft.overrides.push(Override::CpuMoe(v.number(COUNT)?)),
        "--spec-draft-override-tensor" => v.overrides(&mut s.draft.overrides)?,
        "--model" => p.model = Some(v.value.into()),
        "--mmproj" => p.mmproj = Some(v.value.into()),
        "--spec-draft-model" => p.draft_model = Some(v.value.into()),
        "--host" => p.host = Some(v.value.to_owned()),
        "--port" => p.port = Some(v.number("a port")?),
        "--alias" => p.alias = Some(v.value.to_owned()),
        // What a companion takes is to be seen in its file only.
        "--spec-draft-hf" => {
            return Err(companion(source, "a draft model", "draft-model", "--spec-draft-model"));
        }
        "--mmproj-url" => return Err(companion(source, "a projector", "mmproj", "--mmproj")),
        "--spec-default" => {
            s.speculative = vec!["ngram-mod".to_owned()];
            s.ngram_tokens.insert("ngram-mod".to_owned(), SPEC_DEFAULT_TOKENS);
            for name in ["spec-type", "spec-ngram-mod-n-max"] {
                p.origins.insert(name.to_owned(), origin.clone());
            }
            return Ok(());
        }
        preset if PRESETS.contains(&preset) => {
            return Err(ArgError::Unseen {
                source_name: source.clone(),
                does: "choose a model to download, with its port, context and batches",
                advice: "download the model, name its file, and write what it sets (llama-server --help)"
                    .to_owned(),
            });
        }
        "--model-url" | "--hf-repo" | "--docker-repo" => p.download = Some(v.value.to_owned()),
        "--chat-template-file"
        | "--grammar-file"
        | "--json-schema-file"
        | "--api-key-file"
        | "--ssl-key-file"
        | "--ssl-cert-file"
        | "--lookup-cache-static" => p.files.push(v.value.into()),
        _ => return Ok(()),
    }
    p.origins.insert(flag.name().trim_start_matches('-').to_owned(), origin.clone());
    Ok(())
}

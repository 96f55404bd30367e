//! The settings with which llama-server will run: keys of the model, `engine-args`, environment.

use std::collections::BTreeMap;
use std::fmt;

use super::error::Error;
use super::words::{self, Word};
use crate::bytes::MIB;
use crate::config::{GpuLayers, Model, Oversize, Place, PromptCache, Workload};
use crate::fit::args::{self, Origin, Parsed};
use crate::fit::flags::{FLAGS, Flag};
use crate::fit::{LoadMode, Override, Settings};

/// Where a setting comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A key of the model, or of `[model-defaults]`.
    Key(Place),
    /// An argument in `engine-args`.
    Argument {
        /// As spelled.
        flag: String,
        /// Where `engine-args` stands.
        place: Place,
    },
    /// A variable in `environment`.
    Variable {
        /// Its name.
        name: String,
        /// Where `environment` stands.
        place: Place,
    },
    /// A variable of the unit's environment.
    UnitVariable(String),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(place) => write!(f, "{place}"),
            Self::Argument { flag, place } => write!(f, "{flag} at {place}"),
            Self::Variable { name, place } => write!(f, "{name} at {place}"),
            Self::UnitVariable(name) => write!(f, "{name} of the unit's environment"),
        }
    }
}

/// Settings that are given what is left over at the start: never a reason to refuse or to evict.
/// In [`Effective::settings`] these are zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Automatic {
    /// The prompt cache (`--cache-ram`).
    pub prompt_cache: bool,
    /// The context checkpoints (`--ctx-checkpoints`), up to llama-server's own default.
    pub context_checkpoints: bool,
}

/// The settings of a model's llama-server before anything is chosen for it.
#[derive(Clone, Debug, PartialEq)]
pub struct Effective {
    /// All settings that change memory. Price these, or these with a smaller context and the like.
    pub settings: Settings,
    /// Where each setting comes from that is not the default, by the long name of its flag
    /// (`ctx-size`).
    pub sources: BTreeMap<String, Source>,
    /// What is chosen at the start.
    pub automatic: Automatic,
    /// It may run with weights left on disk (`oversize = "stream"`), and for that has them mapped.
    pub streams: bool,
    /// It may run with part of its weights in swapfiles (`oversize = "swap"`), and for that has them in memory of
    /// its own.
    pub swaps: bool,
    /// Arguments and variables that nothing is known about: the engine gets them as they are.
    pub passed_on: Vec<String>,
    /// All that the arguments and variables say, files among it.
    pub(super) parsed: Parsed,
    /// The arguments that [`super::Launch::llama_server`] doesn't spell out itself.
    pub(super) rest: Vec<String>,
}

impl Effective {
    /// `model` with more arguments behind its own. Its keys give way to these rather than contradict them.
    #[must_use]
    pub fn with_arguments(model: &Model, more: &[String]) -> Model {
        let mut with = model.clone();
        let names: Vec<&str> = words::split(more).iter().filter_map(|word| word.name).collect();
        for (key, flag, _) in keys_as_flags(model) {
            if let Some(given) = with.given.get_mut(key).filter(|_| names.contains(&flag)) {
                given.inherited = true;
            }
        }
        with.engine_args.extend(more.iter().cloned());
        with
    }
}

/// Flags that [`super::Launch::llama_server`] spells out itself.
const SPELLED_OUT: [&str; 20] = [
    "--model",
    "--alias",
    "--host",
    "--port",
    "--api-key-file",
    "--ctx-size",
    "--parallel",
    "--cache-type-k",
    "--cache-type-v",
    "--gpu-layers",
    "--fit",
    "--cache-ram",
    "--ctx-checkpoints",
    "--load-mode",
    "--mmproj",
    "--spec-draft-model",
    "--cpu-moe",
    "--n-cpu-moe",
    "--n-cpu-ffn",
    "--override-tensor",
];

/// Keys that more than the engine depends on, so that an argument can't stand in for them.
const KEYS_ONLY: [&str; 4] = ["model", "host", "port", "api-key-file"];

/// The settings with which the llama-server of `model` will run, when its unit's environment has
/// the variables `unit`.
///
/// As llama-server has it: arguments win over variables, and the keys of a model are arguments. A
/// key of `[model-defaults]` gives way to `engine-args` and variables.
///
/// # Errors
/// Contradictions between a key and an argument or a variable of the same model, and everything
/// that llama-server itself would refuse.
pub fn effective(model: &Model, unit: &BTreeMap<String, String>) -> Result<Effective, Error> {
    let arguments_place = model.place("engine-args");
    let wrong = |error| Error::Arguments {
        name: model.name.to_string(),
        place: arguments_place.clone(),
        source: Box::new(error),
    };
    // A whole pasted command line begins with the program.
    let engine_args = match model.engine_args.split_first() {
        Some((program, rest)) if program.rsplit('/').next() == Some("llama-server") => rest,
        _ => &model.engine_args,
    };
    args::parse(engine_args, &BTreeMap::new()).map_err(wrong)?;
    let given = words::split(engine_args);
    reserved(model, &given, &arguments_place)?;

    let mut environment: BTreeMap<String, String> = unit.clone();
    environment.extend(model.environment.0.clone());
    let mut arguments = Vec::new();
    let mut keys: BTreeMap<&'static str, &'static str> = BTreeMap::new();
    for (key, flag, value) in keys_as_flags(model) {
        let argument = given.iter().rev().find(|word| word.name == Some(flag));
        let variable = variable_of(flag).filter(|name| model.environment.0.contains_key(*name));
        match model.given(key) {
            Some(at) if !at.inherited => {
                agree(model, key, &value, argument, variable)?;
            }
            _ if argument.is_some() || variable.is_some() => continue,
            _ if variable_of(flag).is_some_and(|name| unit.contains_key(name)) => continue,
            _ => {}
        }
        if value == "auto" {
            // Left open, also where a variable of the unit would close it.
            environment.retain(|name, _| Some(name.as_str()) != variable_of(flag));
        } else if argument.is_none() {
            arguments.extend([flag.to_owned(), value]);
            keys.insert(flag, key);
        }
    }
    arguments.extend(engine_args.iter().cloned());

    let mut parsed = args::parse(&arguments, &environment).map_err(wrong)?;
    if parsed.download.is_some() {
        let names = ["model-url", "hf-repo", "docker-repo"];
        let origin = names.iter().find_map(|name| parsed.origins.get(*name)).map(origin_text);
        return Err(Error::Download { origin: origin.unwrap_or_default() });
    }

    // The daemon decides what fits: the engine is started with --fit off and everything spelled out.
    parsed.settings.fit = false;
    parsed.origins.remove("fit");
    let automatic = Automatic {
        prompt_cache: !parsed.origins.contains_key("cache-ram"),
        context_checkpoints: !parsed.origins.contains_key("ctx-checkpoints"),
    };
    if automatic.prompt_cache {
        parsed.settings.prompt_cache_mib = Some(0);
    }
    if automatic.context_checkpoints {
        parsed.settings.context_checkpoints = 0;
    }

    // An interactive model is kept out of swap.
    let swaps = model.oversize == Oversize::Swap && model.workload == Workload::Batch;
    if swaps && !parsed.origins.contains_key("load-mode") {
        // Only what is in memory of its own can be in swap.
        parsed.settings.load_mode = LoadMode::None;
    }
    let streams = model.oversize == Oversize::Stream;
    if streams {
        // What is mapped can be left on disk: not what an APU's default reads, nor what is repacked.
        if !parsed.origins.contains_key("load-mode") {
            parsed.settings.load_mode = LoadMode::Mmap;
        }
        if !parsed.origins.contains_key("repack") {
            parsed.settings.repack = false;
        }
    }

    let sources = parsed.origins.iter().map(|(name, origin)| {
        let source = match origin {
            Origin::Argument(flag) => match keys.get(format!("--{name}").as_str()) {
                Some(key) if model.given(key).is_some() => Source::Key(model.place(key)),
                Some(_) => return None,
                None => Source::Argument { flag: flag.clone(), place: arguments_place.clone() },
            },
            Origin::Variable(variable) if model.environment.0.contains_key(variable) => {
                Source::Variable { name: variable.clone(), place: model.place("environment") }
            }
            Origin::Variable(variable) => Source::UnitVariable(variable.clone()),
        };
        Some((name.clone(), source))
    });
    let rest = given.iter().filter(|word| word.name.is_none_or(|name| !SPELLED_OUT.contains(&name)));
    Ok(Effective {
        settings: parsed.settings.clone(),
        sources: sources.flatten().collect(),
        automatic,
        streams,
        swaps,
        passed_on: parsed.passed_on.clone(),
        rest: rest.flat_map(|word| word.words.iter().cloned()).collect(),
        parsed,
    })
}

/// Each key of a model that is an argument of llama-server: the key, the flag's long name, and the
/// value as the argument has it.
fn keys_as_flags(model: &Model) -> Vec<(&'static str, &'static str, String)> {
    let path = |path: &std::path::Path| path.to_string_lossy().into_owned();
    let mut all = vec![
        ("parallel", "--parallel", model.parallel.to_string()),
        ("cache-type-k", "--cache-type-k", model.cache_type_k.clone()),
        ("cache-type-v", "--cache-type-v", model.cache_type_v.clone()),
        ("host", "--host", model.host.clone()),
        ("port", "--port", model.port.to_string()),
    ];
    let gpu_layers = match model.gpu_layers {
        GpuLayers::Auto => "auto".to_owned(),
        GpuLayers::All => "all".to_owned(),
        GpuLayers::Count(n) => n.to_string(),
    };
    all.push(("gpu-layers", "--gpu-layers", gpu_layers));
    let prompt_cache = match model.prompt_cache {
        PromptCache::Auto => "auto".to_owned(),
        PromptCache::Size(size) => size.0.div_ceil(MIB).to_string(),
    };
    all.push(("prompt-cache", "--cache-ram", prompt_cache));
    all.extend(model.context.map(|context| ("context", "--ctx-size", context.to_string())));
    for (key, flag, file) in [
        ("model", "--model", &model.model),
        ("mmproj", "--mmproj", &model.mmproj),
        ("draft-model", "--spec-draft-model", &model.draft_model),
        ("api-key-file", "--api-key-file", &model.api_key_file),
    ] {
        all.extend(file.as_deref().map(|file| (key, flag, path(file))));
    }
    all
}

/// That an argument and a variable of the same model say what the key says.
fn agree(
    model: &Model,
    key: &'static str,
    value: &str,
    argument: Option<&Word<'_>>,
    variable: Option<&'static str>,
) -> Result<(), Error> {
    let contradiction = |other: String, other_value: &str| {
        Err(Error::Contradiction {
            key,
            place: model.place(key),
            value: value.to_owned(),
            other: format!("{other} says {other_value}"),
        })
    };
    if let Some(word) = argument.filter(|word| word.value() != value) {
        let flag = word.words.first().map_or("", String::as_str);
        return contradiction(
            format!("{flag} in 'engine-args' at {}", model.place("engine-args")),
            word.value(),
        );
    }
    let Some(name) = variable else { return Ok(()) };
    match model.environment.0.get(name) {
        Some(other) if other != value => {
            contradiction(format!("{name} in 'environment' at {}", model.place("environment")), other)
        }
        _ => Ok(()),
    }
}

/// That `engine-args` leaves to the keys what only they can say.
fn reserved(model: &Model, given: &[Word<'_>], place: &Place) -> Result<(), Error> {
    let flags = keys_as_flags(model);
    for word in given {
        let Some(name) = word.name else { continue };
        let flag = word.words.first().cloned().unwrap_or_default();
        let key = KEYS_ONLY.into_iter().find(|key| name.strip_prefix("--") == Some(*key));
        if let Some(key) = key {
            // What says the same twice does no harm.
            if flags
                .iter()
                .any(|(k, _, value)| *k == key && value == word.value() && model.given(k).is_some())
            {
                continue;
            }
            let advice = format!("write {key} = … into {}", model.file.display());
            return Err(Error::Reserved { flag, place: place.clone(), advice });
        }
        let off = matches!(word.value(), "off" | "0" | "false" | "disabled");
        if name == "--fit" && !off {
            let advice = "plimsoll decides what fits; 'gpu-layers' and 'context-min' say how".to_owned();
            return Err(Error::Reserved { flag, place: place.clone(), advice });
        }
    }
    Ok(())
}

/// The variable that sets a flag.
fn variable_of(flag: &str) -> Option<&'static str> {
    FLAGS.iter().find(|f| f.name() == flag).map(|f: &Flag| f.variable).filter(|name| !name.is_empty())
}

/// The argument or variable, for messages.
pub(super) fn origin_text(origin: &Origin) -> String {
    match origin {
        Origin::Argument(flag) => flag.clone(),
        Origin::Variable(name) => name.clone(),
    }
}

/// The arguments that say where tensors go.
pub(super) fn override_arguments(overrides: &[Override]) -> Vec<String> {
    overrides
        .iter()
        .flat_map(|o| match o {
            Override::CpuMoe(u32::MAX) => vec!["--cpu-moe".to_owned()],
            Override::CpuMoe(n) => vec!["--n-cpu-moe".to_owned(), n.to_string()],
            Override::CpuFfn(n) => vec!["--n-cpu-ffn".to_owned(), n.to_string()],
            Override::Pattern { pattern, buffer } => {
                vec!["--override-tensor".to_owned(), format!("{pattern}={buffer}")]
            }
        })
        .collect()
}

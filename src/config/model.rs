//! One model, as its file and the defaults of all models configure it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Serialize, Serializer};

use super::instance::ModelName;
use super::problem::Place;
use crate::bytes::Bytes;

/// The engine of a model that names none.
pub const DEFAULT_ENGINE: &str = "llama-server";
/// The port of a model that names none: llama-server's own.
pub const DEFAULT_PORT: u16 = 8080;
/// The address of a model that names none: this machine only.
pub const DEFAULT_HOST: &str = "127.0.0.1";
/// The cache type of a model that names none: llama-server's own.
pub const DEFAULT_CACHE_TYPE: &str = "f16";
/// The priority of a model that names none.
pub const DEFAULT_PRIORITY: u8 = 50;
/// How long a load may stand still when the model does not say.
pub const DEFAULT_STALL_TIMEOUT: Duration = Duration::from_secs(120);

/// How long a model may take to finish its requests before it is stopped for another, when it does not say.
pub const DEFAULT_DRAIN: Duration = Duration::from_secs(30);

/// How much memory llama-server may keep for prompts it has seen (its `--cache-ram`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PromptCache {
    /// From what is left over; never a reason to refuse or evict.
    #[default]
    Auto,
    /// This much; zero turns it off.
    Size(Bytes),
}

/// How many layers are offloaded to the GPU (llama-server's `-ngl`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GpuLayers {
    /// As many as fit.
    #[default]
    Auto,
    /// All of them.
    All,
    /// That many; the output layer counts as one and is offloaded first.
    Count(u32),
}

/// What a model is used for, which decides whether its memory may be swapped out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// Somebody waits for the answers: kept out of swap.
    #[default]
    Interactive,
    /// Nobody does: may be swapped.
    Batch,
}

/// What may be done when the model is larger than memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Oversize {
    /// It is refused.
    #[default]
    Refuse,
    /// Mapped weights are read from disk again and again.
    Stream,
    /// What is neither mapped nor on the GPU may be swapped.
    Swap,
}

/// Environment variables of an engine. Values of variables whose names sound like a secret are
/// hidden in `Debug` and in JSON.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Environment(pub BTreeMap<String, String>);

impl Environment {
    fn shown(&self) -> BTreeMap<&str, &str> {
        self.0
            .iter()
            .map(|(name, value)| (&**name, if sounds_secret(name) { "(hidden)" } else { &**value }))
            .collect()
    }
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.shown()).finish()
    }
}

impl Serialize for Environment {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.shown())
    }
}

/// Whether a variable's name sounds like a secret: its value is shown nowhere and sent nowhere.
#[must_use]
pub fn sounds_secret(name: &str) -> bool {
    let name = name.to_ascii_uppercase();
    ["KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL"].iter().any(|part| name.contains(part))
}

/// Where a key of a model was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    /// Where the key stands.
    pub place: Place,
    /// Whether it comes from `[model-defaults]`: what the model itself says then wins over it.
    pub inherited: bool,
}

/// A model as configured: valid, with every default applied.
///
/// JSON of it has snake-case keys and holds no secrets.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Model {
    /// The name of its file and of its unit.
    pub name: ModelName,
    /// The file that configures it (without its drop-ins).
    pub file: PathBuf,
    /// The GGUF file, of a split model the first; none only with `command`.
    pub model: Option<PathBuf>,
    /// Cells of the KV cache, all slots together; none: what the model was trained on, if it fits.
    pub context: Option<u64>,
    /// The context may be reduced to this; none: it is never reduced.
    pub context_min: Option<u64>,
    /// Type of the K cache.
    pub cache_type_k: String,
    /// Type of the V cache.
    pub cache_type_v: String,
    /// Slots that answer at the same time.
    pub parallel: u32,
    /// Memory for prompts already seen.
    #[serde(serialize_with = "prompt_cache")]
    pub prompt_cache: PromptCache,
    /// Layers on the GPU.
    #[serde(serialize_with = "gpu_layers")]
    pub gpu_layers: GpuLayers,
    /// 0 to 100; only models of strictly lower priority are evicted for it.
    pub priority: u8,
    /// Never evicted.
    pub pinned: bool,
    /// What it is used for.
    pub workload: Workload,
    /// What may be done when it is larger than memory.
    pub oversize: Oversize,
    /// Stopped after this long without a request; none: never.
    #[serde(rename = "ttl_seconds", serialize_with = "seconds")]
    pub ttl: Option<Duration>,
    /// How long it may take to finish its requests before it is stopped for another.
    #[serde(rename = "drain_seconds", serialize_with = "whole_seconds")]
    pub drain: Duration,
    /// Labels, shown and searched; never policy.
    pub modes: Vec<String>,
    /// Other names of it.
    pub aliases: Vec<ModelName>,
    /// The address it listens on.
    pub host: String,
    /// The port of its first instance.
    pub port: u16,
    /// The file with the keys that clients have to send.
    pub api_key_file: Option<PathBuf>,
    /// Variables for the engine.
    pub environment: Environment,
    /// The name of the engine: `llama-server`, or an `[engine.NAME]` of `plimsoll.toml`.
    pub engine: String,
    /// More arguments for the engine.
    pub engine_args: Vec<String>,
    /// Any other engine: its whole command line, with `{port}` and the like still in it.
    pub command: Option<Vec<String>>,
    /// The memory it takes, declared; always there with `command`.
    #[serde(rename = "memory_bytes")]
    pub memory: Option<Bytes>,
    /// Of that, or on a card of its own: the GPU memory it takes, declared.
    #[serde(rename = "gpu_memory_bytes")]
    pub gpu_memory: Option<Bytes>,
    /// The multimodal projector.
    pub mmproj: Option<PathBuf>,
    /// The draft model of speculative decoding.
    pub draft_model: Option<PathBuf>,
    /// The path that answers 200 once it is ready; none: ready when its port accepts.
    pub health_path: Option<String>,
    /// A load during which nothing moves for this long has failed.
    #[serde(rename = "stall_timeout_seconds", serialize_with = "whole_seconds")]
    pub stall_timeout: Duration,
    /// Where each key that was given stands; what is absent is a default.
    #[serde(skip)]
    pub given: BTreeMap<&'static str, Given>,
}

impl Model {
    /// Where `key` was given, for messages; none when its value is the default.
    #[must_use]
    pub fn given(&self, key: &str) -> Option<&Given> {
        self.given.get(key)
    }

    /// Where `key` stands, or the whole file where it does not.
    #[must_use]
    pub fn place(&self, key: &str) -> Place {
        self.given(key).map_or_else(|| Place::file(&self.file), |given| given.place.clone())
    }
}

fn prompt_cache<S: Serializer>(value: &PromptCache, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        PromptCache::Auto => serializer.serialize_str("auto"),
        PromptCache::Size(size) => size.serialize(serializer),
    }
}

fn gpu_layers<S: Serializer>(value: &GpuLayers, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        GpuLayers::Auto => serializer.serialize_str("auto"),
        GpuLayers::All => serializer.serialize_str("all"),
        GpuLayers::Count(n) => serializer.serialize_u32(*n),
    }
}

fn seconds<S: Serializer>(value: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    value.map(|span| span.as_secs()).serialize(serializer)
}

fn whole_seconds<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(value.as_secs())
}

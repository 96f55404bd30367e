//! A scenario: the machine, its models, and what happens when. TOML; see `config/simulate/`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use crate::bytes::Bytes;
use crate::config::{Instance, ModelName};
use crate::ledger::{Basis, FileId, Footprint, Gpu, Mapped};
use crate::policy::{Mode, Peers, Request, Rules, Rung, request};

/// A simulated machine with its models.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Scenario {
    /// One line on what it shows.
    #[serde(default)]
    pub about: String,
    /// The machine.
    pub machine: SimMachine,
    /// Its models.
    #[serde(default)]
    pub models: BTreeMap<ModelName, SimModel>,
    /// What happens by itself, at its time.
    #[serde(default)]
    pub at: Vec<Scripted>,
}

/// Memory of the simulated machine, and its rules.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SimMachine {
    /// MemTotal.
    pub memory: Bytes,
    /// What the system uses for itself.
    pub system: Bytes,
    /// Its GPUs; `used` is what others than the models use.
    #[serde(default)]
    pub gpus: Vec<Gpu>,
    /// Memory kept for the system; worked out as on a real machine when absent.
    pub reserve: Option<Bytes>,
    /// What swapfiles may take of its disks.
    #[serde(default)]
    pub swap_room: Bytes,
    /// Its kernel takes no swapfile.
    #[serde(default)]
    pub swap_broken: bool,
    /// Its free memory lies scattered: so much of it in large blocks.
    pub free_large: Option<Bytes>,
    /// Page cache of files that are no model's.
    #[serde(default)]
    pub cache: Bytes,
    /// Page cache of the weights of models that nobody runs.
    #[serde(default)]
    pub cold: Bytes,
    /// Swap on a disk that is there already.
    #[serde(default)]
    pub swap: Bytes,
    /// Its kernel does not tell of pressure.
    #[serde(default)]
    pub no_psi: bool,
    /// How fast memory can go down at most; bytes per second.
    #[serde(default = "four_gib")]
    pub fastest: Bytes,
    /// The page cache of the whole machine may be dropped.
    #[serde(default)]
    pub drop_all_cache: bool,
    /// The pressure ladder acts.
    #[serde(default = "yes")]
    pub ladder: bool,
    /// `enforce` or `observe`.
    #[serde(default)]
    pub mode: Mode,
    /// `keep` or `replace-idle`.
    #[serde(default)]
    pub peers: Peers,
}

/// Where a simulated model's weights lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Placement {
    /// On the first GPU.
    #[default]
    Gpu,
    /// Mapped from the file.
    Mapped,
    /// In anonymous memory.
    Anonymous,
}

/// A simulated model.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SimModel {
    /// 0 to 100.
    #[serde(default = "fifty")]
    pub priority: u8,
    /// Never evicted.
    #[serde(default)]
    pub pinned: bool,
    /// Bytes of its weights.
    pub weights: Bytes,
    /// Where they lie.
    #[serde(default)]
    pub placement: Placement,
    /// Bytes of KV cache for each token of context, next to the weights.
    #[serde(default)]
    pub kv_per_token: Bytes,
    /// Other host memory.
    #[serde(default)]
    pub private: Bytes,
    /// Context length; tokens.
    #[serde(default = "default_context")]
    pub context: u64,
    /// May be reduced to this; tokens.
    pub context_min: Option<u64>,
    /// Seconds until it answers.
    #[serde(default = "ten")]
    pub load_seconds: u64,
    /// Seconds until it has stopped.
    #[serde(default = "one")]
    pub stop_seconds: u64,
    /// It may stream, with at least so many of its mapped weights in memory.
    pub stream: Option<Bytes>,
    /// One expert's part of a tensor.
    #[serde(default)]
    pub expert: Bytes,
    /// Part of its private memory may be in a swapfile, at most so much.
    pub swap: Option<Bytes>,
    /// Idle seconds after which it is stopped.
    pub ttl_seconds: Option<u64>,
    /// How long it may take to finish its requests before it is stopped for another; seconds.
    #[serde(default)]
    pub drain_seconds: u64,
    /// Its engine does not say what it is doing.
    #[serde(default)]
    pub silent: bool,
    /// Bytes that it does not give back when it stops.
    #[serde(default)]
    pub leaks: Bytes,
    /// Host memory that it takes beyond its estimate.
    #[serde(default)]
    pub takes_more: Bytes,
    /// Its memory comes back only so many seconds after it has stopped.
    #[serde(default)]
    pub late_seconds: u64,
    /// Its unit ends only so many seconds after its memory is back.
    #[serde(default)]
    pub lingers_seconds: u64,
    /// Told to stop, or killed, it waits for a disk for ever, and gives nothing back.
    #[serde(default)]
    pub undead: bool,
    /// Its anonymous memory may be swapped out.
    #[serde(default)]
    pub batch: bool,
    /// It does not stop when it is told to.
    #[serde(default)]
    pub stuck: bool,
    /// Its stop fails, and it ends all the same, after as long again.
    #[serde(default)]
    pub stubborn: bool,
    /// Models of the same number share their file.
    pub file: Option<u64>,
}

/// Something that happens at a time.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Scripted {
    /// Seconds after the start.
    pub seconds: u64,
    /// Start this instance, as a person would.
    pub start: Option<Instance>,
    /// Start this instance, as systemd does after a crash.
    pub restart: Option<Instance>,
    /// Stop this instance, as a person would.
    pub stop: Option<Instance>,
    /// This instance crashes.
    pub crash: Option<Instance>,
    /// systemd starts the one that crashes again after so many seconds, unless somebody stops it before.
    pub restart_seconds: Option<u64>,
    /// The system uses this much from now on.
    pub system: Option<Bytes>,
    /// Somebody asks a model for something.
    pub requests: Option<Requests>,
    /// Something that is no model takes memory from now on, in place of what did so before.
    pub eater: Option<Eater>,
    /// It gives all of it back.
    #[serde(default)]
    pub eater_ends: bool,
    /// Tasks wait for memory from now on: some and all of them, per mille of the time.
    pub pressure: Option<(u16, u16)>,
    /// Others than models use this much of the first GPU from now on, beyond what they did at the start.
    pub gpu: Option<Bytes>,
}

/// Requests to a model.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Requests {
    /// Which.
    pub of: Instance,
    /// How many at once.
    pub count: u32,
    /// How long each takes.
    pub seconds: u64,
}

/// Something that takes memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Eater {
    /// Bytes per second.
    pub rate: Bytes,
    /// How much it takes at most.
    pub most: Bytes,
}

fn fifty() -> u8 {
    50
}

fn four_gib() -> Bytes {
    Bytes::gib(4)
}

fn default_context() -> u64 {
    4096
}

fn yes() -> bool {
    true
}

fn ten() -> u64 {
    10
}

fn one() -> u64 {
    1
}

/// Why a scenario can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// It could not be read.
    #[error("{path}: {source}")]
    Read {
        /// Its path.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// It is no scenario.
    #[error("{path}: {message}")]
    Parse {
        /// Its path.
        path: String,
        /// What and where.
        message: String,
    },
}

impl Scenario {
    /// Reads a scenario file.
    ///
    /// # Errors
    /// When it can't be read, or says something unknown or contradictory.
    pub fn read(path: &Path) -> Result<Self, ScenarioError> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path)
            .map_err(|source| ScenarioError::Read { path: name.clone(), source })?;
        toml::from_str(&text).map_err(|error| ScenarioError::Parse {
            path: name,
            message: error.to_string().trim().to_owned(),
        })
    }

    /// The rules of the simulated machine.
    #[must_use]
    pub fn rules(&self) -> Rules {
        let memory = crate::ledger::Memory { total: self.machine.memory, ..Default::default() };
        Rules {
            reserve: self.machine.reserve.unwrap_or_else(|| request::auto_reserve(&memory)),
            mode: self.machine.mode,
            peers: self.machine.peers,
            drop_all_cache: self.machine.drop_all_cache,
            ladder: self.machine.ladder,
        }
    }

    /// The configured priorities.
    #[must_use]
    pub fn priorities(&self) -> BTreeMap<ModelName, u8> {
        self.models.iter().map(|(name, model)| (name.clone(), model.priority)).collect()
    }

    /// What an instance asks for at its start.
    #[must_use]
    pub fn request(&self, instance: &Instance, invocation: &str) -> Option<Request> {
        let position = self.models.keys().position(|name| *name == instance.model)?;
        let model = self.models.get(&instance.model)?;
        let file = FileId { device: 1, inode: model.file.unwrap_or(1000 + position as u64) };
        let rung = |context| {
            // Nothing is known of units of others but what their configuration declares.
            let key = if instance.is_foreign() {
                String::new()
            } else {
                format!("{} at {context}", instance.model)
            };
            let basis = Basis { key, ..Basis::default() };
            Rung { context, footprint: model.footprint(context, file), basis }
        };
        let smallest = model.context_min.unwrap_or(model.context).min(model.context);
        let step = ((model.context - smallest) / 32).max(256);
        let mut ladder: Vec<Rung> = (0..)
            .map(|n| model.context.saturating_sub(n * step))
            .take_while(|c| *c > smallest)
            .map(rung)
            .collect();
        ladder.push(rung(smallest));
        let halves = std::iter::successors(Some(smallest / 2), |c| Some(c / 2)).take_while(|c| *c >= 512);
        Some(Request {
            invocation: invocation.to_owned(),
            priority: model.priority,
            pinned: model.pinned,
            ladder,
            advice: halves.map(rung).collect(),
            ttl: model.ttl_seconds.map(|s| s * 1000),
            reload: model.weights,
            drain: model.drain_seconds * 1000,
            may_swap: model.batch,
            stream: model.stream,
            expert: model.expert,
            swap: model.swap,
            ..Request::of(instance.clone())
        })
    }
}

impl SimModel {
    /// What it takes at a context length.
    #[must_use]
    pub fn footprint(&self, context: u64, file: FileId) -> Footprint {
        let kv = self.kv_per_token * context;
        match self.placement {
            Placement::Gpu => {
                Footprint { private: self.private, gpus: vec![self.weights + kv], ..Footprint::default() }
            }
            Placement::Mapped => Footprint {
                private: self.private + kv,
                mapped: vec![Mapped { file, bytes: self.weights }],
                ..Footprint::default()
            },
            Placement::Anonymous => {
                Footprint { private: self.private + self.weights + kv, ..Footprint::default() }
            }
        }
    }
}

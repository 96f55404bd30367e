//! The traits between the daemon's loop and the world: one real implementation each, one simulated.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use crate::bytes::Bytes;
use crate::config::{Instance, ModelName, NameError};
use crate::ledger::{Gpu, Machine, Measured};
use crate::policy::core::Effect;
use crate::policy::{ActionId, LastResort, Mode, Outcome, Peers, Refusal, Request, Rung};

/// Where the outcome of an effect goes, from whatever task or thread it ends in.
pub type Outcomes = Box<dyn Fn(ActionId, Outcome) + Send>;

/// The machine as the daemon's loop sees it.
pub trait Ports {
    /// Milliseconds since boot, suspend included.
    fn now(&self) -> u64;

    /// A fresh reading of the machine. Cheap enough for every event: what takes longer (the page
    /// cache of files) is read elsewhere and only handed in.
    fn observe(&mut self) -> Machine;

    /// What a process that is no model's and all that it has started hold.
    fn measure(&self, _pid: u32, _others: &BTreeSet<u32>) -> Measured {
        Measured::default()
    }

    /// Begins an effect and returns at once; its outcome goes to `done`, exactly once. A start has
    /// its outcome when the unit answers, or when its start has failed.
    fn perform(&mut self, id: ActionId, effect: Effect, done: Outcomes);

    /// What is to be done when the loop does not act, from now on; it looks again in `due` at the latest.
    fn stand_by(&mut self, _last: Option<LastResort>, _due: Duration) {}

    /// Who was killed by that since it was last asked, and what memory was left then.
    fn killed(&mut self) -> Vec<(Instance, Bytes)> {
        Vec::new()
    }

    /// What of the machine's memory can't be seen here, one sentence each.
    fn unseen(&self) -> Vec<String> {
        Vec::new()
    }

    /// The answer to a request that no call on the bus waits for: the simulated gate's.
    fn answered(&mut self, ticket: u64, answer: Result<u64, Box<Refusal>>);
}

/// The models that can be run, and what each would take.
///
/// Reads files, so it is called from threads that may block.
pub trait Catalog: Send + Sync {
    /// Every configured model.
    fn models(&self) -> Vec<ModelInfo>;

    /// The instance that `text` means: `NAME`, `NAME@2`, or an alias in place of the name.
    ///
    /// # Errors
    /// A sentence: there is no such model, or its configuration is wrong.
    fn resolve(&self, text: &str) -> Result<Instance, CatalogError> {
        let asked: Instance =
            text.parse().map_err(|error: NameError| CatalogError::NotFound(error.to_string()))?;
        let known = self.models().into_iter().filter_map(|model| model.name).any(|name| name == asked.model);
        if known {
            Ok(asked)
        } else {
            Err(CatalogError::NotFound(format!("there is no model '{}'", asked.model)))
        }
    }

    /// The rules and priorities of the configuration as it is now; none where they never change.
    fn rulebook(&self) -> Option<Rulebook> {
        None
    }

    /// Reads the configuration again; returns every problem found in it, one sentence each.
    fn reload(&self) -> Vec<String> {
        Vec::new()
    }

    /// What is asked of the decisions when `wish` is granted.
    ///
    /// # Errors
    /// A sentence on what is wrong with the model, its files or the wish.
    fn request(&self, wish: &Wish, gpus: &[Gpu]) -> Result<Request, CatalogError>;

    /// What to execute for an instance that was admitted at `rung` for `wish`.
    ///
    /// # Errors
    /// A sentence on what is wrong with the engine's configuration.
    fn launch(&self, wish: &Wish, rung: &Rung, gpus: &[Gpu]) -> Result<Launch, CatalogError>;
}

/// What the configuration says to the decisions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rulebook {
    /// Which reading of the configuration this is: a later one has a larger number.
    pub reading: u64,
    /// Whether decisions are carried out.
    pub mode: Mode,
    /// Memory kept for the system; none: by the size of the machine.
    pub reserve: Option<Bytes>,
    /// What an explicit start may do to its equals.
    pub peers: Peers,
    /// The page cache of the whole machine may be dropped for a large load.
    pub drop_all_cache: bool,
    /// The pressure ladder acts.
    pub ladder: bool,
    /// The configured models, as they are shown.
    pub models: Vec<ModelInfo>,
    /// What is wrong with the configuration, one sentence each.
    pub problems: Vec<String>,
}

/// What the daemon shows of a configured model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelInfo {
    /// Its name, absent where the configuration gives none that is valid.
    pub name: Option<ModelName>,
    /// 0 to 100.
    pub priority: u8,
    /// Configured as pinned.
    pub pinned: bool,
    /// Configured context; tokens, 0 where the model's own is used.
    pub context: u64,
    /// Slots.
    pub parallel: u64,
    /// Where its first instance answers.
    pub address: String,
    /// Other names.
    pub aliases: Vec<String>,
    /// Labels.
    pub modes: Vec<String>,
    /// Why it can't be started, where its configuration is wrong.
    pub broken: Option<String>,
}

/// A wish to run (or only to weigh) an instance.
#[derive(Debug, Default)]
pub struct Wish {
    /// Who; absent only in a default value.
    pub instance: Option<Instance>,
    /// InvocationID of the asking unit; empty for a plan.
    pub invocation: String,
    /// The model's files as the unit's user could open them; for a plan the catalogue opens them.
    pub files: Vec<(PathBuf, File)>,
    /// The unit's environment, as far as it matters to the engine's memory.
    pub environment: BTreeMap<String, String>,
    /// What the engine says of itself, as text by the question: `version` and `devices`; empty where
    /// it was not asked.
    pub engine: BTreeMap<String, String>,
    /// Another context than the configured one; tokens.
    pub context: Option<u64>,
    /// Models named to go for it.
    pub instead_of: BTreeSet<Instance>,
    /// Admit it whatever the arithmetic says.
    pub force: bool,
    /// Whoever is stopped for it is owed no return.
    pub no_restore: bool,
    /// A person asked for it now.
    pub explicit: bool,
}

/// What to execute.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Launch {
    /// The absolute path of the executable and its arguments.
    pub argv: Vec<String>,
    /// What to set in the environment.
    pub environment: BTreeMap<String, String>,
}

/// Why the catalogue can't answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CatalogError {
    /// There is no such model.
    #[error("{0}")]
    NotFound(String),
    /// Its configuration or its files are wrong.
    #[error("{0}")]
    Config(String),
}

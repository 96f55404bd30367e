//! What is asked for, and the rules that it is judged by.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::limits::read_ahead;
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{Basis, Footprint, Memory, Reservation};

/// One context length at which a model could run, and what it takes there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rung {
    /// Context length, all slots together; tokens.
    pub context: u64,
    /// What it takes.
    pub footprint: Footprint,
    /// What that rests on.
    #[serde(default)]
    pub basis: Basis,
}

/// A wish to run one instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Who.
    pub instance: Instance,
    /// InvocationID of the unit that asks; a plan that nobody executes leaves it empty.
    pub invocation: String,
    /// 0 to 100; only strictly lower ones are evicted for it.
    pub priority: u8,
    /// Never evicted once it runs.
    pub pinned: bool,
    /// From the wanted context down to the smallest allowed one, never empty unless `unknown`.
    pub ladder: Vec<Rung>,
    /// Smaller contexts that the configuration does not allow: only for advice in a refusal.
    pub advice: Vec<Rung>,
    /// Stop it after this long without a request; milliseconds.
    pub ttl: Option<u64>,
    /// What loading it reads from disk.
    pub reload: Bytes,
    /// How long it may take to finish its requests before it is stopped for another; milliseconds.
    pub drain: u64,
    /// Whether its anonymous memory may be swapped out (`workload = "batch"`).
    pub may_swap: bool,
    /// It may run with part of its mapped weights left on disk (`oversize = "stream"`): at least so
    /// many have to stay in memory, those that every token touches.
    pub stream: Option<Bytes>,
    /// One expert's part of a tensor, the largest there is: what a model that streams reads at a time. Zero where there
    /// are no experts.
    pub expert: Bytes,
    /// Part of its private memory may be in swapfiles (`oversize = "swap"`): at most so much, the routed experts.
    pub swap: Option<Bytes>,
    /// Why no swapfile could be made for it.
    pub no_swapfile: Option<String>,
    /// Models that a person named to go for it, whatever their priority.
    pub instead_of: BTreeSet<Instance>,
    /// Models that could not be stopped: as good as pinned for this request.
    pub stuck: BTreeSet<Instance>,
    /// Models that were told to finish their requests for it, and until when; milliseconds since boot.
    pub finishing: BTreeMap<Instance, u64>,
    /// Admit it even if it doesn't fit, or if its size is unknown.
    pub force: bool,
    /// Whoever is stopped for it is owed no return.
    pub no_restore: bool,
    /// A person asked for it now (not a boot, a restart or a restoration).
    pub explicit: bool,
    /// How long it waits.
    pub patience: Patience,
    /// The size can't be estimated: why.
    pub unknown: Option<String>,
    /// Largest memory that the administrator's MemoryMax= allows this unit.
    pub unit_limit: Option<Bytes>,
}

impl Request {
    /// A wish that asks for nothing yet and may do nothing to anybody: priority as by default, no ladder.
    #[must_use]
    pub fn of(instance: Instance) -> Self {
        Self {
            instance,
            invocation: String::new(),
            priority: crate::config::DEFAULT_PRIORITY,
            pinned: false,
            ladder: Vec::new(),
            advice: Vec::new(),
            ttl: None,
            reload: Bytes::ZERO,
            drain: 0,
            may_swap: false,
            stream: None,
            expert: Bytes::ZERO,
            swap: None,
            no_swapfile: None,
            instead_of: BTreeSet::new(),
            stuck: BTreeSet::new(),
            finishing: BTreeMap::new(),
            force: false,
            no_restore: false,
            explicit: false,
            patience: Patience::default(),
            unknown: None,
            unit_limit: None,
        }
    }

    /// The reservation that it gets at `rung`.
    #[must_use]
    pub fn reservation(&self, rung: &Rung, phase: crate::ledger::Phase, now: u64) -> Reservation {
        let streams = self.ladder.iter().any(|whole| {
            let (kept, all) = (rung.footprint.mapped_bytes(), whole.footprint.mapped_bytes());
            whole.context == rung.context && kept < all
        });
        Reservation {
            phase,
            priority: self.priority,
            pinned: self.pinned,
            context: rung.context,
            predicted: rung.footprint.clone(),
            basis: rung.basis.clone(),
            measured: crate::ledger::Measured::default(),
            invocation: self.invocation.clone(),
            last_used: now,
            ttl: self.ttl,
            reload: self.reload,
            drain: self.drain,
            may_swap: self.may_swap,
            streams,
            read_ahead: if streams { read_ahead(self.expert) } else { Bytes::ZERO },
            ready: if phase == crate::ledger::Phase::Running { now } else { 0 },
        }
    }
}

/// What a request waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Patience {
    /// For nothing: what can't be done now is refused.
    None,
    /// For others that are loading or stopping, for a while.
    #[default]
    Others,
    /// For room, for as long as it takes.
    Room,
}

/// Whether decisions are carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Admit, make room, refuse.
    #[default]
    Enforce,
    /// Admit everything, act on nothing, and say what would have been done.
    Observe,
}

/// What an explicit start may do to models of equal priority.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Peers {
    /// Nothing.
    #[default]
    Keep,
    /// Replace those that are idle and not pinned.
    ReplaceIdle,
}

/// The rules of this machine, from its configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Memory kept for the system; see [`auto_reserve`].
    pub reserve: Bytes,
    /// Whether decisions are carried out.
    pub mode: Mode,
    /// What an explicit start may do to its equals.
    pub peers: Peers,
    /// The page cache of the whole machine may be dropped for a large load, when all else was not enough.
    pub drop_all_cache: bool,
    /// The pressure ladder acts.
    pub ladder: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            reserve: Bytes::gib(2),
            mode: Mode::Enforce,
            peers: Peers::Keep,
            drop_all_cache: false,
            ladder: false,
        }
    }
}

/// The reserve when none is configured: a thirty-second of memory, at least 128 MiB and at most
/// 4 GiB. What the system uses already is counted apart; this is for what it may yet want.
#[must_use]
pub fn auto_reserve(memory: &Memory) -> Bytes {
    memory.total.mul_div(1, 32).clamp(Bytes::mib(128), Bytes::gib(4))
}

//! What the reading methods answer with: the JSON of `Status`, `Plan` and `Explain`.
//!
//! Keys are only ever added. A reader takes a missing one for empty, so that a command and a
//! daemon of different versions understand each other. Sizes are `…_bytes`, plain numbers.

use serde::{Deserialize, Serialize};

use crate::bytes::Bytes;

/// The answer of `Status`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// `enforce` or `observe`.
    pub mode: String,
    /// Every pool of memory that something can be refused for.
    pub pools: Vec<Pool>,
    /// Swap of the machine.
    pub swap: Swap,
    /// How short memory is.
    pub pressure: Pressure,
    /// Every configured model, and every instance that runs.
    pub models: Vec<Model>,
    /// Memory that models did not return when they stopped, of the last day: it counts as the system's.
    pub quarantined: Vec<Quarantined>,
    /// Memory that is held for what is no model, or waited for.
    pub leases: Vec<Lease>,
    /// The last decisions, newest first.
    pub decisions: Vec<Decision>,
    /// What is wrong with the configuration, one sentence each.
    pub problems: Vec<String>,
    /// What of the machine's memory can't be seen, one sentence each.
    pub unseen: Vec<String>,
    /// The daemon's own loop.
    pub turns: Turns,
}

/// How the daemon's loop, which nothing may hold up, has fared since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Turns {
    /// How many turns it has made.
    pub count: u64,
    /// The longest one, from what woke it to its next wait; microseconds.
    pub longest_usec: u64,
    /// The longest time of one in which its thread did not compute: it waited for something, or for a processor.
    pub blocked_usec: u64,
    /// The longest that it was late when it had itself woken, whatever held it up; microseconds.
    pub latest_usec: u64,
}

/// How short memory is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pressure {
    /// `calm`, `attention`, `act`, `critical`.
    pub level: String,
    /// Available memory without the mapped weights of running models.
    pub headroom_bytes: Bytes,
    /// How fast it goes down, beyond what models were promised, as far as that may be taken to go on; bytes per second.
    pub falling_bytes: Bytes,
    /// The fastest that memory can be used up, as far as it is known; bytes per second. How soon the daemon looks again follows
    /// from it.
    pub fastest_bytes: Bytes,
    /// The share of the time in which some task waits for memory, per mille; absent without PSI.
    pub some_permille: Option<u16>,
    /// The share of the time in which all tasks do, per mille; absent without PSI.
    pub full_permille: Option<u16>,
    /// What was done last to keep the machine afloat, where anything was.
    pub last: Option<Decision>,
}

/// A pool of memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pool {
    /// `memory`, a GPU's name such as `card0`, or `llm.slice`.
    pub name: String,
    /// What there is of it.
    pub total_bytes: Bytes,
    /// What models may hold of it in all: less the reserve and less what the system uses.
    pub capacity_bytes: Bytes,
    /// What reservations hold of it.
    pub reserved_bytes: Bytes,
    /// What models were measured to hold of it.
    pub measured_bytes: Bytes,
    /// What could still be promised.
    pub headroom_bytes: Bytes,
}

/// Memory that was expected back and did not come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Quarantined {
    /// Of which model.
    pub instance: String,
    /// From which pool it is missing.
    pub pool: String,
    /// How much.
    pub bytes: Bytes,
    /// Since when; milliseconds since boot.
    pub since_msec: u64,
}

/// Swap of the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Swap {
    /// SwapTotal.
    pub total_bytes: Bytes,
    /// SwapTotal less SwapFree.
    pub used_bytes: Bytes,
    /// What the daemon's own swapfiles may still take, by its settings and what is free on their disks.
    pub room_bytes: Bytes,
    /// Every swap area, and the daemon's own swapfiles that are not in use.
    pub areas: Vec<SwapArea>,
}

/// A swap area.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SwapArea {
    /// The name of one of the daemon's own, to remove it by; empty for all others.
    pub name: String,
    /// `plan` (made for a model), `person` (made by hand), or `other`.
    pub owner: String,
    /// Its file or device.
    pub path: String,
    /// What it can hold.
    pub size_bytes: Bytes,
    /// What it holds.
    pub used_bytes: Bytes,
    /// The larger is used first.
    pub priority: i32,
    /// The kernel uses it.
    pub active: bool,
}

/// Bytes by the classes that behave differently.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Classes {
    /// Weights that stay pages of their files: reclaimable.
    pub mapped_bytes: Bytes,
    /// Host memory that only ends with the process.
    pub private_bytes: Bytes,
    /// Memory of all GPUs.
    pub gpu_bytes: Bytes,
    /// What of it is in swap.
    pub swapped_bytes: Bytes,
}

impl Classes {
    /// Everything that is resident.
    #[must_use]
    pub fn total(&self) -> Bytes {
        self.mapped_bytes + self.private_bytes + self.gpu_bytes
    }
}

/// What a prediction rests on beyond the estimate; it has these bytes in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Basis {
    /// By how much the engine's own llama-fit-params is above the estimate.
    pub opinion_bytes: Bytes,
    /// By how much an earlier run of the same files, settings and engine was measured to take more than that.
    pub measured_bytes: Bytes,
}

/// A model's instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Model {
    /// The configured name.
    pub name: String,
    /// The name, or `NAME@N`.
    pub instance: String,
    /// `inactive`, `waiting`, `loading`, `running`, `stopping`, `failed`.
    pub state: String,
    /// A service of somebody else that was adopted.
    pub foreign: bool,
    /// 0 to 100; higher stays.
    pub priority: u8,
    /// Never evicted.
    pub pinned: bool,
    /// Context of all slots together, in tokens; 0 when it isn't known yet.
    pub context: u64,
    /// The configured context, when what runs was reduced.
    pub context_configured: u64,
    /// Slots.
    pub parallel: u64,
    /// Where it answers: `127.0.0.1:8003`.
    pub address: String,
    /// Main process, or 0.
    pub pid: u32,
    /// Requests in flight as its engine says; none where it does not say.
    pub requests: Option<u32>,
    /// When it was last known to serve a request, or became ready; milliseconds since boot.
    pub last_used_msec: Option<u64>,
    /// How long it has been idle: 0 while it serves.
    pub idle_seconds: Option<u64>,
    /// What the estimate says, corrected.
    pub predicted: Classes,
    /// What `predicted` rests on beyond the estimate.
    pub basis: Basis,
    /// What was read last.
    pub measured: Classes,
    /// Other names.
    pub aliases: Vec<String>,
    /// Labels.
    pub modes: Vec<String>,
    /// A sentence on it: why it failed or what it waits for.
    pub message: String,
}

/// Memory that is held for something that is no model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lease {
    /// Its name for people.
    pub name: String,
    /// Its name in decisions: `lease:NAME`, or `lease:NAME@N` for another of that name.
    pub lease: String,
    /// `waiting` or `held`.
    pub state: String,
    /// 0 to 100: only strictly lower ones are evicted for it.
    pub priority: u8,
    /// The process that holds it.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// What is held.
    pub predicted: Classes,
    /// What the process and all that it has started were measured to hold.
    pub measured: Classes,
    /// What it waits for.
    pub message: String,
}

/// A reader's view of a decision, taken or (`Plan`) only thought through: what `policy::Decision`
/// writes, read so that a newer daemon's words don't trouble an older command.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Decision {
    /// What was done: `admit`, `refuse`, `wait`, `evict`, `expire`, `restore`, `quarantine`, `relieve`.
    pub kind: String,
    /// Whom it is about; empty where it is the machine.
    pub instance: String,
    /// For whom, where one model had to go for another.
    pub for_instance: Option<String>,
    /// `fits`, `fits-after`, `fits-with-swap`, `streams`, `refused`, `unknown`.
    pub verdict: String,
    /// When: milliseconds since boot.
    pub at_msec: u64,
    /// Context that it is (or would be) started with, tokens.
    pub context: u64,
    /// The bytes that it was about: needed, freed, or missing.
    pub bytes: Bytes,
    /// What the bytes rest on beyond the estimate.
    pub basis: Basis,
    /// What is done for it, in order.
    pub steps: Vec<Step>,
    /// The numbers of a refusal.
    pub refusal: Option<Refusal>,
    /// The arithmetic of an admission or a refusal, pool by pool, before anything was done for it.
    pub pools: Vec<Account>,
    /// What was done to keep the machine afloat.
    pub relief: Option<Relief>,
    /// Only observed: what would have been done was not.
    pub observed: bool,
    /// One sentence with the arithmetic.
    pub text: String,
}

/// The arithmetic of a request in one pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Account {
    /// `memory`, a GPU's name, or `llm.slice`.
    pub name: String,
    /// Its size.
    pub total_bytes: Bytes,
    /// What of it may be promised in all.
    pub room_bytes: Bytes,
    /// What others were promised of it.
    pub held_bytes: Bytes,
    /// What is asked of it in addition.
    pub needed_bytes: Bytes,
    /// What was left of it.
    pub free_bytes: Bytes,
    /// What was missing in it.
    pub short_bytes: Bytes,
}

/// The numbers of what was done to keep the machine afloat.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Relief {
    /// `drop-cache`, `reclaim`, `add-swap`, `expire`, `stop`, `kill`, `nothing`.
    pub rescue: String,
    /// `calm`, `attention`, `act`, `critical`.
    pub level: String,
    /// How much memory was left.
    pub headroom_bytes: Bytes,
    /// How fast it went down, as far as that could be taken to go on; bytes per second.
    pub falling_bytes: Bytes,
    /// What would have been enough.
    pub needed_bytes: Bytes,
    /// What was expected to come back.
    pub expected_bytes: Bytes,
    /// What has come back; absent while that is not known.
    pub gained_bytes: Option<Bytes>,
}

/// One step of a plan.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Step {
    /// `drop-cache`, `stop`, `drop-all-cache`, `compact`, `add-swap`, `reduce-context`, `stream`, `swap`.
    pub step: String,
    /// The instance that it is done to.
    pub instance: String,
    /// Why this one: `expired`, `evicted`, `replaced`, `named`.
    pub reason: String,
    /// What it is expected to free.
    pub frees_bytes: Bytes,
    /// The context before, tokens.
    pub from: u64,
    /// The context afterwards, tokens.
    pub to: u64,
    /// Of `add-swap`: the size of the swapfile. Of `compact`: what is to be allocated.
    pub bytes: Bytes,
    /// Of `stream`: what of the mapped weights has its place in memory.
    pub resident_bytes: Bytes,
    /// Of `stream`: all of them.
    pub mapped_bytes: Bytes,
    /// Of `stream`: how far they are read ahead; 0: as the disk has it.
    pub read_ahead_bytes: Bytes,
    /// Of `swap`: what is left in swap.
    pub swapped_bytes: Bytes,
}

/// The numbers of a refusal, all of the pool that binds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Refusal {
    /// The smallest context that was allowed; tokens.
    pub context: u64,
    /// The size of the pool.
    pub pool_bytes: Bytes,
    /// What the model needs of it.
    pub needed_bytes: Bytes,
    /// What is left of it.
    pub free_bytes: Bytes,
    /// What is kept for the system.
    pub reserve_bytes: Bytes,
    /// What the rest of the system uses.
    pub system_bytes: Bytes,
    /// What models hold.
    pub models_bytes: Bytes,
    /// What stopping everything that may be stopped would free.
    pub evictable_bytes: Bytes,
    /// What is missing even then.
    pub short_bytes: Bytes,
    /// The models that stay.
    pub kept: Vec<Kept>,
    /// Why swap can't help, where it can't.
    pub no_swap: Option<String>,
    /// The complete command that would work, or the one that tells more.
    pub advice: String,
}

/// A model that stays, and why it does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Kept {
    /// Which.
    pub instance: String,
    /// What it holds in the pool that binds.
    pub bytes: Bytes,
    /// `pinned`, `priority 80`, or `still loading`.
    pub why: String,
}

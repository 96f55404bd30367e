//! One reading of the machine: everything a decision may look at, taken at one moment.
//!
//! `host` fills it from /proc, /sys and systemd, `sim` from a scenario. It is plain data: a
//! decision never reads anything else, so the same decision can be taken again from a log.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::swap::SwapArea;
use crate::bytes::Bytes;
use crate::config::Instance;

/// What identifies a file whatever its name: the device and inode numbers of fstat(2).
///
/// Mapped weights belong to the file, so several instances of one model share them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FileId {
    /// `st_dev`
    pub device: u64,
    /// `st_ino`
    pub inode: u64,
}

/// A reading of the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// Memory and swap of the whole machine.
    pub memory: Memory,
    /// The GPUs that engines can offload to, in the engine's order.
    pub gpus: Vec<Gpu>,
    /// `memory.max` of llm.slice or of a slice above it, where an administrator set one.
    pub slice_limit: Option<Bytes>,
    /// The model units that systemd knows, running or not.
    pub units: BTreeMap<Instance, Unit>,
    /// Instances whose start job is queued or running in systemd, admitted or not.
    pub starting: Vec<Instance>,
    /// Bytes of each known model file that are in the page cache.
    pub cached: BTreeMap<FileId, Bytes>,
    /// Swap areas in use, and swapfiles of the daemon's own that were left behind.
    pub swaps: Vec<SwapArea>,
    /// What swapfiles of the daemon's own may still be made, by its settings and by what is free on their disks.
    pub swap_room: Bytes,
    /// How memory is running short, where it is.
    pub pressure: Pressure,
    /// The control group outside of llm.slice that grows the most, where one grows, and what it holds without clean
    /// page cache: named when nothing of ours can help.
    pub eater: Option<(String, Bytes)>,
    /// The machine is going down (or a stop job stands for the daemon): nothing may be started.
    pub stopping: bool,
}

/// System-wide memory, from /proc/meminfo.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Memory {
    /// MemTotal.
    pub total: Bytes,
    /// MemAvailable, less CmaFree (which only movable pages can use), plus what the ZFS cache would give back.
    pub available: Bytes,
    /// MemFree, less CmaFree: what is free without reclaim.
    pub free: Bytes,
    /// What of it lies in blocks of 2 MiB or more (/proc/buddyinfo); unknown where that can't be read.
    #[serde(default)]
    pub free_large: Option<Bytes>,
    /// What of `available` MemAvailable leaves out: what the ZFS cache would give back.
    #[serde(default)]
    pub zfs: Bytes,
    /// SwapTotal.
    #[serde(default)]
    pub swap_total: Bytes,
    /// SwapFree.
    #[serde(default)]
    pub swap_free: Bytes,
}

/// Memory pressure on the whole machine, since the last reading.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Pressure {
    /// The share of the time in which some task waited for memory, by PSI; per mille. None without PSI.
    pub some: Option<u16>,
    /// The share of the time in which all tasks did; per mille. None without PSI.
    pub full: Option<u16>,
    /// How fast available memory goes down now; bytes per second, zero while it rises.
    pub falling: Bytes,
    /// How fast it can be expected to go down at most on this machine; bytes per second, zero while that is not known.
    /// It sets how often the machine has to be looked at, and never what is done.
    pub fastest: Bytes,
}

/// What kind of memory a GPU computes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GpuKind {
    /// An APU: its bytes are system memory (GTT), counted in both pools.
    Unified,
    /// A card with memory of its own.
    Discrete,
}

/// A GPU's memory pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Gpu {
    /// The card's name for people: `card0`, or the scenario's.
    pub name: String,
    /// Whose memory it is.
    pub kind: GpuKind,
    /// GTT size of an APU (plus its carve-out), VRAM size of a card.
    pub total: Bytes,
    /// What of it is in use, by anyone.
    pub used: Bytes,
}

/// A model unit as systemd and its cgroup show it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Unit {
    /// systemd's ActiveState, as far as it matters here.
    pub state: UnitState,
    /// MainPID, or 0.
    pub main_pid: u32,
    /// InvocationID in lower-case hexadecimal; empty when the unit never ran.
    pub invocation: String,
    /// What it holds.
    pub measured: Measured,
    /// CPU time used so far, from its cgroup's cpu.stat; microseconds. It shows activity.
    pub cpu_usec: u64,
    /// The share of the time since the last reading in which all tasks of its own control group waited for memory;
    /// per mille, none without PSI.
    pub stalled: Option<u16>,
    /// How many of its processes the kernel has killed for want of memory: `oom_kill` of memory.events.
    pub oom_kills: u64,
    /// What its engine said of its requests when it was asked last; none where it does not say.
    pub busy: Option<Busy>,
    /// Largest MemoryMax that the administrator allows this unit, where one is set.
    pub admin_limit: Option<Bytes>,
}

impl Unit {
    /// Requests in flight as its engine said last; none where it does not say.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.busy.map_or(0, |busy| busy.requests)
    }
}

/// What an engine says of its requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Busy {
    /// In flight: worked on, and queued where it says so.
    pub requests: u32,
    /// Another one when a request was taken since.
    pub mark: u64,
    /// When it said so; milliseconds since boot.
    pub at: u64,
}

/// Life of a unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UnitState {
    /// Not running.
    #[default]
    Inactive,
    /// At the gate, or loading.
    Activating,
    /// Answering.
    Active,
    /// On its way out.
    Deactivating,
    /// Ended badly.
    Failed,
}

impl UnitState {
    /// Whether a process of the unit may exist and hold memory.
    #[must_use]
    pub fn is_alive(self) -> bool {
        matches!(self, Self::Activating | Self::Active | Self::Deactivating)
    }
}

/// Memory that a unit holds, by class; from its cgroup's memory.stat and its DRM clients.
///
/// memory.current is not here on purpose: it counts clean page cache too.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Measured {
    /// `anon` + `shmem` + unreclaimable `kernel` of memory.stat, swapped-out pages not counted.
    pub private: Bytes,
    /// File pages that are locked (`unevictable` less locked anonymous pages).
    pub locked_file: Bytes,
    /// Clean, mapped file pages: the resident part of mapped weights.
    pub file: Bytes,
    /// memory.swap.current.
    pub swapped: Bytes,
    /// Bytes on each GPU, in the order of [`Machine::gpus`]; empty when none are known.
    pub gpus: Vec<Bytes>,
}

impl Measured {
    /// Host memory that can't be reclaimed while the unit lives (without unified GPU memory).
    #[must_use]
    pub fn unreclaimable(&self) -> Bytes {
        self.private + self.locked_file
    }
}

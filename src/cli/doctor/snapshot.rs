//! What the checks look at: one reading of the machine, as plain data.

use std::path::{Path, PathBuf};

use crate::action::swapfile::rooms;
use crate::bytes::Bytes;
use crate::config::Swap;
use crate::host::{Card, Host, Kernel, Process};
use crate::ledger::{Memory, SwapArea};

/// Other programs that end processes when memory is short.
const KILLERS: [&str; 4] = ["systemd-oomd", "earlyoom", "nohang", "oomd"];

/// Pressure stall information.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pressure {
    /// The kernel tells it.
    On,
    /// It is built in and turned off.
    Off,
    /// The kernel has none.
    Missing,
}

/// Control groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Groups {
    /// Version 2 with memory accounted.
    Memory,
    /// Version 2 without it.
    WithoutMemory,
    /// Version 1, or a mix.
    Old,
}

/// One reading; what could not be read is absent.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The kernel that runs.
    pub kernel: Option<Kernel>,
    /// Its command line.
    pub arguments: Vec<String>,
    /// The distribution, and those that it is like.
    pub distributions: Vec<String>,
    /// The kind of container, in one.
    pub container: Option<String>,
    /// Pressure stall information.
    pub pressure: Pressure,
    /// Control groups.
    pub groups: Groups,
    /// Memory of the machine.
    pub memory: Option<Memory>,
    /// Its GPUs.
    pub cards: Vec<Card>,
    /// `amdgpu.gttsize` in MiB as the driver has it; -1 is not set.
    pub gttsize: Option<i64>,
    /// Its swap areas.
    pub swaps: Vec<SwapArea>,
    /// Whether swap is compressed in memory before it goes to disk (zswap).
    pub zswap: bool,
    /// Whether it would hibernate.
    pub hibernates: bool,
    /// Other programs that end processes when memory is short.
    pub killers: Vec<Process>,
    /// What the daemon's own swapfiles are allowed.
    pub swap: Swap,
    /// How much of each directory they may take.
    pub rooms: Vec<(PathBuf, Bytes)>,
    /// Whether a model is configured to run from swap.
    pub swaps_models: bool,
}

impl Snapshot {
    /// Reads what is found under `root`.
    pub fn read(root: &Path, swap: Swap, swaps_models: bool) -> Self {
        let host = Host::at(root);
        let below = |path: &PathBuf| root.join(path.strip_prefix("/").unwrap_or(path));
        let directories: Vec<PathBuf> = swap.directories.iter().map(below).collect();
        let pressure = match host.memory_pressure() {
            Ok(Some(_)) => Pressure::On,
            _ if host.knows_pressure() => Pressure::Off,
            _ => Pressure::Missing,
        };
        let groups = match (host.has_cgroup_v2(), host.has_memory_controller()) {
            (true, true) => Groups::Memory,
            (true, false) => Groups::WithoutMemory,
            (false, _) => Groups::Old,
        };
        Self {
            kernel: host.kernel().ok(),
            arguments: host.kernel_arguments(),
            distributions: host.distributions(),
            container: host.container(),
            pressure,
            groups,
            memory: host.memory().ok(),
            cards: host.cards().unwrap_or_default(),
            gttsize: host.module_parameter("amdgpu", "gttsize").and_then(|text| text.parse().ok()),
            swaps: host.swaps().unwrap_or_default(),
            zswap: host.module_parameter("zswap", "enabled").is_some_and(|on| on == "Y"),
            hibernates: host.hibernates(),
            killers: host.named_processes(&KILLERS),
            rooms: rooms(&directories, swap.max_size, swap.free_space),
            swap,
            swaps_models,
        }
    }
}

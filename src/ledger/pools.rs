//! The pools that memory comes out of, and what a set of reservations charges to each.

use std::collections::BTreeMap;

use serde::Serialize;

use super::footprint::Footprint;
use super::machine::{FileId, GpuKind, Machine};
use super::reservation::Reservation;
use crate::bytes::Bytes;

/// A pool that can run out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pool {
    /// System memory.
    Memory,
    /// The memory of GPU number n: GTT on an APU, VRAM on a card.
    Gpu(usize),
    /// The administrator's limit on llm.slice.
    Slice,
}

/// Bytes per pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PerPool {
    /// System memory.
    pub memory: Bytes,
    /// Each GPU, in the machine's order.
    pub gpus: Vec<Bytes>,
    /// llm.slice: charged like memory, but GPU bytes escape the cgroup.
    pub slice: Bytes,
}

impl PerPool {
    /// The pool in which `self` exceeds `capacity` the most, and by how much.
    #[must_use]
    pub fn shortfall(&self, capacity: &Self) -> Option<(Pool, Bytes)> {
        self.pairs(capacity)
            .map(|(pool, charge, room)| (pool, charge - room))
            .filter(|(_, short)| !short.is_zero())
            .max_by_key(|(_, short)| *short)
    }

    /// Each pool with its value here and in `other`.
    pub fn pairs<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = (Pool, Bytes, Bytes)> + 'a {
        let gpu = |n: usize, of: &Self| of.gpus.get(n).copied().unwrap_or_default();
        [(Pool::Memory, self.memory, other.memory), (Pool::Slice, self.slice, other.slice)].into_iter().chain(
            (0..self.gpus.len().max(other.gpus.len()))
                .map(move |n| (Pool::Gpu(n), gpu(n, self), gpu(n, other))),
        )
    }
}

/// A running sum of charges: adds footprints, counting each mapped file once (its largest share).
#[derive(Clone, Debug, Default)]
pub struct Charge {
    private: Bytes,
    gpus: Vec<Bytes>,
    files: BTreeMap<FileId, Bytes>,
}

impl Charge {
    /// Adds one holder.
    pub fn add(&mut self, footprint: &Footprint) {
        self.private += footprint.private;
        if self.gpus.len() < footprint.gpus.len() {
            self.gpus.resize(footprint.gpus.len(), Bytes::ZERO);
        }
        for (sum, gpu) in self.gpus.iter_mut().zip(&footprint.gpus) {
            *sum += *gpu;
        }
        for mapped in &footprint.mapped {
            let share = self.files.entry(mapped.file).or_default();
            *share = (*share).max(mapped.bytes);
        }
    }

    /// What is charged to each pool of `machine`.
    #[must_use]
    pub fn per_pool(&self, machine: &Machine) -> PerPool {
        let host = self.private + self.files.values().copied().sum();
        let mut gpus = self.gpus.clone();
        gpus.resize(machine.gpus.len().max(gpus.len()), Bytes::ZERO);
        PerPool { memory: host + unified(machine, &self.gpus), slice: host, gpus }
    }
}

/// The part of per-GPU bytes that is system memory. A GPU that the machine doesn't show is taken
/// for a unified one: its bytes have to come from somewhere.
pub(super) fn unified(machine: &Machine, gpus: &[Bytes]) -> Bytes {
    gpus.iter()
        .enumerate()
        .filter(|(n, _)| machine.gpus.get(*n).is_none_or(|gpu| gpu.kind == GpuKind::Unified))
        .map(|(_, bytes)| *bytes)
        .sum()
}

/// How much of each pool models may hold in all, on `machine` as it is now.
///
/// Memory: MemTotal less the reserve less what the rest of the system uses, which is what is not
/// available and not held by a model. Memory that a stopped model did not give back counts as the
/// system's here, and so is not promised twice.
#[must_use]
pub fn capacity(
    machine: &Machine,
    reserve: Bytes,
    holders: &BTreeMap<crate::config::Instance, Reservation>,
) -> PerPool {
    let mut held = Bytes::ZERO;
    let mut held_gpus = vec![Bytes::ZERO; machine.gpus.len()];
    for reservation in holders.values() {
        held += reservation.measured.unreclaimable() + unified(machine, &reservation.measured.gpus);
        for (sum, gpu) in held_gpus.iter_mut().zip(&reservation.measured.gpus) {
            *sum += *gpu;
        }
    }
    let memory = &machine.memory;
    let system = (memory.total - memory.available) - held;
    PerPool {
        memory: memory.total - reserve - system,
        gpus: machine.gpus.iter().zip(&held_gpus).map(|(gpu, held)| gpu.total - (gpu.used - *held)).collect(),
        slice: machine.slice_limit.unwrap_or(Bytes::MAX),
    }
}

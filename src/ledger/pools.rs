//! The pools that memory comes out of, and what a set of holders charges to each.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::footprint::Footprint;
use super::machine::{FileId, GpuKind, Machine};
use super::reservation::Reservation;
use crate::bytes::Bytes;
use crate::config::Instance;

/// A pool that can run out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
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

    /// Whether nothing exceeds `capacity`.
    #[must_use]
    pub fn within(&self, capacity: &Self) -> bool {
        self.pairs(capacity).all(|(_, charge, room)| charge <= room)
    }

    /// The bytes of one pool.
    #[must_use]
    pub fn get(&self, pool: Pool) -> Bytes {
        match pool {
            Pool::Memory => self.memory,
            Pool::Slice => self.slice,
            Pool::Gpu(n) => self.gpus.get(n).copied().unwrap_or_default(),
        }
    }

    /// Each pool with its value here and in `other`.
    pub fn pairs<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = (Pool, Bytes, Bytes)> + 'a {
        let gpus = (0..self.gpus.len().max(other.gpus.len())).map(Pool::Gpu);
        [Pool::Memory, Pool::Slice]
            .into_iter()
            .chain(gpus)
            .map(move |pool| (pool, self.get(pool), other.get(pool)))
    }
}

/// What a set of holders charges, kept so that the question "and without these?" is cheap: it costs
/// by how many are left out, not by how many there are.
///
/// Each mapped file is charged once, at the largest share that any holder wants of it.
#[derive(Clone, Debug, Default)]
pub struct Charges {
    /// Each, and whether it is outside of llm.slice.
    holders: Vec<(Footprint, bool)>,
    private: Bytes,
    /// What of it is outside of llm.slice.
    outside: Bytes,
    mapped: Bytes,
    gpus: Vec<Bytes>,
    files: BTreeMap<FileId, Vec<(usize, Bytes)>>,
}

impl Charges {
    /// Adds a holder and returns its number, counted from 0.
    pub fn add(&mut self, footprint: Footprint) -> usize {
        self.add_in(footprint, false)
    }

    /// Adds the holder `instance`; what is no model is not in llm.slice.
    pub fn add_holder(&mut self, instance: &Instance, reservation: &Reservation) -> usize {
        self.add_in(reservation.held(), instance.is_foreign() || instance.lease)
    }

    fn add_in(&mut self, footprint: Footprint, outside: bool) -> usize {
        if outside {
            self.outside += footprint.private;
        }
        let number = self.holders.len();
        self.private += footprint.private;
        add_gpus(&mut self.gpus, &footprint.gpus);
        for mapped in &footprint.mapped {
            let shares = self.files.entry(mapped.file).or_default();
            let before = largest(shares, |_| true);
            shares.push((number, mapped.bytes));
            self.mapped += mapped.bytes - before;
        }
        self.holders.push((footprint, outside));
        number
    }

    /// What is charged to each pool of `machine` by all holders but those in `without`, and by
    /// `plus` on top.
    #[must_use]
    pub fn per_pool(&self, machine: &Machine, without: &[usize], plus: Option<&Footprint>) -> PerPool {
        let (mut private, mut mapped, mut gpus) = (self.private, self.mapped, self.gpus.clone());
        let mut outside_of_slice = self.outside;
        gpus.resize(gpus.len().max(machine.gpus.len()), Bytes::ZERO);
        // The shares of files that someone lets go of or wants more of: the rest is as it was.
        let mut shares: BTreeMap<FileId, Bytes> = BTreeMap::new();
        if let Some(plus) = plus {
            private += plus.private;
            add_gpus(&mut gpus, &plus.gpus);
            for wanted in &plus.mapped {
                let share = shares.entry(wanted.file).or_default();
                *share = wanted.bytes.max(*share);
            }
        }
        let gone: BTreeSet<usize> = without.iter().copied().collect();
        for (footprint, outside) in gone.iter().filter_map(|n| self.holders.get(*n)) {
            private -= footprint.private;
            if *outside {
                outside_of_slice -= footprint.private;
            }
            for (sum, gpu) in gpus.iter_mut().zip(&footprint.gpus) {
                *sum -= *gpu;
            }
            for let_go in &footprint.mapped {
                shares.entry(let_go.file).or_default();
            }
        }
        for (file, share) in shares {
            let holders = self.files.get(&file).map_or(&[][..], |holders| holders);
            mapped -= largest(holders, |_| true);
            mapped += share.max(largest(holders, |n| !gone.contains(&n)));
        }
        let host = private + mapped;
        PerPool { memory: host + unified_bytes(machine, &gpus), slice: host - outside_of_slice, gpus }
    }
}

/// The largest of the shares whose holder `counts`.
fn largest(shares: &[(usize, Bytes)], counts: impl Fn(usize) -> bool) -> Bytes {
    shares.iter().filter(|(n, _)| counts(*n)).map(|(_, bytes)| *bytes).max().unwrap_or_default()
}

fn add_gpus(sums: &mut Vec<Bytes>, gpus: &[Bytes]) {
    sums.resize(sums.len().max(gpus.len()), Bytes::ZERO);
    for (sum, gpu) in sums.iter_mut().zip(gpus) {
        *sum += *gpu;
    }
}

/// The part of per-GPU bytes that is system memory. A GPU that the machine doesn't show is taken
/// for a unified one: its bytes have to come from somewhere.
#[must_use]
pub fn unified_bytes(machine: &Machine, gpus: &[Bytes]) -> Bytes {
    gpus.iter()
        .enumerate()
        .filter(|(n, _)| machine.gpus.get(*n).is_none_or(|gpu| gpu.kind == GpuKind::Unified))
        .map(|(_, bytes)| *bytes)
        .sum()
}

/// How much of each pool holders of reservations may hold in all, on `machine` as it is now.
///
/// Memory: MemTotal less the reserve less what the rest of the system uses, which is what is not
/// available and not held by a model. Memory that a stopped model did not give back counts as the
/// system's here, and so is never promised twice.
#[must_use]
pub fn capacity(machine: &Machine, reserve: Bytes, holders: &BTreeMap<Instance, Reservation>) -> PerPool {
    let mut held = Bytes::ZERO;
    let mut held_gpus = vec![Bytes::ZERO; machine.gpus.len()];
    for reservation in holders.values() {
        held += reservation.measured.unreclaimable() + unified_bytes(machine, &reservation.measured.gpus);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Gpu, Mapped};

    fn file(inode: u64) -> FileId {
        FileId { device: 1, inode }
    }

    fn holder(private: u64, inode: u64, mapped: u64, gpu: u64) -> Footprint {
        Footprint {
            private: Bytes::gib(private),
            mapped: vec![Mapped { file: file(inode), bytes: Bytes::gib(mapped) }],
            swapped: Bytes::ZERO,
            gpus: vec![Bytes::gib(gpu)],
        }
    }

    fn apu() -> Machine {
        let gpu =
            Gpu { name: "card0".into(), kind: GpuKind::Unified, total: Bytes::gib(120), used: Bytes::ZERO };
        Machine { gpus: vec![gpu], ..Machine::default() }
    }

    #[test]
    fn a_shared_file_is_charged_once_until_its_last_holder_is_gone() {
        let mut charges = Charges::default();
        let first = charges.add(holder(1, 7, 10, 0));
        let second = charges.add(holder(2, 7, 10, 0));
        let machine = Machine::default();
        assert_eq!(charges.per_pool(&machine, &[], None).memory, Bytes::gib(13));
        assert_eq!(charges.per_pool(&machine, &[first], None).memory, Bytes::gib(12));
        assert_eq!(charges.per_pool(&machine, &[first, second], None).memory, Bytes::ZERO);
        let third = holder(4, 7, 10, 0);
        assert_eq!(charges.per_pool(&machine, &[], Some(&third)).memory, Bytes::gib(17));
        assert_eq!(charges.per_pool(&machine, &[first, second], Some(&third)).memory, Bytes::gib(14));
    }

    #[test]
    fn unified_gpu_bytes_are_charged_to_both_pools_but_not_to_the_slice() {
        let mut charges = Charges::default();
        charges.add(holder(1, 7, 2, 30));
        let charged = charges.per_pool(&apu(), &[], None);
        assert_eq!((charged.memory, charged.slice), (Bytes::gib(33), Bytes::gib(3)));
        assert_eq!(charged.gpus, [Bytes::gib(30)]);
        let mut card = apu();
        card.gpus[0].kind = GpuKind::Discrete;
        assert_eq!(charges.per_pool(&card, &[], None).memory, Bytes::gib(3));
    }

    #[test]
    fn the_binding_pool_is_named() {
        let charge = PerPool { memory: Bytes(10), gpus: vec![Bytes(9)], slice: Bytes(1) };
        let room = PerPool { memory: Bytes(9), gpus: vec![Bytes(3)], slice: Bytes(1) };
        assert_eq!(charge.shortfall(&room), Some((Pool::Gpu(0), Bytes(6))));
        assert!(!charge.within(&room));
    }

    #[test]
    fn capacity_leaves_out_the_system_and_the_reserve() {
        let mut machine = apu();
        machine.memory = Memory {
            total: Bytes::gib(128),
            available: Bytes::gib(84),
            free: Bytes::gib(60),
            ..Memory::default()
        };
        machine.gpus[0].used = Bytes::gib(32);
        let mut holders = BTreeMap::new();
        let mut one = Reservation::for_test(holder(1, 7, 10, 30));
        one.measured.private = Bytes::gib(10);
        one.measured.gpus = vec![Bytes::gib(30)];
        holders.insert("a".parse().unwrap(), one);
        let room = capacity(&machine, Bytes::gib(4), &holders);
        // 44 not available, 40 of them the model's: the system uses 4.
        assert_eq!(room.memory, Bytes::gib(120));
        assert_eq!(room.gpus, [Bytes::gib(118)]);
    }

    use crate::ledger::Memory;
}

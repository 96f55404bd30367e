//! Would it run there? One estimate against one machine, without a daemon: what `plimsoll fit`
//! prints. The daemon's own decisions, which know who holds what, are in [`super::plan`].

use super::decision::Verdict;
use crate::bytes::Bytes;
use crate::fit::Estimate;
use crate::ledger::{Charges, FileId, Footprint, GpuKind, Machine, Mapped, PerPool, Pool};

/// What models may take of each pool of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// As things are, beside the models that run.
    pub now: PerPool,
    /// With every model stopped; never less than `now`.
    pub emptied: PerPool,
    /// Swap that is free.
    pub swap: Bytes,
}

impl Room {
    /// The room of `machine` when `reserve` is kept for the system and models hold `held` in all:
    /// `held.memory` of what is not available, and `held.gpus` of what is in use on each GPU.
    #[must_use]
    pub fn of(machine: &Machine, reserve: Bytes, held: &PerPool) -> Self {
        let memory = &machine.memory;
        let room = |held: &PerPool| PerPool {
            memory: (memory.available + held.memory).min(memory.total) - reserve,
            gpus: machine
                .gpus
                .iter()
                .enumerate()
                .map(|(n, gpu)| gpu.total - (gpu.used - held.gpus.get(n).copied().unwrap_or_default()))
                .collect(),
            slice: machine.slice_limit.unwrap_or(Bytes::MAX),
        };
        Self { now: room(&PerPool::default()), emptied: room(held), swap: memory.swap_free }
    }
}

/// A verdict with the numbers that it rests on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// In one word. `FitsAfter` means: after models that run are stopped.
    pub verdict: Verdict,
    /// The pool that is short with every model stopped, and by how much.
    pub short: Option<(Pool, Bytes)>,
    /// Swap that would make up for it; zero where none is needed or none would help.
    pub swap_needed: Bytes,
    /// Of the mapped weights, the share that stays resident, in thousandths; 1000 when all do.
    pub resident_per_mille: u64,
}

/// Judges a footprint. `always`: what every token touches of its mapped weights, without which in memory
/// nothing streams. `known`: whether the estimate covers all of it; where not, nothing is promised.
#[must_use]
pub fn judge(footprint: &Footprint, always: Bytes, known: bool, machine: &Machine, room: &Room) -> Judgement {
    let charge = Charges::default().per_pool(machine, &[], Some(footprint));
    let short = charge.shortfall(&room.emptied);
    let mut judgement =
        Judgement { verdict: Verdict::Fits, short, swap_needed: Bytes::ZERO, resident_per_mille: 1000 };
    judgement.verdict = match short {
        _ if !known => Verdict::Unknown,
        None if charge.within(&room.now) => Verdict::Fits,
        None => Verdict::FitsAfter,
        // GPU memory never counts on swap, and the slice's limit is the administrator's word.
        Some((Pool::Gpu(_) | Pool::Slice, _)) => Verdict::Refused,
        Some((Pool::Memory, missing)) => {
            let mapped = footprint.mapped_bytes();
            let may_go = mapped - always;
            let gpus_fit = footprint.gpus.iter().zip(&room.emptied.gpus).all(|(need, have)| need <= have);
            if !gpus_fit {
                Verdict::Refused
            } else if missing <= may_go {
                judgement.resident_per_mille = Bytes(1000).mul_div((mapped - missing).0, mapped.0).0;
                Verdict::Streams
            } else {
                // Mapped weights need no swap; what is left of the gap is private.
                let needed = missing - may_go;
                if needed <= footprint.private {
                    judgement.swap_needed = needed;
                    if needed <= room.swap { Verdict::FitsWithSwap } else { Verdict::Refused }
                } else {
                    Verdict::Refused
                }
            }
        }
    };
    judgement
}

/// What an estimate takes, as the ledger counts it. `files` identifies the model's shards in
/// their order; `gpus` says for each device that the estimate used which GPU of the machine it is.
#[must_use]
pub fn footprint(estimate: &Estimate, files: &[FileId], gpus: &[usize]) -> Footprint {
    let mut per_gpu = vec![Bytes::ZERO; gpus.iter().map(|n| n + 1).max().unwrap_or(0)];
    for (n, parts) in gpus.iter().zip(&estimate.devices) {
        per_gpu[*n] += Bytes(parts.total_bytes);
    }
    Footprint {
        private: Bytes(estimate.split.host.total_bytes) - Bytes(estimate.mapped_bytes),
        mapped: files
            .iter()
            .zip(&estimate.mapped_by_shard)
            .filter(|(_, bytes)| **bytes > 0)
            .map(|(file, bytes)| Mapped { file: *file, bytes: Bytes(*bytes) })
            .collect(),
        swapped: Bytes::ZERO,
        gpus: per_gpu,
    }
}

/// Whether the bytes of the machine's GPUs come out of its memory, as on an APU.
#[must_use]
pub fn unified(machine: &Machine) -> bool {
    machine.gpus.iter().any(|gpu| gpu.kind == GpuKind::Unified)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Gpu, Memory};

    fn machine(kind: GpuKind, available: u64) -> Machine {
        let memory = Memory {
            total: Bytes::gib(128),
            available: Bytes::gib(available),
            free: Bytes::gib(available),
            ..Memory::default()
        };
        let gpu = Gpu { name: "card0".into(), kind, total: Bytes::gib(120), used: Bytes::ZERO };
        Machine { memory, gpus: vec![gpu], ..Machine::default() }
    }

    fn takes(private: u64, mapped: u64, gpu: u64) -> Footprint {
        let file = FileId { device: 1, inode: 1 };
        Footprint {
            private: Bytes::gib(private),
            mapped: vec![Mapped { file, bytes: Bytes::gib(mapped) }],
            swapped: Bytes::ZERO,
            gpus: vec![Bytes::gib(gpu)],
        }
    }

    fn verdict(footprint: &Footprint, machine: &Machine, held: u64, swap: u64) -> Judgement {
        let held = PerPool { memory: Bytes::gib(held), ..PerPool::default() };
        let mut room = Room::of(machine, Bytes::gib(4), &held);
        room.swap = Bytes::gib(swap);
        judge(footprint, Bytes::gib(10), true, machine, &room)
    }

    #[test]
    fn unified_gpu_memory_comes_out_of_both_pools() {
        let apu = machine(GpuKind::Unified, 124);
        assert_eq!(verdict(&takes(10, 0, 110), &apu, 0, 0).verdict, Verdict::Fits);
        let short = verdict(&takes(20, 0, 110), &apu, 0, 0);
        assert_eq!((short.verdict, short.short), (Verdict::Refused, Some((Pool::Memory, Bytes::gib(10)))));
        let card = machine(GpuKind::Discrete, 124);
        assert_eq!(verdict(&takes(20, 0, 110), &card, 0, 0).verdict, Verdict::Fits);
        assert_eq!(verdict(&takes(1, 0, 121), &card, 0, 900).verdict, Verdict::Refused);
    }

    #[test]
    fn room_that_models_hold_is_room_after_them() {
        let busy = machine(GpuKind::Discrete, 50);
        assert_eq!(verdict(&takes(46, 0, 0), &busy, 60, 0).verdict, Verdict::Fits);
        assert_eq!(verdict(&takes(47, 0, 0), &busy, 60, 0).verdict, Verdict::FitsAfter);
        assert_eq!(verdict(&takes(107, 0, 0), &busy, 60, 0).verdict, Verdict::Refused);
    }

    #[test]
    fn mapped_weights_stream_and_private_bytes_swap() {
        let host = machine(GpuKind::Discrete, 124);
        let streams = verdict(&takes(20, 200, 0), &host, 0, 0);
        assert_eq!((streams.verdict, streams.resident_per_mille), (Verdict::Streams, 500));
        let swaps = verdict(&takes(150, 0, 0), &host, 0, 32);
        assert_eq!((swaps.verdict, swaps.swap_needed), (Verdict::FitsWithSwap, Bytes::gib(30)));
        // What every token touches of the weights stays, and has private bytes make way.
        let both = verdict(&takes(115, 200, 0), &host, 0, 64);
        assert_eq!((both.verdict, both.swap_needed), (Verdict::FitsWithSwap, Bytes::gib(5)));
        // Not enough swap: refused, and how much it would take is still said.
        let refused = verdict(&takes(150, 0, 0), &host, 0, 8);
        assert_eq!((refused.verdict, refused.swap_needed), (Verdict::Refused, Bytes::gib(30)));
    }

    #[test]
    fn an_unknown_size_promises_nothing() {
        let host = machine(GpuKind::Discrete, 124);
        let room = Room::of(&host, Bytes::gib(4), &PerPool::default());
        assert_eq!(judge(&takes(1, 0, 0), Bytes::ZERO, false, &host, &room).verdict, Verdict::Unknown);
    }
}

//! The cgroup limits that go with a reservation.

use serde::{Deserialize, Serialize};

use crate::bytes::Bytes;
use crate::ledger::Footprint;

/// Limits for a unit's cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Limits {
    /// MemoryHigh=: beyond it the kernel reclaims from the unit.
    pub high: Bytes,
    /// MemoryMax=: beyond it the unit's own OOM kill.
    pub max: Bytes,
    /// MemorySwapMax=; `None` leaves the administrator's.
    pub swap_max: Option<Bytes>,
}

/// How far the files of a model that streams are read ahead, where `expert` bytes lie together for one of its experts;
/// zero: as the disk has it.
///
/// A page fault reads so much around it, half of that before (`do_sync_mmap_readahead`): far more than an expert drives
/// others out of memory that are wanted, and far less waits for the disk many times for one. llama.cpp doubles what
/// the disk has (POSIX_FADV_SEQUENTIAL), so it is the largest power of two within half an expert.
#[must_use]
pub fn read_ahead(expert: Bytes) -> Bytes {
    const LEAST: u64 = 64 << 10;
    const MOST: u64 = 4 << 20;
    if expert.is_zero() {
        return Bytes::ZERO;
    }
    let half = (expert.0 / 2).clamp(LEAST, MOST);
    Bytes(1 << half.ilog2())
}

/// The limits for a model that takes `footprint`.
///
/// A cgroup is charged for the host's side only: GPU memory escapes it, and no limit can hold it.
/// MemoryHigh leaves a tenth (at least 256 MiB) over the estimate, MemoryMax the same again: a model
/// that is a little larger than predicted is measured and charged for it, not killed. One that streams
/// would fill whatever it is given with weights, so its margin is that of its private bytes; one that swaps,
/// with what belongs in swap, so it has none.
#[must_use]
pub fn limits(footprint: &Footprint, may_swap: bool, streams: bool) -> Limits {
    let host = footprint.private + footprint.mapped_bytes();
    if !footprint.swapped.is_zero() {
        return Limits { high: host, max: host + Bytes::mib(256), swap_max: None };
    }
    let measured_by = if streams { footprint.private } else { host };
    let margin = measured_by.mul_div(1, 10).max(Bytes::mib(256));
    Limits { high: host + margin, max: host + margin + margin, swap_max: (!may_swap).then_some(Bytes::ZERO) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expert_is_read_in_about_two_steps() {
        assert_eq!(read_ahead(Bytes::ZERO), Bytes::ZERO);
        assert_eq!(read_ahead(Bytes(278_528)), Bytes(128 << 10));
        assert_eq!(read_ahead(Bytes(3_100_000)), Bytes(1 << 20));
        assert_eq!(read_ahead(Bytes(9_000)), Bytes(64 << 10));
        assert_eq!(read_ahead(Bytes::gib(1)), Bytes::mib(4));
    }
}

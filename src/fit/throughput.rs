//! How fast a model answers that is larger than memory: what a token reads from disk.

use super::{Estimate, Facts};

/// What disks for models read, in bytes a second, where none is named: a SATA SSD or an NVMe drive under load, and
/// a PCIe 4.0 NVMe drive at its best. Assumed, not measured.
pub const DISK_SPEEDS: [u64; 2] = [500_000_000, 7_000_000_000];

/// What one token takes of the mapped weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Bytes of mapped weights that it touches.
    pub touched_bytes: u64,
    /// What of them is not in memory, and is read from disk.
    pub read_bytes: u64,
}

/// What a token reads when `resident` bytes of the mapped weights have their place in memory; none when
/// what every token touches doesn't fit there, and all of it would be read for each one.
///
/// `touched = always + experts · used / all`: of the experts of a layer a token uses a few. What every token
/// touches stays in memory, since nothing is used more often; the rest of `resident` holds experts. Taken that
/// routers choose them evenly, a token misses as large a share of those it uses as is missing of all:
/// `read = experts · used / all · (1 − (resident − always) / experts)`. Routers have favourites, so it is rather
/// less.
#[must_use]
pub fn reading(facts: &Facts, estimate: &Estimate, resident: u64) -> Option<Reading> {
    let (always, experts) = (estimate.mapped_always_bytes, estimate.mapped_experts_bytes);
    let kept = resident.checked_sub(always)?.min(experts);
    let used = facts.layers.iter().map(|layer| layer.experts_used).max().unwrap_or(0).min(facts.experts);
    let of_used = |bytes: u64| scaled(bytes, used, facts.experts);
    Some(Reading {
        touched_bytes: always.saturating_add(of_used(experts)),
        read_bytes: of_used(experts - kept),
    })
}

/// `bytes · part / whole`, rounded up; nothing of nothing.
fn scaled(bytes: u64, part: u64, whole: u64) -> u64 {
    let scaled = (u128::from(bytes) * u128::from(part)).div_ceil(u128::from(whole.max(1)));
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

/// Tokens a second, in thousandths, that a disk of `speed` bytes a second allows: an upper bound, since computing
/// takes its time too. None when nothing is read.
#[must_use]
pub fn millitokens_per_second(reading: &Reading, speed: u64) -> Option<u64> {
    (reading.read_bytes > 0).then(|| scaled(speed, 1000, reading.read_bytes))
}

//! The clock that decisions and identities go by.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Since boot, suspend included: the same for every process, and never set.
#[must_use]
pub fn since_boot() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default()
}

//! Writes to control groups (version 2) that systemd has no call for.
//!
//! Directories are given as `host::Host::group_directory` has them.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::libc;

use super::Changed;
use crate::bytes::Bytes;

/// Reclaimed at a time: small enough for the deadline to hold, since one write can't be cut short.
const STEP: Bytes = Bytes::mib(256);

/// What reclaiming changed: memory.current of the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reclaimed {
    /// Before.
    pub before: Bytes,
    /// After; above the target when the rest can't be reclaimed.
    pub after: Bytes,
}

/// Reclaims from a group until its usage is at `target`, nothing more is to be had, or the
/// deadline has passed. Blocks for as long.
///
/// Done before a limit is lowered below usage: that write would block systemd's main loop until
/// the kernel has reclaimed as much (or, for MemoryMax, has killed).
pub fn reclaim(group: &Path, target: Bytes, deadline: Instant) -> io::Result<Reclaimed> {
    let before = current(group)?;
    let mut now = before;
    while now > target && Instant::now() < deadline {
        let step = (now - target).min(STEP);
        match write(group, "memory.reclaim", &step.0.to_string()) {
            // EAGAIN: the kernel got less than was asked for.
            Err(error) if error.raw_os_error() != Some(libc::EAGAIN) => return Err(error),
            _ => {}
        }
        let left = current(group)?;
        let gained = now - left;
        now = left;
        // Not by the outcome: without swap the kernel may report success with nothing reclaimed.
        if gained <= Bytes(step.0 / 8) {
            break;
        }
    }
    Ok(Reclaimed { before, after: now })
}

/// Reclaims so much from a group; see [`reclaim`].
///
/// # Errors
/// The group is gone, or the kernel does not know memory.reclaim (Linux 5.19).
pub fn reclaim_bytes(group: &Path, bytes: Bytes, limit: Duration) -> io::Result<Reclaimed> {
    reclaim(group, current(group)? - bytes, Instant::now() + limit)
}

/// Kills every process of a group and below it, cgroup.kill. For a unit that systemd could not
/// stop; follow with StopUnit, or `Restart=` starts it again.
pub fn kill(group: &Path) -> io::Result<Changed> {
    match write(group, "cgroup.kill", "1") {
        Ok(()) => Ok(Changed::Changed),
        Err(error) if is_gone(&error) => Ok(Changed::Unchanged),
        Err(error) => Err(error),
    }
}

/// memory.current.
fn current(group: &Path) -> io::Result<Bytes> {
    let text = std::fs::read_to_string(group.join("memory.current"))?;
    text.trim().parse().map(Bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
}

fn write(group: &Path, file: &str, text: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(group.join(file))?.write_all(text.as_bytes())
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

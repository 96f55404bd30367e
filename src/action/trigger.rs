//! Being woken by the kernel when memory is short: PSI triggers and memory.events.
//!
//! Both are files that poll(2) reports POLLPRI for (Documentation/accounting/psi.rst, cgroup-v2.rst), so nothing has to
//! look while nothing happens.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use nix::libc;

/// Who has to wait for memory for it to count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stalled {
    /// Any task.
    Some,
    /// All tasks at once.
    Full,
}

/// Has the kernel report (POLLPRI, once in a window) when tasks were stalled for `stall` within `window`. `file` is
/// /proc/pressure/memory or a control group's memory.pressure; POLLERR means that the group is gone.
///
/// # Errors
/// ENOENT: the kernel has no PSI; EOPNOTSUPP: it is turned off; EPERM or EINVAL: a window under two seconds without
/// CAP_SYS_RESOURCE.
pub fn pressure(file: &Path, who: Stalled, stall: Duration, window: Duration) -> io::Result<File> {
    let mut opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
        .open(file)?;
    let word = match who {
        Stalled::Some => "some",
        Stalled::Full => "full",
    };
    // The kernel overwrites the last byte with the end of its string: without the NUL, the last digit.
    let text = format!("{word} {} {}\0", stall.as_micros(), window.as_micros());
    opened.write_all(text.as_bytes())?;
    Ok(opened)
}

/// A control group's memory.events, which poll(2) reports POLLPRI (and POLLERR) for at each change; [`heard`] makes
/// ready for the next one.
///
/// # Errors
/// The group is gone, or its memory is not accounted.
pub fn events(group: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
        .open(group.join("memory.events"))?;
    heard(&file)?;
    Ok(file)
}

/// Reads the counters of [`events`], from when on only later changes are reported.
///
/// # Errors
/// The group is gone.
pub fn heard(events: &File) -> io::Result<()> {
    let mut counters = [0; 512];
    events.read_at(&mut counters, 0).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trigger_ends_with_its_nul() {
        let path = std::env::temp_dir().join(format!("plimsoll-trigger-{}", std::process::id()));
        std::fs::write(&path, "").unwrap();
        pressure(&path, Stalled::Some, Duration::from_millis(100), Duration::from_secs(1)).unwrap();
        let written = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(written, b"some 100000 1000000\0");
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        let nowhere = Path::new("/nowhere/memory.pressure");
        assert!(pressure(nowhere, Stalled::Full, Duration::from_secs(1), Duration::from_secs(2)).is_err());
        assert!(events(Path::new("/nowhere")).is_err());
    }
}

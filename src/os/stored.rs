//! Descriptors that the service manager hands over at the start, sd_listen_fds_with_names(3).

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// The first of them.
const FIRST: RawFd = 3;
/// A store never has more.
const MOST: RawFd = 4096;

/// What the service manager has kept for this process across its restart, with their names. Once: later calls get
/// nothing.
#[must_use]
pub fn stored_descriptors() -> Vec<(String, OwnedFd)> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let variable = |name| std::env::var(name).ok();
    let count =
        count(variable("LISTEN_PID").as_deref(), variable("LISTEN_FDS").as_deref(), std::process::id());
    if count == 0 || TAKEN.swap(true, Ordering::Relaxed) {
        return Vec::new();
    }
    let names = variable("LISTEN_FDNAMES").unwrap_or_default();
    let named = (FIRST..FIRST + count)
        .zip(names.split(':').map(str::to_owned).chain(std::iter::repeat(String::new())));
    let take = |(raw, name): (RawFd, String)| {
        // SAFETY: the service manager has put a descriptor here for this process before it was executed, nobody else
        // owns it, and this is done once. Should there be none all the same, closing it later fails and harms nobody.
        let owned = unsafe { OwnedFd::from_raw_fd(raw) };
        // No child is to have it.
        match fcntl(&owned, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
            Ok(_) => Some((name, owned)),
            Err(_) => {
                // It is not open, so it is not ours to close.
                std::mem::forget(owned);
                None
            }
        }
    };
    named.filter_map(take).collect()
}

fn count(pid: Option<&str>, count: Option<&str>, own: u32) -> RawFd {
    let meant = pid.and_then(|pid| pid.parse::<u32>().ok()) == Some(own);
    count
        .and_then(|count| count.parse::<RawFd>().ok())
        .filter(|n| meant && (0..=MOST).contains(n))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_for_the_process_that_is_named() {
        assert_eq!(count(Some("7"), Some("2"), 7), 2);
        assert_eq!(count(Some("8"), Some("2"), 7), 0);
        assert_eq!(count(None, Some("2"), 7), 0);
        for absurd in ["-1", "x", "", "99999"] {
            assert_eq!(count(Some("7"), Some(absurd), 7), 0, "{absurd}");
        }
    }
}

//! The daemon's own memory.

/// Gives memory that is free inside of this process back to the system, where the C library has
/// a call for it.
pub fn release_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes a number and only touches the allocator's own structures.
    unsafe {
        nix::libc::malloc_trim(0);
    }
}

/// Locks this process's pages, those that it has and those that it will touch, so that it can act
/// when nothing can be read in.
///
/// # Errors
/// Without CAP_IPC_LOCK the limit of locked memory (LimitMEMLOCK=) is too low.
pub fn lock_memory() -> nix::Result<()> {
    use nix::sys::mman::{MlockAllFlags, mlockall};
    // Not in nix yet. On fault: what is never touched costs nothing.
    let on_fault = MlockAllFlags::from_bits_retain(nix::libc::MCL_ONFAULT);
    mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE | on_fault)
}

/// Unmaps the pages of this process's code that are in memory: what runs again is mapped again, a few pages around each that
/// is touched, and what only ran at the start is not.
///
/// They stay in the page cache for as long as the kernel likes. Nothing happens before Linux 5.18, which can't do it for
/// locked memory.
pub fn release_code() {
    use nix::libc;
    use procfs::process::{MMPermissions, MMapPath, Process};
    /// Of linux/mman.h; MADV_DONTNEED that takes locked pages too.
    const MADV_DONTNEED_LOCKED: libc::c_int = 24;
    const CODE: MMPermissions =
        MMPermissions::READ.union(MMPermissions::EXECUTE).union(MMPermissions::PRIVATE);
    let Ok(maps) = Process::myself().and_then(|own| own.maps()) else { return };
    for map in maps.iter().filter(|map| map.perms == CODE && matches!(map.pathname, MMapPath::Path(_))) {
        let (from, to) = map.address;
        let (Ok(start), Ok(length)) = (usize::try_from(from), usize::try_from(to - from)) else { continue };
        // SAFETY: a private mapping of a file that has never been writable since the loader made it, so that every page of
        // it is the file's and the next access, also that of this very function, maps the same bytes again.
        unsafe { libc::madvise(start as *mut libc::c_void, length, MADV_DONTNEED_LOCKED) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What of this process's code is mapped; kB.
    fn mapped_code() -> u64 {
        let own = procfs::process::Process::myself().unwrap();
        let maps = own.smaps().unwrap();
        let code = maps.iter().filter(|map| map.perms.contains(procfs::process::MMPermissions::EXECUTE));
        code.filter_map(|map| map.extension.map.get("Rss")).sum()
    }

    #[test]
    fn code_that_was_released_runs_on() {
        // Other tests run meanwhile and map theirs again.
        let less = |_| {
            let before = mapped_code();
            release_code();
            mapped_code() < before
        };
        assert!((0..100).any(less));
    }
}

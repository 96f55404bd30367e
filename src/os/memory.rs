//! The daemon's own memory.

use nix::sys::prctl::{get_thp_disable, set_thp_disable};

/// Gives memory that is free inside of this process back to the system, where the C library has
/// a call for it.
pub fn release_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes a number and only touches the allocator's own structures.
    unsafe {
        nix::libc::malloc_trim(0);
    }
}

/// Has this process, and what it executes, use no transparent huge pages (PR_SET_THP_DISABLE of prctl(2)).
///
/// The stack of a thread is as large as one, and where address randomisation puts it right, its first page is one: 2 MiB
/// that nobody uses, and locked (measured: in two of four starts).
///
/// # Errors
/// The kernel is older than 3.15.
pub fn refuse_huge_pages() -> nix::Result<()> {
    set_thp_disable(true)
}

/// Runs this with transparent huge pages, where other processes have them: for what is measured to hold for those.
pub fn with_huge_pages<T>(run: impl FnOnce() -> T) -> T {
    let refused = get_thp_disable().unwrap_or_default();
    // An older kernel has nothing to refuse them with.
    let _ = set_thp_disable(false);
    let done = run();
    let _ = set_thp_disable(refused);
    done
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

//! What is done to the machine: page cache, control groups, units, files of the daemon's own.
//!
//! Nothing here decides. Every action may be repeated, says what it changed, and is bounded in
//! time; those that block (page cache, reclaim, files) are for threads that may.

pub mod cgroup;
pub mod kernel;
pub mod last_rung;
pub mod notify;
pub mod page_cache;
pub mod read_ahead;
pub mod state_file;
pub mod swapfile;
pub mod systemd;
pub mod trigger;

/// What an action did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    /// Nothing: it was so already.
    Unchanged,
    /// It made what was not there.
    Created,
    /// It changed what was there.
    Changed,
}

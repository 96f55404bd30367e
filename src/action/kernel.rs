//! What the kernel is asked to do with memory as a whole.

use std::fs;
use std::io;
use std::path::Path;

/// Drops clean page cache of the whole machine. Blocks, for seconds where there is much of it.
///
/// It harms everyone who reads files: a last resort.
///
/// # Errors
/// Not permitted: in a container, or outside of plimsolld's unit.
pub fn drop_all_cache(root: &Path) -> io::Result<()> {
    // 1: page cache alone. 2 and 4 would drop directory entries and inodes, which are small and dear.
    fs::write(root.join("proc/sys/vm/drop_caches"), "1")
}

/// Moves pages about until free memory lies together. Blocks, for seconds where there is much to move.
///
/// # Errors
/// The kernel has no compaction, or it is not permitted.
pub fn compact(root: &Path) -> io::Result<()> {
    fs::write(root.join("proc/sys/vm/compact_memory"), "1")
}

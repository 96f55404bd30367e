//! Swap areas.

use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::mounts::unescape;
use super::{Host, HostError};
use crate::bytes::{Bytes, KIB};
use crate::ledger::SwapArea;

const SWAPS: &str = "/proc/swaps";

impl Host {
    /// The swap areas in use, in the order of /proc/swaps; none where the kernel has no swap at all.
    ///
    /// # Errors
    /// /proc can't be read.
    pub fn swaps(&self) -> Result<Vec<SwapArea>, HostError> {
        let text = self.read_if_there(SWAPS)?.unwrap_or_default();
        Ok(text.lines().skip(1).filter_map(area).collect())
    }
}

/// A line: file name with its blanks escaped, kind, size and use in KiB, priority.
fn area(line: &str) -> Option<SwapArea> {
    let mut words = line.split_whitespace();
    let name = unescape(words.next()?);
    // What the kernel appends once nobody can open the file any more.
    let name = name.as_bytes().strip_suffix(b" (deleted)").unwrap_or(name.as_bytes());
    let path = PathBuf::from(std::ffi::OsStr::from_bytes(name));
    let mut number = || words.next()?.parse::<u64>().ok();
    let _kind = number();
    let (size, used) = (Bytes(KIB) * number()?, Bytes(KIB) * number()?);
    let priority = words.next()?.parse().ok()?;
    Some(SwapArea { path, size, used, priority, active: true })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc_swaps_are_read() {
        let text = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n\
                    /dev/zram0                              partition\t4194300\t\t12\t\t100\n\
                    /var/a\\040b.swap                       file\t\t1048572\t\t0\t\t-2\n\
                    /x\\040(deleted)                        file\t\t8\t\t8\t\t-3\n\
                    broken line\n/x file y 0 0\n";
        let areas: Vec<SwapArea> = text.lines().skip(1).filter_map(area).collect();
        assert_eq!(areas.len(), 3, "{areas:?}");
        assert_eq!((areas[0].size, areas[0].used), (Bytes(4_194_300 * 1024), Bytes(12 * 1024)));
        assert!(areas[0].compressed() && !areas[1].compressed());
        assert_eq!((areas[1].path.to_str(), areas[1].priority), (Some("/var/a b.swap"), -2));
        assert_eq!(areas[2].path.to_str(), Some("/x"));
    }
}

//! Memory of the whole machine.

use std::path::PathBuf;

use super::{Host, HostError};
use crate::bytes::{Bytes, KIB};
use crate::ledger::Memory;

const MEMINFO: &str = "/proc/meminfo";
const BUDDYINFO: &str = "/proc/buddyinfo";
const ARCSTATS: &str = "/proc/spl/kstat/zfs/arcstats";

impl Host {
    /// The file of the machine's memory, for who has to look at it without this crate's comforts.
    #[must_use]
    pub fn meminfo_file(&self) -> PathBuf {
        self.path(MEMINFO)
    }

    /// Memory and swap as /proc/meminfo has them, corrected where MemAvailable lies: free memory
    /// of the contiguous allocator (CmaFree) takes only movable pages and is no room for a model,
    /// and what the cache of ZFS would give back is not counted as available.
    pub fn memory(&self) -> Result<Memory, HostError> {
        let text = self.read(MEMINFO)?;
        let field = |name: &str| meminfo(&text, name);
        let need = |name: &str, what| field(name).ok_or_else(|| self.content(MEMINFO, what));
        let total = need("MemTotal", "MemTotal")?;
        let available = need("MemAvailable", "MemAvailable")?;
        let free = need("MemFree", "MemFree")?;
        let cma_free = field("CmaFree").unwrap_or_default();
        let zfs = self.zfs_evictable();
        Ok(Memory {
            total,
            available: (available - cma_free + zfs).min(total),
            zfs,
            free: (free - cma_free).min(total),
            free_large: self.read(BUDDYINFO).ok().map(|text| large_blocks(&text)),
            swap_total: field("SwapTotal").unwrap_or_default(),
            swap_free: field("SwapFree").unwrap_or_default(),
        })
    }

    /// What the cache of ZFS (ARC) gives back under pressure; nothing without ZFS. In a container
    /// arcstats is the whole machine's and says nothing about the container's memory.
    fn zfs_evictable(&self) -> Bytes {
        match self.read(ARCSTATS) {
            Ok(text) if self.container().is_none() => arc_evictable(&text),
            _ => Bytes::ZERO,
        }
    }
}

/// Free memory in blocks of 2 MiB or more: each line of /proc/buddyinfo has behind the zone's name the numbers of free
/// blocks of one page, of two, of four and so on.
fn large_blocks(text: &str) -> Bytes {
    const PAGE: u64 = 4096;
    let zone = |line: &str| -> Bytes {
        let counts = line.split_whitespace().skip_while(|word| *word != "zone").skip(2);
        let blocks = counts.zip(0_u32..24).filter(|(_, order)| PAGE << order >= 2 << 20);
        blocks.map(|(count, order)| Bytes(count.parse().unwrap_or(0)) * (PAGE << order)).sum()
    };
    text.lines().map(zone).sum()
}

/// A field of /proc/meminfo.
fn meminfo(text: &str, name: &str) -> Option<Bytes> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let mut words = value.split_whitespace();
    let number: u64 = words.next()?.parse().ok()?;
    match words.next() {
        Some("kB") => Some(Bytes(KIB) * number),
        None => Some(Bytes(number)),
        Some(_) => None,
    }
}

/// What the ARC would give back: its clean buffers as long as what else it holds reaches its
/// minimum (c_min), else all above the minimum. The rule is that of OpenZFS's own shrinker,
/// arc_evictable_memory() in arc_os.c.
fn arc_evictable(text: &str) -> Bytes {
    let field = |name: &str| {
        text.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(name)).then(|| words.nth(1)?.parse().ok().map(Bytes))?
        })
    };
    let (Some(size), Some(minimum)) = (field("size"), field("c_min")) else {
        return Bytes::ZERO;
    };
    let clean: Bytes =
        ["mru_evictable_data", "mru_evictable_metadata", "mfu_evictable_data", "mfu_evictable_metadata"]
            .into_iter()
            .filter_map(field)
            .sum();
    if size - clean >= minimum { clean.min(size) } else { size - minimum }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_large_blocks_are_large() {
        let text = "Node 0, zone      DMA      0      0      0      0      0      0      0      0      1      1      2\n\
                    Node 0, zone   Normal   4000    300     20      9      8      7      6      5      4      3     10\n";
        // Of 2 MiB and of 4 MiB.
        assert_eq!(large_blocks(text), Bytes::mib(2 + 2 * 4 + 3 * 2 + 10 * 4));
        assert_eq!(large_blocks("nonsense"), Bytes::ZERO);
    }

    #[test]
    fn arc_gives_back_what_is_clean_but_keeps_its_minimum() {
        let stats = |size: u64, clean: u64| {
            format!(
                "13 1 0x01 96 26112 1 2\nname type data\nsize 4 {size}\nc_min 4 100\nc_max 4 900\nmru_evictable_data 4 {clean}\n"
            )
        };
        assert_eq!(arc_evictable(&stats(800, 500)), Bytes(500), "300 others hold the minimum");
        assert_eq!(arc_evictable(&stats(800, 750)), Bytes(700), "only 50 others: the minimum stays");
        assert_eq!(arc_evictable(&stats(50, 50)), Bytes::ZERO, "below its minimum");
        for text in ["", "size", "size 4", "size 4 x\nc_min 4 1", "c_min 4 1"] {
            assert_eq!(arc_evictable(text), Bytes::ZERO, "{text:?}");
        }
    }

    #[test]
    fn fields_that_make_no_sense_are_missing() {
        assert_eq!(meminfo("MemTotal:  2 kB\n", "MemTotal"), Some(Bytes(2048)));
        for text in ["MemTotalX: 2 kB", "MemTotal: -2 kB", "MemTotal:", "MemTotal: 2 MB", "MemTotal: é kB"] {
            assert_eq!(meminfo(text, "MemTotal"), None, "{text:?}");
        }
        assert_eq!(meminfo(&format!("MemTotal: {} kB", u64::MAX), "MemTotal"), Some(Bytes::MAX));
    }
}

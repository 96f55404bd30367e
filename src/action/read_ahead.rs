//! How far disks are read ahead of what is asked for.
//!
//! The kernel copies the setting of the disk into each file that is opened (`file_ra_state_init`), and a page fault in a
//! mapping reads so much around it (`do_sync_mmap_readahead`). There is no call that sets it for another process's file:
//! it is set for the disk while an engine opens its model, and set back afterwards.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};
use serde::{Deserialize, Serialize};

use super::state_file::{Loaded, StateFile};
use crate::bytes::Bytes;

/// What a disk had, and what it was given.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Changed {
    before_kib: u64,
    ours_kib: u64,
}

/// The disks' settings; what they were is in a file, so that it is not lost with this process.
#[derive(Debug)]
pub struct ReadAhead {
    root: PathBuf,
    changed: StateFile,
}

impl ReadAhead {
    /// Of the machine below `root`.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), changed: StateFile::at(root.join("run/plimsoll/read-ahead.json")) }
    }

    /// Has files on these devices (`st_dev`), opened from now on, read ahead by so much, and all other disks as they were.
    /// What somebody else has set meanwhile stays. Returns what was done, one sentence each. Blocks.
    ///
    /// # Errors
    /// What was there can't be remembered: nothing was changed.
    pub fn set(&self, devices: &BTreeMap<u64, Bytes>) -> Result<Vec<String>, String> {
        let before: BTreeMap<String, Changed> = match self.changed.load() {
            Ok(Loaded::Value(value)) => value,
            Ok(_) => BTreeMap::new(),
            Err(error) => return Err(error.to_string()),
        };
        // A disk that has none of its own (btrfs, network) is left alone.
        let wanted: BTreeMap<String, u64> = devices
            .iter()
            .filter_map(|(device, bytes)| Some((self.disk(*device)?, bytes.0 / 1024)))
            .collect();
        let mut after = BTreeMap::new();
        for (disk, ours_kib) in wanted {
            let Ok(now_kib) = self.read(&disk) else { continue };
            let before_kib = match before.get(&disk) {
                Some(known) if known.ours_kib == now_kib => known.before_kib,
                _ => now_kib,
            };
            after.insert(disk, Changed { before_kib, ours_kib });
        }
        // First remembered, then done.
        let all: BTreeMap<&String, &Changed> = before.iter().chain(&after).collect();
        self.changed.save(&all).map_err(|error| error.to_string())?;
        let mut said = Vec::new();
        for (disk, was) in before.iter().filter(|(disk, _)| !after.contains_key(*disk)) {
            if self.read(disk).is_ok_and(|now| now == was.ours_kib) {
                said.push(self.write(disk, was.before_kib));
            }
        }
        for (disk, changed) in &after {
            if self.read(disk).is_ok_and(|now| now != changed.ours_kib) {
                said.push(self.write(disk, changed.ours_kib));
            }
        }
        self.changed.save(&after).map_err(|error| error.to_string())?;
        Ok(said)
    }

    /// The name of the disk that a device is (a part of): that of its backing-dev-info.
    fn disk(&self, device: u64) -> Option<String> {
        let own = format!("{}:{}", major(device), minor(device));
        let directory = fs::canonicalize(self.root.join("sys/dev/block").join(&own)).ok()?;
        if !directory.join("partition").exists() {
            return Some(own);
        }
        let whole = fs::read_to_string(directory.parent()?.join("dev")).ok()?;
        Some(whole.trim().to_owned())
    }

    fn path(&self, disk: &str) -> PathBuf {
        self.root.join("sys/class/bdi").join(disk).join("read_ahead_kb")
    }

    fn read(&self, disk: &str) -> io::Result<u64> {
        let text = fs::read_to_string(self.path(disk))?;
        text.trim().parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
    }

    fn write(&self, disk: &str, kib: u64) -> String {
        match fs::write(self.path(disk), kib.to_string()) {
            Ok(()) => format!("files of disk {disk} that are opened now are read ahead by {kib} KiB"),
            Err(error) => format!("the read-ahead of disk {disk} can't be set to {kib} KiB: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::makedev;
    use std::os::unix::fs::symlink;

    /// A disk 259:0 with a partition 259:1, read ahead by 128 KiB.
    fn machine(name: &str) -> PathBuf {
        let root = std::env::temp_dir().join(format!("plimsoll-read-ahead-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        let disk = root.join("sys/devices/nvme0n1");
        fs::create_dir_all(disk.join("nvme0n1p1")).unwrap();
        fs::write(disk.join("dev"), "259:0\n").unwrap();
        fs::write(disk.join("nvme0n1p1/partition"), "1\n").unwrap();
        for directory in ["sys/dev/block", "sys/class/bdi/259:0", "run/plimsoll"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        symlink(&disk, root.join("sys/dev/block/259:0")).unwrap();
        symlink(disk.join("nvme0n1p1"), root.join("sys/dev/block/259:1")).unwrap();
        fs::write(root.join("sys/class/bdi/259:0/read_ahead_kb"), "128\n").unwrap();
        root
    }

    fn setting(root: &Path) -> String {
        fs::read_to_string(root.join("sys/class/bdi/259:0/read_ahead_kb")).unwrap().trim().to_owned()
    }

    #[test]
    fn a_partitions_disk_is_set_and_set_back_by_whoever_comes_next() {
        let root = machine("back");
        let wanted = BTreeMap::from([(makedev(259, 1), Bytes::mib(1)), (makedev(0, 40), Bytes::mib(1))]);
        assert_eq!(ReadAhead::new(&root).set(&wanted).unwrap().len(), 1);
        assert_eq!(setting(&root), "1024");
        // Twice is once, and what it was is not forgotten with the process.
        assert_eq!(ReadAhead::new(&root).set(&wanted).unwrap(), Vec::<String>::new());
        ReadAhead::new(&root).set(&BTreeMap::new()).unwrap();
        assert_eq!(setting(&root), "128");
        assert_eq!(ReadAhead::new(&root).set(&BTreeMap::new()).unwrap(), Vec::<String>::new());
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn what_somebody_else_has_set_meanwhile_stays() {
        let root = machine("other");
        ReadAhead::new(&root).set(&BTreeMap::from([(makedev(259, 0), Bytes::mib(2))])).unwrap();
        fs::write(root.join("sys/class/bdi/259:0/read_ahead_kb"), "512").unwrap();
        ReadAhead::new(&root).set(&BTreeMap::new()).unwrap();
        assert_eq!(setting(&root), "512");
        fs::remove_dir_all(root).unwrap();
    }
}

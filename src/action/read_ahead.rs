//! How far disks are read ahead of what is asked for.
//!
//! The kernel copies the setting of the disk into each file that is opened (`file_ra_state_init`), and a page fault in a
//! mapping reads so much around it (`do_sync_mmap_readahead`). There is no call that sets it for another process's file:
//! it is set for the disk while an engine opens its model, and set back afterwards.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nix::sys::stat::{major, minor};
use serde::{Deserialize, Serialize};

use super::state_file::{Loaded, StateFile};
use crate::bytes::Bytes;

/// What a disk had, and what it may have been given: two values while it is changed from one to the other.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Changed {
    before_kib: u64,
    ours_kib: Vec<u64>,
}

/// The disks' settings; what they were is in a file, so that it is not lost with this process.
#[derive(Debug)]
pub struct ReadAhead {
    root: PathBuf,
    /// One at a time.
    changed: Mutex<StateFile>,
}

impl ReadAhead {
    /// Of the machine below `root`.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        let changed = Mutex::new(StateFile::at(root.join("run/plimsoll/read-ahead.json")));
        Self { root: root.to_owned(), changed }
    }

    /// Has files on these devices (`st_dev`), opened from now on, read ahead by so much, and all other disks as they were.
    /// What somebody else has set meanwhile stays. Returns what was done, one sentence each. Blocks.
    ///
    /// # Errors
    /// A disk could not be set back, or what was there could not be remembered, without which none is changed. It is to be
    /// tried again.
    pub fn set(&self, devices: &BTreeMap<u64, Bytes>) -> Result<Vec<String>, String> {
        let file = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        let mut known: BTreeMap<String, Changed> = match file.load() {
            Ok(Loaded::Value(value)) => value,
            Ok(_) => BTreeMap::new(),
            Err(error) => return Err(error.to_string()),
        };
        // A disk that has none of its own (btrfs, network) is left alone.
        let mut wanted: BTreeMap<String, u64> = BTreeMap::new();
        for (device, bytes) in devices {
            let Some(disk) = self.disk(*device) else { continue };
            let of = wanted.entry(disk).or_insert(u64::MAX);
            *of = (bytes.0 / 1024).min(*of);
        }
        let (mut said, mut failed) = (Vec::new(), None);
        let mut done = |disk: &str, kib: u64| match self.write(disk, kib) {
            Ok(text) => {
                said.push(text);
                true
            }
            Err(why) => {
                failed = Some(why);
                false
            }
        };
        // First back, which needs nothing to be remembered.
        known.retain(|disk, was| {
            if wanted.contains_key(disk) {
                return true;
            }
            let ours = self.read(disk).is_ok_and(|now| was.ours_kib.contains(&now));
            ours && !done(disk, was.before_kib)
        });
        for (disk, ours) in &wanted {
            let Ok(now) = self.read(disk) else { continue };
            let was = known.entry(disk.clone()).or_insert(Changed { before_kib: now, ours_kib: Vec::new() });
            if !was.ours_kib.is_empty() && !was.ours_kib.contains(&now) {
                *was = Changed { before_kib: now, ours_kib: Vec::new() };
            }
            if !was.ours_kib.contains(ours) {
                was.ours_kib.push(*ours);
            }
        }
        // Remembered before it is done, and again without what is no longer there.
        file.save(&known).map_err(|error| error.to_string())?;
        for (disk, ours) in &wanted {
            if self.read(disk).is_ok_and(|now| now != *ours) && done(disk, *ours) {
                known.entry(disk.clone()).and_modify(|was| was.ours_kib = vec![*ours]);
            }
        }
        file.save(&known).map_err(|error| error.to_string())?;
        failed.map_or(Ok(said), Err)
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

    fn write(&self, disk: &str, kib: u64) -> Result<String, String> {
        match fs::write(self.path(disk), kib.to_string()) {
            Ok(()) => Ok(format!("files of disk {disk} that are opened now are read ahead by {kib} KiB")),
            Err(error) => Err(format!("the read-ahead of disk {disk} can't be set to {kib} KiB: {error}")),
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
    fn killed_between_two_values_the_first_one_is_still_known() {
        let root = machine("killed");
        let set = |kib: u64| {
            ReadAhead::new(&root).set(&BTreeMap::from([(makedev(259, 0), Bytes(kib << 10))])).unwrap();
        };
        set(1024);
        set(512);
        // As if the second had been remembered and not done.
        fs::write(
            root.join("run/plimsoll/read-ahead.json"),
            r#"{"259:0":{"before_kib":128,"ours_kib":[1024,512]}}"#,
        )
        .unwrap();
        fs::write(root.join("sys/class/bdi/259:0/read_ahead_kb"), "1024").unwrap();
        ReadAhead::new(&root).set(&BTreeMap::new()).unwrap();
        assert_eq!(setting(&root), "128");
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_disk_that_is_not_set_back_is_not_forgotten() {
        let root = machine("stuck");
        let disks = ReadAhead::new(&root);
        disks.set(&BTreeMap::from([(makedev(259, 0), Bytes::mib(1))])).unwrap();
        let (setting_file, away) = (root.join("sys/class/bdi/259:0/read_ahead_kb"), root.join("away"));
        // It can be read, and is no file that can be written.
        fs::rename(&setting_file, &away).unwrap();
        symlink("/proc/self/oom_score", &setting_file).unwrap();
        let score = fs::read_to_string(&setting_file).unwrap().trim().to_owned();
        let known = format!(r#"{{"259:0":{{"before_kib":128,"ours_kib":[{score}]}}}}"#);
        fs::write(root.join("run/plimsoll/read-ahead.json"), &known).unwrap();
        assert!(disks.set(&BTreeMap::new()).unwrap_err().contains("can't be set to 128 KiB"));
        let left = fs::read_to_string(root.join("run/plimsoll/read-ahead.json")).unwrap();
        assert!(left.contains("128"), "{left}");
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

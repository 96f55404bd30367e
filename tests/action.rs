//! `action` on real files and on a directory that stands in for a control group.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::fs::{File, Permissions};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use plimsoll::action::page_cache::{OpenError, drop_file, open_regular};
use plimsoll::action::state_file::{Loaded, StateFile};
use plimsoll::action::{Changed, cgroup};
use plimsoll::bytes::Bytes;
use plimsoll::ledger::FileId;
use plimsoll::os::resident_bytes;

/// A directory that is removed when the test ends.
struct Directory(PathBuf);

impl Directory {
    fn new(test: &str) -> Self {
        let path =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("action-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_file_is_dropped_from_the_page_cache() {
    let directory = Directory::new("drop");
    let path = directory.0.join("weights.gguf");
    let size = 8 << 20;
    File::create(&path).unwrap().write_all(&vec![7; size]).unwrap();
    let file = open_regular(&path, None).unwrap();
    assert_eq!(resident_bytes(&file).unwrap(), Bytes(size as u64), "written, and not yet on disk");
    let dropped = drop_file(&file).unwrap();
    assert_eq!(dropped.before, Bytes(size as u64));
    // A file system in memory has nowhere to drop to.
    let in_memory =
        nix::sys::statfs::fstatfs(&file).unwrap().filesystem_type() == nix::sys::statfs::TMPFS_MAGIC;
    assert_eq!(dropped.gain(), Bytes(if in_memory { 0 } else { size as u64 }));
    if !in_memory {
        assert!(drop_file(&file).unwrap().gain().is_zero(), "nothing is left to drop");
    }
}

#[test]
fn only_the_regular_file_meant_is_opened() {
    let directory = Directory::new("open");
    let path = directory.file("a.gguf", "GGUF");
    let link = directory.0.join("link.gguf");
    symlink(&path, &link).unwrap();
    let pipe = directory.0.join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();

    let metadata = std::fs::metadata(&path).unwrap();
    let id = {
        use std::os::unix::fs::MetadataExt;
        FileId { device: metadata.dev(), inode: metadata.ino() }
    };
    assert!(open_regular(&link, Some(id)).is_ok(), "links are followed");
    let other = FileId { inode: id.inode + 1, ..id };
    assert!(matches!(open_regular(&path, Some(other)), Err(OpenError::Replaced(_))));
    // A pipe that nobody writes to would hang.
    for path in [pipe.as_path(), directory.0.as_path(), Path::new("/dev/null")] {
        assert!(matches!(open_regular(path, None), Err(OpenError::NotRegular(_))), "{}", path.display());
    }
    assert!(matches!(open_regular(&directory.0.join("none"), None), Err(OpenError::Io { .. })));
}

#[test]
fn state_is_written_as_a_whole() {
    let directory = Directory::new("state");
    let path = directory.0.join("below/state.json");
    let state = StateFile::at(&path);
    assert_eq!(state.load::<Vec<u64>>().unwrap(), Loaded::Missing);
    assert_eq!(state.save(&[1u64, 2]).unwrap(), Changed::Created);
    assert_eq!(state.save(&[1u64, 2]).unwrap(), Changed::Unchanged);
    assert_eq!(state.save(&[3u64]).unwrap(), Changed::Changed);
    assert_eq!(state.load().unwrap(), Loaded::Value(vec![3u64]));
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let left: Vec<_> = std::fs::read_dir(path.parent().unwrap()).unwrap().collect();
    assert_eq!(left.len(), 1, "no temporary file stays");
    assert_eq!(state.remove().unwrap(), Changed::Changed);
    assert_eq!(state.remove().unwrap(), Changed::Unchanged);
}

#[test]
fn a_write_that_was_interrupted_is_no_obstacle_and_no_trap() {
    let directory = Directory::new("interrupted");
    let victim = directory.file("victim", "precious");
    let state = StateFile::at(directory.0.join("state.json"));
    symlink(&victim, directory.0.join("state.json.new")).unwrap();
    assert_eq!(state.save(&1).unwrap(), Changed::Created);
    assert_eq!(std::fs::read_to_string(&victim).unwrap(), "precious");
    assert_eq!(state.load().unwrap(), Loaded::Value(1));
}

#[test]
fn corrupt_state_is_moved_aside_and_said() {
    let directory = Directory::new("corrupt");
    let path = directory.file("state.json", "{\"half\": ");
    let state = StateFile::at(&path);
    let Loaded::Corrupt { moved_to, why } = state.load::<u64>().unwrap() else {
        panic!("a half-written file was taken for a number");
    };
    assert!(!why.is_empty());
    assert_eq!(std::fs::read_to_string(moved_to).unwrap(), "{\"half\": ");
    assert_eq!(state.load::<u64>().unwrap(), Loaded::Missing);

    File::create(&path).unwrap().set_len(1 << 40).unwrap();
    assert!(matches!(state.load::<u64>().unwrap(), Loaded::Corrupt { .. }), "endless");
    symlink("/dev/zero", &path).unwrap();
    assert!(state.load::<u64>().is_err(), "a link is not followed");
    let deep = directory.file("deep.json", &"[".repeat(100_000));
    assert!(matches!(StateFile::at(deep).load::<u64>().unwrap(), Loaded::Corrupt { .. }));
}

#[test]
fn a_state_that_cant_be_written_leaves_the_old_one() {
    let directory = Directory::new("unwritable");
    let state = StateFile::at(directory.0.join("state.json"));
    state.save(&1).unwrap();
    // A directory in the place of the temporary file stops root, too.
    std::fs::create_dir(directory.0.join("state.json.new")).unwrap();
    let error = state.save(&2).unwrap_err().to_string();
    assert!(error.starts_with("can't write ") && error.contains("state.json"), "{error}");
    assert_eq!(state.load().unwrap(), Loaded::Value(1));
}

#[test]
fn reclaim_ends_when_nothing_more_is_to_be_had() {
    // Writing to these files changes no usage, as in a group that holds only what can't be
    // reclaimed.
    let directory = Directory::new("reclaim");
    directory.file("memory.current", "1073741824\n");
    directory.file("memory.reclaim", "");
    let soon = Instant::now() + Duration::from_secs(600);
    let reclaimed = cgroup::reclaim(&directory.0, Bytes::mib(512), soon).unwrap();
    assert_eq!((reclaimed.before, reclaimed.after), (Bytes::gib(1), Bytes::gib(1)));
    assert_eq!(std::fs::read_to_string(directory.0.join("memory.reclaim")).unwrap(), "268435456");
    // Below the target, and past the deadline, nothing is written.
    directory.file("memory.reclaim", "");
    cgroup::reclaim(&directory.0, Bytes::gib(2), soon).unwrap();
    cgroup::reclaim(&directory.0, Bytes::ZERO, Instant::now()).unwrap();
    assert_eq!(std::fs::read_to_string(directory.0.join("memory.reclaim")).unwrap(), "");
    directory.file("memory.current", "much\n");
    assert!(cgroup::reclaim(&directory.0, Bytes::ZERO, soon).is_err());
}

#[test]
fn killing_a_group_that_is_gone_changes_nothing() {
    let directory = Directory::new("kill");
    assert_eq!(cgroup::kill(&directory.0.join("gone")).unwrap(), Changed::Unchanged);
    let kill = directory.file("cgroup.kill", "");
    std::fs::set_permissions(&kill, Permissions::from_mode(0o200)).unwrap();
    assert_eq!(cgroup::kill(&directory.0).unwrap(), Changed::Changed);
}

//! Dropping from the page cache what an engine has read of its model without mapping it.
//!
//! Such a load fills memory twice: with the weights, and with cache that nobody will read again. Free memory runs out
//! half-way through a model of more than half of it, and the rest of the load waits for reclaim, or dies of it.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::action::page_cache::drop_range;

/// What is left behind the position: the engine may still be copying out of it.
const MARGIN: u64 = 16 << 20;

/// The files that the processes of a unit read, and how far they are dropped.
#[derive(Debug)]
pub(super) struct ReadBehind {
    files: Vec<(File, u64)>,
}

impl ReadBehind {
    /// Of `files`.
    pub fn new(files: &[PathBuf]) -> Self {
        let open = |path: &PathBuf| Some((File::open(path).ok()?, 0));
        Self { files: files.iter().filter_map(open).collect() }
    }

    /// Drops what lies behind the positions of `processes`, whose descriptors their own user can see. Pages that are
    /// mapped stay, so that a model which is mapped loses nothing by it. What can't be seen or dropped is left alone.
    pub fn follow(&mut self, processes: &[u32]) {
        for (file, dropped) in &mut self.files {
            let at = |pid: &u32| position(&Path::new("/proc").join(pid.to_string()), file);
            let Some(position) = processes.iter().filter_map(at).max() else { continue };
            let until = position.saturating_sub(MARGIN);
            if until > *dropped && drop_range(file, *dropped, until).is_ok() {
                *dropped = until;
            }
        }
    }
}

/// The furthest position of the process's descriptors of that file.
fn position(process: &Path, file: &File) -> Option<u64> {
    let ours = file.metadata().ok()?;
    let descriptors = fs::read_dir(process.join("fd")).ok()?.flatten();
    let of_file = descriptors.filter(|entry| {
        fs::metadata(entry.path())
            .is_ok_and(|about| about.is_file() && (about.dev(), about.ino()) == (ours.dev(), ours.ino()))
    });
    let positions = of_file.filter_map(|entry| {
        let about = fs::read_to_string(process.join("fdinfo").join(entry.file_name())).ok()?;
        about.lines().find_map(|line| line.strip_prefix("pos:"))?.trim().parse().ok()
    });
    positions.max()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::Bytes;
    use crate::os::resident_bytes;
    use std::io::{Read, Write};

    #[test]
    fn what_was_read_is_dropped_and_what_comes_next_stays() {
        let path = std::env::temp_dir().join(format!("plimsoll-behind-{}", std::process::id()));
        let mut writing = File::create(&path).unwrap();
        let size = 4 * MARGIN;
        writing.write_all(&vec![1; usize::try_from(size).unwrap()]).unwrap();
        writing.sync_all().unwrap();
        drop(writing);
        let mut behind = ReadBehind::new(&[path.clone(), "/nowhere".into()]);
        let ours = [std::process::id()];
        let mut reader = File::open(&path).unwrap();
        behind.follow(&ours);
        assert_eq!(behind.files[0].1, 0, "nothing was read yet");
        reader.read_exact(&mut vec![0; usize::try_from(3 * MARGIN).unwrap()]).unwrap();
        behind.follow(&ours);
        assert_eq!(behind.files[0].1, 2 * MARGIN);
        let in_memory =
            nix::sys::statfs::fstatfs(&reader).unwrap().filesystem_type() == nix::sys::statfs::TMPFS_MAGIC;
        let left = resident_bytes(&reader).unwrap();
        assert!(in_memory || left <= Bytes(2 * MARGIN), "{left} of it are left");
        assert!(left >= Bytes(MARGIN), "what comes next has to stay, and {left} of it are left");
        std::fs::remove_file(path).unwrap();
    }
}

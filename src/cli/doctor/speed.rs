//! How fast the disks with models read: what loading takes, and what a model that streams can give.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};

use super::checks::Finding;
use crate::bytes::Bytes;
use crate::config::{Loaded, Oversize};
use crate::engine::{self, Purpose};
use crate::os::error_text;

/// What is asked for at a time: enough to keep an NVMe drive busy with one reader.
const BLOCK: usize = 4 << 20;
/// Where blocks begin in memory and in the file: direct reads need that of the disk's own blocks (open(2), O_DIRECT).
const ALIGNED: usize = 4096;
/// How long a disk is read.
const TIME: Duration = Duration::from_millis(500);
/// A smaller file says nothing about its disk.
const LEAST: Bytes = Bytes::mib(32);
/// Slower than any drive that a model should stream from, which waits for it at each token; bytes a second.
const SLOW: u64 = 1_000_000_000;

/// A disk with models.
#[derive(Debug, Default, PartialEq, Eq)]
struct Disk {
    /// The largest file of a model on it: this one is read.
    file: PathBuf,
    file_bytes: Bytes,
    /// The model with the most on it, and how much that is.
    model: String,
    model_bytes: Bytes,
    /// A model on it that is read at each token.
    streams: Option<String>,
}

/// One finding for each disk that configured models are on.
pub fn check(loaded: &Loaded) -> Vec<Finding> {
    let models = loaded.models.values().map(|model| {
        let files = engine::files(model, None).unwrap_or_default();
        let paths = files.into_iter().filter(|file| file.purpose == Purpose::Model).map(|file| file.path);
        (model.name.as_str(), model.oversize == Oversize::Stream, on_disks(paths))
    });
    let disks = disks(models);
    let large = disks.values().filter(|disk| disk.file_bytes >= LEAST);
    large.map(|disk| finding(disk, read(&disk.file))).collect()
}

/// The files with the device and the size of each, where their links lead. What can't be looked at is left out.
fn on_disks(paths: impl Iterator<Item = PathBuf>) -> Vec<(PathBuf, u64, Bytes)> {
    let look = |path: PathBuf| {
        let path = path.canonicalize().ok()?;
        let about = fs::metadata(&path).ok().filter(fs::Metadata::is_file)?;
        Some((path, about.dev(), Bytes(about.len())))
    };
    paths.filter_map(look).collect()
}

/// By the device's number, of models with their names, whether they stream, and their files.
fn disks<'a>(
    models: impl Iterator<Item = (&'a str, bool, Vec<(PathBuf, u64, Bytes)>)>,
) -> BTreeMap<u64, Disk> {
    let mut disks: BTreeMap<u64, Disk> = BTreeMap::new();
    for (name, streams, files) in models {
        let mut there: BTreeMap<u64, Bytes> = BTreeMap::new();
        for (path, device, bytes) in files {
            *there.entry(device).or_default() += bytes;
            let disk = disks.entry(device).or_default();
            if bytes > disk.file_bytes {
                (disk.file, disk.file_bytes) = (path, bytes);
            }
        }
        for (device, bytes) in there {
            let disk = disks.entry(device).or_default();
            if bytes > disk.model_bytes {
                (disk.model, disk.model_bytes) = (name.to_owned(), bytes);
            }
            if streams {
                disk.streams.get_or_insert_with(|| name.to_owned());
            }
        }
    }
    disks
}

/// What is read of a file in a second, past the page cache.
fn read(path: &Path) -> io::Result<u64> {
    // O_NONBLOCK: a FIFO that has taken the file's place must not hold this up.
    let flags = libc::O_DIRECT | libc::O_NONBLOCK | libc::O_NOCTTY;
    let mut file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() || is_answered_from_memory(&file) {
        return Err(Errno::EINVAL.into());
    }
    let mut buffer = vec![0; BLOCK + ALIGNED];
    let begin = buffer.as_ptr().align_offset(ALIGNED);
    let block = buffer.get_mut(begin..).and_then(|aligned| aligned.get_mut(..BLOCK));
    rate(&mut file, block.unwrap_or_default(), TIME)
}

/// Whether the file system takes direct reads and answers them from memory all the same.
fn is_answered_from_memory(file: &File) -> bool {
    // ZFS before 2.3; it is not in the kernel's headers.
    const ZFS: u64 = 0x2fc1_2fc1;
    let kind = fstatfs(file).map(|about| about.filesystem_type());
    kind.is_ok_and(|kind| kind == TMPFS_MAGIC || u64::try_from(kind.0) == Ok(ZFS))
}

/// Bytes a second, over that time or until the file ends, once the disk has woken up.
fn rate(file: &mut File, block: &mut [u8], time: Duration) -> io::Result<u64> {
    // Not counted.
    file.read_exact(block)?;
    let (begun, mut bytes) = (Instant::now(), Bytes::ZERO);
    while begun.elapsed() < time {
        match file.read(block)? {
            0 => break,
            n => bytes += Bytes(u64::try_from(n).unwrap_or_default()),
        }
    }
    let took = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
    Ok(bytes.mul_div(1_000_000, took.max(1)).0)
}

fn finding(disk: &Disk, read: io::Result<u64>) -> Finding {
    let directory = disk.file.parent().unwrap_or(&disk.file).display();
    let speed = match read {
        Ok(0) => {
            return Finding::note("speed", format!("{} can't be read: it ends at once", disk.file.display()));
        }
        Ok(speed) => speed,
        Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => {
            return Finding::note(
                "speed",
                format!(
                    "the file system of {directory} can't be read past the page cache, so its speed is not known"
                ),
            );
        }
        Err(error) => {
            return Finding::note(
                "speed",
                format!("{} can't be read: {}", disk.file.display(), error_text(&error)),
            );
        }
    };
    let seconds = disk.model_bytes.0.div_ceil(speed);
    let text = format!(
        "{directory} is read at {}: what {} has there ({}) takes about {seconds} s",
        per_second(speed),
        disk.model,
        disk.model_bytes
    );
    match &disk.streams {
        None => Finding::ok("speed", text),
        Some(model) => {
            let how =
                format!("'plimsoll fit {model} --disk-speed {}' says what that gives", per_second(speed));
            if speed < SLOW {
                Finding::note("speed", format!("{text}, and {model} is to stream from it"))
                    .with_fix(format!("keep models that stream on an NVMe drive; {how}"))
            } else {
                Finding::ok("speed", format!("{text}; {how} when it streams"))
            }
        }
    }
}

/// As `plimsoll fit --disk-speed` takes it.
fn per_second(speed: u64) -> String {
    match speed {
        1_000_000_000.. => format!("{}.{}GB/s", speed / 1_000_000_000, speed / 100_000_000 % 10),
        _ => format!("{}MB/s", (speed / 1_000_000).max(1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::checks::Level;

    fn disk(streams: Option<&str>) -> Disk {
        Disk {
            file: "/srv/models/a.gguf".into(),
            file_bytes: Bytes::gib(40),
            model: "a".to_owned(),
            model_bytes: Bytes(166_000_000_000),
            streams: streams.map(str::to_owned),
        }
    }

    #[test]
    fn a_fast_disk_is_fine_and_a_slow_one_matters_where_a_model_streams() {
        let fast = finding(&disk(None), Ok(3_140_000_000));
        assert_eq!(
            (fast.level, fast.text.as_str()),
            (Level::Ok, "/srv/models is read at 3.1GB/s: what a has there (154.6 GiB) takes about 53 s")
        );
        let streams = finding(&disk(Some("b")), Ok(3_140_000_000));
        assert_eq!(streams.level, Level::Ok);
        assert!(streams.text.contains("'plimsoll fit b --disk-speed 3.1GB/s'"), "{streams:?}");
        assert_eq!(finding(&disk(None), Ok(180_000_000)).level, Level::Ok);
        let slow = finding(&disk(Some("b")), Ok(180_000_000));
        assert_eq!(slow.level, Level::Note);
        assert!(slow.text.contains("180MB/s") && slow.fix.is_some_and(|fix| fix.contains("180MB/s")));
    }

    #[test]
    fn what_can_t_be_measured_is_said_and_no_speed_is_made_up() {
        for error in [io::Error::from(Errno::EINVAL), io::Error::from(Errno::EACCES)] {
            let found = finding(&disk(Some("b")), Err(error));
            assert_eq!((found.level, found.fix), (Level::Note, None));
            assert!(!found.text.contains("B/s"), "{}", found.text);
        }
        assert_eq!(finding(&disk(None), Ok(0)).level, Level::Note);
    }

    #[test]
    fn files_count_for_the_disk_that_they_are_on() {
        let file = |name: &str, device, gib| (PathBuf::from(name), device, Bytes::gib(gib));
        let split = vec![file("/a/1", 1, 40), file("/b/2", 2, 45), file("/a/3", 1, 5)];
        let models =
            [("split", true, split), ("whole", false, vec![file("/b/w", 2, 60)]), ("none", true, vec![])];
        let disks = disks(models.into_iter());
        let of = |device| {
            let disk: &Disk = &disks[&device];
            (disk.file.to_str().unwrap(), disk.model.as_str(), disk.model_bytes, disk.streams.as_deref())
        };
        assert_eq!(disks.len(), 2);
        assert_eq!(of(1), ("/a/1", "split", Bytes::gib(45), Some("split")));
        assert_eq!(of(2), ("/b/w", "whole", Bytes::gib(60), Some("split")));
    }

    #[test]
    fn what_a_file_has_is_what_counts() {
        let path = std::env::temp_dir().join(format!("plimsoll-speed-{}", std::process::id()));
        fs::write(&path, vec![1; 3 * BLOCK]).unwrap();
        let mut file = File::open(&path).unwrap();
        let speed = rate(&mut file, &mut vec![0; BLOCK], Duration::from_secs(600)).unwrap();
        let left = file.read(&mut [0]).unwrap();
        fs::remove_file(&path).unwrap();
        assert!(speed > 0 && left == 0, "{speed} bytes a second, {left} left");
    }
}

//! How fast the disks with models read: what loading takes at the least, and what a model that streams can give.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;

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
    /// The largest model on it.
    largest: String,
    model_bytes: Bytes,
    /// A model on it that is read at each token.
    streams: Option<String>,
}

/// One finding for each disk that configured models are on.
pub fn check(loaded: &Loaded) -> Vec<Finding> {
    let disks = disks(loaded);
    let large = disks.values().filter(|disk| disk.file_bytes >= LEAST);
    large.map(|disk| finding(disk, read(&disk.file))).collect()
}

/// By the device's number. What can't be looked at is not there: other checks say so.
fn disks(loaded: &Loaded) -> BTreeMap<u64, Disk> {
    let mut disks: BTreeMap<u64, Disk> = BTreeMap::new();
    for model in loaded.models.values() {
        let files = engine::files(model, None).unwrap_or_default();
        let files = files.into_iter().filter(|file| file.purpose == Purpose::Model);
        let files: Vec<(PathBuf, fs::Metadata)> =
            files.filter_map(|file| Some((file.path.clone(), fs::metadata(&file.path).ok()?))).collect();
        let Some((_, first)) = files.first() else { continue };
        let disk = disks.entry(first.dev()).or_default();
        let bytes: Bytes = files.iter().map(|(_, about)| Bytes(about.len())).sum();
        if bytes > disk.model_bytes {
            (disk.largest, disk.model_bytes) = (model.name.to_string(), bytes);
        }
        for (path, about) in files.into_iter().filter(|(_, about)| about.is_file()) {
            if Bytes(about.len()) > disk.file_bytes {
                (disk.file, disk.file_bytes) = (path, Bytes(about.len()));
            }
        }
        if model.oversize == Oversize::Stream {
            disk.streams.get_or_insert(model.name.to_string());
        }
    }
    disks
}

/// What is read of a file in a second, past the page cache.
fn read(path: &Path) -> io::Result<u64> {
    // O_NONBLOCK: a FIFO that has taken the file's place must not hold this up.
    let flags = libc::O_DIRECT | libc::O_NONBLOCK | libc::O_NOCTTY;
    let mut file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let mut buffer = vec![0; BLOCK + ALIGNED];
    let begin = buffer.as_ptr().align_offset(ALIGNED);
    let block = buffer.get_mut(begin..).and_then(|aligned| aligned.get_mut(..BLOCK));
    rate(&mut file, block.unwrap_or_default(), TIME)
}

/// Bytes a second, over that time or until the file ends.
fn rate(file: &mut File, block: &mut [u8], time: Duration) -> io::Result<u64> {
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
        "{directory} is read at {}: {} ({}) takes at least {seconds} s to load",
        per_second(speed),
        disk.largest,
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
            largest: "a".to_owned(),
            model_bytes: Bytes(166_000_000_000),
            streams: streams.map(str::to_owned),
        }
    }

    #[test]
    fn a_fast_disk_is_fine_and_a_slow_one_matters_where_a_model_streams() {
        let fast = finding(&disk(None), Ok(3_140_000_000));
        assert_eq!(
            (fast.level, fast.text.as_str()),
            (Level::Ok, "/srv/models is read at 3.1GB/s: a (154.6 GiB) takes at least 53 s to load")
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
        assert!(read(Path::new("/dev/null")).is_err(), "it is no file");
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

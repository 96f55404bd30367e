//! What the machine says: memory, pressure, control groups, GPUs, processes. Reads only.
//!
//! Everything is found under a root directory, `/` on a real machine and a recorded tree in tests
//! (`tests/fixtures/host`). All reads are bounded, and contents that make no sense are an error
//! that names the file or a reading that is left out; they never panic.

mod cgroup;
mod drm;
mod gpu;
mod http;
mod memory;
mod mounts;
mod pressure;
mod process;
mod requests;
mod sockets;
mod swaps;
mod system;
mod tree;

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::libc;

pub use cgroup::{ControlGroup, ControlGroupError, MemoryEvents};
pub use drm::DrmUsage;
pub use gpu::{Card, Heap, Region};
pub use http::{ApiKey, HttpError, Page, Server};
pub use mounts::Mount;
pub use pressure::Stall;
pub use requests::{Heard, requests_in_flight};
pub use system::{Kernel, Process};

/// No file of /proc or /sys that is read here is longer; what is, is not what it seems.
const LONGEST: u64 = 1 << 20;

/// A machine to read: the root under which /proc and /sys are found.
#[derive(Clone, Debug)]
pub struct Host {
    root: PathBuf,
}

/// Why something could not be read.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The file is missing or can't be read.
    #[error("can't read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file does not say what it should.
    #[error("{} does not say {what}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What was looked for in it.
        what: &'static str,
    },
    /// There is more below the directory than is looked at.
    #[error("{} has more below it than is looked at", path.display())]
    TooMany {
        /// The directory.
        path: PathBuf,
    },
}

impl HostError {
    /// Whether it is only that the file (a process, a control group) does not exist (any more).
    #[must_use]
    pub fn is_gone(&self) -> bool {
        match self {
            // A control group or process that ends between open and read says ENODEV or ESRCH.
            Self::Read { source, .. } => {
                source.kind() == io::ErrorKind::NotFound
                    || matches!(source.raw_os_error(), Some(libc::ENODEV | libc::ESRCH))
            }
            Self::Content { .. } | Self::TooMany { .. } => false,
        }
    }
}

impl Default for Host {
    fn default() -> Self {
        Self::at("/")
    }
}

impl Host {
    /// The machine recorded under `root`; `/` for this one.
    #[must_use]
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Where `absolute` is found.
    fn path(&self, absolute: &str) -> PathBuf {
        self.root.join(absolute.trim_start_matches('/'))
    }

    /// A file's text; bytes that are not UTF-8 are replaced.
    fn read(&self, absolute: &str) -> Result<String, HostError> {
        let path = self.path(absolute);
        read_bounded(&path)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .map_err(|source| HostError::Read { path, source })
    }

    /// The same; `None` when there is no such file.
    fn read_if_there(&self, absolute: &str) -> Result<Option<String>, HostError> {
        match self.read(absolute) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.is_gone() => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn content(&self, absolute: &str, what: &'static str) -> HostError {
        HostError::Content { path: self.path(absolute), what }
    }

    /// The kind of container that this runs in (`lxc`, `docker`, …), if in one. There
    /// /proc/meminfo may be the container's while /sys is the whole machine's.
    #[must_use]
    pub fn container(&self) -> Option<String> {
        for place in ["/run/systemd/container", "/run/host/container-manager"] {
            if let Ok(text) = self.read(place)
                && let Some(kind) = text.lines().next().map(str::trim).filter(|kind| !kind.is_empty())
            {
                return Some(kind.to_owned());
            }
        }
        let marks = [("/.dockerenv", "docker"), ("/run/.containerenv", "podman")];
        marks.iter().find(|(mark, _)| self.path(mark).exists()).map(|(_, kind)| (*kind).to_owned())
    }
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    // Not to hang on what turns out to be a pipe.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let mut bytes = Vec::new();
    file.take(LONGEST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LONGEST {
        return Err(io::Error::from_raw_os_error(libc::EFBIG));
    }
    Ok(bytes)
}

/// The number after `key` in a text of lines `key value`.
fn flat_keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

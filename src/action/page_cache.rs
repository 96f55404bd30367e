//! Drops files from the page cache.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc;

use crate::bytes::Bytes;
use crate::ledger::FileId;
use crate::os::{ResidencyError, resident_bytes};

/// What dropping a file changed: its bytes in the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// Before.
    pub before: Bytes,
    /// After. What a living process has mapped stays, and so does what another one reads meanwhile.
    pub after: Bytes,
}

impl Dropped {
    /// What was freed.
    #[must_use]
    pub fn gain(&self) -> Bytes {
        self.before - self.after
    }
}

/// Why a file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It can't be opened.
    #[error("can't open {}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is a directory, a device, a pipe.
    #[error("{} is not a regular file", .0.display())]
    NotRegular(PathBuf),
    /// Another file is at that path now.
    #[error("{} is not the file any more that it was", .0.display())]
    Replaced(PathBuf),
}

/// Opens a regular file for reading, `expected` where it must be a certain one.
///
/// The path may be anybody's: it is looked at before it is opened, since opening alone can hang on
/// a pipe and have effects on a device. Symbolic links are followed, as the engine follows them.
pub fn open_regular(path: &Path, expected: Option<FileId>) -> Result<File, OpenError> {
    let fail = |source| OpenError::Io { path: path.to_owned(), source };
    let place = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path).map_err(fail)?;
    let metadata = place.metadata().map_err(fail)?;
    if !metadata.is_file() {
        return Err(OpenError::NotRegular(path.to_owned()));
    }
    if expected.is_some_and(|id| id != FileId { device: metadata.dev(), inode: metadata.ino() }) {
        return Err(OpenError::Replaced(path.to_owned()));
    }
    // Opens what was looked at, wherever the path may lead by now.
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{}", place.as_raw_fd()))
        .map_err(fail)
}

/// Drops `file` from the page cache and verifies what became of it. Pages that were written and
/// are not yet on disk (a download that just ended) are written first. May take seconds.
pub fn drop_file(file: &File) -> Result<Dropped, ResidencyError> {
    let before = resident_bytes(file)?;
    if before.is_zero() {
        return Ok(Dropped { before, after: before });
    }
    advise_away(file, 0, 0)?;
    let mut after = resident_bytes(file)?;
    if !after.is_zero() {
        // Dirty pages are not dropped. Where there are none this returns at once.
        file.sync_data()?;
        advise_away(file, 0, 0)?;
        after = resident_bytes(file)?;
    }
    Ok(Dropped { before, after })
}

/// Drops a part of a file: clean pages that nobody has mapped. Not verified, for whoever only owns a descriptor can't.
///
/// # Errors
/// The offsets are beyond what a file can have, or the kernel refuses.
pub fn drop_range(file: &File, from: u64, until: u64) -> io::Result<()> {
    let offset = |bytes: u64| libc::off_t::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput);
    advise_away(file, offset(from)?, offset(until.saturating_sub(from))?)
}

/// A length of 0 means to the end of the file.
fn advise_away(file: &File, from: libc::off_t, length: libc::off_t) -> io::Result<()> {
    Ok(posix_fadvise(file, from, length, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?)
}

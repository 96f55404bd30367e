//! A small JSON file that is written as a whole or not at all.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Changed;

/// No state of ours is longer.
const LONGEST: u64 = 16 << 20;

/// Such a file, in a directory that is only the daemon's to write.
#[derive(Clone, Debug)]
pub struct StateFile {
    path: PathBuf,
}

/// What was found.
#[derive(Debug, PartialEq, Eq)]
pub enum Loaded<T> {
    /// No file yet.
    Missing,
    /// Its contents.
    Value(T),
    /// It makes no sense, and was moved aside, so that it can be looked at and is not in the way.
    Corrupt {
        /// Where it is now.
        moved_to: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// Why the file can't be used.
#[derive(Debug, thiserror::Error)]
#[error("can't {what} {}: {source}", path.display())]
pub struct StateError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl StateFile {
    /// The file at `path`.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Reads it. A symbolic link in its place is an error.
    pub fn load<T: DeserializeOwned>(&self) -> Result<Loaded<T>, StateError> {
        let bytes = match self.read() {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Loaded::Missing),
            Err(source) if source.raw_os_error() == Some(libc::EFBIG) => {
                return self.set_aside(format!("it is longer than {LONGEST} bytes"));
            }
            Err(source) => return Err(self.error("read", source)),
        };
        match serde_json::from_slice(&bytes) {
            Ok(value) => Ok(Loaded::Value(value)),
            Err(error) => self.set_aside(error.to_string()),
        }
    }

    /// Writes it: whatever happens, the old contents or the new are there afterwards, on disk.
    /// Equal contents are not written again.
    pub fn save<T: Serialize>(&self, value: &T) -> Result<Changed, StateError> {
        let bytes = serde_json::to_vec(value).map_err(|error| self.error("write", error.into()))?;
        let before = self.read();
        if before.as_ref().is_ok_and(|before| *before == bytes) {
            return Ok(Changed::Unchanged);
        }
        self.replace(&bytes).map_err(|source| self.error("write", source))?;
        let missing = before.is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
        Ok(if missing { Changed::Created } else { Changed::Changed })
    }

    /// Removes it.
    pub fn remove(&self) -> Result<Changed, StateError> {
        match std::fs::remove_file(&self.path) {
            Ok(()) => Ok(Changed::Changed),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Changed::Unchanged),
            Err(source) => Err(self.error("remove", source)),
        }
    }

    fn read(&self) -> io::Result<Vec<u8>> {
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(&self.path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let mut bytes = Vec::new();
        file.take(LONGEST + 1).read_to_end(&mut bytes)?;
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if length > LONGEST { Err(io::Error::from_raw_os_error(libc::EFBIG)) } else { Ok(bytes) }
    }

    fn replace(&self, bytes: &[u8]) -> io::Result<()> {
        let directory = self.path.parent().unwrap_or(Path::new("/"));
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let temporary = self.beside("new");
        // Left over from a crash; what stands there now is not written through.
        match std::fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&temporary)?;
        let written = file.write_all(bytes).and_then(|()| file.sync_all());
        let renamed = written.and_then(|()| std::fs::rename(&temporary, &self.path));
        if let Err(error) = renamed {
            // A full disk is not to be filled further.
            let _ = std::fs::remove_file(&temporary);
            return Err(error);
        }
        File::open(directory)?.sync_all()
    }

    fn set_aside<T>(&self, why: String) -> Result<Loaded<T>, StateError> {
        let moved_to = self.beside("corrupt");
        std::fs::rename(&self.path, &moved_to).map_err(|source| self.error("move aside", source))?;
        Ok(Loaded::Corrupt { moved_to, why })
    }

    /// The file's path with another ending added.
    fn beside(&self, ending: &str) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(".");
        path.push(ending);
        path.into()
    }

    fn error(&self, what: &'static str, source: io::Error) -> StateError {
        StateError { what, path: self.path.clone(), source }
    }
}

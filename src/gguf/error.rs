//! What can be wrong with a model file.

use std::io;
use std::path::PathBuf;

/// Why a header can't be read. Says where; [`ModelError::Header`] adds the file.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// The file can't be read at some place.
    #[error("reading failed at byte {offset}: {source}")]
    Io {
        /// Where in the file.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The file has no bytes at all.
    #[error("it is empty")]
    Empty,
    /// The file doesn't start with `GGUF`.
    // What stands there instead is not quoted: the file may be one that the asker can't read.
    #[error("it is not a GGUF file (it doesn't start as one)")]
    NotGguf,
    /// A big-endian file, which only big-endian machines read.
    #[error("it is a big-endian GGUF file, which this machine's engine can't read: convert it")]
    BigEndian,
    /// A version of the format that is not understood.
    #[error("it is GGUF version {0}; versions 2 and 3 are understood")]
    Version(u32),
    /// The file ends within the header.
    #[error("it ends at byte {offset}, within its header ({what}): the download is incomplete")]
    Truncated {
        /// The length of the file.
        offset: u64,
        /// What was being read.
        what: String,
    },
    /// A count or length beyond all reason.
    #[error("{what} is {value}, more than the {limit} that are allowed (at byte {offset})")]
    TooLarge {
        /// Where in the file.
        offset: u64,
        /// What was counted.
        what: String,
        /// What the file claims.
        value: u64,
        /// The limit.
        limit: u64,
    },
    /// Something that the format doesn't allow.
    #[error("{what} (at byte {offset})")]
    Invalid {
        /// Where in the file.
        offset: u64,
        /// What is wrong.
        what: String,
    },
    /// A metadata value has another type than the one needed.
    #[error("metadata {key} is {found}, not {wanted}")]
    WrongType {
        /// The key.
        key: String,
        /// What it is.
        found: &'static str,
        /// What it should be.
        wanted: &'static str,
    },
}

/// Why a model can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file can't be opened.
    #[error("{path}: {source}", path = path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A directory, FIFO, device or socket stands where a file should.
    #[error("{path} is {found}, not a model file", path = path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// A header can't be read.
    #[error("{path}: {source}", path = path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: HeaderError,
    },
    /// A shard of a split model is not there.
    #[error("shard {number} of {count} is missing: {path}", path = path.display())]
    MissingShard {
        /// Which one, from 1.
        number: u32,
        /// How many there should be.
        count: u32,
        /// Where it should be.
        path: PathBuf,
    },
    /// A file is shorter than its header says: a download that is not complete.
    #[error("{path} is shorter than its header says: {length} of {expected} bytes", path = path.display())]
    Short {
        /// The file.
        path: PathBuf,
        /// Its length.
        length: u64,
        /// The length that its tensors need.
        expected: u64,
    },
    /// Files that don't belong together, or not in this order.
    #[error("{path}: {what}", path = path.display())]
    Shards {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A tensor is declared twice.
    #[error("{path}: tensor {name} is declared twice", path = path.display())]
    DuplicateTensor {
        /// The file of the second declaration.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
}

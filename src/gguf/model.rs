//! A whole model: one file, or all shards of one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::error::ModelError;
use super::header::Header;
use super::read::Allowance;
use super::shards::shard_paths;
use super::tensor::Tensor;
use super::value::{Array, Value};

/// Which file it is, and whether it is still the same: what a cache of headers is keyed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    /// The device that holds the file system.
    pub device: u64,
    /// The inode.
    pub inode: u64,
    /// The length in bytes.
    pub size: u64,
    /// When it was last changed, in nanoseconds since the epoch.
    pub modified_ns: i128,
}

impl Identity {
    /// The identity of an open file.
    ///
    /// # Errors
    /// The system can't tell.
    pub fn of(file: &File) -> io::Result<Self> {
        Ok(Self::from_metadata(&file.metadata()?))
    }

    /// The identity of something that is no file here (an address, an entry of a catalogue): the same for the same
    /// name, and none that a file has.
    #[must_use]
    pub fn of_name(name: &str, size: u64) -> Self {
        // FNV-1a.
        let inode = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self { device: u64::MAX, inode, size, modified_ns: 0 }
    }

    /// The identity from what the system says about a file.
    #[must_use]
    pub fn from_metadata(meta: &std::fs::Metadata) -> Self {
        let modified_ns = i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec());
        Self { device: meta.dev(), inode: meta.ino(), size: meta.len(), modified_ns }
    }
}

/// One file of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// The path as it was given, or made from the first one's.
    pub path: PathBuf,
    /// Which file it is.
    pub identity: Identity,
    /// Where its tensor data starts.
    pub data_offset: u64,
    /// How many bytes its tensors have.
    pub tensor_bytes: u64,
}

/// A model with all its files present at full length.
#[derive(Clone, Debug)]
pub struct Model {
    header: Header,
    shards: Vec<Shard>,
}

impl Model {
    /// Opens the model at `path`, with all files of a split one.
    ///
    /// # Errors
    /// A file is missing, no regular file, not readable, not GGUF, or shorter than its header says.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        Self::from_files(open_files(path)?)
    }

    /// Reads the model from open files in the order of its shards; names are for messages, and the first
    /// one's tells how many files there have to be.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn from_files(files: Vec<(PathBuf, File)>) -> Result<Self, ModelError> {
        Self::from_files_within(files, &mut Allowance::default())
    }

    /// As [`Model::from_files`], keeping no more of the headers than `allowance` has left: several models that are
    /// read together share one.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn from_files_within(
        files: Vec<(PathBuf, File)>,
        allowance: &mut Allowance,
    ) -> Result<Self, ModelError> {
        let given = u32::try_from(files.len()).unwrap_or(u32::MAX);
        if let Some((first, _)) = files.first() {
            let expected = shard_paths(first)?;
            let count = u32::try_from(expected.len()).unwrap_or(u32::MAX);
            if let Some(missing) = expected.get(files.len()) {
                return Err(ModelError::MissingShard { number: given + 1, count, path: missing.clone() });
            }
        }
        Self::join(given, files.into_iter().map(|(path, file)| read_file(path, &file, allowance)))
    }

    /// Makes a model of headers that were read elsewhere (over the network) or made up: a name or address, the
    /// file's identity with its full length, and the header of each file, in the order of the shards.
    ///
    /// # Errors
    /// The headers don't belong together, or a file is shorter than its header says.
    pub fn from_headers(files: Vec<(PathBuf, Identity, Header)>) -> Result<Self, ModelError> {
        let given = u32::try_from(files.len()).unwrap_or(u32::MAX);
        Self::join(given, files.into_iter().map(Ok))
    }

    /// Each header is checked before the next one is read.
    fn join(
        given: u32,
        files: impl Iterator<Item = Result<(PathBuf, Identity, Header), ModelError>>,
    ) -> Result<Self, ModelError> {
        let mut model: Option<Self> = None;
        for (index, file) in files.enumerate() {
            let (path, identity, header) = file?;
            let (header, shard) = shard(path, identity, header, index)?;
            let number = header.u64("split.no").ok().flatten().unwrap_or(0);
            let count = header.u64("split.count").ok().flatten().unwrap_or(0);
            let wrong = |what: String| Err(ModelError::Shards { path: shard.path.clone(), what });
            if count > 1 && number != index as u64 {
                return wrong(format!(
                    "it says that it is file {} of the model, not {}",
                    number.saturating_add(1),
                    index + 1
                ));
            }
            if count > 1 && count != u64::from(given) {
                return wrong(format!(
                    "it says that the model has {count} files, and there are {given}: split models are \
                     named NAME-00001-of-0000N.gguf"
                ));
            }
            match &mut model {
                None => model = Some(Self { header, shards: vec![shard] }),
                Some(model) => model.add(header, shard)?,
            }
        }
        model.ok_or_else(|| ModelError::Shards { path: PathBuf::new(), what: "no file was given".to_owned() })
    }

    fn add(&mut self, header: Header, shard: Shard) -> Result<(), ModelError> {
        self.header.tensors.extend(header.tensors);
        self.shards.push(shard);
        let mut names: Vec<&str> = self.header.tensors.iter().map(|t| t.name.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            let path = self.shards.last().map(|s| s.path.clone()).unwrap_or_default();
            return Err(ModelError::DuplicateTensor { path, name: pair[0].to_owned() });
        }
        Ok(())
    }

    /// The first file's header, with the tensors of all files.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The files in order.
    #[must_use]
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The tensors of all files.
    #[must_use]
    pub fn tensors(&self) -> &[Tensor] {
        &self.header.tensors
    }

    /// The tensor with this name.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.header.tensors.iter().find(|t| t.name == name)
    }

    /// `general.architecture`, such as `qwen3moe`; empty when the file doesn't say.
    #[must_use]
    pub fn architecture(&self) -> &str {
        self.str("general.architecture").unwrap_or_default()
    }

    /// `general.name`: how the publisher calls it.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.str("general.name")
    }

    /// A metadata value.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.header.metadata.get(key)
    }

    /// A metadata value of the architecture: `ARCHITECTURE.key`.
    #[must_use]
    pub fn arch_value(&self, key: &str) -> Option<&Value> {
        self.value(&format!("{}.{key}", self.architecture()))
    }

    /// A metadata number that isn't negative.
    #[must_use]
    pub fn u64(&self, key: &str) -> Option<u64> {
        self.value(key).and_then(Value::as_u64)
    }

    /// A metadata number.
    #[must_use]
    pub fn f64(&self, key: &str) -> Option<f64> {
        self.value(key).and_then(Value::as_f64)
    }

    /// A metadata text.
    #[must_use]
    pub fn str(&self, key: &str) -> Option<&str> {
        self.value(key).and_then(Value::as_str)
    }

    /// A metadata list.
    #[must_use]
    pub fn array(&self, key: &str) -> Option<&Array> {
        self.value(key).and_then(Value::as_array)
    }

    /// How many tokens the vocabulary has: the token list, or `ARCHITECTURE.vocab_size` where there is none.
    #[must_use]
    pub fn vocab_size(&self) -> u64 {
        let listed = self.array("tokenizer.ggml.tokens").map(Array::len);
        listed.or_else(|| self.arch_value("vocab_size").and_then(Value::as_u64)).unwrap_or(0)
    }

    /// The context that the model was trained on.
    #[must_use]
    pub fn context_train(&self) -> u64 {
        self.arch_value("context_length").and_then(Value::as_u64).unwrap_or(0)
    }

    /// How many parameters all tensors have.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.tensors().iter().fold(0, |n, t| n.saturating_add(t.elements()))
    }

    /// The bytes of all files.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.shards.iter().fold(0, |n, s| n.saturating_add(s.identity.size))
    }
}

/// Opens all files of the model at `path`, without waiting on a FIFO.
pub(super) fn open_files(path: &Path) -> Result<Vec<(PathBuf, File)>, ModelError> {
    let paths = shard_paths(path)?;
    let count = u32::try_from(paths.len()).unwrap_or(u32::MAX);
    let mut files = Vec::new();
    for (number, path) in (1..).zip(paths) {
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY)
            .open(&path);
        match opened {
            Ok(file) => files.push((path, file)),
            Err(error) if count > 1 && number > 1 && error.kind() == io::ErrorKind::NotFound => {
                return Err(ModelError::MissingShard { number, count, path });
            }
            Err(source) => return Err(ModelError::Open { path, source }),
        }
    }
    Ok(files)
}

fn read_file(
    path: PathBuf,
    file: &File,
    allowance: &mut Allowance,
) -> Result<(PathBuf, Identity, Header), ModelError> {
    let meta = file.metadata().map_err(|source| ModelError::Open { path: path.clone(), source })?;
    let kind = meta.file_type();
    if !kind.is_file() {
        let found = match () {
            () if kind.is_dir() => "a directory",
            () if kind.is_fifo() => "a FIFO",
            () if kind.is_socket() => "a socket",
            () => "a device",
        };
        return Err(ModelError::NotAFile { path, found });
    }
    let header = Header::read_file(file, allowance)
        .map_err(|source| ModelError::Header { path: path.clone(), source })?;
    Ok((path, Identity::from_metadata(&meta), header))
}

fn shard(
    path: PathBuf,
    identity: Identity,
    mut header: Header,
    index: usize,
) -> Result<(Header, Shard), ModelError> {
    let expected = header.file_length();
    if identity.size < expected {
        return Err(ModelError::Short { path, length: identity.size, expected });
    }
    for tensor in &mut header.tensors {
        tensor.shard = index;
    }
    let tensor_bytes = header.tensors.iter().fold(0, |n: u64, t| n.saturating_add(t.bytes));
    let data_offset = header.data_offset;
    Ok((header, Shard { path, identity, data_offset, tensor_bytes }))
}

//! The files of a split model, found by name as llama.cpp finds them.

use std::path::{Path, PathBuf};

use super::error::ModelError;

/// The most files of a split model; the name has five digits, real models have about 50.
const MAX_SHARDS: u32 = 1024;

/// What the name of a split model's file says: `PREFIX-00001-of-00004.gguf`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardName {
    /// The path up to the number.
    pub prefix: String,
    /// Which file it is, from 1.
    pub number: u32,
    /// How many there are.
    pub count: u32,
}

impl ShardName {
    /// Takes a name apart; none when it isn't the name of a split model's file.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let rest = name.strip_suffix(".gguf")?;
        let (rest, count) = rest.rsplit_once("-of-")?;
        let (prefix, number) = rest.rsplit_once('-')?;
        let digits = |s: &str| s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit());
        if !digits(number) || !digits(count) {
            return None;
        }
        Some(Self { prefix: prefix.to_owned(), number: number.parse().ok()?, count: count.parse().ok()? })
    }

    /// The name of file `number` (from 1) of the same model.
    #[must_use]
    pub fn name(&self, number: u32) -> String {
        format!("{}-{number:05}-of-{:05}.gguf", self.prefix, self.count)
    }
}

/// All files of the model at `path`, in order; only `path` itself for a model that isn't split.
///
/// The names are made from the name as given, not from what a symbolic link points to: so links
/// of every shard into a store of blobs work, as they do with llama.cpp.
///
/// # Errors
/// The name is not that of the first file, or its numbers make no sense.
pub fn shard_paths(path: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let Some(name) = path.file_name().and_then(|n| n.to_str()).and_then(ShardName::parse) else {
        return Ok(vec![path.to_owned()]);
    };
    let wrong = |what: String| Err(ModelError::Shards { path: path.to_owned(), what });
    if name.count == 0 || name.count > MAX_SHARDS {
        return wrong(format!("a model of {} files is not possible", name.count));
    }
    if name.number != 1 {
        return wrong(format!("give the first file of the split model: {}", name.name(1)));
    }
    Ok((1..=name.count).map(|n| path.with_file_name(name.name(n))).collect())
}

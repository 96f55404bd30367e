//! The files that an engine will read.

use std::fmt;
use std::path::PathBuf;

use super::effective::{Effective, origin_text};
use super::error::Error;
use crate::config::Model;
use crate::gguf::shard_paths;

/// What a file is for. The text of it goes over the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Purpose {
    /// A file of the model, in the order of its shards.
    Model,
    /// The multimodal projector.
    Projector,
    /// A file of the draft model.
    Draft,
    /// A LoRA adapter.
    Adapter,
    /// Keys that clients have to send: never given to anybody but the engine.
    ApiKeys,
    /// Anything else: templates, grammars, control vectors.
    Other,
}

impl Purpose {
    /// Every purpose.
    pub const ALL: [Self; 6] =
        [Self::Model, Self::Projector, Self::Draft, Self::Adapter, Self::ApiKeys, Self::Other];

    /// The purpose as text.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Projector => "mmproj",
            Self::Draft => "draft-model",
            Self::Adapter => "lora",
            Self::ApiKeys => "api-key-file",
            Self::Other => "other",
        }
    }

    /// The purpose with that text.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|purpose| purpose.as_str() == text)
    }
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A file that has to be there, and readable by the user of the unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NeededFile {
    /// Its path, absolute.
    pub path: PathBuf,
    /// What it is for.
    pub purpose: Purpose,
}

/// The files that the engine of `model` will read, all shards among them, in the order of their
/// purposes. `effective` is there for a llama-server, and none for a `command`.
///
/// # Errors
/// The name of a split model's file makes no sense, or an argument has a relative path.
pub fn files(model: &Model, effective: Option<&Effective>) -> Result<Vec<NeededFile>, Error> {
    let mut needed = Vec::new();
    let mut need = |paths: Vec<PathBuf>, purpose| {
        needed.extend(paths.into_iter().map(|path| NeededFile { path, purpose }));
    };
    if let Some(path) = &model.model {
        need(shard_paths(path)?, Purpose::Model);
    }
    if let Some(Effective { parsed, .. }) = effective {
        if let Some(path) = &parsed.mmproj {
            need(vec![path.clone()], Purpose::Projector);
        }
        if let Some(path) = &parsed.draft_model {
            need(shard_paths(path)?, Purpose::Draft);
        }
        need(parsed.settings.adapters.clone(), Purpose::Adapter);
        need(model.api_key_file.clone().into_iter().collect(), Purpose::ApiKeys);
        let others = parsed.files.iter().filter(|path| Some(*path) != model.api_key_file.as_ref());
        need(others.cloned().collect(), Purpose::Other);
        if let Some(file) = needed.iter().find(|file| !file.path.is_absolute()) {
            let origin = match file.purpose {
                Purpose::Projector => parsed.origins.get("mmproj"),
                Purpose::Draft => parsed.origins.get("spec-draft-model"),
                _ => None,
            };
            let origin = origin
                .map_or_else(|| format!("'engine-args' at {}", model.place("engine-args")), origin_text);
            return Err(Error::Relative { origin, path: file.path.to_string_lossy().into_owned() });
        }
    }
    Ok(needed)
}

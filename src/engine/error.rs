//! Why a model can't be turned into something to run.

use std::path::PathBuf;

use crate::config::{Instance, Place};
use crate::fit::args::ArgError;
use crate::gguf::ModelError;

/// A mistake in the configuration, or an engine that is not there: one sentence each, exit code 78.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A key and an argument or variable want different things.
    #[error("'{key}' at {place} is {value}, but {other}: remove one of them")]
    Contradiction {
        /// The key of the model.
        key: &'static str,
        /// Where it stands.
        place: Place,
        /// Its value, as llama-server would read it.
        value: String,
        /// What contradicts it: an argument or variable, with its place and what it says.
        other: String,
    },
    /// An argument that has a key of its own, because more than the engine depends on it.
    #[error("{flag} can't stand in 'engine-args' at {place}: {advice}")]
    Reserved {
        /// The argument as spelled.
        flag: String,
        /// Where `engine-args` stands.
        place: Place,
        /// What to write instead.
        advice: String,
    },
    /// Something that would make the engine download a model.
    #[error("{origin} would make the engine download a model: download it, and name the file in 'model'")]
    Download {
        /// The argument or variable.
        origin: String,
    },
    /// Arguments or variables that llama-server would refuse.
    #[error("'{name}' can't be started with its settings ({place}): {source}")]
    Arguments {
        /// The model.
        name: String,
        /// Where its arguments stand.
        place: Place,
        /// What is wrong.
        source: Box<ArgError>,
    },
    /// A path that means something else in every directory.
    #[error("{origin} has the relative path '{path}': write the whole path, beginning with '/'")]
    Relative {
        /// The argument or variable.
        origin: String,
        /// The path.
        path: String,
    },
    /// Something in braces that is almost a placeholder.
    #[error("{{{found}}} in 'command' at {place} is unknown; did you mean {{{near}}}?")]
    Placeholder {
        /// The word in braces.
        found: String,
        /// What it probably should be.
        near: &'static str,
        /// Where `command` stands.
        place: Place,
    },
    /// The instance's port would be past the last one.
    #[error("instance '{instance}' would need a port above 65535: choose a smaller 'port'")]
    Port {
        /// The instance.
        instance: Instance,
    },
    /// No engine of this name is configured.
    #[error("engine '{engine}' is not configured, or plimsoll.toml has errors: plimsoll validate")]
    UnknownEngine {
        /// The engine's name.
        engine: String,
    },
    /// No such program.
    #[error(
        "{program} is in none of {searched}: install it, or give its path in plimsoll.toml under [engine.{program}]"
    )]
    NotInstalled {
        /// The program's name.
        program: String,
        /// The directories.
        searched: String,
    },
    /// The program can't be run.
    #[error("engine {path} can't be run: {reason}", path = path.display())]
    NotExecutable {
        /// The program.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A llama-server whose defaults can't be turned off.
    #[error(
        "engine {path} is llama-server {version}, older than build {oldest} (December 2025), which plimsoll needs",
        path = path.display()
    )]
    TooOld {
        /// The program.
        path: PathBuf,
        /// Its version.
        version: String,
        /// The oldest build that works.
        oldest: u32,
    },
    /// The files of a split model can't be named.
    #[error(transparent)]
    Shards(#[from] ModelError),
}

impl Error {
    /// Where in the configuration it is, when it is in one place.
    #[must_use]
    pub fn place(&self) -> Option<&Place> {
        match self {
            Self::Contradiction { place, .. }
            | Self::Reserved { place, .. }
            | Self::Arguments { place, .. }
            | Self::Placeholder { place, .. } => Some(place),
            _ => None,
        }
    }
}

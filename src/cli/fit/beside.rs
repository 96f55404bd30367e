//! What a command line or a configured model names beside the model: draft model, projector, adapters.

use std::path::{Path, PathBuf};

use crate::cli::failure::Failure;
use crate::engine::{NeededFile, Purpose};
use crate::fit::args::Parsed;
use crate::fit::{Adapter, Beside, Facts, FitError, Projector};
use crate::gguf::Model;
use crate::ledger::FileId;

/// The files beside a model, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Named {
    draft: Option<PathBuf>,
    projector: Option<PathBuf>,
    adapters: Vec<PathBuf>,
}

impl Named {
    /// Those that arguments name.
    pub fn by(parsed: &Parsed) -> Self {
        Self {
            draft: parsed.draft_model.clone(),
            projector: parsed.mmproj.clone(),
            adapters: parsed.settings.adapters.clone(),
        }
    }

    /// Those that a configured model's engine will read.
    pub fn of(needed: &[NeededFile]) -> Self {
        let of =
            |purpose| needed.iter().filter(move |file| file.purpose == purpose).map(|file| file.path.clone());
        Self {
            // The first shard leads to the others.
            draft: of(Purpose::Draft).next(),
            projector: of(Purpose::Projector).next(),
            adapters: of(Purpose::Adapter).collect(),
        }
    }

    /// The first of them, where there is one.
    pub fn first(&self) -> Option<&Path> {
        self.draft.iter().chain(&self.projector).chain(&self.adapters).map(PathBuf::as_path).next()
    }

    /// Reads their headers; and the identities of the draft model's files.
    pub fn open(&self) -> Result<(Beside, Vec<FileId>), Failure> {
        let mut files = Vec::new();
        let mut draft = None;
        if let Some(path) = &self.draft {
            let model = header(path)?;
            let identity = model.shards().iter().map(|shard| shard.identity);
            files = identity.map(|of| FileId { device: of.device, inode: of.inode }).collect();
            draft = Some(Box::new(Facts::from_model(&model).map_err(|error| wrong(path, &error))?));
        }
        let projector =
            |path: &PathBuf| Projector::from_model(&header(path)?).map_err(|error| wrong(path, &error));
        let adapter =
            |path: &PathBuf| Adapter::from_model(&header(path)?).map_err(|error| wrong(path, &error));
        let beside = Beside {
            draft,
            projector: self.projector.as_ref().map(projector).transpose()?,
            adapters: self.adapters.iter().map(adapter).collect::<Result<_, _>>()?,
        };
        Ok((beside, files))
    }
}

fn header(path: &Path) -> Result<Model, Failure> {
    Model::open(path).map_err(|error| Failure::failed(error.to_string()))
}

fn wrong(path: &Path, error: &FitError) -> Failure {
    Failure::failed(format!("{}: {error}", path.display()))
}

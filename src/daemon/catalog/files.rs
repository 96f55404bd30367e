//! The files of a model, opened and recognised.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::action::page_cache::open_regular;
use crate::engine::{NeededFile, Purpose};
use crate::fit::{Facts, FitError};
use crate::gguf::{Identity, Model};
use crate::ledger::FileId;
use crate::ports::CatalogError;

/// Models whose facts are kept; a machine runs a dozen.
const REMEMBERED: usize = 16;

/// What is known of a model's files.
#[derive(Debug)]
pub(super) struct Known {
    identities: Vec<Identity>,
    /// The facts, or why there are none.
    pub facts: Result<Facts, FitError>,
    /// Bytes of all files.
    pub file_bytes: u64,
}

impl Known {
    /// The files, in the order of the shards.
    pub fn files(&self) -> Vec<FileId> {
        self.identities.iter().map(|i| FileId { device: i.device, inode: i.inode }).collect()
    }
}

/// Facts by the files that they were read from.
#[derive(Debug, Default)]
pub(super) struct Headers {
    known: VecDeque<Arc<Known>>,
}

impl Headers {
    fn find(&mut self, identities: &[Identity]) -> Option<Arc<Known>> {
        let at = self.known.iter().position(|known| known.identities == identities)?;
        let found = self.known.remove(at)?;
        self.known.push_back(Arc::clone(&found));
        Some(found)
    }

    fn keep(&mut self, known: Arc<Known>) {
        if self.known.len() == REMEMBERED {
            self.known.pop_front();
        }
        self.known.push_back(known);
    }
}

fn config(text: impl Into<String>) -> CatalogError {
    CatalogError::Config(text.into())
}

/// The model's files, opened: those that the asker could open, or else by us.
///
/// What an asker hands over has to be what the configuration names, by device and inode: it is
/// what the engine will open by name. (Whoever may replace files of the model may do so later as
/// well; this is against mistakes and confusion.)
pub(super) fn opened(
    needed: &[NeededFile],
    given: &[(PathBuf, File)],
) -> Result<Vec<(PathBuf, File)>, CatalogError> {
    let model = needed.iter().filter(|file| file.purpose == Purpose::Model);
    let open = |path: &Path| open_regular(path, None).map_err(|error| config(error.to_string()));
    if given.is_empty() {
        return model.map(|file| Ok((file.path.clone(), open(&file.path)?))).collect();
    }
    for file in needed.iter().filter(|file| file.purpose != Purpose::ApiKeys) {
        same(&file.path, given)?;
    }
    model
        .map(|file| {
            let own = same(&file.path, given)?.try_clone().map_err(|error| config(error.to_string()))?;
            Ok((file.path.clone(), own))
        })
        .collect()
}

/// The given file of that path, if it is the one that is there.
fn same<'a>(path: &Path, given: &'a [(PathBuf, File)]) -> Result<&'a File, CatalogError> {
    let shown = path.display();
    let (_, file) = given.iter().find(|(name, _)| name == path).ok_or_else(|| {
        config(format!(
            "{shown} was not handed over by the unit: restart it after changing its configuration"
        ))
    })?;
    let theirs = file.metadata().map_err(|error| config(format!("{shown}: {error}")))?;
    let ours = std::fs::metadata(path).map_err(|error| config(format!("can't open {shown}: {error}")))?;
    if !theirs.is_file() || (theirs.dev(), theirs.ino()) != (ours.dev(), ours.ino()) {
        return Err(config(format!("{shown} is not the file that the unit has opened")));
    }
    Ok(file)
}

/// What is known of the model in these files; read once, while they stay the same.
pub(super) fn known(
    headers: &std::sync::Mutex<Headers>,
    files: Vec<(PathBuf, File)>,
) -> Result<Arc<Known>, CatalogError> {
    let lock = || headers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let identities: Result<Vec<Identity>, _> = files.iter().map(|(_, file)| Identity::of(file)).collect();
    let identities = identities.map_err(|error| config(error.to_string()))?;
    if let Some(known) = lock().find(&identities) {
        return Ok(known);
    }
    let model = Model::from_files(files).map_err(|error| config(error.to_string()))?;
    let known = Arc::new(Known {
        identities: model.shards().iter().map(|shard| shard.identity).collect(),
        facts: Facts::from_model(&model),
        file_bytes: model.file_bytes(),
    });
    drop(model);
    // A vocabulary takes tens of MiB while it is read; the daemon gives them back.
    crate::os::release_memory();
    lock().keep(Arc::clone(&known));
    Ok(known)
}

/// Bytes of the files of these purposes.
pub(super) fn bytes_of(needed: &[NeededFile], purposes: &[Purpose]) -> u64 {
    let of = needed.iter().filter(|file| purposes.contains(&file.purpose));
    of.filter_map(|file| std::fs::metadata(&file.path).ok()).map(|about| about.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn scratch(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("plimsoll-catalog-{name}-{}", std::process::id()))
    }

    #[test]
    fn only_the_configured_file_is_taken() {
        let (path, other) = (scratch("model"), scratch("other"));
        for file in [&path, &other] {
            File::create(file).unwrap().write_all(b"GGUF").unwrap();
        }
        let needed = [NeededFile { path: path.clone(), purpose: Purpose::Model }];
        let given = |file: &Path| vec![(path.clone(), File::open(file).unwrap())];
        assert_eq!(opened(&needed, &given(&path)).unwrap().len(), 1);
        assert_eq!(opened(&needed, &[]).unwrap().len(), 1);
        let wrong = opened(&needed, &given(&other)).unwrap_err().to_string();
        assert!(wrong.ends_with("is not the file that the unit has opened"), "{wrong}");
        let misnamed = vec![(other.clone(), File::open(&path).unwrap())];
        assert!(opened(&needed, &misnamed).unwrap_err().to_string().contains("was not handed over"));
        let keys = [NeededFile { path: scratch("keys"), purpose: Purpose::ApiKeys }];
        assert!(opened(&[&needed[..], &keys].concat(), &given(&path)).is_ok(), "keys stay with the unit");
        for file in [path, other] {
            std::fs::remove_file(file).unwrap();
        }
    }

    #[test]
    fn what_is_no_model_is_a_sentence() {
        let path = scratch("text");
        File::create(&path).unwrap().write_all(b"hello").unwrap();
        let headers = std::sync::Mutex::default();
        let error = known(&headers, vec![(path.clone(), File::open(&path).unwrap())]).unwrap_err();
        assert!(error.to_string().contains("plimsoll-catalog-text"), "{error}");
        std::fs::remove_file(path).unwrap();
    }
}

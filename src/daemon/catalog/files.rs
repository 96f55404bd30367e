//! The files of a model, opened and recognised.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::action::page_cache::open_regular;
use crate::engine::{NeededFile, Purpose};
use crate::fit::{Adapter, Facts, FitError, Projector};
use crate::gguf::{Allowance, Identity, Model};
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
    /// Which files they are, and whether they are still the same.
    pub fn identities(&self) -> &[Identity] {
        &self.identities
    }

    /// The files: the model's in the order of its shards, then the draft model's, then the others.
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

/// A file of a model or beside it, opened.
#[derive(Debug)]
pub(super) struct Opened {
    purpose: Purpose,
    path: PathBuf,
    file: File,
}

/// What is priced, in the order in which the files are known.
const PRICED: [Purpose; 4] = [Purpose::Model, Purpose::Draft, Purpose::Projector, Purpose::Adapter];

/// The files that are priced, opened: those that the asker could open, or else by us.
///
/// What an asker hands over has to be what the configuration names, by device and inode: it is
/// what the engine will open by name. (Whoever may replace files of the model may do so later as
/// well; this is against mistakes and confusion.)
pub(super) fn opened(needed: &[NeededFile], given: &[(PathBuf, File)]) -> Result<Vec<Opened>, CatalogError> {
    let open = |path: &Path| {
        if given.is_empty() {
            return open_regular(path, None).map_err(|error| config(error.to_string()));
        }
        same(path, given)?.try_clone().map_err(|error| config(error.to_string()))
    };
    if !given.is_empty() {
        for file in needed.iter().filter(|file| file.purpose != Purpose::ApiKeys) {
            same(&file.path, given)?;
        }
    }
    let of = |purpose: Purpose| needed.iter().filter(move |file| file.purpose == purpose);
    let files = PRICED.into_iter().flat_map(of);
    files
        .map(|needed| {
            let (purpose, path) = (needed.purpose, needed.path.clone());
            Ok(Opened { purpose, file: open(&path)?, path })
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

/// What is known of the model in these files, and of what is loaded beside it; read once, while they
/// stay the same.
pub(super) fn known(
    headers: &std::sync::Mutex<Headers>,
    files: Vec<Opened>,
) -> Result<Arc<Known>, CatalogError> {
    let lock = || headers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let identities: Result<Vec<Identity>, _> =
        files.iter().map(|opened| Identity::of(&opened.file)).collect();
    let identities = identities.map_err(|error| config(error.to_string()))?;
    if let Some(known) = lock().find(&identities) {
        return Ok(known);
    }
    let file_bytes = identities.iter().map(|identity| identity.size).fold(0, u64::saturating_add);
    let known = Arc::new(Known { facts: read(files)?, identities, file_bytes });
    // A vocabulary takes tens of MiB while it is read; the daemon gives them back.
    crate::os::release_memory();
    lock().keep(Arc::clone(&known));
    Ok(known)
}

/// Reads the headers. A file beside the model that is none of its kind is an error of the
/// configuration; a model that can't be priced is not.
fn read(files: Vec<Opened>) -> Result<Result<Facts, FitError>, CatalogError> {
    let (mut model, mut draft, mut beside) = (Vec::new(), Vec::new(), Vec::new());
    for Opened { purpose, path, file } in files {
        match purpose {
            Purpose::Model => model.push((path, file)),
            Purpose::Draft => draft.push((path, file)),
            _ => beside.push((purpose, path, file)),
        }
    }
    let mut allowance = Allowance::default();
    let mut headers =
        |files| Model::from_files_within(files, &mut allowance).map_err(|error| config(error.to_string()));
    let mut facts = match Facts::from_model(&headers(model)?) {
        Ok(facts) => facts,
        Err(error) => return Ok(Err(error)),
    };
    if let Some((path, _)) = draft.first() {
        let path = path.clone();
        let draft = Facts::from_model(&headers(draft)?);
        facts.beside.draft = Some(Box::new(draft.map_err(|error| wrong(&path, &error))?));
    }
    for (purpose, path, file) in beside {
        let model = headers(vec![(path.clone(), file)])?;
        if purpose == Purpose::Projector {
            facts.beside.projector =
                Some(Projector::from_model(&model).map_err(|error| wrong(&path, &error))?);
        } else {
            facts.beside.adapters.push(Adapter::from_model(&model).map_err(|error| wrong(&path, &error))?);
        }
    }
    Ok(Ok(facts))
}

fn wrong(path: &Path, error: &FitError) -> CatalogError {
    config(format!("{}: {error}", path.display()))
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
        let needed = [NeededFile { path: path.clone(), purpose: Purpose::Model }];
        let error = known(&headers, opened(&needed, &[]).unwrap()).unwrap_err();
        assert!(error.to_string().contains("plimsoll-catalog-text"), "{error}");
        std::fs::remove_file(path).unwrap();
    }
}

//! What of the models' files is in the page cache, looked at before each admission.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use crate::action::page_cache::{drop_file, open_regular};
use crate::bytes::Bytes;
use crate::ledger::FileId;
use crate::os::resident_bytes;

/// The files of models, with their bytes in the page cache as they were last seen.
#[derive(Debug, Default)]
pub struct PageCache {
    seen: Mutex<BTreeMap<FileId, (PathBuf, Bytes)>>,
}

impl PageCache {
    /// Looks at these files. Blocks; for a thread that may.
    pub fn look(&self, paths: &[PathBuf]) {
        let mut seen = BTreeMap::new();
        for path in paths {
            // One that is missing or can't be seen is no cache to drop.
            let Ok(file) = open_regular(path, None) else { continue };
            if let (Ok(id), Ok(bytes)) = (id_of(&file), resident_bytes(&file)) {
                seen.insert(id, (path.clone(), bytes));
            }
        }
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = seen;
    }

    /// Bytes of each file.
    #[must_use]
    pub fn cached(&self) -> BTreeMap<FileId, Bytes> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.iter().map(|(id, (_, bytes))| (*id, *bytes)).collect()
    }

    /// Drops these files from the page cache, as far as they are still the same. Blocks. Returns
    /// what was freed.
    pub fn drop_files(&self, files: &[FileId]) -> Bytes {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut freed = Bytes::ZERO;
        for id in files {
            let Some((path, _)) = seen.get(id) else { continue };
            match open_regular(path, Some(*id)).map(|file| drop_file(&file)) {
                Ok(Ok(dropped)) => {
                    freed += dropped.gain();
                    let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some((_, bytes)) = seen.get_mut(id) {
                        *bytes = dropped.after;
                    }
                }
                Ok(Err(error)) => tracing::warn!("{}: {error}", path.display()),
                Err(error) => tracing::warn!("{error}"),
            }
        }
        freed
    }
}

fn id_of(file: &File) -> std::io::Result<FileId> {
    let about = file.metadata()?;
    Ok(FileId { device: about.dev(), inode: about.ino() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn what_is_cached_is_seen_and_a_replaced_file_is_left_alone() {
        let path = std::env::temp_dir().join(format!("plimsoll-cache-{}", std::process::id()));
        let mut file = File::create(&path).unwrap();
        file.write_all(&[1; 1 << 16]).unwrap();
        let id = id_of(&file).unwrap();
        let cache = PageCache::default();
        cache.look(&[path.clone(), PathBuf::from("/nowhere/model.gguf")]);
        assert_eq!(cache.cached(), BTreeMap::from([(id, Bytes(1 << 16))]));
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "another").unwrap();
        assert_eq!(cache.drop_files(&[id, FileId { device: 0, inode: 0 }]), Bytes::ZERO);
        assert_eq!(std::fs::read(&path).unwrap(), b"another");
        std::fs::remove_file(path).unwrap();
    }
}

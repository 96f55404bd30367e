//! The configuration, read again when its files have changed.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::config::{self, Loaded};
use crate::engine;

/// Directories in directories: `models.d/NAME.toml.d`.
const DEPTH: usize = 2;

/// A file as it was when it was read.
type Stamp = (PathBuf, u64, u64, i64, i64);

/// The configuration in use.
pub(super) struct Sources {
    root: PathBuf,
    stamps: Vec<Stamp>,
    loaded: Arc<Loaded>,
    /// The last settings of the daemon that had no error.
    settings: Arc<config::Daemon>,
    readings: u64,
}

impl Sources {
    pub(super) fn new(root: &Path) -> Self {
        let mut sources = Self {
            root: root.to_owned(),
            stamps: Vec::new(),
            loaded: Arc::new(Loaded { unread: true, ..Loaded::default() }),
            settings: Arc::default(),
            readings: 0,
        };
        sources.read();
        sources
    }

    /// Reads everything again.
    pub(super) fn read(&mut self) {
        // Taken before: what changes while it is read is read once more.
        self.stamps = stamps(&self.root);
        self.readings += 1;
        let mut loaded = engine::load(&self.root);
        // Those that run are still asked and known by their aliases. None starts: `plimsoll run` reads the files itself.
        if loaded.unread && !self.loaded.unread {
            loaded = Loaded { problems: loaded.problems, settings: None, ..Loaded::clone(&self.loaded) };
        }
        if let Some(settings) = &loaded.settings {
            self.settings = Arc::new(settings.clone());
        }
        self.loaded = Arc::new(loaded);
    }

    /// The configuration as it is now.
    pub(super) fn current(&mut self) -> (Arc<Loaded>, Arc<config::Daemon>) {
        if stamps(&self.root) != self.stamps {
            self.read();
        }
        (Arc::clone(&self.loaded), Arc::clone(&self.settings))
    }

    /// How often it was read.
    pub(super) const fn readings(&self) -> u64 {
        self.readings
    }
}

fn stamps(root: &Path) -> Vec<Stamp> {
    let mut stamps = Vec::new();
    for directory in config::DIRECTORIES {
        walk(&root.join(directory), DEPTH, &mut stamps);
    }
    stamps.sort();
    stamps
}

fn walk(directory: &Path, depth: usize, stamps: &mut Vec<Stamp>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if depth > 0 {
                walk(&path, depth - 1, stamps);
            }
        } else if path.extension().is_some_and(|extension| extension == "toml") {
            // What a link points to counts; a link to nothing is itself.
            let about = std::fs::metadata(&path).or_else(|_| std::fs::symlink_metadata(&path));
            if let Ok(about) = about {
                stamps.push((path, about.ino(), about.size(), about.ctime(), about.ctime_nsec()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_seen_and_a_broken_file_leaves_the_last_good_settings() {
        let root = std::env::temp_dir().join(format!("plimsoll-sources-{}", std::process::id()));
        let etc = root.join("etc/plimsoll");
        std::fs::create_dir_all(etc.join("models.d")).unwrap();
        std::fs::write(etc.join("plimsoll.toml"), "reserve = \"1GiB\"\n").unwrap();
        let mut sources = Sources::new(&root);
        let (loaded, settings) = sources.current();
        assert!(loaded.models.is_empty());
        std::fs::write(etc.join("models.d/a.toml"), "model = \"/nowhere/a.gguf\"\ncontext = 4096\n").unwrap();
        assert_eq!(sources.current().0.models.len(), 1);
        std::fs::write(etc.join("plimsoll.toml"), "reserve = \n").unwrap();
        let (loaded, after) = sources.current();
        assert!(!loaded.is_valid());
        assert_eq!(after.reserve, settings.reserve);
        assert_eq!(loaded.models.len(), 1, "who runs can still be asked what it does");
        // One that starts knows nothing of any model.
        let (fresh, _) = Sources::new(&root).current();
        assert_eq!((fresh.models.len(), fresh.broken.len()), (0, 1));
        std::fs::remove_dir_all(root).unwrap();
    }
}

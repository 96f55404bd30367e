//! The configuration, read again when its files have changed.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::config::{self, Loaded};
use crate::engine;

/// Directories in directories: `models.d/NAME.toml.d`.
const DEPTH: usize = 2;

/// A file as it was when it was read.
type Stamp = (PathBuf, u64, u64, i64, i64);

/// The configuration in use. It has two locks: files may be on a disk that does not answer, and the daemon's loop is
/// not to wait for whoever looks at them.
pub(super) struct Sources {
    root: PathBuf,
    /// The files as they were when they were read last; locked while they are looked at and read.
    stamps: Mutex<Vec<Stamp>>,
    /// What was read; locked only to copy or to replace it, and always after `stamps`.
    last: Mutex<Reading>,
}

/// The configuration as it was read once.
#[derive(Clone, Default)]
pub(super) struct Reading {
    pub(super) loaded: Arc<Loaded>,
    /// The last settings of the daemon that had no error.
    pub(super) settings: Arc<config::Daemon>,
    /// How often it was read until then.
    pub(super) number: u64,
}

impl Sources {
    pub(super) fn new(root: &Path) -> Self {
        let nothing =
            Reading { loaded: Arc::new(Loaded { unread: true, ..Loaded::default() }), ..Reading::default() };
        let sources = Self { root: root.to_owned(), stamps: Mutex::default(), last: Mutex::new(nothing) };
        sources.read();
        sources
    }

    /// What was read last, at once: no file is looked at.
    pub(super) fn last(&self) -> Reading {
        lock(&self.last).clone()
    }

    /// The configuration as it is now. Blocks as long as its files do.
    pub(super) fn current(&self) -> Reading {
        let mut known = lock(&self.stamps);
        let now = stamps(&self.root);
        if now == *known { self.last() } else { self.read_as(&mut known, now) }
    }

    /// Reads everything again. Blocks as long as the files do.
    pub(super) fn read(&self) -> Reading {
        let mut known = lock(&self.stamps);
        self.read_as(&mut known, stamps(&self.root))
    }

    /// The same, with the stamps taken before: what changes while it is read is read once more.
    fn read_as(&self, known: &mut Vec<Stamp>, now: Vec<Stamp>) -> Reading {
        let mut loaded = engine::load(&self.root);
        let before = self.last();
        // Those that run are still asked and known by their aliases. None starts: `plimsoll run` reads the files itself.
        if loaded.unread && !before.loaded.unread {
            loaded = Loaded { problems: loaded.problems, settings: None, ..Loaded::clone(&before.loaded) };
        }
        let settings = loaded.settings.clone().map_or(before.settings, Arc::new);
        let reading = Reading { loaded: Arc::new(loaded), settings, number: before.number + 1 };
        *known = now;
        *lock(&self.last) = reading.clone();
        reading
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
        let sources = Sources::new(&root);
        let before = sources.current();
        assert!(before.loaded.models.is_empty());
        std::fs::write(etc.join("models.d/a.toml"), "model = \"/nowhere/a.gguf\"\ncontext = 4096\n").unwrap();
        assert!(sources.last().loaded.models.is_empty(), "nobody has looked at the files");
        assert_eq!(sources.current().loaded.models.len(), 1);
        assert_eq!((sources.last().loaded.models.len(), sources.last().number), (1, before.number + 1));
        std::fs::write(etc.join("plimsoll.toml"), "reserve = \n").unwrap();
        let after = sources.current();
        assert!(!after.loaded.is_valid());
        assert_eq!(after.settings.reserve, before.settings.reserve);
        assert_eq!(after.loaded.models.len(), 1, "who runs can still be asked what it does");
        // One that starts knows nothing of any model.
        let fresh = Sources::new(&root).current().loaded;
        assert_eq!((fresh.models.len(), fresh.broken.len()), (0, 1));
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn what_was_read_last_is_there_while_a_disk_does_not_answer() {
        let sources = Sources::new(Path::new("/nowhere"));
        std::thread::scope(|scope| {
            // As one has it whose look at the files does not end.
            let hangs = lock(&sources.stamps);
            let (answer, answered) = std::sync::mpsc::channel();
            let sources = &sources;
            scope.spawn(move || answer.send(sources.last().number));
            let number = answered.recv_timeout(std::time::Duration::from_secs(10));
            drop(hangs);
            assert_eq!(number, Ok(1));
        });
    }
}

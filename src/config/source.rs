//! Finds and reads the fragments of the configuration, in systemd's order.
//!
//! Of files with the same name the one in `/etc` wins, then `/run`, then `/usr/lib`; a symlink to
//! `/dev/null` masks the name. Drop-ins (`NAME.toml.d/*.toml`) are found the same way and laid over
//! the file key by key, in the order of their names over all three directories.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::problem::{Place, Problem};
use super::table::Table;
use crate::os::error_text;

/// The directories of the configuration, the strongest first.
pub const DIRECTORIES: [&str; 3] = ["etc/plimsoll", "run/plimsoll", "usr/lib/plimsoll"];

/// The largest fragment that is read, in bytes.
const LARGEST: u64 = 1 << 20;

/// The files of the configuration below one root directory.
pub(super) struct Sources<'a> {
    root: &'a Path,
}

/// What a name of the configuration stands for.
pub(super) enum Found {
    /// No such file.
    Nothing,
    /// Masked by a symlink to `/dev/null`.
    Masked,
    /// The whole of it: the file with its drop-ins laid over it.
    Whole(Table),
    /// Some of it can't be read or parsed, which was reported.
    Broken,
}

impl<'a> Sources<'a> {
    pub(super) fn new(root: &'a Path) -> Self {
        Self { root }
    }

    /// The files with the ending `.toml` that the directory `below` has, by their names without
    /// the ending; each as the path of the running system.
    pub(super) fn list(&self, below: &str, problems: &mut Vec<Problem>) -> BTreeMap<String, PathBuf> {
        let mut found = BTreeMap::new();
        for directory in DIRECTORIES {
            let logical = Path::new("/").join(directory).join(below);
            let entries = match fs::read_dir(self.real(&logical)) {
                Ok(entries) => entries,
                Err(error) => {
                    if !absent(&error) {
                        problems.push(unreadable(&logical, &error));
                    }
                    continue;
                }
            };
            for entry in entries.filter_map(Result::ok) {
                let name = entry.file_name();
                let Some(name) = name.to_str().and_then(|name| name.strip_suffix(".toml")) else { continue };
                let directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
                if !name.is_empty() && !name.starts_with('.') && !directory {
                    found.entry(name.to_owned()).or_insert_with(|| logical.join(format!("{name}.toml")));
                }
            }
        }
        found
    }

    /// The names of models that have a directory of drop-ins.
    pub(super) fn drop_in_directories(&self, below: &str) -> BTreeMap<String, PathBuf> {
        let mut found = BTreeMap::new();
        for directory in DIRECTORIES {
            let logical = Path::new("/").join(directory).join(below);
            for entry in fs::read_dir(self.real(&logical)).into_iter().flatten().filter_map(Result::ok) {
                let file_name = entry.file_name();
                let name = file_name.to_str().and_then(|name| name.strip_suffix(".toml.d"));
                if let Some(name) = name.filter(|name| !name.is_empty()) {
                    found.entry(name.to_owned()).or_insert_with(|| logical.join(&file_name));
                }
            }
        }
        found
    }

    /// Reads the file `below`/`name`.toml with its drop-ins. `alone`: whether drop-ins count when
    /// there is no file.
    pub(super) fn read(&self, below: &str, name: &str, alone: bool, problems: &mut Vec<Problem>) -> Found {
        let file = Path::new(below).join(format!("{name}.toml"));
        let main = DIRECTORIES
            .iter()
            .map(|directory| Path::new("/").join(directory).join(&file))
            .find(|logical| self.real(logical).symlink_metadata().is_ok());
        if main.is_none() && !alone {
            return Found::Nothing;
        }
        if main.as_deref().is_some_and(|logical| self.masked(logical)) {
            return Found::Masked;
        }
        let drop_ins = self.list(&format!("{}.d", file.display()), problems);
        let fragments: Vec<_> =
            main.into_iter().chain(drop_ins.into_values().filter(|logical| !self.masked(logical))).collect();
        if fragments.is_empty() {
            return Found::Nothing;
        }
        let mut whole = Some(Table::default());
        for logical in fragments {
            let parsed = match self.text(&logical, problems) {
                Ok(text) => Table::parse(&logical, &text, problems),
                Err(problem) => {
                    problems.push(problem);
                    None
                }
            };
            whole = whole.zip(parsed).map(|(mut whole, parsed)| {
                whole.merge(parsed);
                whole
            });
        }
        whole.map_or(Found::Broken, Found::Whole)
    }

    fn real(&self, logical: &Path) -> PathBuf {
        self.root.join(logical.strip_prefix("/").unwrap_or(logical))
    }

    fn masked(&self, logical: &Path) -> bool {
        fs::read_link(self.real(logical)).is_ok_and(|target| target == Path::new("/dev/null"))
    }

    fn text(&self, logical: &Path, problems: &mut Vec<Problem>) -> Result<String, Problem> {
        let failed = |error: io::Error| unreadable(logical, &error);
        // An administrator may link to a file elsewhere, so symlinks are followed; a FIFO must not hold us up.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY)
            .open(self.real(logical))
            .map_err(failed)?;
        let about = file.metadata().map_err(failed)?;
        if !about.is_file() {
            return Err(Problem::error(Place::file(logical), "is not a regular file"));
        }
        // Below another root (a package being built, a test) the files are the builder's.
        if self.root == Path::new("/") {
            problems.extend(open_to_others(logical, about.uid(), about.gid(), about.mode()));
        }
        bounded(&file, logical)
    }
}

fn bounded(file: &File, logical: &Path) -> Result<String, Problem> {
    let mut bytes = Vec::new();
    file.take(LARGEST + 1).read_to_end(&mut bytes).map_err(|error| unreadable(logical, &error))?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > LARGEST {
        return Err(Problem::error(Place::file(logical), "is larger than 1 MiB, which no configuration is"));
    }
    String::from_utf8(bytes).map_err(|error| {
        let line =
            error.as_bytes()[..error.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count() + 1;
        let place =
            Place { file: logical.to_owned(), line: u32::try_from(line).unwrap_or(u32::MAX), column: 1 };
        Problem::error(place, "is not UTF-8 text")
    })
}

/// A warning when somebody else than root could change the file: the daemon acts on it as root.
fn open_to_others(logical: &Path, uid: u32, gid: u32, mode: u32) -> Option<Problem> {
    let warn = |message: String, hint: &str| {
        Some(Problem::warning(Place::file(logical), message).hint(hint.to_owned()))
    };
    if uid != 0 {
        warn(format!("belongs to user {uid}, who can change it"), "chown it to root")
    } else if mode & 0o002 != 0 {
        warn("can be changed by everyone".to_owned(), "chmod it to 0644")
    } else if mode & 0o020 != 0 && gid != 0 {
        warn(format!("can be changed by group {gid}"), "chmod it to 0644")
    } else {
        None
    }
}

fn unreadable(logical: &Path, error: &io::Error) -> Problem {
    Problem::error(Place::file(logical), format!("can't be read: {}", error_text(error)))
}

fn absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warns_of_files_that_others_can_change() {
        let file = Path::new("/etc/plimsoll/plimsoll.toml");
        for (uid, gid, mode, warned) in [
            (0, 0, 0o100_644, false),
            (0, 0, 0o100_664, false),
            (0, 50, 0o100_644, false),
            (0, 50, 0o100_664, true),
            (0, 0, 0o100_666, true),
            (1000, 0, 0o100_600, true),
        ] {
            assert_eq!(open_to_others(file, uid, gid, mode).is_some(), warned, "{uid} {gid} {mode:o}");
        }
    }
}

//! The mounts that a model's unit needs: `RequiresMountsFor=` for a generator to write.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::effective::effective;
use super::files::files;
use crate::config::{Daemon, EngineSource, Model};

/// The directories that have to be mounted before `model` starts: those of its files and of its
/// engine. Without I/O: at the time of a generator nothing is mounted yet.
#[must_use]
pub fn directories(model: &Model, daemon: &Daemon) -> BTreeSet<PathBuf> {
    // What is wrong with the arguments is for the start to say; here the keys have to do.
    let known = effective(model, &BTreeMap::new()).ok();
    let keys = [&model.model, &model.mmproj, &model.draft_model, &model.api_key_file];
    let mut paths: Vec<PathBuf> = keys.into_iter().flatten().cloned().collect();
    paths.extend(files(model, known.as_ref()).unwrap_or_default().into_iter().map(|file| file.path));
    paths.extend(model.command.as_ref().and_then(|command| command.first()).map(PathBuf::from));
    if let Some(EngineSource::Path { path }) = daemon.engines.get(&model.engine) {
        paths.push(path.clone());
    }
    let parents = paths.iter().filter_map(|path| path.parent());
    parents.filter(|directory| directory.is_absolute()).map(Path::to_owned).collect()
}

/// The drop-in for a model's unit (`50-plimsoll-mounts.conf`); none when there is nothing to say.
#[must_use]
pub fn drop_in(directories: &BTreeSet<PathBuf>) -> Option<String> {
    let paths: Vec<String> = directories.iter().filter_map(|path| escaped(path)).collect();
    if paths.is_empty() {
        return None;
    }
    let mut text =
        String::from("# Written by plimsoll's generator from the model's configuration.\n\n[Unit]\n");
    for path in paths {
        text.push_str(&format!("RequiresMountsFor={path}\n"));
    }
    Some(text)
}

/// A path as RequiresMountsFor= reads it: in quotes where it has to be, with backslashes before
/// quotes and backslashes, percent signs doubled. None for a path that can't be written.
fn escaped(path: &Path) -> Option<String> {
    let text = path.to_str()?;
    // A line break would be a line of its own in the unit.
    if text.chars().any(char::is_control) {
        return None;
    }
    let doubled = text.replace('%', "%%");
    let plain =
        |c: char| c.is_alphanumeric() || matches!(c, '/' | '.' | '-' | '_' | '+' | ':' | '@' | '%' | ',');
    if text.chars().all(plain) {
        return Some(doubled);
    }
    Some(format!("\"{}\"", doubled.replace('\\', "\\\\").replace('"', "\\\"")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_written_so_that_systemd_reads_them() {
        for (path, written) in [
            ("/mnt/ai-models", Some("/mnt/ai-models")),
            ("/mnt/ai models", Some("\"/mnt/ai models\"")),
            ("/mnt/100%", Some("/mnt/100%%")),
            ("/mnt/it's", Some("\"/mnt/it's\"")),
            (r#"/mnt/a"b'c"#, Some(r#""/mnt/a\"b'c""#)),
            ("/mnt/a\nExecStart=/bin/sh", None),
            (r"/mnt/back\slash", Some(r#""/mnt/back\\slash""#)),
        ] {
            assert_eq!(escaped(Path::new(path)).as_deref(), written, "{path}");
        }
    }

    #[test]
    fn a_drop_in_names_each_directory() {
        let directories = BTreeSet::from([PathBuf::from("/mnt/b c"), PathBuf::from("/mnt/a")]);
        assert_eq!(
            drop_in(&directories).unwrap(),
            "# Written by plimsoll's generator from the model's configuration.\n\n[Unit]\n\
             RequiresMountsFor=/mnt/a\nRequiresMountsFor=\"/mnt/b c\"\n"
        );
        assert_eq!(drop_in(&BTreeSet::new()), None);
    }
}

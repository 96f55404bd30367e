//! Opening what an engine will read, as the user that it will run as.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::libc;
use nix::unistd::{AccessFlags, access};

use super::failure::Failure;
use crate::engine::{NeededFile, Purpose};
use crate::gguf::Model;
use crate::os::error_text;

/// Opens every file, in their order. `gguf`: model files are looked into, so that a shard that is
/// missing, cut short or something else is found here and named.
///
/// # Errors
/// Exit code 78 with the path, the user and the reason.
pub fn open_all(needed: &[NeededFile], gguf: bool) -> Result<Vec<File>, Failure> {
    let files = needed.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    if gguf {
        for purpose in [Purpose::Model, Purpose::Draft, Purpose::Projector] {
            let of = needed.iter().zip(&files).filter(|(needed, _)| needed.purpose == purpose);
            let shards = of
                .map(|(needed, file)| Ok((needed.path.clone(), file.try_clone()?)))
                .collect::<io::Result<Vec<(PathBuf, File)>>>()?;
            if !shards.is_empty() {
                Model::from_files(shards).map_err(|error| Failure::config(error.to_string()))?;
            }
        }
    }
    Ok(files)
}

fn open(needed: &NeededFile) -> Result<File, Failure> {
    let path = &needed.path;
    let wrong = |reason: String| {
        Failure::config(format!("user {} can't read {}: {reason}", user_name(), path.display()))
    };
    // O_NONBLOCK: a FIFO in place of a file must not hold the unit up.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(|error| {
        let failure = wrong(reason(&error, path));
        match error.kind() {
            io::ErrorKind::PermissionDenied => failure
                .hint("units run as their own user: give it the right to read, for example by 'setfacl' or 'chmod o+rX'"),
            _ => failure,
        }
    })?;
    let about = file.metadata().map_err(|error| wrong(error_text(&error)))?;
    if !about.is_file() {
        return Err(wrong("it is not a regular file".to_owned()));
    }
    Ok(file)
}

/// Why a path could not be opened, naming the directory that is in the way.
fn reason(error: &io::Error, path: &Path) -> String {
    let ancestors = || path.ancestors().skip(1).collect::<Vec<_>>().into_iter().rev();
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            ancestors().find(|directory| access(*directory, AccessFlags::X_OK).is_err()).map_or_else(
                || error_text(error),
                |directory| format!("the directory {} is closed to it", directory.display()),
            )
        }
        io::ErrorKind::NotFound => ancestors().find(|directory| !directory.exists()).map_or_else(
            || "there is no such file".to_owned(),
            |directory| format!("there is no directory {}", directory.display()),
        ),
        _ => error_text(error),
    }
}

/// The user that this process runs as, for messages.
pub fn user_name() -> String {
    let uid = nix::unistd::geteuid();
    match nix::unistd::User::from_uid(uid) {
        Ok(Some(user)) => user.name,
        _ => uid.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Exit;

    fn needed(path: &Path, purpose: Purpose) -> NeededFile {
        NeededFile { path: path.to_owned(), purpose }
    }

    #[test]
    fn what_is_in_the_way_is_named() {
        let root = std::env::temp_dir().join(format!("plimsoll-files-{}", std::process::id()));
        std::fs::create_dir_all(root.join("sub")).unwrap();
        std::fs::write(root.join("template"), "x").unwrap();
        std::fs::write(root.join("model.gguf"), "not a model").unwrap();
        nix::unistd::mkfifo(&root.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let message = |path: &Path, purpose| {
            let failure = open_all(&[needed(path, purpose)], true).unwrap_err();
            assert_eq!(failure.exit, Exit::Config);
            failure.message
        };
        let text = message(&root.join("none"), Purpose::Other);
        assert!(text.contains("/none: there is no such file"), "{text}");
        let text = message(&root.join("gone/deep/none"), Purpose::Other);
        assert!(text.ends_with("/gone"), "{text}");
        for odd in ["sub", "fifo"] {
            let text = message(&root.join(odd), Purpose::Other);
            assert!(text.ends_with("it is not a regular file"), "{text}");
        }
        assert!(message(&root.join("model.gguf"), Purpose::Model).contains("model.gguf"));
        assert_eq!(open_all(&[needed(&root.join("template"), Purpose::Other)], true).unwrap().len(), 1);
        assert_eq!(open_all(&[needed(&root.join("model.gguf"), Purpose::Model)], false).unwrap().len(), 1);
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn a_closed_directory_is_named() {
        if nix::unistd::geteuid().is_root() {
            return; // root passes every directory
        }
        let root = std::env::temp_dir().join(format!("plimsoll-closed-{}", std::process::id()));
        std::fs::create_dir_all(root.join("closed")).unwrap();
        std::fs::write(root.join("closed/x"), "x").unwrap();
        let mode = |bits| std::os::unix::fs::PermissionsExt::from_mode(bits);
        std::fs::set_permissions(root.join("closed"), mode(0o000)).unwrap();
        let failure = open_all(&[needed(&root.join("closed/x"), Purpose::Other)], true).unwrap_err();
        assert!(failure.message.ends_with("closed is closed to it"), "{}", failure.message);
        std::fs::set_permissions(root.join("closed"), mode(0o700)).unwrap();
        std::fs::remove_dir_all(&root).unwrap();
    }
}

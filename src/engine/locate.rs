//! The executable of a model's engine.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};

use super::error::Error;
use crate::config::{DEFAULT_ENGINE, Daemon, EngineSource, Image, Model};
use crate::os::error_text;

/// Where llama-server is looked for when the configuration names no path: never along `PATH`.
pub const DIRECTORIES: [&str; 3] = ["/usr/local/bin", "/usr/bin", "/opt/llama.cpp/bin"];

/// What runs a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Engine {
    /// An executable file.
    Program(PathBuf),
    /// llama-server in a container image.
    Image(Image),
}

impl Engine {
    /// The executable file, of an engine that is one.
    #[must_use]
    pub fn program(&self) -> Option<&Path> {
        match self {
            Self::Program(path) => Some(path),
            Self::Image(_) => None,
        }
    }

    /// What stands for it at the beginning of a command line: the file, or the name of the image.
    #[must_use]
    pub fn word(&self) -> PathBuf {
        match self {
            Self::Program(path) => path.clone(),
            Self::Image(image) => PathBuf::from(&image.name),
        }
    }
}

/// The engine of `model`. An executable is checked to be one that this process may run; whether an image is there only
/// podman knows.
///
/// # Errors
/// There is none, or it is no executable file.
pub fn locate(model: &Model, daemon: &Daemon) -> Result<Engine, Error> {
    if let Some(program) = model.command.as_ref().and_then(|command| command.first()) {
        let path = PathBuf::from(program);
        return check_executable(&path).map(|()| Engine::Program(path));
    }
    match daemon.engines.get(&model.engine) {
        Some(EngineSource::Path { path }) => check_executable(path).map(|()| Engine::Program(path.clone())),
        Some(EngineSource::Image(image)) => Ok(Engine::Image(image.clone())),
        None if model.engine == DEFAULT_ENGINE => locate_default().map(Engine::Program),
        // Only where plimsoll.toml has errors, so that its engines are not known.
        None => Err(Error::UnknownEngine { engine: model.engine.clone() }),
    }
}

/// The image that is the engine of `model`, where it is one.
#[must_use]
pub fn image<'a>(model: &Model, daemon: &'a Daemon) -> Option<&'a Image> {
    match daemon.engines.get(&model.engine).filter(|_| model.command.is_none()) {
        Some(EngineSource::Image(image)) => Some(image),
        _ => None,
    }
}

/// llama-server, where no configuration names another.
///
/// # Errors
/// As [`locate`].
pub fn locate_default() -> Result<PathBuf, Error> {
    search(&DIRECTORIES.map(Path::new), DEFAULT_ENGINE)
}

/// The first of `directories` that has the program; one that is there and can't be run is an error
/// rather than skipped, since it is the one that was meant.
fn search(directories: &[&Path], program: &str) -> Result<PathBuf, Error> {
    let found = directories.iter().map(|directory| directory.join(program)).find(|path| path.exists());
    let path = found.ok_or_else(|| {
        let all: Vec<_> = directories.iter().map(|directory| directory.to_string_lossy()).collect();
        Error::NotInstalled { program: program.to_owned(), searched: all.join(", ") }
    })?;
    check_executable(&path).map(|()| path)
}

/// That `path` is a regular file which this process may execute.
///
/// # Errors
/// It is not, with the reason.
pub fn check_executable(path: &Path) -> Result<(), Error> {
    let cannot = |reason: String| Err(Error::NotExecutable { path: path.to_owned(), reason });
    let about = match fs::metadata(path) {
        Ok(about) => about,
        Err(error) => return cannot(error_text(&error)),
    };
    if !about.is_file() {
        return cannot("it is not a regular file".to_owned());
    }
    // Root may do anything but execute what has no x at all, which access(2) knows too.
    match access(path, AccessFlags::X_OK) {
        Ok(()) => Ok(()),
        Err(errno) => cannot(format!(
            "{} (its mode is {:04o})",
            error_text(&std::io::Error::from(errno)),
            about.permissions().mode() & 0o7777
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory of this test's own, removed at its end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("plimsoll-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn file(&self, name: &str, mode: u32) -> PathBuf {
            let path = self.0.join(name);
            fs::write(&path, "#!/bin/sh\n").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn finds_what_can_be_run() {
        let scratch = Scratch::new("locate");
        let program = scratch.file("llama-server", 0o755);
        let nowhere = scratch.0.join("nowhere");
        assert_eq!(search(&[&nowhere, &scratch.0], "llama-server").unwrap(), program);
        let error = search(&[&nowhere], "llama-server").unwrap_err().to_string();
        assert!(error.contains("install it"), "{error}");
    }

    #[test]
    fn says_why_it_can_not() {
        let scratch = Scratch::new("check");
        let plain = scratch.file("plain", 0o644);
        let error = check_executable(&plain).unwrap_err().to_string();
        assert!(error.ends_with("Permission denied (its mode is 0644)"), "{error}");
        let error = check_executable(&scratch.0).unwrap_err().to_string();
        assert!(error.ends_with("it is not a regular file"), "{error}");
        let error = check_executable(&scratch.0.join("none")).unwrap_err().to_string();
        assert!(error.ends_with("No such file or directory"), "{error}");
    }
}

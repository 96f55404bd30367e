//! The command line of an engine, with everything spelled out.

use std::collections::BTreeMap;
use std::path::Path;

use super::effective::{Effective, override_arguments};
use super::error::Error;
use super::placeholders;
use super::version::{OLDEST_BUILD, Version};
use crate::config::{Instance, Model};
use crate::fit::{GpuLayers, LoadMode, Settings};

/// What is run for one instance, and how it is asked whether it is ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The program, absolute, and its arguments. No secrets stand in them.
    pub argv: Vec<String>,
    /// Variables to add to the environment of the unit.
    pub environment: BTreeMap<String, String>,
    /// The address that it listens on.
    pub host: String,
    /// The port that it listens on.
    pub port: u16,
    /// The path that answers 200 once it is ready; none: ready when the port accepts.
    pub health_path: Option<String>,
}

impl Launch {
    /// llama-server at `executable` with exactly the settings `chosen`, which are those of
    /// `effective` with what was chosen for this start (context, layers, caches). `version` is that
    /// of the executable; none is taken for a current one.
    ///
    /// # Errors
    /// The instance has no port, or the version is too old.
    pub fn llama_server(
        model: &Model,
        instance: &Instance,
        executable: &Path,
        effective: &Effective,
        chosen: &Settings,
        version: Option<&Version>,
    ) -> Result<Self, Error> {
        if let Some(version) = version.filter(|version| version.is_too_old()) {
            return Err(Error::TooOld {
                path: executable.to_owned(),
                version: version.to_string(),
                oldest: OLDEST_BUILD,
            });
        }
        let launch = Self::without_command(model, instance)?;
        let path = |path: &Path| path.to_string_lossy().into_owned();
        let mut argv = vec![path(executable)];
        let mut say = |flag: &str, value: String| argv.extend([flag.to_owned(), value]);
        if let Some(file) = &model.model {
            say("--model", path(file));
        }
        say("--alias", effective.parsed.alias.clone().unwrap_or_else(|| model.name.to_string()));
        say("--host", launch.host.clone());
        say("--port", launch.port.to_string());
        if let Some(file) = &model.api_key_file {
            say("--api-key-file", path(file));
        }
        say("--ctx-size", chosen.context.to_string());
        say("--parallel", chosen.parallel.map_or_else(|| "-1".to_owned(), |slots| slots.to_string()));
        say("--cache-type-k", chosen.cache_type_k.name().to_owned());
        say("--cache-type-v", chosen.cache_type_v.name().to_owned());
        // 999 and -1 are what every version takes.
        say(
            "--gpu-layers",
            match chosen.gpu_layers {
                GpuLayers::Auto => "-1".to_owned(),
                GpuLayers::All => "999".to_owned(),
                GpuLayers::Count(n) => n.to_string(),
            },
        );
        say("--fit", "off".to_owned());
        say("--cache-ram", chosen.prompt_cache_mib.map_or_else(|| "-1".to_owned(), |mib| mib.to_string()));
        say("--ctx-checkpoints", chosen.context_checkpoints.to_string());
        // Short flags here: the long ones have been renamed.
        if let Some(file) = &effective.parsed.mmproj {
            say("-mm", path(file));
        }
        if let Some(file) = &effective.parsed.draft_model {
            say("-md", path(file));
        }
        argv.extend(load_mode(chosen.load_mode, version));
        if !chosen.repack {
            argv.push("--no-repack".to_owned());
        }
        argv.extend(override_arguments(&chosen.overrides));
        argv.extend(effective.rest.iter().cloned());
        Ok(Self { argv, ..launch })
    }

    /// The engine that `command` gives.
    ///
    /// # Errors
    /// The instance has no port, or something in braces is almost a placeholder.
    pub fn command(model: &Model, instance: &Instance) -> Result<Self, Error> {
        let launch = Self::without_command(model, instance)?;
        let command = model.command.as_deref().unwrap_or_default();
        let argv = placeholders::replaced(command, model, instance, launch.port)?;
        Ok(Self { argv, ..launch })
    }

    fn without_command(model: &Model, instance: &Instance) -> Result<Self, Error> {
        let port = instance.port(model.port).ok_or_else(|| Error::Port { instance: instance.clone() })?;
        Ok(Self {
            argv: Vec::new(),
            environment: model.environment.0.clone(),
            host: model.host.clone(),
            port,
            health_path: model.health_path.clone(),
        })
    }
}

/// The arguments for a load mode, as this version of llama-server spells them.
fn load_mode(mode: LoadMode, version: Option<&Version>) -> Vec<String> {
    let words: &[&str] = if version.is_none_or(Version::has_load_mode) {
        let mode = match mode {
            LoadMode::Auto => "auto",
            LoadMode::None => "none",
            LoadMode::Mmap => "mmap",
            LoadMode::Mlock => "mlock",
            LoadMode::MmapMlock => "mmap+mlock",
            LoadMode::DirectIo => "dio",
        };
        return vec!["--load-mode".to_owned(), mode.to_owned()];
    } else {
        match mode {
            LoadMode::Auto | LoadMode::Mmap => &[],
            LoadMode::None => &["--no-mmap"],
            LoadMode::Mlock => &["--no-mmap", "--mlock"],
            LoadMode::MmapMlock => &["--mlock"],
            LoadMode::DirectIo => &["--no-mmap", "--direct-io"],
        }
    };
    words.iter().map(|word| (*word).to_owned()).collect()
}

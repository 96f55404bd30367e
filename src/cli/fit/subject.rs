//! The model to price: a file, a configured model, or what a pasted command line names.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use super::beside::Named;
use crate::catalogue::{self, Choice};
use crate::cli::args::Fit;
use crate::cli::failure::{Exit, Failure};
use crate::cli::remote;
use crate::config::{self, Oversize, Reserve, Workload};
use crate::engine::{self, Engine};
use crate::fit::args::{self, Origin, Parsed};
use crate::fit::{FitError, Settings};
use crate::gguf::Model;

/// A model and the settings that it would run with.
#[derive(Clone, Debug)]
pub struct Subject {
    /// What to call it.
    pub name: String,
    /// Its headers.
    pub model: Model,
    /// The files beside it.
    pub beside: Named,
    /// The settings.
    pub settings: Settings,
    /// Where each setting comes from that is not llama-server's default, by its flag's long name.
    pub sources: BTreeMap<String, String>,
    /// Arguments that nothing is known about.
    pub passed_on: Vec<String>,
    /// One of the configuration's models.
    pub configured: bool,
    /// What may be done when it is too large.
    pub oversize: Oversize,
    /// Whether it may be swapped.
    pub workload: Workload,
    /// The configured reserve.
    pub reserve: Reserve,
    /// The engine, where it is installed.
    pub engine: Option<Engine>,
    /// Variables that the configuration gives it.
    pub environment: BTreeMap<String, String>,
    /// Where its description comes from.
    pub provenance: Provenance,
}

/// Where a model's description comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Provenance {
    /// Files of this machine.
    #[default]
    File,
    /// Headers of files on a server.
    Address,
    /// The catalogue.
    Catalogue {
        /// There is no such model or file: the figures are those of something near.
        assumed: bool,
        /// Whether the weights are exact, which those of mixed types are not.
        exact: bool,
        /// Sources and what else one should know, one sentence each.
        notes: Vec<String>,
    },
}

impl Subject {
    /// The model that the command line means.
    pub fn find(args: &Fit) -> Result<Self, Failure> {
        let (variables, arguments) = assignments(&args.arguments);
        match &args.model {
            Some(name) => Self::named(name, &args.root.root, arguments, &variables),
            None if arguments.is_empty() => Err(Failure::usage("which model?").hint(
                "plimsoll fit MODEL, plimsoll fit FILE.gguf, or plimsoll fit -- llama-server -m FILE.gguf",
            )),
            None => {
                let parsed = parse(arguments, &variables)?;
                match (&parsed.model, &parsed.download) {
                    (Some(file), _) => {
                        let file = file.clone();
                        Self::from_parsed(&file, parsed)
                    }
                    (None, Some(download)) => {
                        let download = download.clone();
                        Self::from_download(&download, parsed)
                    }
                    (None, None) => Err(Failure::usage("the command line names no model")
                        .hint("add '-m FILE.gguf' to it, or name the model before '--'")),
                }
            }
        }
    }

    /// A configured model, as it is.
    pub fn configured(root: &Path, name: &str) -> Result<Self, Failure> {
        Self::from_configuration(root, name, &[], &BTreeMap::new())
    }

    /// A model in files that somebody else has opened, with arguments of theirs: neither files nor
    /// variables of this process count, and files beside the model can't be named.
    pub fn opened(files: Vec<(PathBuf, File)>, arguments: &[String]) -> Result<Self, Failure> {
        let parsed =
            args::parse(arguments, &BTreeMap::new()).map_err(|error| Failure::failed(error.to_string()))?;
        if let Some(path) = Named::by(&parsed).first() {
            let shown = path.display();
            return Err(Failure::failed(format!("{shown} would have to be opened here, and is not"))
                .hint("'plimsoll fit' opens what is loaded beside a model as who calls it"));
        }
        let name = files.first().and_then(|(path, _)| path.file_name());
        let name = name.map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let model = Model::from_files(files).map_err(|error| Failure::failed(error.to_string()))?;
        Ok(Self::of(name, model, parsed, Reserve::default()))
    }

    /// The model with a name: an address, one of the catalogue, a file, or one of the configuration.
    pub fn named(
        name: &str,
        root: &Path,
        arguments: &[String],
        variables: &BTreeMap<String, String>,
    ) -> Result<Self, Failure> {
        if name.contains("://") || is_catalogued(name) {
            let parsed = parse(arguments, variables)?;
            if let Some(other) = &parsed.model {
                return Err(Failure::usage(format!("which model: {name} or {}?", other.display())));
            }
            return if name.contains("://") {
                Self::from_address(name, parsed)
            } else {
                Self::from_catalogue(catalogue::find(name)?, parsed)
            };
        }
        if is_path(name) {
            return Self::from_file(Path::new(name), arguments, variables);
        }
        // A model of the catalogue needs no colon where the configuration has none of that name.
        if let Ok(choice) = catalogue::find(name)
            && config::load(root).instance(name).is_err()
        {
            return Self::from_catalogue(choice, parse(arguments, variables)?);
        }
        Self::from_configuration(root, name, arguments, variables)
    }

    fn from_address(address: &str, parsed: Parsed) -> Result<Self, Failure> {
        let model = remote::open(address)?;
        let end = address.find(['?', '#']).unwrap_or(address.len());
        let name = address[..end].rsplit('/').next().unwrap_or(address).to_owned();
        Ok(Self { provenance: Provenance::Address, ..Self::of(name, model, parsed, reserve(Path::new("/"))) })
    }

    fn from_catalogue(choice: Choice, parsed: Parsed) -> Result<Self, Failure> {
        let model = choice.model()?;
        let provenance = Provenance::Catalogue {
            assumed: choice.is_assumed(),
            exact: choice.is_exact(),
            notes: choice.provenance(),
        };
        Ok(Self { provenance, ..Self::of(choice.name(), model, parsed, reserve(Path::new("/"))) })
    }

    /// What the engine would download: an address, or a repository whose model the catalogue has.
    fn from_download(download: &str, parsed: Parsed) -> Result<Self, Failure> {
        if download.contains("://") {
            return Self::from_address(download, parsed);
        }
        match catalogue::find(download) {
            Ok(choice) => Self::from_catalogue(choice, parsed),
            Err(_) => {
                Err(Failure::usage(format!("{download} is neither on this machine nor in the catalogue"))
                    .hint("give the address of its file: plimsoll fit https://.../NAME.gguf"))
            }
        }
    }

    fn from_file(
        file: &Path,
        arguments: &[String],
        variables: &BTreeMap<String, String>,
    ) -> Result<Self, Failure> {
        let parsed = parse(arguments, variables)?;
        if let Some(other) = parsed.model.as_ref().filter(|other| *other != file) {
            return Err(Failure::usage(format!("which model: {} or {}?", file.display(), other.display())));
        }
        Self::from_parsed(file, parsed)
    }

    fn from_parsed(file: &Path, parsed: Parsed) -> Result<Self, Failure> {
        let name = file.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        Ok(Self::of(name, open(file)?, parsed, reserve(Path::new("/"))))
    }

    fn of(name: String, model: Model, parsed: Parsed, reserve: Reserve) -> Self {
        let source = |origin: &Origin| match origin {
            Origin::Argument(flag) => format!("argument {flag}"),
            Origin::Variable(name) => format!("variable {name}"),
        };
        Self {
            name,
            model,
            sources: parsed.origins.iter().map(|(name, origin)| (name.clone(), source(origin))).collect(),
            beside: Named::by(&parsed),
            settings: parsed.settings,
            passed_on: parsed.passed_on,
            configured: false,
            oversize: Oversize::default(),
            workload: Workload::default(),
            reserve,
            engine: engine::locate_default().ok().map(Engine::Program),
            environment: BTreeMap::new(),
            provenance: Provenance::File,
        }
    }

    fn from_configuration(
        root: &Path,
        name: &str,
        arguments: &[String],
        variables: &BTreeMap<String, String>,
    ) -> Result<Self, Failure> {
        let loaded = config::load(root);
        let (_, model) = loaded.instance(name).map_err(|error| {
            Failure::config(error.to_string())
                .hint(format!("a file is meant? write ./{name}; 'plimsoll catalogue' lists others"))
        })?;
        let daemon = loaded.settings.clone().unwrap_or_default();
        let wrong = |error: engine::Error| Failure::config(error.to_string());
        let Some(file) = model.model.as_ref().filter(|_| model.command.is_none()) else {
            let size = model.memory.map(|size| format!(": {size}")).unwrap_or_default();
            return Err(Failure::config(format!(
                "'{name}' runs a command of its own, whose memory is declared rather than estimated{size}"
            )));
        };
        // What stands behind `--` comes last, and so wins. What the model says itself has to be right without it.
        if !arguments.is_empty() {
            engine::effective(model, variables).map_err(wrong)?;
        }
        let model_with = engine::Effective::with_arguments(model, arguments);
        let effective = engine::effective(&model_with, variables).map_err(wrong)?;
        let needed = engine::files(&model_with, Some(&effective)).map_err(wrong)?;
        let headers = Model::open(file).map_err(|error| Failure::config(error.to_string()))?;
        Ok(Self {
            name: model.name.to_string(),
            model: headers,
            sources: effective
                .sources
                .iter()
                .map(|(name, source)| (name.clone(), source.to_string()))
                .collect(),
            beside: Named::of(&needed),
            settings: effective.settings,
            passed_on: effective.passed_on,
            configured: true,
            oversize: model.oversize,
            workload: model.workload,
            reserve: daemon.reserve,
            engine: engine::locate(model, &daemon).ok(),
            environment: model.environment.0.clone(),
            provenance: Provenance::File,
        })
    }

    /// Whether the weights are those of a header, or follow from the name as surely.
    pub fn has_exact_weights(&self) -> bool {
        !matches!(self.provenance, Provenance::Catalogue { exact: false, .. })
    }

    /// What the estimate could not be made for, as a failure.
    pub fn failure(&self, error: &FitError) -> Failure {
        let exit = if self.configured { Exit::Config } else { Exit::Failed };
        Failure::new(exit, format!("{}: {error}", self.name))
    }
}

/// The reserve that `plimsoll.toml` sets.
fn reserve(root: &Path) -> Reserve {
    config::load(root).settings.map(|settings| settings.reserve).unwrap_or_default()
}

/// `MODEL:QUANTISATION` of the catalogue, also as llama-server's `-hf` writes it (`owner/MODEL-GGUF:QUANTISATION`).
fn is_catalogued(name: &str) -> bool {
    name.contains(':')
        && !name.ends_with(".gguf")
        && !name.starts_with(['.', '/'])
        && !Path::new(name).exists()
}

/// A file rather than a name: it has a slash, ends as model files do, or is there.
fn is_path(name: &str) -> bool {
    name.contains('/') || name.ends_with(".gguf") || name.parse::<config::ModelName>().is_err()
}

fn open(file: &Path) -> Result<Model, Failure> {
    Model::open(file).map_err(|error| {
        let failure = Failure::failed(error.to_string());
        match error {
            crate::gguf::ModelError::Short { .. } | crate::gguf::ModelError::MissingShard { .. } => {
                failure.hint("is the download complete?")
            }
            _ => failure,
        }
    })
}

fn parse(arguments: &[String], variables: &BTreeMap<String, String>) -> Result<Parsed, Failure> {
    let mut environment: BTreeMap<String, String> = std::env::vars_os()
        .filter_map(|(n, v)| Some((n.into_string().ok()?, v.into_string().ok()?)))
        .collect();
    environment.retain(|name, _| name.starts_with("LLAMA_ARG_"));
    environment.extend(variables.clone());
    args::parse(arguments, &environment).map_err(|error| Failure::usage(error.to_string()))
}

/// Assignments that stand before a pasted command, and the rest of it.
pub fn assignments(words: &[String]) -> (BTreeMap<String, String>, &[String]) {
    let assignment = |word: &String| {
        let (name, value) = word.split_once('=')?;
        let sound = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
        (!name.is_empty() && name.chars().all(sound)).then(|| (name.to_owned(), value.to_owned()))
    };
    let count = words.iter().take_while(|word| assignment(word).is_some()).count();
    (words[..count].iter().filter_map(assignment).collect(), &words[count..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_names_are_told_apart() {
        for path in ["./x", "x.gguf", "/m/x", "a b"] {
            assert!(is_path(path), "{path}");
        }
        for name in ["deepseek", "glm-4.7-flash"] {
            assert!(!is_path(name), "{name}");
        }
    }

    #[test]
    fn a_pasted_command_may_begin_with_variables() {
        let words = ["HSA_X=1", "LLAMA_ARG_UBATCH=1024", "llama-server", "-m", "A=b"].map(str::to_owned);
        let (variables, rest) = assignments(&words);
        assert_eq!(variables.len(), 2);
        assert_eq!(rest, ["llama-server", "-m", "A=b"]);
    }

    #[test]
    fn what_is_no_local_model_is_said() {
        let fit = |words: &[&str]| {
            use clap::Parser;
            let line = ["plimsoll", "fit"].iter().chain(words);
            let cli = crate::cli::args::Cli::try_parse_from(line).unwrap();
            let crate::cli::args::Verb::Fit(fit) = cli.verb else { panic!() };
            Subject::find(&fit).unwrap_err()
        };
        assert_eq!(fit(&[]).exit, Exit::Usage);
        assert!(fit(&["ftp://example.org/x.gguf"]).message.contains("no address of a model file"));
        assert!(fit(&["deepsek-v3.1:tq1_0"]).message.contains("did you mean deepseek-v3.1"));
        assert!(fit(&["--", "llama-server", "-hf", "a/b"]).message.contains("neither on this machine"));
        assert!(fit(&["--", "llama-server", "-c", "4096"]).message.contains("names no model"));
        assert_eq!(fit(&["/nowhere/x.gguf"]).exit, Exit::Failed);
        assert!(fit(&["/a.gguf", "--", "-m", "/b.gguf"]).message.contains("which model"));
    }
}

//! The configuration: fragments, merged, validated.
//!
//! `plimsoll.toml` and `models.d/NAME.toml` are looked for in `/etc/plimsoll`, `/run/plimsoll` and
//! `/usr/lib/plimsoll` ([`source`](self) explains the order). [`load`] reads all of it and reports
//! everything that is wrong at once; a model with an error breaks only that model. No file at all
//! is a working configuration.

mod daemon;
#[cfg(test)]
mod examples;
mod instance;
mod model;
mod model_file;
mod problem;
mod reader;
mod source;
pub mod span;
mod table;

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

pub use daemon::{Adopted, Daemon, EngineSource, Image, Mode, Peers, Reserve, Swap};
pub use instance::{Instance, ModelName, NameError};
pub use model::{
    DEFAULT_CACHE_TYPE, DEFAULT_ENGINE, DEFAULT_HOST, DEFAULT_PORT, DEFAULT_PRIORITY, DEFAULT_STALL_TIMEOUT,
    Environment, Given, GpuLayers, Model, Oversize, PromptCache, Workload, sounds_secret,
};
pub use problem::{Place, Problem, Severity, nearest, quoted};

pub use source::DIRECTORIES;
use source::{Found, Sources};
use table::Table;

/// Where the files of models are, below the directories of the configuration.
const MODELS: &str = "models.d";

/// The whole configuration, as far as it can be used.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Loaded {
    /// What `plimsoll.toml` says. With an error in it there is none: whoever has a last good one
    /// keeps it.
    pub settings: Option<Daemon>,
    /// The models without an error.
    pub models: BTreeMap<ModelName, Model>,
    /// The models with one, each with what is wrong with it.
    pub broken: BTreeMap<ModelName, Vec<Problem>>,
    /// Everything that is wrong anywhere, in the order of files and lines.
    pub problems: Vec<Problem>,
    /// The models by their aliases.
    pub aliases: BTreeMap<ModelName, ModelName>,
    /// Whether `plimsoll.toml` could not even be read, so that nothing is known of any model: all of them are broken.
    #[serde(skip)]
    pub unread: bool,
}

impl Loaded {
    /// The model of this name, or with this alias.
    #[must_use]
    pub fn resolve(&self, name_or_alias: &str) -> Option<&Model> {
        self.models
            .get(name_or_alias)
            .or_else(|| self.aliases.get(name_or_alias).and_then(|name| self.models.get(name)))
    }

    /// The instance that `text` means: `NAME`, `NAME@2`, or an alias in place of the name.
    ///
    /// # Errors
    /// When no model is called so, or its configuration is wrong: one sentence that says which.
    pub fn instance(&self, text: &str) -> Result<(Instance, &Model), NotFound> {
        let mut asked: Instance = text.parse()?;
        if asked.lease {
            // The model of that name is another thing, with limits and a reservation of its own.
            return Err(NotFound::Lease(asked));
        }
        if let Some(name) = self.aliases.get(&asked.model) {
            asked.model = name.clone();
        }
        if let Some(problems) = self.broken.get(&asked.model) {
            let first = problems.iter().find(|problem| problem.is_error());
            return Err(NotFound::Broken {
                name: asked.model,
                problem: first.map(ToString::to_string).unwrap_or_default(),
                more: problems.iter().filter(|problem| problem.is_error()).count().saturating_sub(1),
            });
        }
        let Some(model) = self.models.get(&asked.model) else {
            let names = self.models.keys().chain(self.aliases.keys()).map(ModelName::as_str);
            let hint = match nearest(asked.model.as_str(), names) {
                Some(near) => format!("did you mean '{near}'?"),
                None => format!("configure it in /etc/plimsoll/models.d/{}.toml", asked.model),
            };
            return Err(NotFound::Unknown { name: asked.model, hint });
        };
        Ok((asked, model))
    }

    /// Whether there is no error anywhere (warnings don't count).
    #[must_use]
    pub fn is_valid(&self) -> bool {
        !self.problems.iter().any(Problem::is_error)
    }
}

/// Why a name stands for no model that could run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotFound {
    /// It is not even a name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// It means a lease.
    #[error("'{0}' is the name of a lease, and of no model")]
    Lease(Instance),
    /// Nothing is called so.
    #[error("there is no model '{name}'; {hint}")]
    Unknown {
        /// What was asked for.
        name: ModelName,
        /// What it may have meant.
        hint: String,
    },
    /// There is one, but its configuration is wrong.
    #[error("the configuration of '{name}' is wrong: {problem}{}", others(*more))]
    Broken {
        /// The model.
        name: ModelName,
        /// The first thing that is wrong.
        problem: String,
        /// How many other errors there are.
        more: usize,
    },
}

fn others(more: usize) -> String {
    if more == 0 { String::new() } else { format!(" (and {more} more: plimsoll validate)") }
}

/// Reads the configuration below `root`, which is `/` for the running system.
#[must_use]
pub fn load(root: &Path) -> Loaded {
    let sources = Sources::new(root);
    let mut problems = Vec::new();

    let (table, unread) = match sources.read("", "plimsoll", true, &mut problems) {
        Found::Whole(table) => (table, Vec::new()),
        Found::Nothing | Found::Masked => (Table::default(), Vec::new()),
        // Without their defaults models would be others: with no key, on all addresses.
        Found::Broken => (Table::default(), problems.clone()),
    };
    let (settings, defaults) = daemon::read(table, &mut problems);
    if let Ok(name) = "model-defaults".parse() {
        model_file::check_defaults(&name, &defaults, &mut problems);
    }
    let settings = (!problems.iter().any(Problem::is_error)).then_some(settings);

    let mut loaded = Loaded { unread: !unread.is_empty(), ..Loaded::default() };
    let names = sources.list(MODELS, &mut problems);
    for (name, directory) in sources.drop_in_directories(MODELS) {
        if !names.contains_key(&name) {
            problems.push(Problem::warning(
                Place::file(&directory),
                format!("has no effect: there is no model {}", quoted(&name)),
            ));
        }
    }
    for (name, file) in names {
        let mut own = Vec::new();
        match name.parse::<ModelName>() {
            Ok(name) if !unread.is_empty() => drop(loaded.broken.insert(name, unread.clone())),
            Ok(name) if name.is_foreign() => own.push(
                Problem::error(
                    Place::file(&file),
                    format!("{} is the name of a unit, and can't be a model's", quoted(name.as_str())),
                )
                .hint(format!(
                    "a service of somebody else is adopted in plimsoll.toml, under [adopt.\"{name}\"]"
                )),
            ),
            Ok(name) => {
                read_model(&sources, &name, &file, settings.as_ref(), &defaults, &mut loaded, &mut own)
            }
            Err(error) => own.push(Problem::error(Place::file(&file), error.to_string())),
        }
        problems.append(&mut own);
    }
    loaded.settings = settings;
    between_models(&mut loaded, &mut problems);
    problems.sort();
    problems.dedup();
    loaded.problems = problems;
    loaded
}

fn read_model(
    sources: &Sources<'_>,
    name: &ModelName,
    file: &Path,
    settings: Option<&Daemon>,
    defaults: &Table,
    loaded: &mut Loaded,
    problems: &mut Vec<Problem>,
) {
    let table = match sources.read(MODELS, name.as_str(), false, problems) {
        Found::Whole(table) => table,
        Found::Nothing | Found::Masked => return,
        Found::Broken => {
            loaded.broken.insert(name.clone(), problems.clone());
            return;
        }
    };
    let model = model_file::read(name, table, defaults, file, problems);
    // With errors in plimsoll.toml it is not known which engines there are meant to be.
    if let (Some(model), Some(settings)) = (&model, settings)
        && !settings.engine_names().any(|engine| engine == model.engine)
    {
        let hint = nearest(&model.engine, settings.engine_names()).map_or_else(
            || format!("give its path in plimsoll.toml under [engine.{}]", model.engine),
            |near| format!("did you mean \"{near}\"?"),
        );
        problems.push(
            Problem::error(
                model.place("engine"),
                format!("'engine' {} is not configured", quoted(&model.engine)),
            )
            .hint(hint),
        );
    }
    problems.sort();
    match model {
        Some(model) if !problems.iter().any(Problem::is_error) => {
            loaded.models.insert(name.clone(), model);
        }
        _ => {
            loaded.broken.insert(name.clone(), problems.clone());
        }
    }
}

/// What is wrong between models: names that mean two of them, ports that two want.
///
/// An alias that is not unique is an error, and means nobody; the models themselves still run.
fn between_models(loaded: &mut Loaded, problems: &mut Vec<Problem>) {
    let mut owners: BTreeMap<ModelName, Vec<&Model>> = BTreeMap::new();
    let mut ports: BTreeMap<u16, Vec<&Model>> = BTreeMap::new();
    for model in loaded.models.values() {
        for alias in model.aliases.iter().filter(|alias| **alias != model.name) {
            owners.entry(alias.clone()).or_default().push(model);
        }
        ports.entry(model.port).or_default().push(model);
    }
    let mut aliases = BTreeMap::new();
    for (alias, models) in owners {
        if loaded.models.contains_key(&alias) || loaded.broken.contains_key(&alias) {
            for model in models {
                problems.push(Problem::error(
                    model.place("aliases"),
                    format!("alias '{alias}' is the name of another model"),
                ));
            }
        } else if let [model] = models[..] {
            aliases.insert(alias, model.name.clone());
        } else {
            for model in &models {
                let others = joined(models.iter().filter(|other| other.name != model.name));
                problems.push(
                    Problem::error(
                        model.place("aliases"),
                        format!("alias '{alias}' is also one of {others}"),
                    )
                    .hint("it means none of them until it is unique"),
                );
            }
        }
    }
    for (port, models) in ports.into_iter().filter(|(_, models)| models.len() > 1) {
        for model in &models {
            let others = joined(models.iter().filter(|other| other.name != model.name));
            problems.push(
                Problem::warning(model.place("port"), format!("port {port} is also that of {others}"))
                    .hint("only one of them can run at a time"),
            );
        }
    }
    loaded.aliases = aliases;
}

/// `'a', 'b' and 3 more`.
fn joined<'a>(models: impl Iterator<Item = &'a &'a Model>) -> String {
    const SHOWN: usize = 3;
    let names: Vec<String> = models.map(|model| format!("'{}'", model.name)).collect();
    let shown = names[..names.len().min(SHOWN)].join(", ");
    if names.len() > SHOWN { format!("{shown} and {} more", names.len() - SHOWN) } else { shown }
}

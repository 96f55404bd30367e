//! What is wrong with a model as a whole: its keys, arguments and variables together.

use std::collections::BTreeMap;
use std::path::Path;

use super::effective::effective;
use super::error::Error;
use super::files::files;
use super::launch::Launch;
use crate::config::{self, Instance, Loaded, Model, Place, Problem};

/// The configuration below `root`, checked whole: [`config::load`] and [`check`].
#[must_use]
pub fn load(root: &Path) -> Loaded {
    check(config::load(root))
}

/// Checks the models of a configuration as their engines would see them. One with an error is
/// broken from then on.
#[must_use]
pub fn check(mut loaded: Loaded) -> Loaded {
    let models = std::mem::take(&mut loaded.models);
    for (name, model) in models {
        let found = problems(&model);
        if found.iter().any(Problem::is_error) {
            loaded.broken.insert(name, found.clone());
        } else {
            loaded.models.insert(name, model);
        }
        loaded.problems.extend(found);
    }
    loaded.problems.sort();
    loaded
}

fn problems(model: &Model) -> Vec<Problem> {
    let error = |error: Error| {
        let place = error.place().cloned().unwrap_or_else(|| Place::file(&model.file));
        Problem::error(place, error.to_string())
    };
    if model.command.is_some() {
        return Launch::command(model, &Instance::first(model.name.clone()))
            .err()
            .map(error)
            .into_iter()
            .collect();
    }
    // The unit's own environment is only known at the start.
    let settings = match effective(model, &BTreeMap::new()) {
        Ok(settings) => settings,
        Err(wrong) => return vec![error(wrong)],
    };
    let mut found: Vec<Problem> = files(model, Some(&settings)).err().map(error).into_iter().collect();
    if !settings.passed_on.is_empty() {
        let unknown = settings.passed_on.join(" ");
        let key = if model.given("engine-args").is_some() { "engine-args" } else { "environment" };
        found.push(
            Problem::warning(
                model.place(key),
                format!("{} is unknown to plimsoll", config::quoted(&unknown)),
            )
            .hint("the engine gets it, and the estimate takes it to need no memory"),
        );
    }
    found
}

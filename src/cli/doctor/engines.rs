//! The checks of engines and models: what is installed, and what their own tools say.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::checks::{Finding, Level};
use super::containers;
use crate::bytes::Bytes;
use crate::cli::fit;
use crate::cli::inquiry;
use crate::config::{Daemon, Loaded, Model};
use crate::engine::opinion::{TOOL, tool};
use crate::engine::{self, Engine, version};

/// Where to get the tool.
const PACKAGE: &str = "Debian's package is llama.cpp-tools-extra; from source it is built as llama-server is";

/// Every engine that a model uses, or the one that it would use; and each model's second opinion.
pub fn check(root: &Path, loaded: &Loaded) -> Vec<Finding> {
    let daemon = loaded.settings.clone().unwrap_or_default();
    let mut programs: BTreeMap<PathBuf, BTreeMap<String, String>> = BTreeMap::new();
    let mut found = Vec::new();
    let mut find = |located: Result<Engine, engine::Error>, environment: &BTreeMap<String, String>| {
        match located {
            Ok(Engine::Program(program)) => {
                programs.entry(program).or_insert_with(|| environment.clone());
            }
            Ok(Engine::Image(_)) => {}
            Err(error) => {
                let fix = "install llama.cpp (Debian's package is llama.cpp-tools), or name the program's path under \
                       [engine.NAME] in /etc/plimsoll/plimsoll.toml";
                found.push(Finding::problem("engine", error.to_string(), fix));
            }
        }
    };
    let priced: Vec<&Model> = loaded.models.values().filter(|model| is_priced(model, &daemon)).collect();
    for model in &priced {
        find(engine::locate(model, &daemon), &model.environment.0);
    }
    if loaded.models.is_empty() {
        find(engine::locate_default().map(Engine::Program), &BTreeMap::new());
    }
    found.dedup();
    for (program, environment) in &programs {
        found.push(of_engine(program, environment));
        if tool(Some(program)).is_none() {
            let text = format!(
                "{TOOL} is not beside {} nor in /usr/bin: estimates have no second opinion",
                program.display()
            );
            found.push(Finding { fix: Some(PACKAGE.to_owned()), ..Finding::note("opinion", text) });
        }
    }
    found.extend(containers::check(&daemon, nix::unistd::geteuid().is_root()));
    found.extend(priced.iter().filter_map(|model| of_model(root, model, &daemon)));
    found
}

/// Whether it is a file that llama-server runs, whose size is estimated.
fn is_priced(model: &Model, daemon: &Daemon) -> bool {
    model.command.is_none() && model.memory.is_none() && engine::image(model, daemon).is_none()
}

fn of_engine(program: &Path, environment: &BTreeMap<String, String>) -> Finding {
    let said = inquiry::ask(program, environment, None);
    let shown = program.display();
    match said.get("version").and_then(|text| version::parse(text)) {
        Some(version) if version.is_too_old() => Finding::problem(
            "engine",
            format!("{shown} is {version}, too old"),
            format!("install build {} of llama.cpp or a later one", version::OLDEST_BUILD),
        ),
        Some(version) => Finding::ok("engine", format!("{shown} is {version}")),
        None => Finding::problem(
            "engine",
            format!("{shown} does not tell its version"),
            format!("run '{shown} --version' to see why"),
        ),
    }
}

/// The second opinion on a configured model; none where there is no tool.
fn of_model(root: &Path, model: &Model, daemon: &Daemon) -> Option<Finding> {
    let engine = engine::locate(model, daemon).ok()?;
    tool(Some(engine.program()?))?;
    let name = &model.name;
    Some(match fit::second_opinion(root, name.as_str()) {
        Ok(0) => Finding::ok("opinion", format!("{name}: {TOOL} says no more than the estimate")),
        Ok(excess) => Finding {
            fix: Some(format!("'plimsoll fit {name} --check' shows where; the larger counts already")),
            ..Finding::note(
                "opinion",
                format!("{name}: {TOOL} says {} more than the estimate", Bytes(excess)),
            )
        },
        Err(why) => Finding { level: Level::Note, ..Finding::ok("opinion", format!("{name}: {why}")) },
    })
}

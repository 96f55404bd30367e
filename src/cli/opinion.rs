//! The engine's second opinion, asked at the gate: as the unit's own user and in its sandbox, before the
//! daemon is asked to admit it.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use super::inquiry;
use crate::config::{Instance, Model};
use crate::daemon::catalog::RealCatalog;
use crate::engine::opinion::{ANSWER, QUESTION, tool};
use crate::host::{Card, Host};
use crate::ledger::Gpu;
use crate::ports::Wish;

/// What the gate knows when it asks.
#[derive(Debug)]
pub struct Gate<'a> {
    /// Where the configuration is.
    pub root: &'a Path,
    /// Who is to be admitted.
    pub instance: &'a Instance,
    /// Its model.
    pub model: &'a Model,
    /// The engine's program.
    pub program: &'a Path,
    /// The files that the estimate is made of, opened.
    pub files: &'a [(String, File)],
    /// The unit's environment, as far as it matters.
    pub environment: &'a BTreeMap<String, String>,
    /// What the engine says of itself.
    pub engine: &'a BTreeMap<String, String>,
    /// A directory to remember in.
    pub cache: Option<&'a Path>,
}

/// The question and the answer, by the keys under which they go to the daemon; none where there is no tool,
/// or nothing to ask about: that is the daemon's to say.
///
/// # Errors
/// The tool gave no answer: one sentence. Its silence is no reason to refuse.
pub fn ask(gate: &Gate<'_>) -> Result<Vec<(String, String)>, String> {
    let Some(tool) = tool(Some(gate.program)) else { return Ok(Vec::new()) };
    let file = |(path, file): &(String, File)| Some((PathBuf::from(path), file.try_clone().ok()?));
    let wish = Wish {
        instance: Some(gate.instance.clone()),
        files: gate.files.iter().filter_map(file).collect(),
        environment: gate.environment.clone(),
        engine: gate.engine.clone(),
        ..Wish::default()
    };
    // As the daemon sees them.
    let gpus: Vec<Gpu> = Host::default().cards().unwrap_or_default().iter().filter_map(Card::pool).collect();
    let Ok(Some(question)) = RealCatalog::new(gate.root).question(&wish, &gpus) else {
        return Ok(Vec::new());
    };
    let answer =
        inquiry::opinion(&tool, &question.arguments, &gate.model.environment.0, &question.files, gate.cache)?;
    let question = serde_json::to_string(&question.arguments).map_err(|error| error.to_string())?;
    Ok(vec![(QUESTION.to_owned(), question), (ANSWER.to_owned(), answer)])
}

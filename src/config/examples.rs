//! The example files in `config/` are documentation: these tests hold them to the code.

use std::collections::BTreeSet;
use std::path::Path;

use proptest::prelude::*;

use super::table::Table;
use super::{Daemon, Model, Problem, daemon, model_file};

const SETTINGS: &str = include_str!("../../config/plimsoll.toml");
const LLAMA_SERVER: &str = include_str!("../../config/models.d/llama-server.toml.example");
const OTHER_ENGINE: &str = include_str!("../../config/models.d/other-engine.toml.example");

/// The text with what is commented out (`#key = …`, `#[table]`; prose has a space) put in.
fn uncommented(text: &str) -> String {
    let lines = text.lines().map(|line| match line.strip_prefix('#') {
        Some(rest) if rest.starts_with(|c: char| c.is_ascii_lowercase() || c == '[') => rest,
        _ => line,
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn table(text: &str) -> Table {
    let mut problems = Vec::new();
    let table = Table::parse(Path::new("example"), text, &mut problems);
    assert!(problems.is_empty(), "{problems:?}");
    table.unwrap_or_default()
}

fn settings(text: &str) -> (Daemon, Table) {
    let mut problems = Vec::new();
    let read = daemon::read(table(text), &mut problems);
    assert!(problems.is_empty(), "{problems:?}");
    read
}

fn model(text: &str) -> Model {
    let mut problems: Vec<Problem> = Vec::new();
    let name = "example".parse().unwrap_or_else(|error| unreachable!("{error}"));
    let file = Path::new("example");
    let model = model_file::read(&name, table(text), &Table::default(), file, &mut problems);
    assert!(problems.is_empty(), "{problems:?}");
    model.unwrap_or_else(|| unreachable!("there were no problems"))
}

fn keys(text: &str) -> BTreeSet<String> {
    table(&uncommented(text)).0.into_keys().collect()
}

#[test]
fn as_shipped_they_say_the_defaults() {
    assert_eq!(settings(SETTINGS), (Daemon::default(), Table::default()));
    let given = model(LLAMA_SERVER).given;
    assert_eq!(given.into_keys().collect::<Vec<_>>(), ["model"]);
    assert!(model(OTHER_ENGINE).command.is_some());
}

#[test]
fn every_key_is_documented_and_every_documented_key_exists() {
    let documented = keys(SETTINGS);
    assert_eq!(documented, daemon::KEYS.map(str::to_owned).into());
    let documented: BTreeSet<_> = keys(LLAMA_SERVER).union(&keys(OTHER_ENGINE)).cloned().collect();
    assert_eq!(documented, model_file::KEYS.map(str::to_owned).into());
}

#[test]
fn what_is_commented_out_is_the_default() {
    let (mut daemon, defaults) = settings(&uncommented(SETTINGS));
    assert_eq!((daemon.engines.len(), daemon.adopted.len(), defaults.0.len()), (2, 1, 2));
    daemon.engines.clear();
    daemon.adopted.clear();
    assert_eq!(daemon, Daemon::default());

    let plain = model(LLAMA_SERVER);
    let full = model(&uncommented(LLAMA_SERVER));
    // These have no default to show, but an example.
    let plain = Model {
        context: full.context,
        context_min: full.context_min,
        memory: full.memory,
        gpu_memory: full.gpu_memory,
        modes: full.modes.clone(),
        aliases: full.aliases.clone(),
        api_key_file: full.api_key_file.clone(),
        mmproj: full.mmproj.clone(),
        draft_model: full.draft_model.clone(),
        engine_args: full.engine_args.clone(),
        environment: full.environment.clone(),
        given: full.given.clone(),
        ..plain
    };
    assert_eq!(plain, full);
}

#[test]
fn the_list_of_keys_is_the_one_that_is_read() {
    let mut problems = Vec::new();
    let name = "example".parse().unwrap();
    let text = "model = \"/a\"\nunlike-any-other = 1\n";
    model_file::read(&name, table(text), &Table::default(), Path::new("example"), &mut problems);
    let mut keys = model_file::KEYS;
    keys.sort_unstable();
    assert_eq!(problems[0].hint, Some(format!("the keys here are {}", keys.join(", "))));
}

/// Reads a text as both kinds of file; what comes of it doesn't matter.
fn read_anyhow(text: &str) {
    let mut problems = Vec::new();
    let table = Table::parse(Path::new("example"), text, &mut problems).unwrap_or_default();
    let (_, defaults) = daemon::read(table.clone(), &mut problems);
    let name = "example".parse().unwrap_or_else(|error| unreachable!("{error}"));
    model_file::read(&name, table, &defaults, Path::new("example"), &mut problems);
    for problem in problems {
        let line = problem.to_string();
        assert!(!line.contains('\n') && line.len() < 2000, "{line}");
    }
}

proptest! {
    /// Whatever stands in a file: no panic, and problems that are one line each.
    #[test]
    fn any_text_is_read_without_panic(text in ".{0,200}") {
        read_anyhow(&text);
    }

    /// The examples with a piece replaced by something else.
    #[test]
    fn any_change_is_read_without_panic(
        which in 0..3usize,
        at in 0..6000usize,
        cut in 0..40usize,
        with in prop_oneof![
            "[\\PC\n]{0,20}",
            "(-?[0-9]{1,25}|true|\\[\\[?|\\{|\"\"\"|'''|= |\\.|\\\\u0000|9e9|1979-05-27)",
        ],
    ) {
        let text = uncommented([SETTINGS, LLAMA_SERVER, OTHER_ENGINE][which]);
        let chars: Vec<char> = text.chars().collect();
        let at = at % chars.len();
        let end = (at + cut).min(chars.len());
        let before: String = chars[..at].iter().collect();
        let after: String = chars[end..].iter().collect();
        read_anyhow(&format!("{before}{with}{after}"));
    }
}

#[test]
fn depth_and_size_are_bounded() {
    for text in [
        format!("modes = {}", "[".repeat(500_000)),
        format!("modes = {}{}", "[".repeat(400_000), "]".repeat(400_000)),
        format!("{}a = 1", "a.".repeat(500_000)),
        format!("[{}a]\nb = 1", "a.".repeat(500_000)),
        format!("[[{}a]]\nb = 1", "a.".repeat(500_000)),
        format!("a = {}1{}", "{ a = ".repeat(100_000), "}".repeat(100_000)),
        format!("{} = 1", "k".repeat(1_000_000)),
        "[[a]]\n".repeat(150_000),
    ] {
        read_anyhow(&text);
    }
}

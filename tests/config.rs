//! The configuration against golden trees: each directory of `tests/config` is a root with an
//! `etc/plimsoll` and perhaps more, and `expected.txt` says what comes of it. After an intended
//! change, `PLIMSOLL_BLESS=1 cargo test --test config` writes them anew.

use std::fs;
use std::path::Path;

use plimsoll::config::{self, Loaded};

/// Everything that comes of a tree, for people to read.
fn describe(loaded: &Loaded) -> String {
    fn list(items: impl Iterator<Item = String>) -> String {
        items.collect::<Vec<_>>().join(", ")
    }
    fn json(value: &impl serde::Serialize) -> String {
        serde_json::to_string_pretty(value).unwrap_or_else(|error| error.to_string())
    }
    let mut lines: Vec<_> = loaded.problems.iter().map(ToString::to_string).collect();
    lines.push(format!("broken: [{}]", list(loaded.broken.keys().map(ToString::to_string))));
    lines
        .push(format!("aliases: [{}]", list(loaded.aliases.iter().map(|(a, name)| format!("{a} = {name}")))));
    lines.push(format!("settings: {}", json(&loaded.settings)));
    lines.extend(loaded.models.iter().map(|(name, model)| format!("{name}: {}", json(model))));
    lines.join("\n") + "\n"
}

#[test]
fn golden_trees() {
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/config");
    let bless = std::env::var_os("PLIMSOLL_BLESS").is_some();
    let mut different = Vec::new();
    let mut seen = 0;
    for case in fs::read_dir(&cases).unwrap().map(|entry| entry.unwrap().path()) {
        seen += 1;
        let found = describe(&config::load(&case));
        let golden = case.join("expected.txt");
        if bless {
            fs::write(&golden, found).unwrap();
        } else if fs::read_to_string(&golden).unwrap_or_default() != found {
            different.push(format!("--- {} is not what was found:\n{found}", golden.display()));
        }
    }
    assert!(seen >= 9, "{} holds too few cases", cases.display());
    assert!(different.is_empty(), "{}", different.join("\n"));
}

#[test]
fn secrets_are_not_shown() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/config/plain");
    let loaded = config::load(&root);
    let model = loaded.resolve("deepseek").expect("the alias of the model");
    assert_eq!(model.environment.0["HF_TOKEN"], "not to be shown");
    for shown in [format!("{loaded:?}"), serde_json::to_string(&loaded).unwrap()] {
        assert!(!shown.contains("not to be shown"), "{shown}");
    }
}

#[test]
fn names_lead_to_models() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/config/plain");
    let loaded = config::load(&root);
    let (instance, model) = loaded.instance("deepseek@2").unwrap();
    assert_eq!(instance.unit(), "llm@deepseek-tq1@2.service");
    assert_eq!(instance.port(model.port), Some(8004));
    let error = loaded.instance("deepsek").unwrap_err().to_string();
    assert_eq!(error, "there is no model 'deepsek'; did you mean 'deepseek'?");
    assert!(loaded.instance("../etc/passwd").is_err());
    let error = loaded.instance("lease:deepseek").unwrap_err().to_string();
    assert_eq!(error, "'lease:deepseek' is the name of a lease, and of no model");

    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/config/command");
    let error = config::load(&root).instance("both").unwrap_err().to_string();
    assert!(
        error.starts_with(
            "the configuration of 'both' is wrong: /etc/plimsoll/models.d/both.toml:1:1: error:"
        ),
        "{error}"
    );
}

//! The estimate beside what the engine's own llama-fit-params says of the same question:
//! `tests/fixtures/opinion/README.md` tells the source.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)] // a test: what is wrong has to stop it

#[allow(dead_code)] // the oracle's own tests use the rest
#[path = "oracle/fixture.rs"]
mod fixture;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use plimsoll::engine::opinion::{compare, in_its_terms, parse, question};
use plimsoll::fit::{self, Devices, Facts, GpuLayers, Settings};
use plimsoll::gguf::Model;

/// A directory of one test's own, removed at its end.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Recorded {
    model: String,
    settings: Settings,
    question: Vec<String>,
    answer: String,
}

fn recorded() -> Vec<Recorded> {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/opinion/llama-fit-params-0.7.0.tsv");
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let one = |line: &str| {
        let [model, arguments, question, answer] = line.split('\t').collect::<Vec<_>>()[..] else {
            panic!("{line}")
        };
        let settings = fit::args::parse(&words(arguments), &BTreeMap::new()).unwrap().settings;
        Recorded {
            model: model.to_owned(),
            // As it is placed on a machine without a GPU.
            settings: Settings { gpu_layers: GpuLayers::Count(0), ..settings },
            question: words(question),
            answer: answer.replace('|', "\n"),
        }
    };
    std::fs::read_to_string(path).unwrap().lines().map(one).collect()
}

#[test]
fn the_tool_is_asked_what_was_recorded() {
    for case in recorded() {
        let mut asked = question(Path::new("/m/x.gguf"), &case.settings);
        let at = asked.iter().position(|word| word == "--model").unwrap();
        let model: Vec<String> = asked.drain(at..at + 2).collect();
        assert_eq!((asked, model[1].as_str()), (case.question, "/m/x.gguf"), "{}", case.model);
    }
}

#[test]
fn the_estimate_agrees_with_the_tool() {
    let scratch = Scratch(std::env::temp_dir().join(format!("plimsoll-opinion-{}", std::process::id())));
    std::fs::create_dir_all(&scratch.0).unwrap();
    let mut facts: BTreeMap<String, Facts> = BTreeMap::new();
    let cases = recorded();
    for case in &cases {
        let facts = facts.entry(case.model.clone()).or_insert_with(|| {
            let text = fixture::directory().join(format!("{}.txt", case.model));
            Facts::from_model(&Model::open(&fixture::inflate(&text, &scratch.0)).unwrap()).unwrap()
        });
        let ours = fit::estimate(facts, &in_its_terms(&case.settings), &Devices::none()).unwrap();
        let comparison = compare(&parse(&case.answer).unwrap(), &ours).unwrap();
        for row in &comparison.rows {
            assert!(row.agrees(), "{} {:?}: {row:?}", case.model, case.question);
        }
        assert_eq!(comparison.excess.total(), 0);
    }
    assert!(cases.len() >= 36, "{} cases", cases.len());
}

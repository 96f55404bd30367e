//! What the fuzz targets run, and `tests/fuzzing.rs` over their corpus: whatever the bytes, there is an answer or
//! one sentence, and never a panic.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::OnceLock;

use plimsoll::fit::{Adapter, Device, DeviceKind, Devices, Facts, Projector, Settings, args, estimate};
use plimsoll::gguf::{Header, Identity, Model};

/// Between the headers of a split model.
const SHARD: &[u8] = b"\n-- next shard --\n";
/// Between a command line and a model's configuration.
const CONFIGURATION: &str = "\n-- models.d --\n";

/// Headers of a model's files: read, joined, understood, and priced on three machines.
pub fn header(data: &[u8]) {
    let mut parts = vec![data];
    while parts.len() < 4
        && let Some(last) = parts.pop()
    {
        match last.windows(SHARD.len()).position(|window| window == SHARD) {
            Some(at) => parts.extend([&last[..at], &last[at + SHARD.len()..]]),
            None => {
                parts.push(last);
                break;
            }
        }
    }
    let Some(model) = model(&parts) else { return };
    if let Err(error) = Projector::from_model(&model) {
        harmless(&error.to_string());
    }
    if let Err(error) = Adapter::from_model(&model) {
        harmless(&error.to_string());
    }
    match Facts::from_model(&model) {
        Ok(facts) => priced(&facts, &Settings::default()),
        Err(error) => harmless(&error.to_string()),
    }
}

fn model(parts: &[&[u8]]) -> Option<Model> {
    let mut files = Vec::new();
    for (n, part) in parts.iter().enumerate() {
        let name = format!("m-{:05}-of-{:05}.gguf", n + 1, parts.len());
        match Header::read(*part) {
            Ok(header) => {
                let identity = Identity::of_name(&name, header.file_length());
                files.push((PathBuf::from(name), identity, header));
            }
            Err(error) => {
                harmless(&error.to_string());
                return None;
            }
        }
    }
    Model::from_headers(files).map_err(|error| harmless(&error.to_string())).ok()
}

/// The first line is a digit, for the model; then an argument of llama-server a line, or a variable as NAME=VALUE;
/// behind a mark, the file of a model in models.d.
pub fn settings(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (command, file) = text.split_once(CONFIGURATION).unwrap_or((text, ""));
    let mut lines = command.lines();
    let known = known();
    let digit = lines.next().and_then(|line| line.trim().parse::<usize>().ok()).unwrap_or_default();
    let (variables, arguments): (Vec<&str>, Vec<&str>) =
        lines.partition(|line| line.starts_with("LLAMA_ARG_") && line.contains('='));
    let environment: BTreeMap<String, String> = variables
        .iter()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let arguments: Vec<String> = arguments.into_iter().map(str::to_owned).collect();
    match args::parse(&arguments, &environment) {
        Ok(parsed) => priced(&known[digit % known.len()], &parsed.settings),
        Err(error) => sentence(&error.to_string()),
    }
    if !file.is_empty() {
        configuration(file);
    }
}

/// The models that settings are tried on: one plain, one with windows and experts, one recurrent.
pub fn known() -> &'static [Facts] {
    static KNOWN: OnceLock<Vec<Facts>> = OnceLock::new();
    KNOWN.get_or_init(|| {
        let headers: [&[u8]; 3] = [
            include_bytes!("../../fuzz/corpus/header/Mistral-Nemo-12B-Q8_0"),
            include_bytes!("../../fuzz/corpus/header/gpt-oss-20b-MXFP4"),
            include_bytes!("../../fuzz/corpus/header/granite-4.0-h-small-Q8_0"),
        ];
        headers.iter().filter_map(|header| Facts::from_model(&model(&[header])?).ok()).collect()
    })
}

/// Prices without a GPU, on an APU and on two cards.
fn priced(facts: &Facts, settings: &Settings) {
    let device = |name: &str, kind| Device::new(name, kind, 64 << 30, 60 << 30);
    let machines = [
        vec![],
        vec![device("GPU0", DeviceKind::Unified)],
        vec![device("GPU0", DeviceKind::Discrete), device("GPU1", DeviceKind::Discrete)],
    ];
    for list in machines {
        match estimate(facts, settings, &Devices { list }) {
            Ok(estimate) => {
                let split = &estimate.split;
                let sum = split.gpu.total_bytes.saturating_add(split.host.total_bytes);
                assert_eq!(sum, estimate.bytes.total_bytes, "the split does not add up");
                assert!(sum <= 1 << 50, "an estimate of {sum} bytes");
                estimate.notes.iter().for_each(|note| harmless(note));
            }
            Err(error) => harmless(&error.to_string()),
        }
    }
}

/// A model's configuration is read from files.
fn configuration(text: &str) {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    let root =
        ROOT.get_or_init(|| std::env::temp_dir().join(format!("plimsoll-fuzz-{}", std::process::id())));
    let models = root.join("etc/plimsoll/models.d");
    if std::fs::create_dir_all(&models).is_err() || std::fs::write(models.join("m.toml"), text).is_err() {
        return;
    }
    for problem in plimsoll::config::load(root).problems {
        sentence(&problem.to_string());
    }
}

/// A sentence with nothing in it that a terminal obeys, whatever a header says.
fn harmless(text: &str) {
    sentence(text);
    assert!(!text.contains(char::is_control), "{text:?}");
}

/// What people get to read: something, and no more of the input than they can.
fn sentence(text: &str) {
    assert!(!text.is_empty() && text.len() < 4096, "no sentence: {} bytes", text.len());
}

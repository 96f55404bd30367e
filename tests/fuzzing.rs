//! The corpus of the fuzz targets, run as tests: seeds, and inputs that once were findings.

#![allow(clippy::unwrap_used, clippy::panic)] // a test: what is wrong has to stop it

#[path = "fuzzing/targets.rs"]
mod targets;

use std::path::Path;

fn corpus(target: &str, run: impl Fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut count = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        run(&std::fs::read(entry.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(count >= 10, "{count} inputs for {target}");
}

#[test]
fn headers() {
    corpus("header", targets::header);
}

#[test]
fn settings() {
    corpus("settings", targets::settings);
}

#[test]
fn settings_are_tried_on_all_models() {
    assert_eq!(targets::known().len(), 3);
}

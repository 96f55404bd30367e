//! `plimsoll doctor` on recorded machines: `tests/fixtures/doctor` with what is said of each, and those of `host`.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)] // a test: what is wrong has to stop it

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn doctor(root: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_plimsoll"));
    command.arg("doctor").arg("--root").arg(root).args(more);
    command.env_clear().stdin(Stdio::null()).output().unwrap()
}

/// The findings of one check.
fn found(root: &Path, check: &str) -> Vec<Value> {
    let answer: Value = serde_json::from_slice(&doctor(root, &["--json"]).stdout).unwrap();
    let all = answer["checks"].as_array().unwrap().clone();
    all.into_iter().filter(|finding| finding["check"] == check).collect()
}

#[test]
fn recorded_machines_are_told_what_is_written_beside_them() {
    for (name, code) in [("healthy", 0), ("troubled", 1)] {
        let output = doctor(&fixtures().join("doctor").join(name), &[]);
        let expected = std::fs::read_to_string(fixtures().join(format!("doctor/{name}.txt"))).unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), expected, "{name}");
        assert_eq!(output.status.code(), Some(code), "{name}");
    }
}

#[test]
fn json_has_each_finding_with_its_fix() {
    let root = fixtures().join("doctor/troubled");
    let answer: Value = serde_json::from_slice(&doctor(&root, &["--json"]).stdout).unwrap();
    assert_eq!(answer["healthy"], false);
    for finding in answer["checks"].as_array().unwrap() {
        let level = finding["level"].as_str().unwrap();
        assert!(["ok", "note", "problem"].contains(&level), "{finding}");
        assert_eq!(level == "problem", level == "problem" && finding["fix"].is_string(), "{finding}");
        assert!(!finding["text"].as_str().unwrap().is_empty());
    }
    // 121 GiB in pages of 4 KiB: what there is less the reserve, in whole GiB.
    let gtt = found(&root, "gtt");
    assert!(gtt[1]["fix"].as_str().unwrap().contains("ttm.pages_limit=31719424"), "{gtt:?}");
}

#[test]
fn an_apu_is_judged_by_what_it_may_map() {
    let gtt = |tree: &str| found(&fixtures().join("host").join(tree), "gtt").remove(0);
    assert_eq!(gtt("strix-halo")["level"], "ok");
    let carved = gtt("strix-halo-carve-out");
    assert_eq!(carved["level"], "note");
    assert!(carved["text"].as_str().unwrap().contains("set aside 96.0 GiB"), "{carved}");
    // The container's memory and the whole machine's GPU can't be put against each other.
    assert_eq!(gtt("lxc")["level"], "note");
    assert_eq!(found(&fixtures().join("host/no-gpu"), "gtt"), Vec::<Value>::new());
}

#[test]
fn nonsense_and_nothing_are_findings_too() {
    for tree in ["host/hostile", "doctor"] {
        let output = doctor(&fixtures().join(tree), &[]);
        assert_eq!(output.status.code(), Some(1), "{tree}");
        assert!(String::from_utf8(output.stdout).unwrap().contains("need"), "{tree}");
    }
    let nowhere = doctor(Path::new("/nowhere"), &[]);
    assert_eq!(nowhere.status.code(), Some(2));
    assert!(String::from_utf8(nowhere.stderr).unwrap().contains("there is no such directory"));
}

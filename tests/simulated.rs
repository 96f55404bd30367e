//! The shipped daemon on a simulated machine, and the shipped command on its private bus.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

/// 16 GiB of which 13.5 are for models.
const SCENARIO: &str = r#"
[machine]
memory = "16GiB"
system = "2GiB"
reserve = "512MiB"

[models.small]
weights = "3GiB"
placement = "mapped"
load-seconds = 0
stop-seconds = 0
priority = 60

[models.medium]
weights = "6GiB"
placement = "mapped"
load-seconds = 0
stop-seconds = 0
priority = 40

[models.large]
weights = "9GiB"
placement = "mapped"
load-seconds = 0
stop-seconds = 0
priority = 80

[models.impossible]
weights = "40GiB"
placement = "mapped"
load-seconds = 0
priority = 90

[models.growing]
weights = "1GiB"
placement = "anonymous"
kv-per-token = "1MiB"
context = 4096
load-seconds = 0
priority = 10
"#;

/// A daemon on a machine of its own.
struct Lab {
    daemon: Child,
    address: String,
    scenario: PathBuf,
}

impl Lab {
    /// None, with the reason printed, where there is no dbus-daemon.
    fn start(scenario: &str) -> Option<Self> {
        if Command::new("dbus-daemon").arg("--version").stdout(Stdio::null()).status().is_err() {
            eprintln!("skipped: dbus-daemon is not installed (package dbus)");
            return None;
        }
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path =
            std::env::temp_dir().join(format!("plimsoll-simulated-{}-{number}.toml", std::process::id()));
        std::fs::write(&path, scenario).unwrap();
        let mut daemon = Command::new(env!("CARGO_BIN_EXE_plimsolld"))
            .arg("--simulate")
            .arg(&path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(daemon.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("PLIMSOLL_BUS_ADDRESS=").unwrap_or_default().to_owned();
        let lab = Self { daemon, address, scenario: path };
        assert!(!lab.address.is_empty(), "the daemon did not start");
        Some(lab)
    }

    fn plimsoll(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_plimsoll"));
        command.env("PLIMSOLL_BUS_ADDRESS", &self.address).args(arguments).output().unwrap()
    }

    /// That the command succeeds; its output.
    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.plimsoll(arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "plimsoll {arguments:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(&[arguments, &["--json"]].concat())).unwrap()
    }

    /// That the command fails with this exit code; what it says.
    fn fails(&self, arguments: &[&str], code: i32) -> String {
        let output = self.plimsoll(arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "plimsoll {arguments:?}: {error}");
        error
    }

    /// The instances in this state.
    fn in_state(&self, state: &str) -> Vec<String> {
        let status = self.json(&["status"]);
        let models = status["models"].as_array().unwrap();
        let of = models.iter().filter(|model| model["state"] == state);
        of.map(|model| model["instance"].as_str().unwrap().to_owned()).collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        let _ = std::fs::remove_file(&self.scenario);
    }
}

#[test]
fn models_are_loaded_made_room_for_and_refused() {
    let Some(lab) = Lab::start(SCENARIO) else { return };
    lab.ok(&["load", "small"]);
    lab.ok(&["load", "medium"]);
    assert_eq!(lab.in_state("running"), ["medium", "small"]);

    let plan = lab.json(&["plan", "large"]);
    assert_eq!((&plan["verdict"], &plan["steps"][0]["instance"]), (&"fits-after".into(), &"medium".into()));
    assert_eq!(lab.in_state("running"), ["medium", "small"], "a plan changes nothing");

    lab.ok(&["load", "large"]);
    assert_eq!(lab.in_state("running"), ["large", "small"], "only what had to go is gone");

    let refused = lab.fails(&["load", "impossible"], 75);
    assert!(refused.contains("impossible was refused: at context 4096 it needs 40.0 GiB"), "{refused}");
    assert_eq!(lab.in_state("running"), ["large", "small"]);
    let explained = lab.json(&["explain", "impossible"]);
    assert_eq!(explained["kind"], "refuse");

    // What was evicted comes back when there is room again.
    lab.ok(&["unload", "large"]);
    lab.ok(&["load", "medium"]);
    assert_eq!(lab.in_state("running"), ["medium", "small"]);
}

#[test]
fn pins_and_options_of_a_load_hold() {
    let Some(lab) = Lab::start(SCENARIO) else { return };
    lab.ok(&["load", "small"]);
    lab.ok(&["load", "medium"]);
    lab.ok(&["pin", "medium"]);
    let refused = lab.fails(&["load", "large"], 75);
    assert!(refused.contains("medium 6.0 GiB (pinned)"), "{refused}");
    lab.ok(&["unpin", "medium"]);
    lab.ok(&["load", "large", "--instead-of", "small"]);
    assert_eq!(lab.in_state("stopping"), Vec::<String>::new());
    assert!(lab.in_state("running").contains(&"large".to_owned()));
    lab.ok(&["unload", "large"]);
    lab.ok(&["unload", "medium"]);
    lab.ok(&["load", "growing", "-c", "1024"]);
    let status = lab.json(&["status"]);
    let growing = status["models"].as_array().unwrap().iter().find(|m| m["instance"] == "growing").unwrap();
    assert_eq!(growing["context"], 1024);
}

#[test]
fn observing_admits_everything_and_says_what_would_have_been_done() {
    let Some(lab) = Lab::start(SCENARIO) else { return };
    lab.ok(&["mode", "observe"]);
    lab.ok(&["load", "impossible"]);
    let decision = lab.json(&["explain", "impossible"]);
    assert_eq!((&decision["kind"], &decision["observed"]), (&"admit".into(), &true.into()));
    assert_eq!(lab.json(&["status"])["mode"], "observe");
}

#[test]
fn what_does_not_exist_is_one_sentence() {
    let Some(lab) = Lab::start(SCENARIO) else { return };
    for verb in ["load", "plan"] {
        let said = lab.fails(&[verb, "nothing"], 78);
        assert!(said.contains("there is no model 'nothing'"), "{said}");
    }
    lab.fails(&["explain", "small"], 78);
    lab.fails(&["load", "../etc"], 78);
}

#[test]
fn ten_loads_at_once_never_take_the_same_bytes() {
    let models: String = (0..10)
        .map(|n| format!("[models.crowd-{n}]\nweights = '4GiB'\nplacement = 'anonymous'\nload-seconds = 0\n"))
        .collect();
    let machine = SCENARIO.split("[models").next().unwrap();
    let Some(lab) = Lab::start(&format!("{machine}{models}")) else { return };
    let mut loads: Vec<Child> = (0..10)
        .map(|n| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_plimsoll"));
            command.env("PLIMSOLL_BUS_ADDRESS", &lab.address).args(["load", &format!("crowd-{n}")]);
            command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
        })
        .collect();
    let codes: Vec<Option<i32>> = loads.iter_mut().map(|load| load.wait().unwrap().code()).collect();
    assert_eq!(codes.iter().filter(|code| **code == Some(0)).count(), 3, "{codes:?}");
    assert_eq!(codes.iter().filter(|code| **code == Some(75)).count(), 7, "{codes:?}");
    assert_eq!(lab.in_state("running").len(), 3);
}

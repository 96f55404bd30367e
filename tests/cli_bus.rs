//! The command against the shipped daemon on a simulated machine, over a private bus.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)] // a test: what is wrong has to stop it

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

const SCENARIO: &str = r#"
about = "32 GiB, and models of which two fit"

[machine]
memory = "32GiB"
system = "1GiB"

[models.small]
placement = "mapped"
weights = "8GiB"
private = "1GiB"
kv-per-token = "64KiB"
context = 16384
load-seconds = 0
priority = 30

[models.mid]
placement = "mapped"
weights = "12GiB"
private = "1GiB"
kv-per-token = "64KiB"
context = 16384
load-seconds = 0
priority = 40

[models.large]
placement = "mapped"
weights = "20GiB"
private = "1GiB"
kv-per-token = "64KiB"
context = 16384
load-seconds = 0
priority = 80

[models.impossible]
placement = "mapped"
weights = "64GiB"
private = "40GiB"
kv-per-token = "64KiB"
context = 16384
priority = 90
"#;

/// The daemon on the simulated machine.
struct Simulation {
    daemon: Child,
    bus: String,
    scenario: PathBuf,
}

impl Simulation {
    /// None where there is no dbus-daemon to make a private bus with.
    fn start(test: &str) -> Option<Self> {
        if Command::new("dbus-daemon").arg("--version").output().is_err() {
            eprintln!("skipped: dbus-daemon is not installed");
            return None;
        }
        let name = format!("plimsoll-cli-bus-{test}-{}.toml", std::process::id());
        let scenario = std::env::temp_dir().join(name);
        std::fs::write(&scenario, SCENARIO).unwrap();
        let mut daemon = Command::new(env!("CARGO_BIN_EXE_plimsolld"))
            .arg("--simulate")
            .arg(&scenario)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(daemon.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let bus = line.trim().strip_prefix("PLIMSOLL_BUS_ADDRESS=").expect("the bus's address").to_owned();
        Some(Self { daemon, bus, scenario })
    }

    fn run(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_plimsoll"))
            .args(arguments)
            .env_clear()
            .env("PLIMSOLL_BUS_ADDRESS", &self.bus)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// What it prints when it succeeds.
    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(&[arguments, &["--json"]].concat())).unwrap()
    }

    /// The sentence that it fails with.
    fn fails(&self, arguments: &[&str], code: i32) -> String {
        let output = self.run(arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        let line = text.lines().find(|line| line.starts_with("plimsoll: "));
        line.unwrap_or_else(|| panic!("no sentence in {text}")).to_owned()
    }

    fn state(&self, name: &str) -> String {
        self.json(&["status", name])["state"].as_str().unwrap().to_owned()
    }
}

impl Drop for Simulation {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.daemon.id()).unwrap());
        // SIGTERM, so that it ends its bus as well.
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.daemon.wait();
        let _ = std::fs::remove_file(&self.scenario);
    }
}

#[test]
fn models_are_loaded_make_room_and_are_refused() {
    let Some(machine) = Simulation::start("story") else { return };
    assert!(machine.ok(&["status"]).contains("No model runs."));
    assert!(machine.ok(&["load", "small"]).starts_with("small is ready after"));
    machine.ok(&["load", "mid"]);
    assert_eq!(machine.state("small"), "running");

    // What a plan says is what the load then does.
    let plan = machine.json(&["plan", "large"]);
    assert_eq!(plan["verdict"], "fits-after");
    let stopped: Vec<&str> =
        plan["steps"].as_array().unwrap().iter().filter_map(|step| step["instance"].as_str()).collect();
    assert!(!stopped.is_empty(), "{plan}");
    let loaded = machine.ok(&["load", "large"]);
    for name in &stopped {
        assert!(loaded.contains(&format!("stopped for it: {name} (")), "{loaded}");
        assert_eq!(machine.state(name), "inactive");
    }
    // Loading what runs stops nothing, and does not claim to.
    assert!(!machine.ok(&["load", "large"]).contains("stopped for it"));
    assert!(machine.ok(&["explain", "large"]).contains("fits-after"));

    let refusal = machine.fails(&["load", "impossible"], 75);
    assert!(refusal.starts_with("plimsoll: impossible was refused: "), "{refusal}");
    assert_eq!(machine.state("large"), "running");
    assert_eq!(machine.json(&["explain", "impossible"])["kind"], "refuse");
    assert!(machine.ok(&["plan", "impossible"]).contains("refused"));

    machine.ok(&["unload", "large"]);
    let text = machine.ok(&["status"]);
    assert!(text.lines().all(|line| line.chars().count() <= 82), "{text}");
}

#[test]
fn reading_verbs_print_json() {
    let Some(machine) = Simulation::start("json") else { return };
    let status = machine.json(&["status"]);
    for key in ["version", "mode", "pools", "swap", "models", "decisions", "problems"] {
        assert!(status.get(key).is_some(), "{key} in {status}");
    }
    for key in ["name", "total_bytes", "capacity_bytes", "reserved_bytes", "measured_bytes", "headroom_bytes"]
    {
        assert!(status["pools"][0].get(key).is_some(), "{key} in {status}");
    }
    let list = machine.json(&["list"]);
    let names: Vec<&str> = list.as_array().unwrap().iter().map(|m| m["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["impossible", "large", "mid", "small"]);
    assert_eq!(machine.json(&["mode"])["mode"], "enforce");
    assert_eq!(machine.json(&["plan", "small"])["verdict"], "fits");
}

#[test]
fn pins_and_modes_are_set() {
    let Some(machine) = Simulation::start("pins") else { return };
    machine.ok(&["load", "small"]);
    machine.ok(&["load", "mid"]);
    machine.ok(&["pin", "small", "mid"]);
    assert_eq!(machine.json(&["status", "small"])["pinned"], true);
    let refusal = machine.fails(&["load", "large"], 75);
    assert!(refusal.contains("pinned"), "{refusal}");
    machine.ok(&["unpin", "mid", "small"]);
    machine.ok(&["load", "large", "--no-ask-password"]);

    machine.ok(&["mode", "observe"]);
    assert_eq!(machine.ok(&["mode"]), "observe\n");
    machine.ok(&["mode", "enforce"]);
    machine.ok(&["reload"]);
}

#[test]
fn what_is_not_configured_is_78() {
    let Some(machine) = Simulation::start("unknown") else { return };
    for verb in ["load", "unload", "plan", "explain", "pin", "status"] {
        let sentence = machine.fails(&[verb, "nobody"], 78);
        assert!(sentence.contains("nobody"), "{verb}: {sentence}");
    }
    let output = machine.run(&["status", "--bus", "unix:path=/nowhere/else"]);
    assert_eq!(output.status.code(), Some(69), "the option wins over the environment");
}

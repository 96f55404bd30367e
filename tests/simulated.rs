//! The shipped daemon on a simulated machine, and the shipped command on its private bus.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::process::{Child, Stdio};

use common::Simulated;

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

/// The instances in this state.
fn in_state(machine: &Simulated, state: &str) -> Vec<String> {
    let status = machine.json(&["status"]);
    let models = status["models"].as_array().unwrap();
    let of = models.iter().filter(|model| model["state"] == state);
    of.map(|model| model["instance"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn models_are_loaded_made_room_for_and_refused() {
    let Some(machine) = Simulated::start(SCENARIO) else { return };
    machine.ok(&["load", "small"]);
    machine.ok(&["load", "medium"]);
    assert_eq!(in_state(&machine, "running"), ["medium", "small"]);

    let plan = machine.json(&["plan", "large"]);
    assert_eq!((&plan["verdict"], &plan["steps"][0]["instance"]), (&"fits-after".into(), &"medium".into()));
    assert_eq!(in_state(&machine, "running"), ["medium", "small"], "a plan changes nothing");

    machine.ok(&["load", "large"]);
    assert_eq!(in_state(&machine, "running"), ["large", "small"], "only what had to go is gone");

    let refused = machine.fails(&["load", "impossible"], 75);
    assert!(refused.contains("impossible was refused: at context 4096 it needs 40.0 GiB"), "{refused}");
    assert_eq!(in_state(&machine, "running"), ["large", "small"]);
    let explained = machine.json(&["explain", "impossible"]);
    assert_eq!(explained["kind"], "refuse");

    // What was evicted comes back when there is room again.
    machine.ok(&["unload", "large"]);
    machine.ok(&["load", "medium"]);
    assert_eq!(in_state(&machine, "running"), ["medium", "small"]);
}

#[test]
fn pins_and_options_of_a_load_hold() {
    let Some(machine) = Simulated::start(SCENARIO) else { return };
    machine.ok(&["load", "small"]);
    machine.ok(&["load", "medium"]);
    machine.ok(&["pin", "medium"]);
    let refused = machine.fails(&["load", "large"], 75);
    assert!(refused.contains("medium 6.0 GiB (pinned)"), "{refused}");
    machine.ok(&["unpin", "medium"]);
    machine.ok(&["load", "large", "--instead-of", "small"]);
    assert_eq!(in_state(&machine, "stopping"), Vec::<String>::new());
    assert!(in_state(&machine, "running").contains(&"large".to_owned()));
    machine.ok(&["unload", "large"]);
    machine.ok(&["unload", "medium"]);
    machine.ok(&["load", "growing", "-c", "1024"]);
    let status = machine.json(&["status"]);
    let growing = status["models"].as_array().unwrap().iter().find(|m| m["instance"] == "growing").unwrap();
    assert_eq!(growing["context"], 1024);
}

#[test]
fn observing_admits_everything_and_says_what_would_have_been_done() {
    let Some(machine) = Simulated::start(SCENARIO) else { return };
    machine.ok(&["mode", "observe"]);
    machine.ok(&["load", "impossible"]);
    let decision = machine.json(&["explain", "impossible"]);
    assert_eq!((&decision["kind"], &decision["observed"]), (&"admit".into(), &true.into()));
    assert_eq!(machine.json(&["status"])["mode"], "observe");
}

#[test]
fn what_does_not_exist_is_one_sentence() {
    let Some(machine) = Simulated::start(SCENARIO) else { return };
    for verb in ["load", "plan"] {
        let said = machine.fails(&[verb, "nothing"], 78);
        assert!(said.contains("there is no model 'nothing'"), "{said}");
    }
    machine.fails(&["explain", "nothing"], 78);
    machine.fails(&["explain", "small"], 1);
    machine.fails(&["load", "../etc"], 78);
}

#[test]
fn ten_loads_at_once_never_take_the_same_bytes() {
    let models: String = (0..10)
        .map(|n| format!("[models.crowd-{n}]\nweights = '4GiB'\nplacement = 'anonymous'\nload-seconds = 0\n"))
        .collect();
    let hardware = SCENARIO.split("[models").next().unwrap();
    let Some(machine) = Simulated::start(&format!("{hardware}{models}")) else { return };
    let mut loads: Vec<Child> = (0..10)
        .map(|n| {
            let mut command = machine.command(&["load", &format!("crowd-{n}")]);
            command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
        })
        .collect();
    let codes: Vec<Option<i32>> = loads.iter_mut().map(|load| load.wait().unwrap().code()).collect();
    assert_eq!(codes.iter().filter(|code| **code == Some(0)).count(), 3, "{codes:?}");
    assert_eq!(codes.iter().filter(|code| **code == Some(75)).count(), 7, "{codes:?}");
    assert_eq!(in_state(&machine, "running").len(), 3);
}

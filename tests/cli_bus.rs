//! The command against the shipped daemon on a simulated machine, over a private bus.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)] // a test: what is wrong has to stop it

mod common;

use common::Simulated;

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

fn state(machine: &Simulated, name: &str) -> String {
    machine.json(&["status", name])["state"].as_str().unwrap().to_owned()
}

#[test]
fn models_are_loaded_make_room_and_are_refused() {
    let Some(machine) = Simulated::start(SCENARIO) else { return };
    assert!(machine.ok(&["status"]).contains("No model runs."));
    assert!(machine.ok(&["load", "small"]).starts_with("small is ready after"));
    machine.ok(&["load", "mid"]);
    assert_eq!(state(&machine, "small"), "running");

    // What a plan says is what the load then does.
    let plan = machine.json(&["plan", "large"]);
    assert_eq!(plan["verdict"], "fits-after");
    let stopped: Vec<&str> =
        plan["steps"].as_array().unwrap().iter().filter_map(|step| step["instance"].as_str()).collect();
    assert!(!stopped.is_empty(), "{plan}");
    let none = machine.fails(&["explain", "large"], 1);
    assert!(none.contains("nothing has been decided on 'large' yet"), "{none}");
    let loaded = machine.ok(&["load", "large"]);
    for name in &stopped {
        assert!(loaded.contains(&format!("stopped for it: {name} (")), "{loaded}");
        assert_eq!(state(&machine, name), "inactive");
    }
    // Loading what runs stops nothing, and does not claim to.
    assert!(!machine.ok(&["load", "large"]).contains("stopped for it"));
    assert!(machine.ok(&["explain", "large"]).contains("fits-after"));

    let refusal = machine.fails(&["load", "impossible"], 75);
    assert!(refusal.starts_with("plimsoll: impossible was refused: "), "{refusal}");
    assert_eq!(state(&machine, "large"), "running");
    assert_eq!(machine.json(&["explain", "impossible"])["kind"], "refuse");
    assert!(machine.ok(&["plan", "impossible"]).contains("refused"));

    machine.ok(&["unload", "large"]);
    let text = machine.ok(&["status"]);
    assert!(text.lines().all(|line| line.chars().count() <= 82), "{text}");
}

#[test]
fn top_shows_the_status_as_often_as_it_is_asked_to() {
    let Some(machine) = Simulated::start(SCENARIO) else { return };
    let text = machine.ok(&["top", "-n", "2", "--interval", "1"]);
    assert_eq!(text.matches("No model runs.").count(), 2, "{text}");
    assert!(!text.contains('\u{1b}'), "no terminal");
    let lines = machine.ok(&["top", "-n", "2", "-d", "1", "--json"]);
    let modes: Vec<serde_json::Value> =
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(modes.len() == 2 && modes.iter().all(|status| status["mode"] == "enforce"), "{lines}");
    // Whoever reads goes away after the first: it ends, though nobody said how often.
    let mut endless = machine.command(&["top", "-d", "1"]);
    let mut child = endless.stdout(std::process::Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert!(child.wait().unwrap().success());
    machine.fails(&["top", "--bus", "unix:path=/nowhere"], 69);
}

#[test]
fn who_is_stopped_comes_back_unless_told_otherwise() {
    let Some(machine) = Simulated::start(SCENARIO) else { return };
    let said = |name: &str| machine.json(&["status", name])["message"].as_str().unwrap().to_owned();
    for (option, returns) in [("--restore=yes", true), ("--restore=no", false)] {
        machine.ok(&["load", "mid"]);
        machine.ok(&["load", "large", option]);
        assert_eq!(state(&machine, "mid"), "inactive");
        assert_eq!(said("mid").contains("comes back"), returns, "{option}: {}", said("mid"));
        machine.ok(&["unload", "large"]);
        let last = || machine.json(&["explain", "mid"])["kind"].as_str().unwrap().to_owned();
        if returns {
            let back = (0..200).any(|_| {
                std::thread::sleep(std::time::Duration::from_millis(50));
                state(&machine, "mid") == "running"
            });
            assert!(back, "mid is not back: {}", last());
        } else {
            // Returns are decided as soon as there is room; another model's whole load is well behind that.
            machine.ok(&["load", "small"]);
            assert_eq!((state(&machine, "mid").as_str(), last().as_str()), ("inactive", "evict"));
        }
        machine.ok(&["unload", "mid"]);
    }
}

#[test]
fn reading_verbs_print_json() {
    let Some(machine) = Simulated::start(SCENARIO) else { return };
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
    let Some(machine) = Simulated::start(SCENARIO) else { return };
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
fn a_mode_leaves_the_other_rules_as_they_are() {
    let scenario = SCENARIO.replace("system = \"1GiB\"", "system = \"1GiB\"\nreserve = \"9GiB\"");
    let Some(machine) = Simulated::start(&scenario) else { return };
    let capacity = || machine.json(&["status"])["pools"][0]["capacity_bytes"].as_u64().unwrap();
    let before = capacity();
    assert_eq!(before, (32 - 9 - 1) << 30);
    machine.ok(&["mode", "observe"]);
    machine.ok(&["mode", "enforce"]);
    assert_eq!(capacity(), before);
}

#[test]
fn what_is_not_configured_is_78() {
    let Some(machine) = Simulated::start(SCENARIO) else { return };
    for verb in ["load", "unload", "plan", "explain", "pin", "status"] {
        let sentence = machine.fails(&[verb, "nobody"], 78);
        assert!(sentence.contains("nobody"), "{verb}: {sentence}");
    }
    let output = machine.command(&["status", "--bus", "unix:path=/nowhere/else"]).output().unwrap();
    assert_eq!(output.status.code(), Some(69), "the option wins over the environment");
}

#[test]
fn all_swapfiles_go_but_those_that_a_model_needs() {
    let scenario = r#"
about = "a model that runs with 50 GiB of it in swap"

[machine]
memory = "104GiB"
system = "4GiB"
reserve = "0B"
swap-room = "200GiB"

[models.monster]
placement = "anonymous"
weights = "150GiB"
swap = "120GiB"
context = 4096
load-seconds = 1
"#;
    let Some(machine) = Simulated::start(scenario) else { return };
    machine.ok(&["load", "monster"]);
    machine.ok(&["swap", "add", "1GiB"]);
    let owners = || -> Vec<String> {
        let areas = machine.json(&["swap"])["areas"].as_array().unwrap().clone();
        areas.iter().map(|area| area["owner"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(owners(), ["plan", "person"]);
    // The one that is needed comes first, and keeps nothing else.
    let removed = machine.command(&["swap", "remove", "--all"]).output().unwrap();
    let said = String::from_utf8(removed.stderr).unwrap();
    assert!(removed.status.success(), "{said}");
    assert!(said.starts_with("note: monster needs the swapfile "), "{said}");
    assert_eq!(owners(), ["plan"]);
}

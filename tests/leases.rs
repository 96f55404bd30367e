//! Memory held for what is no model: the decisions on it as stories, and the shipped command against the shipped daemon
//! on a simulated machine.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use common::Simulated;
use plimsoll::bytes::Bytes;
use plimsoll::config::Instance;
use plimsoll::ledger::{Footprint, Machine, Measured, Phase, Unit, UnitState};
use plimsoll::policy::core::Effect;
use plimsoll::policy::decision::Kind;
use plimsoll::policy::request::Patience;
use plimsoll::policy::{Action, Core, Decision, Event, Outcome, Refusal, Request, Rules, Rung, Saved};

/// 100 GiB for models and leases, and the decisions on it; what these want done is done at once.
struct Stage {
    core: Core,
    machine: Machine,
    now: u64,
    decisions: Vec<Decision>,
    answers: BTreeMap<String, Result<u64, Box<Refusal>>>,
    asked: Vec<Instance>,
    started: Vec<String>,
    /// Models go on loading.
    slow: bool,
}

fn name(text: &str) -> Instance {
    text.parse().unwrap()
}

fn request(text: &str, gib: u64, priority: u8) -> Request {
    let instance = name(text);
    let footprint = Footprint { private: Bytes::gib(gib), ..Footprint::default() };
    Request {
        invocation: "i".into(),
        priority,
        pinned: instance.lease,
        ladder: vec![Rung { footprint, ..Rung::default() }],
        explicit: true,
        patience: if instance.lease { Patience::None } else { Patience::Others },
        ..Request::of(instance)
    }
}

impl Stage {
    fn new() -> Self {
        let mut machine = Machine::default();
        machine.memory.total = Bytes::gib(100);
        machine.memory.available = Bytes::gib(100);
        machine.memory.free = Bytes::gib(100);
        let rules = Rules { reserve: Bytes::ZERO, ..Rules::default() };
        let mut core = Core::new(rules, Saved::default(), true);
        let names = ["low", "mid", "high"];
        core.configure(rules, names.iter().map(|name| (name.parse().unwrap(), 50)).collect());
        Self {
            core,
            machine,
            now: 1000,
            decisions: Vec::new(),
            answers: BTreeMap::new(),
            asked: Vec::new(),
            started: Vec::new(),
            slow: false,
        }
    }

    fn ask(&mut self, request: Request) {
        let unit =
            Unit { state: UnitState::Activating, main_pid: 7, invocation: "i".into(), ..Unit::default() };
        self.machine.units.insert(request.instance.clone(), unit);
        self.asked.push(request.instance.clone());
        let ticket = self.asked.len() as u64;
        self.step(Event::Ask { ticket, request: Box::new(request) });
        self.step(Event::Tick);
    }

    /// Whoever it is ends.
    fn end(&mut self, text: &str) {
        self.machine.units.remove(&name(text));
        self.step(Event::Tick);
    }

    fn step(&mut self, event: Event) {
        self.now += 100;
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            for action in self.core.step(event, &self.machine, self.now) {
                match action {
                    Action::Perform(id, effect) => {
                        match effect {
                            Effect::Stop(instance) => drop(self.machine.units.remove(&instance)),
                            Effect::Start(instance) => self.started.push(instance.to_string()),
                            Effect::Limit(instance, _) => assert!(!instance.lease, "a lease has no unit"),
                            _ => {}
                        }
                        events.push(Event::Done { id, outcome: Outcome::Done });
                    }
                    Action::Answer { ticket, answer } => {
                        let instance = self.asked[usize::try_from(ticket).unwrap() - 1].clone();
                        if answer.is_ok() && self.slow && !instance.lease {
                            // Its end is nothing that this stage waits for.
                        } else if answer.is_ok() {
                            self.machine.units.get_mut(&instance).unwrap().state = UnitState::Active;
                        } else {
                            self.machine.units.remove(&instance);
                        }
                        self.answers.insert(instance.to_string(), answer);
                    }
                    Action::Record(decision) => self.decisions.push(*decision),
                    _ => {}
                }
            }
        }
    }

    fn holds(&self, text: &str) -> bool {
        self.core.holders().contains_key(&name(text))
    }

    fn refused(&self, text: &str) -> String {
        let answer = self.answers.get(text).unwrap_or_else(|| panic!("{text} has no answer"));
        answer.as_ref().unwrap_err().to_string()
    }
}

#[test]
fn a_lease_makes_room_like_a_model_and_what_was_stopped_for_it_comes_back() {
    let mut s = Stage::new();
    s.ask(request("low", 60, 30));
    s.ask(request("mid", 20, 50));
    s.ask(request("lease:make", 50, 50));
    assert!(s.holds("lease:make") && s.holds("mid") && !s.holds("low"), "only the strictly lower one went");
    let evicted = s.decisions.iter().find(|d| d.kind == Kind::Evict).unwrap();
    assert_eq!(evicted.for_instance, Some(name("lease:make")));
    let admitted = s.decisions.iter().rfind(|d| d.kind == Kind::Admit).unwrap();
    assert_eq!(
        admitted.text,
        "lease:make is admitted with 50.0 GiB after stopping low (lower priority, frees 60.0 GiB)"
    );
    let memory = &admitted.pools[0];
    assert_eq!((memory.needed_bytes, memory.short_bytes), (Bytes::gib(50), Bytes::gib(30)));
    assert!(s.started.is_empty());
    s.end("lease:make");
    assert_eq!(s.started, ["low"], "there is room again");
}

#[test]
fn a_lease_that_does_not_fit_is_refused_with_the_arithmetic_and_stops_nobody() {
    let mut s = Stage::new();
    s.ask(request("low", 30, 30));
    s.ask(request("mid", 60, 50));
    s.ask(request("lease:make", 50, 50));
    let refused = s.refused("lease:make");
    for words in ["it needs 50.0 GiB of memory", "10.0 GiB of 100.0 GiB is free", "10.0 GiB short"] {
        assert!(refused.contains(words), "{words:?} in {refused}");
    }
    assert!(refused.contains("mid 60.0 GiB (priority 50)") && !refused.contains("at context"), "{refused}");
    assert!(refused.ends_with("try: plimsoll lease 40960MiB -- COMMAND, or --wait"), "{refused}");
    assert!(s.holds("low") && s.holds("mid"));
}

#[test]
fn nobody_but_its_holder_ends_a_lease() {
    let mut s = Stage::new();
    s.ask(request("lease:make", 70, 10));
    s.ask(request("high", 60, 90));
    let refused = s.refused("high");
    assert!(refused.contains("staying: lease:make 70.0 GiB (a lease)"), "{refused}");
    assert!(!refused.contains("unpin") && !refused.contains("--instead-of"), "{refused}");
    // A model of the same name is somebody else.
    s.step(Event::Pin("make".parse().unwrap(), false));
    s.ask(request("high", 60, 90));
    assert!(s.holds("lease:make") && !s.holds("high"));
}

#[test]
fn one_that_waits_for_room_holds_nobody_up() {
    let mut s = Stage::new();
    s.ask(request("mid", 80, 50));
    s.ask(Request { patience: Patience::Room, ..request("lease:make", 50, 50) });
    assert!(!s.answers.contains_key("lease:make"));
    let told: Vec<_> =
        s.core.waiting().map(|(instance, told)| (instance.to_string(), told.to_owned())).collect();
    assert_eq!(told, [("lease:make".to_owned(), "waiting for room: 30.0 GiB short".to_owned())]);
    let decided = s.decisions.len();
    s.ask(request("low", 10, 30));
    assert!(s.holds("low"), "what comes later and fits goes ahead");
    s.now += 48 * 3600 * 1000;
    s.step(Event::Tick);
    assert_eq!(s.decisions.len(), decided + 1, "waiting is no decision, however long it takes");
    s.end("mid");
    assert!(s.holds("lease:make"));
    // What no wait brings is refused at once.
    s.ask(Request { patience: Patience::Room, ..request("lease:vast", 101, 50) });
    assert!(s.refused("lease:vast").contains("101.0 GiB"));
}

#[test]
fn one_that_does_not_wait_does_not_wait_for_others_either() {
    let mut s = Stage::new();
    // It can be stopped once it runs, and not before.
    s.slow = true;
    s.ask(request("low", 80, 30));
    assert_eq!(s.core.holders()[&name("low")].phase, Phase::Loading);
    s.ask(request("lease:make", 50, 50));
    assert!(s.refused("lease:make").contains("did not finish loading"), "{}", s.refused("lease:make"));
}

#[test]
fn what_its_holder_really_takes_is_not_counted_twice() {
    let mut s = Stage::new();
    s.ask(request("lease:make", 40, 50));
    let takes = |s: &mut Stage, gib: u64| {
        s.machine.memory.available = Bytes::gib(100 - gib);
        let unit = s.machine.units.get_mut(&name("lease:make")).unwrap();
        unit.measured = Measured { private: Bytes::gib(gib), ..Measured::default() };
        s.step(Event::Tick);
    };
    takes(&mut s, 30);
    s.ask(request("mid", 60, 50));
    assert!(s.holds("mid"), "30 of the 40 that it was promised");
    s.end("mid");
    // Beyond what it was promised it counts as measured.
    takes(&mut s, 55);
    s.ask(request("mid", 50, 50));
    assert!(s.refused("mid").contains("45.0 GiB of 100.0 GiB is free"), "{}", s.refused("mid"));
}

const SCENARIO: &str = r#"
[machine]
memory = "34GiB"
system = "1GiB"
reserve = "1GiB"

[models.small]
weights = "8GiB"
placement = "mapped"
private = "1GiB"
load-seconds = 0
stop-seconds = 0
priority = 30

[models.high]
weights = "10GiB"
placement = "mapped"
load-seconds = 0
stop-seconds = 0
priority = 80
"#;

/// Looks until it is so; nothing here takes long.
fn until(what: &str, mut so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !so() {
        assert!(begun.elapsed() < Duration::from_secs(20), "not in time: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn leases(machine: &Simulated) -> Vec<String> {
    let status = machine.json(&["status"]);
    let leases = status["leases"].as_array().unwrap();
    leases
        .iter()
        .map(|l| format!("{} {}", l["lease"].as_str().unwrap(), l["state"].as_str().unwrap()))
        .collect()
}

fn state(machine: &Simulated, name: &str) -> String {
    machine.json(&["status", name])["state"].as_str().unwrap().to_owned()
}

/// What a command ends with.
fn code(machine: &Simulated, arguments: &[&str]) -> Option<i32> {
    machine.command(arguments).stderr(Stdio::null()).status().unwrap().code()
}

#[test]
fn a_command_runs_while_its_memory_is_held() {
    let Some(machine) = Simulated::start(SCENARIO) else { return };
    machine.ok(&["load", "small"]);
    let mut held = machine
        .command(&[
            "lease",
            "30GiB",
            "--priority",
            "60",
            "--",
            "/bin/sh",
            "-c",
            "echo held; read line; exit 7",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(held.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "held\n");
    assert_eq!(leases(&machine), ["lease:sh held"]);
    assert_eq!(state(&machine, "small"), "inactive", "it made room");
    assert!(machine.ok(&["status"]).contains("lease:sh  held     60"), "{}", machine.ok(&["status"]));
    let plan = machine.ok(&["plan", "high"]);
    assert!(plan.contains("stays: lease:sh 30.0 GiB (a lease)"), "{plan}");
    assert_eq!(machine.json(&["explain", "lease:sh"])["kind"], "admit");
    // The end of its input ends the command, and with it the lease.
    drop(held.stdin.take());
    assert_eq!(held.wait().unwrap().code(), Some(7));
    until("the lease has ended", || leases(&machine).is_empty());
    until("the model is back", || state(&machine, "small") == "running");
}

/// Ends a lease and its command: killed, it would leave the command behind.
fn end(held: &mut Child) -> Option<i32> {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(held.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    held.wait().unwrap().code()
}

#[test]
fn a_lease_ends_as_its_command_does() {
    let Some(machine) = Simulated::start(SCENARIO) else { return };
    assert_eq!(code(&machine, &["lease", "1GiB", "--", "/bin/true"]), Some(0));
    assert_eq!(code(&machine, &["lease", "1GiB", "--", "/bin/sh", "-c", "kill -KILL $$"]), Some(137));
    // A signal is passed on.
    let mut held =
        machine.command(&["lease", "1GiB", "--name", "nap", "--", "/bin/sleep", "600"]).spawn().unwrap();
    until("it is held", || leases(&machine) == ["lease:nap held"]);
    assert_eq!(end(&mut held), Some(143));
    until("the lease has ended", || leases(&machine).is_empty());
    // One that nohup or a script has ignored does not end the command.
    let script =
        r#"trap "" HUP QUIT; exec "$0" lease 1GiB -- /bin/sh -c 'kill -HUP $PPID $$; kill -QUIT $$; exit 3'"#;
    let mut shell = machine.command(&[]);
    let of = shell.get_envs().filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned())));
    let of: Vec<_> = of.collect();
    shell = std::process::Command::new("/bin/sh");
    shell.args(["-c", script, env!("CARGO_BIN_EXE_plimsoll")]).env_clear().envs(of);
    assert_eq!(shell.stdin(Stdio::null()).stderr(Stdio::null()).status().unwrap().code(), Some(3));
    // Its holder may be killed at once.
    let mut held = machine.command(&["lease", "1GiB", "--", "/bin/sleep", "5"]).spawn().unwrap();
    until("it is held", || leases(&machine) == ["lease:sleep held"]);
    held.kill().unwrap();
    held.wait().unwrap();
    until("the lease has ended", || leases(&machine).is_empty());
}

#[test]
fn leases_are_refused_waited_for_and_sized_like_a_model() {
    let Some(machine) = Simulated::start(SCENARIO) else { return };
    machine.ok(&["load", "high"]);
    let refused = machine.fails(&["lease", "30GiB", "--", "/bin/false"], 75);
    assert!(
        refused.starts_with("plimsoll: lease:false was refused: it needs 30.0 GiB of memory"),
        "{refused}"
    );
    assert_eq!(state(&machine, "high"), "running");
    // One that waits gets it when there is room.
    let mut waits = machine
        .command(&["lease", "30GiB", "--wait", "--", "/bin/true"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until("it waits", || leases(&machine) == ["lease:true waiting"]);
    machine.ok(&["unload", "high"]);
    assert_eq!(waits.wait().unwrap().code(), Some(0));
    // And one whose holder does not wait any longer is gone.
    machine.ok(&["load", "high"]);
    let mut waits = machine
        .command(&["lease", "30GiB", "--wait", "--", "/bin/true"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until("it waits", || leases(&machine) == ["lease:true waiting"]);
    waits.kill().unwrap();
    waits.wait().unwrap();
    until("nobody waits", || leases(&machine).is_empty());

    // As much as a model takes.
    let mut held = machine.command(&["lease", "--like", "small", "--", "/bin/sleep", "600"]).spawn().unwrap();
    until("it is held", || leases(&machine) == ["lease:sleep held"]);
    let lease = &machine.json(&["status"])["leases"][0];
    let gib = |key: &str| lease["predicted"][key].as_u64().unwrap() >> 30;
    assert_eq!((gib("mapped_bytes"), gib("private_bytes")), (8, 1), "{lease}");
    end(&mut held);
    machine.fails(&["lease", "--like", "nobody", "--", "/bin/true"], 78);
}

#[test]
fn what_can_not_be_meant_is_a_usage_error_and_there_is_a_bound() {
    let Some(machine) = Simulated::start(SCENARIO) else { return };
    let nothing = machine.fails(&["lease", "1GiB"], 2);
    assert!(nothing.contains("no command"), "{nothing}");
    machine.fails(&["lease", "--", "/bin/true"], 2);
    machine.fails(&["lease", "1GiB", "--", "/no/such/program"], 2);
    machine.fails(&["lease", "1GiB", "--name", "a/b", "--", "/bin/true"], 2);
    for wrong in [&["lease", "lots", "--", "/bin/true"][..], &["lease", "1GiB", "-c", "5", "--", "/bin/true"]]
    {
        assert_eq!(code(&machine, wrong), Some(2), "{wrong:?}");
    }
    machine.fails(&["lease", "0B", "--", "/bin/true"], 1);
    machine.fails(&["lease", "1GiB", "--gpu", "1GiB", "--", "/bin/true"], 1);
    assert!(leases(&machine).is_empty());

    // Root may have 64, everybody else 16.
    let most = if nix::unistd::geteuid().is_root() { 64 } else { 16 };
    let sleep = ["lease", "1MiB", "--", "/bin/sleep", "600"];
    let mut held: Vec<_> = (0..most).map(|_| machine.command(&sleep).spawn().unwrap()).collect();
    until("all are held", || leases(&machine).len() == most);
    let refused = machine.fails(&["lease", "1MiB", "--", "/bin/true"], 75);
    assert!(refused.contains("as many as there may be"), "{refused}");
    for child in &mut held {
        end(child);
    }
    until("all have ended", || leases(&machine).is_empty());
}

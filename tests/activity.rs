//! Who is busy, who is idle, and time to finish: decisions on simulated machines, in virtual time.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use plimsoll::ledger::UnitState;
use plimsoll::policy::decision::Kind;
use plimsoll::sim::{Scenario, Simulation};

/// A machine with 100 GiB for models beside 4 of the system.
fn machine(models: &str) -> Simulation {
    let text = format!("[machine]\nmemory = '104GiB'\nsystem = '4GiB'\nreserve = '0B'\n[models]\n{models}\n");
    let scenario: Scenario = toml::from_str(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    Simulation::new(scenario)
}

fn decided(s: &Simulation, kind: Kind) -> Vec<String> {
    let of_kind = s.decisions.iter().filter(|d| d.kind == kind);
    of_kind.filter_map(|d| Some(d.instance.as_ref()?.to_string())).collect()
}

/// Two models of 45 GiB, of which one has to go for the third.
const RIVALS: &str = "a = { weights = '45GiB', placement = 'anonymous', priority = 30, drain-seconds = 30 }\n\
                      b = { weights = '45GiB', placement = 'anonymous', priority = 30, drain-seconds = 30 }\n\
                      c = { weights = '50GiB', placement = 'anonymous', priority = 60 }";

#[test]
fn an_idle_one_goes_before_a_busy_one_of_the_same_priority() {
    for (busy, idle) in [("a", "b"), ("b", "a")] {
        let mut s = machine(RIVALS);
        s.start("a").start("b").run(60);
        s.request(busy, 1, 600).start("c").run(30);
        assert_eq!(decided(&s, Kind::Evict), [idle]);
        assert_eq!((s.state(busy), s.state("c")), (UnitState::Active, UnitState::Active));
        assert_eq!(s.world.cut(), 0);
        assert_eq!(s.breaches, Vec::<String>::new());
    }
}

#[test]
fn a_lower_priority_goes_even_when_it_is_busy() {
    let mut s = machine(&RIVALS.replacen("priority = 30", "priority = 20", 1));
    s.start("a").start("b").run(60);
    s.request("a", 1, 5).start("c").run(30);
    assert_eq!(decided(&s, Kind::Evict), ["a"]);
}

#[test]
fn requests_end_before_the_stop() {
    let mut s = machine(RIVALS);
    s.start("a").run(60);
    s.start("b").run(60);
    s.request("a", 2, 12).request("b", 1, 300).run(1);
    let asked = s.world.now();
    s.start("c").run(5);
    // The decision was for a, which has been announced with its deadline, and goes on.
    assert_eq!(s.announced.len(), 1, "{:?}", s.announced);
    let (announced, deadline) = s.announced[0].clone();
    assert_eq!(announced.to_string(), "a");
    assert!((asked + 30_000..asked + 31_000).contains(&deadline), "{deadline} for {asked}");
    assert_eq!(s.state("a"), UnitState::Active);
    let told: Vec<String> = s.core.waiting().map(|(_, told)| told.to_owned()).collect();
    assert_eq!(told, ["waiting for a to finish 2 requests, 30 s at most"]);
    // It is stopped soon after its requests have ended, and long before the deadline.
    s.run(8);
    assert_eq!(s.state("a"), UnitState::Inactive);
    s.run(20);
    assert_eq!((s.state("c"), s.world.cut()), (UnitState::Active, 0));
    assert_eq!(s.announced.len(), 1, "announced once: {:?}", s.announced);
    assert_eq!(s.breaches, Vec::<String>::new());
}

#[test]
fn the_wait_ends_at_the_deadline() {
    let mut s = machine(RIVALS);
    s.start("a").start("b").run(60);
    s.request("a", 1, 3600).request("b", 1, 3600).start("c").run(29);
    assert_eq!((s.state("a"), s.state("b")), (UnitState::Active, UnitState::Active));
    s.run(20);
    assert_eq!((decided(&s, Kind::Evict).len(), s.world.cut()), (1, 1), "one, and only its request");
    assert_eq!(s.state("c"), UnitState::Active);
}

#[test]
fn another_that_has_become_idle_goes_instead() {
    let mut s = machine(RIVALS);
    s.start("a").start("b").run(60);
    s.request("a", 1, 3600).request("b", 1, 10).start("c").run(25);
    assert_eq!(decided(&s, Kind::Evict), ["b"]);
    assert_eq!((s.world.cut(), s.state("c")), (0, UnitState::Active));
}

#[test]
fn nothing_is_waited_for_where_that_is_configured_or_a_person_named_it() {
    let mut s = machine(&RIVALS.replace("drain-seconds = 30", "drain-seconds = 0"));
    s.start("a").start("b").run(60);
    s.request("a", 1, 3600).request("b", 1, 3600).start("c").run(5);
    assert_eq!((decided(&s, Kind::Evict).len(), s.world.cut()), (1, 1));
    let mut s = machine(RIVALS);
    s.start("a").run(60);
    s.request("a", 1, 3600).stop("a").run(5);
    assert_eq!(s.state("a"), UnitState::Inactive);
}

#[test]
fn a_requester_that_gives_up_leaves_the_victim_alone() {
    let mut s = machine(RIVALS);
    s.start("a").start("b").run(60);
    s.request("a", 1, 3600).request("b", 1, 3600).start("c").run(10);
    s.stop("c").run(3600);
    assert_eq!((s.state("a"), s.state("b")), (UnitState::Active, UnitState::Active));
    assert_eq!(decided(&s, Kind::Evict), Vec::<String>::new());
    assert_eq!(s.core.owed().len(), 0);
}

#[test]
fn a_ttl_never_stops_a_request_in_flight() {
    let mut s = machine(
        "a = { weights = '10GiB', placement = 'anonymous', ttl-seconds = 60 }\nb = { weights = '10GiB', placement = 'anonymous', ttl-seconds = 60 }",
    );
    s.start("a").start("b").run(20);
    s.request("a", 1, 100).run(70);
    assert_eq!(decided(&s, Kind::Expire), ["b"]);
    assert_eq!(s.state("a"), UnitState::Active);
    s.run(300);
    assert_eq!(decided(&s, Kind::Expire), ["b", "a"]);
    assert_eq!(s.world.cut(), 0);
}

#[test]
fn a_request_that_came_and_went_unseen_starts_the_ttl_anew() {
    let mut s = machine("a = { weights = '10GiB', placement = 'anonymous', ttl-seconds = 600 }");
    s.start("a").run(30);
    s.request("a", 1, 1).run(590);
    // Its time would be over; when it is asked, its mark shows that it was used.
    assert_eq!(s.state("a"), UnitState::Active);
    s.run(400);
    assert_eq!(s.state("a"), UnitState::Active);
    s.run(300);
    assert_eq!(s.state("a"), UnitState::Inactive);
}

#[test]
fn one_that_does_not_say_is_stopped_at_the_end_of_its_ttl() {
    let mut s =
        machine("a = { weights = '10GiB', placement = 'anonymous', ttl-seconds = 60, silent = true }");
    s.start("a").run(80);
    assert_eq!(s.state("a"), UnitState::Inactive);
}

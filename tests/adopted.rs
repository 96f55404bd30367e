//! Units of others among the models: counted, stopped for more important ones, and back again.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use plimsoll::bytes::Bytes;
use plimsoll::ledger::UnitState;
use plimsoll::policy::decision::Kind;
use plimsoll::policy::{Core, Rules, Saved};
use plimsoll::sim::{Scenario, Simulation};

/// A machine with 100 GiB for models, and a service of somebody else that declares 40 and takes 50.
fn machine(priority: u8) -> Simulation {
    with_reserve(priority, 0)
}

fn with_reserve(priority: u8, gib: u64) -> Simulation {
    let text = format!(
        "[machine]\nmemory = '104GiB'\nsystem = '4GiB'\nreserve = '{gib}GiB'\n[models]\n\
         'ollama.service' = {{ weights = '40GiB', takes-more = '10GiB', placement = 'anonymous', priority = {priority} }}\n\
         small = {{ weights = '30GiB', placement = 'anonymous', priority = 50 }}\n\
         large = {{ weights = '60GiB', placement = 'anonymous', priority = 50 }}\n"
    );
    let scenario: Scenario = toml::from_str(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    Simulation::new(scenario)
}

fn of(s: &Simulation, kind: Kind) -> Vec<String> {
    let decisions = s.decisions.iter().filter(|d| d.kind == kind);
    decisions.filter_map(|d| Some(d.instance.as_ref()?.to_string())).collect()
}

#[test]
fn it_starts_by_itself_and_is_counted_as_it_is_measured() {
    let mut s = machine(30);
    s.start("ollama.service").run(60);
    assert_eq!(s.state("ollama.service"), UnitState::Active);
    assert_eq!(of(&s, Kind::Admit), Vec::<String>::new(), "nobody is asked for it");
    let held = s.core.holders().get(&"ollama.service".parse().unwrap()).unwrap().held().total();
    assert_eq!(held, Bytes::gib(50));
    s.start("small").run(60);
    assert_eq!(s.running(), ["ollama.service", "small"]);
    assert_eq!(s.breaches, Vec::<String>::new());
}

#[test]
fn it_goes_for_a_higher_priority_and_comes_back_when_all_of_it_fits() {
    let mut s = machine(30);
    s.start("ollama.service").run(60);
    s.start("large").run(60);
    assert_eq!((of(&s, Kind::Evict), s.running()), (vec!["ollama.service".into()], vec!["large".into()]));
    // 40 GiB are left, as much as it declares; it took 50 before.
    s.run(3600);
    assert_eq!(s.running(), ["large"]);
    s.stop("large").run(120);
    assert_eq!(s.running(), ["ollama.service"]);
    assert_eq!(s.core.owed().len(), 0);
    let held = s.core.holders().get(&"ollama.service".parse().unwrap()).unwrap().held().total();
    assert_eq!(held, Bytes::gib(50));
    assert_eq!(s.breaches, Vec::<String>::new());
}

#[test]
fn it_stays_for_what_is_not_more_important() {
    let mut s = machine(50);
    s.start("ollama.service").run(60);
    s.start("large").run(60);
    assert_eq!(s.running(), ["ollama.service"]);
    assert_eq!(of(&s, Kind::Refuse), ["large"]);
}

#[test]
fn what_a_person_stopped_stays_stopped() {
    let mut s = machine(30);
    s.start("ollama.service").run(60);
    s.stop("ollama.service").run(3600);
    assert_eq!(s.running(), Vec::<String>::new());
}

#[test]
fn what_was_stopped_to_keep_the_machine_afloat_comes_back_when_all_of_it_fits() {
    let mut s = with_reserve(30, 4);
    s.start("ollama.service").run(60);
    // Beside what was eaten there is room for the 40 GiB that it declares, and not for the 50 that it took.
    s.eat(Bytes::mib(100), Bytes::gib(49)).run(4000);
    assert_eq!((s.reliefs.len(), s.running()), (1, vec![]));
    s.eat(Bytes::ZERO, Bytes::ZERO).run(200);
    assert_eq!(s.running(), ["ollama.service"]);
    assert_eq!(s.breaches, Vec::<String>::new());
}

#[test]
fn a_pin_of_a_service_of_others_that_was_kept_is_forgotten() {
    let pins =
        [("ollama.service", true), ("mine", true)].map(|(name, pinned)| (name.parse().unwrap(), pinned));
    let saved = Saved { pins: BTreeMap::from(pins), ..Saved::default() };
    let core = Core::new(Rules::default(), saved, true);
    let kept: Vec<String> = core.pins().keys().map(ToString::to_string).collect();
    assert_eq!(kept, ["mine"]);
}

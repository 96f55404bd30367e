//! Simulated machines for stories, and what is asked of them afterwards.
#![allow(dead_code, reason = "each test uses its part")]

use plimsoll::policy::Refusal;
use plimsoll::policy::decision::Kind;
use plimsoll::sim::{Scenario, Simulation};

/// A machine with 100 GiB for models beside 4 of the system, and models as `name = {...}` lines.
pub fn machine(models: &str) -> Simulation {
    simulation(&format!(
        "[machine]\nmemory = '104GiB'\nsystem = '4GiB'\nreserve = '0B'\n[models]\n{models}\n"
    ))
}

pub fn simulation(text: &str) -> Simulation {
    let scenario: Scenario = toml::from_str(text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    Simulation::new(scenario)
}

pub fn shipped(name: &str) -> Simulation {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("config/simulate").join(name);
    Simulation::new(Scenario::read(&path).unwrap())
}

pub fn refusal(simulation: &Simulation) -> Refusal {
    let last = simulation.decisions.iter().rev().find(|d| d.kind == Kind::Refuse);
    *last
        .and_then(|d| d.refusal.clone())
        .unwrap_or_else(|| panic!("no refusal in {:#?}", simulation.decisions))
}

pub fn evicted(simulation: &Simulation) -> Vec<String> {
    let evictions = simulation.decisions.iter().filter(|d| d.kind == Kind::Evict);
    evictions.map(|d| d.instance.as_ref().unwrap().to_string()).collect()
}

pub fn sound(simulation: &Simulation) {
    assert_eq!(simulation.breaches, Vec::<String>::new());
}

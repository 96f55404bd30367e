//! Simulated machines on which memory runs short, and what was done there.
#![allow(dead_code, reason = "each test uses its part")]

#[path = "../relief/mod.rs"]
mod relief;

use plimsoll::policy::Rescue;
use plimsoll::policy::decision::Kind;
use plimsoll::sim::{Scenario, Simulation};

/// A machine of 128 GiB, of which the system uses 4 and 4 more are kept for it.
pub fn machine(rules: &str, models: &str) -> Simulation {
    let text = format!("[machine]\nmemory = '128GiB'\nsystem = '4GiB'\n{rules}\n[models]\n{models}\n");
    let scenario: Scenario = toml::from_str(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    Simulation::new(scenario)
}

/// 20, 30 and 40 GiB, of rising priority.
pub const THREE: &str = "low = { weights = '20GiB', placement = 'anonymous', priority = 10 }
                     mid = { weights = '30GiB', placement = 'anonymous', priority = 50 }
                     high = { weights = '40GiB', placement = 'anonymous', priority = 80 }";

/// The three of them, loaded and idle for longer than the minimum stay; 34 GiB are left.
pub fn three(rules: &str) -> Simulation {
    let mut s = machine(rules, THREE);
    s.start("low").start("mid").start("high").run(200);
    assert_eq!(s.running(), ["high", "low", "mid"]);
    s
}

/// What was done, and to whom.
pub fn done(s: &Simulation) -> Vec<(Rescue, String)> {
    let of = |e: &plimsoll::sim::Evidence| {
        let whom = e.decision.instance.as_ref().map(ToString::to_string).unwrap_or_default();
        (e.decision.relief.unwrap().rescue, whom)
    };
    s.reliefs.iter().map(of).collect()
}

/// Who was stopped or killed.
pub fn stopped(s: &Simulation) -> Vec<String> {
    let stops =
        |(rescue, _): &(Rescue, String)| matches!(rescue, Rescue::Stop | Rescue::Kill | Rescue::Expire);
    done(s).into_iter().filter(stops).map(|(_, whom)| whom).collect()
}

pub fn sound(s: &Simulation) {
    assert_eq!(s.breaches, Vec::<String>::new());
    assert_eq!(relief::breaches(s), Vec::<String>::new());
}

pub fn text(s: &Simulation) -> Vec<&str> {
    s.decisions.iter().filter(|d| d.kind == Kind::Relieve).map(|d| d.text.as_str()).collect()
}

//! Random machines and random schedules: the invariants hold whatever happens in whatever order.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod relief;

use std::collections::BTreeSet;

use plimsoll::bytes::Bytes;
use plimsoll::ledger::UnitState;
use plimsoll::policy::decision::Kind;
use plimsoll::sim::{Scenario, Scripted, Simulation};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Deed {
    Start(usize),
    Stop(usize),
    Run(u64),
    RestartDaemon,
    Request(usize, u32, u64),
    /// Something else takes so many MiB each second, and so many GiB at most.
    Eat(u64, u64),
    /// Tasks wait for memory for so much of the time, per mille.
    Stall(u16),
}

/// What is done; with `strain`, memory is taken by others too.
fn deeds(models: usize, strain: bool) -> impl Strategy<Value = Vec<Deed>> {
    let strain = u32::from(strain);
    let one = prop_oneof![
        5 => (0..models).prop_map(Deed::Start),
        2 => (0..models).prop_map(Deed::Stop),
        4 => (1u64..60).prop_map(Deed::Run),
        1 => Just(Deed::RestartDaemon),
        2 => (0..models, 1u32..3, 1u64..90).prop_map(|(n, count, seconds)| Deed::Request(n, count, seconds)),
        2 * strain => (60u64..256, 0u64..110).prop_map(|(rate, most)| Deed::Eat(rate, most)),
        strain => (0u16..1000).prop_map(Deed::Stall),
    ];
    prop::collection::vec(one, 1..40)
}

/// One model as a line of a scenario.
fn model(n: usize) -> impl Strategy<Value = String> {
    let placement = prop_oneof![Just("gpu"), Just("mapped"), Just("anonymous")];
    (1u64..60, placement, 0u8..5, any::<bool>(), 1u64..40, 0u64..30, 0u64..3, 0u64..9).prop_map(
        move |(weights, placement, priority, shrinks, load, stop, file, oversize)| {
            let minimum = if shrinks { ", context-min = 4096" } else { "" };
            // One in nine is up to twice as large as memory, a tenth of which every token touches, and streams; two
            // in nine swap.
            let (weights, placement, oversize) = match oversize {
                0 => (weights * 4, placement, format!(", stream = '{}MiB'", weights * 4 * 102)),
                1 | 2 => (weights * 4, "anonymous", format!(", swap = '{}MiB'", weights * 4 * 922)),
                _ => (weights, placement, String::new()),
            };
            format!(
                "m{n} = {{ weights = '{weights}GiB', placement = '{placement}', priority = {}, kv-per-token = '256KiB', \
                 private = '512MiB', context = 32768{minimum}{oversize}, load-seconds = {load}, stop-seconds = {stop}, drain-seconds = {}, file = {}, \
                 pinned = {}, batch = {} }}",
                priority * 20,
                load % 3 * 15,
                if file == 0 { 7 } else { 100 + n },
                weights % 5 == 0,
                weights % 7 == 0,
            )
        },
    )
}

fn machines(ladder: bool) -> impl Strategy<Value = (String, usize)> {
    (2usize..8).prop_flat_map(move |count| {
        let models: Vec<_> = (0..count).map(model).collect();
        let crashes = prop::collection::vec((1u64..400, 0..count, 0u64..40), 0..3);
        (models, 40u64..140, 0u64..300, 0u8..8, crashes).prop_map(move |(models, gtt, disk, broken, crashes)| {
            let crash = |(seconds, n, restart): &(u64, usize, u64)| {
                let restart = if *restart < 20 { String::new() } else { format!(", restart-seconds = {restart}") };
                format!("{{ seconds = {seconds}, crash = 'm{n}'{restart} }}")
            };
            let crashes: Vec<String> = crashes.iter().map(crash).collect();
            // One in eight kernels takes no swapfile, whatever room the disk has.
            let text = format!(
                "at = [{}]\n[machine]\nladder = {ladder}\nmemory = '128GiB'\nsystem = '4GiB'\nswap-room = '{disk}GiB'\nswap-broken = {}\nfastest = '256MiB'\n\
                 gpus = [{{ name = 'card0', kind = 'unified', total = '{gtt}GiB', used = '0B' }}]\n[models]\n{}\n",
                crashes.join(", "),
                broken == 0,
                models.join("\n")
            );
            (text, count)
        })
    })
}

/// As many as PROPTEST_CASES says, else so many as take a few seconds.
fn config(few: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(few);
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// Plays a schedule to its end, and looks at what was decided on the way.
fn play(text: &str, deeds: &[Deed]) -> Result<(), TestCaseError> {
    let scenario: Scenario = toml::from_str(text).unwrap();
    let models: Vec<_> = scenario.models.clone().into_iter().collect();
    let priority = |name: &str| models.iter().find(|(n, _)| n.as_str() == name).unwrap().1.priority;
    let mut s = Simulation::new(scenario.clone());
    for deed in deeds {
        match deed {
            Deed::Start(n) => drop(s.start(models[*n].0.as_str()).run(1)),
            Deed::Stop(n) => drop(s.stop(models[*n].0.as_str()).run(1)),
            Deed::Run(seconds) => drop(s.run(*seconds)),
            Deed::RestartDaemon => s.restart_daemon(),
            Deed::Request(n, count, seconds) => drop(s.request(models[*n].0.as_str(), *count, *seconds)),
            Deed::Eat(rate, most) => drop(s.eat(Bytes::mib(*rate), Bytes::gib(*most))),
            Deed::Stall(share) => s.world.stall(*share, *share / 2),
        }
    }
    // The slowest has eaten after half an hour, and the longest pause before a return is an hour.
    s.run(if scenario.machine.ladder { 7000 } else { 2000 });
    prop_assert_eq!(relief::breaches(&s), Vec::<String>::new());
    prop_assert_eq!(&s.breaches, &Vec::<String>::new());

    // Only strictly lower priorities went, and not for one that was refused in the end.
    for (n, decision) in s.decisions.iter().enumerate().filter(|(_, d)| d.kind == Kind::Evict) {
        let winner = decision.for_instance.as_ref().unwrap();
        prop_assert!(
            priority(decision.instance.as_ref().unwrap().model.as_str()) < priority(winner.model.as_str())
        );
        // A person who stops the winner half-way, a winner that crashes or a daemon that dies makes it another story.
        let crashes =
            |happening: &Scripted| happening.crash.as_ref().is_some_and(|i| i.model == winner.model);
        let undisturbed = !scenario.at.iter().any(crashes)
            && deeds.iter().all(|deed| match deed {
                Deed::Stop(n) => models[*n].0 != winner.model,
                // What else takes memory may take what was made free for the winner.
                Deed::RestartDaemon | Deed::Eat(..) => false,
                Deed::Start(_) | Deed::Run(_) | Deed::Request(..) | Deed::Stall(_) => true,
            });
        let verdict =
            s.decisions[n..].iter().find(|d| d.instance.as_ref() == Some(winner) && d.kind != Kind::Wait);
        let in_vain = verdict.is_some_and(|d| d.kind == Kind::Refuse);
        prop_assert!(!undisturbed || !in_vain, "{decision:?} was in vain: {verdict:?}");
    }

    // Everything has come to rest: nobody waits, nothing is half started.
    prop_assert_eq!(s.core.waiting().count(), 0);
    for (name, _) in &models {
        prop_assert!(matches!(
            s.state(name.as_str()),
            UnitState::Active | UnitState::Inactive | UnitState::Failed
        ));
    }

    // Whoever is owed a return gets it once all that is in the way has gone.
    let owed: BTreeSet<String> = s.core.owed().iter().map(|owed| owed.instance.to_string()).collect();
    s.eat(Bytes::ZERO, Bytes::ZERO);
    s.world.stall(0, 0);
    for name in s.running() {
        s.stop(&name);
    }
    s.run(20_000);
    let running = s.running();
    let still: Vec<String> = s.core.owed().iter().map(|owed| owed.instance.to_string()).collect();
    for name in owed {
        prop_assert!(running.contains(&name) || still.contains(&name), "{} is lost", name);
    }
    // Swapfiles go with the models that they were made for.
    if running.is_empty() {
        prop_assert_eq!(s.world.observe().swap_of_plans(), Bytes::ZERO);
    }
    prop_assert!(still.is_empty() || !running.is_empty(), "room is free and nobody returns: {still:?}");
    Ok(())
}

/// A machine and what is done on it; with `strain`, memory is taken by others too, and the ladder is on.
fn schedules(strain: bool) -> impl Strategy<Value = (String, Vec<Deed>)> {
    machines(strain).prop_flat_map(move |(text, n)| (Just(text), deeds(n, strain)))
}

proptest! {
    #![proptest_config(config(1000))]

    #[test]
    fn the_invariants_hold((text, deeds) in schedules(false)) {
        play(&text, &deeds)?;
    }
}

proptest! {
    #![proptest_config(config(60))]

    // Memory that falls is looked at twenty times a second: each takes many times as long.
    #[test]
    fn the_invariants_hold_under_strain((text, deeds) in schedules(true)) {
        play(&text, &deeds)?;
    }
}

/// What a random schedule has found: a model that goes into swap stops loading while something eats.
#[test]
fn what_goes_down_fast_once_is_expected_to_do_so_again() {
    let text = "at = []
        [machine]
        ladder = true
        memory = '128GiB'
        system = '4GiB'
        swap-room = '130GiB'
        swap-broken = false
        fastest = '256MiB'
        gpus = [{ name = 'card0', kind = 'unified', total = '58GiB', used = '0B' }]
        [models]
        m0 = { weights = '19GiB', placement = 'gpu', priority = 0, kv-per-token = '256KiB', private = '512MiB', context = 32768, context-min = 4096, load-seconds = 20, stop-seconds = 14, drain-seconds = 30, file = 7, pinned = false, batch = false }
        m1 = { weights = '100GiB', placement = 'anonymous', priority = 0, kv-per-token = '256KiB', private = '512MiB', context = 32768, swap = '92200MiB', load-seconds = 24, stop-seconds = 20, drain-seconds = 0, file = 101, pinned = true, batch = false }";
    let deeds = [
        Deed::Start(0),
        Deed::Stop(0),
        Deed::Start(1),
        Deed::Stop(1),
        Deed::Run(18),
        Deed::Start(0),
        Deed::Start(1),
        Deed::Run(4),
        Deed::RestartDaemon,
        Deed::Eat(147, 7),
        Deed::Run(1),
    ];
    play(text, &deeds).unwrap();
}

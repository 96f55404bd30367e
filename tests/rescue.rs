//! What is done when memory runs short is followed to its end: memory that comes back or does not, stops that overrun,
//! what the last rung killed, time to finish, and returns. On simulated machines, in virtual time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod ladder;

use ladder::{THREE, done, machine, sound, stopped, text, three};
use plimsoll::bytes::Bytes;
use plimsoll::ledger::UnitState;
use plimsoll::policy::decision::Kind;
use plimsoll::policy::{Event, Rescue};
use plimsoll::sim::Simulation;

#[test]
fn the_memory_of_a_stop_is_waited_for_and_not_the_end_of_its_unit() {
    // What comes after a model's end (ExecStopPost=) takes longer than the eater needs for what it gave back.
    let mut s = machine(
        "",
        "a = { weights = '6GiB', placement = 'anonymous', priority = 10, lingers-seconds = 10 }
         b = { weights = '40GiB', placement = 'anonymous', priority = 50 }",
    );
    s.start("a").start("b").run(200);
    s.eat(Bytes::gib(1), Bytes::gib(90)).run(200);
    assert_eq!(stopped(&s), ["a", "b"]);
    sound(&s);
    assert!(text(&s).iter().any(|t| t.starts_with("a is ending, which brought 6.0 GiB of 6.0 GiB back")));
    assert_eq!(s.running(), ["a"], "its unit has ended after all, and there is room");
}

#[test]
fn a_pinned_one_does_not_wait_for_what_gives_nothing_back() {
    let mut s = machine(
        "",
        "held = { weights = '40GiB', placement = 'anonymous', pinned = true }
         other = { weights = '6GiB', placement = 'anonymous', lingers-seconds = 60 }",
    );
    s.start("held").start("other").run(200);
    s.eat(Bytes::mib(250), Bytes::gib(90)).run(600);
    assert_eq!(stopped(&s), ["other", "held"]);
    sound(&s);
}

#[test]
fn memory_that_comes_back_late_is_waited_for_and_exactly_one_goes() {
    // earlyoom #309: a second one was killed before the memory of the first one was back.
    let late = |seconds: u64| {
        let mut s = machine(
            "",
            &format!(
                "a = {{ weights = '40GiB', placement = 'anonymous', priority = 10, late-seconds = {seconds} }}
                 b = {{ weights = '40GiB', placement = 'anonymous', priority = 20 }}"
            ),
        );
        s.start("a").start("b").run(200);
        s.eat(Bytes::mib(100), Bytes::gib(43)).run(600);
        sound(&s);
        stopped(&s)
    };
    assert_eq!(late(1), ["a"]);
    assert_eq!(late(60), ["a", "b"], "its time was up, and it was needed");
}

#[test]
fn memory_that_never_comes_back_is_not_waited_for_in_vain() {
    let mut s = machine(
        "",
        "a = { weights = '40GiB', placement = 'anonymous', priority = 10, leaks = '40GiB' }
         b = { weights = '40GiB', placement = 'anonymous', priority = 20 }",
    );
    s.start("a").start("b").run(200);
    s.eat(Bytes::mib(100), Bytes::gib(44)).run(600);
    assert_eq!(stopped(&s), ["a", "b"]);
    assert!(
        text(&s).iter().any(|t| t.contains("a is gone, which brought 0.") && t.contains("of 40.0 GiB back"))
    );
    sound(&s);
}

#[test]
fn a_stop_that_takes_too_long_is_cut_short_only_when_the_machine_is_in_danger() {
    let slow = |rate: u64, most: u64| {
        let mut s = machine(
            "",
            "slow = { weights = '40GiB', placement = 'anonymous', priority = 10, stop-seconds = 15 }
             other = { weights = '40GiB', placement = 'anonymous', priority = 20 }",
        );
        s.start("slow").start("other").run(200);
        s.eat(Bytes::mib(rate), Bytes::gib(most)).run(1200);
        sound(&s);
        done(&s)
    };
    let slow_one = |rescue| (rescue, "slow".to_owned());
    assert_eq!(slow(50, 43), [slow_one(Rescue::Stop)]);
    assert_eq!(slow(200, 70), [slow_one(Rescue::Stop), slow_one(Rescue::Kill)]);
}

/// An engine that is told to stop while it loads goes on taking what it was promised, and nobody has seen memory go that fast.
#[test]
fn one_told_to_stop_while_it_loads_is_watched_to_its_end() {
    let mut s = machine(
        "fastest = '256MiB'",
        "vast = { weights = '112GiB', placement = 'anonymous', priority = 40, load-seconds = 16, stop-seconds = 26 }",
    );
    s.start("vast").run(1);
    s.eat(Bytes::mib(800), Bytes::gib(20)).stop("vast").run(60);
    assert_eq!(stopped(&s), ["vast"]);
    assert_eq!(s.state("vast"), UnitState::Inactive);
    sound(&s);
}

#[test]
fn one_that_does_not_stop_is_left_and_the_next_one_asked() {
    let mut s = machine(
        "",
        "stuck = { weights = '40GiB', placement = 'anonymous', priority = 10, stuck = true }
         other = { weights = '40GiB', placement = 'anonymous', priority = 20 }",
    );
    s.start("stuck").start("other").run(200);
    s.eat(Bytes::mib(50), Bytes::gib(43)).run(1200);
    assert_eq!(stopped(&s), ["stuck", "other"]);
    assert_eq!(s.running(), ["stuck"]);
    assert!(s.core.owed().iter().all(|owed| owed.instance.to_string() == "other"));
    sound(&s);
}

#[test]
fn a_killed_model_is_refused_at_the_gate_for_a_while_and_then_returns() {
    let mut s = three("");
    s.eat(Bytes::gib(4), Bytes::gib(40)).run(9);
    assert_eq!(done(&s), [(Rescue::Kill, "low".to_owned())]);
    // Restart= would have it back at once.
    s.eat(Bytes::ZERO, Bytes::ZERO).start("low").run(5);
    let refused = s.decisions.iter().find(|d| d.kind == Kind::Refuse).expect("refused");
    assert!(refused.text.contains("it was killed less than a minute ago"), "{}", refused.text);
    assert_eq!(s.state("low"), UnitState::Failed);
    s.run(300);
    assert_eq!(s.running(), ["high", "low", "mid"]);
    sound(&s);
}

#[test]
fn who_comes_back_and_has_to_go_again_comes_back_later_and_later() {
    let mut s = three("");
    for _ in 0..30 {
        s.eat(Bytes::mib(500), Bytes::gib(34)).run(120);
        s.eat(Bytes::ZERO, Bytes::ZERO).run(120);
    }
    let stops = stopped(&s).len();
    assert!((2..=7).contains(&stops), "{stops} stops in two hours");
    s.run(3 * 3600);
    assert_eq!(s.running(), ["high", "low", "mid"]);
    sound(&s);
}

#[test]
fn a_return_waits_until_headroom_has_been_there_for_a_while_and_survives_a_restart() {
    let mut s = three("");
    s.eat(Bytes::mib(500), Bytes::gib(40)).run(200);
    assert_eq!(s.running(), ["high", "mid"]);
    s.restart_daemon();
    s.run(100);
    assert_eq!(s.running(), ["high", "mid"], "there is no room");
    s.eat(Bytes::ZERO, Bytes::ZERO).run(20);
    assert_eq!(s.running(), ["high", "mid"], "there is, but only just");
    s.run(60);
    assert_eq!(s.running(), ["high", "low", "mid"]);
    sound(&s);
}

/// The last rung kills `low`, as the machine would tell of it.
fn last_rung_kills_low(s: &mut Simulation) {
    let instance = "low".parse().unwrap();
    s.step(Event::Killed { instance, available: Bytes::mib(30) });
}

#[test]
fn whoever_the_last_rung_killed_comes_back_also_where_the_ladder_is_off() {
    for rules in ["ladder = true", "ladder = false"] {
        let mut s = three(rules);
        last_rung_kills_low(&mut s);
        s.run(30);
        assert_eq!(s.running(), ["high", "mid"], "{rules}: kept off for a while");
        s.run(600);
        assert_eq!(s.running(), ["high", "low", "mid"], "{rules}");
        sound(&s);
    }
}

#[test]
fn what_a_person_stops_stays_stopped_though_the_last_rung_kills_it() {
    let mut s =
        machine("ladder = false", &THREE.replace("priority = 10", "priority = 10, stop-seconds = 20"));
    s.start("low").run(200);
    s.stop("low").run(1);
    assert_eq!(s.state("low"), UnitState::Deactivating);
    last_rung_kills_low(&mut s);
    s.run(1200);
    assert_eq!((s.running(), s.core.owed().len()), (Vec::<String>::new(), 0));
    sound(&s);
}

#[test]
fn what_the_last_rung_killed_is_followed_to_its_end_and_no_other_goes_meanwhile() {
    let mut s = three("");
    s.eat(Bytes::gib(8), Bytes::gib(31)).run(1);
    assert_eq!(stopped(&s), Vec::<String>::new());
    last_rung_kills_low(&mut s);
    s.run(20);
    assert_eq!(stopped(&s), ["low"]);
    let gained = s.decisions.iter().filter_map(|d| d.relief?.gained_bytes).collect::<Vec<_>>();
    assert!(matches!(gained[..], [one] if one >= Bytes::gib(19)), "{gained:?}");
    sound(&s);
}

#[test]
fn a_time_to_finish_that_was_not_needed_in_the_end_is_given_anew_the_next_time() {
    let mut s = machine(
        "",
        "only = { weights = '40GiB', placement = 'anonymous', priority = 10, drain-seconds = 30 }",
    );
    s.start("only").run(200).request("only", 1, 36_000);
    // 84 GiB are left, and 1.8 in the end: it is announced, and the eater goes before its time is up.
    for times in 1..=2 {
        s.eat(Bytes::mib(100), Bytes::mib(84_172)).run(845);
        assert_eq!((s.announced.len(), stopped(&s)), (times, vec![]));
        s.eat(Bytes::ZERO, Bytes::ZERO).run(60);
    }
    sound(&s);
}

#[test]
fn time_to_finish_is_over_when_the_last_quarter_of_the_reserve_is_reached() {
    let mut s = machine(
        "",
        "only = { weights = '40GiB', placement = 'anonymous', priority = 10, drain-seconds = 300 }",
    );
    s.start("only").run(200).request("only", 1, 36_000);
    // 84 GiB are left, and 0.8 in the end.
    s.eat(Bytes::mib(50), Bytes::mib(85_200)).run(1800);
    assert_eq!(stopped(&s), ["only"]);
    let at = s.reliefs[0].decision.at_msec;
    let announced: Vec<u64> = s.announced.iter().map(|(_, deadline)| *deadline).collect();
    assert!(matches!(announced[..], [drain, stop] if drain > stop && stop == at), "{announced:?}, {at}");
    sound(&s);
}

#[test]
fn time_to_finish_that_is_not_needed_while_another_one_ends_is_given_anew() {
    let mut s = machine(
        "",
        "only = { weights = '40GiB', placement = 'anonymous', priority = 10, drain-seconds = 30 }
         other = { weights = '20GiB', placement = 'anonymous', pinned = true, stop-seconds = 40 }",
    );
    s.start("only").start("other").run(200).request("only", 1, 36_000);
    // 64 GiB are left, and 1.8 in the end.
    s.eat(Bytes::mib(100), Bytes::mib(63_692)).run(640);
    assert_eq!(s.announced.len(), 1);
    // What a person stops would do; when it takes too long, the time to finish has run out in the meantime.
    s.stop("other").run(35);
    assert_eq!((s.announced.len(), stopped(&s)), (2, vec![]));
    s.run(600);
    assert_eq!((s.announced.len(), stopped(&s)), (2, vec![]));
    sound(&s);
}

/// One that waits for a disk for ever, as if it had been killed in vain.
fn undead() -> Simulation {
    let mut s = machine("", &THREE.replace("priority = 10", "priority = 10, undead = true"));
    s.start("low").start("mid").start("high").run(200);
    s
}

#[test]
fn who_was_killed_already_is_the_last_that_the_last_rung_kills_again() {
    let mut s = undead();
    let order = |s: &Simulation| -> Vec<String> {
        let last = s.core.last_resort(&s.world.observe()).unwrap();
        last.victims.iter().map(|(instance, _)| instance.to_string()).collect()
    };
    s.stop("low").run(1);
    assert_eq!(order(&s), ["low", "mid", "high"], "it is on the way out");
    last_rung_kills_low(&mut s);
    assert_eq!(order(&s), ["mid", "high", "low"]);
}

#[test]
fn the_next_one_goes_though_the_last_rung_kills_the_first_again_and_again() {
    let mut s = undead();
    s.eat(Bytes::mib(80), Bytes::gib(40)).run(420);
    assert_eq!(done(&s), [(Rescue::Stop, "low".to_owned())]);
    for _ in 0..30 {
        s.run(1);
        if s.world.observe().memory.available < Bytes::mib(512) {
            last_rung_kills_low(&mut s);
        }
    }
    assert_eq!(stopped(&s), ["low", "low", "mid"]);
    sound(&s);
}

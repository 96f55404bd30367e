//! The decisions on simulated machines, in virtual time: what is stopped for what, what is refused,
//! what comes back.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod stories;

use plimsoll::bytes::Bytes;
use plimsoll::ledger::{Phase, UnitState};
use plimsoll::policy::decision::Kind;
use plimsoll::policy::{Core, Planned, RefusalKind, Step};
use plimsoll::sim::{Scenario, Simulation};
use stories::{evicted, machine, refusal, shipped, simulation, sound};

#[test]
fn three_models_run_side_by_side_and_a_large_one_takes_the_room_of_the_fewest() {
    let mut s = shipped("strix-halo.toml");
    s.start("gpt-oss-20b").start("qwen3-coder-30b").start("starcoder2-15b").run(60);
    assert_eq!(s.running(), ["gpt-oss-20b", "qwen3-coder-30b", "starcoder2-15b"]);
    s.start("glm-4-7-reap-218b").run(200);
    assert_eq!(s.state("glm-4-7-reap-218b"), UnitState::Active);
    // At its smallest context it takes 91.9 of 118.1 GiB: the coder's 37 alone don't make enough
    // room, with the 18.3 of the autocompletion they do, and the small one's 16 stay.
    assert_eq!(evicted(&s).len(), 2, "{:?}", evicted(&s));
    assert_eq!(s.running().len(), 2);
    sound(&s);
    s.stop("glm-4-7-reap-218b").run(120);
    assert_eq!(s.running(), ["gpt-oss-20b", "qwen3-coder-30b", "starcoder2-15b"], "the evicted are back");
}

#[test]
fn what_never_fits_is_refused_and_nothing_is_stopped_for_it() {
    let mut s = shipped("strix-halo.toml");
    s.start("gpt-oss-20b").start("starcoder2-15b").run(60);
    s.start("deepseek-tq1").run(60);
    assert_eq!(s.running(), ["gpt-oss-20b", "starcoder2-15b"]);
    assert_eq!(evicted(&s), Vec::<String>::new());
    let refusal = refusal(&s);
    assert_eq!(refusal.kind, RefusalKind::WontFit);
    // 158 GiB of weights, 16384 · 68 KiB = 1.0625 GiB of cache and 1 GiB of its own.
    assert_eq!(refusal.needed_bytes, Bytes::gib(160) + Bytes::mib(64));
    let line = refusal.to_string();
    assert!(
        line.starts_with("deepseek-tq1 was refused: at context 16384 it needs 160.1 GiB of memory"),
        "{line}"
    );
    assert!(!line.contains('\n'));
}

#[test]
fn the_context_is_reduced_before_anybody_is_evicted_but_never_below_its_minimum() {
    let mut s = machine(
        "low = { weights = '50GiB', placement = 'anonymous', priority = 10 }
         wide = { weights = '10GiB', placement = 'anonymous', kv-per-token = '1MiB', context = 65536, context-min = 16384, priority = 90 }",
    );
    s.start("low").run(30).start("wide").run(30);
    assert_eq!(s.running(), ["low", "wide"]);
    assert_eq!(evicted(&s), Vec::<String>::new());
    let context = s.core.holders()[&"wide".parse().unwrap()].context;
    // 40 of 100 GiB are left beside the weights: at 1 MiB a token, at most 40960.
    assert!((38_000..=40_960).contains(&context), "{context}");
    sound(&s);
}

#[test]
fn without_a_minimum_the_context_is_never_reduced() {
    let mut s = machine(
        "low = { weights = '50GiB', placement = 'anonymous', priority = 10 }
         wide = { weights = '10GiB', placement = 'anonymous', kv-per-token = '1MiB', context = 65536, priority = 90 }",
    );
    s.start("low").run(30).start("wide").run(30);
    assert_eq!(s.running(), ["wide"]);
    assert_eq!(s.core.holders()[&"wide".parse().unwrap()].context, 65536);
}

#[test]
fn after_an_eviction_the_context_grows_into_the_room_that_it_made() {
    let mut s = machine(
        "low = { weights = '80GiB', placement = 'anonymous', priority = 10 }
         wide = { weights = '10GiB', placement = 'anonymous', kv-per-token = '1MiB', context = 65536, context-min = 16384, priority = 90 }",
    );
    s.start("low").run(30).start("wide").run(30);
    assert_eq!(evicted(&s), ["low"]);
    assert_eq!(s.core.holders()[&"wide".parse().unwrap()].context, 65536);
}

#[test]
fn equal_priorities_and_pins_stay_and_the_refusal_says_how_to_override() {
    let mut s = machine(
        "equal = { weights = '60GiB', placement = 'anonymous', priority = 50 }
         held = { weights = '30GiB', placement = 'anonymous', priority = 10, pinned = true }
         new = { weights = '40GiB', placement = 'anonymous', priority = 50 }",
    );
    s.start("equal").start("held").run(30).start("new").run(30);
    assert_eq!(s.running(), ["equal", "held"]);
    let refusal = refusal(&s);
    assert_eq!(refusal.advice, "plimsoll load new --instead-of equal");
    let line = refusal.to_string();
    assert!(
        line.contains("equal 60.0 GiB (priority 50)") && line.contains("held 30.0 GiB (pinned)"),
        "{line}"
    );
}

#[test]
fn a_smaller_context_that_would_fit_is_offered() {
    let mut s = machine(
        "other = { weights = '60GiB', placement = 'anonymous' }
         new = { weights = '30GiB', placement = 'anonymous', kv-per-token = '1MiB', context = 16384 }",
    );
    s.start("other").run(30).start("new").run(30);
    assert_eq!(s.running(), ["other"]);
    assert_eq!(refusal(&s).advice, "plimsoll load new -c 8192");
}

#[test]
fn ten_at_once_of_which_three_fit() {
    let models: String = (0..10)
        .map(|n| format!("m{n} = {{ weights = '30GiB', placement = 'anonymous', load-seconds = 60 }}\n"))
        .collect();
    let mut s = machine(&models);
    for n in 0..10 {
        s.start(&format!("m{n}"));
    }
    s.run(300);
    assert_eq!(s.running().len(), 3);
    assert_eq!(s.decisions.iter().filter(|d| d.kind == Kind::Refuse).count(), 7);
    sound(&s);
}

#[test]
fn at_boot_the_highest_priority_is_decided_first_whoever_asks_first() {
    for order in [["a", "b", "c"], ["c", "b", "a"], ["b", "c", "a"]] {
        let mut s = machine(
            "a = { weights = '60GiB', placement = 'anonymous', priority = 10 }
             b = { weights = '60GiB', placement = 'anonymous', priority = 90 }
             c = { weights = '60GiB', placement = 'anonymous', priority = 50 }",
        );
        for name in order {
            s.start(name);
        }
        s.run(60);
        assert_eq!(s.running(), ["b"], "started as {order:?}");
        assert_eq!(evicted(&s), Vec::<String>::new(), "nobody was loaded in vain");
    }
}

#[test]
fn a_loading_model_is_waited_for_not_stopped() {
    let mut s = machine(
        "low = { weights = '60GiB', placement = 'anonymous', priority = 10, load-seconds = 100 }
         high = { weights = '60GiB', placement = 'anonymous', priority = 90 }",
    );
    s.start("low").run(20).start("high").run(20);
    assert_eq!(s.state("low"), UnitState::Activating);
    let waiting: Vec<String> = s.core.waiting().map(|(i, text)| format!("{i}: {text}")).collect();
    assert_eq!(waiting, ["high: waiting: low is still loading"]);
    s.run(120);
    assert_eq!(s.running(), ["high"]);
    sound(&s);
}

#[test]
fn instances_share_mapped_weights_and_only_the_last_one_frees_them() {
    let mut s = machine(
        "shared = { weights = '60GiB', placement = 'mapped', private = '5GiB', priority = 20 }
         next = { weights = '32GiB', placement = 'anonymous', priority = 80 }",
    );
    s.start("shared").start("shared@2").run(30);
    assert_eq!(s.running(), ["shared", "shared@2"], "70 GiB, not 130");
    s.start("next").run(60);
    // 102 GiB together: one instance's private 5 GiB are enough.
    assert_eq!(evicted(&s).len(), 1);
    let frees: Vec<Bytes> = s.decisions.iter().filter(|d| d.kind == Kind::Evict).map(|d| d.bytes).collect();
    assert_eq!(frees, [Bytes::gib(5)], "evicting one sharer frees its private bytes only");
    assert_eq!(s.running().len(), 2);
    sound(&s);
}

#[test]
fn available_memory_is_made_free_for_a_large_load_and_for_no_other() {
    let machine = |rules: &str| {
        simulation(&format!(
            "[machine]\nmemory = '104GiB'\nsystem = '4GiB'\nreserve = '0B'\ncache = '70GiB'\nfree-large = '8GiB'\n{rules}\n\
             [models]\nlarge = {{ weights = '60GiB', placement = 'anonymous' }}\nsmall = {{ weights = '512MiB', placement = 'anonymous', private = '1MiB' }}\n\
             low = {{ weights = '60GiB', placement = 'anonymous', priority = 10 }}\n"
        ))
    };
    let steps = |s: &Simulation, name: &str| -> Vec<String> {
        let admitted = s.decisions.iter().rfind(|d| d.kind == Kind::Admit && d.instance == name.parse().ok());
        admitted.unwrap().steps.iter().map(ToString::to_string).collect()
    };
    let mut s = machine("drop-all-cache = true");
    s.start("small").run(30);
    assert_eq!(steps(&s, "small"), Vec::<String>::new());
    s.start("large").run(60);
    let dropped = "dropping all 70.0 GiB of page cache that can be dropped";
    assert_eq!(steps(&s, "large"), [dropped, "compacting memory for 60.0 GiB"]);

    // Without leave nobody else's cache is touched; and what has to be stopped is stopped first.
    let mut s = machine("");
    s.start("low").run(60);
    assert_eq!(steps(&s, "low"), ["compacting memory for 60.0 GiB"]);
    s.start("large").run(60);
    assert_eq!(steps(&s, "large"), ["stopping low (lower priority, frees 60.0 GiB)"]);
    sound(&s);
}

#[test]
fn a_daemon_that_dies_while_it_stops_a_model_does_not_start_it_again_before_who_needs_the_room() {
    let mut s = machine(
        "first = { weights = '45GiB', placement = 'anonymous', priority = 10, stop-seconds = 0 }
         second = { weights = '45GiB', placement = 'anonymous', priority = 20, stop-seconds = 5 }
         high = { weights = '85GiB', placement = 'anonymous', priority = 80 }",
    );
    s.start("first").start("second").run(60).start("high").run(2);
    assert_eq!((s.state("first"), s.state("second")), (UnitState::Inactive, UnitState::Deactivating));
    s.restart_daemon();
    s.run(60);
    assert_eq!(s.running(), ["high"]);
    assert_eq!(s.decisions.iter().filter(|d| d.kind == Kind::Restore).count(), 0);
    s.stop("high").run(120);
    assert_eq!(s.running(), ["first", "second"]);
    sound(&s);
}

#[test]
fn unmapped_instances_are_charged_each() {
    let mut s = machine("copy = { weights = '60GiB', placement = 'anonymous' }");
    s.start("copy").run(30).start("copy@2").run(30);
    assert_eq!(s.running(), ["copy"]);
}

#[test]
fn models_past_their_ttl_stop_by_themselves_and_go_first_when_room_is_needed() {
    let mut s = machine("idle = { weights = '60GiB', placement = 'anonymous', ttl-seconds = 100 }");
    s.start("idle").run(60);
    assert_eq!(s.running(), ["idle"]);
    s.run(120);
    assert_eq!(s.running(), Vec::<String>::new());
    assert!(s.core.owed().is_empty(), "its own time was up: it is owed nothing");
}

#[test]
fn memory_that_does_not_come_back_is_quarantined_and_the_plan_made_anew() {
    let mut s = machine(
        "leaky = { weights = '40GiB', placement = 'anonymous', priority = 10, leaks = '20GiB' }
         other = { weights = '40GiB', placement = 'anonymous', priority = 20 }
         new = { weights = '50GiB', placement = 'anonymous', priority = 80 }",
    );
    s.start("leaky").start("other").run(30).start("new").run(60);
    assert_eq!(evicted(&s), ["leaky", "other"]);
    assert_eq!(s.state("new"), UnitState::Active);
    assert_eq!(s.core.leaks().len(), 1);
    assert_eq!(s.core.leaks()[0].bytes, Bytes::gib(20));
}

#[test]
fn one_that_does_not_stop_is_left_alone_and_the_next_one_asked() {
    let mut s = machine(
        "stuck = { weights = '60GiB', placement = 'anonymous', priority = 10, stuck = true }
         other = { weights = '35GiB', placement = 'anonymous', priority = 20 }
         new = { weights = '30GiB', placement = 'anonymous', priority = 80 }",
    );
    s.start("stuck").start("other").run(30).start("new").run(120);
    assert_eq!(s.running(), ["new", "stuck"]);
    sound(&s);
}

#[test]
fn one_that_stops_only_after_its_stop_has_failed_is_owed_its_return() {
    let mut s = machine(
        "late = { weights = '60GiB', placement = 'anonymous', priority = 10, stubborn = true, stop-seconds = 10 }
         other = { weights = '35GiB', placement = 'anonymous', priority = 20 }
         new = { weights = '30GiB', placement = 'anonymous', priority = 80 }",
    );
    s.start("late").start("other").run(30).start("new").run(120);
    assert_eq!(s.running(), ["new", "other"], "there is room again for the one that went instead");
    s.stop("new").run(120);
    assert_eq!(s.running(), ["late", "other"]);
    sound(&s);
}

#[test]
fn a_stop_that_fails_when_nobody_waits_for_it_any_more_leaves_the_model_running() {
    let mut s = machine(
        "stuck = { weights = '60GiB', placement = 'anonymous', priority = 10, stuck = true, stop-seconds = 20 }
         new = { weights = '60GiB', placement = 'anonymous', priority = 80 }",
    );
    s.start("stuck").run(30).start("new").run(5).stop("new").run(60);
    assert_eq!(s.running(), ["stuck"]);
    let phases: Vec<Phase> = s.core.holders().values().map(|r| r.phase).collect();
    assert_eq!(phases, [Phase::Running]);
    assert!(s.core.owed().is_empty(), "it runs");
    sound(&s);
}

#[test]
fn one_past_its_ttl_that_does_not_stop_is_tried_again_later_and_holds_nobody_up() {
    let mut s = machine(
        "stuck = { weights = '60GiB', placement = 'anonymous', ttl-seconds = 30, stuck = true, silent = true }
         other = { weights = '35GiB', placement = 'anonymous', priority = 20 }
         new = { weights = '30GiB', placement = 'anonymous', priority = 80 }",
    );
    s.start("stuck").run(300);
    let tries = s.decisions.iter().filter(|d| d.kind == Kind::Expire).count();
    assert!((2..=5).contains(&tries), "{tries}");
    s.start("other").run(30).start("new").run(120);
    assert_eq!(s.running(), ["new", "stuck"]);
    sound(&s);
}

#[test]
fn what_a_person_stopped_stays_stopped() {
    let mut s = machine(
        "low = { weights = '60GiB', placement = 'anonymous', priority = 10 }
         high = { weights = '60GiB', placement = 'anonymous', priority = 90 }",
    );
    s.start("low").run(30).start("high").run(30).stop("low").run(5).stop("high").run(300);
    assert_eq!(s.running(), Vec::<String>::new());
}

#[test]
fn a_restart_of_the_daemon_forgets_nobody() {
    let mut s = machine(
        "low = { weights = '60GiB', placement = 'anonymous', priority = 10 }
         mid = { weights = '20GiB', placement = 'anonymous', priority = 50 }
         high = { weights = '60GiB', placement = 'anonymous', priority = 90, load-seconds = 60 }",
    );
    s.start("low").start("mid").run(30).start("high").run(10);
    s.restart_daemon();
    assert_eq!(s.core.holders().len(), 2, "one loads and one runs");
    s.run(120);
    assert_eq!(s.running(), ["high", "mid"]);
    s.restart_daemon();
    s.stop("high").run(60);
    assert_eq!(s.running(), ["low", "mid"], "the eviction from before the restarts is made good");
    sound(&s);
}

#[test]
fn observing_admits_everything_and_stops_nothing() {
    let mut s = simulation(
        "[machine]\nmemory = '104GiB'\nsystem = '4GiB'\nreserve = '0B'\nmode = 'observe'\n
         [models]
         low = { weights = '60GiB', placement = 'anonymous', priority = 10 }
         high = { weights = '30GiB', placement = 'anonymous', priority = 90 }
         more = { weights = '30GiB', placement = 'anonymous', priority = 90 }",
    );
    s.start("low").start("high").run(30);
    assert_eq!(s.running(), ["high", "low"]);
    let instance = "more".parse().unwrap();
    let request = s.world.scenario().request(&instance, "").unwrap();
    let Planned::Admit(plan) = s.core.preview(&request, &s.world.observe(), s.world.now()) else {
        panic!("no plan")
    };
    assert!(matches!(&plan.steps[..], [Step::Stop { .. }]));
    assert!(evicted(&s).is_empty());
}

#[test]
fn a_gtt_smaller_than_memory_binds_by_itself() {
    let mut s = simulation(
        "[machine]\nmemory = '104GiB'\nsystem = '4GiB'\nreserve = '0B'
         gpus = [{ name = 'card0', kind = 'unified', total = '50GiB', used = '0B' }]
         [models]
         a = { weights = '40GiB' }
         b = { weights = '20GiB' }
         c = { weights = '20GiB', placement = 'anonymous' }",
    );
    s.start("a").run(30).start("b").run(30);
    assert_eq!(s.running(), ["a"]);
    let line = refusal(&s).to_string();
    assert!(line.contains("of GPU memory") && line.contains("swap can't help"), "{line}");
    s.start("c").run(30);
    assert_eq!(s.running(), ["a", "c"], "there was memory all along");
}

#[test]
fn a_refusal_can_be_explained_after_a_restart_of_the_daemon() {
    let mut s = machine("big = { weights = '160GiB', placement = 'anonymous' }");
    s.start("big").run(10);
    s.restart_daemon();
    let last = s.core.decisions().next_back().expect("a decision");
    assert_eq!((last.kind, &last.instance), (Kind::Refuse, &"big".parse().ok()));
}

#[test]
fn what_a_model_took_beyond_its_estimate_is_reserved_the_next_time() {
    let mut s = machine(
        "greedy = { weights = '40GiB', placement = 'anonymous', takes-more = '10GiB', priority = 50 }
         other = { weights = '55GiB', placement = 'anonymous', priority = 10 }",
    );
    s.start("greedy").run(60);
    assert_eq!(s.core.holders()[&"greedy".parse().unwrap()].held().total(), Bytes::gib(50));
    s.stop("greedy").run(30).start("other").run(60);
    // By its estimate it would fit beside the other: 95 of 100 GiB.
    s.start("greedy").run(60);
    assert_eq!(evicted(&s), ["other"]);
    assert_eq!(s.running(), ["greedy"]);
    let admitted = s.decisions.iter().rev().find(|d| d.kind == Kind::Admit).unwrap();
    assert_eq!((admitted.bytes, admitted.basis.measured_bytes), (Bytes::gib(50), Bytes::gib(10)));
    let said = "is admitted with 50.0 GiB (10.0 GiB of it because an earlier run took it) at context 4096";
    assert!(admitted.text.contains(said), "{}", admitted.text);
    sound(&s);
}

#[test]
fn measured_peaks_outlive_a_reboot_and_hold_for_their_context_alone() {
    let text =
        "greedy = { weights = '40GiB', placement = 'anonymous', takes-more = '10GiB', context = 8192 }";
    let mut s = machine(text);
    s.start("greedy").run(60).stop("greedy").run(30);
    let saved = serde_json::to_string(&s.core.saved()).unwrap();
    let core = Core::new(Default::default(), serde_json::from_str(&saved).unwrap(), false);
    let mut reading = plimsoll::ledger::Machine::default();
    reading.memory.total = Bytes::gib(104);
    reading.memory.available = Bytes::gib(100);
    let planned = |context: u64| {
        let scenario: Scenario = toml::from_str(&format!(
            "[machine]\nmemory = '104GiB'\nsystem = '4GiB'\n[models]\n{}",
            text.replace("8192", &context.to_string())
        ))
        .unwrap();
        let request = scenario.request(&"greedy".parse().unwrap(), "").unwrap();
        match core.preview(&request, &reading, 0) {
            Planned::Admit(plan) => plan.rung,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(planned(8192).basis.measured_bytes, Bytes::gib(10));
    assert!(planned(4096).basis.measured_bytes.is_zero(), "other settings");
}

#[test]
fn a_refusal_says_that_an_earlier_run_took_more() {
    let mut s = machine(
        "greedy = { weights = '40GiB', placement = 'anonymous', takes-more = '10GiB', priority = 50 }
         other = { weights = '55GiB', placement = 'anonymous', priority = 60 }",
    );
    s.start("greedy").run(60).stop("greedy").run(30).start("other").run(60).start("greedy").run(60);
    assert_eq!(s.running(), ["other"]);
    let refusal = refusal(&s);
    assert_eq!(refusal.basis.measured_bytes, Bytes::gib(10));
    let line = refusal.to_string();
    assert!(
        line.contains("it needs 50.0 GiB of memory (10.0 GiB of it because an earlier run took it)"),
        "{line}"
    );
}

/// What happens on a machine that has room for `low` or for `large`, and not for both.
fn beside_low(at: &str) -> String {
    format!(
        "at = [{at}]
         [machine]
         memory = '128GiB'
         system = '4GiB'
         [models]
         low = {{ weights = '60GiB', placement = 'anonymous', priority = 10 }}
         large = {{ weights = '80GiB', placement = 'anonymous', priority = 90, load-seconds = 20 }}"
    )
}

#[test]
fn one_that_fails_to_load_again_and_again_stops_nobody_any_more() {
    let at = "{ seconds = 40, start = 'large' }, { seconds = 50, crash = 'large' },
         { seconds = 100, restart = 'large' }, { seconds = 110, crash = 'large' },
         { seconds = 160, restart = 'large' }, { seconds = 170, crash = 'large' },
         { seconds = 220, restart = 'large' }, { seconds = 300, stop = 'low' }, { seconds = 310, restart = 'large' }";
    let mut s = simulation(&beside_low(at));
    s.start("low").run(250);
    let refusal = refusal(&s);
    assert_eq!(refusal.kind, RefusalKind::FailsToLoad(3));
    assert!(refusal.to_string().contains("failed to load 3 times"), "{refusal}");
    assert_eq!((evicted(&s).len(), s.running()), (3, vec!["low".to_owned()]));
    // With nobody to be stopped for it, it may try as often as it likes.
    s.run(100);
    assert_eq!(s.running(), ["large"]);
    sound(&s);
}

#[test]
fn nobody_returns_while_the_one_it_went_for_is_to_restart() {
    let at = "{ seconds = 40, start = 'large' }, { seconds = 90, crash = 'large', restart-seconds = 30 }";
    let mut s = simulation(&beside_low(at));
    s.start("low").run(180);
    assert_eq!((evicted(&s).len(), s.running()), (1, vec!["large".to_owned()]));
    assert!(s.decisions.iter().all(|decision| decision.kind != Kind::Restore), "{:?}", s.decisions);
    // Stopped, while it waits to be started again: then the room is free.
    let mut s = simulation(&beside_low(&format!("{at}, {{ seconds = 100, stop = 'large' }}")));
    s.start("low").run(300);
    assert_eq!(s.running(), ["low"]);
    sound(&s);
}

#[test]
fn nobody_stays_away_for_one_that_fails_to_load_again_and_again() {
    let crash = |seconds| format!("{{ seconds = {seconds}, crash = 'large', restart-seconds = 10 }}");
    let at = ["{ seconds = 40, start = 'large' }".to_owned(), crash(50), crash(70), crash(90)];
    let mut s = simulation(&beside_low(&at.join(", ")));
    s.start("low").run(200);
    assert_eq!(refusal(&s).kind, RefusalKind::FailsToLoad(3));
    assert_eq!((evicted(&s).len(), s.running()), (1, vec!["low".to_owned()]));
    sound(&s);
}

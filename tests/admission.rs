//! The decisions on simulated machines, in virtual time: what is stopped for what, what is refused,
//! what comes back.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use plimsoll::bytes::Bytes;
use plimsoll::ledger::UnitState;
use plimsoll::policy::decision::Kind;
use plimsoll::policy::{Core, Planned, Refusal, RefusalKind, Step, Verdict};
use plimsoll::sim::{Scenario, Simulation};

/// A machine with 100 GiB for models beside 4 of the system, and models as `name = {...}` lines.
fn machine(models: &str) -> Simulation {
    simulation(&format!(
        "[machine]\nmemory = '104GiB'\nsystem = '4GiB'\nreserve = '0B'\n[models]\n{models}\n"
    ))
}

fn simulation(text: &str) -> Simulation {
    let scenario: Scenario = toml::from_str(text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    Simulation::new(scenario)
}

fn shipped(name: &str) -> Simulation {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("config/simulate").join(name);
    Simulation::new(Scenario::read(&path).unwrap())
}

fn refusal(simulation: &Simulation) -> Refusal {
    let last = simulation.decisions.iter().rev().find(|d| d.kind == Kind::Refuse);
    *last
        .and_then(|d| d.refusal.clone())
        .unwrap_or_else(|| panic!("no refusal in {:#?}", simulation.decisions))
}

fn evicted(simulation: &Simulation) -> Vec<String> {
    let evictions = simulation.decisions.iter().filter(|d| d.kind == Kind::Evict);
    evictions.map(|d| d.instance.as_ref().unwrap().to_string()).collect()
}

fn sound(simulation: &Simulation) {
    assert_eq!(simulation.breaches, Vec::<String>::new());
}

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
fn one_larger_than_memory_streams_with_all_the_room_there_is_and_the_others_come_back() {
    let monster =
        "monster = {priority=80, weights='158GiB', placement='mapped', private='10GiB', stream='20GiB'}";
    let others = "a = {weights='40GiB', placement='anonymous', priority=40}\nb = {weights='13GiB', placement='anonymous', priority=30}\nc = {weights='16GiB', placement='anonymous', priority=90}";
    let mut s = machine(&format!("{monster}\n{others}"));
    s.start("a").start("b").start("c").run(60);
    assert_eq!(s.running(), ["a", "b", "c"]);
    s.start("monster").run(200);
    // Of 100 GiB, 16 stay with the model of higher priority and 10 are private.
    assert_eq!(s.running(), ["c", "monster"]);
    let admitted = s.decisions.iter().rev().find(|d| d.kind == Kind::Admit).unwrap();
    let streamed = admitted.steps.iter().find_map(|step| match step {
        Step::Stream { resident_bytes, mapped_bytes, .. } => Some((*resident_bytes, *mapped_bytes)),
        _ => None,
    });
    assert_eq!(streamed, Some((Bytes::gib(74), Bytes::gib(158))), "{admitted:#?}");
    assert_eq!(admitted.verdict, plimsoll::policy::Verdict::Streams);
    sound(&s);
    // What it streams with is its own: nobody gets any of it.
    s.start("b").run(60);
    assert_eq!(s.running(), ["c", "monster"]);
    s.stop("monster").run(120);
    assert_eq!(s.running(), ["a", "b", "c"], "the evicted are back");
    sound(&s);
}

#[test]
fn disks_are_read_ahead_by_an_expert_for_as_long_as_files_are_opened_to_stream_from() {
    let monster = "monster = {priority=80, weights='158GiB', placement='mapped', private='10GiB', stream='20GiB', expert='3100KiB', load-seconds=20}";
    let mut s = machine(&format!(
        "{monster}\na = {{weights='40GiB', placement='mapped', priority=40, expert='3100KiB'}}"
    ));
    // It fits: nothing is read again and again.
    s.start("a").run(5);
    assert!(s.world.read_ahead.is_empty());
    s.run(60).start("monster").run(10);
    assert_eq!(s.world.read_ahead.values().collect::<Vec<_>>(), [&Bytes::mib(1)]);
    // Whoever comes next knows what is still to be set back.
    s.restart_daemon();
    s.run(1);
    assert_eq!(s.world.read_ahead.len(), 1);
    s.run(60);
    assert_eq!(s.running(), ["monster"]);
    assert!(s.world.read_ahead.is_empty(), "it answers");
    sound(&s);
}

#[test]
fn without_room_for_what_every_token_touches_nothing_streams_and_nothing_is_stopped() {
    let monster =
        "monster = {priority=80, weights='158GiB', placement='mapped', private='10GiB', stream='91GiB'}";
    let mut s = machine(&format!("{monster}\na = {{weights='40GiB', placement='anonymous', priority=40}}"));
    s.start("a").run(60);
    s.start("monster").run(60);
    assert_eq!(s.running(), ["a"]);
    assert_eq!(refusal(&s).short_bytes, Bytes::gib(68));
    assert_eq!(evicted(&s), Vec::<String>::new());
    sound(&s);
}

/// 100 GiB for models, and 200 on disk.
fn with_disk(models: &str) -> Simulation {
    simulation(&format!(
        "[machine]\nmemory = '104GiB'\nsystem = '4GiB'\nreserve = '0B'\nswap-room = '200GiB'\n[models]\n{models}\n"
    ))
}

const MONSTER: &str = "monster = { weights = '150GiB', placement = 'anonymous', priority = 80, swap = '120GiB', context = 4096 }";

#[test]
fn a_model_larger_than_memory_runs_with_a_swapfile_that_goes_with_it() {
    let mut s = with_disk(&format!("small = {{ weights = '30GiB', placement = 'anonymous' }}\n{MONSTER}"));
    s.start("small").run(60);
    s.start("monster").run(5);
    let machine = s.world.observe();
    // 50 GiB don't fit, and the file is an eighth larger.
    assert_eq!(machine.swap_of_plans(), Bytes::gib(50) + Bytes::gib(50).mul_div(1, 8));
    s.run(60);
    assert_eq!(s.running(), ["monster"]);
    let admitted =
        s.decisions.iter().find(|d| d.kind == Kind::Admit && d.instance == "monster".parse().ok()).unwrap();
    assert_eq!(admitted.verdict, Verdict::FitsWithSwap);
    let steps: Vec<String> = admitted.steps.iter().map(ToString::to_string).collect();
    assert_eq!(
        steps,
        [
            "making a swapfile of 56.3 GiB",
            "stopping small (lower priority, frees 30.0 GiB)",
            "leaving 50.0 GiB of it in swap"
        ]
    );
    s.restart_daemon();
    s.run(60);
    assert_eq!(s.running(), ["monster"], "a restart of the daemon takes no swap away");
    assert!(!s.world.observe().swap_of_plans().is_zero());
    s.stop("monster").run(120);
    assert_eq!(s.running(), ["small"], "who went for it is back");
    assert_eq!(s.world.observe().swaps, [], "and the swapfile is gone");
    sound(&s);
}

#[test]
fn a_daemon_that_dies_before_the_model_is_admitted_leaves_it_the_swapfile() {
    let mut s = with_disk(&format!(
        "small = {{ weights = '30GiB', placement = 'anonymous', stop-seconds = 5 }}\n{MONSTER}"
    ));
    s.start("small").run(60);
    s.start("monster").run(2);
    assert_eq!(s.state("small"), UnitState::Deactivating);
    let swapfiles =
        |s: &Simulation| s.world.observe().swaps.into_iter().map(|area| area.path).collect::<Vec<_>>();
    let made = swapfiles(&s);
    assert_eq!(made.len(), 1);
    s.restart_daemon();
    s.run(60);
    assert_eq!(s.running(), ["monster"]);
    assert_eq!(swapfiles(&s), made, "the file that was made for it serves it");
    sound(&s);
}

#[test]
fn a_swapfile_on_its_way_out_is_counted_on_by_nobody() {
    let mut s = with_disk(MONSTER);
    s.start("monster").run(60);
    s.stop("monster").run(1);
    s.start("monster").run(1);
    assert!(s.core.waiting().any(|(_, told)| told.contains("is being removed")));
    s.run(60);
    assert_eq!((s.running(), s.world.observe().swaps.len()), (vec!["monster".to_owned()], 1));
    sound(&s);
}

#[test]
fn swap_is_no_help_beyond_what_may_be_swapped_or_what_the_disk_holds() {
    // All but 20 GiB of it may be swapped, and 120 remain.
    let mut s = with_disk("monster = { weights = '300GiB', placement = 'anonymous', swap = '120GiB' }");
    s.start("monster").run(60);
    assert_eq!((s.running().len(), s.world.observe().swaps.len()), (0, 0));
    // 180 GiB of swap would do, and with their margin they are more than the disk has.
    let mut s = with_disk("monster = { weights = '280GiB', placement = 'anonymous', swap = '260GiB' }");
    s.start("monster").run(60);
    assert_eq!((s.running().len(), s.world.observe().swaps.len()), (0, 0));
    sound(&s);
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

#[test]
fn a_swapfile_that_fails_ends_in_a_refusal_and_nobody_was_stopped_for_it() {
    let mut s = simulation(&format!(
        "[machine]\nmemory = '104GiB'\nsystem = '4GiB'\nreserve = '0B'\nswap-room = '200GiB'\nswap-broken = true\n\
         [models]\nsmall = {{ weights = '30GiB', placement = 'anonymous' }}\n{MONSTER}\n"
    ));
    s.start("small").run(60);
    s.start("monster").run(300);
    assert_eq!((s.running(), evicted(&s)), (vec!["small".to_owned()], vec![]));
    let refusal = refusal(&s);
    assert_eq!(refusal.no_swap.as_deref(), Some("the kernel does not take it as swap"));
    assert!(refusal.to_string().contains("swap can't help: the kernel does not take it as swap"));
    sound(&s);
}

#[test]
fn one_that_fails_to_load_again_and_again_stops_nobody_any_more() {
    let text = "at = [
         { seconds = 40, start = 'broken' }, { seconds = 50, crash = 'broken' },
         { seconds = 100, restart = 'broken' }, { seconds = 110, crash = 'broken' },
         { seconds = 160, restart = 'broken' }, { seconds = 170, crash = 'broken' },
         { seconds = 220, restart = 'broken' }, { seconds = 300, stop = 'low' }, { seconds = 310, restart = 'broken' }]
         [machine]
         memory = '128GiB'
         system = '4GiB'
         [models]
         low = { weights = '60GiB', placement = 'anonymous', priority = 10 }
         broken = { weights = '80GiB', placement = 'anonymous', priority = 90, load-seconds = 20 }";
    let mut s = simulation(text);
    s.start("low").run(250);
    let refusal = refusal(&s);
    assert_eq!(refusal.kind, RefusalKind::FailsToLoad(3));
    assert!(refusal.to_string().contains("failed to load 3 times"), "{refusal}");
    assert_eq!((evicted(&s).len(), s.running()), (3, vec!["low".to_owned()]));
    // With nobody to be stopped for it, it may try as often as it likes.
    s.run(100);
    assert_eq!(s.running(), ["broken"]);
    sound(&s);
}

//! Models larger than memory on simulated machines: they stream or swap, and leave nothing behind.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod stories;

use plimsoll::bytes::Bytes;
use plimsoll::ledger::UnitState;
use plimsoll::policy::decision::Kind;
use plimsoll::policy::{Step, Verdict};
use plimsoll::sim::Simulation;
use stories::{evicted, machine, refusal, simulation, sound};

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
    assert_eq!(admitted.verdict, Verdict::Streams);
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
    // 205 GiB of swap would do, and the disk has 200.
    let mut s = with_disk("monster = { weights = '305GiB', placement = 'anonymous', swap = '260GiB' }");
    s.start("monster").run(60);
    assert_eq!((s.running().len(), s.world.observe().swaps.len()), (0, 0));
    let why = "a swapfile of 205.0 GiB would be needed, and swapfiles may take 200.0 GiB more (see [swap] in plimsoll.toml)";
    assert_eq!(refusal(&s).no_swap.as_deref(), Some(why));
    // 180 would do, and their margin is what the disk has.
    let mut s = with_disk("monster = { weights = '280GiB', placement = 'anonymous', swap = '260GiB' }");
    s.start("monster").run(60);
    assert_eq!(
        (s.running(), s.world.observe().swap_of_plans()),
        (vec!["monster".to_owned()], Bytes::gib(200))
    );
    sound(&s);
}

#[test]
fn who_ran_from_a_swapfile_of_another_comes_back_with_its_own_as_far_as_the_disk_goes() {
    // 100 GiB of swap, and 112 of which the margin is not to be had; the second runs from the file of the first.
    let mut s = simulation(
        "[machine]\nmemory = '104GiB'\nsystem = '4GiB'\nreserve = '0B'\nswap-room = '120GiB'\n[models]\n\
         first = { weights = '200GiB', placement = 'anonymous', swap = '180GiB', priority = 20 }\n\
         second = { weights = '212GiB', placement = 'anonymous', swap = '180GiB', priority = 60 }\n\
         third = { weights = '90GiB', placement = 'anonymous', priority = 80 }",
    );
    s.start("first").run(60).start("second").run(60);
    assert_eq!(s.running(), ["second"]);
    s.start("third").run(200);
    assert_eq!((s.running(), s.world.observe().swaps.len()), (vec!["third".to_owned()], 0));
    s.stop("third").run(300);
    assert_eq!(s.running(), ["second"]);
    assert_eq!(s.world.observe().swap_of_plans(), Bytes::gib(120));
    sound(&s);
}

#[test]
fn who_is_owed_a_return_tries_again_while_the_disk_has_no_room_for_its_swapfile() {
    let mut s = with_disk(
        "monster = { weights = '220GiB', placement = 'anonymous', swap = '180GiB' }\n\
         other = { weights = '90GiB', placement = 'anonymous', priority = 80 }",
    );
    s.start("monster").run(60).start("other").run(200);
    assert_eq!(s.running(), ["other"]);
    s.world.disk(Bytes::gib(100));
    s.stop("other").run(1000);
    assert_eq!(s.running(), Vec::<String>::new());
    let why = "a swapfile of 120.0 GiB would be needed, and swapfiles may take 100.0 GiB more (see [swap] in plimsoll.toml)";
    assert_eq!(refusal(&s).no_swap.as_deref(), Some(why));
    s.world.disk(Bytes::gib(140));
    s.run(2000);
    assert_eq!(s.running(), ["monster"]);
    sound(&s);
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

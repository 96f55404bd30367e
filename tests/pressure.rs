//! The pressure ladder on simulated machines, in virtual time: what is done when memory runs short though nobody asked
//! for any, to whom, in which order, and what is left alone.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod ladder;

use ladder::{done, machine, sound, stopped, text, three};
use plimsoll::bytes::Bytes;
use plimsoll::ledger::UnitState;
use plimsoll::policy::decision::Kind;
use plimsoll::policy::{Level, Rescue};
use plimsoll::sim::{Scenario, Simulation};

#[test]
fn a_steady_eater_costs_the_least_important_model_and_it_comes_back() {
    let mut s = three("");
    s.eat(Bytes::mib(200), Bytes::gib(40)).run(300);
    assert_eq!(done(&s), [(Rescue::Stop, "low".to_owned())]);
    assert_eq!(s.running(), ["high", "mid"]);
    let first = &s.reliefs[0].decision;
    assert_eq!(first.relief.unwrap().level, Level::Act);
    assert_eq!(first.relief.unwrap().expected_bytes, Bytes::gib(20));
    assert!(
        first.text.starts_with("low (idle) is stopped to keep the machine afloat: 2.0 GiB of memory is left")
    );
    assert!(
        first.text.contains("0.2 GiB less each second") && first.text.contains("eater.scope grows the most")
    );
    let gained = s.decisions.iter().find_map(|d| d.relief?.gained_bytes).expect("the gain is told");
    assert!(gained >= Bytes::gib(19) && gained <= Bytes::gib(21), "{gained}");
    s.eat(Bytes::ZERO, Bytes::ZERO).run(120);
    assert_eq!(s.running(), ["high", "low", "mid"]);
    sound(&s);
}

#[test]
fn one_that_eats_at_full_speed_is_met_by_kills_and_the_kernel_never_has_to() {
    for rules in ["", "no-psi = true", "swap = '8GiB'"] {
        let mut s = three(rules);
        s.eat(Bytes::gib(4), Bytes::gib(100)).run(60);
        assert_eq!(stopped(&s), ["low", "mid", "high"], "{rules}");
        assert!(done(&s).iter().all(|(rescue, _)| *rescue == Rescue::Kill), "{:?}", done(&s));
        sound(&s);
    }
}

#[test]
fn with_and_without_swap_the_same_ones_go_in_the_same_order() {
    for rules in ["", "no-psi = true", "swap = '8GiB'"] {
        let mut s = three(rules);
        s.eat(Bytes::mib(200), Bytes::gib(100)).run(700);
        assert_eq!(stopped(&s), ["low", "mid", "high"], "{rules}");
        sound(&s);
    }
}

#[test]
fn one_is_enough_where_one_is_enough() {
    let mut s = machine(
        "",
        "a = { weights = '2GiB', placement = 'anonymous', priority = 10 }
         b = { weights = '2GiB', placement = 'anonymous', priority = 10 }
         c = { weights = '12GiB', placement = 'anonymous', priority = 20 }",
    );
    s.start("a").start("b").start("c").run(200);
    // 108 GiB are left. At the act level, with two seconds of 1.5 GiB each, more than 3 GiB have to come back.
    s.eat(Bytes::mib(1500), Bytes::gib(114)).run(200);
    assert_eq!(stopped(&s), ["c"]);
    sound(&s);
}

#[test]
fn what_the_first_one_gave_back_is_used_before_a_second_one_goes() {
    // So fast that it is through the reserve in less than three seconds, again and again. What it leaves beside b and c is
    // more than half of the reserve first, and then less.
    for (meal, gone) in [(117_700, &["a"][..]), (119_000, &["a", "b"])] {
        let mut s = machine(
            "",
            "a = { weights = '3GiB', placement = 'anonymous', priority = 10 }
             b = { weights = '3GiB', placement = 'anonymous', priority = 20 }
             c = { weights = '3GiB', placement = 'anonymous', priority = 30 }",
        );
        s.start("a").start("b").start("c").run(200);
        s.eat(Bytes::mib(1500), Bytes::mib(meal)).run(200);
        assert_eq!(stopped(&s), gone, "{meal}");
        sound(&s);
    }
}

#[test]
fn what_is_not_worth_a_stop_is_not_worth_a_more_important_model_either() {
    let mut s = machine(
        "",
        "a = { weights = '620MiB', placement = 'anonymous', priority = 10 }
         b = { weights = '800MiB', placement = 'anonymous', priority = 50 }",
    );
    s.start("a").start("b").run(200);
    // At the act level some 710 MiB have to come back, of which a has all but less than half of what is worth a stop;
    // and when it is gone, less than that is missing as well.
    s.eat(Bytes::mib(100), Bytes::mib(123_660)).run(3000);
    assert_eq!(stopped(&s), ["a"]);
    sound(&s);
}

#[test]
fn what_is_missing_after_one_stop_does_not_cost_another_model() {
    let text = "at = [{ seconds = 300, system = '128202MiB' }]
         [machine]
         memory = '128GiB'
         system = '4GiB'
         [models]
         a = { weights = '270MiB', placement = 'anonymous', priority = 10, leaks = '8MiB' }
         b = { weights = '560MiB', placement = 'anonymous', priority = 50 }";
    let mut s = Simulation::new(toml::from_str(text).unwrap());
    // 2040 MiB are left and 520 have to come back. a is nearly half of it, and would leave just enough missing for b
    // to go as well.
    s.start("a").start("b").run(3000);
    assert_eq!(stopped(&s), ["b"]);
    sound(&s);
}

#[test]
fn idle_before_busy_even_where_the_idle_one_is_more_important() {
    let mut s = three("");
    s.request("low", 1, 3600).request("mid", 1, 3600).run(30);
    s.eat(Bytes::mib(200), Bytes::gib(40)).run(300);
    assert_eq!(stopped(&s), ["high"]);
    sound(&s);
    // Where no idle one is enough, the least important busy one goes.
    let mut s = three("");
    s.request("low", 1, 3600).request("mid", 1, 3600).request("high", 1, 3600).run(30);
    s.eat(Bytes::mib(200), Bytes::gib(40)).run(300);
    assert_eq!(stopped(&s), ["low"]);
    sound(&s);
}

#[test]
fn a_pinned_one_goes_last_and_only_to_save_the_machine() {
    let pinned = "held = { weights = '40GiB', placement = 'anonymous', priority = 0, pinned = true }
                  other = { weights = '40GiB', placement = 'anonymous', priority = 90 }";
    let mut s = machine("", pinned);
    s.start("held").start("other").run(200);
    s.eat(Bytes::mib(100), Bytes::gib(60)).run(900);
    assert_eq!(stopped(&s), ["other"]);
    sound(&s);
    let mut s = machine("", pinned);
    s.start("held").start("other").run(200);
    s.eat(Bytes::mib(100), Bytes::gib(110)).run(1500);
    assert_eq!(stopped(&s), ["other", "held"]);
    assert_eq!(s.reliefs.last().unwrap().decision.relief.unwrap().level, Level::Critical);
    sound(&s);
}

#[test]
fn what_was_just_loaded_stays_a_minute_unless_the_machine_is_in_danger() {
    let models = "old = { weights = '20GiB', placement = 'anonymous', priority = 90 }
                  new = { weights = '60GiB', placement = 'anonymous', priority = 10 }";
    let mut s = machine("", models);
    s.start("old").run(100).start("new").run(15);
    s.eat(Bytes::gib(1), Bytes::gib(43)).run(50);
    assert_eq!(stopped(&s), ["old"], "though it is the more important one");
    sound(&s);
    let mut s = machine("", "new = { weights = '60GiB', placement = 'anonymous' }");
    s.start("new").run(15);
    s.eat(Bytes::gib(2), Bytes::gib(80)).run(40);
    assert_eq!(stopped(&s), ["new"]);
    assert_eq!(s.reliefs[0].decision.relief.unwrap().level, Level::Critical);
    sound(&s);
}

#[test]
fn cache_that_can_be_reclaimed_never_costs_a_model() {
    // oMLX #3338: 193 evictions in eight days, of models that fitted. All memory but a little is page cache all the
    // time; models come, work and go; what is stalled is stalled by reading.
    let mut s = machine(
        "fastest = '1GiB'\ncache = '56GiB'\ncold = '13GiB'",
        "chat = { weights = '40GiB', placement = 'anonymous', priority = 10 }
         code = { weights = '30GiB', placement = 'mapped', private = '5GiB', priority = 20 }
         small = { weights = '10GiB', placement = 'anonymous', ttl-seconds = 3600 }",
    );
    s.start("chat").start("code").run(200);
    for hour in 0..192 {
        s.world.stall(if hour % 3 == 0 { 400 } else { 20 }, if hour % 5 == 0 { 150 } else { 0 });
        s.start("small").request("chat", 1, 1800 * (hour % 2)).request("code", 2, 900 * (hour % 3)).run(3600);
    }
    assert_eq!(done(&s), [(Rescue::DropCache, String::new())], "what nobody runs, once");
    assert!(s.running().contains(&"chat".to_owned()) && s.running().contains(&"code".to_owned()));
    sound(&s);
}

#[test]
fn pressure_alone_is_no_reason() {
    // Talos #12526: a reader under a MemoryHigh of its own has the whole machine's pressure at its maximum.
    let mut s = three("");
    s.world.stall(1000, 1000);
    s.run(3600);
    assert_eq!(done(&s), []);
    sound(&s);
}

#[test]
fn whoever_would_give_nothing_back_is_not_the_victim() {
    // systemd #35270: a scope with much cache and swap was picked in place of the one that ate.
    let mut s = machine(
        "swap = '40GiB'",
        "streams = { weights = '200GiB', placement = 'mapped', private = '100MiB', priority = 0, stream = '6GiB' }
         swapped = { weights = '30GiB', placement = 'anonymous', priority = 10, batch = true }
         real = { weights = '20GiB', placement = 'anonymous', priority = 50 }",
    );
    s.start("swapped").start("real").run(100).start("streams").run(200);
    s.eat(Bytes::mib(200), Bytes::gib(110)).run(900);
    let all = done(&s);
    let first_stop = all.iter().find(|(rescue, _)| *rescue >= Rescue::Stop).cloned().unwrap();
    assert_ne!(first_stop.1, "streams");
    let named = s.reliefs.iter().filter(|e| e.decision.relief.unwrap().rescue >= Rescue::Stop);
    assert!(
        named.clone().count() > 0
            && named.clone().all(|e| e.decision.text.contains("/user.slice/eater.scope"))
    );
    // Each was chosen for what it would really free.
    for evidence in named {
        let (victim, relief) =
            (evidence.decision.instance.as_ref().unwrap(), evidence.decision.relief.unwrap());
        let measured = &evidence.machine.units[victim].measured;
        assert!(relief.expected_bytes <= measured.private + measured.file, "{relief:?}");
        assert!(relief.expected_bytes >= Bytes::mib(256));
    }
    sound(&s);
}

#[test]
fn ten_minutes_of_load_within_budget_evict_nobody() {
    // Disk load and a throttled mmap reader raise pressure, a tmpfs is filled and emptied as fast as it goes, to just
    // above the reserve.
    for psi in ["", "no-psi = true"] {
        let mut s = three(psi);
        for round in 0..60 {
            s.world.stall(300 + 10 * (round % 50), 100 + 10 * (round % 40));
            s.eat(Bytes::gib(3), Bytes::gib(29) + Bytes::mib(900)).run(10);
            if round % 2 == 0 {
                s.eat(Bytes::ZERO, Bytes::ZERO).run(1);
            }
        }
        assert_eq!(done(&s), []);
        sound(&s);
    }
}

#[test]
fn idle_memory_goes_into_swap_before_anybody_is_stopped() {
    let batch = "batch = { weights = '60GiB', placement = 'anonymous', priority = 10, batch = true }
                 chat = { weights = '30GiB', placement = 'anonymous', priority = 10 }";
    let mut s = machine("swap = '16GiB'", batch);
    s.start("batch").start("chat").run(200);
    s.eat(Bytes::mib(100), Bytes::gib(34)).run(600);
    let all = done(&s);
    assert!(
        !all.is_empty() && all.iter().all(|one| *one == (Rescue::Reclaim, "batch".to_owned())),
        "{all:?}"
    );
    assert!(text(&s).iter().any(|t| t.starts_with("taking memory back from batch brought")));
    sound(&s);

    // Without swap one is made, where that is allowed; it goes when nobody needs it any more.
    let mut s = machine("swap-room = '16GiB'", batch);
    s.start("batch").start("chat").run(200);
    s.eat(Bytes::mib(100), Bytes::gib(34)).run(600);
    assert_eq!(done(&s)[..2], [(Rescue::AddSwap, String::new()), (Rescue::Reclaim, "batch".to_owned())]);
    assert_eq!(stopped(&s), Vec::<String>::new(), "{:#?}", text(&s));
    s.eat(Bytes::ZERO, Bytes::ZERO).stop("batch").run(300);
    assert_eq!(s.world.observe().swaps.len(), 0);
    sound(&s);

    // What is busy is left in memory, and there is nothing else to take.
    let mut s = machine("swap = '16GiB'", batch);
    s.start("batch").start("chat").run(200).request("batch", 1, 3600).run(20);
    s.eat(Bytes::mib(100), Bytes::gib(34)).run(600);
    assert_eq!(done(&s), [(Rescue::Stop, "chat".to_owned())]);
    sound(&s);
}

#[test]
fn observing_says_what_it_would_do_and_does_nothing() {
    let mut s = three("mode = 'observe'");
    s.eat(Bytes::mib(200), Bytes::gib(33)).run(900);
    assert_eq!(s.running(), ["high", "low", "mid"]);
    assert_eq!(stopped(&s).first().unwrap(), "low");
    assert!(s.decisions.iter().filter(|d| d.kind == Kind::Relieve).all(|d| d.observed), "{:?}", text(&s));
    assert!(s.reliefs.len() <= 16, "{:?}", text(&s));
}

#[test]
fn where_nothing_helps_the_eater_is_named_once() {
    let mut s = machine("", "held = { weights = '10GiB', placement = 'anonymous', pinned = true }");
    s.start("held").run(200);
    s.eat(Bytes::mib(500), Bytes::gib(113)).run(500);
    assert_eq!(done(&s), [(Rescue::Nothing, String::new())]);
    assert!(text(&s)[0].contains("/user.slice/eater.scope grows the most and holds 112."), "{:?}", text(&s));
    assert_eq!(s.running(), ["held"]);
}

#[test]
fn weights_that_are_read_from_disk_again_are_no_headroom() {
    // The kernel would call 60 GiB available and let every token read them again.
    let mut s = machine(
        "",
        "mapped = { weights = '60GiB', placement = 'mapped', private = '2GiB', priority = 80 }
         other = { weights = '30GiB', placement = 'anonymous', priority = 10 }",
    );
    s.start("mapped").start("other").run(200);
    s.eat(Bytes::mib(200), Bytes::gib(33)).run(400);
    assert_eq!(done(&s), [(Rescue::Stop, "other".to_owned())]);
    assert!(s.reliefs[0].machine.memory.available > Bytes::gib(60));
    assert_eq!(s.reliefs[0].decision.relief.unwrap().level, Level::Act);
    sound(&s);
}

#[test]
fn where_only_weights_would_be_read_again_a_busy_one_may_finish() {
    let mut s = machine(
        "",
        "mapped = { weights = '60GiB', placement = 'mapped', private = '2GiB', pinned = true }
         other = { weights = '30GiB', placement = 'anonymous', priority = 10, drain-seconds = 30 }",
    );
    s.start("mapped").start("other").run(200).request("other", 1, 36_000);
    // 32 GiB are left, and 0.6 in the end.
    s.eat(Bytes::mib(200), Bytes::mib(32_154)).run(400);
    assert_eq!(done(&s), [(Rescue::Stop, "other".to_owned())]);
    let announced: Vec<u64> = s.announced.iter().map(|(_, deadline)| *deadline).collect();
    assert!(matches!(announced[..], [drain, stop] if stop >= drain), "{announced:?}");
    sound(&s);
}

#[test]
fn gpu_memory_that_others_took_from_models_costs_the_least_important_one() {
    let text = "[machine]\nmemory = '128GiB'\nsystem = '4GiB'
         gpus = [{ name = 'card0', kind = 'unified', total = '64GiB', used = '0B' }]
         [models]
         low = { weights = '20GiB', priority = 10 }
         high = { weights = '44GiB', priority = 80 }
         more = { weights = '30GiB', priority = 80, load-seconds = 60 }";
    let scenario: Scenario = toml::from_str(text).unwrap();
    // Full to the last byte, and nothing is wrong.
    let mut s = Simulation::new(scenario.clone());
    s.start("low").start("high").run(3600);
    assert_eq!(s.running(), ["high", "low"]);
    assert_eq!(done(&s), []);
    // Others take what one that is still loading was promised.
    let taken: Scenario =
        toml::from_str(&format!("at = [{{ seconds = 230, gpu = '12GiB' }}]\n{text}")).unwrap();
    let mut s = Simulation::new(taken);
    s.start("low").run(200).start("more").run(200);
    assert_eq!(s.running(), ["low", "more"], "2 GiB are left");
    assert_eq!(done(&s), []);
    let taken: Scenario =
        toml::from_str(&format!("at = [{{ seconds = 230, gpu = '20GiB' }}]\n{text}")).unwrap();
    let mut s = Simulation::new(taken);
    s.start("low").run(200).start("more").run(200);
    assert_eq!(stopped(&s), ["low"]);
    assert_eq!(s.state("more"), UnitState::Active);
    sound(&s);
}

#[test]
fn gpu_memory_that_does_not_come_back_is_quarantined() {
    let text = "[machine]\nmemory = '128GiB'\nsystem = '4GiB'
         gpus = [{ name = 'card0', kind = 'unified', total = '120GiB', used = '0B' }]
         [models]
         leaky = { weights = '30GiB', priority = 10, leaks = '12GiB' }
         high = { weights = '44GiB', priority = 80 }";
    let mut s = Simulation::new(toml::from_str(text).unwrap());
    s.start("leaky").start("high").run(200);
    s.eat(Bytes::mib(200), Bytes::gib(52)).run(400);
    assert_eq!(stopped(&s), ["leaky"]);
    let leaks: Vec<Bytes> = s.core.leaks().iter().map(|leak| leak.bytes).collect();
    assert_eq!(leaks, [Bytes::gib(12)]);
    sound(&s);
}

#[test]
fn a_load_as_planned_is_no_shortage_and_a_start_is_no_excuse() {
    // It takes all that is left but the reserve, at 10 GiB a second.
    let mut s = machine(
        "",
        "first = { weights = '40GiB', placement = 'anonymous', priority = 10 }
         full = { weights = '80GiB', placement = 'anonymous', priority = 90, load-seconds = 8 }",
    );
    s.start("first").run(200).start("full").run(300);
    assert_eq!(s.running(), ["first", "full"]);
    assert_eq!(done(&s), []);
    // And an eater during a load is seen.
    let mut s = machine(
        "",
        "first = { weights = '40GiB', placement = 'anonymous', priority = 10 }
         full = { weights = '60GiB', placement = 'anonymous', priority = 90, load-seconds = 60 }",
    );
    s.start("first").run(200).start("full").run(30);
    s.eat(Bytes::mib(700), Bytes::gib(40)).run(300);
    assert_eq!(stopped(&s), ["first"]);
    assert_eq!(s.running(), ["full"]);
    sound(&s);
}

#[test]
fn looks_are_few_while_there_is_plenty_and_none_where_nothing_runs() {
    let mut s = machine(
        "fastest = '4GiB'",
        "a = { weights = '10GiB', placement = 'anonymous' }
         b = { weights = '10GiB', placement = 'anonymous' }
         c = { weights = '10GiB', placement = 'anonymous' }",
    );
    s.run(3600);
    assert_eq!(s.steps, 0);
    s.start("a").start("b").start("c").run(100);
    let before = s.steps;
    s.run(3600);
    let looks = s.steps - before;
    assert!(looks <= 360, "{looks} looks in an hour");
    s.eat(Bytes::gib(1), Bytes::gib(88)).run(90);
    let before = s.steps;
    s.run(10);
    let looks = s.steps - before;
    assert!((5..=20).contains(&looks), "{looks} looks in ten seconds with 6 GiB left");
}

//! How memory is running short: what is read with every reading, and what wakes the loop in between.
//!
//! Nothing polls while nothing happens. The kernel wakes the loop (PSI of the machine and of each model, memory.events
//! of each model), and the decisions say when to look again by themselves: the interval follows what is left over the
//! fastest that it can be used up, since without swap PSI is blind until it is too late.

use std::collections::BTreeMap;
use std::fs::File;
use std::hint::black_box;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::JoinHandle;

use crate::action::trigger::{self, Stalled};
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::daemon::Input;
use crate::daemon::turns::computed;
use crate::host::{ControlGroup, Host, Stall};
use crate::ledger::Pressure;
use crate::os::{wait_for_priority, with_huge_pages};

/// Readings closer together than this say nothing of rates: the kernel's counters move in steps.
const SHORTEST: Duration = Duration::from_millis(10);
/// A task waits for memory so long …
const STALL: Duration = Duration::from_millis(100);
/// … within this time, and the loop is woken.
const WINDOW: Duration = Duration::from_secs(1);
/// A unit held at its memory.high changes its memory.events a hundred times a second: they are looked at so often.
const CALM: Duration = Duration::from_secs(1);
/// Who eats memory is looked for when it would last so long at most.
const SOON: u64 = 60;
/// A first look at who holds what that is older than this has to be taken again to see who grows.
const STALE: Duration = Duration::from_secs(10);
/// Between two looks at who grows, at least …
const GROWTH: Duration = Duration::from_millis(200);
/// … and so many times what the last one took: it reads a file of every group, at a time when others need the processors.
const SPARED: u32 = 10;
/// The stack of a thread that only closes a file.
const STACK: usize = 64 * 1024;
/// Models, and nothing outside of it.
const MODELS: &str = "/llm.slice";

/// Rates, from one reading to the next.
#[derive(Debug, Default)]
struct Rates {
    machine: Option<(Instant, Bytes, Option<Stall>)>,
    units: BTreeMap<Instance, (Instant, u64, Option<u16>)>,
    pressure: Pressure,
}

impl Rates {
    /// The machine's pressure since the last reading.
    fn machine(&mut self, now: Instant, available: Bytes, stall: Option<Stall>) -> Pressure {
        let (Some((then, before, stalled)), false) = (self.machine, self.too_soon(now)) else {
            self.machine.get_or_insert((now, available, stall));
            return self.pressure;
        };
        let elapsed = now.duration_since(then);
        let micros = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX).max(1);
        let share = |of: fn(&Stall) -> u64| {
            let (was, is) = stalled.as_ref().zip(stall.as_ref())?;
            Some(per_mille(of(is).saturating_sub(of(was)), micros))
        };
        self.pressure.some = share(|stall| stall.some);
        self.pressure.full = share(|stall| stall.full);
        self.pressure.falling = (before - available).mul_div(1_000_000, micros);
        self.pressure.fastest = self.pressure.fastest.max(self.pressure.falling);
        self.machine = Some((now, available, stall));
        self.pressure
    }

    fn too_soon(&self, now: Instant) -> bool {
        self.machine.is_some_and(|(then, ..)| now.duration_since(then) < SHORTEST)
    }

    /// The share of the time since the last reading in which all of a unit's tasks waited; per mille.
    fn unit(&mut self, instance: &Instance, now: Instant, full: u64) -> Option<u16> {
        let Some((then, before, last)) = self.units.get(instance).copied() else {
            self.units.insert(instance.clone(), (now, full, None));
            return None;
        };
        let elapsed = now.duration_since(then);
        if elapsed < SHORTEST {
            return last;
        }
        let micros = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        // A unit that was started anew counts from zero.
        let share = Some(per_mille(full.saturating_sub(before), micros));
        self.units.insert(instance.clone(), (now, full, share));
        share
    }
}

fn per_mille(part: u64, whole: u64) -> u16 {
    u16::try_from(part.saturating_mul(1000) / whole.max(1)).unwrap_or(1000).min(1000)
}

/// Who outside of the models eats memory, as far as that was looked at.
#[derive(Debug, Default)]
struct Eaters {
    seen: Option<(Instant, BTreeMap<ControlGroup, Bytes>)>,
    eater: Option<(String, Bytes)>,
    looking: bool,
    took: Duration,
}

impl Eaters {
    /// Whether it is time for another look: each reads a file of every group, and wakes the loop when it is done.
    fn is_due(&self, now: Instant) -> bool {
        let pause = GROWTH.max((self.took * SPARED).min(STALE));
        !self.looking && self.seen.as_ref().is_none_or(|(then, _)| now.duration_since(*then) >= pause)
    }

    /// Takes in a look at who holds what, and how long it took; who grew most since the last one, if that was not too
    /// long ago.
    fn take(&mut self, now: Instant, took: Duration, held: BTreeMap<ControlGroup, Bytes>) {
        self.took = took;
        if let Some((then, before)) = &self.seen
            && now.duration_since(*then) < STALE
        {
            let grown =
                |group: &ControlGroup, held: Bytes| held - before.get(group).copied().unwrap_or_default();
            let most = held.iter().max_by_key(|(group, held)| grown(group, **held));
            self.eater = most
                .filter(|(group, held)| !grown(group, **held).is_zero())
                .map(|(group, held)| (group.to_string(), *held));
        }
        self.seen = Some((now, held));
    }
}

/// See the module's text.
pub struct Sensing {
    host: Host,
    inputs: UnboundedSender<Input>,
    rates: Rates,
    eaters: Arc<Mutex<Eaters>>,
    /// What listens for each unit, by its InvocationID: another start is another control group.
    listening: BTreeMap<Instance, (String, Listening)>,
    /// The machine's own trigger, as long as the value lives.
    _machine: Option<Listening>,
    lacks: Vec<String>,
}

/// Tasks that end with the value.
#[derive(Debug, Default)]
struct Listening(Vec<JoinHandle<()>>);

impl Drop for Listening {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

/// A file that is listened to. A task that is aborted drops it on the loop's thread, and with the end of a trigger the
/// kernel waits for others for tens of milliseconds; so a thread of its own closes it.
struct Heard(Option<AsyncFd<File>>);

impl Drop for Heard {
    fn drop(&mut self) {
        let file = self.0.take();
        // Where there can be no thread it is closed here.
        let _ = std::thread::Builder::new().stack_size(STACK).spawn(move || drop(file));
    }
}

impl Sensing {
    /// Begins to listen; what can't be is said in the journal, once. Inside of a runtime.
    #[must_use]
    pub fn start(host: Host, inputs: UnboundedSender<Input>) -> Self {
        let mut lacks = Vec::new();
        let machine = match trigger::pressure(&host.pressure_file(), Stalled::Some, STALL, WINDOW) {
            Ok(file) => listen(file, Kind::Pressure, &inputs).map(|task| Listening(vec![task])),
            Err(error) => {
                lacks.push(format!(
                    "memory pressure is not told by the kernel (PSI: {error}): memory is watched by its level alone"
                ));
                None
            }
        };
        if !host.has_cgroup_v2() {
            lacks.push(
                "control groups are not of version 2: no model's own pressure is seen, and none can be made smaller"
                    .to_owned(),
            );
        }
        if let Some(container) = host.container() {
            lacks.push(format!(
                "this is a container ({container}): what the rest of the machine does to memory is not seen"
            ));
        }
        for lack in &lacks {
            tracing::warn!("{lack}");
        }
        let mut rates = Rates::default();
        // With huge pages, as whoever takes it has them: three times as fast (measured).
        rates.pressure.fastest = with_huge_pages(fastest);
        let eaters = Arc::default();
        Self { host, inputs, rates, eaters, listening: BTreeMap::new(), _machine: machine, lacks }
    }

    /// What is not sensed here, one sentence each.
    #[must_use]
    pub fn lacks(&self) -> &[String] {
        &self.lacks
    }

    /// The machine's pressure since the last reading, and who eats memory, where it is being eaten.
    pub fn machine(&mut self, available: Bytes) -> (Pressure, Option<(String, Bytes)>) {
        let now = Instant::now();
        let stall = self.host.memory_pressure().ok().flatten();
        let pressure = self.rates.machine(now, available, stall);
        let soon = !pressure.falling.is_zero() && available.0 / pressure.falling.0.max(1) < SOON;
        let mut eaters = self.eaters.lock().unwrap_or_else(PoisonError::into_inner);
        if soon && eaters.is_due(now) {
            eaters.looking = true;
            let (host, eaters, inputs) = (self.host.clone(), Arc::clone(&self.eaters), self.inputs.clone());
            tokio::task::spawn_blocking(move || look_for_eater(&host, &eaters, &inputs));
        }
        if !soon && eaters.seen.as_ref().is_none_or(|(then, _)| now.duration_since(*then) > STALE) {
            eaters.eater = None;
        }
        (pressure, eaters.eater.clone())
    }

    /// How a unit fares: its share of time stalled (per mille), and its processes killed by the kernel.
    pub fn unit(&mut self, instance: &Instance, group: &ControlGroup) -> (Option<u16>, u64) {
        let stall = self.host.group_pressure(group).ok().flatten();
        let stalled = stall.and_then(|stall| self.rates.unit(instance, Instant::now(), stall.full));
        let killed = self.host.memory_events(group).map(|events| events.oom_kill).unwrap_or_default();
        (stalled, killed)
    }

    /// Listens to exactly these units, each with its InvocationID and its control group.
    pub fn listen_to(&mut self, units: &BTreeMap<Instance, (String, ControlGroup)>) {
        self.listening.retain(|instance, (invocation, _)| {
            units.get(instance).is_some_and(|(current, _)| current == invocation)
        });
        self.rates.units.retain(|instance, _| units.contains_key(instance));
        for (instance, (invocation, group)) in units {
            if self.listening.contains_key(instance) {
                continue;
            }
            let directory = self.host.group_directory(group);
            // What is not there is one of the lacks, or has gone since.
            let pressure =
                trigger::pressure(&directory.join("memory.pressure"), Stalled::Full, STALL, WINDOW);
            let files = [(pressure, Kind::Pressure), (trigger::events(&directory), Kind::Events)];
            let tasks = files.into_iter().filter_map(|(file, kind)| listen(file.ok()?, kind, &self.inputs));
            let listening = Listening(tasks.collect());
            self.listening.insert(instance.clone(), (invocation.clone(), listening));
        }
    }
}

/// What is listened to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Pressure,
    Events,
}

/// Wakes the loop whenever the kernel reports on the file, until it is gone.
fn listen(file: File, kind: Kind, inputs: &UnboundedSender<Input>) -> Option<JoinHandle<()>> {
    let heard = Heard(Some(wait_for_priority(file).ok()?));
    let inputs = inputs.clone();
    Some(tokio::spawn(async move {
        let Some(file) = &heard.0 else { return };
        while let Ok(mut guard) = file.ready(Interest::PRIORITY).await {
            let gone = match kind {
                Kind::Pressure => guard.ready().is_error(),
                // For these POLLERR only means that something has changed.
                Kind::Events => trigger::heard(file.get_ref()).is_err(),
            };
            if gone || inputs.send(Input::Changed).is_err() {
                return;
            }
            guard.clear_ready();
            drop(guard);
            if kind == Kind::Events {
                tokio::time::sleep(CALM).await;
            }
        }
    }))
}

/// Looks at who holds what, twice where the last look is too long ago.
fn look_for_eater(host: &Host, eaters: &Mutex<Eaters>, inputs: &UnboundedSender<Input>) {
    let lock = || eaters.lock().unwrap_or_else(PoisonError::into_inner);
    let mut again = false;
    loop {
        let begun = Instant::now();
        let held = host.held_by_groups(MODELS).into_iter().collect();
        let now = Instant::now();
        let mut eaters = lock();
        let first = eaters.seen.as_ref().is_none_or(|(then, _)| begun.duration_since(*then) >= STALE);
        eaters.take(now, now.duration_since(begun), held);
        if !first || again {
            eaters.looking = false;
            // Whoever waits to name it looks again.
            let _ = inputs.send(Input::Changed);
            return;
        }
        again = true;
        drop(eaters);
        std::thread::sleep(GROWTH);
    }
}

/// How fast memory can be used up at most: a huge page touched by one processor in its own time, times the number of
/// processors; the fastest of a few. Between 64 MiB/s and 64 GiB/s whatever the clock says.
///
/// Processors share the way to memory, and many of them are slower than that. But one that is taken to be too slow is seen
/// too late.
fn fastest() -> Bytes {
    const HUGE_PAGE: usize = 2 << 20;
    const TOUCHED: usize = 8 * HUGE_PAGE;
    // Zeroed, so that pages come with the first write to each. One huge page at a time, where one can lie: otherwise the
    // first write of one measurement brings pages of the next, which then seem to cost nothing.
    let mut fresh: Vec<u8> = vec![0; TOUCHED];
    let aligned = fresh.as_ptr().align_offset(HUGE_PAGE).min(TOUCHED);
    let each = fresh[aligned..].chunks_exact_mut(HUGE_PAGE).map(touched).max().unwrap_or_default();
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (each * processors as u64).max(Bytes::mib(64)).min(Bytes::gib(64))
}

/// How many bytes of these pages are touched in a second of the thread's own time: while somebody else has the processor
/// memory is no slower.
fn touched(pages: &mut [u8]) -> Bytes {
    const PAGE: usize = 4096;
    let begun = computed();
    for page in pages.chunks_mut(PAGE) {
        page[0] = 1;
    }
    black_box(&pages);
    let micros = u64::try_from(computed().saturating_sub(begun).as_micros()).unwrap_or(u64::MAX).max(1);
    Bytes(pages.len() as u64).mul_div(1_000_000, micros)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOOK: Duration = Duration::from_millis(2);

    fn stall(some: u64, full: u64) -> Option<Stall> {
        Some(Stall { some, full })
    }

    #[test]
    fn rates_are_of_the_time_between_two_readings() {
        let mut rates = Rates::default();
        let begin = Instant::now();
        let at = |millis| begin + Duration::from_millis(millis);
        assert_eq!(rates.machine(at(0), Bytes::gib(8), stall(1000, 0)), Pressure::default());
        let seen = rates.machine(at(500), Bytes::gib(7), stall(251_000, 50_000));
        assert_eq!((seen.some, seen.full), (Some(500), Some(100)));
        assert_eq!((seen.falling, seen.fastest), (Bytes::gib(2), Bytes::gib(2)));
        // Too soon to say anything else.
        assert_eq!(rates.machine(at(505), Bytes::gib(1), stall(251_000, 50_000)), seen);
        let rising = rates.machine(at(1500), Bytes::gib(9), stall(251_000, 50_000));
        assert_eq!((rising.some, rising.falling, rising.fastest), (Some(0), Bytes::ZERO, Bytes::gib(2)));
        assert_eq!(rates.machine(at(2500), Bytes::gib(9), None).some, None, "PSI is gone");
    }

    #[test]
    fn a_unit_that_starts_anew_counts_from_zero() {
        let mut rates = Rates::default();
        let begin = Instant::now();
        let a: Instance = "a".parse().unwrap();
        assert_eq!(rates.unit(&a, begin, 900_000), None);
        assert_eq!(rates.unit(&a, begin + Duration::from_secs(1), 1_150_000), Some(250));
        assert_eq!(rates.unit(&a, begin + Duration::from_secs(2), 100), Some(0));
    }

    #[test]
    fn the_eater_is_who_grew_most_and_not_who_holds_most() {
        let group = |name: &str| -> ControlGroup { format!("/system.slice/{name}").parse().unwrap() };
        let held = |a: u64, b: u64| [(group("a"), Bytes::gib(a)), (group("b"), Bytes::gib(b))].into();
        let mut eaters = Eaters::default();
        let now = Instant::now();
        eaters.take(now, TOOK, held(40, 1));
        assert_eq!(eaters.eater, None, "one look does not tell");
        eaters.take(now + Duration::from_secs(1), TOOK, held(41, 5));
        assert_eq!(eaters.eater, Some(("/system.slice/b".to_owned(), Bytes::gib(5))));
        eaters.take(now + Duration::from_secs(2), TOOK, held(41, 5));
        assert_eq!(eaters.eater, None, "nobody grows");
        eaters.take(now + Duration::from_secs(99), TOOK, held(99, 5));
        assert_eq!(eaters.eater, None, "too long ago to tell");
    }

    #[test]
    fn who_eats_is_not_looked_for_without_a_pause() {
        let now = Instant::now();
        let mut eaters = Eaters::default();
        assert!(eaters.is_due(now));
        eaters.take(now, TOOK, BTreeMap::new());
        assert!(!eaters.is_due(now + GROWTH / 2));
        assert!(eaters.is_due(now + GROWTH));
        // On a machine where it takes long it is done the less often.
        eaters.take(now, GROWTH, BTreeMap::new());
        assert!(!eaters.is_due(now + GROWTH * (SPARED - 1)));
        assert!(eaters.is_due(now + GROWTH * SPARED));
        eaters.looking = true;
        assert!(!eaters.is_due(now + GROWTH * SPARED));
    }

    #[test]
    fn the_fastest_is_bounded() {
        let seen = fastest();
        assert!(seen >= Bytes::mib(64) && seen <= Bytes::gib(64), "{seen}");
    }
}

//! The loop on a machine of the test's own.

mod leases;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::input::Command;
use super::survey::Survey;
use super::*;
use crate::action::notify::Notifier;
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{Footprint, Gpu, Machine, Measured, SwapArea, SwapName, SwapOwner, Unit, UnitState};
use crate::policy::core::Effect;
use crate::policy::decision::Kind;
use crate::policy::{ActionId, Core, Level, Mode, Outcome, Refusal, Request, Rules, Rung, Saved};
use crate::ports::{Catalog, CatalogError, Launch, ModelInfo, Outcomes, Ports, Rulebook, Wish};

/// What happened, in order.
type Log = Arc<Mutex<Vec<String>>>;

/// What holds up everything that may block while it is closed: disks, systemd, the kernel.
#[derive(Default)]
struct Lock {
    closed: Mutex<bool>,
    opened: Condvar,
}

impl Lock {
    fn set(&self, closed: bool) {
        *self.closed.lock().unwrap() = closed;
        self.opened.notify_all();
    }

    fn pass(&self) {
        drop(self.opened.wait_while(self.closed.lock().unwrap(), |closed| *closed).unwrap());
    }
}

#[derive(Clone)]
struct Fake {
    machine: Arc<Mutex<Machine>>,
    log: Log,
    lock: Arc<Lock>,
    /// The same for the engines alone.
    engines: Arc<Lock>,
    killed: Arc<Mutex<Vec<(Instance, Bytes)>>>,
}

impl Ports for Fake {
    fn now(&self) -> u64 {
        1000
    }

    fn observe(&mut self) -> Machine {
        self.machine.lock().unwrap().clone()
    }

    fn perform(&mut self, id: ActionId, effect: Effect, done: Outcomes) {
        let asks = matches!(effect, Effect::AskActivity(_));
        let what = match effect {
            Effect::DropCache(_) => "drop".to_owned(),
            Effect::DropAllCache => "drop all".to_owned(),
            Effect::ReadAhead(devices) => format!("read ahead on {} disks", devices.len()),
            Effect::Compact => "compact".to_owned(),
            Effect::Stop(instance) => format!("stop {instance}"),
            Effect::Start(instance) => format!("start {instance}"),
            Effect::Limit(instance, _) => format!("limit {instance}"),
            Effect::AddSwap(_, bytes) => format!("add {bytes} of swap"),
            Effect::AskActivity(instances) => format!("ask {} engines", instances.len()),
            Effect::RemoveSwap(name) => format!("remove swap {name}"),
            Effect::Reclaim(instance, bytes) => format!("reclaim {bytes} of {instance}"),
            Effect::Kill(instance) => format!("kill {instance}"),
        };
        self.log.lock().unwrap().push(what);
        let lock = Arc::clone(if asks { &self.engines } else { &self.lock });
        if *lock.closed.lock().unwrap() {
            std::thread::spawn(move || {
                lock.pass();
                done(id, Outcome::Done);
            });
        } else {
            done(id, Outcome::Done);
        }
    }

    fn killed(&mut self) -> Vec<(Instance, Bytes)> {
        std::mem::take(&mut self.killed.lock().unwrap())
    }

    fn answered(&mut self, _: u64, _: Result<u64, Box<Refusal>>) {}
}

impl Store for Fake {
    fn save(&self, durable: &Durable) -> Result<(), String> {
        self.lock.pass();
        let names: Vec<String> = durable.saved.holders.keys().map(ToString::to_string).collect();
        self.log.lock().unwrap().push(format!("save {}", names.join(" ")));
        Ok(())
    }
}

/// Models `a` and `b` of 4 GiB, `vast` of 400, `strange` of unknown size; and a service of somebody else.
impl Catalog for Fake {
    fn models(&self) -> Vec<ModelInfo> {
        let names = ["a", "b", "vast", "strange", "ollama.service"];
        names.map(|name| ModelInfo { name: name.parse().ok(), ..ModelInfo::default() }).to_vec()
    }

    fn request(&self, wish: &Wish, _: &[Gpu]) -> Result<Request, CatalogError> {
        self.lock.pass();
        let instance = wish.instance.clone().unwrap();
        let gib = match instance.model.as_str() {
            "a" | "b" => 4,
            "vast" => 400,
            "strange" => 0,
            other => return Err(CatalogError::NotFound(format!("no {other}"))),
        };
        let footprint = Footprint { private: Bytes::gib(gib), ..Footprint::default() };
        let ladder =
            if gib > 0 { vec![Rung { context: 4096, footprint, ..Rung::default() }] } else { Vec::new() };
        Ok(Request {
            invocation: wish.invocation.clone(),
            priority: 50,
            ladder,
            instead_of: wish.instead_of.clone(),
            force: wish.force,
            no_restore: wish.no_restore,
            explicit: wish.explicit,
            unknown: (gib == 0).then(|| "strange".to_owned()),
            ..Request::of(instance)
        })
    }

    fn launch(&self, wish: &Wish, rung: &Rung, _: &[Gpu]) -> Result<Launch, CatalogError> {
        let name = wish.instance.as_ref().unwrap().to_string();
        Ok(Launch {
            argv: vec!["/engine".into(), name, rung.context.to_string()],
            environment: BTreeMap::new(),
        })
    }
}

struct Bench {
    fake: Fake,
    handle: Handle,
    inputs: mpsc::UnboundedSender<Input>,
    published: mpsc::UnboundedReceiver<Publication>,
    run: tokio::task::JoinHandle<Result<(), String>>,
}

impl Bench {
    /// What is published next, other than that models have changed.
    async fn told(&mut self) -> Publication {
        loop {
            match self.published.recv().await.unwrap() {
                Publication::Models(_) => {}
                other => return other,
            }
        }
    }

    /// What was published of a model since that was last asked: its states.
    async fn states(&mut self, of: &str) -> Vec<String> {
        // A round through the loop: all that was sent before has been taken.
        self.handle.status().await.unwrap();
        let mut states = Vec::new();
        while let Ok(publication) = self.published.try_recv() {
            let Publication::Models(models) = publication else { continue };
            states.extend(models.into_iter().find(|model| model.instance == of).map(|model| model.state));
        }
        states
    }
}

fn unit(state: UnitState) -> Unit {
    Unit { state, main_pid: 7, invocation: "i1".into(), ..Unit::default() }
}

fn name(text: &str) -> Instance {
    text.parse().unwrap()
}

fn asker(text: &str) -> Asker {
    Asker { instance: name(text), invocation: "i1".into(), explicit: true }
}

fn parts(fake: &Fake) -> Parts {
    Parts {
        ports: Box::new(fake.clone()),
        catalog: Arc::new(fake.clone()),
        core: Core::new(Rules::default(), Saved::default(), true),
        mode: None,
        store: Some(Arc::new(fake.clone())),
        survey: None,
        reloaded: None,
        notifier: Notifier::from_environment(),
        leases: Vec::new(),
    }
}

/// Runs a test's body on a single thread, as the daemon runs.
fn bench<F: Future<Output = ()>>(units: &[(&str, UnitState)], test: impl FnOnce(Bench) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut machine = Machine::default();
    machine.memory.total = Bytes::gib(16);
    machine.memory.available = Bytes::gib(15);
    machine.memory.free = Bytes::gib(15);
    machine.units = units.iter().map(|(text, state)| (name(text), unit(*state))).collect();
    let (machine, lock) = (Arc::new(Mutex::new(machine)), Arc::default());
    let fake = Fake { machine, log: Log::default(), lock, engines: Arc::default(), killed: Arc::default() };
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        let (inputs, taken) = mpsc::unbounded_channel();
        let (daemon, handle, published) = Daemon::new(parts(&fake), inputs.clone());
        let run = tokio::task::spawn_local(daemon.run(taken));
        test(Bench { fake, handle, inputs, published, run }).await;
    });
}

#[test]
fn what_is_promised_is_saved_before_it_is_answered() {
    bench(&[("a", UnitState::Activating)], |bench| async move {
        let launch =
            bench.handle.admit(asker("a"), Vec::new(), BTreeMap::new(), BTreeMap::new()).await.unwrap();
        assert_eq!(launch.argv, ["/engine", "a", "4096"]);
        assert_eq!(*bench.fake.log.lock().unwrap(), ["limit a", "save a"]);
        // Asked again within one start, it is answered alike and nothing is done.
        let again =
            bench.handle.admit(asker("a"), Vec::new(), BTreeMap::new(), BTreeMap::new()).await.unwrap();
        assert_eq!(again, launch);
        assert_eq!(bench.fake.log.lock().unwrap().len(), 2);
        bench.inputs.send(Input::Terminate).unwrap();
        assert_eq!(bench.run.await.unwrap(), Ok(()));
    });
}

#[test]
fn nothing_that_blocks_holds_up_the_loop() {
    bench(&[("a", UnitState::Activating), ("b", UnitState::Activating)], |bench| async move {
        let admit = |text: &str| {
            let (handle, asker) = (bench.handle.clone(), asker(text));
            tokio::task::spawn_local(async move {
                handle.admit(asker, Vec::new(), BTreeMap::new(), BTreeMap::new()).await
            })
        };
        admit("a").await.unwrap().unwrap();
        // From here on no disk, no systemd and no kernel answers.
        bench.fake.lock.set(true);
        let blocked = admit("b");
        // What is to be saved can't be, either.
        bench.handle.pin("a".into(), true).await.unwrap();
        bench.inputs.send(Input::Changed).unwrap();
        let status = bench.handle.status().await.unwrap();
        assert!(status.turns.count > 0 && !blocked.is_finished());
        assert!(status.models.iter().any(|model| model.name == "a" && model.pinned), "{:?}", status.models);
        bench.fake.lock.set(false);
        blocked.await.unwrap().unwrap();
        assert!(bench.handle.status().await.unwrap().turns.longest_usec > 0);
    });
}

#[test]
fn whoever_asks_for_the_status_while_engines_are_asked_waits_for_the_same_answers() {
    bench(&[("a", UnitState::Active)], |bench| async move {
        let asked = || bench.fake.log.lock().unwrap().iter().filter(|what| *what == "ask 1 engines").count();
        bench.fake.engines.set(true);
        // By the decisions themselves, once it is in the ledger.
        while asked() == 0 {
            bench.inputs.send(Input::Changed).unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let call = |_| {
            let (reply, answer) = oneshot::channel();
            let status = Command::Status(reply);
            bench.inputs.send(Input::Command(Box::new(status))).unwrap();
            answer
        };
        let answers: Vec<_> = (0..100).map(call).collect();
        // Behind all of them.
        bench.handle.set_mode(Mode::Enforce).await.unwrap();
        assert_eq!(asked(), 2);
        bench.fake.engines.set(false);
        for answer in answers {
            assert!(answer.await.unwrap().models.iter().any(|model| model.state == "running"));
        }
        bench.handle.status().await.unwrap();
        assert_eq!(asked(), 2, "what they said is still good");
    });
}

#[test]
fn nothing_counts_on_a_swapfile_that_is_being_removed() {
    bench(&[], |bench| async move {
        let name = SwapName { owner: SwapOwner::Plan, id: 7 };
        let path = std::path::PathBuf::from("/s").join(name.file_name());
        let size = Bytes::gib(1);
        let area = SwapArea { path, size, used: Bytes::gib(40), priority: -2, active: true };
        bench.fake.machine.lock().unwrap().swaps = vec![area.clone()];
        bench.fake.lock.set(true);
        let inputs = mpsc::unbounded_channel().0;
        let (mut daemon, ..) = Daemon::new(parts(&bench.fake), inputs);
        assert_eq!(daemon.observe().swaps, std::slice::from_ref(&area));
        let (reply, mut answer) = oneshot::channel();
        daemon.command(Command::Swap(Effect::RemoveSwap(name), reply));
        assert!(answer.try_recv().is_err(), "it is under way");
        assert!(daemon.observe().swaps.is_empty());
        assert_eq!(daemon.read().swaps, [area], "people see it");
        bench.fake.lock.set(false);
    });
}

#[test]
fn a_survey_that_hangs_is_waited_for_a_moment_and_never_started_twice() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (lock, begun): (Arc<Lock>, Arc<AtomicU32>) = Default::default();
    let (disk, count) = (Arc::clone(&lock), Arc::clone(&begun));
    let survey = Arc::new(Survey::new(move || {
        count.fetch_add(1, Ordering::SeqCst);
        disk.pass();
    }));
    runtime.block_on(async {
        survey.look().await;
        assert_eq!(begun.load(Ordering::SeqCst), 1);
        lock.set(true);
        let since = Instant::now();
        tokio::join!(survey.look(), survey.look(), survey.look());
        assert_eq!(begun.load(Ordering::SeqCst), 2);
        assert!(since.elapsed() < Duration::from_secs(4), "{:?}", since.elapsed());
        // Those who come while one is under way need another, one for all of them.
        let waiting = [0; 3].map(|_| {
            let survey = Arc::clone(&survey);
            tokio::spawn(async move { survey.look().await })
        });
        tokio::task::yield_now().await;
        lock.set(false);
        for one in waiting {
            one.await.unwrap();
        }
        assert_eq!(begun.load(Ordering::SeqCst), 3);
    });
}

#[test]
fn who_was_killed_by_the_last_rung_is_said_and_stopped() {
    bench(&[("a", UnitState::Activating)], |mut bench| async move {
        bench.handle.admit(asker("a"), Vec::new(), BTreeMap::new(), BTreeMap::new()).await.unwrap();
        bench.fake.killed.lock().unwrap().push((name("a"), Bytes::mib(20)));
        bench.inputs.send(Input::Killed).unwrap();
        let decision = loop {
            match bench.published.recv().await.unwrap() {
                Publication::Decision(decision) if decision.kind == Kind::Relieve => break decision,
                _ => {}
            }
        };
        assert!(decision.text.contains("last rung"), "{}", decision.text);
        let log = bench.fake.log.lock().unwrap().clone();
        assert!(log.contains(&"kill a".to_owned()), "{log:?}");
    });
}

#[test]
fn a_kill_does_not_wait_for_the_disk() {
    bench(&[("a", UnitState::Activating)], |bench| async move {
        bench.handle.admit(asker("a"), Vec::new(), BTreeMap::new(), BTreeMap::new()).await.unwrap();
        bench.fake.lock.set(true);
        bench.fake.killed.lock().unwrap().push((name("a"), Bytes::mib(20)));
        bench.inputs.send(Input::Killed).unwrap();
        let log = || bench.fake.log.lock().unwrap().clone();
        let killed = async {
            while !log().contains(&"kill a".to_owned()) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let in_time = tokio::time::timeout(Duration::from_secs(20), killed).await;
        let saves = log().iter().filter(|what| what.starts_with("save")).count();
        bench.fake.lock.set(false);
        assert!(in_time.is_ok() && saves == 1, "{:?}", log());
    });
}

#[test]
fn how_short_memory_is_is_published_when_it_changes_and_only_then() {
    bench(&[("a", UnitState::Activating)], |mut bench| async move {
        let rulebook = Rulebook { ladder: true, reserve: Some(Bytes::gib(2)), ..Rulebook::default() };
        bench.fake.machine.lock().unwrap().units.get_mut(&name("a")).unwrap().measured =
            Measured { private: Bytes::gib(4), ..Measured::default() };
        bench.inputs.send(Input::Rules(Box::new(rulebook))).unwrap();
        bench.handle.admit(asker("a"), Vec::new(), BTreeMap::new(), BTreeMap::new()).await.unwrap();
        let left = |bytes| {
            bench.fake.machine.lock().unwrap().memory.available = bytes;
            bench.inputs.send(Input::Changed).unwrap();
        };
        left(Bytes::mib(1500));
        bench.handle.status().await.unwrap();
        left(Bytes::mib(1500));
        bench.handle.status().await.unwrap();
        left(Bytes::gib(10));
        bench.handle.status().await.unwrap();
        let mut levels = Vec::new();
        while let Ok(publication) = bench.published.try_recv() {
            if let Publication::Pressure(level, headroom) = publication {
                levels.push((level, headroom));
            }
        }
        assert_eq!(levels, [(Level::Attention, Bytes::mib(1500)), (Level::Calm, Bytes::gib(10))]);
    });
}

#[test]
fn refusals_and_mistakes_come_back_as_what_they_are() {
    bench(&[("vast", UnitState::Activating), ("gone", UnitState::Activating)], |mut bench| async move {
        let refused = bench
            .handle
            .admit(asker("vast"), Vec::new(), BTreeMap::new(), BTreeMap::new())
            .await
            .unwrap_err();
        assert!(matches!(refused, Fault::Refused(_)), "{refused}");
        let unknown = bench
            .handle
            .admit(asker("gone"), Vec::new(), BTreeMap::new(), BTreeMap::new())
            .await
            .unwrap_err();
        assert_eq!(unknown, Fault::Catalog(CatalogError::NotFound("no gone".into())));
        assert!(
            bench.handle.prepare_load("nothing".into(), Vec::new(), LoadOptions::default()).await.is_err()
        );
        let decision = bench.handle.explain("vast".into()).await.unwrap().unwrap();
        assert_eq!(decision.refusal.unwrap().instance, name("vast"));
        assert!(matches!(bench.told().await, Publication::Decision(_)));
    });
}

#[test]
fn what_belongs_to_others_is_not_disposed_of() {
    bench(&[], |bench| async move {
        let load = |model: &str, other: &str| {
            bench.handle.prepare_load(model.into(), vec![other.into()], LoadOptions::default())
        };
        load("a", "b").await.unwrap();
        for (refused, way) in [
            (load("a", "ollama.service").await.map(drop), "use 'systemctl stop ollama.service'"),
            (load("ollama.service", "b").await.map(drop), "use 'systemctl start ollama.service'"),
            (bench.handle.pin("ollama.service".into(), true).await, "[adopt.\"ollama.service\"]"),
            (bench.handle.pin("ollama.service".into(), false).await, "[adopt.\"ollama.service\"]"),
            (load("lease:a", "b").await.map(drop), "lease:a is a lease"),
            (load("a", "lease:b").await.map(drop), "lease:b is a lease"),
            (bench.handle.pin("lease:a".into(), true).await, "lease:a is a lease"),
            (bench.handle.prepare_unload("lease:a".into()).await.map(drop), "lease:a is a lease"),
        ] {
            let Err(Fault::Catalog(CatalogError::NotFound(why))) = refused else {
                panic!("{way}: {refused:?}")
            };
            assert!(why.contains(way), "{why}");
        }
    });
}

#[test]
fn a_call_whose_unit_is_gone_does_not_wait_for_ever() {
    bench(&[("b", UnitState::Activating)], |bench| async move {
        bench.fake.machine.lock().unwrap().units.clear();
        let lost =
            bench.handle.admit(asker("b"), Vec::new(), BTreeMap::new(), BTreeMap::new()).await.unwrap_err();
        assert!(matches!(lost, Fault::Busy(_)), "{lost}");
    });
}

#[test]
fn what_runs_already_is_taken_in_once_even_when_its_size_is_unknown() {
    bench(&[("a", UnitState::Active), ("strange", UnitState::Active)], |bench| async move {
        {
            let mut machine = bench.fake.machine.lock().unwrap();
            let strange = machine.units.get_mut(&name("strange")).unwrap();
            strange.measured = Measured { private: Bytes::gib(2), ..Measured::default() };
        }
        // Each status is a round through the loop; adoption takes a few.
        let status = loop {
            let status = bench.handle.status().await.unwrap();
            if status.pools[0].reserved_bytes >= Bytes::gib(6) {
                break status;
            }
            bench.inputs.send(Input::Changed).unwrap();
        };
        let running = status.models.iter().filter(|model| model.state == "running");
        assert_eq!(running.count(), 2);
    });
}

#[test]
fn a_mode_that_was_set_is_published_and_survives_a_status() {
    bench(&[], |mut bench| async move {
        bench.handle.set_mode(Mode::Observe).await.unwrap();
        assert_eq!(bench.handle.status().await.unwrap().mode, "observe");
        let mode = bench.told().await;
        assert!(matches!(mode, Publication::Mode(Mode::Observe)), "{mode:?}");
    });
}

#[test]
fn a_model_that_changes_is_published_and_one_that_is_measured_is_not() {
    bench(&[("a", UnitState::Activating)], |mut bench| async move {
        assert_eq!(bench.states("a").await, ["waiting"]);
        bench.handle.admit(asker("a"), Vec::new(), BTreeMap::new(), BTreeMap::new()).await.unwrap();
        // What is reserved for it is told before its limits are set, for which it waits.
        assert_eq!(bench.states("a").await, ["waiting", "loading"]);
        let running = |measured| Unit {
            measured: Measured { private: measured, ..Measured::default() },
            ..unit(UnitState::Active)
        };
        for (measured, told) in [(Bytes::gib(1), vec!["running"]), (Bytes::gib(2), Vec::new())] {
            bench.fake.machine.lock().unwrap().units.insert(name("a"), running(measured));
            bench.inputs.send(Input::Changed).unwrap();
            assert_eq!(bench.states("a").await, told, "{measured}");
        }
        // What is configured is told as well, without anything else that happens.
        let read = |model: &str, reading| {
            let info = ModelInfo { name: model.parse().ok(), ..ModelInfo::default() };
            let rulebook = Rulebook { models: vec![info], reading, ..Rulebook::default() };
            bench.inputs.send(Input::Rules(Box::new(rulebook))).unwrap();
        };
        read("new", 2);
        read("old", 1);
        // The rules are in use a turn later.
        bench.handle.status().await.unwrap();
        let models = bench.handle.status().await.unwrap().models;
        let known: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
        assert_eq!(known, ["a", "new"], "what was read later counts");
        assert_eq!(bench.states("new").await, ["inactive"]);
    });
}

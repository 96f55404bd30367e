//! The loop.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::Instant as Time;

use super::alarm::Alarm;
use super::handle::{Handle, LoadOptions};
use super::input::{Input, Looking, Publication, Swapping, Waiting};
use super::jobs::Jobs;
use super::leases::{CATCH_UP, KeptLease, Leases};
use super::state::{Durable, Store};
use super::survey::Survey;
use super::turns::Turns;
use super::{digest, journal, view};
use crate::action::notify::{Notifier, watchdog_interval};
use crate::config::Instance;
use crate::ledger::{Machine, SwapName};
use crate::policy::core::Effect;
use crate::policy::{Action, ActionId, Core, Event, Level, Mode};
use crate::ports::{Catalog, Ports, Rulebook};

/// Calls on the bus have tickets from here on; the simulated gate counts from zero.
pub(super) const FIRST_TICKET: u64 = 1 << 62;
/// Requests and commands that are worked out at a time. A disk that does not answer holds up so many,
/// and not the daemon.
const WEIGHERS: usize = 8;
/// How often the memory and the activity of models is looked at while any runs.
const SAMPLE: Duration = Duration::from_secs(30);
/// The pulse where there is no watchdog and nothing runs.
const IDLE: Duration = Duration::from_secs(3600);

/// What a daemon is made of.
pub struct Parts {
    /// The machine.
    pub ports: Box<dyn Ports>,
    /// The models.
    pub catalog: Arc<dyn Catalog>,
    /// The decisions, with what was remembered.
    pub core: Core,
    /// The mode that was set by hand before a restart.
    pub mode: Option<Mode>,
    /// Where to remember; none where nothing is to be.
    pub store: Option<Arc<dyn Store>>,
    /// Looked at before each admission: the page cache.
    pub survey: Option<Arc<Survey>>,
    /// Called when the configuration was read again, on a thread that may block.
    pub reloaded: Option<Arc<dyn Fn() + Send + Sync>>,
    /// The service manager: watchdog, status, readiness after a reload.
    pub notifier: Notifier,
    /// Leases that were held before a restart, and still are.
    pub leases: Vec<KeptLease>,
}

/// The daemon; see the module's text.
pub struct Daemon {
    pub(super) core: Core,
    pub(super) parts: Parts,
    pub(super) sender: mpsc::UnboundedSender<Input>,
    pub(super) publish: mpsc::UnboundedSender<Publication>,
    pub(super) latest: Arc<Mutex<Arc<Machine>>>,
    pub(super) machine: Arc<Machine>,
    pub(super) outbox: VecDeque<Action>,
    pub(super) saving: Option<JoinHandle<()>>,
    pub(super) waiting: BTreeMap<u64, Waiting>,
    pub(super) next_ticket: u64,
    /// Options of loads, until these end.
    pub(super) one_shot: BTreeMap<Instance, LoadOptions>,
    /// Starts that are no person's: returns of evicted models, with their times.
    pub(super) restoring: BTreeMap<Instance, u64>,
    /// Instances that were found running, with the InvocationID that they were found with.
    pub(super) adopted: BTreeMap<Instance, String>,
    pub(super) jobs: Jobs,
    pub(super) leases: Leases,
    /// Calls that wait for a swapfile, by the ids of their effects.
    pub(super) swapping: BTreeMap<ActionId, Swapping>,
    /// Calls that wait for what the engines say, by the ids of their effects.
    pub(super) looking: BTreeMap<ActionId, Looking>,
    pub(super) weighers: Arc<Semaphore>,
    pub(super) rulebook: Rulebook,
    pub(super) mode: Option<Mode>,
    pub(super) wake: Option<Time>,
    pub(super) turns: Turns,
    pub(super) said: String,
    /// How short memory was when that was last published.
    pub(super) level: Level,
    /// Of the models, when a change of them was last published.
    pub(super) digest: u64,
    /// Whether a lease is shown as it was too long ago.
    pub(super) late: bool,
    pub(super) ending: bool,
    pub(super) lost: bool,
}

impl Daemon {
    /// A daemon, what calls it, and what it publishes. Inputs go to `sender`, from whose other end
    /// [`Daemon::run`] takes them.
    #[must_use]
    pub fn new(
        mut parts: Parts,
        sender: mpsc::UnboundedSender<Input>,
    ) -> (Self, Handle, mpsc::UnboundedReceiver<Publication>) {
        let (publish, published) = mpsc::unbounded_channel();
        let machine = Arc::new(parts.ports.observe());
        let models = parts.catalog.models();
        let latest = Arc::new(Mutex::new(Arc::clone(&machine)));
        let handle = Handle::new(sender.clone(), Arc::clone(&parts.catalog), Arc::clone(&latest));
        let mut daemon = Self {
            core: std::mem::take(&mut parts.core),
            mode: parts.mode,
            parts,
            sender,
            publish,
            latest,
            machine,
            outbox: VecDeque::new(),
            saving: None,
            waiting: BTreeMap::new(),
            next_ticket: FIRST_TICKET,
            one_shot: BTreeMap::new(),
            restoring: BTreeMap::new(),
            adopted: BTreeMap::new(),
            jobs: Jobs::default(),
            leases: Leases::default(),
            swapping: BTreeMap::new(),
            looking: BTreeMap::new(),
            weighers: Arc::new(Semaphore::new(WEIGHERS)),
            rulebook: Rulebook { models, ..Rulebook::default() },
            wake: None,
            turns: Turns::default(),
            said: String::new(),
            level: Level::Calm,
            digest: 0,
            late: false,
            ending: false,
            lost: false,
        };
        if let Some(rules) = daemon.parts.catalog.rulebook() {
            daemon.configure(rules, true);
        }
        let kept = std::mem::take(&mut daemon.parts.leases);
        daemon.take_back(kept);
        (daemon, handle, published)
    }

    /// Whether decisions are carried out.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.core.rules().mode
    }

    /// Has an instance taken into the ledger, should it not be there: it loads or runs already.
    pub fn adopt(&self, instance: Instance, invocation: String) {
        let _ = self.sender.send(Input::Adopt(instance, invocation));
    }

    /// Runs until [`Input::Terminate`].
    ///
    /// # Errors
    /// It can't go on: the bus or systemd is gone.
    pub async fn run(mut self, mut inputs: mpsc::UnboundedReceiver<Input>) -> Result<(), String> {
        let alarm = Alarm::new().map_err(|error| {
            format!(
                "no timer can be made to wake the daemon: {error} (see LimitNOFILE= in plimsolld.service)"
            )
        })?;
        self.step(Event::Tick);
        // Nobody hears it where the daemon was started by hand.
        let _ = self.parts.notifier.ready();
        let mut beat = Time::now() + self.interval();
        while !self.ending {
            self.flush();
            self.turns.end();
            beat = beat.min(Time::now() + self.interval());
            let next = self.wake.map_or(beat, |wake| wake.min(beat));
            // Time before inputs: a flood of them must not hold up the watchdog.
            tokio::select! {
                biased;
                () = finished(&mut self.saving) => {
                    self.turns.begin(None);
                    self.saving = None;
                }
                () = alarm.at(next) => {
                    self.turns.begin(Some(next));
                    let beats = beat <= next;
                    if beats {
                        // A service manager that does not listen is its own affair.
                        let _ = self.parts.notifier.watchdog();
                        beat = Time::now() + self.interval();
                    }
                    let woken = self.wake.take_if(|wake| *wake <= next).is_some();
                    if woken || (beats && !self.core.holders().is_empty()) {
                        self.step(Event::Tick);
                    }
                }
                input = inputs.recv() => match input {
                    Some(input) => {
                        self.turns.begin(None);
                        self.take_all(input, &mut inputs);
                    }
                    None => break,
                },
            }
        }
        let _ = self.parts.notifier.stopping();
        // What is to be remembered is.
        while !self.outbox.is_empty() || self.saving.is_some() {
            finished(&mut self.saving).await;
            self.saving = None;
            self.flush();
        }
        if self.lost { Err("the message bus or systemd is gone".to_owned()) } else { Ok(()) }
    }

    /// The pulse: the watchdog's alone while nothing runs.
    fn interval(&self) -> Duration {
        let watchdog = watchdog_interval().map_or(IDLE, |interval| interval / 2);
        if self.core.holders().is_empty() { watchdog } else { watchdog.min(SAMPLE) }
    }

    /// Takes an input and all that are queued behind it; many changes of units are one event.
    fn take_all(&mut self, first: Input, inputs: &mut mpsc::UnboundedReceiver<Input>) {
        let mut changed = false;
        let mut next = Some(first);
        while let Some(input) = next {
            match input {
                Input::Changed => changed = true,
                other => self.take(other),
            }
            next = inputs.try_recv().ok();
        }
        if changed {
            self.step(Event::Tick);
        }
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Event(Event::Ask { ticket, request }) => self.simulated_ask(ticket, request),
            Input::Event(Event::Done { id, outcome }) => self.done(id, outcome),
            Input::Event(event) => self.step(event),
            Input::Changed => self.step(Event::Tick),
            Input::Killed => {
                for (instance, available) in self.parts.ports.killed() {
                    self.step(Event::Killed { instance, available });
                }
            }
            Input::Said(instance, text) => self.tell_loads(&instance, &text),
            Input::Adopt(instance, invocation) => self.weigh_adoption(instance, invocation),
            Input::Command(command) => self.command(*command),
            Input::Weighed(weighed) => self.weighed(*weighed),
            Input::Rules(rules) => self.configure(*rules, false),
            Input::LeaseEnded(id) => self.lease_ended(id),
            Input::Reload => self.reload(),
            Input::Reloaded(rules) => {
                self.mode = None;
                if let Some(rules) = rules {
                    self.configure(*rules, true);
                }
                let _ = self.parts.notifier.ready();
            }
            Input::Lost => {
                self.lost = true;
                self.ending = true;
            }
            Input::Terminate => self.ending = true,
        }
    }

    /// The machine, for whoever looks at it.
    pub(super) fn read(&mut self) -> Machine {
        let mut machine = self.parts.ports.observe();
        let ports = &self.parts.ports;
        let measure = |pid: u32, others: &BTreeSet<u32>| {
            let begun = Instant::now();
            (ports.measure(pid, others), begun.elapsed())
        };
        self.late = self.leases.show(&mut machine, Instant::now(), measure);
        machine
    }

    /// Whether a person is having this swapfile removed: the kernel still shows it, and nobody can count on it.
    pub(super) fn is_going(&self, name: SwapName) -> bool {
        self.swapping.values().any(|swapping| swapping.going == Some(name))
    }

    /// The machine, for decisions.
    pub(super) fn observe(&mut self) -> Arc<Machine> {
        let mut machine = self.read();
        // Shown as not in use, it would be removed a second time.
        machine.swaps.retain(|area| !area.own().is_some_and(|name| self.is_going(name)));
        let machine = Arc::new(machine);
        self.machine = Arc::clone(&machine);
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&machine);
        machine
    }

    pub(super) fn step(&mut self, event: Event) {
        let machine = self.observe();
        let now = self.parts.ports.now();
        let actions = self.core.step(event, &machine, now);
        self.wake = None;
        for action in actions {
            match action {
                Action::WakeAt(time) => {
                    self.wake = Some(Time::now() + Duration::from_millis(time.saturating_sub(now)));
                }
                other => self.outbox.push_back(other),
            }
        }
        if self.late {
            let soon = Time::now() + CATCH_UP;
            self.wake = Some(self.wake.map_or(soon, |wake| wake.min(soon)));
        }
        let due = self.wake.map(|wake| wake.saturating_duration_since(Time::now()));
        let due = due.unwrap_or(Duration::MAX).min(self.interval());
        self.parts.ports.stand_by(self.core.last_resort(&machine), due);
        let (level, gauge) = self.core.gauge(&machine);
        if level != self.level {
            self.level = level;
            self.tell(Publication::Pressure(level, gauge.headroom));
        }
        let digest = digest::of(&self.core, &machine);
        if digest != self.digest {
            self.digest = digest;
            let models = view::instances(&self.core, &machine, &self.rulebook.models, now);
            self.tell(Publication::Models(models));
        }
        self.drop_the_gone();
        self.adopt_the_unknown(&machine);
        let line = view::line(&self.core, &machine);
        if line != self.said {
            let _ = self.parts.notifier.status(&line);
            self.said = line;
        }
    }

    /// Carries out what is decided, in order, up to the first thing that has to be saved. A kill waits for no disk: at
    /// worst the daemon dies in between, and the killed model is owed no return.
    fn flush(&mut self) {
        loop {
            let action = match self.saving {
                None => self.outbox.pop_front(),
                Some(_) => {
                    let kill = |action: &Action| matches!(action, Action::Perform(_, Effect::Kill(_)));
                    self.outbox.iter().position(kill).and_then(|n| self.outbox.remove(n))
                }
            };
            let Some(action) = action else { return };
            match action {
                Action::Save(saved) => {
                    self.save(Durable { saved: *saved, mode: self.mode, leases: self.leases.saved() });
                }
                Action::Perform(id, effect) => {
                    if let Effect::Start(instance) = &effect {
                        self.restoring.insert(instance.clone(), self.parts.ports.now());
                    }
                    self.perform(id, effect);
                }
                Action::Answer { ticket, answer } => self.answer(ticket, answer),
                Action::Progress { instance, text } => {
                    self.tell_loads(&instance, &text);
                    self.tell(Publication::Progress(instance, text));
                }
                Action::AboutToEvict { instance, for_instance, deadline } => {
                    let left = deadline.saturating_sub(self.parts.ports.now());
                    let deadline = monotonic_usec() + left * 1000;
                    self.tell(Publication::AboutToEvict(instance, for_instance, deadline));
                }
                Action::Record(decision) => {
                    journal::record(&decision);
                    self.tell(Publication::Decision(decision));
                }
                Action::WakeAt(_) => {}
            }
        }
    }

    fn save(&mut self, durable: Durable) {
        let Some(store) = self.parts.store.clone() else { return };
        self.saving = Some(tokio::task::spawn_blocking(move || {
            if let Err(error) = store.save(&durable) {
                tracing::error!("what has to survive a restart could not be saved: {error}");
            }
        }));
    }

    pub(super) fn perform(&mut self, id: ActionId, effect: Effect) {
        let sender = self.sender.clone();
        let done = move |id, outcome| {
            let _ = sender.send(Input::Event(Event::Done { id, outcome }));
        };
        self.parts.ports.perform(id, effect, Box::new(done));
    }

    /// Tells those who follow a load of the instance where it is, unless they know.
    pub(super) fn tell_loads(&mut self, instance: &Instance, text: &str) {
        for job in self.jobs.news_for_loads(instance, text) {
            self.tell(Publication::JobProgress(job, text.to_owned()));
        }
    }

    pub(super) fn tell(&self, publication: Publication) {
        let _ = self.publish.send(publication);
    }
}

/// The end of a task under way; never, where there is none.
async fn finished(task: &mut Option<JoinHandle<()>>) {
    match task {
        // A store that panics has failed, which its absence in the journal tells.
        Some(task) => drop(task.await),
        None => std::future::pending().await,
    }
}

/// CLOCK_MONOTONIC, in microseconds.
fn monotonic_usec() -> u64 {
    use nix::time::{ClockId, clock_gettime};
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

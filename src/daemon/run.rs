//! The loop.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant as Time, sleep_until};

use super::handle::{Asker, Fault, Handle, LoadOptions};
use super::input::{Command, Input, Publication, Purpose, Waiting, Weighed};
use super::jobs::{Job, JobKind, Jobs};
use super::state::{Durable, Store};
use super::{journal, view};
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{Footprint, Machine, UnitState};
use crate::policy::core::Effect;
use crate::policy::request::auto_reserve;
use crate::policy::{Action, ActionId, Core, Event, Mode, Outcome, Refusal, Request, Rules, Rung};
use crate::ports::{Catalog, CatalogError, Ports, Rulebook, Wish};

/// Calls on the bus have tickets from here on; the simulated gate counts from zero.
const FIRST_TICKET: u64 = 1 << 62;
/// How long the options of a load wait for its unit to ask; milliseconds.
const ONE_SHOT: u64 = 60_000;
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
    /// Looked at before each admission, on a thread that may block: the page cache.
    pub survey: Option<Arc<dyn Fn() + Send + Sync>>,
    /// Called at every pulse: the watchdog.
    pub pulse: Option<Box<dyn Fn()>>,
    /// Time between pulses, at most.
    pub pulse_interval: Option<Duration>,
    /// Told a line on how the daemon is, when it changes.
    pub say: Box<dyn Fn(&str)>,
}

/// The daemon; see the module's text.
pub struct Daemon {
    core: Core,
    parts: Parts,
    sender: mpsc::UnboundedSender<Input>,
    publish: mpsc::UnboundedSender<Publication>,
    latest: Arc<Mutex<Arc<Machine>>>,
    machine: Arc<Machine>,
    outbox: VecDeque<Action>,
    saving: Option<JoinHandle<()>>,
    waiting: BTreeMap<u64, Waiting>,
    next_ticket: u64,
    one_shot: BTreeMap<Instance, (LoadOptions, u64)>,
    /// Starts that are no person's: returns of evicted models, with their times.
    restoring: BTreeMap<Instance, u64>,
    adopting: BTreeMap<Instance, String>,
    jobs: Jobs,
    rulebook: Rulebook,
    mode: Option<Mode>,
    wake: Option<Time>,
    said: String,
    ending: bool,
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
            adopting: BTreeMap::new(),
            jobs: Jobs::default(),
            rulebook: Rulebook::default(),
            wake: None,
            said: String::new(),
            ending: false,
        };
        if let Some(rules) = daemon.parts.catalog.rulebook() {
            daemon.configure(rules, true);
        }
        (daemon, handle, published)
    }

    /// Whether decisions are carried out.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.core.rules().mode
    }

    /// Runs until [`Input::Terminate`]; returns what it was, for a look at it.
    pub async fn run(mut self, mut inputs: mpsc::UnboundedReceiver<Input>) -> Self {
        self.step(Event::Tick);
        let mut beat = Time::now() + self.interval();
        while !self.ending {
            self.flush();
            let next = self.wake.map_or(beat, |wake| wake.min(beat));
            tokio::select! {
                biased;
                () = finished(&mut self.saving) => self.saving = None,
                input = inputs.recv() => match input {
                    Some(input) => self.take_all(input, &mut inputs),
                    None => break,
                },
                () = sleep_until(next) => {
                    if self.wake.is_some_and(|wake| wake <= next) {
                        self.wake = None;
                        self.step(Event::Tick);
                    } else {
                        if let Some(pulse) = &self.parts.pulse {
                            pulse();
                        }
                        if !self.core.holders().is_empty() {
                            self.step(Event::Tick);
                        }
                    }
                }
            }
            if Time::now() >= beat || beat > Time::now() + self.interval() {
                beat = Time::now() + self.interval();
            }
        }
        // What is to be remembered is.
        while !self.outbox.is_empty() || self.saving.is_some() {
            finished(&mut self.saving).await;
            self.saving = None;
            self.flush();
        }
        self
    }

    /// The pulse: the watchdog's alone while nothing runs.
    fn interval(&self) -> Duration {
        let watchdog = self.parts.pulse_interval.unwrap_or(IDLE);
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
            Input::Adopt(instance, invocation) => self.weigh_adoption(instance, invocation),
            Input::Command(command) => self.command(*command),
            Input::Weighed(weighed) => self.weighed(*weighed),
            Input::Rules(rules) => self.configure(*rules, false),
            Input::Reload => {
                self.mode = None;
                let catalog = Arc::clone(&self.parts.catalog);
                let sender = self.sender.clone();
                tokio::task::spawn_blocking(move || {
                    if let Some(rules) = catalog.rulebook() {
                        let _ = sender.send(Input::Rules(Box::new(rules)));
                    }
                });
            }
            Input::Terminate => self.ending = true,
        }
    }

    fn command(&mut self, command: Command) {
        let now = self.parts.ports.now();
        match command {
            Command::Admit { asker, files, environment, reply } => {
                let wish = self.wish(&asker, now);
                let wish = Arc::new(Wish { files, environment, ..wish });
                self.next_ticket += 1;
                let ticket = self.next_ticket;
                self.forget(&asker.instance, "the unit has asked again");
                self.waiting
                    .insert(ticket, Waiting { wish: Arc::clone(&wish), asked: false, reply: Some(reply) });
                self.weigh(Purpose::Admit(ticket), wish);
            }
            Command::Load(job, options) => {
                if options == LoadOptions::default() {
                    self.one_shot.remove(&job.instance);
                } else {
                    self.one_shot.insert(job.instance.clone(), (options, now + ONE_SHOT));
                }
                self.restoring.remove(&job.instance);
                let effect = Effect::Start(job.instance.clone());
                self.begin_job(job, effect);
            }
            Command::Unload(job) => {
                self.step(Event::Unwanted(job.instance.clone()));
                let effect = Effect::Stop(job.instance.clone());
                self.begin_job(job, effect);
            }
            Command::Pin(instance, pinned, reply) => {
                self.step(Event::Pin(instance.model, pinned));
                let _ = reply.send(());
            }
            Command::SetMode(mode, reply) => {
                self.mode = Some(mode);
                let rulebook = self.rulebook.clone();
                self.apply(&rulebook);
                self.save_now();
                let _ = reply.send(());
            }
            Command::Plan(request, reply) => {
                let machine = self.observe();
                let planned = self.core.preview(&request, &machine, now);
                let _ = reply.send(view::planned(&request, planned, now));
            }
            Command::Status(models, problems, reply) => {
                let machine = self.observe();
                let _ = reply.send(view::status(&self.core, &machine, &models, problems));
            }
            Command::Explain(instance, reply) => {
                let last = self.core.decisions().rev().find(|decision| decision.instance == instance);
                let _ = reply.send(last.cloned());
            }
        }
    }

    /// What an asker wishes, with the options of the load that started it.
    fn wish(&mut self, asker: &Asker, now: u64) -> Wish {
        self.one_shot.retain(|_, (_, until)| *until > now);
        let (options, _) = self.one_shot.remove(&asker.instance).unwrap_or_default();
        let returning = self.restoring.remove(&asker.instance).is_some_and(|at| now < at + ONE_SHOT);
        Wish {
            instance: Some(asker.instance.clone()),
            invocation: asker.invocation.clone(),
            context: options.context,
            instead_of: options.instead_of,
            force: options.force,
            explicit: asker.explicit && !returning,
            ..Wish::default()
        }
    }

    /// The simulated gate asks by itself; options of a load hold for it as well.
    fn simulated_ask(&mut self, ticket: u64, request: Box<Request>) {
        let now = self.parts.ports.now();
        let asker = Asker {
            instance: request.instance.clone(),
            invocation: request.invocation.clone(),
            explicit: request.explicit,
        };
        if !self.one_shot.contains_key(&asker.instance) {
            self.step(Event::Ask { ticket, request });
            return;
        }
        let wish = Arc::new(self.wish(&asker, now));
        self.waiting.insert(ticket, Waiting { wish: Arc::clone(&wish), asked: false, reply: None });
        self.weigh(Purpose::Admit(ticket), wish);
    }

    fn begin_job(&mut self, job: Job, effect: Effect) {
        let text = match job.kind {
            JobKind::Load => "starting",
            JobKind::Unload => "stopping",
        };
        self.tell(Publication::JobProgress(job.number, text.to_owned()));
        let id = self.jobs.begin(job);
        self.perform(id, effect);
    }

    fn done(&mut self, id: ActionId, outcome: Outcome) {
        match self.jobs.end(id, &outcome) {
            // First the ledger, then the word that it is done.
            Some((job, result, message)) => {
                self.step(Event::Tick);
                self.tell(Publication::JobEnded(job, result, message));
            }
            None => {
                if let Outcome::Failed(why) = &outcome {
                    tracing::warn!("{why}");
                }
                self.step(Event::Done { id, outcome });
            }
        }
    }

    /// Works out a request on another thread.
    fn weigh(&self, purpose: Purpose, wish: Arc<Wish>) {
        let catalog = Arc::clone(&self.parts.catalog);
        let survey = self.parts.survey.clone();
        let gpus = self.machine.gpus.clone();
        let sender = self.sender.clone();
        tokio::spawn(async move {
            let work = move || {
                let request = catalog.request(&wish, &gpus);
                if let Some(survey) = survey {
                    survey();
                }
                (request, catalog.rulebook())
            };
            let (request, rules) = match tokio::task::spawn_blocking(work).await {
                Ok(done) => done,
                Err(error) => {
                    (Err(CatalogError::Config(format!("the daemon failed to read the model: {error}"))), None)
                }
            };
            let _ = sender.send(Input::Weighed(Box::new(Weighed { purpose, request, rules })));
        });
    }

    fn weighed(&mut self, weighed: Weighed) {
        if let Some(rules) = weighed.rules {
            self.configure(rules, false);
        }
        match weighed.purpose {
            Purpose::Adopt(instance) => {
                let Some(invocation) = self.adopting.remove(&instance) else { return };
                let request = weighed.request.unwrap_or_else(|error| {
                    tracing::warn!("{instance} runs, but its size is unknown: {error}");
                    unknown(&instance, &invocation)
                });
                tracing::info!("{instance} runs already and is taken into the ledger");
                self.step(Event::Adopt { request: Box::new(request) });
            }
            Purpose::Admit(ticket) => {
                // The asker may be gone, or have asked again.
                let Some(waiting) = self.waiting.get_mut(&ticket) else { return };
                waiting.asked = true;
                match weighed.request {
                    Ok(request) => self.step(Event::Ask { ticket, request: Box::new(request) }),
                    Err(error) => self.fail(ticket, Fault::Catalog(error)),
                }
            }
        }
    }

    /// A running instance without a reservation is taken into the ledger.
    fn weigh_adoption(&mut self, instance: Instance, invocation: String) {
        if self.adopting.contains_key(&instance) {
            return;
        }
        let wish =
            Wish { instance: Some(instance.clone()), invocation: invocation.clone(), ..Wish::default() };
        self.adopting.insert(instance.clone(), invocation);
        self.weigh(Purpose::Adopt(instance), Arc::new(wish));
    }

    /// Ends the calls of an instance that will never be answered.
    fn forget(&mut self, instance: &Instance, why: &str) {
        let of: Vec<u64> = self
            .waiting
            .iter()
            .filter(|(_, waiting)| waiting.wish.instance.as_ref() == Some(instance))
            .map(|(ticket, _)| *ticket)
            .collect();
        for ticket in of {
            self.fail(ticket, Fault::Busy(why.to_owned()));
        }
    }

    fn fail(&mut self, ticket: u64, fault: Fault) {
        let Some(waiting) = self.waiting.remove(&ticket) else { return };
        if let Some(instance) = &waiting.wish.instance {
            self.jobs.refused(instance, &fault.to_string());
        }
        if let Some(reply) = waiting.reply {
            let _ = reply.send(Err(fault));
        }
    }

    fn observe(&mut self) -> Arc<Machine> {
        let machine = Arc::new(self.parts.ports.observe());
        self.machine = Arc::clone(&machine);
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&machine);
        machine
    }

    fn step(&mut self, event: Event) {
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
        self.drop_the_gone();
        self.adopt_the_unknown(&machine);
        let line = view::line(&self.core, &machine);
        if line != self.said {
            (self.parts.say)(&line);
            self.said = line;
        }
    }

    /// Calls whose unit is gone have nobody left in the decisions that would answer them.
    fn drop_the_gone(&mut self) {
        let answered: Vec<u64> = self
            .outbox
            .iter()
            .filter_map(|action| match action {
                Action::Answer { ticket, .. } => Some(*ticket),
                _ => None,
            })
            .collect();
        let core = &self.core;
        let gone: Vec<u64> = self
            .waiting
            .iter()
            .filter(|(ticket, waiting)| {
                let waits =
                    core.waiting().any(|(instance, _)| Some(instance) == waiting.wish.instance.as_ref());
                waiting.asked && !waits && !answered.contains(ticket)
            })
            .map(|(ticket, _)| *ticket)
            .collect();
        for ticket in gone {
            self.fail(ticket, Fault::Busy("the unit's start has ended meanwhile".to_owned()));
        }
    }

    /// What runs has a reservation, whoever started it.
    fn adopt_the_unknown(&mut self, machine: &Machine) {
        let unknown: Vec<(Instance, String)> = machine
            .units
            .iter()
            .filter(|(instance, unit)| {
                unit.state == UnitState::Active && !self.core.holders().contains_key(*instance)
            })
            .map(|(instance, unit)| (instance.clone(), unit.invocation.clone()))
            .collect();
        for (instance, invocation) in unknown {
            self.weigh_adoption(instance, invocation);
        }
    }

    fn configure(&mut self, rulebook: Rulebook, first: bool) {
        if !first && rulebook == self.rulebook && self.mode_as(&rulebook) == self.core.rules().mode {
            return;
        }
        for problem in rulebook.problems.iter().filter(|problem| !self.rulebook.problems.contains(problem)) {
            tracing::warn!("configuration: {problem}");
        }
        self.apply(&rulebook);
        self.rulebook = rulebook;
    }

    fn mode_as(&self, rulebook: &Rulebook) -> Mode {
        self.mode.unwrap_or(rulebook.mode)
    }

    fn apply(&mut self, rulebook: &Rulebook) {
        let mode = self.mode_as(rulebook);
        let reserve = rulebook.reserve.unwrap_or_else(|| auto_reserve(&self.machine.memory));
        let rules = Rules { reserve, mode, peers: rulebook.peers };
        if mode != self.core.rules().mode {
            tracing::info!("mode {mode:?}");
            self.tell(Publication::Mode(mode));
        }
        self.core.configure(rules, rulebook.priorities.clone());
        let _ = self.sender.send(Input::Changed);
    }

    /// Carries out what is decided, in order, up to the first thing that has to be saved.
    fn flush(&mut self) {
        while self.saving.is_none() {
            let Some(action) = self.outbox.pop_front() else { return };
            match action {
                Action::Save(saved) => self.save(Durable { saved: *saved, mode: self.mode }),
                Action::Perform(id, effect) => {
                    if let Effect::Start(instance) = &effect {
                        self.restoring.insert(instance.clone(), self.parts.ports.now());
                    }
                    self.perform(id, effect);
                }
                Action::Answer { ticket, answer } => self.answer(ticket, answer),
                Action::Progress { instance, text } => {
                    for job in self.jobs.loads_of(&instance) {
                        self.tell(Publication::JobProgress(job, text.clone()));
                    }
                    self.tell(Publication::Progress(instance, text));
                }
                Action::AboutToEvict { instance, for_instance } => {
                    let deadline = monotonic_usec();
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

    fn save_now(&mut self) {
        // The decisions hand out what they need saved; the mode rides along with the next of them,
        // or goes alone.
        let saved = self.core.saved();
        self.outbox.push_back(Action::Save(Box::new(saved)));
    }

    fn save(&mut self, durable: Durable) {
        let Some(store) = self.parts.store.clone() else { return };
        self.saving = Some(tokio::task::spawn_blocking(move || {
            if let Err(error) = store.save(&durable) {
                tracing::error!("what has to survive a restart could not be saved: {error}");
            }
        }));
    }

    fn perform(&mut self, id: ActionId, effect: Effect) {
        let sender = self.sender.clone();
        let done = move |id, outcome| {
            let _ = sender.send(Input::Event(Event::Done { id, outcome }));
        };
        self.parts.ports.perform(id, effect, Box::new(done));
    }

    fn answer(&mut self, ticket: u64, answer: Result<u64, Box<Refusal>>) {
        let Some(waiting) = self.waiting.remove(&ticket) else {
            if ticket < FIRST_TICKET {
                self.parts.ports.answered(ticket, answer);
            }
            return;
        };
        let Some(instance) = waiting.wish.instance.clone() else { return };
        let context = match (&answer, waiting.reply.is_some()) {
            (Err(refusal), _) => {
                self.jobs.refused(&instance, &refusal.to_string());
                None
            }
            (Ok(context), _) => Some(*context),
        };
        let Some(reply) = waiting.reply else {
            self.parts.ports.answered(ticket, answer);
            return;
        };
        let Some(context) = context else {
            let refused = answer.err().map_or_else(|| Fault::Failed(String::new()), Fault::Refused);
            let _ = reply.send(Err(refused));
            return;
        };
        for job in self.jobs.loads_of(&instance) {
            self.tell(Publication::JobProgress(job, format!("loading at context {context}")));
        }
        let catalog = Arc::clone(&self.parts.catalog);
        let gpus = self.machine.gpus.clone();
        let wish = waiting.wish;
        tokio::spawn(async move {
            let launch = tokio::task::spawn_blocking(move || catalog.launch(&wish, context, &gpus)).await;
            let _ = reply.send(match launch {
                Ok(launch) => launch.map_err(Fault::Catalog),
                Err(error) => Err(Fault::Failed(format!("the daemon has a fault: {error}"))),
            });
        });
    }

    fn tell(&self, publication: Publication) {
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

/// A request for what runs and is not understood: it is charged for as it is measured.
fn unknown(instance: &Instance, invocation: &str) -> Request {
    Request {
        instance: instance.clone(),
        invocation: invocation.to_owned(),
        priority: crate::config::DEFAULT_PRIORITY,
        pinned: false,
        ladder: vec![Rung { context: 0, footprint: Footprint::default() }],
        advice: Vec::new(),
        ttl: None,
        reload: Bytes::ZERO,
        may_swap: false,
        instead_of: Default::default(),
        stuck: Default::default(),
        force: false,
        explicit: false,
        unknown: None,
        unit_limit: None,
    }
}

/// CLOCK_MONOTONIC, in microseconds.
fn monotonic_usec() -> u64 {
    use nix::time::{ClockId, clock_gettime};
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

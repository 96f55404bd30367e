//! The state machine around the decisions: who asked, what is under way, who is owed a return.
//!
//! One request is carried out at a time, the highest priority first. [`Core::step`] is told what
//! happened, with a fresh reading of the machine, and returns what to do, in order. Whatever has to
//! survive a crash of the daemon is handed out as [`Action::Save`] before the action that needs it.

mod activity;
mod admission;
mod expire;
mod killed;
mod read_ahead;
mod relief;
mod restore;
mod swap;
mod sync;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use super::decision::{Account, Decision};
use super::limits::Limits;
use super::peaks::Peaks;
use super::plan::{Planned, Situation, Step, accounts, plan};
use super::refusal::Refusal;
use super::request::{Request, Rules};
use crate::bytes::Bytes;
use crate::config::{Instance, ModelName};
use crate::ledger::{FileId, Machine, PerPool, Phase, Pool, Reservation, SwapName, SwapOwner};

/// Identifies an effect between its start and its outcome.
pub type ActionId = u64;

/// How many decisions are remembered for `plimsoll status` and `plimsoll explain`.
const REMEMBERED: usize = 64;

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// An instance asks to be admitted; `ticket` stands for the call that waits for the answer.
    /// Asking again, with a new ticket, is harmless.
    Ask {
        /// Where the answer goes.
        ticket: u64,
        /// What is asked.
        request: Box<Request>,
    },
    /// A model is found running that the ledger does not know.
    Adopt {
        /// What it takes, from its configuration.
        request: Box<Request>,
    },
    /// An effect has ended.
    Done {
        /// Which.
        id: ActionId,
        /// How.
        outcome: Outcome,
    },
    /// A person wants this instance stopped: it is owed no return.
    Unwanted(Instance),
    /// A model is pinned or unpinned by hand.
    Pin(ModelName, bool),
    /// Engines were asked for somebody who wants to see what they do.
    Heard(BTreeSet<Instance>),
    /// The last rung has killed a model's processes.
    Killed {
        /// Which.
        instance: Instance,
        /// What memory was left then.
        available: Bytes,
    },
    /// Time has passed, or something about the machine or a unit has changed.
    Tick,
}

/// How an effect ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// As wanted.
    Done,
    /// Not: why, in one sentence.
    Failed(String),
}

/// What to do, in the order given.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Make this durable before going on.
    Save(Box<Saved>),
    /// Begin an effect; its outcome comes back as [`Event::Done`].
    Perform(ActionId, Effect),
    /// Answer a waiting call.
    Answer {
        /// Which.
        ticket: u64,
        /// Admitted with this context (in tokens), or refused.
        answer: Result<u64, Box<Refusal>>,
    },
    /// Tell the one who waits what it waits for.
    Progress {
        /// Who waits.
        instance: Instance,
        /// In a few words.
        text: String,
    },
    /// Announce that a model is about to be stopped.
    AboutToEvict {
        /// Which is to go.
        instance: Instance,
        /// For whom; none where its time is over, or to keep the machine afloat.
        for_instance: Option<Instance>,
        /// When at the latest; milliseconds since boot. It goes before that when it has nothing to do.
        deadline: u64,
    },
    /// Log, publish and remember a decision.
    Record(Box<Decision>),
    /// Send [`Event::Tick`] at this time (milliseconds since boot); replaces the wake asked for before.
    WakeAt(u64),
}

/// Something done to the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Drop the cached pages of these files.
    DropCache(Vec<FileId>),
    /// Drop the page cache of the whole machine.
    DropAllCache,
    /// Move pages about until free memory lies together.
    Compact,
    /// Stop a unit, cleanly and bounded in time.
    Stop(Instance),
    /// Start a unit; it will ask like any other.
    Start(Instance),
    /// Set a unit's cgroup limits.
    Limit(Instance, Limits),
    /// Make a swapfile of this size (or several, on several disks), and use it.
    AddSwap(SwapOwner, Bytes),
    /// Have the kernel take so much back from a unit's control group, by memory.reclaim. Less than that is no failure.
    Reclaim(Instance, Bytes),
    /// Kill a unit's control group at once (cgroup.kill), and have the unit stopped, so that it does not come back by
    /// Restart=.
    Kill(Instance),
    /// Ask the engines of these models what they are doing. It is always done, and shows in the next reading.
    AskActivity(BTreeSet<Instance>),
    /// Have files on these devices that are opened from now on read ahead by so much, and those on all others as they were.
    ReadAhead(BTreeMap<u64, Bytes>),
    /// Take a swapfile out of use and remove it; one that is not in use is only removed.
    RemoveSwap(SwapName),
}

/// What survives a restart of the daemon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Saved {
    /// Reservations of models that load or run; valid for this boot only.
    pub holders: BTreeMap<Instance, Reservation>,
    /// Evicted models that come back when there is room.
    pub owed: Vec<Owed>,
    /// Pins set by hand.
    pub pins: BTreeMap<ModelName, bool>,
    /// Memory that stopped models did not give back; valid for this boot only.
    pub leaks: Vec<Leak>,
    /// The latest decisions, oldest first; valid for this boot only.
    pub decisions: VecDeque<Decision>,
    /// What models took that were measured to take more than predicted.
    pub peaks: Peaks,
}

/// An evicted model that is owed a return.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Owed {
    /// Who.
    pub instance: Instance,
    /// For whom it had to go; none where it was to keep the machine afloat.
    #[serde(default)]
    pub for_instance: Option<Instance>,
    /// What it held.
    pub reservation: Reservation,
    /// How often its return was tried.
    #[serde(default)]
    pub attempts: u32,
    /// Not to be tried before; milliseconds since boot.
    #[serde(skip)]
    pub not_before: u64,
}

/// Memory that was expected back and did not come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Leak {
    /// Of which model.
    pub instance: Instance,
    /// From which pool it is missing.
    pub pool: Pool,
    /// How much.
    pub bytes: Bytes,
    /// Since when; milliseconds since boot.
    pub since: u64,
}

/// A request that waits for its turn.
#[derive(Clone, Debug)]
struct Pending {
    ticket: u64,
    request: Request,
    arrived: u64,
    /// What it was told last.
    told: String,
}

/// The request that is being carried out.
#[derive(Clone, Debug)]
struct Active {
    pending: Pending,
    /// The steps done or under way so far.
    steps: Vec<Step>,
    /// The arithmetic when it was first planned.
    pools: Vec<Account>,
    stage: Stage,
}

/// What the active request waits for.
#[derive(Clone, Debug)]
enum Stage {
    /// Its next step is to be planned.
    Plan,
    /// Others, to finish loading or stopping. It keeps its turn, for models were stopped for it.
    Others,
    /// What the engines say that may have to go.
    Look(ActionId),
    /// This model, to finish its requests; it is asked again then.
    Drain { instance: Instance, until: u64 },
    /// The outcome of an effect.
    Effect(ActionId),
    /// The outcome of stopping this model, which was expected to free some bytes.
    Stop { id: ActionId, instance: Instance, frees: Bytes, room: PerPool },
    /// The memory of the model that was stopped.
    Settle { instance: Instance, frees: Bytes, room: PerPool, since: u64 },
    /// The limits of its unit; then it is admitted at this context.
    Limit(ActionId),
}

/// Everything that is decided upon and remembered; see the module's text.
#[derive(Clone, Debug, Default)]
pub struct Core {
    rules: Rules,
    priorities: BTreeMap<ModelName, u8>,
    holders: BTreeMap<Instance, Reservation>,
    owed: Vec<Owed>,
    pins: BTreeMap<ModelName, bool>,
    leaks: Vec<Leak>,
    pending: Vec<Pending>,
    active: Option<Active>,
    restoring: Option<restore::Restoring>,
    retiring: swap::Retiring,
    afloat: relief::Afloat,
    stops: BTreeMap<ActionId, Instance>,
    activity: BTreeMap<Instance, activity::Activity>,
    disks: read_ahead::ReadAhead,
    /// Looks under way.
    looks: BTreeMap<ActionId, BTreeSet<Instance>>,
    /// Loads that failed one after the other.
    failed_loads: BTreeMap<Instance, u32>,
    decisions: VecDeque<Decision>,
    peaks: Peaks,
    next_id: ActionId,
    saved: Saved,
    wake: Option<u64>,
}

impl Core {
    /// A core with what was saved before the daemon's restart.
    ///
    /// `same_boot` says whether the machine has not been booted since; otherwise no reservation
    /// and no leak is valid any more, but who is owed a return still is.
    #[must_use]
    pub fn new(rules: Rules, saved: Saved, same_boot: bool) -> Self {
        // Of what belongs to others plimsoll.toml says it.
        let pins = saved.pins.into_iter().filter(|(model, _)| !model.is_foreign()).collect();
        let mut core = Self { rules, owed: saved.owed, pins, peaks: saved.peaks, ..Self::default() };
        if same_boot {
            core.holders = saved.holders;
            // A stop that was not begun is decided anew; one that was shows in the unit's state.
            for reservation in core.holders.values_mut().filter(|r| r.phase == Phase::Stopping) {
                reservation.phase = Phase::Running;
            }
            core.leaks = saved.leaks;
            core.decisions = saved.decisions;
        }
        core
    }

    /// Takes over rules and the configured priorities after a (re)load of the configuration.
    pub fn configure(&mut self, rules: Rules, priorities: BTreeMap<ModelName, u8>) {
        self.rules = rules;
        self.owed.retain(|owed| priorities.contains_key(&owed.instance.model));
        // What is not adopted any more is nobody's business here.
        self.holders.retain(|instance, _| !instance.is_foreign() || priorities.contains_key(&instance.model));
        self.priorities = priorities;
    }

    /// The rules in force.
    #[must_use]
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// Who holds what.
    #[must_use]
    pub fn holders(&self) -> &BTreeMap<Instance, Reservation> {
        &self.holders
    }

    /// Who is owed a return, in the order of eviction.
    #[must_use]
    pub fn owed(&self) -> &[Owed] {
        &self.owed
    }

    /// Memory that did not come back.
    #[must_use]
    pub fn leaks(&self) -> &[Leak] {
        &self.leaks
    }

    /// Pins set by hand, which override the configuration.
    #[must_use]
    pub fn pins(&self) -> &BTreeMap<ModelName, bool> {
        &self.pins
    }

    /// Everything that has to survive a restart of the daemon, as it is now.
    #[must_use]
    pub fn saved(&self) -> Saved {
        self.to_save()
    }

    /// Instances that wait for a decision, and what each was told.
    pub fn waiting(&self) -> impl Iterator<Item = (&Instance, &str)> {
        let active = self.active.as_ref().map(|active| &active.pending);
        active.into_iter().chain(&self.pending).map(|p| (&p.request.instance, p.told.as_str()))
    }

    /// The latest decisions, oldest first.
    pub fn decisions(&self) -> impl DoubleEndedIterator<Item = &Decision> {
        self.decisions.iter()
    }

    /// What a request would lead to, changing nothing.
    #[must_use]
    pub fn preview(&self, request: &Request, machine: &Machine, now: u64) -> Planned {
        plan(&self.peaks.corrected(request.clone()), self.situation(machine, now))
    }

    /// The arithmetic of a request that was previewed, pool by pool.
    #[must_use]
    pub fn accounts(
        &self,
        request: &Request,
        planned: &Planned,
        machine: &Machine,
        now: u64,
    ) -> Vec<Account> {
        accounts(&self.peaks.corrected(request.clone()), planned, self.situation(machine, now))
    }

    /// Takes in what happened and says what to do, in order.
    pub fn step(&mut self, event: Event, machine: &Machine, now: u64) -> Vec<Action> {
        let mut out = Vec::new();
        self.wake = None;
        self.sync(machine, now);
        match event {
            Event::Ask { ticket, request } => self.ask(ticket, self.peaks.corrected(*request), now, &mut out),
            Event::Adopt { request } => self.adopt(&self.peaks.corrected(*request), machine, now),
            Event::Done { id, outcome } => self.done(id, outcome, now, &mut out),
            Event::Unwanted(instance) => self.owed.retain(|owed| owed.instance != instance),
            Event::Pin(model, pinned) => self.pin(model, pinned),
            Event::Heard(of) => self.heard(&of, now),
            Event::Killed { instance, available } => {
                self.killed(instance, available, machine, now, &mut out);
            }
            Event::Tick => {}
        }
        self.introduce(now, &mut out);
        self.proceed(machine, now, &mut out);
        self.relieve(machine, now, &mut out);
        self.restore(machine, now, &mut out);
        self.retire(machine, now, &mut out);
        self.expire(now, &mut out);
        self.read_ahead(now, &mut out);
        let saved = self.to_save();
        if saved != self.saved {
            out.insert(0, Action::Save(Box::new(saved.clone())));
            self.saved = saved;
        }
        out.extend(self.wake.map(Action::WakeAt));
        out
    }

    fn situation<'a>(&'a self, machine: &'a Machine, now: u64) -> Situation<'a> {
        Situation { holders: &self.holders, machine, rules: &self.rules, now }
    }

    /// What has to survive. Measured bytes are left out: they are read again, and would have the
    /// state written with every change of a model's memory.
    fn to_save(&self) -> Saved {
        let lasting = |(instance, r): (&Instance, &Reservation)| {
            let mut kept = Reservation { measured: crate::ledger::Measured::default(), ..r.clone() };
            kept.last_used = 0;
            (r.phase != Phase::Preparing).then(|| (instance.clone(), kept))
        };
        Saved {
            holders: self.holders.iter().filter_map(lasting).collect(),
            owed: self.owed.clone(),
            pins: self.pins.clone(),
            leaks: self.leaks.clone(),
            decisions: self.decisions.clone(),
            peaks: self.peaks.clone(),
        }
    }

    fn pin(&mut self, model: ModelName, pinned: bool) {
        for (_, reservation) in self.holders.iter_mut().filter(|(i, _)| i.model == model && !i.lease) {
            reservation.pinned = pinned;
        }
        self.pins.insert(model, pinned);
    }

    fn perform(&mut self, effect: Effect, out: &mut Vec<Action>) -> ActionId {
        self.next_id += 1;
        if let Effect::Stop(instance) | Effect::Kill(instance) = &effect {
            self.stops.insert(self.next_id, instance.clone());
        }
        out.push(Action::Perform(self.next_id, effect));
        self.next_id
    }

    fn record(&mut self, decision: Decision, out: &mut Vec<Action>) {
        if self.decisions.len() == REMEMBERED {
            self.decisions.pop_front();
        }
        self.decisions.push_back(decision.clone());
        out.push(Action::Record(Box::new(decision)));
    }

    fn wake_at(&mut self, time: u64) {
        self.wake = Some(self.wake.map_or(time, |wake| wake.min(time)));
    }
}

//! A world and the decisions, run in virtual time.

use std::collections::BTreeMap;

use super::scenario::{Eater, Requests, Scenario};
use super::world::{Emitted, World};
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{Charges, Machine, Phase, Reservation, UnitState, capacity};
use crate::policy::{Action, Core, Decision, Event, Saved};

/// How often the daemon looks while a model runs, whether or not it was asked to; milliseconds.
const PULSE: u64 = 30_000;

/// What a relief was decided on.
#[derive(Clone, Debug)]
pub struct Evidence {
    /// What was decided.
    pub decision: Decision,
    /// The reading that it was decided on.
    pub machine: Machine,
    /// The holders as read then, in the phases of just before.
    pub holders: BTreeMap<Instance, Reservation>,
}

/// The decisions on a simulated machine; time passes as fast as it can be computed.
#[derive(Clone, Debug)]
pub struct Simulation {
    /// The machine.
    pub world: World,
    /// The decisions.
    pub core: Core,
    /// Every decision so far.
    pub decisions: Vec<Decision>,
    /// Every relief that was begun, with what it was decided on.
    pub reliefs: Vec<Evidence>,
    /// How often the decisions were asked.
    pub steps: u64,
    /// What was saved last.
    pub saved: Saved,
    /// Who was told to go, and until when at the latest.
    pub announced: Vec<(Instance, u64)>,
    /// Breaches of the invariants; empty in a right program.
    pub breaches: Vec<String>,
    wake: Option<u64>,
    stepped: u64,
    /// How fast memory was seen to go down at most, by this daemon.
    fastest: Bytes,
}

impl Simulation {
    /// A scenario at time zero.
    #[must_use]
    pub fn new(scenario: Scenario) -> Self {
        let mut core = Core::new(scenario.rules(), Saved::default(), true);
        core.configure(scenario.rules(), scenario.priorities());
        Self {
            world: World::new(scenario),
            core,
            decisions: Vec::new(),
            reliefs: Vec::new(),
            steps: 0,
            saved: Saved::default(),
            announced: Vec::new(),
            breaches: Vec::new(),
            wake: None,
            stepped: 0,
            fastest: Bytes::ZERO,
        }
    }

    /// Starts an instance as a person would.
    pub fn start(&mut self, instance: &str) -> &mut Self {
        if let Ok(instance) = instance.parse::<Instance>() {
            self.world.start(&instance, None);
        }
        self
    }

    /// Sends requests to an instance, each of which takes so many seconds.
    pub fn request(&mut self, instance: &str, count: u32, seconds: u64) -> &mut Self {
        if let Ok(of) = instance.parse::<Instance>() {
            self.world.requests(&Requests { of, count, seconds });
        }
        self
    }

    /// Stops an instance as a person would.
    pub fn stop(&mut self, instance: &str) -> &mut Self {
        if let Ok(instance) = instance.parse::<Instance>() {
            self.step(Event::Unwanted(instance.clone()));
            self.world.stop(&instance, None);
            self.step(Event::Tick);
        }
        self
    }

    /// Something that is no model takes memory from now on: so much each second, and so much at most. None gives back
    /// what another one took.
    pub fn eat(&mut self, rate: Bytes, most: Bytes) -> &mut Self {
        self.world.eat(Eater { rate, most });
        self.step(Event::Tick);
        self
    }

    /// The daemon is killed and started again: what was not saved is forgotten.
    pub fn restart_daemon(&mut self) {
        let (rules, priorities) = (*self.core.rules(), self.world.scenario().priorities());
        self.core = Core::new(rules, self.saved.clone(), true);
        self.core.configure(rules, priorities);
        self.wake = None;
        self.fastest = Bytes::ZERO;
        self.world.daemon_restarted();
        // It looks about before anybody has noticed that it is back.
        self.step(Event::Tick);
    }

    /// Lets `seconds` pass.
    pub fn run(&mut self, seconds: u64) -> &mut Self {
        let end = self.world.now() + seconds * 1000;
        loop {
            let pulse = (!self.core.holders().is_empty()).then_some(self.stepped + PULSE);
            let wake = self.wake.into_iter().chain(pulse).min();
            let next = self.world.next_time().into_iter().chain(wake).min();
            let until = next.filter(|time| *time <= end).unwrap_or(end);
            let mut out = Vec::new();
            let more = self.world.advance(until, &mut out);
            self.emit(out);
            if !more && wake.is_some_and(|wake| wake <= until) {
                self.wake = None;
                self.step(Event::Tick);
            } else if !more && until == end {
                return self;
            }
        }
    }

    fn emit(&mut self, emitted: Vec<Emitted>) {
        for one in emitted {
            match one {
                Emitted::Event(event) => self.step(event),
                Emitted::Outcome(id, outcome) => self.step(Event::Done { id, outcome }),
            }
        }
    }

    /// Hands an event to the decisions and does what they want done.
    pub fn step(&mut self, event: Event) {
        let mut machine = self.world.observe();
        // As the real one has it of its own readings.
        self.fastest = self.fastest.max(machine.pressure.falling);
        machine.pressure.fastest = machine.pressure.fastest.max(self.fastest);
        let before = self.core.holders().clone();
        self.steps += 1;
        self.stepped = self.world.now();
        let mut out = Vec::new();
        let actions = self.core.step(event, &machine, self.world.now());
        let known = |(instance, was): (Instance, Reservation)| {
            // As it was measured just now, in the phase that it was in.
            let phase = was.phase;
            let now = self.core.holders().get(&instance).cloned().unwrap_or(was);
            (instance, Reservation { phase, ..now })
        };
        let holders: BTreeMap<Instance, Reservation> = before.into_iter().map(known).collect();
        for action in actions {
            match action {
                Action::Save(saved) => self.saved = *saved,
                Action::Perform(id, effect) => self.world.perform(id, &effect),
                Action::Answer { ticket, answer } => self.world.answered(ticket, &answer, &mut out),
                Action::Record(decision) => {
                    if decision.relief.is_some_and(|relief| relief.gained_bytes.is_none()) {
                        let (decision, machine) = ((*decision).clone(), machine.clone());
                        self.reliefs.push(Evidence { decision, machine, holders: holders.clone() });
                    }
                    self.decisions.push(*decision);
                }
                Action::WakeAt(time) => self.wake = Some(time),
                Action::AboutToEvict { instance, deadline, .. } => self.announced.push((instance, deadline)),
                Action::Progress { .. } => {}
            }
        }
        self.check();
        self.emit(out);
        self.adopt_foreign();
    }

    /// Units of others that run are taken into the ledger, as the daemon does with all that it finds running.
    fn adopt_foreign(&mut self) {
        let machine = self.world.observe();
        let unknown = machine.units.iter().find(|(instance, unit)| {
            instance.is_foreign()
                && unit.state == UnitState::Active
                && !self.core.holders().contains_key(*instance)
        });
        let Some((instance, unit)) = unknown else { return };
        if let Some(request) = self.world.scenario().request(instance, &unit.invocation) {
            self.step(Event::Adopt { request: Box::new(request) });
        }
    }

    /// The invariants that hold after every step: what is promised to models that load or run is
    /// there, and so is what they really hold.
    fn check(&mut self) {
        let machine = self.world.observe();
        let mut charges = Charges::default();
        for reservation in self.core.holders().values().filter(|r| r.phase != Phase::Preparing) {
            charges.add(reservation.held());
        }
        let room = capacity(&machine, self.core.rules().reserve, self.core.holders());
        let fixed = self.world.scenario().at.iter().all(|at| at.system.is_none())
            && self.world.scenario().models.values().all(|m| m.leaks.is_zero());
        let fixed = fixed && !self.world.is_disturbed();
        let charged = charges.per_pool(&machine, &[], None);
        if fixed && !charged.within(&room) {
            self.breaches.push(format!("{}: promised {charged:?} of {room:?}", self.world.now()));
        }
        let needed: Bytes = self
            .core
            .holders()
            .values()
            .filter(|r| r.phase != Phase::Preparing)
            .map(|r| r.predicted.swapped)
            .sum();
        if needed > machine.swap_of_plans() {
            self.breaches.push(format!(
                "{}: {needed} of swap promised, {} there",
                self.world.now(),
                machine.swap_of_plans()
            ));
        }
        let overrun = self.world.worst() + self.world.swap_overrun();
        if !overrun.is_zero() {
            self.breaches.push(format!("{}: {overrun} more in use than there is", self.world.now()));
        }
    }

    /// The state of an instance's unit.
    #[must_use]
    pub fn state(&self, instance: &str) -> UnitState {
        let machine = self.world.observe();
        instance
            .parse()
            .ok()
            .and_then(|i: Instance| machine.units.get(&i).map(|u| u.state))
            .unwrap_or_default()
    }

    /// The instances that answer.
    #[must_use]
    pub fn running(&self) -> Vec<String> {
        let machine = self.world.observe();
        let active = machine.units.iter().filter(|(_, unit)| unit.state == UnitState::Active);
        active.map(|(instance, _)| instance.to_string()).collect()
    }
}

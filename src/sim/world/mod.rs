//! The simulated machine: units that ask, load, answer, stop and leak, on a clock that it is told.

mod effects;
mod reading;

use std::collections::BTreeMap;

use super::scenario::{Eater, Requests, Scenario, Scripted, SimModel};
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{Busy, Footprint, SwapArea, SwapName, UnitState};
use crate::policy::{ActionId, Event, Outcome, Refusal};

/// How long a started unit takes to ask; milliseconds.
const TO_ASK: u64 = 50;
/// How long what is in a swapfile takes to be read back; milliseconds.
const SWAPOFF: u64 = 2000;

/// How long a killed unit takes to be gone; milliseconds.
const KILL: u64 = 50;

/// What comes out of the world as time passes.
#[derive(Clone, Debug)]
pub enum Emitted {
    /// Something for the decisions.
    Event(Event),
    /// The outcome of an effect.
    Outcome(ActionId, Outcome),
}

#[derive(Clone, Debug)]
enum Happening {
    Asks(Instance, u64),
    Loaded(Instance, u64),
    /// The end of this start of a unit, if it has not ended before.
    Stopped(Instance, u64, Vec<ActionId>),
    /// Memory that comes back late.
    Returned(Bytes),
    /// The memory of this start of a unit, which itself ends later.
    GaveBack(Instance, u64),
    Scripted(Scripted),
    /// systemd starts again what crashed in this start of it.
    Restarts(Instance, u64),
    /// So many requests of this start of a unit have ended.
    Finished(Instance, u64, u32),
    Outcome(ActionId, Outcome),
    SwapRemoved(SwapName, ActionId),
}

/// A simulated unit.
#[derive(Clone, Debug, Default)]
struct SimUnit {
    state: UnitState,
    /// Counts its starts; as text it is the InvocationID.
    invocation: u64,
    asked: bool,
    /// systemd will start it again after its crash.
    awaits_restart: bool,
    /// systemd started it again after a crash.
    restarted: bool,
    footprint: Footprint,
    /// memory.high of its control group.
    high: Option<Bytes>,
    loading_since: u64,
    /// Requests in flight.
    requests: u32,
    /// Requests taken since its start.
    taken: u64,
    /// What it said when it was asked last.
    busy: Option<Busy>,
    /// What memory.reclaim has put into swap.
    reclaimed: Bytes,
    /// CPU time used, and since when it serves requests.
    cpu_msec: u64,
    busy_since: Option<u64>,
    starts: Vec<ActionId>,
}

/// The simulated machine.
#[derive(Clone, Debug)]
pub struct World {
    scenario: Scenario,
    now: u64,
    sequence: u64,
    ahead: BTreeMap<(u64, u64), Happening>,
    units: BTreeMap<Instance, SimUnit>,
    tickets: BTreeMap<u64, Instance>,
    system: Bytes,
    leaked: Bytes,
    swaps: Vec<SwapArea>,
    cache: Bytes,
    free_large: Option<Bytes>,
    /// How far files of devices are read ahead, other than as the disks have it.
    pub read_ahead: BTreeMap<u64, Bytes>,
    /// Requests that were cut off.
    cut: u32,
    eater: Eater,
    eats_since: u64,
    pressure: (u16, u16),
    gpu: Bytes,
    /// What models did not give back of it.
    gpu_leaked: Bytes,
    cold: Bytes,
    /// More than models has changed what is in use.
    disturbed: bool,
    /// The most that was ever in use beyond what there is.
    worst: Bytes,
}

impl World {
    /// The machine of a scenario at time zero.
    #[must_use]
    pub fn new(scenario: Scenario) -> Self {
        let system = scenario.machine.system;
        let (cache, cold, free_large) =
            (scenario.machine.cache, scenario.machine.cold, scenario.machine.free_large);
        let scripted = scenario.at.clone();
        let mut world = Self {
            scenario,
            now: 0,
            sequence: 0,
            ahead: BTreeMap::new(),
            units: BTreeMap::new(),
            tickets: BTreeMap::new(),
            system,
            leaked: Bytes::ZERO,
            swaps: Vec::new(),
            cache,
            free_large,
            read_ahead: BTreeMap::new(),
            cut: 0,
            eater: Eater::default(),
            eats_since: 0,
            pressure: (0, 0),
            gpu: Bytes::ZERO,
            gpu_leaked: Bytes::ZERO,
            cold,
            disturbed: false,
            worst: Bytes::ZERO,
        };
        if !world.scenario.machine.swap.is_zero() {
            let (path, size) = ("/swapfile".into(), world.scenario.machine.swap);
            world.swaps.push(SwapArea { path, size, used: Bytes::ZERO, priority: -2, active: true });
        }
        for happening in scripted {
            world.later(happening.seconds * 1000, Happening::Scripted(happening));
        }
        world
    }

    /// The scenario that it began from.
    #[must_use]
    pub fn scenario(&self) -> &Scenario {
        &self.scenario
    }

    /// Milliseconds since the start.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.now
    }

    /// When the next thing happens by itself.
    #[must_use]
    pub fn next_time(&self) -> Option<u64> {
        self.ahead.keys().next().map(|(time, _)| *time)
    }

    fn later(&mut self, after: u64, happening: Happening) {
        self.sequence += 1;
        self.ahead.insert((self.now + after, self.sequence), happening);
    }

    /// Lets time pass up to `now`, at most through one happening; true when there may be more.
    pub fn advance(&mut self, now: u64, out: &mut Vec<Emitted>) -> bool {
        let Some((&(time, sequence), _)) = self.ahead.iter().next() else {
            self.now = self.now.max(now);
            return false;
        };
        if time > now {
            self.now = self.now.max(now);
            return false;
        }
        self.now = self.now.max(time);
        self.worst = self.worst.max(self.overrun());
        if let Some(happening) = self.ahead.remove(&(time, sequence)) {
            self.happen(happening, out);
        }
        true
    }

    fn happen(&mut self, happening: Happening, out: &mut Vec<Emitted>) {
        let tick = Emitted::Event(Event::Tick);
        match happening {
            Happening::Asks(instance, invocation) => {
                let current =
                    self.units.get(&instance).is_some_and(|u| u.invocation == invocation && !u.asked);
                let request = self.scenario.request(&instance, &invocation.to_string());
                let (true, Some(mut request)) = (current, request) else { return };
                if instance.is_foreign() {
                    let rung = request.ladder.first().cloned().unwrap_or_default();
                    self.loads(&instance, rung.footprint);
                    return;
                }
                if let Some(unit) = self.units.get_mut(&instance) {
                    unit.asked = true;
                    request.explicit = !unit.restarted;
                }
                self.sequence += 1;
                let ticket = self.sequence;
                self.tickets.insert(ticket, instance);
                out.push(Emitted::Event(Event::Ask { ticket, request: Box::new(request) }));
            }
            Happening::Loaded(instance, invocation) => {
                let Some(unit) = self.units.get_mut(&instance) else { return };
                if unit.invocation == invocation && unit.state == UnitState::Activating {
                    unit.state = UnitState::Active;
                    let starts = std::mem::take(&mut unit.starts);
                    out.extend(starts.into_iter().map(|id| Emitted::Outcome(id, Outcome::Done)));
                    out.push(tick);
                }
            }
            Happening::Stopped(instance, invocation, ids) => {
                if self.units.get(&instance).is_none_or(|unit| unit.invocation == invocation) {
                    self.end(&instance, UnitState::Inactive, out);
                }
                out.extend(ids.into_iter().map(|id| Emitted::Outcome(id, Outcome::Done)));
            }
            Happening::Restarts(instance, invocation) => {
                let waits = |unit: &SimUnit| unit.awaits_restart && unit.invocation == invocation;
                if self.units.get(&instance).is_some_and(waits) {
                    self.restart(&instance);
                    out.push(tick);
                }
            }
            Happening::Scripted(scripted) => {
                if let Some(instance) = &scripted.start {
                    self.start(instance, None);
                }
                if let Some(instance) = &scripted.restart {
                    self.restart(instance);
                }
                if let Some(instance) = &scripted.stop {
                    out.push(Emitted::Event(Event::Unwanted(instance.clone())));
                    self.stop(instance, None);
                }
                if let Some(instance) = &scripted.crash {
                    self.crash(instance, scripted.restart_seconds, out);
                }
                self.script(&scripted);
                out.push(tick);
            }
            Happening::Returned(bytes) => {
                self.leaked -= bytes;
                out.push(tick);
            }
            Happening::GaveBack(instance, invocation) => {
                let ends =
                    |u: &&mut SimUnit| u.invocation == invocation && u.state == UnitState::Deactivating;
                if let Some(unit) = self.units.get_mut(&instance).filter(ends) {
                    unit.footprint = Footprint::default();
                    out.push(tick);
                }
            }
            Happening::Finished(instance, invocation, count) => {
                if let Some(unit) = self.units.get_mut(&instance).filter(|u| u.invocation == invocation) {
                    unit.requests = unit.requests.saturating_sub(count);
                    if let Some(since) = unit.busy_since.filter(|_| unit.requests == 0) {
                        unit.cpu_msec += self.now - since;
                        unit.busy_since = None;
                    }
                }
            }
            Happening::Outcome(id, outcome) => out.push(Emitted::Outcome(id, outcome)),
            Happening::SwapRemoved(name, id) => {
                self.swaps.retain(|area| area.own() != Some(name));
                self.read_back();
                out.push(Emitted::Outcome(id, Outcome::Done));
            }
        }
    }

    /// What happens to the machine at a time of the scenario.
    fn script(&mut self, scripted: &Scripted) {
        self.system = scripted.system.unwrap_or(self.system);
        self.pressure = scripted.pressure.unwrap_or(self.pressure);
        self.gpu = scripted.gpu.unwrap_or(self.gpu);
        if let Some(requests) = &scripted.requests {
            self.requests(requests);
        }
        self.disturbed |= scripted.system.is_some() || scripted.gpu.is_some();
        if let Some(eater) = scripted.eater {
            self.eat(eater);
        }
        if scripted.eater_ends {
            self.eat(Eater::default());
        }
    }

    /// Something that is no model takes memory from now on; what another one took is given back.
    pub fn eat(&mut self, eater: Eater) {
        self.worst = self.worst();
        (self.eater, self.eats_since, self.disturbed) = (eater, self.now, true);
    }

    /// Tasks wait for memory from now on: some and all of them, per mille of the time.
    pub fn stall(&mut self, some: u16, full: u16) {
        self.pressure = (some, full);
    }

    /// Swapfiles may take so much of the disk from now on.
    pub fn disk(&mut self, room: Bytes) {
        self.scenario.machine.swap_room = room;
    }

    /// Whether more than models has changed what is in use.
    #[must_use]
    pub fn is_disturbed(&self) -> bool {
        self.disturbed
    }

    /// What the eater has taken.
    #[must_use]
    pub fn eaten(&self) -> Bytes {
        self.eater.rate.mul_div(self.now - self.eats_since, 1000).min(self.eater.most)
    }

    /// The most that was in use beyond what there is since the start: on a real machine the kernel would have killed.
    #[must_use]
    pub fn worst(&self) -> Bytes {
        self.worst.max(self.overrun())
    }

    /// A process ends, whatever it was doing; what it leaks stays.
    fn end(&mut self, instance: &Instance, state: UnitState, out: &mut Vec<Emitted>) {
        let model = self.scenario.models.get(&instance.model);
        let (leaks, late) = model.map_or((Bytes::ZERO, 0), |m| (m.leaks, m.late_seconds * 1000));
        let returns;
        let Some(unit) = self.units.get_mut(instance) else { return };
        if unit.state.is_alive() {
            if !unit.footprint.total().is_zero() {
                self.leaked += leaks;
                self.gpu_leaked += if unit.footprint.gpus.is_empty() { Bytes::ZERO } else { leaks };
            }
            returns = if late == 0 { Bytes::ZERO } else { unit.footprint.private };
            self.leaked += returns;
            (unit.state, unit.reclaimed, unit.busy_since) = (state, Bytes::ZERO, None);
            unit.footprint = Footprint::default();
            self.cut += std::mem::take(&mut unit.requests);
            (unit.taken, unit.busy) = (0, None);
            let failed = Outcome::Failed(format!("{} has ended", instance.unit()));
            let starts = std::mem::take(&mut unit.starts);
            out.extend(starts.into_iter().map(|id| Emitted::Outcome(id, failed.clone())));
            out.push(Emitted::Event(Event::Tick));
            if !returns.is_zero() {
                self.later(late, Happening::Returned(returns));
            }
        }
    }

    /// Somebody asks a model for something; one that does not answer hears nothing of it.
    pub fn requests(&mut self, requests: &Requests) {
        let Requests { of, count, seconds } = requests;
        let Some(unit) = self.units.get_mut(of).filter(|unit| unit.state == UnitState::Active) else {
            return;
        };
        if unit.requests == 0 && *count > 0 {
            unit.busy_since = Some(self.now);
        }
        unit.requests += count;
        unit.taken += u64::from(*count);
        let invocation = unit.invocation;
        self.later(seconds * 1000, Happening::Finished(of.clone(), invocation, *count));
    }

    /// Requests that ended because the model was stopped.
    #[must_use]
    pub fn cut(&self) -> u32 {
        self.cut
    }

    /// The process of a unit is gone, and systemd may start it again.
    fn crash(&mut self, instance: &Instance, restart_seconds: Option<u64>, out: &mut Vec<Emitted>) {
        let alive = self.units.get(instance).is_some_and(|unit| unit.state.is_alive());
        self.end(instance, UnitState::Failed, out);
        let Some(unit) = self.units.get_mut(instance).filter(|_| alive) else { return };
        if let Some(seconds) = restart_seconds {
            unit.awaits_restart = true;
            let invocation = unit.invocation;
            self.later(seconds * 1000, Happening::Restarts(instance.clone(), invocation));
        }
    }

    fn restart(&mut self, instance: &Instance) {
        self.start(instance, None);
        if let Some(unit) = self.units.get_mut(instance) {
            unit.restarted = true;
        }
    }

    fn ask_activity(&mut self, instance: &Instance) {
        let (silent, at) = (self.scenario.models.get(&instance.model).is_none_or(|m| m.silent), self.now);
        let Some(unit) = self.units.get_mut(instance) else { return };
        let says = unit.state == UnitState::Active && !silent;
        unit.busy = says.then_some(Busy { requests: unit.requests, mark: unit.taken, at });
    }

    /// Starts a unit, unless it runs.
    pub fn start(&mut self, instance: &Instance, id: Option<ActionId>) {
        let known = self.scenario.models.contains_key(&instance.model);
        let unit = self.units.entry(instance.clone()).or_default();
        if !known || unit.state == UnitState::Active {
            let outcome =
                if known { Outcome::Done } else { Outcome::Failed(format!("there is no model {instance}")) };
            if let Some(id) = id {
                self.later(0, Happening::Outcome(id, outcome));
            }
            return;
        }
        unit.starts.extend(id);
        if unit.state.is_alive() {
            return;
        }
        unit.state = UnitState::Activating;
        unit.invocation += 1;
        (unit.asked, unit.awaits_restart, unit.restarted) = (false, false, false);
        let invocation = unit.invocation;
        self.later(TO_ASK, Happening::Asks(instance.clone(), invocation));
    }

    /// Stops a unit, in its own time.
    pub fn stop(&mut self, instance: &Instance, id: Option<ActionId>) {
        let model = self.scenario.models.get(&instance.model);
        let fails = |m: &SimModel| (m.stop_seconds, m.stuck, m.stubborn);
        let (seconds, stuck, stubborn) = model.map_or((0, false, false), fails);
        let alive = self.units.get(instance).is_some_and(|unit| unit.state.is_alive());
        let mut id = id;
        if (stuck || stubborn)
            && alive
            && let Some(id) = id.take()
        {
            let outcome = Outcome::Failed(format!("{} does not stop", instance.unit()));
            self.later(seconds * 1000, Happening::Outcome(id, outcome));
        }
        if stuck && alive {
            return;
        }
        let seconds = if stubborn { seconds * 2 } else { seconds };
        let invocation = self.units.get(instance).map_or(0, |unit| unit.invocation);
        if let Some(unit) = self.units.get_mut(instance) {
            unit.awaits_restart = false;
        }
        if let Some(unit) = self.units.get_mut(instance).filter(|_| alive) {
            unit.state = UnitState::Deactivating;
        }
        if self.is_undead(instance) && alive {
            return;
        }
        let lingers = self.scenario.models.get(&instance.model).map_or(0, |m| m.lingers_seconds);
        if lingers > 0 && alive {
            self.later(seconds * 1000, Happening::GaveBack(instance.clone(), invocation));
        }
        let after = if alive { (seconds + lingers) * 1000 } else { 0 };
        self.later(after, Happening::Stopped(instance.clone(), invocation, id.into_iter().collect()));
    }

    /// Kills a unit, which gives back at once.
    fn kill(&mut self, instance: &Instance, id: ActionId) {
        let invocation = self.units.get(instance).map_or(0, |unit| unit.invocation);
        if let Some(unit) = self.units.get_mut(instance).filter(|unit| unit.state.is_alive()) {
            unit.state = UnitState::Deactivating;
            if self.is_undead(instance) {
                return;
            }
        }
        self.later(KILL, Happening::Stopped(instance.clone(), invocation, vec![id]));
    }

    fn is_undead(&self, instance: &Instance) -> bool {
        self.scenario.models.get(&instance.model).is_some_and(|m| m.undead)
    }

    /// The daemon is another one: nobody hears of what the last one began, a swapoff under way ends with nothing
    /// done, and whoever waits for an answer asks again, as `plimsoll run` does when the daemon's name has a new owner.
    pub fn daemon_restarted(&mut self) {
        self.ahead.retain(|_, happening| match happening {
            Happening::Outcome(..) | Happening::SwapRemoved(..) => false,
            Happening::Stopped(_, _, ids) => {
                ids.clear();
                true
            }
            Happening::Asks(..)
            | Happening::Loaded(..)
            | Happening::Finished(..)
            | Happening::Returned(_)
            | Happening::GaveBack(..)
            | Happening::Restarts(..)
            | Happening::Scripted(_) => true,
        });
        for unit in self.units.values_mut() {
            unit.starts.clear();
        }
        for instance in std::mem::take(&mut self.tickets).into_values() {
            let Some(unit) = self.units.get_mut(&instance) else { continue };
            unit.asked = false;
            let invocation = unit.invocation;
            self.later(TO_ASK, Happening::Asks(instance, invocation));
        }
    }

    /// Takes in the answer to a unit that asked; a refused one fails.
    pub fn answered(&mut self, ticket: u64, answer: &Result<u64, Box<Refusal>>, out: &mut Vec<Emitted>) {
        let Some(instance) = self.tickets.remove(&ticket) else { return };
        match answer {
            Ok(context) => {
                let request = self.scenario.request(&instance, "");
                let rung = request.and_then(|r| r.ladder.into_iter().find(|rung| rung.context == *context));
                self.loads(&instance, rung.map(|rung| rung.footprint).unwrap_or_default());
            }
            Err(_) => self.end(&instance, UnitState::Failed, out),
        }
    }

    fn loads(&mut self, instance: &Instance, footprint: Footprint) {
        let model = self.scenario.models.get(&instance.model);
        let (seconds, more) = model.map_or((0, Bytes::ZERO), |m| (m.load_seconds, m.takes_more));
        let now = self.now;
        let Some(unit) = self.units.get_mut(instance) else { return };
        unit.footprint = footprint;
        unit.footprint.private += more;
        unit.loading_since = now;
        let invocation = unit.invocation;
        self.later(seconds * 1000, Happening::Loaded(instance.clone(), invocation));
    }
}

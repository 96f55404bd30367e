//! The simulated machine under the daemon's own loop, in real time.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::scenario::Scenario;
use super::world::{Emitted, World};

use crate::ledger::{Gpu, Machine};
use crate::os::since_boot;
use crate::policy::core::Effect;
use crate::policy::{ActionId, Event, Refusal, Request, Rules, Rung};
use crate::ports::{Catalog, CatalogError, Launch, ModelInfo, Outcomes, Ports, Rulebook, Wish};

/// [`Ports`] over a [`World`].
pub struct SimPorts {
    shared: Arc<Shared>,
    /// The clock of the real machine when the scenario began, so that times of decisions mean what
    /// they mean on a real machine; milliseconds since boot.
    booted: u64,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    begun: Instant,
}

struct State {
    world: World,
    waiting: BTreeMap<ActionId, Outcomes>,
    emitted: Vec<Emitted>,
    ended: bool,
}

impl Shared {
    fn now(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// The state; a panic elsewhere does not make the numbers wrong.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SimPorts {
    /// Runs a scenario from now on; what happens by itself goes to `events`, from a thread that
    /// ends with the returned value.
    pub fn new(scenario: Scenario, events: impl Fn(Event) + Send + 'static) -> Self {
        let state = State {
            world: World::new(scenario),
            waiting: BTreeMap::new(),
            emitted: Vec::new(),
            ended: false,
        };
        let shared =
            Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), begun: Instant::now() });
        let clock = Arc::clone(&shared);
        std::thread::spawn(move || keep_time(&clock, &events));
        Self { shared, booted: u64::try_from(since_boot().as_millis()).unwrap_or(0) }
    }
}

impl Drop for SimPorts {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
    }
}

fn keep_time(shared: &Shared, events: &impl Fn(Event)) {
    let mut state = shared.lock();
    while !state.ended {
        let mut emitted = std::mem::take(&mut state.emitted);
        while state.world.advance(shared.now(), &mut emitted) {}
        if !emitted.is_empty() {
            let mut outcomes = Vec::new();
            for one in &emitted {
                if let Emitted::Outcome(id, outcome) = one
                    && let Some(done) = state.waiting.remove(id)
                {
                    outcomes.push((done, *id, outcome.clone()));
                }
            }
            drop(state);
            for one in emitted {
                if let Emitted::Event(event) = one {
                    events(event);
                }
            }
            for (done, id, outcome) in outcomes {
                done(id, outcome);
            }
            state = shared.lock();
            continue;
        }
        let pause = match state.world.next_time() {
            Some(time) => Duration::from_millis(time.saturating_sub(shared.now()).max(1)),
            None => Duration::from_secs(3600),
        };
        let waited = shared.changed.wait_timeout(state, pause);
        state = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
}

impl Ports for SimPorts {
    fn now(&self) -> u64 {
        self.booted + self.shared.now()
    }

    fn observe(&mut self) -> Machine {
        self.shared.lock().world.observe()
    }

    fn perform(&mut self, id: ActionId, effect: Effect, done: Outcomes) {
        let mut state = self.shared.lock();
        state.waiting.insert(id, done);
        state.world.perform(id, &effect);
        self.shared.changed.notify_all();
    }

    fn answered(&mut self, ticket: u64, answer: Result<u64, Box<Refusal>>) {
        let mut state = self.shared.lock();
        let mut emitted = Vec::new();
        state.world.answered(ticket, &answer, &mut emitted);
        state.emitted.extend(emitted);
        self.shared.changed.notify_all();
    }
}

/// [`Catalog`] over a scenario's models.
pub struct SimCatalog {
    scenario: Scenario,
}

impl SimCatalog {
    /// The models of a scenario.
    #[must_use]
    pub fn new(scenario: Scenario) -> Self {
        Self { scenario }
    }
}

impl Catalog for SimCatalog {
    fn models(&self) -> Vec<ModelInfo> {
        let info = |(name, model): (&crate::config::ModelName, &super::SimModel)| ModelInfo {
            name: Some(name.clone()),
            priority: model.priority,
            pinned: model.pinned,
            context: model.context,
            parallel: 1,
            ..ModelInfo::default()
        };
        self.scenario.models.iter().map(info).collect()
    }

    fn rulebook(&self) -> Option<Rulebook> {
        let Rules { reserve, mode, peers, drop_all_cache, ladder } = self.scenario.rules();
        let (reserve, models) = (Some(reserve), self.models());
        Some(Rulebook { mode, reserve, peers, drop_all_cache, ladder, models, ..Rulebook::default() })
    }

    fn request(&self, wish: &Wish, _gpus: &[Gpu]) -> Result<Request, CatalogError> {
        let unknown = || CatalogError::NotFound("there is no such model in the scenario".to_owned());
        let instance = wish.instance.as_ref().ok_or_else(unknown)?;
        let mut request = self.scenario.request(instance, &wish.invocation).ok_or_else(unknown)?;
        if let Some(context) = wish.context {
            let mut scenario = self.scenario.clone();
            if let Some(model) = scenario.models.get_mut(&instance.model) {
                model.context = context;
                model.context_min = None;
            }
            request = scenario.request(instance, &wish.invocation).ok_or_else(unknown)?;
        }
        request.instead_of.clone_from(&wish.instead_of);
        request.force = wish.force;
        request.no_restore = wish.no_restore;
        request.explicit = wish.explicit;
        Ok(request)
    }

    fn launch(&self, _wish: &Wish, _rung: &Rung, _gpus: &[Gpu]) -> Result<Launch, CatalogError> {
        Err(CatalogError::Config("a simulated model has no process to execute".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::policy::Outcome;

    #[test]
    fn the_clock_thread_hands_out_asks_and_outcomes() {
        let text =
            "[machine]\nmemory = '8GiB'\nsystem = '1GiB'\n[models.a]\nweights = '1GiB'\nload-seconds = 0\n";
        let scenario: Scenario = toml::from_str(text).unwrap();
        let (events, from_clock) = mpsc::channel();
        let mut ports = SimPorts::new(scenario, move |event| drop(events.send(event)));
        let (done, outcome) = mpsc::channel();
        ports.perform(
            7,
            Effect::Start("a".parse().unwrap()),
            Box::new(move |id, o| drop(done.send((id, o)))),
        );
        let wait = Duration::from_secs(20);
        let Event::Ask { ticket, .. } = from_clock.recv_timeout(wait).unwrap() else { panic!("no ask") };
        ports.answered(ticket, Ok(4096));
        assert_eq!(outcome.recv_timeout(wait).unwrap(), (7, Outcome::Done));
    }
}

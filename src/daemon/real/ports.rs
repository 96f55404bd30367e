//! [`Ports`] of the real machine.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::effects::{Effects, boot_msec};
use super::page_cache::PageCache;
use super::sensing::Sensing;
use super::standby::StandBy;
use super::swap::SwapFiles;
use super::units::Units;
use tokio::sync::mpsc::UnboundedSender;

use crate::action::systemd::UnitStatus;
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::daemon::Input;
use crate::host::{Card, ControlGroup, Host};
use crate::ledger::{Gpu, Machine, Measured, Memory, Unit, UnitState};
use crate::policy::core::Effect;
use crate::policy::{ActionId, LastResort, Outcome, Refusal};
use crate::ports::{Outcomes, Ports};

/// The slice that all models run in.
const SLICE: &str = "/llm.slice";

/// The real machine: units as systemd last told, memory and GPUs read afresh.
pub struct RealPorts {
    host: Host,
    units: Arc<Units>,
    cache: Arc<PageCache>,
    swap: Arc<SwapFiles>,
    effects: Effects,
    sensing: Sensing,
    stand_by: StandBy,
    /// What was read last, for when a reading fails.
    memory: Memory,
    gpus: Vec<Gpu>,
    complained: bool,
}

impl RealPorts {
    /// This machine; `effects` are what is done to it, and `inputs` hear of what it does by itself.
    ///
    /// # Errors
    /// One sentence: memory can't be read, without which nothing can be decided.
    pub fn new(
        host: Host,
        units: Arc<Units>,
        cache: Arc<PageCache>,
        swap: Arc<SwapFiles>,
        effects: Effects,
        inputs: UnboundedSender<Input>,
    ) -> Result<Self, String> {
        let memory = host.memory().map_err(|error| error.to_string())?;
        let sensing = Sensing::start(host.clone(), inputs.clone());
        let stand_by = StandBy::start(&host, inputs)?;
        let gpus = Vec::new();
        Ok(Self { host, units, cache, swap, effects, sensing, stand_by, memory, gpus, complained: false })
    }

    fn unit(&mut self, instance: &Instance, status: &UnitStatus, cards: &[Card]) -> Unit {
        let mut unit = Unit {
            state: status.state,
            main_pid: status.main_pid,
            invocation: status.invocation.clone(),
            admin_limit: self.units.admin_limit(instance),
            busy: self.effects.activities.busy(instance, &status.invocation),
            ..Unit::default()
        };
        if let Ok(group) = status.control_group.parse::<ControlGroup>() {
            // A group that has just gone holds nothing.
            unit.measured = self.host.measured(&group, cards).unwrap_or_default();
            unit.cpu_usec = self.host.cpu_usec(&group).unwrap_or_default();
            (unit.stalled, unit.oom_kills) = self.sensing.unit(instance, &group);
        }
        unit
    }

    /// Has the kernel wake the loop for what happens to these units.
    fn listen(&mut self, known: &[(Instance, UnitStatus)]) {
        let alive = known.iter().filter(|(_, status)| {
            matches!(status.state, UnitState::Activating | UnitState::Active) && status.main_pid != 0
        });
        let groups = alive.filter_map(|(instance, status)| {
            Some((instance.clone(), (status.invocation.clone(), status.control_group.parse().ok()?)))
        });
        self.sensing.listen_to(&groups.collect());
    }

    /// The lowest limit on all models together, as it stands in the control group or as systemd
    /// will set it when the first of them starts.
    fn slice_limit(&self) -> Option<Bytes> {
        let group = SLICE.parse::<ControlGroup>().ok();
        let set = group.and_then(|group| self.host.memory_limit(&group).ok()).flatten();
        set.into_iter().chain(self.units.slice_limit()).min()
    }
}

impl Ports for RealPorts {
    fn now(&self) -> u64 {
        boot_msec()
    }

    fn observe(&mut self) -> Machine {
        match self.host.memory() {
            Ok(memory) => {
                self.memory = memory;
                self.complained = false;
            }
            // It worked before: the last reading has to do, said once.
            Err(error) if !self.complained => {
                tracing::error!("{error}; what was read before is taken");
                self.complained = true;
            }
            Err(_) => {}
        }
        let cards = self.host.cards().unwrap_or_default();
        let gpus: Vec<Gpu> = cards.iter().filter_map(Card::pool).collect();
        if !gpus.is_empty() {
            self.gpus = gpus;
        }
        let known = self.units.all();
        self.listen(&known);
        let units: BTreeMap<Instance, Unit> = known
            .iter()
            .map(|(instance, status)| (instance.clone(), self.unit(instance, status, &cards)))
            .collect();
        let (pressure, eater) = self.sensing.machine(self.memory.available);
        // Without /proc/swaps there is no swap to speak of.
        let (swaps, swap_room) = self.swap.with(self.host.swaps().unwrap_or_default());
        Machine {
            memory: self.memory,
            gpus: self.gpus.clone(),
            slice_limit: self.slice_limit(),
            units,
            starting: self.units.starting(),
            cached: self.cache.cached(),
            swaps,
            swap_room,
            pressure,
            eater,
            stopping: self.units.stopping(),
        }
    }

    fn measure(&self, pid: u32, others: &BTreeSet<u32>) -> Measured {
        self.host.measured_tree(pid, others, &self.host.cards().unwrap_or_default())
    }

    fn perform(&mut self, id: ActionId, effect: Effect, done: Outcomes) {
        self.stand_by.spare(&effect);
        let effects = self.effects.clone();
        tokio::spawn(async move {
            let outcome = match effects.perform(effect).await {
                Ok(()) => Outcome::Done,
                Err(why) => Outcome::Failed(why),
            };
            done(id, outcome);
        });
    }

    fn stand_by(&mut self, last: Option<LastResort>, due: Duration) {
        self.stand_by.orders(last, due, |instance| {
            let status = self.units.get(instance)?;
            let group = status.control_group.parse().ok()?;
            Some((self.host.group_directory(&group), status.invocation))
        });
    }

    fn killed(&mut self) -> Vec<(Instance, Bytes)> {
        self.stand_by.killed()
    }

    fn unseen(&self) -> Vec<String> {
        self.sensing.lacks().to_vec()
    }

    fn answered(&mut self, _ticket: u64, _answer: Result<u64, Box<Refusal>>) {
        // Every call at the real gate waits on the bus.
    }
}

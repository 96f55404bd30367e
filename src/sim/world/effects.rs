//! What is done to the simulated machine.

use super::{Happening, SWAPOFF, World};
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{SwapArea, SwapName, SwapOwner};
use crate::policy::core::Effect;
use crate::policy::{ActionId, Outcome};

impl World {
    /// Puts so much of a unit into swap, as far as that has room; at a gibibyte a second.
    pub(super) fn reclaim(&mut self, instance: &Instance, bytes: Bytes, id: ActionId) {
        let room = self.swap_left();
        let Some(unit) = self.units.get(instance) else { return };
        let bytes = bytes.min(room).min(self.measured(instance, unit).private);
        if let Some(unit) = self.units.get_mut(instance) {
            unit.reclaimed += bytes;
        }
        self.later(bytes.mul_div(1000, Bytes::gib(1).0).0 + 1, Happening::Outcome(id, Outcome::Done));
    }

    /// What was reclaimed and has no place in swap any more is in memory again.
    pub(super) fn read_back(&mut self) {
        let mut too_much = self.swap_overrun();
        for unit in self.units.values_mut() {
            let back = unit.reclaimed.min(too_much);
            unit.reclaimed -= back;
            too_much -= back;
        }
    }

    /// What swap areas have room for beside what units have there.
    pub(super) fn swap_left(&self) -> Bytes {
        let used: Bytes = self.units.iter().map(|(i, unit)| self.measured(i, unit).swapped).sum();
        self.swaps.iter().map(|area| area.size).sum::<Bytes>() - used
    }

    /// Does what the decisions want done.
    pub fn perform(&mut self, id: ActionId, effect: &Effect) {
        match effect {
            Effect::Start(instance) => self.start(instance, Some(id)),
            Effect::Stop(instance) => self.stop(instance, Some(id)),
            Effect::DropCache(_) => {
                self.cold = Bytes::ZERO;
                self.later(1, Happening::Outcome(id, Outcome::Done));
            }
            Effect::AskActivity(instances) => {
                instances.iter().for_each(|instance| self.ask_activity(instance));
                self.later(2, Happening::Outcome(id, Outcome::Done));
            }
            Effect::Limit(instance, limits) => {
                if let Some(unit) = self.units.get_mut(instance) {
                    unit.high = Some(limits.high);
                }
                self.later(1, Happening::Outcome(id, Outcome::Done));
            }
            Effect::Reclaim(instance, bytes) => self.reclaim(instance, *bytes, id),
            Effect::Kill(instance) => self.kill(instance, id),
            Effect::DropAllCache => {
                self.cache = Bytes::ZERO;
                self.later(1, Happening::Outcome(id, Outcome::Done));
            }
            Effect::ReadAhead(devices) => {
                self.read_ahead = devices.clone();
                self.later(1, Happening::Outcome(id, Outcome::Done));
            }
            Effect::Compact => {
                self.free_large = None;
                self.later(1, Happening::Outcome(id, Outcome::Done));
            }
            Effect::AddSwap(owner, bytes) => {
                let outcome = self.add_swap(*owner, *bytes);
                self.later(30, Happening::Outcome(id, outcome));
            }
            Effect::RemoveSwap(name) => self.later(SWAPOFF, Happening::SwapRemoved(*name, id)),
        }
    }

    pub(super) fn add_swap(&mut self, owner: SwapOwner, size: Bytes) -> Outcome {
        if size > self.swap_room() {
            return Outcome::Failed(format!("a swapfile of {size} does not fit on the disk"));
        }
        if self.scenario.machine.swap_broken {
            return Outcome::Failed("the kernel does not take it as swap".to_owned());
        }
        self.sequence += 1;
        let path = SwapName { owner, id: self.sequence }.file_name().into();
        self.swaps.push(SwapArea { path, size, used: Bytes::ZERO, priority: -2, active: true });
        Outcome::Done
    }

    pub(super) fn swap_room(&self) -> Bytes {
        self.scenario.machine.swap_room - self.swaps.iter().map(|area| area.size).sum()
    }

    /// What units hold in swap beyond what the swap areas have room for: on a real machine the kernel would
    /// kill.
    #[must_use]
    pub fn swap_overrun(&self) -> Bytes {
        let swapped: Bytes = self.units.iter().map(|(i, unit)| self.measured(i, unit).swapped).sum();
        swapped - self.swaps.iter().map(|area| area.size).sum()
    }
}

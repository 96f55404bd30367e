//! Swapfiles that were made for a model go when nobody needs them any more.

use super::{Action, ActionId, Core, Effect, Outcome};
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{Charges, Machine, SwapArea, SwapName, SwapOwner, capacity, swapfile_bytes};
use crate::policy::request::Mode;

/// How long the first failed removal is waited out; it doubles with each; milliseconds.
const BACKOFF: u64 = 30_000;

/// What is known of removing swapfiles.
#[derive(Clone, Debug, Default)]
pub(super) struct Retiring {
    /// The removal under way.
    under_way: Option<(ActionId, SwapName)>,
    /// Removals that failed one after the other.
    failures: u32,
    /// Not to be tried before; milliseconds since boot.
    not_before: u64,
}

impl Core {
    /// Removes one swapfile that no model needs any more, or that was left behind: only while nothing else is
    /// done and nobody is about to ask, and only when what it holds fits in memory. After a restart of the daemon
    /// who asks next may be the one that it was made for.
    pub(super) fn retire(&mut self, machine: &Machine, now: u64, out: &mut Vec<Action>) {
        let wanted =
            self.is_short() || self.active.is_some() || self.is_asked() || self.is_expecting(machine);
        if wanted || self.is_retiring() || machine.stopping || self.rules.mode == Mode::Observe {
            return;
        }
        let Some(name) = self.unneeded(machine) else { return };
        if now < self.retiring.not_before {
            let time = self.retiring.not_before;
            self.wake_at(time);
            return;
        }
        let id = self.perform(Effect::RemoveSwap(name), out);
        self.retiring.under_way = Some((id, name));
    }

    /// Whether a swapfile is being removed: the machine still shows it, and nobody can count on it.
    pub(super) fn is_retiring(&self) -> bool {
        self.retiring.under_way.is_some()
    }

    /// The models that need a swapfile to stay, if any do: without it what is promised to them is not there.
    #[must_use]
    pub fn need_swapfile(&self, name: SwapName, machine: &Machine) -> Vec<Instance> {
        let needed: Bytes = self.holders.values().map(|r| r.predicted.swapped).sum();
        let of_plan =
            |area: &&SwapArea| area.active && area.own() == Some(name) && name.owner == SwapOwner::Plan;
        let size = machine.swaps.iter().find(of_plan).map_or(Bytes::ZERO, |area| area.size);
        if size <= machine.swap_of_plans() - needed {
            return Vec::new();
        }
        let swaps = self.holders.iter().filter(|(_, r)| !r.predicted.swapped.is_zero());
        swaps.map(|(instance, _)| instance.clone()).collect()
    }

    /// A swapfile to remove.
    fn unneeded(&self, machine: &Machine) -> Option<SwapName> {
        let needed: Bytes = self.holders.values().map(|r| r.predicted.swapped).sum();
        let mut charges = Charges::default();
        for reservation in self.holders.values() {
            charges.add(reservation.held());
        }
        let charged = charges.per_pool(machine, &[], None).memory;
        let free = capacity(machine, self.rules.reserve, &self.holders).memory - charged;
        // Once made, the margin stays with it.
        let spare = machine.swap_of_plans() - swapfile_bytes(needed);
        let may_go = |area: &&SwapArea| match area.own() {
            // A model may have it made just now: its reservation says so before the file is there.
            Some(_) if !area.active => needed <= machine.swap_of_plans(),
            Some(name) if name.owner == SwapOwner::Plan => area.size <= spare && area.used <= free,
            _ => false,
        };
        machine.swaps.iter().find(may_go).and_then(SwapArea::own)
    }

    /// Takes in the outcome of a removal; false when `id` is none.
    pub(super) fn retired(&mut self, id: ActionId, outcome: &Outcome, now: u64) -> bool {
        if self.retiring.under_way.take_if(|(under_way, _)| *under_way == id).is_none() {
            return false;
        }
        self.retiring.failures = match outcome {
            Outcome::Done => 0,
            Outcome::Failed(_) => {
                self.retiring.not_before = now + (BACKOFF << self.retiring.failures.min(6));
                self.retiring.failures.saturating_add(1)
            }
        };
        true
    }
}

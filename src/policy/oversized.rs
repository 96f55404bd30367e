//! Models larger than memory: what streams from its file, and what is left in swap.

use super::limits::read_ahead;
use super::plan::{Plan, Scene, Step, largest};
use super::request::Rung;
use crate::bytes::Bytes;
use crate::ledger::swapfile_bytes;

impl Scene<'_> {
    /// A plan for a model larger than memory, where it may stream and the weights that every token
    /// touches find room. All of `gone` have to go: whatever they hold would be read from disk again
    /// and again.
    pub(super) fn stream(&self, gone: &[usize]) -> Option<Plan> {
        let least = self.request.stream?;
        let resident = |rung: &Rung| {
            let bare = Rung { footprint: rung.footprint.resident(Bytes::ZERO), ..rung.clone() };
            let charge = self.charge(&bare, gone);
            let room = (self.room.memory - charge.memory).min(self.room.slice - charge.slice);
            (charge.within(&self.room) && room >= least).then(|| room.min(rung.footprint.mapped_bytes()))
        };
        let rung = largest(&self.request.ladder, |rung| resident(rung).is_some())?;
        let (resident_bytes, mapped_bytes) = (resident(rung)?, rung.footprint.mapped_bytes());
        let kept = Rung { footprint: rung.footprint.resident(resident_bytes), ..rung.clone() };
        let mut plan = self.assemble(&kept, gone.to_vec());
        let read_ahead_bytes = read_ahead(self.request.expert);
        plan.steps.push(Step::Stream { resident_bytes, mapped_bytes, read_ahead_bytes });
        Some(plan)
    }

    /// A plan for a model larger than memory, where part of its private memory may be in swap: at the largest
    /// context for which that part is enough and a swapfile for it has room on disk. All of `gone` have to go:
    /// whatever they hold would be read from swap again and again.
    pub(super) fn swap(&self, gone: &[usize]) -> Option<Plan> {
        let most = self.request.swap?;
        let short_of = |rung: &Rung| {
            let charge = self.charge(rung, gone);
            let short = (charge.memory - self.room.memory).max(charge.slice - self.room.slice);
            let swapped = self.swapped_for(short);
            let missing = self.swapfile(swapped, gone)?;
            let kept = Rung { footprint: rung.footprint.swapping(swapped), ..rung.clone() };
            let fits = self.charge(&kept, gone).within(&self.room);
            (fits && swapped <= most).then_some((swapped, missing))
        };
        let rung = largest(&self.request.ladder, |rung| short_of(rung).is_some())?;
        let (swapped_bytes, missing) = short_of(rung)?;
        let kept = Rung { footprint: rung.footprint.swapping(swapped_bytes), ..rung.clone() };
        let mut plan = self.assemble(&kept, gone.to_vec());
        if !missing.is_zero() {
            // Before anybody is stopped for it: a file system may refuse to hold it.
            plan.steps.insert(0, Step::AddSwap { bytes: missing });
        }
        plan.steps.push(Step::Swap { swapped_bytes });
        Some(plan)
    }

    /// What has to be swapped out for `short` to be made up for: compressed swap is filled first, and holds what it
    /// holds in memory.
    pub(super) fn swapped_for(&self, short: Bytes) -> Bytes {
        if short.is_zero() { short } else { short + self.situation.machine.swap_in_memory() }
    }

    /// The size of the swapfile that has to be made for `swapped` of the request once `gone` have stopped, zero where
    /// those in use are enough; nothing where the disk has no room for it. The margin is for making one, as far as the
    /// disk has room: it decides nothing, or the same model would run beside a file that is there and not without.
    pub(super) fn swapfile(&self, swapped: Bytes, gone: &[usize]) -> Option<Bytes> {
        let machine = self.situation.machine;
        let missing = self.swapped_beyond(swapped, gone);
        if missing.is_zero() || swapped.is_zero() {
            return Some(Bytes::ZERO);
        }
        let wanted = swapfile_bytes(missing + machine.swap_of_plans()) - machine.swap_of_plans();
        (missing <= machine.swap_room).then(|| wanted.min(machine.swap_room))
    }

    /// What the swapfiles in use can't hold of `swapped` of the request and of what stays once `gone` have stopped.
    pub(super) fn swapped_beyond(&self, swapped: Bytes, gone: &[usize]) -> Bytes {
        let staying = (0..self.names.len()).filter(|n| !gone.contains(n));
        let others: Bytes = staying.filter_map(|n| self.reservation(n)).map(|r| r.predicted.swapped).sum();
        others + swapped - self.situation.machine.swap_of_plans()
    }
}

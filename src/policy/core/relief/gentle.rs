//! The lower rungs of the ladder: what frees memory and stops nobody.

use super::{Harm, Shortage};
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{FileId, Machine, Phase, Reservation, SwapOwner, swapfile_bytes};
use crate::policy::core::{Action, Core, Effect};
use crate::policy::decision::{Level, Rescue};
use crate::policy::pressure::WAITING;

impl Core {
    /// Cold cache counts as available, so that dropping it only helps where the kernel is too slow to do it.
    pub(super) fn drop_cold_cache(
        &mut self,
        machine: &Machine,
        shortage: &Shortage,
        now: u64,
        out: &mut Vec<Action>,
    ) -> bool {
        let waits = machine.pressure.some.is_some_and(|some| some >= WAITING);
        if !waits
            || machine.memory.free >= self.rules.reserve.mul_div(1, 2)
            || shortage.level == Level::Critical
        {
            return false;
        }
        let used = |file: &FileId| {
            let mut mapped = self.holders.values().flat_map(|r| &r.predicted.mapped);
            mapped.any(|mapped| mapped.file == *file)
        };
        let cold: Vec<FileId> = machine.cached.keys().filter(|file| !used(file)).copied().collect();
        let bytes: Bytes = cold.iter().filter_map(|file| machine.cached.get(file)).copied().sum();
        if bytes < self.worthwhile() || self.was_tried(Rescue::DropCache, None) {
            return false;
        }
        let text = format!(
            "{bytes} of cold page cache is dropped: only {} is free without, and tasks wait for memory",
            machine.memory.free
        );
        self.begin_rescue(None, Rescue::DropCache, bytes, Effect::DropCache(cold), text, shortage, now, out);
        true
    }

    /// Takes memory back from an idle model that may swap, where swap has room for it.
    pub(super) fn reclaim(
        &mut self,
        machine: &Machine,
        shortage: &Shortage,
        now: u64,
        out: &mut Vec<Action>,
    ) -> bool {
        let most = self.to_calm(shortage).min(self.swap_left(machine));
        let some = |(instance, r): (&Instance, &Reservation)| {
            let bytes = most.min(r.measured.private.mul_div(1, 2));
            let may =
                self.harm(machine, instance, r, now).is_some_and(|harm| harm <= Harm::Idle) && r.may_swap;
            let worth = bytes >= self.worthwhile() && !self.was_tried(Rescue::Reclaim, Some(instance));
            (may && worth).then(|| (r.priority, std::cmp::Reverse(bytes), instance.clone()))
        };
        let Some((_, std::cmp::Reverse(bytes), instance)) = self.holders.iter().filter_map(some).min() else {
            return false;
        };
        let text =
            format!("{bytes} of {instance}, which is idle, goes into swap: {}", self.shortage_text(shortage));
        let effect = Effect::Reclaim(instance.clone(), bytes);
        self.begin_rescue(Some(instance), Rescue::Reclaim, bytes, effect, text, shortage, now, out);
        true
    }

    /// Makes a swapfile for models that may swap, where there is none with room.
    pub(super) fn add_swap(
        &mut self,
        machine: &Machine,
        shortage: &Shortage,
        now: u64,
        out: &mut Vec<Action>,
    ) -> bool {
        let wanted = self.to_calm(shortage);
        let batch = self.holders.values().filter(|r| r.may_swap && r.phase == Phase::Running);
        let could: Bytes = batch.map(|r| r.measured.private.mul_div(1, 2)).sum();
        // Few large ones rather than many small ones.
        let bytes = swapfile_bytes(wanted.max(self.rules.reserve * 2).min(could)).min(machine.swap_room);
        let useless = self.was_tried(Rescue::AddSwap, None) || self.is_retiring() || self.active.is_some();
        if useless || bytes < self.rules.reserve.mul_div(1, 2) || self.swap_left(machine) >= self.worthwhile()
        {
            return false;
        }
        let text = format!(
            "a swapfile of {bytes} is made for models that may swap: {}",
            self.shortage_text(shortage)
        );
        let effect = Effect::AddSwap(SwapOwner::Plan, bytes);
        self.begin_rescue(None, Rescue::AddSwap, bytes, effect, text, shortage, now, out);
        true
    }

    /// What swap on a disk has room for, beside what it was made for.
    fn swap_left(&self, machine: &Machine) -> Bytes {
        let promised = self.holders.values().map(|r| r.predicted.swapped - r.measured.swapped).sum();
        machine.memory.swap_free - machine.swap_in_memory() - promised
    }

    /// What has to come back for nothing to be short, and for half a minute more.
    fn to_calm(&self, shortage: &Shortage) -> Bytes {
        self.rules.reserve.mul_div(5, 4) - shortage.headroom + self.afloat.gauge.lost_within(30_000)
    }
}

//! Disks are read ahead by an expert while engines open files to stream from, and are as they were otherwise.

use std::collections::BTreeMap;

use super::{Action, ActionId, Core, Effect, Outcome, Stage};
use crate::bytes::Bytes;
use crate::ledger::{Phase, Reservation};

/// What could not be set is tried again after so long; milliseconds.
const AGAIN: u64 = 10_000;

/// What the disks were told.
#[derive(Clone, Debug, Default)]
pub(super) struct ReadAhead {
    /// By device; none where it is not known whether that was done.
    told: Option<BTreeMap<u64, Bytes>>,
    under_way: Option<ActionId>,
    not_before: u64,
}

impl Core {
    /// Has it done where it has changed, one order at a time. An engine that answers has opened its files.
    pub(super) fn read_ahead(&mut self, now: u64, out: &mut Vec<Action>) {
        let wanted = self.wanted_ahead();
        let told = self.disks.told.as_ref();
        // What nobody has told them they do not do.
        if self.disks.under_way.is_some()
            || told.map_or(wanted.is_empty() && self.disks.not_before == 0, |told| *told == wanted)
        {
            return;
        }
        if now < self.disks.not_before {
            self.wake_at(self.disks.not_before);
            return;
        }
        self.disks.under_way = Some(self.perform(Effect::ReadAhead(wanted.clone()), out));
        self.disks.told = Some(wanted);
    }

    fn wanted_ahead(&self) -> BTreeMap<u64, Bytes> {
        let limited = self.active.as_ref().filter(|active| matches!(active.stage, Stage::Limit(_)));
        let limited = limited.map(|active| &active.pending.request.instance);
        // It has its answer as soon as its limits are set.
        let opens =
            |(instance, r): &(&_, &Reservation)| r.phase == Phase::Loading || limited == Some(instance);
        let mut wanted: BTreeMap<u64, Bytes> = BTreeMap::new();
        for (_, r) in self.holders.iter().filter(opens).filter(|(_, r)| !r.read_ahead.is_zero()) {
            for mapped in &r.predicted.mapped {
                let of = wanted.entry(mapped.file.device).or_insert(r.read_ahead);
                *of = r.read_ahead.min(*of);
            }
        }
        wanted
    }

    /// Whether that was the end of it.
    pub(super) fn read_ahead_done(&mut self, id: ActionId, outcome: &Outcome, now: u64) -> bool {
        if self.disks.under_way != Some(id) {
            return false;
        }
        self.disks.under_way = None;
        if matches!(outcome, Outcome::Failed(_)) {
            (self.disks.told, self.disks.not_before) = (None, now + AGAIN);
        }
        true
    }
}

//! Bringing evicted models back when there is room again.

use super::{Action, ActionId, Core, Effect, Outcome};
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{Machine, Reservation, UnitState, unified_bytes};
use crate::policy::decision::{Decision, Kind, Verdict};
use crate::policy::plan::fits_as_is;
use crate::policy::request::{Mode, Request, Rung};

/// How long a model that was started again has until it asks; milliseconds.
const TO_ASK: u64 = 60_000;
/// How long the first failed return is waited out; it doubles with each; milliseconds.
const BACKOFF: u64 = 30_000;

/// A return under way.
#[derive(Clone, Debug)]
pub(super) struct Restoring {
    instance: Instance,
    id: ActionId,
    since: u64,
}

impl Core {
    /// Starts the most important model that is owed a return and fits as things are: at its full
    /// context, with nobody stopped for it. One at a time, each through the gate like any other.
    pub(super) fn restore(&mut self, machine: &Machine, now: u64, out: &mut Vec<Action>) {
        if let Some(restoring) = &self.restoring {
            let asked = !self.owed.iter().any(|owed| owed.instance == restoring.instance);
            if !asked && now < restoring.since + TO_ASK {
                self.wake_at(restoring.since + TO_ASK);
                return;
            }
            let instance = restoring.instance.clone();
            self.restoring = None;
            if !asked {
                self.defer(&instance, now);
            }
        }
        // Whoever is on its way to the gate comes first: after a restart of the daemon that may be the one for which
        // others were stopped.
        let busy =
            self.active.is_some() || self.is_asked() || self.is_expecting(machine) || self.is_sinking();
        if busy || machine.stopping || self.rules.mode == Mode::Observe || self.owed.is_empty() {
            return;
        }
        let mut order: Vec<usize> = (0..self.owed.len()).collect();
        order.sort_by_key(|n| std::cmp::Reverse(self.owed[*n].reservation.priority));
        for n in order {
            let owed = &self.owed[n];
            if owed.not_before > now {
                let time = owed.not_before;
                self.wake_at(time);
                continue;
            }
            // The one that it went for is to be started again after a crash, or was and has not asked yet: the list of
            // jobs may be older than its state.
            let winner = owed.for_instance.as_ref().filter(|winner| !self.holders.contains_key(winner));
            let winner = winner.and_then(|winner| machine.units.get(winner));
            if winner.is_some_and(|unit| unit.state == UnitState::Activating) {
                continue;
            }
            let running = machine.units.get(&owed.instance).is_some_and(|unit| unit.state.is_alive());
            let request = self.peaks.corrected(as_request(owed));
            let fits = !running && fits_as_is(&request, self.situation(machine, now));
            if owed.for_instance.is_none() && self.rules.ladder {
                // What headroom loses: weights that are mapped are no headroom while it runs.
                let predicted = &owed.reservation.predicted;
                let mapped = if owed.reservation.streams { Bytes::ZERO } else { predicted.mapped_bytes() };
                let takes = predicted.private + mapped + unified_bytes(machine, &predicted.gpus);
                let instance = owed.instance.clone();
                if !self.may_return(&instance, takes, fits, now) {
                    continue;
                }
            } else if !fits {
                continue;
            }
            let owed = &self.owed[n];
            let (instance, reservation) = (owed.instance.clone(), owed.reservation.clone());
            let id = self.perform(Effect::Start(instance.clone()), out);
            self.restoring = Some(Restoring { instance: instance.clone(), id, since: now });
            self.wake_at(now + TO_ASK);
            let rung = request.ladder.first().cloned().unwrap_or_default();
            let (bytes, basis) = (rung.footprint.total(), rung.basis);
            let text = format!("{instance} is started again: there is room for its {bytes}");
            let decision = Decision::of(Kind::Restore, instance, Verdict::Fits, now, text);
            self.record(Decision { context: reservation.context, bytes, basis, ..decision }, out);
            return;
        }
    }

    /// Whether somebody is on the way to the gate.
    pub(super) fn is_expecting(&self, machine: &Machine) -> bool {
        machine.starting.iter().any(|instance| !self.holders.contains_key(instance))
    }

    /// Takes in the outcome of a start; false when `id` is none of a return.
    pub(super) fn restored(&mut self, id: ActionId, outcome: &Outcome, now: u64) -> bool {
        let Some(restoring) = self.restoring.as_ref().filter(|r| r.id == id) else { return false };
        if let Outcome::Failed(_) = outcome {
            let instance = restoring.instance.clone();
            self.restoring = None;
            self.defer(&instance, now);
        }
        true
    }

    /// A return that failed is tried again later, and ever later.
    pub(super) fn defer(&mut self, instance: &Instance, now: u64) {
        for owed in self.owed.iter_mut().filter(|owed| owed.instance == *instance) {
            owed.not_before = now + (BACKOFF << owed.attempts.min(6));
            owed.attempts = owed.attempts.saturating_add(1);
        }
    }
}

/// What one that is stopped is owed.
pub(super) fn as_owed(instance: &Instance, reservation: &Reservation) -> Reservation {
    let mut owed = reservation.clone();
    if instance.is_foreign() {
        // It comes back without asking, so there has to be room for all of it.
        owed.predicted = owed.held();
        owed.reload = owed.reload.max(owed.predicted.total());
    }
    owed
}

fn as_request(owed: &super::Owed) -> Request {
    let r = &owed.reservation;
    Request {
        priority: r.priority,
        pinned: r.pinned,
        ladder: vec![Rung { context: r.context, footprint: r.predicted.clone(), basis: r.basis.clone() }],
        ttl: r.ttl,
        reload: r.reload,
        drain: r.drain,
        may_swap: r.may_swap,
        ..Request::of(owed.instance.clone())
    }
}

//! Whether a model is in use, and time for it to finish what it is doing.
//!
//! An engine is asked only where it matters: once when it has loaded, before one is chosen to go, at the end of a time
//! to live, and while it finishes its last requests. In between its CPU time tells, which is also all there is of an
//! engine that does not say.

use std::collections::{BTreeMap, BTreeSet};

use super::{Action, ActionId, Active, Core, Effect, Stage};
use crate::config::Instance;
use crate::ledger::{Machine, Phase, Reservation, Unit};
use crate::policy::plan::StopReason;
use crate::policy::request::Request;

/// CPU time above this share (one in so many) is taken for serving requests: an idle llama-server
/// uses next to none.
const BUSY_SHARE: u64 = 300;
/// For how long what an engine said is good enough to decide on; milliseconds.
const FRESH: u64 = 5000;
/// How often one that finishes its requests is asked; milliseconds.
pub(super) const DRAIN_STEP: u64 = 700;

/// What is known of a unit's use.
#[derive(Clone, Copy, Debug)]
pub(super) struct Activity {
    cpu_usec: u64,
    /// When that was read; milliseconds since boot.
    at: u64,
    /// The mark of the engine's last answer.
    mark: Option<u64>,
    /// When it was asked last, whatever came of it; milliseconds since boot.
    asked: Option<u64>,
}

impl Core {
    /// Has the engines of these models asked, but for those that were just now; none where all were.
    pub(super) fn look(
        &mut self,
        of: impl IntoIterator<Item = Instance>,
        now: u64,
        out: &mut Vec<Action>,
    ) -> Option<ActionId> {
        let stale: BTreeSet<Instance> =
            of.into_iter().filter(|instance| !self.is_fresh(instance, now)).collect();
        if stale.is_empty() { None } else { Some(self.ask_engines(stale, out)) }
    }

    pub(super) fn ask_engines(&mut self, of: BTreeSet<Instance>, out: &mut Vec<Action>) -> ActionId {
        let id = self.perform(Effect::AskActivity(of.clone()), out);
        self.looks.insert(id, of);
        id
    }

    /// Takes in the end of a look; false when `id` is none.
    pub(super) fn looked(&mut self, id: ActionId, now: u64) -> bool {
        let Some(of) = self.looks.remove(&id) else { return false };
        self.heard(&of, now);
        if let Some(active) =
            self.active.as_mut().filter(|a| matches!(a.stage, Stage::Look(waited) if waited == id))
        {
            active.stage = Stage::Plan;
        }
        true
    }

    /// Whether what an engine said, or did not, is good enough to decide on.
    pub(super) fn is_fresh(&self, instance: &Instance, now: u64) -> bool {
        let asked = self.activity.get(instance).and_then(|activity| activity.asked);
        asked.is_some_and(|asked| now < asked + FRESH)
    }

    /// The models of whose use nothing is known that is good enough to be shown.
    #[must_use]
    pub fn unheard(&self, now: u64) -> BTreeSet<Instance> {
        let running = self.holders.iter().filter(|(_, r)| r.phase == Phase::Running);
        running
            .map(|(instance, _)| instance)
            .filter(|instance| !instance.lease && !self.is_fresh(instance, now))
            .cloned()
            .collect()
    }

    /// These were asked just now, whatever came of it.
    pub(super) fn heard(&mut self, of: &BTreeSet<Instance>, now: u64) {
        for (_, activity) in self.activity.iter_mut().filter(|(instance, _)| of.contains(instance)) {
            activity.asked = Some(now);
        }
    }

    /// Asks those that have just loaded, or were found running: what they say next is compared with it.
    pub(super) fn introduce(&mut self, now: u64, out: &mut Vec<Action>) {
        let known = |instance: &Instance| {
            self.activity.get(instance).is_none_or(|activity| activity.asked.is_some())
                || self.looks.values().any(|of| of.contains(instance))
        };
        let running = self.holders.iter().filter(|(_, r)| r.phase == Phase::Running);
        let new: BTreeSet<Instance> =
            running.map(|(i, _)| i).filter(|i| !i.lease && !known(i)).cloned().collect();
        self.look(new, now, out);
    }

    /// Those of which one may have to go for `request`.
    pub(super) fn may_go(&self, request: &Request, now: u64) -> Vec<Instance> {
        let may = |(instance, r): &(&Instance, &Reservation)| {
            let yields = !r.pinned && r.priority <= request.priority;
            r.phase == Phase::Running && **instance != request.instance && (yields || r.expired(now))
        };
        self.holders.iter().filter(may).map(|(instance, _)| instance.clone()).collect()
    }

    /// Whether `victim` is given time, or more of it, to finish its requests before it is stopped for `active`. It is
    /// announced first, so that clients can stop sending.
    pub(super) fn drains(
        &mut self,
        active: &mut Active,
        victim: &Instance,
        reason: StopReason,
        machine: &Machine,
        now: u64,
        out: &mut Vec<Action>,
    ) -> bool {
        let drain = self.holders.get(victim).map_or(0, |r| r.drain);
        let requests = machine.units.get(victim).map_or(0, Unit::in_flight);
        if reason == StopReason::Named || drain == 0 || requests == 0 {
            return false;
        }
        let announced = active.pending.request.finishing.get(victim).copied();
        let deadline = announced.unwrap_or(now + drain);
        if now >= deadline {
            return false;
        }
        if announced.is_none() {
            active.pending.request.finishing.insert(victim.clone(), deadline);
            let for_instance = Some(active.pending.request.instance.clone());
            out.push(Action::AboutToEvict { instance: victim.clone(), for_instance, deadline });
        }
        let requests = if requests == 1 { "1 request".to_owned() } else { format!("{requests} requests") };
        let text = format!("waiting for {victim} to finish {requests}, {} s at most", drain.div_ceil(1000));
        if active.pending.told != text {
            self.say(active, text, out);
        }
        let until = deadline.min(now + DRAIN_STEP);
        self.wake_at(until);
        active.stage = Stage::Drain { instance: victim.clone(), until };
        true
    }

    /// Asks one that finishes its requests how far it is, once it is time.
    pub(super) fn drained(&mut self, mut active: Active, now: u64, out: &mut Vec<Action>) {
        if let Stage::Drain { instance, until } = &active.stage {
            if now < *until {
                self.wake_at(*until);
            } else {
                let of = BTreeSet::from([instance.clone()]);
                active.stage = Stage::Look(self.ask_engines(of, out));
            }
        }
        self.active = Some(active);
    }
}

/// Takes over what the unit's reading says of its use.
pub(super) fn note(
    activity: &mut BTreeMap<Instance, Activity>,
    instance: &Instance,
    unit: &Unit,
    reservation: &mut Reservation,
    now: u64,
) {
    let Some(last) = activity.get_mut(instance) else {
        let sample = Activity { cpu_usec: unit.cpu_usec, at: now, mark: None, asked: None };
        activity.insert(instance.clone(), sample);
        // First seen, or seen again after a restart of the daemon: its idle time begins anew.
        reservation.last_used = reservation.last_used.max(now);
        return;
    };
    if let Some(busy) = unit.busy
        && last.asked.is_none_or(|asked| asked < busy.at)
    {
        let other = last.mark.is_some_and(|mark| mark != busy.mark);
        if busy.requests > 0 || other {
            reservation.last_used = reservation.last_used.max(busy.at);
        }
        last.mark = Some(busy.mark);
        last.asked = Some(busy.at);
    }
    let elapsed = now.saturating_sub(last.at);
    if elapsed < 1000 {
        return;
    }
    let used = unit.cpu_usec.saturating_sub(last.cpu_usec);
    if used.saturating_mul(BUSY_SHARE) > elapsed.saturating_mul(1000) {
        reservation.last_used = now;
    }
    (last.cpu_usec, last.at) = (unit.cpu_usec, now);
}

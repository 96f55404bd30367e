//! The upper rungs of the ladder: who goes, with how much time to finish, and what is owed to it.

use std::collections::BTreeSet;

use super::{BACKOFF, FORGIVEN, Harm, IDLE, KEPT_OFF, STAY, Shortage};
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{Machine, Phase, Reservation};
use crate::policy::core::activity::DRAIN_STEP;
use crate::policy::core::restore::as_owed;
use crate::policy::core::{Action, Core, Effect, Owed};
use crate::policy::decision::{Level, Rescue};
use crate::policy::evict::{Candidate, Use, choose};
use crate::policy::pressure::{REACT, STOP, gain};
use crate::policy::request::Mode;

impl Core {
    /// Who goes: the least harmful kind of which some suffice, and of it as few and as unimportant ones as possible.
    /// Where nobody suffices, the least harmful one is a beginning.
    pub(super) fn victim(
        &self,
        machine: &Machine,
        shortage: &Shortage,
        needed: Bytes,
        nothing_comes: bool,
        now: u64,
    ) -> Option<(Instance, Harm)> {
        let danger = shortage.level == Level::Critical;
        let worth = |instance: &Instance| {
            let freed = gain(machine, &self.holders, shortage.pool, &[instance]);
            let stuck = self.was_tried(Rescue::Stop, Some(instance)) && !danger;
            freed >= self.worthwhile() && !stuck && !self.was_tried(Rescue::Kill, Some(instance))
        };
        let all: Vec<(&Instance, &Reservation, Harm)> = self
            .holders
            .iter()
            .filter_map(|(instance, r)| Some((instance, r, self.harm(machine, instance, r, now)?)))
            .filter(|(instance, ..)| worth(instance))
            .collect();
        let candidate = |n: usize| {
            let (instance, r, harm) = all[n];
            let stalled = machine.units.get(instance).and_then(|unit| unit.stalled);
            // One that only waits for its own memory is of little use to anybody.
            let last_used = if stalled.is_some_and(|stalled| stalled >= 500) { 0 } else { r.last_used };
            let usage = if harm == Harm::Busy { Use::Busy } else { Use::Idle };
            Candidate { holder: n, priority: r.priority, usage, reload: r.reload, last_used }
        };
        let frees = |gone: &[usize]| {
            let names: Vec<&Instance> = gone.iter().map(|n| all[*n].0).collect();
            gain(machine, &self.holders, shortage.pool, &names)
        };
        let most = if danger { Harm::JustLoaded } else { Harm::Busy };
        let mut first = None;
        for kind in [Harm::Expired, Harm::Idle, Harm::Busy, Harm::JustLoaded] {
            let of: Vec<Candidate> =
                (0..all.len()).filter(|n| all[*n].2 <= kind && kind <= most).map(candidate).collect();
            // What is not worth a stop is not worth a more important one either: of models of one size one always frees
            // some pages more. Half of it is left for what does not come back, or the rest would cost another one.
            let spare = self.worthwhile().mul_div(1, 2);
            let enough = |gone: &[usize]| frees(gone) + spare >= needed;
            if let Some(chosen) = choose(&of, enough, |n| frees(&[n])) {
                return chosen.first().map(|n| (all[*n].0.clone(), all[*n].2));
            }
            first = first.or_else(|| {
                let least = of.iter().min_by_key(|c| (c.priority, c.reload, c.last_used))?;
                Some((all[least.holder].0.clone(), all[least.holder].2))
            });
        }
        // The last resort, and never while memory of another one is still to come.
        let pinned = || {
            let of = (0..all.len()).filter(|n| all[*n].2 == Harm::Pinned && danger).map(candidate);
            let least = of.min_by_key(|c| (c.priority, c.reload, c.last_used))?;
            Some((all[least.holder].0.clone(), Harm::Pinned))
        };
        first.or_else(|| if nothing_comes { pinned() } else { None })
    }

    /// What stopping one would be; none where it can't be stopped.
    pub(super) fn harm(
        &self,
        machine: &Machine,
        instance: &Instance,
        r: &Reservation,
        now: u64,
    ) -> Option<Harm> {
        let said =
            machine.units.get(instance).and_then(|unit| unit.busy).filter(|_| self.is_fresh(instance, now));
        let busy = said.map_or(now < r.last_used + IDLE, |busy| busy.requests > 0);
        match r.phase {
            // What a lease is for is nobody's to stop here.
            _ if instance.lease => None,
            Phase::Preparing | Phase::Stopping => None,
            Phase::Loading | Phase::Running if r.pinned => Some(Harm::Pinned),
            Phase::Loading => Some(Harm::JustLoaded),
            Phase::Running if r.expired(now) => Some(Harm::Expired),
            Phase::Running if now < r.ready + STAY => Some(Harm::JustLoaded),
            Phase::Running if busy => Some(Harm::Busy),
            Phase::Running => Some(Harm::Idle),
        }
    }

    /// Has the engines asked before anybody is chosen for what they are doing, and waits for their answers, or for one to
    /// finish its requests, as long as there is time for it.
    pub(super) fn drains_or_asks(
        &mut self,
        machine: &Machine,
        shortage: &Shortage,
        now: u64,
        out: &mut Vec<Action>,
    ) -> bool {
        let hurry = self.is_in_a_hurry(shortage);
        if let Some((instance, deadline, asked)) = self.afloat.draining.clone() {
            let works = machine.units.get(&instance).is_some_and(|unit| unit.in_flight() > 0);
            if !hurry && works && now < deadline {
                if now >= asked + DRAIN_STEP {
                    self.ask_engines(BTreeSet::from([instance.clone()]), out);
                    self.afloat.draining = Some((instance, deadline, now));
                }
                return true;
            }
            // It is chosen again, unless another one will do now.
            if works && now < deadline {
                self.afloat.draining = None;
            }
        }
        let running = self.holders.iter().filter(|(i, r)| r.phase == Phase::Running && !i.lease);
        let stale: Vec<Instance> =
            running.map(|(instance, _)| instance).filter(|i| !self.is_fresh(i, now)).cloned().collect();
        let unasked: Vec<Instance> =
            stale.iter().filter(|i| !self.looks.values().any(|of| of.contains(i))).cloned().collect();
        self.look(unasked, now, out);
        !hurry && !stale.is_empty()
    }

    /// Whether there is no time for anybody's answer, or to finish requests: the machine is near the danger that
    /// [`pressure::level`](crate::policy::pressure::level) judges by available memory too.
    fn is_in_a_hurry(&self, shortage: &Shortage) -> bool {
        let gauge = &self.afloat.gauge;
        let near = self.rules.reserve.mul_div(1, 4) + gauge.lost_within(STOP / 4);
        shortage.level == Level::Critical || gauge.available < near
    }

    /// Whether a busy model is given time to finish its requests before it is stopped.
    pub(super) fn drain(
        &mut self,
        instance: &Instance,
        machine: &Machine,
        shortage: &Shortage,
        now: u64,
        out: &mut Vec<Action>,
    ) -> bool {
        let drain = self.holders.get(instance).map_or(0, |r| r.drain);
        let works = machine.units.get(instance).is_some_and(|unit| unit.in_flight() > 0);
        let drained = self.afloat.draining.as_ref().is_some_and(|(of, ..)| of == instance);
        if !works || drain == 0 || drained || self.is_in_a_hurry(shortage) || self.rules.mode == Mode::Observe
        {
            self.afloat.draining = None;
            return false;
        }
        let deadline = now + drain;
        out.push(Action::AboutToEvict { instance: instance.clone(), for_instance: None, deadline });
        self.afloat.draining = Some((instance.clone(), deadline, now));
        true
    }

    pub(super) fn stop(
        &mut self,
        instance: Instance,
        harm: Harm,
        machine: &Machine,
        shortage: &Shortage,
        now: u64,
        out: &mut Vec<Action>,
    ) {
        let gauge = self.afloat.gauge;
        // A stop would not be in time.
        let at_once = shortage.level == Level::Critical && gauge.is_gone_within(STOP + REACT);
        let rescue = match harm {
            _ if at_once => Rescue::Kill,
            Harm::Expired => Rescue::Expire,
            _ => Rescue::Stop,
        };
        let what = match harm {
            Harm::Expired => "idle past its ttl",
            Harm::Idle => "idle",
            Harm::Busy => "busy, for no idle one is enough",
            Harm::JustLoaded => "just loaded, for nothing else is left",
            Harm::Pinned => "pinned, for nothing else is left",
        };
        let expected = gain(machine, &self.holders, shortage.pool, &[&instance]);
        let verb = if rescue == Rescue::Kill { "killed" } else { "stopped" };
        let mut text = format!(
            "{instance} ({what}) is {verb} to keep the machine afloat: {}, it frees {expected} of the {} needed",
            self.shortage_text(shortage),
            shortage.needed
        );
        if let Some((eater, holds)) = &machine.eater {
            text.push_str(&format!("; {eater} grows the most and holds {holds}"));
        }
        self.take_away(instance, rescue, expected, text, machine, shortage, now, out);
    }

    /// Stops or kills a model, which is then owed a return.
    #[expect(clippy::too_many_arguments, reason = "one decision with its numbers")]
    pub(in crate::policy::core) fn take_away(
        &mut self,
        instance: Instance,
        rescue: Rescue,
        expected: Bytes,
        text: String,
        machine: &Machine,
        shortage: &Shortage,
        now: u64,
        out: &mut Vec<Action>,
    ) {
        let effect = match rescue {
            Rescue::Kill => Effect::Kill(instance.clone()),
            _ => Effect::Stop(instance.clone()),
        };
        if self.rules.mode == Mode::Enforce {
            if rescue == Rescue::Kill {
                self.owe_killed(&instance, now);
            } else {
                self.owe(&instance, rescue, now);
                let announced =
                    Action::AboutToEvict { instance: instance.clone(), for_instance: None, deadline: now };
                out.push(announced);
            }
        }
        let held = self.holders.get(&instance).map(|r| r.measured.gpus.clone()).unwrap_or_default();
        let gpus = machine.gpus.iter().map(|gpu| gpu.used).zip(held).collect();
        self.begin_rescue(Some(instance), rescue, expected, effect, text, shortage, now, out);
        if let Some(under_way) = &mut self.afloat.under_way {
            under_way.gpus = gpus;
        }
    }

    /// One that is killed is owed a return, and kept off for a while: Restart= would have it back at once.
    pub(in crate::policy::core) fn owe_killed(&mut self, instance: &Instance, now: u64) {
        self.owe(instance, Rescue::Kill, now);
        self.afloat.killed.insert(instance.clone(), now + KEPT_OFF);
    }

    pub(super) fn owe(&mut self, instance: &Instance, rescue: Rescue, now: u64) {
        let Some(reservation) = self.holders.get_mut(instance) else { return };
        let was = reservation.phase;
        let owed = as_owed(instance, reservation);
        reservation.phase = Phase::Stopping;
        // Whoever was going anyway is owed what it was owed before.
        if was == Phase::Stopping || rescue == Rescue::Expire || owed.expired(now) {
            return;
        }
        let (count, last) = self.afloat.stops.get(instance).copied().unwrap_or_default();
        let count = if now.saturating_sub(last) < FORGIVEN { count } else { 0 };
        self.afloat.stops.insert(instance.clone(), (count.saturating_add(1), now));
        self.owed.retain(|owed| owed.instance != *instance);
        self.owed.push(Owed {
            instance: instance.clone(),
            for_instance: None,
            reservation: owed,
            attempts: 0,
            not_before: now + (BACKOFF << count.min(6)),
        });
    }
}

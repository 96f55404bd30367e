//! The steps of a plan: each is begun, waited for, and the machine is read again.

use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{Machine, PerPool, Phase, SwapOwner, capacity};
use crate::policy::core::restore::as_owed;
use crate::policy::core::{Action, Active, Core, Effect, Leak, Owed, Stage};
use crate::policy::decision::{Decision, Kind, Verdict};
use crate::policy::limits::limits;
use crate::policy::plan::{Plan, Step, StopReason};

/// How long the memory of a stopped model may take to come back; milliseconds.
const SETTLE: u64 = 10_000;
/// How often the machine is looked at meanwhile; milliseconds.
const SETTLE_STEP: u64 = 100;

impl Core {
    pub(super) fn begin(
        &mut self,
        mut active: Active,
        step: Step,
        machine: &Machine,
        now: u64,
        out: &mut Vec<Action>,
    ) {
        let instance = active.pending.request.instance.clone();
        match &step {
            Step::DropCache { files, frees_bytes } => {
                let text = format!("dropping {frees_bytes} of cold page cache");
                self.say(&mut active, text, out);
                active.stage = Stage::Effect(self.perform(Effect::DropCache(files.clone()), out));
            }
            Step::DropAllCache { .. } => {
                self.say(&mut active, step.to_string(), out);
                active.stage = Stage::Effect(self.perform(Effect::DropAllCache, out));
            }
            Step::Compact { .. } => {
                self.say(&mut active, step.to_string(), out);
                active.stage = Stage::Effect(self.perform(Effect::Compact, out));
            }
            Step::Stop { instance: victim, reason, frees_bytes } => {
                if self.drains(&mut active, victim, *reason, machine, now, out) {
                    self.active = Some(active);
                    return;
                }
                if *reason != StopReason::Expired && !active.pending.request.finishing.contains_key(victim) {
                    let (instance, for_instance) = (victim.clone(), Some(instance.clone()));
                    out.push(Action::AboutToEvict { instance, for_instance, deadline: now });
                }
                let text = format!("stopping {victim}, which frees {frees_bytes}");
                self.say(&mut active, text, out);
                let room = capacity(machine, self.rules.reserve, &self.holders);
                self.let_go(victim, *reason, *frees_bytes, &instance, now, out);
                let id = self.perform(Effect::Stop(victim.clone()), out);
                active.stage = Stage::Stop { id, instance: victim.clone(), frees: *frees_bytes, room };
            }
            Step::AddSwap { bytes } => {
                // Two are enough: what is made and does not show, or is short again, is no help.
                if active.steps.iter().filter(|step| matches!(step, Step::AddSwap { .. })).count() == 2 {
                    active.pending.request.swap = None;
                    active.pending.request.no_swapfile =
                        Some("two swapfiles were made for it, and are not enough".to_owned());
                    self.active = Some(active);
                    return;
                }
                let text = format!("making a swapfile of {bytes}");
                self.say(&mut active, text, out);
                active.stage = Stage::Effect(self.perform(Effect::AddSwap(SwapOwner::Plan, *bytes), out));
            }
            Step::ReduceContext { .. } | Step::Stream { .. } | Step::Swap { .. } => {}
        }
        active.steps.push(step);
        self.active = Some(active);
    }

    pub(in crate::policy::core) fn say(&mut self, active: &mut Active, text: String, out: &mut Vec<Action>) {
        active.pending.told.clone_from(&text);
        out.push(Action::Progress { instance: active.pending.request.instance.clone(), text });
    }

    /// Marks a model as going, and as owed a return unless its own time was up.
    fn let_go(
        &mut self,
        victim: &Instance,
        reason: StopReason,
        frees: Bytes,
        for_instance: &Instance,
        now: u64,
        out: &mut Vec<Action>,
    ) {
        let Some(reservation) = self.holders.get_mut(victim) else { return };
        let owed = as_owed(victim, reservation);
        reservation.phase = Phase::Stopping;
        let (kind, why) = match reason {
            StopReason::Expired => (Kind::Expire, "idle past its ttl"),
            StopReason::Evicted => (Kind::Evict, "of lower priority"),
            StopReason::Replaced => (Kind::Evict, "idle and of the same priority"),
            StopReason::Named => (Kind::Evict, "named to go"),
        };
        if kind == Kind::Evict {
            self.owed.retain(|owed| owed.instance != *victim);
            self.owed.push(Owed {
                instance: victim.clone(),
                for_instance: Some(for_instance.clone()),
                reservation: owed.clone(),
                attempts: 0,
                not_before: 0,
            });
        }
        let text = format!("{victim} is stopped for {for_instance}: {why}, frees {frees}");
        let decision = Decision {
            for_instance: Some(for_instance.clone()),
            context: owed.context,
            bytes: frees,
            ..Decision::of(kind, victim.clone(), Verdict::FitsAfter, now, text)
        };
        self.record(decision, out);
    }

    /// Whether the memory of the stopped model is back, or has been waited for long enough; then the
    /// request is planned anew.
    pub(super) fn settle(
        &mut self,
        mut active: Active,
        machine: &Machine,
        now: u64,
        out: &mut Vec<Action>,
    ) -> bool {
        let Stage::Settle { instance, frees, room, since } = &active.stage else { return true };
        let gone = !self.holders.contains_key(instance);
        let room_now = capacity(machine, self.rules.reserve, &self.holders);
        let tolerance = frees.mul_div(1, 20).max(Bytes::mib(64));
        let missing: Vec<_> = missing(room, &room_now).filter(|(_, bytes)| *bytes > tolerance).collect();
        if gone && missing.is_empty() {
            active.stage = Stage::Plan;
            self.active = Some(active);
            return true;
        }
        if now < since + SETTLE {
            self.wake_at(now + SETTLE_STEP);
            self.active = Some(active);
            return false;
        }
        let instance = instance.clone();
        if !gone {
            active.pending.request.stuck.insert(instance.clone());
        }
        for (pool, bytes) in missing.into_iter().filter(|_| gone) {
            self.leaks.push(Leak { instance: instance.clone(), pool, bytes, since: now });
            let text = format!("{instance} was stopped but {bytes} of its memory did not come back");
            let decision = Decision::of(Kind::Quarantine, instance.clone(), Verdict::FitsAfter, now, text);
            let for_instance = Some(active.pending.request.instance.clone());
            self.record(Decision { for_instance, bytes, ..decision }, out);
        }
        active.stage = Stage::Plan;
        self.active = Some(active);
        true
    }

    pub(super) fn limit(
        &mut self,
        mut active: Active,
        plan: &Plan,
        machine: &Machine,
        now: u64,
        out: &mut Vec<Action>,
    ) {
        let request = &active.pending.request;
        let rung = &plan.rung;
        active.steps.extend(plan.steps.iter().filter(|step| step.is_setting()).cloned());
        if rung.footprint.total().is_zero() || request.instance.lease {
            // Forced with an unknown size, there is nothing to limit it to; and a lease has no unit.
            self.admit(active, now, out);
            return;
        }
        let streams = plan.steps.iter().any(|step| matches!(step, Step::Stream { .. }));
        let mut wanted = limits(&rung.footprint, request.may_swap, streams);
        if let Some(unit) = machine.units.get(&request.instance)
            && let Some(admin) = unit.admin_limit
        {
            wanted.max = wanted.max.min(admin);
            wanted.high = wanted.high.min(admin);
        }
        let effect = Effect::Limit(request.instance.clone(), wanted);
        active.stage = Stage::Limit(self.perform(effect, out));
        self.active = Some(active);
    }
}

/// What each pool lost between two readings of the room for models.
fn missing<'a>(
    before: &'a PerPool,
    now: &'a PerPool,
) -> impl Iterator<Item = (crate::ledger::Pool, Bytes)> + 'a {
    before.pairs(now).map(|(pool, before, now)| (pool, before - now))
}

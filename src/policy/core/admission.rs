//! Carrying out requests, one at a time, the highest priority first.

use super::{Action, ActionId, Active, Core, Effect, Leak, Outcome, Owed, Pending, Stage};
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{Basis, Machine, PerPool, Phase, SwapOwner, capacity};
use crate::policy::decision::{Decision, Kind, Verdict};
use crate::policy::limits::limits;
use crate::policy::plan::{Plan, Planned, Step, StopReason, accounts, plan, refusal_of};
use crate::policy::refusal::{Refusal, RefusalKind};
use crate::policy::request::{Mode, Patience, Request};

/// How long a request is held back for one of higher priority that systemd has queued but that has
/// not asked yet; milliseconds. At boot all ask within seconds of each other.
const HOLD: u64 = 30_000;
/// How long a request waits for others to finish loading or stopping; milliseconds.
const PATIENCE: u64 = 20 * 60 * 1000;
/// After so many failed loads in a row nobody is stopped for one more, unless a person starts it.
const FAILED_LOADS: u32 = 3;
/// How often it is looked whether there is room for those who wait for it; milliseconds.
const ROOM_STEP: u64 = 5_000;
/// How long the memory of a stopped model may take to come back; milliseconds.
const SETTLE: u64 = 10_000;
/// How often the machine is looked at meanwhile; milliseconds.
const SETTLE_STEP: u64 = 100;

impl Core {
    pub(super) fn ask(&mut self, ticket: u64, request: Request, now: u64, out: &mut Vec<Action>) {
        let same = |p: &Pending| {
            p.request.instance == request.instance && p.request.invocation == request.invocation
        };
        if let Some(active) = self.active.as_mut().filter(|active| same(&active.pending)) {
            active.pending.ticket = ticket;
            return;
        }
        let granted = self
            .holders
            .get(&request.instance)
            .filter(|r| r.invocation == request.invocation && r.phase != Phase::Preparing);
        if let Some(reservation) = granted {
            out.push(Action::Answer { ticket, answer: Ok(reservation.context) });
            return;
        }
        if request.explicit {
            self.failed_loads.remove(&request.instance);
        }
        self.pending.retain(|p| p.request.instance != request.instance);
        self.pending.push(Pending { ticket, request, arrived: now, told: String::new() });
    }

    pub(super) fn done(&mut self, id: ActionId, outcome: Outcome, now: u64, out: &mut Vec<Action>) {
        if let Some(instance) = self.expiring.remove(&id) {
            self.unstoppable(&instance, &outcome);
            return;
        }
        if self.looked(id, now)
            || self.relieved(id, &outcome, now)
            || self.restored(id, &outcome, now)
            || self.retired(id, &outcome, now)
        {
            return;
        }
        let Some(active) = self.active.as_mut() else { return };
        active.stage = match std::mem::replace(&mut active.stage, Stage::Plan) {
            Stage::Effect(waited) if waited == id => {
                if let (Some(Step::AddSwap { .. }), Outcome::Failed(why)) = (active.steps.last(), outcome) {
                    active.pending.request.swap = None;
                    active.pending.request.no_swapfile = Some(why);
                }
                Stage::Plan
            }
            Stage::Stop { id: waited, instance, frees, room } if waited == id => match &outcome {
                Outcome::Done => Stage::Settle { instance, frees, room, since: now },
                Outcome::Failed(_) => {
                    active.pending.request.stuck.insert(instance.clone());
                    self.owed.retain(|owed| owed.instance != instance);
                    self.unstoppable(&instance, &outcome);
                    return;
                }
            },
            Stage::Limit(waited) if waited == id => {
                // Limits are a second line of defence: without them the reservation still holds.
                if let Some(active) = self.active.take() {
                    self.admit(active, now, out);
                }
                return;
            }
            other => other,
        };
    }

    /// A model that could not be stopped goes on running, and is charged for as before.
    pub(super) fn unstoppable(&mut self, instance: &Instance, outcome: &Outcome) {
        if matches!(outcome, Outcome::Failed(_))
            && let Some(reservation) = self.holders.get_mut(instance)
            && reservation.phase == Phase::Stopping
        {
            reservation.phase = Phase::Running;
        }
    }

    /// Goes on with the active request, or takes the next one, until something has to be waited for.
    pub(super) fn proceed(&mut self, machine: &Machine, now: u64, out: &mut Vec<Action>) {
        if let Some(active) = self.active.as_mut().filter(|active| matches!(active.stage, Stage::Others)) {
            active.stage = Stage::Plan;
        }
        loop {
            let Some(active) = self.active.take().or_else(|| self.next(machine, now, out)) else { return };
            match active.stage {
                Stage::Plan => self.plan_next(active, machine, now, out),
                Stage::Settle { .. } => {
                    if !self.settle(active, machine, now, out) {
                        return;
                    }
                }
                Stage::Drain { .. } => {
                    self.drained(active, now, out);
                    return;
                }
                Stage::Look(_) | Stage::Effect(_) | Stage::Stop { .. } | Stage::Limit(_) | Stage::Others => {
                    self.active = Some(active);
                    return;
                }
            }
            if self.active.as_ref().is_some_and(|a| !matches!(a.stage, Stage::Plan | Stage::Settle { .. })) {
                return;
            }
        }
    }

    /// The pending request whose turn it is, unless it has to be held back.
    fn next(&mut self, machine: &Machine, now: u64, out: &mut Vec<Action>) -> Option<Active> {
        self.pending.sort_by_key(|p| (std::cmp::Reverse(p.request.priority), p.arrived));
        let at = self.turn(machine, now, out)?;
        let first = self.pending.get(at)?;
        let priority = first.request.priority;
        let held_until = first.arrived + HOLD;
        let expected = machine.starting.iter().find(|instance| {
            let above = self.priorities.get(&instance.model).is_some_and(|p| *p > priority);
            above
                && !self.holders.contains_key(*instance)
                && !self.pending.iter().any(|p| p.request.instance == **instance)
                // One that was refused has a start job until systemd has noticed its end.
                && !self.refused_since(instance, first.arrived.saturating_sub(HOLD))
        });
        if now < held_until
            && let Some(expected) = expected.cloned()
        {
            self.wake_at(held_until);
            self.tell(at, format!("waiting: {expected} has a higher priority and is starting too"), out);
            return None;
        }
        if self.is_retiring() && first.request.swap.is_some() {
            self.tell(at, "waiting: a swapfile that nobody needed is being removed".to_owned(), out);
            return None;
        }
        match plan(&first.request, self.situation(machine, now)) {
            Planned::Wait(wait) if now < deadline(first) => {
                self.wake_at(deadline(first).min(now + PATIENCE));
                let text = self.waits_for(&wait.on);
                self.tell(at, text, out);
                None
            }
            _ => Some(Active {
                pending: self.pending.remove(at),
                steps: Vec::new(),
                pools: Vec::new(),
                stage: Stage::Plan,
            }),
        }
    }

    /// The place of the request whose turn it is: the first that does not wait for room, which others may have
    /// before it does.
    fn turn(&mut self, machine: &Machine, now: u64, out: &mut Vec<Action>) -> Option<usize> {
        for at in 0..self.pending.len() {
            let request = &self.pending.get(at)?.request;
            if request.patience != Patience::Room || self.rules.mode == Mode::Observe {
                return Some(at);
            }
            let Planned::Refuse(refusal) = plan(request, self.situation(machine, now)) else {
                return Some(at);
            };
            if !may_come(&refusal) {
                return Some(at);
            }
            self.wake_at(now + ROOM_STEP);
            self.tell(at, format!("waiting for room: {} short", refusal.short_bytes), out);
        }
        None
    }

    /// Whether somebody has asked for more than to be told when there is room.
    pub(super) fn is_asked(&self) -> bool {
        self.pending.iter().any(|pending| pending.request.patience != Patience::Room)
    }

    /// What a wait is told as.
    fn waits_for(&self, on: &[Instance]) -> String {
        let on: Vec<String> = on
            .iter()
            .map(|i| match self.holders.get(i).map(|r| r.phase) {
                Some(Phase::Stopping) => format!("{i} is stopping"),
                _ => format!("{i} is still loading"),
            })
            .collect();
        format!("waiting: {}", on.join(", "))
    }

    fn refused_since(&self, instance: &Instance, since: u64) -> bool {
        let last = self.decisions.iter().rev().find(|d| d.instance.as_ref() == Some(instance));
        last.is_some_and(|d| d.kind == Kind::Refuse && d.at_msec >= since)
    }

    fn tell(&mut self, pending: usize, text: String, out: &mut Vec<Action>) {
        if let Some(pending) = self.pending.get_mut(pending)
            && pending.told != text
        {
            pending.told.clone_from(&text);
            out.push(Action::Progress { instance: pending.request.instance.clone(), text });
        }
    }

    /// Plans anew from the machine as it is now, and begins the first step.
    fn plan_next(&mut self, mut active: Active, machine: &Machine, now: u64, out: &mut Vec<Action>) {
        let situation = self.situation(machine, now);
        let planned = plan(&active.pending.request, situation);
        if active.pools.is_empty() {
            active.pools = accounts(&active.pending.request, &planned, situation);
        }
        if self.rules.mode == Mode::Observe {
            self.observe(active, &planned, now, out);
            return;
        }
        if self.is_kept_off(&active.pending.request.instance, now) && !active.pending.request.force {
            let mut refusal = refusal_of(&active.pending.request, self.situation(machine, now));
            refusal.kind = RefusalKind::Killed;
            refusal.advice = format!("plimsoll load {} --force", refusal.instance);
            self.refuse(active, Box::new(refusal), now, out);
            return;
        }
        match planned {
            Planned::Admit(plan) if self.is_in_vain(&active.pending.request, &plan) => {
                let mut refusal = refusal_of(&active.pending.request, self.situation(machine, now));
                let failed = self.failed_loads.get(&active.pending.request.instance);
                refusal.kind = RefusalKind::FailsToLoad(failed.copied().unwrap_or_default());
                self.refuse(active, Box::new(refusal), now, out);
            }
            Planned::Admit(plan) => {
                let done = |step: &Step| active.steps.iter().any(|done| step.is_done_by(done));
                let next = plan.steps.iter().find(|step| !step.is_setting() && !done(step)).cloned();
                self.reserve(&active, &plan, Phase::Preparing, now);
                // Who goes is decided on what they are doing now.
                if let Some(Step::Stop { .. }) = next
                    && let Some(id) = self.look(self.may_go(&active.pending.request, now), now, out)
                {
                    active.stage = Stage::Look(id);
                    self.active = Some(active);
                    return;
                }
                match next {
                    Some(step) => self.begin(active, step, machine, now, out),
                    None => self.limit(active, &plan, machine, now, out),
                }
            }
            // Only where something changed while it was being carried out.
            Planned::Wait(wait) if now >= deadline(&active.pending) => {
                let refusal = self.timed_out(&active.pending.request, machine, now, wait.on);
                self.refuse(active, refusal, now, out);
            }
            Planned::Wait(wait) if active.steps.iter().any(|step| matches!(step, Step::Stop { .. })) => {
                let text = self.waits_for(&wait.on);
                self.wake_at(deadline(&active.pending).min(now + PATIENCE));
                if active.pending.told != text {
                    self.say(&mut active, text, out);
                }
                active.stage = Stage::Others;
                self.active = Some(active);
            }
            Planned::Wait(_) => {
                self.holders.remove(&active.pending.request.instance);
                active.stage = Stage::Plan;
                self.pending.push(active.pending);
            }
            Planned::Refuse(refusal)
                if active.pending.request.patience == Patience::Room && may_come(&refusal) =>
            {
                self.holders.remove(&active.pending.request.instance);
                self.pending.push(active.pending);
            }
            Planned::Refuse(refusal) => self.refuse(active, refusal, now, out),
        }
    }

    /// Whether others would have to go for a load that has failed again and again.
    fn is_in_vain(&self, request: &Request, plan: &Plan) -> bool {
        let evicts = |step: &Step| {
            matches!(step, Step::Stop { reason: StopReason::Evicted | StopReason::Replaced, .. })
        };
        let failed = self.failed_loads.get(&request.instance).copied().unwrap_or_default();
        failed >= FAILED_LOADS && plan.steps.iter().any(evicts)
    }

    fn timed_out(&self, request: &Request, machine: &Machine, now: u64, on: Vec<Instance>) -> Box<Refusal> {
        let mut refusal = refusal_of(request, self.situation(machine, now));
        refusal.kind = RefusalKind::WaitedTooLong(on);
        Box::new(refusal)
    }

    fn reserve(&mut self, active: &Active, plan: &Plan, phase: Phase, now: u64) {
        let request = &active.pending.request;
        let reservation = request.reservation(&plan.rung, phase, now);
        self.holders.insert(request.instance.clone(), reservation);
    }

    fn begin(&mut self, mut active: Active, step: Step, machine: &Machine, now: u64, out: &mut Vec<Action>) {
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
                // Two are enough: what is made and does not show is no help.
                if active.steps.iter().filter(|step| matches!(step, Step::AddSwap { .. })).count() == 2 {
                    active.pending.request.swap = None;
                    active.pending.request.no_swapfile =
                        Some("the swapfiles made for it don't show".to_owned());
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

    pub(super) fn say(&mut self, active: &mut Active, text: String, out: &mut Vec<Action>) {
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
        let mut owed = reservation.clone();
        if victim.is_foreign() {
            // It comes back without asking, so there has to be room for all of it.
            owed.predicted = owed.held();
            owed.reload = owed.reload.max(owed.predicted.total());
        }
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
        let decision = Decision {
            kind,
            instance: Some(victim.clone()),
            for_instance: Some(for_instance.clone()),
            verdict: Verdict::FitsAfter,
            at_msec: now,
            context: owed.context,
            bytes: frees,
            basis: Basis::default(),
            steps: Vec::new(),
            refusal: None,
            relief: None,
            pools: Vec::new(),
            observed: false,
            text: format!("{victim} is stopped for {for_instance}: {why}, frees {frees}"),
        };
        self.record(decision, out);
    }

    /// Whether the memory of the stopped model is back, or has been waited for long enough; then the
    /// request is planned anew.
    fn settle(&mut self, mut active: Active, machine: &Machine, now: u64, out: &mut Vec<Action>) -> bool {
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
            let decision = Decision {
                kind: Kind::Quarantine,
                instance: Some(instance.clone()),
                for_instance: Some(active.pending.request.instance.clone()),
                verdict: Verdict::FitsAfter,
                at_msec: now,
                context: 0,
                bytes,
                basis: Basis::default(),
                steps: Vec::new(),
                refusal: None,
                relief: None,
                pools: Vec::new(),
                observed: false,
                text: format!("{instance} was stopped but {bytes} of its memory did not come back"),
            };
            self.record(decision, out);
        }
        active.stage = Stage::Plan;
        self.active = Some(active);
        true
    }

    fn limit(&mut self, mut active: Active, plan: &Plan, machine: &Machine, now: u64, out: &mut Vec<Action>) {
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

    fn admit(&mut self, active: Active, now: u64, out: &mut Vec<Action>) {
        let instance = active.pending.request.instance.clone();
        let Some(reservation) = self.holders.get_mut(&instance) else { return };
        reservation.phase = Phase::Loading;
        let (context, bytes) = (reservation.context, reservation.predicted.total());
        let basis = reservation.basis.clone();
        self.peaks.used(&basis);
        // Only now that it is admitted: were it refused, those stopped for it would come back.
        let stays_stopped = |stopped: &Instance| {
            let names = |step: &Step| matches!(step, Step::Stop { instance, .. } if instance == stopped);
            active.pending.request.no_restore && active.steps.iter().any(names)
        };
        self.owed.retain(|owed| owed.instance != instance && !stays_stopped(&owed.instance));
        let after = if active.steps.is_empty() { "" } else { " after " };
        let steps: Vec<String> = active.steps.iter().map(ToString::to_string).collect();
        let decision = Decision {
            kind: Kind::Admit,
            instance: Some(instance.clone()),
            for_instance: None,
            verdict: Verdict::after(&active.steps),
            at_msec: now,
            context,
            bytes,
            steps: active.steps,
            refusal: None,
            relief: None,
            pools: active.pools,
            observed: false,
            text: format!(
                "{instance} is admitted with {bytes}{basis}{}{after}{}",
                at_context(&instance, context),
                steps.join(", ")
            ),
            basis,
        };
        self.record(decision, out);
        out.push(Action::Answer { ticket: active.pending.ticket, answer: Ok(context) });
    }

    fn refuse(&mut self, active: Active, refusal: Box<Refusal>, now: u64, out: &mut Vec<Action>) {
        let instance = active.pending.request.instance.clone();
        self.holders.remove(&instance);
        self.defer(&instance, now);
        let decision = Decision {
            kind: Kind::Refuse,
            instance: Some(instance),
            for_instance: None,
            verdict: match refusal.kind {
                RefusalKind::UnknownSize(_) => Verdict::Unknown,
                _ => Verdict::Refused,
            },
            at_msec: now,
            context: refusal.context,
            bytes: refusal.needed_bytes,
            basis: refusal.basis.clone(),
            steps: active.steps,
            refusal: Some(refusal.clone()),
            relief: None,
            pools: active.pools,
            observed: false,
            text: refusal.to_string(),
        };
        self.record(decision, out);
        out.push(Action::Answer { ticket: active.pending.ticket, answer: Err(refusal) });
    }

    /// Observing: admits at the wanted context and only says what would have been done.
    fn observe(&mut self, active: Active, planned: &Planned, now: u64, out: &mut Vec<Action>) {
        let request = &active.pending.request;
        let instance = request.instance.clone();
        let wanted = request.ladder.first().cloned();
        let rung = wanted.unwrap_or_default();
        let (verdict, would, steps, refusal) = match planned {
            Planned::Admit(plan) if plan.steps.is_empty() => (Verdict::Fits, String::new(), Vec::new(), None),
            Planned::Admit(plan) => {
                let steps: Vec<String> = plan.steps.iter().map(ToString::to_string).collect();
                let would = format!("; enforcing would have meant: {}", steps.join(", "));
                (Verdict::after(&plan.steps), would, plan.steps.clone(), None)
            }
            Planned::Wait(_) => {
                (Verdict::FitsAfter, "; enforcing, it would wait".to_owned(), Vec::new(), None)
            }
            Planned::Refuse(refusal) => {
                let would = format!("; enforcing: {refusal}");
                (Verdict::Refused, would, Vec::new(), Some(refusal.clone()))
            }
        };
        let bytes = rung.footprint.total();
        let context = rung.context;
        self.holders.insert(instance.clone(), request.reservation(&rung, Phase::Loading, now));
        self.owed.retain(|owed| owed.instance != instance);
        let decision = Decision {
            kind: Kind::Admit,
            verdict,
            at_msec: now,
            context,
            bytes,
            steps,
            refusal,
            for_instance: None,
            relief: None,
            pools: active.pools,
            observed: true,
            text: format!(
                "{instance} is admitted with {bytes}{}{}, only observing{would}",
                rung.basis,
                at_context(&instance, context)
            ),
            basis: rung.basis,
            instance: Some(instance),
        };
        self.record(decision, out);
        out.push(Action::Answer { ticket: active.pending.ticket, answer: Ok(context) });
    }
}

/// Until when a request waits for others; milliseconds since boot.
fn deadline(pending: &Pending) -> u64 {
    pending.arrived.saturating_add(match pending.request.patience {
        Patience::None => 0,
        Patience::Others => PATIENCE,
        Patience::Room => u64::MAX,
    })
}

/// Whether what is missing may be there some day.
fn may_come(refusal: &Refusal) -> bool {
    refusal.kind == RefusalKind::WontFit && refusal.needed_bytes <= refusal.pool_bytes - refusal.reserve_bytes
}

/// ` at context 4096`, of what has one.
fn at_context(instance: &Instance, context: u64) -> String {
    if instance.lease { String::new() } else { format!(" at context {context}") }
}

/// What each pool lost between two readings of the room for models.
fn missing<'a>(
    before: &'a PerPool,
    now: &'a PerPool,
) -> impl Iterator<Item = (crate::ledger::Pool, Bytes)> + 'a {
    before.pairs(now).map(|(pool, before, now)| (pool, before - now))
}

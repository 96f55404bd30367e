//! Carrying out requests, one at a time, the highest priority first.

mod steps;

use super::{Action, ActionId, Active, Core, Outcome, Pending, Stage};
use crate::config::Instance;
use crate::ledger::{Machine, Phase};
use crate::policy::decision::{Decision, Kind, Verdict};
use crate::policy::plan::{Plan, Planned, Step, StopReason, accounts, plan, refusal_of};
use crate::policy::refusal::{Refusal, RefusalKind};
use crate::policy::request::{Mode, Patience, Request};

/// How long a request is held back for one of higher priority that systemd has queued but that has
/// not asked yet; milliseconds. At boot all ask within seconds of each other.
const HOLD: u64 = 30_000;
/// How long a request waits for others to finish loading or stopping; milliseconds.
const PATIENCE: u64 = 20 * 60 * 1000;
/// After so many failed loads in a row nobody is stopped for one more, nor kept stopped, unless a person starts it.
const FAILED_LOADS: u32 = 3;
/// How often it is looked whether there is room for those who wait for it; milliseconds.
const ROOM_STEP: u64 = 5_000;

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
        // Also where nobody waits for it any more.
        if let Some(instance) = self.stops.remove(&id) {
            self.unstoppable(&instance, &outcome);
            self.remember_failed(&instance, &outcome, now);
        }
        if self.looked(id, now)
            || self.relieved(id, &outcome, now)
            || self.restored(id, &outcome, now)
            || self.retired(id, &outcome, now)
            || self.read_ahead_done(id, &outcome, now)
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
                    // Should it end after all, it is owed its return; should it go on, it is not.
                    active.pending.request.stuck.insert(instance);
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
            let situation = self.situation(machine, now);
            let refusal = refusal_of(&active.pending.request, situation, RefusalKind::Killed);
            self.refuse(active, Box::new(refusal), now, out);
            return;
        }
        match planned {
            Planned::Admit(plan) if self.is_in_vain(&active.pending.request, &plan) => {
                let failed = self.failed_loads.get(&active.pending.request.instance);
                let kind = RefusalKind::FailsToLoad(failed.copied().unwrap_or_default());
                let refusal = refusal_of(&active.pending.request, self.situation(machine, now), kind);
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

    /// Whether others would have to go, or to stay away, for a load that has failed again and again.
    fn is_in_vain(&self, request: &Request, plan: &Plan) -> bool {
        let evicts = |step: &Step| {
            matches!(step, Step::Stop { reason: StopReason::Evicted | StopReason::Replaced, .. })
        };
        let failed = self.failed_loads.get(&request.instance).copied().unwrap_or_default();
        let away = self.owed.iter().any(|owed| owed.for_instance.as_ref() == Some(&request.instance));
        failed >= FAILED_LOADS && (away || plan.steps.iter().any(evicts))
    }

    fn timed_out(&self, request: &Request, machine: &Machine, now: u64, on: Vec<Instance>) -> Box<Refusal> {
        Box::new(refusal_of(request, self.situation(machine, now), RefusalKind::WaitedTooLong(on)))
    }

    fn reserve(&mut self, active: &Active, plan: &Plan, phase: Phase, now: u64) {
        let request = &active.pending.request;
        let reservation = request.reservation(&plan.rung, phase, now);
        self.holders.insert(request.instance.clone(), reservation);
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
        let text = format!(
            "{instance} is admitted with {bytes}{basis}{}{after}{}",
            at_context(&instance, context),
            steps.join(", ")
        );
        let decision = Decision::of(Kind::Admit, instance, Verdict::after(&active.steps), now, text);
        let (steps, pools) = (active.steps, active.pools);
        self.record(Decision { context, bytes, basis, steps, pools, ..decision }, out);
        out.push(Action::Answer { ticket: active.pending.ticket, answer: Ok(context) });
    }

    fn refuse(&mut self, active: Active, refusal: Box<Refusal>, now: u64, out: &mut Vec<Action>) {
        let instance = active.pending.request.instance.clone();
        self.holders.remove(&instance);
        self.defer(&instance, now);
        let verdict = match refusal.kind {
            RefusalKind::UnknownSize(_) => Verdict::Unknown,
            _ => Verdict::Refused,
        };
        let decision = Decision {
            context: refusal.context,
            bytes: refusal.needed_bytes,
            basis: refusal.basis.clone(),
            steps: active.steps,
            refusal: Some(refusal.clone()),
            pools: active.pools,
            ..Decision::of(Kind::Refuse, instance, verdict, now, refusal.to_string())
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
        let basis = rung.basis;
        let text = format!(
            "{instance} is admitted with {bytes}{basis}{}, only observing{would}",
            at_context(&instance, context)
        );
        let (decision, pools) = (Decision::of(Kind::Admit, instance, verdict, now, text), active.pools);
        self.record(
            Decision { context, bytes, basis, steps, refusal, pools, observed: true, ..decision },
            out,
        );
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

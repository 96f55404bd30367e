//! Stopping models that nobody has used for their time to live.

use super::{Action, Core, Effect};
use crate::config::Instance;
use crate::ledger::Phase;
use crate::policy::decision::{Decision, Kind, Rescue, Verdict};
use crate::policy::request::Mode;

impl Core {
    /// Stops models whose time to live is over, whether or not anybody needs their room. They are asked first: one
    /// that works, or has worked since it was asked before, has not been idle.
    pub(super) fn expire(&mut self, now: u64, out: &mut Vec<Action>) {
        if self.rules.mode == Mode::Observe || self.active.is_some() {
            return;
        }
        let over =
            self.holders.iter().filter(|(i, r)| r.expired(now) && !self.was_tried(Rescue::Expire, Some(i)));
        let over = over.map(|(i, _)| i.clone());
        let (over, unheard): (Vec<Instance>, Vec<Instance>) = over.partition(|i| self.is_fresh(i, now));
        let unheard: Vec<Instance> =
            unheard.into_iter().filter(|i| !self.looks.values().any(|of| of.contains(i))).collect();
        self.look(unheard, now, out);
        for instance in over {
            let Some(reservation) = self.holders.get_mut(&instance) else { continue };
            reservation.phase = Phase::Stopping;
            let (context, bytes) = (reservation.context, reservation.held().total());
            let (announced, for_instance) = (instance.clone(), None);
            out.push(Action::AboutToEvict { instance: announced, for_instance, deadline: now });
            self.perform(Effect::Stop(instance.clone()), out);
            let text = format!("{instance} is stopped: idle past its ttl, frees {bytes}");
            let decision = Decision::of(Kind::Expire, instance, Verdict::Fits, now, text);
            self.record(Decision { context, bytes, ..decision }, out);
        }
        let ends = self.holders.values().filter(|r| r.phase == Phase::Running);
        if let Some(end) = ends.filter_map(|r| Some(r.last_used + r.ttl?)).filter(|end| *end > now).min() {
            self.wake_at(end);
        }
    }
}

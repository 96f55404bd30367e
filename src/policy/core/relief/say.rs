//! The decisions of the ladder: each is said with its numbers as it begins.

use super::{IN_VAIN, Shortage, UnderWay};
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{Machine, Phase, Pool};
use crate::policy::core::{Action, Core, Effect};
use crate::policy::decision::{Decision, Kind, Level, Relief, Rescue, Verdict};
use crate::policy::request::Mode;

impl Core {
    /// Begins what was decided, or only says so.
    #[expect(clippy::too_many_arguments, reason = "one decision with its numbers")]
    pub(super) fn begin_rescue(
        &mut self,
        instance: Option<Instance>,
        rescue: Rescue,
        expected: Bytes,
        effect: Effect,
        text: String,
        shortage: &Shortage,
        now: u64,
        out: &mut Vec<Action>,
    ) {
        let relief = Relief {
            rescue,
            level: shortage.level,
            pool: shortage.pool,
            headroom_bytes: shortage.headroom,
            falling_bytes: self.afloat.gauge.falling,
            needed_bytes: shortage.needed,
            expected_bytes: expected,
            gained_bytes: None,
        };
        if self.rules.mode == Mode::Observe {
            // Once, and not with each look.
            self.afloat.not_before.insert((Rescue::Nothing, None), now + IN_VAIN);
            let text = format!("only observing; enforcing, {text}");
            let decision = Decision { observed: true, ..self.relief(instance, relief, expected, text, now) };
            self.record(decision, out);
            return;
        }
        let decision = self.relief(instance.clone(), relief, expected, text, now);
        self.record(decision, out);
        let id = self.perform(effect, out);
        self.afloat.under_way =
            Some(UnderWay { id, instance, relief, since: now, ended: None, gpus: Vec::new() });
    }

    /// Says once that nothing of ours would help, and who grows.
    pub(super) fn name_the_eater(
        &mut self,
        machine: &Machine,
        shortage: &Shortage,
        now: u64,
        out: &mut Vec<Action>,
    ) {
        if self.was_tried(Rescue::Nothing, None) {
            return;
        }
        self.afloat.not_before.insert((Rescue::Nothing, None), now + 10 * IN_VAIN);
        let kept = self.holders.values().any(|r| matches!(r.phase, Phase::Loading | Phase::Running));
        let why = if kept { "no model that may be stopped now would free enough" } else { "no model runs" };
        let mut text = format!("{}; {why}", self.shortage_text(shortage));
        if let Some((eater, holds)) = &machine.eater {
            text.push_str(&format!("; {eater} grows the most and holds {holds}"));
        }
        let relief = Relief {
            rescue: Rescue::Nothing,
            level: shortage.level,
            pool: shortage.pool,
            headroom_bytes: shortage.headroom,
            falling_bytes: self.afloat.gauge.falling,
            needed_bytes: shortage.needed,
            expected_bytes: Bytes::ZERO,
            gained_bytes: None,
        };
        let decision = self.relief(None, relief, Bytes::ZERO, text, now);
        self.record(decision, out);
    }

    pub(in crate::policy::core) fn relief(
        &self,
        instance: Option<Instance>,
        relief: Relief,
        bytes: Bytes,
        text: String,
        now: u64,
    ) -> Decision {
        let context = instance.as_ref().and_then(|i| self.holders.get(i)).map_or(0, |r| r.context);
        let decision = Decision::of(Kind::Relieve, instance, Verdict::FitsAfter, now, text);
        Decision { context, bytes, relief: Some(relief), ..decision }
    }

    pub(super) fn shortage_text(&self, shortage: &Shortage) -> String {
        let (headroom, reserve) = (shortage.headroom, self.rules.reserve);
        let gauge = &self.afloat.gauge;
        let falling = if shortage.level == Level::Critical { gauge.falling_now } else { gauge.falling };
        match shortage.pool {
            Pool::Gpu(_) => {
                format!("{headroom} of GPU memory is left, and others took what models were promised")
            }
            _ if falling.is_zero() => {
                format!("{headroom} of memory is left of a reserve of {reserve}")
            }
            _ => {
                format!("{headroom} of memory is left of a reserve of {reserve}, {falling} less each second")
            }
        }
    }
}

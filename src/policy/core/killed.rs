//! What the last rung did in the loop's place, taken into the books.

use super::{Action, Core, Effect, Owed};
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{Basis, Machine, Phase, Pool};
use crate::policy::decision::{Decision, Kind, Level, Relief, Rescue, Verdict};
use crate::policy::last_resort::{LastResort, last_resort};

impl Core {
    /// What the last rung stands by with; see [`last_resort`].
    #[must_use]
    pub fn last_resort(&self, machine: &Machine) -> Option<LastResort> {
        last_resort(&self.holders, machine, &self.rules)
    }

    /// A model's processes were killed while `available` was left: its unit is stopped, so that it does not start anew at
    /// once, and it is owed a return.
    pub(super) fn killed(&mut self, instance: Instance, available: Bytes, now: u64, out: &mut Vec<Action>) {
        let Some(reservation) = self.holders.get_mut(&instance) else { return };
        let owed = reservation.clone();
        reservation.phase = Phase::Stopping;
        let (context, bytes) = (owed.context, owed.measured.unreclaimable());
        let id = self.perform(Effect::Kill(instance.clone()), out);
        self.expiring.insert(id, instance.clone());
        if !self.owed.iter().any(|owed| owed.instance == instance) {
            let (attempts, not_before) = (0, 0);
            self.owed.push(Owed {
                instance: instance.clone(),
                for_instance: None,
                reservation: owed,
                attempts,
                not_before,
            });
            self.defer(&instance, now);
        }
        let relief = Relief {
            rescue: Rescue::Kill,
            level: Level::Critical,
            pool: Pool::Memory,
            headroom_bytes: available,
            falling_bytes: Bytes::ZERO,
            needed_bytes: Bytes::ZERO,
            expected_bytes: bytes,
            gained_bytes: None,
        };
        let decision = Decision {
            kind: Kind::Relieve,
            for_instance: None,
            verdict: Verdict::Fits,
            at_msec: now,
            context,
            bytes,
            basis: Basis::default(),
            steps: Vec::new(),
            refusal: None,
            pools: Vec::new(),
            relief: Some(relief),
            observed: false,
            text: format!(
                "{instance} was killed by the last rung: {available} were left and the daemon had not acted in time, \
                 frees {bytes}"
            ),
            instance: Some(instance),
        };
        self.record(decision, out);
    }
}

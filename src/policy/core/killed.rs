//! What the last rung did in the loop's place, taken into the books.

use super::{Action, Core, Effect};
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{Machine, Pool};
use crate::policy::decision::{Level, Relief, Rescue};
use crate::policy::last_resort::{LastResort, last_resort};

impl Core {
    /// What the last rung stands by with; see [`last_resort`].
    #[must_use]
    pub fn last_resort(&self, machine: &Machine) -> Option<LastResort> {
        last_resort(&self.holders, machine, &self.rules)
    }

    /// A model's processes were killed while `available` was left: its unit is stopped, so that it does not start anew at
    /// once, and it is owed a return unless it was going anyway.
    pub(super) fn killed(&mut self, instance: Instance, available: Bytes, now: u64, out: &mut Vec<Action>) {
        let Some(reservation) = self.holders.get(&instance) else { return };
        let bytes = reservation.measured.unreclaimable();
        self.owe_killed(&instance, now);
        let id = self.perform(Effect::Kill(instance.clone()), out);
        self.expiring.insert(id, instance.clone());
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
        let text = format!(
            "{instance} was killed by the last rung: {available} were left and the daemon had not acted in time, \
             frees {bytes}"
        );
        let decision = self.relief(Some(instance), relief, bytes, text, now);
        self.record(decision, out);
    }
}

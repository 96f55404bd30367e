//! What the last rung did in the loop's place, taken into the books.

use super::relief::Shortage;
use super::{Action, Core};
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{Machine, Pool};
use crate::policy::decision::{Level, Rescue};
use crate::policy::last_resort::{LastResort, last_resort};
use crate::policy::pressure::gain;

impl Core {
    /// What the last rung stands by with; see [`last_resort`].
    #[must_use]
    pub fn last_resort(&self, machine: &Machine) -> Option<LastResort> {
        last_resort(&self.holders, &self.killed_in_vain(), machine, &self.rules)
    }

    /// A model's processes were killed while `available` was left: its unit is stopped, so that it does not start anew at
    /// once, its memory is waited for like that of any other, and it is owed a return unless it was going anyway.
    pub(super) fn killed(
        &mut self,
        instance: Instance,
        available: Bytes,
        machine: &Machine,
        now: u64,
        out: &mut Vec<Action>,
    ) {
        // One that is killed again is waited for no longer than it was already: the next one's turn has to come.
        if !self.holders.contains_key(&instance) || self.is_being_killed(&instance) {
            return;
        }
        let bytes = gain(machine, &self.holders, Pool::Memory, &[&instance]);
        let text = format!(
            "{instance} was killed by the last rung: {available} were left and the daemon had not acted in time, \
             frees {bytes}"
        );
        let shortage =
            Shortage { level: Level::Critical, pool: Pool::Memory, headroom: available, needed: Bytes::ZERO };
        self.take_away(instance, Rescue::Kill, bytes, text, machine, &shortage, now, out);
    }
}

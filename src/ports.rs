//! The traits between the decisions and the world: one real implementation, one simulated.

use crate::ledger::Machine;
use crate::policy::core::Effect;
use crate::policy::{ActionId, Outcome};

/// Where the outcome of an effect goes, from whatever task or thread it ends in.
pub type Outcomes = Box<dyn Fn(ActionId, Outcome) + Send>;

/// The world as the daemon's loop sees it.
pub trait Ports {
    /// Milliseconds since boot, suspend included.
    fn now(&self) -> u64;

    /// A fresh reading of the machine. Cheap enough for every event: what takes longer (the page
    /// cache of files) is read elsewhere and only handed in.
    fn observe(&mut self) -> Machine;

    /// Begins an effect and returns at once; its outcome goes to `done`, exactly once.
    fn perform(&mut self, id: ActionId, effect: Effect, done: Outcomes);
}

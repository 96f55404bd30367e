//! The real machine: systemd's units, readings of `host`, and the actions on them.

mod activity;
mod effects;
mod gate;
mod page_cache;
mod ports;
mod sensing;
mod standby;
mod store;
mod swap;
mod units;

pub use activity::{Activities, Place};
pub use effects::Effects;
pub use gate::Gate;
pub use page_cache::PageCache;
pub use ports::RealPorts;
pub use store::Files;
pub use swap::{Order, SwapFiles, call_off_removals, carry_out};
pub use units::{Units, follow};

use crate::config::Instance;
use crate::host::Host;
use crate::ledger::UnitState;

/// The name of the program that asks at the gate, wherever it is installed.
const GATE: &str = "plimsoll";

/// Instances that are starting and past the gate, each with its InvocationID: an engine loads
/// already, and the ledger may not know of it.
#[must_use]
pub fn past_the_gate(units: &Units, host: &Host) -> Vec<(Instance, String)> {
    let asks = |pid: u32| match host.executable(pid) {
        Ok(program) => program.file_name().is_some_and(|name| name == GATE),
        // What can't be told is not let past the gate.
        Err(_) => true,
    };
    units
        .all()
        .into_iter()
        .filter(|(_, status)| status.state == UnitState::Activating && status.main_pid != 0)
        .filter(|(_, status)| !asks(status.main_pid))
        .map(|(instance, status)| (instance, status.invocation))
        .collect()
}

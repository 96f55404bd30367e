//! The real machine: systemd's units, readings of `host`, and the actions on them.

mod effects;
mod gate;
mod page_cache;
mod ports;
mod store;
mod units;

pub use effects::Effects;
pub use gate::Gate;
pub use page_cache::PageCache;
pub use ports::RealPorts;
pub use store::Files;
pub use units::{Units, follow};

use crate::config::Instance;
use crate::host::Host;
use crate::ledger::UnitState;

/// Instances that are starting and past the gate, each with its InvocationID: an engine loads
/// already, and the ledger may not know of it. `gate` is the executable that asks at the gate.
#[must_use]
pub fn past_the_gate(units: &Units, host: &Host, gate: &std::path::Path) -> Vec<(Instance, String)> {
    let asks = |pid: u32| host.executable(pid).is_ok_and(|own| same_file(&own, gate));
    units
        .all()
        .into_iter()
        .filter(|(_, status)| status.state == UnitState::Activating && status.main_pid != 0)
        .filter(|(_, status)| !asks(status.main_pid))
        .map(|(instance, status)| (instance, status.invocation))
        .collect()
}

/// Whether the file opened is the one at `path`, or was before an upgrade replaced it.
fn same_file(own: &crate::host::Executable, path: &std::path::Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let named = own.path.as_deref() == Some(path);
    named || std::fs::metadata(path).is_ok_and(|about| (about.dev(), about.ino()) == (own.device, own.inode))
}

//! Pressure stall information (PSI).

use std::path::PathBuf;

use nix::libc;
use procfs::{FromRead, MemoryPressure};

use super::{ControlGroup, Host, HostError};

/// Time stalled for memory since boot (or since the control group was made); microseconds.
///
/// Only the totals: differences between them are exact at any interval, the kernel's averages
/// move every two seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stall {
    /// At least one task was waiting.
    pub some: u64,
    /// All tasks were.
    pub full: u64,
}

const MACHINE: &str = "/proc/pressure/memory";

impl Host {
    /// The file of the machine's memory pressure, to be woken by.
    #[must_use]
    pub fn pressure_file(&self) -> PathBuf {
        self.path(MACHINE)
    }

    /// Memory pressure of the machine; `None` when the kernel has no PSI or it is off (`psi=1` on
    /// the kernel's command line turns it on).
    pub fn memory_pressure(&self) -> Result<Option<Stall>, HostError> {
        self.stall(MACHINE)
    }

    /// Memory pressure of one control group; `None` as above.
    pub fn group_pressure(&self, group: &ControlGroup) -> Result<Option<Stall>, HostError> {
        self.stall(&group.file("memory.pressure"))
    }

    fn stall(&self, path: &str) -> Result<Option<Stall>, HostError> {
        let text = match self.read(path) {
            Ok(text) => text,
            Err(error) if error.is_gone() => return Ok(None),
            // PSI that is turned off shows its files and refuses to open them.
            Err(HostError::Read { source, .. }) if source.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let pressure = MemoryPressure::from_read(text.as_bytes())
            .map_err(|_| self.content(path, "how long was waited for memory"))?;
        Ok(Some(Stall { some: pressure.some.total, full: pressure.full.total }))
    }
}

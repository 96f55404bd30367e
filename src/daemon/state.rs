//! What the daemon remembers beyond its own life.

use serde::{Deserialize, Serialize};

use super::leases::SavedLease;
use crate::policy::{Mode, Saved};

/// Everything that survives a restart of the daemon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Durable {
    /// What the decisions need.
    pub saved: Saved,
    /// The mode that was set by hand; it holds until the configuration is read again by
    /// `Reload`, or the machine is booted.
    pub mode: Option<Mode>,
    /// Whose the leases are. They end with the boot, as their holders do.
    pub leases: Vec<SavedLease>,
}

/// Where it is kept.
pub trait Store: Send + Sync {
    /// Makes it durable. May block.
    ///
    /// # Errors
    /// A sentence; the daemon logs it and goes on.
    fn save(&self, durable: &Durable) -> Result<(), String>;
}

//! The files in which the daemon remembers.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::action::state_file::{Loaded, StateFile};
use crate::action::systemd::Applied;
use crate::config::{Instance, ModelName};
use crate::daemon::leases::SavedLease;
use crate::daemon::state::{Durable, Store};
use crate::ledger::Reservation;
use crate::policy::core::{Leak, Owed};
use crate::policy::{Decision, Mode, Peaks, Saved};

/// What holds for one boot: under /run.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Ledger {
    boot: String,
    holders: BTreeMap<Instance, Reservation>,
    leaks: Vec<Leak>,
    decisions: VecDeque<Decision>,
    mode: Option<Mode>,
    leases: Vec<SavedLease>,
}

/// What outlives a boot: under /var/lib.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Lasting {
    owed: Vec<Owed>,
    pins: BTreeMap<ModelName, bool>,
    peaks: Peaks,
}

/// The files.
#[derive(Debug)]
pub struct Files {
    boot: String,
    ledger: StateFile,
    limits: StateFile,
    lasting: StateFile,
}

impl Files {
    /// The files below `root`, in the boot of this id.
    #[must_use]
    pub fn new(root: &Path, boot: String) -> Self {
        let file = |path: &str| StateFile::at(root.join(path));
        Self {
            boot,
            ledger: file("run/plimsoll/ledger.json"),
            limits: file("run/plimsoll/limits.json"),
            lasting: file("var/lib/plimsoll/state.json"),
        }
    }

    /// What was remembered, and whether it was in this boot.
    #[must_use]
    pub fn load(&self) -> (Durable, bool) {
        let ledger: Ledger = read(&self.ledger);
        let lasting: Lasting = read(&self.lasting);
        let same_boot = ledger.boot == self.boot;
        let saved = Saved {
            holders: ledger.holders,
            leaks: ledger.leaks,
            decisions: ledger.decisions,
            owed: lasting.owed,
            pins: lasting.pins,
            peaks: lasting.peaks,
        };
        let leases = if same_boot { ledger.leases } else { Vec::new() };
        (Durable { saved, mode: ledger.mode.filter(|_| same_boot), leases }, same_boot)
    }

    /// The limits that were set in this boot.
    #[must_use]
    pub fn load_limits(&self) -> BTreeMap<Instance, Applied> {
        let (boot, limits): (String, BTreeMap<Instance, Applied>) = read(&self.limits);
        if boot == self.boot { limits } else { BTreeMap::new() }
    }

    /// Remembers limits. Blocks.
    ///
    /// # Errors
    /// One sentence.
    pub fn save_limits(&self, limits: &BTreeMap<Instance, Applied>) -> Result<(), String> {
        self.limits.save(&(&self.boot, limits)).map(drop).map_err(|error| error.to_string())
    }
}

impl Store for Files {
    fn save(&self, durable: &Durable) -> Result<(), String> {
        let saved = durable.saved.clone();
        let ledger = Ledger {
            boot: self.boot.clone(),
            holders: saved.holders,
            leaks: saved.leaks,
            decisions: saved.decisions,
            mode: durable.mode,
            leases: durable.leases.clone(),
        };
        let lasting = Lasting { owed: saved.owed, pins: saved.pins, peaks: saved.peaks };
        // Equal contents are not written again, so the disk is only waited for when it has to be.
        let ledger = self.ledger.save(&ledger).map_err(|error| error.to_string());
        let lasting = self.lasting.save(&lasting).map_err(|error| error.to_string());
        ledger.and(lasting).map(drop)
    }
}

/// The contents; what can't be used is said and left out.
fn read<T: DeserializeOwned + Default>(file: &StateFile) -> T {
    match file.load() {
        Ok(Loaded::Value(value)) => value,
        Ok(Loaded::Missing) => T::default(),
        Ok(Loaded::Corrupt { moved_to, why }) => {
            tracing::error!("what was remembered makes no sense ({why}) and is now {}", moved_to.display());
            T::default()
        }
        Err(error) => {
            tracing::error!("{error}");
            T::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_comes_back_in_the_same_boot_only() {
        let root = std::env::temp_dir().join(format!("plimsoll-store-{}", std::process::id()));
        let files = Files::new(&root, "boot-1".into());
        assert_eq!(files.load(), (Durable::default(), false));
        let mut durable = Durable { mode: Some(Mode::Observe), ..Durable::default() };
        durable.saved.pins.insert("a".parse().unwrap(), true);
        files.save(&durable).unwrap();
        assert_eq!(files.load(), (durable.clone(), true));
        let (later, same_boot) = Files::new(&root, "boot-2".into()).load();
        assert_eq!((later.mode, same_boot), (None, false));
        assert_eq!(later.saved.pins, durable.saved.pins);
        std::fs::remove_dir_all(root).unwrap();
    }
}

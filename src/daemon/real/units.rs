//! The models' units as systemd last told, kept current by its signals.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};

use crate::action::systemd::{
    Applied, Systemd, SystemdError, UNITS, UnitEvent, UnitStatus, administrators, starting,
};
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::daemon::Input;
use crate::ledger::UnitState;

/// What is known of units and jobs; shared between the loop, which reads it, and what follows
/// systemd.
#[derive(Debug, Default)]
pub struct Units {
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    units: BTreeMap<Instance, UnitStatus>,
    starting: Vec<Instance>,
    stopping: bool,
    slice_limit: Option<Bytes>,
    /// Limits that the daemon has set.
    limits: BTreeMap<Instance, Applied>,
    /// MemoryMax= that the administrator allows.
    admin: BTreeMap<Instance, Bytes>,
}

impl Units {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over the limits that the daemon has set before.
    pub fn remember_limits(&self, limits: BTreeMap<Instance, Applied>) {
        self.lock().limits = limits;
    }

    /// Reads everything from systemd, these units of others among it.
    ///
    /// # Errors
    /// systemd does not answer.
    pub async fn fill(&self, systemd: &Systemd, adopted: &[Instance]) -> Result<(), SystemdError> {
        let units = systemd.units(UNITS).await?;
        self.refresh_jobs(systemd).await?;
        let units = units.into_iter().filter_map(|unit| Some((Instance::from_unit(&unit.name)?, unit)));
        self.lock().units = units.collect();
        for instance in adopted {
            self.refresh(systemd, instance).await?;
        }
        Ok(())
    }

    /// Reads one unit again.
    ///
    /// # Errors
    /// systemd does not answer.
    pub async fn refresh(&self, systemd: &Systemd, instance: &Instance) -> Result<UnitStatus, SystemdError> {
        let status = systemd.unit(&instance.unit()).await?;
        let mut known = self.lock();
        if status.state == UnitState::Inactive {
            known.units.remove(instance);
        } else {
            known.units.insert(instance.clone(), status.clone());
        }
        Ok(status)
    }

    /// Reads the jobs again, and what else holds for all units.
    ///
    /// # Errors
    /// systemd does not answer.
    pub async fn refresh_jobs(&self, systemd: &Systemd) -> Result<(), SystemdError> {
        let jobs = systemd.jobs().await?;
        let stopping = systemd.is_stopping(&jobs).await?;
        let mut known = self.lock();
        known.starting = starting(&jobs);
        known.stopping = stopping;
        Ok(())
    }

    /// Reads the administrator's limits for an instance again.
    ///
    /// # Errors
    /// systemd does not answer.
    pub async fn refresh_limits(&self, systemd: &Systemd, instance: &Instance) -> Result<(), SystemdError> {
        let current = systemd.limits(&instance.unit()).await?;
        let slice = systemd.slice_limit("llm.slice").await?;
        let mut known = self.lock();
        known.slice_limit = slice;
        let admin = administrators(current, known.limits.get(instance)).max;
        if admin == Bytes::MAX {
            known.admin.remove(instance);
        } else {
            known.admin.insert(instance.clone(), admin);
        }
        Ok(())
    }

    /// Every unit that is loaded.
    #[must_use]
    pub fn all(&self) -> Vec<(Instance, UnitStatus)> {
        self.lock().units.iter().map(|(instance, status)| (instance.clone(), status.clone())).collect()
    }

    /// One unit.
    #[must_use]
    pub fn get(&self, instance: &Instance) -> Option<UnitStatus> {
        self.lock().units.get(instance).cloned()
    }

    pub(super) fn starting(&self) -> Vec<Instance> {
        self.lock().starting.clone()
    }

    pub(super) fn stopping(&self) -> bool {
        self.lock().stopping
    }

    pub(super) fn slice_limit(&self) -> Option<Bytes> {
        self.lock().slice_limit
    }

    pub(super) fn admin_limit(&self, instance: &Instance) -> Option<Bytes> {
        self.lock().admin.get(instance).copied()
    }

    pub(super) fn applied(&self, instance: &Instance) -> Option<Applied> {
        self.lock().limits.get(instance).copied()
    }

    pub(super) fn set_applied(&self, instance: &Instance, applied: Applied) -> BTreeMap<Instance, Applied> {
        let mut known = self.lock();
        known.limits.insert(instance.clone(), applied);
        known.limits.clone()
    }
}

/// Keeps `units` current and wakes the loop at each change, until the bus is gone.
pub async fn follow(
    systemd: Systemd,
    units: std::sync::Arc<Units>,
    mut events: UnboundedReceiver<UnitEvent>,
    inputs: UnboundedSender<Input>,
) {
    while let Some(first) = events.recv().await {
        let mut changed = BTreeSet::new();
        let mut jobs = false;
        let mut next = Some(first);
        // Many events at a time are one look at each unit.
        while let Some(event) = next {
            match event {
                UnitEvent::Queued(instance) | UnitEvent::Ended(instance, _) => {
                    jobs = true;
                    changed.insert(instance);
                }
                UnitEvent::Changed(instance) => {
                    changed.insert(instance);
                }
                UnitEvent::Lost => {
                    tracing::error!("systemd is not heard any more; the daemon ends to be started anew");
                    let _ = inputs.send(Input::Lost);
                    return;
                }
            }
            next = events.try_recv().ok();
        }
        for instance in changed {
            let before = units.get(&instance).map(|status| status.status_text);
            match units.refresh(&systemd, &instance).await {
                Ok(status)
                    if status.state == UnitState::Activating
                        && before.as_ref() != Some(&status.status_text) =>
                {
                    // Where it is, for whoever follows its load.
                    let _ = inputs.send(Input::Said(instance, status.status_text));
                }
                Ok(_) => {}
                Err(error) => tracing::warn!("the state of {} is not known: {error}", instance.unit()),
            }
        }
        if jobs && let Err(error) = units.refresh_jobs(&systemd).await {
            tracing::warn!("systemd's jobs are not known: {error}");
        }
        if inputs.send(Input::Changed).is_err() {
            return;
        }
    }
}

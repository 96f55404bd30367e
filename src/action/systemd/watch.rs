//! What happens to the models' units, as it happens.

use std::collections::HashMap;

use tokio::sync::mpsc::UnboundedSender;
use tokio::task::JoinHandle;
use zbus::fdo::PropertiesProxy;
use zbus::proxy::CacheProperties;

use super::{Systemd, SystemdError, UNITS, bounded, next, unit_path};
use crate::config::Instance;

/// Something happened to a model's unit. It says only what to look at: by the time it is read
/// more may have happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UnitEvent {
    /// A job was queued for it.
    Queued(Instance),
    /// A job of it ended: `done`, `failed`, `timeout`, `canceled`, `skipped`, …
    Ended(Instance, String),
    /// Its state or its main process changed.
    Changed(Instance),
    /// systemd is not heard any more: the bus is gone.
    Lost,
}

/// A running watch; it ends when this is dropped.
#[derive(Debug)]
pub struct Watch(JoinHandle<()>);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The tasks that listen to one unit each; they end with the watch.
struct Listeners(HashMap<Instance, JoinHandle<()>>);

impl Drop for Listeners {
    fn drop(&mut self) {
        for task in self.0.values() {
            task.abort();
        }
    }
}

impl Systemd {
    /// Sends what happens to the models' units to `events`, from now on.
    ///
    /// Only units that have had a job since, or are loaded now, are listened to one by one: asking
    /// for the changes of all units would wake the daemon for everything that goes on in the system.
    pub async fn watch(&self, events: UnboundedSender<UnitEvent>) -> Result<Watch, SystemdError> {
        let mut queued = bounded("AddMatch", self.manager.receive_job_new()).await?;
        let mut ended = bounded("AddMatch", self.manager.receive_job_removed()).await?;
        let loaded =
            bounded("ListUnitsByPatterns", self.manager.list_units_by_patterns(&[], &[UNITS])).await?;
        let systemd = self.clone();
        let mut listeners = Listeners(HashMap::new());
        for (unit, ..) in loaded {
            if let Some(instance) = Instance::from_unit(&unit) {
                listeners.add(&systemd, instance, &events).await?;
            }
        }
        Ok(Watch(tokio::spawn(async move {
            loop {
                let event = tokio::select! {
                    signal = next(&mut queued) => match signal {
                        Some(signal) => signal.args().ok().and_then(|job| {
                            Some(UnitEvent::Queued(Instance::from_unit(&job.unit)?))
                        }),
                        None => Some(UnitEvent::Lost),
                    },
                    signal = next(&mut ended) => match signal {
                        Some(signal) => signal.args().ok().and_then(|job| {
                            Some(UnitEvent::Ended(Instance::from_unit(&job.unit)?, job.result.clone()))
                        }),
                        None => Some(UnitEvent::Lost),
                    },
                };
                if let Some(UnitEvent::Queued(instance)) = &event
                    && listeners.add(&systemd, instance.clone(), &events).await.is_err()
                {
                    let _ = events.send(UnitEvent::Lost);
                    return;
                }
                let lost = event == Some(UnitEvent::Lost);
                let heard = event.is_none_or(|event| events.send(event).is_ok());
                if lost || !heard {
                    return;
                }
            }
        })))
    }
}

impl Listeners {
    /// Listens to one more unit.
    async fn add(
        &mut self,
        systemd: &Systemd,
        instance: Instance,
        events: &UnboundedSender<UnitEvent>,
    ) -> Result<(), SystemdError> {
        if self.0.contains_key(&instance) {
            return Ok(());
        }
        let bus = systemd.manager.inner().connection();
        let destination = systemd.manager.inner().destination().to_owned();
        let path = unit_path(&instance.unit());
        let properties = async {
            let proxy = PropertiesProxy::builder(bus)
                .destination(destination)
                .path(path)
                .cache_properties(CacheProperties::No)
                .build()
                .await?;
            proxy.receive_properties_changed().await
        };
        let mut changes = bounded("AddMatch", properties).await?;
        let (name, events) = (instance.clone(), events.clone());
        let task = tokio::spawn(async move {
            while next(&mut changes).await.is_some() {
                if events.send(UnitEvent::Changed(name.clone())).is_err() {
                    return;
                }
            }
        });
        self.0.insert(instance, task);
        Ok(())
    }
}

//! What happens to the models' units, as it happens.

use std::collections::HashMap;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::task::JoinHandle;
use zbus::fdo::{PropertiesChangedStream, PropertiesProxy};
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

impl Systemd {
    /// Sends what happens to the models' units to `events`, from now on.
    ///
    /// Only units that have had a job since, or are loaded now, are listened to one by one: asking
    /// for the changes of all units would wake the daemon for everything that goes on in the system.
    /// `of` says whose a unit is, at once: it is asked on the daemon's loop. `adopted` are units of others that are
    /// listened to from the start, and those that come from `more` are from then on.
    pub async fn watch(
        &self,
        events: UnboundedSender<UnitEvent>,
        of: impl Fn(&str) -> Option<Instance> + Send + 'static,
        adopted: Vec<Instance>,
        mut more: UnboundedReceiver<Instance>,
    ) -> Result<Watch, SystemdError> {
        let mut listeners =
            Listeners { systemd: self.clone(), events: events.clone(), tasks: HashMap::new() };
        let loaded =
            bounded("ListUnitsByPatterns", self.manager.list_units_by_patterns(&[], &[UNITS])).await?;
        let loaded = loaded.into_iter().filter_map(|(unit, ..)| Instance::from_unit(&unit));
        for instance in loaded.chain(adopted) {
            let changes = changes(self, &instance).await?;
            listeners.add(instance, Some(changes));
        }
        let mut queued = bounded("AddMatch", self.manager.receive_job_new()).await?;
        let mut ended = bounded("AddMatch", self.manager.receive_job_removed()).await?;
        // Nothing in this loop waits for the bus: while these two are not read, a burst of jobs (a
        // target that is isolated) fills their queues, and then no reply is received either.
        Ok(Watch(tokio::spawn(async move {
            loop {
                let event = tokio::select! {
                    signal = next(&mut queued) => match signal {
                        Some(signal) => signal.args().ok().and_then(|job| {
                            Some(UnitEvent::Queued(of(&job.unit)?))
                        }),
                        None => Some(UnitEvent::Lost),
                    },
                    signal = next(&mut ended) => match signal {
                        Some(signal) => signal.args().ok().and_then(|job| {
                            Some(UnitEvent::Ended(of(&job.unit)?, job.result.clone()))
                        }),
                        None => Some(UnitEvent::Lost),
                    },
                    Some(instance) = more.recv() => {
                        listeners.add(instance, None);
                        None
                    }
                };
                if let Some(UnitEvent::Queued(instance) | UnitEvent::Ended(instance, _)) = &event {
                    listeners.add(instance.clone(), None);
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

/// The tasks that listen to one unit each; they end with the watch.
struct Listeners {
    systemd: Systemd,
    events: UnboundedSender<UnitEvent>,
    tasks: HashMap<Instance, JoinHandle<()>>,
}

impl Drop for Listeners {
    fn drop(&mut self) {
        for task in self.tasks.values() {
            task.abort();
        }
    }
}

impl Listeners {
    /// Listens to one more unit; where `listening` is none, it begins with asking for its changes.
    fn add(&mut self, instance: Instance, listening: Option<PropertiesChangedStream>) {
        if self.tasks.contains_key(&instance) {
            return;
        }
        let (systemd, events, name) = (self.systemd.clone(), self.events.clone(), instance.clone());
        let listen = async move {
            let mut changes = match listening {
                Some(changes) => changes,
                None => {
                    let asked = changes(&systemd, &name).await;
                    // Whatever happened until now was not heard.
                    let first =
                        if asked.is_ok() { UnitEvent::Changed(name.clone()) } else { UnitEvent::Lost };
                    let heard = events.send(first).is_ok();
                    match asked {
                        Ok(changes) if heard => changes,
                        _ => return,
                    }
                }
            };
            while next(&mut changes).await.is_some() {
                if events.send(UnitEvent::Changed(name.clone())).is_err() {
                    return;
                }
            }
        };
        self.tasks.insert(instance, tokio::spawn(listen));
    }
}

/// The changes of a unit's properties, from now on.
async fn changes(systemd: &Systemd, instance: &Instance) -> Result<PropertiesChangedStream, SystemdError> {
    let manager = systemd.manager.inner();
    let properties = async {
        let proxy = PropertiesProxy::builder(manager.connection())
            .destination(manager.destination().to_owned())
            .path(unit_path(&instance.unit()))
            .cache_properties(CacheProperties::No)
            .build()
            .await?;
        proxy.receive_properties_changed().await
    };
    bounded("AddMatch", properties).await
}

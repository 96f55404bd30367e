//! What is done to the machine, each bounded in time.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use super::activity::Activities;
use super::page_cache::PageCache;
use super::store::Files;
use super::swap::Order;
use super::units::Units;
use crate::action::read_ahead::ReadAhead;
use crate::action::systemd::{Systemd, SystemdError, UnitStatus};
use crate::action::{cgroup, kernel};
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::daemon::survey::Survey;
use crate::host::{ControlGroup, Host};
use crate::ledger::{FileId, UnitState};
use crate::os::since_boot;
use crate::policy::Limits;
use crate::policy::core::Effect;

/// How long a unit may take to stop where systemd sets no limit.
const STOP: Duration = Duration::from_secs(90);
/// What systemd itself needs beyond its own limit, to kill and to clean up.
const SLACK: Duration = Duration::from_secs(15);
/// How long reclaiming may go on; a step of it that is under way is not cut short.
const RECLAIM: Duration = Duration::from_secs(10);
/// Looks at engines at a time: each holds a thread for seconds.
static LOOKS: Semaphore = Semaphore::const_new(3);
/// The same for files whose cache is dropped: their disk may never answer, and the decisions go on without it.
static DROPS: Semaphore = Semaphore::const_new(2);

/// The means to do it.
#[derive(Clone)]
pub struct Effects {
    /// systemd.
    pub systemd: Systemd,
    /// Where control groups are found.
    pub host: Host,
    /// The units as known.
    pub units: Arc<Units>,
    /// The models' files in the page cache.
    pub cache: Arc<PageCache>,
    /// What the engines say of their requests.
    pub activities: Arc<Activities>,
    /// How far disks are read ahead.
    pub read_ahead: Arc<ReadAhead>,
    /// Where limits are remembered.
    pub files: Arc<Files>,
    /// Looks at the page cache and the swapfiles again.
    pub survey: Arc<Survey>,
}

impl Effects {
    /// Does it, and waits for its end.
    ///
    /// # Errors
    /// Why it was not possible, in one sentence.
    pub async fn perform(&self, effect: Effect) -> Result<(), String> {
        match effect {
            Effect::DropCache(files) => self.drop_cache(files).await,
            Effect::DropAllCache => blocking("drop the page cache", kernel::drop_all_cache).await,
            Effect::Compact => blocking("compact memory", kernel::compact).await,
            Effect::Stop(instance) => self.stop(&instance).await,
            Effect::Start(instance) => self.start(&instance).await,
            Effect::Limit(instance, limits) => self.limit(&instance, limits).await,
            Effect::Reclaim(instance, bytes) => self.reclaim(&instance, bytes).await,
            Effect::Kill(instance) => self.kill(&instance).await,
            Effect::ReadAhead(devices) => self.read_ahead(devices).await,
            Effect::AskActivity(instances) => {
                self.ask_activity(&instances).await;
                Ok(())
            }
            Effect::AddSwap(owner, bytes) => self.order(Order::Add(owner, bytes, boot_msec())).await,
            Effect::RemoveSwap(name) => {
                let in_use = self.host.swaps().unwrap_or_default();
                let active = in_use.iter().any(|area| area.own() == Some(name));
                self.order(if active { Order::Remove(name) } else { Order::Clean(name) }).await
            }
        }
    }

    async fn read_ahead(&self, devices: BTreeMap<u64, Bytes>) -> Result<(), String> {
        let disks = Arc::clone(&self.read_ahead);
        let done = tokio::task::spawn_blocking(move || disks.set(&devices)).await;
        for said in done.map_err(|error| error.to_string())?? {
            tracing::info!("{said}");
        }
        Ok(())
    }

    async fn drop_cache(&self, files: Vec<FileId>) -> Result<(), String> {
        let cache = Arc::clone(&self.cache);
        // Neither this one nor the other is ever closed.
        let _turn = DROPS.acquire().await;
        let freed = tokio::task::spawn_blocking(move || cache.drop_files(&files)).await;
        let freed = freed.map_err(|error| format!("the page cache could not be dropped: {error}"))?;
        tracing::info!("{freed} of cold page cache dropped");
        Ok(())
    }

    /// Asks the engines; one that does not answer has nothing to say.
    async fn ask_activity(&self, instances: &BTreeSet<Instance>) {
        let _turn = LOOKS.acquire().await;
        let known = |i: &Instance| Some((i.clone(), self.units.get(i)?));
        let of: Vec<(Instance, UnitStatus)> = instances.iter().filter_map(known).collect();
        let activities = Arc::clone(&self.activities);
        let _ = tokio::task::spawn_blocking(move || activities.ask(&of)).await;
    }

    async fn stop(&self, instance: &Instance) -> Result<(), String> {
        let unit = instance.unit();
        let limit = self.systemd.stop_timeout(&unit).await.ok().flatten().unwrap_or(STOP);
        let group = self.group(instance);
        let stopped = self.systemd.stop(&unit, group.as_deref(), limit + SLACK).await;
        // The loop plans with what it sees: it shall see the end of the unit first.
        let status = self.units.refresh(&self.systemd, instance).await;
        let gone = status.is_ok_and(|s| matches!(s.state, UnitState::Inactive | UnitState::Failed));
        let outcome = match stopped {
            Ok(stopped) => {
                if stopped.killed {
                    tracing::warn!("{unit} did not stop in time and was killed");
                }
                Ok(())
            }
            Err(_) if gone => Ok(()),
            Err(error) => Err(format!("{instance} could not be stopped: {error}")),
        };
        // Its weights may have stayed behind as page cache.
        self.survey.look().await;
        outcome
    }

    /// Takes memory back from a unit, in steps, on a thread that may block.
    async fn reclaim(&self, instance: &Instance, bytes: Bytes) -> Result<(), String> {
        let failed =
            |why: &dyn std::fmt::Display| format!("nothing can be taken back from {instance}: {why}");
        let group = self.group(instance).ok_or_else(|| failed(&"it does not run"))?;
        let taken = tokio::task::spawn_blocking(move || cgroup::reclaim_bytes(&group, bytes, RECLAIM)).await;
        let taken = taken.map_err(|error| failed(&error))?.map_err(|error| failed(&error))?;
        tracing::info!("{} of {bytes} taken back from {instance}", taken.before - taken.after);
        Ok(())
    }

    /// Kills a unit's processes at once, and has the unit stopped.
    async fn kill(&self, instance: &Instance) -> Result<(), String> {
        if let Some(group) = self.group(instance) {
            // It returns at once, and needs neither bus nor systemd.
            cgroup::kill(&group).map_err(|error| format!("{instance} can't be killed: {error}"))?;
        }
        // Restart= would start it again.
        self.stop(instance).await
    }

    async fn start(&self, instance: &Instance) -> Result<(), String> {
        let unit = instance.unit();
        let started = self.systemd.start_to_end(&unit).await;
        let status = self.units.refresh(&self.systemd, instance).await;
        let Err(error) = started else { return Ok(()) };
        // What the unit says of itself is closer to the cause than systemd's word for it.
        let status = status.ok().filter(|status| !status.status_text.is_empty());
        Err(match (&error, status) {
            (SystemdError::Job { .. }, Some(status)) => {
                format!("{instance} did not start ({}): {}", status.result, status.status_text)
            }
            _ => format!("{instance} did not start: {error}"),
        })
    }

    async fn limit(&self, instance: &Instance, limits: Limits) -> Result<(), String> {
        let unit = instance.unit();
        let group = self.group(instance);
        let previous = self.units.applied(instance);
        let failed = |error: SystemdError| format!("{instance} runs without limits: {error}");
        let chosen = self.systemd.choose_limits(&unit, group.as_deref(), limits, previous.as_ref()).await;
        let chosen = chosen.map_err(failed)?;
        // Remembered before they are set: what is found without is taken for the administrator's.
        let all = self.units.set_applied(instance, chosen);
        let files = Arc::clone(&self.files);
        let saved = tokio::task::spawn_blocking(move || files.save_limits(&all)).await;
        if let Ok(Err(error)) = saved {
            tracing::warn!("{error}");
        }
        self.systemd.set_limits(&unit, &chosen).await.map(drop).map_err(failed)
    }

    /// Has a unit of its own carry out an order about swapfiles.
    async fn order(&self, order: Order) -> Result<(), String> {
        let unit = order.unit();
        let ended = self.systemd.start_to_end(&unit).await;
        let outcome = match ended {
            Ok(()) => {
                tracing::info!("{unit} is done");
                Ok(())
            }
            Err(error) => {
                let said =
                    self.systemd.unit(&unit).await.map(|status| status.status_text).unwrap_or_default();
                // Its failure is told; a failed unit left standing would only worry people.
                let _ = self.systemd.reset_failed(&unit).await;
                Err(if said.is_empty() { error.to_string() } else { said })
            }
        };
        // The loop plans with what it sees.
        self.survey.look().await;
        outcome
    }

    fn group(&self, instance: &Instance) -> Option<PathBuf> {
        let group: ControlGroup = self.units.get(instance)?.control_group.parse().ok()?;
        Some(self.host.group_directory(&group))
    }
}

/// Has the kernel do something on a thread that may block, and tells how long it took.
async fn blocking(what: &'static str, run: fn(&Path) -> std::io::Result<()>) -> Result<(), String> {
    let started = std::time::Instant::now();
    let done = tokio::task::spawn_blocking(move || run(Path::new("/"))).await;
    match done {
        Ok(Ok(())) => {
            tracing::info!("asked the kernel to {what}, which took {} ms", started.elapsed().as_millis());
            Ok(())
        }
        Ok(Err(error)) => Err(format!("the kernel does not {what}: {error}")),
        Err(error) => Err(format!("the daemon failed to {what}: {error}")),
    }
}

/// Milliseconds since boot.
pub(super) fn boot_msec() -> u64 {
    u64::try_from(since_boot().as_millis()).unwrap_or(u64::MAX)
}

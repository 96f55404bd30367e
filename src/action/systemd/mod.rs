//! Units, through systemd's bus interface. Every call ends within a time limit.

mod limits;
mod proxy;
mod watch;

use std::future::Future;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use futures_core::Stream;
use tokio::time::timeout;
use zbus::proxy::CacheProperties;
use zbus::{Connection, OwnedObjectPath};

pub use limits::{Applied, Values, administrators, merge};
pub use watch::{UnitEvent, Watch};

use super::Changed;
use super::cgroup;
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::UnitState;
use crate::os::pid_of;
use crate::text::harmless;
use proxy::{ManagerProxy, ServiceProxy, SliceProxy, UnitProxy};

/// systemd answers in milliseconds, unless it is blocked by a write to a control group.
const CALL: Duration = Duration::from_secs(30);

/// What is left for a unit to end after its processes were killed.
const AFTER_KILL: Duration = Duration::from_secs(10);

/// The pattern of the models' units.
pub const UNITS: &str = "llm@*.service";

/// systemd on the system bus.
#[derive(Clone, Debug)]
pub struct Systemd {
    manager: ManagerProxy<'static>,
}

/// Why systemd did not do or tell something.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SystemdError {
    /// No answer in time.
    #[error("systemd did not answer {call} within {} s", limit.as_secs())]
    Timeout {
        /// The method.
        call: &'static str,
        /// How long was waited.
        limit: Duration,
    },
    /// There is no such unit, or it is not loaded.
    #[error("{0}")]
    NoSuchUnit(String),
    /// systemd's error name and sentence.
    #[error("{call}: {message}")]
    Refused {
        /// The method.
        call: &'static str,
        /// `org.freedesktop.systemd1.TransactionIsDestructive`, …
        name: String,
        /// For people.
        message: String,
    },
    /// The bus failed.
    #[error("no connection to systemd ({0})")]
    Bus(String),
    /// A job ended other than by what was asked of it: `canceled`, `timeout`, `failed`, …
    #[error("the {kind} of {unit} ended as {result}")]
    Job {
        /// `start` or `stop`.
        kind: &'static str,
        /// Of which unit.
        unit: String,
        /// systemd's word for it.
        result: String,
    },
    /// It still runs after everything was tried.
    #[error("{0} can't be stopped: its processes outlive being killed")]
    Unkillable(String),
}

/// A unit as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitStatus {
    /// `llm@small.service`
    pub name: String,
    /// ActiveState, as far as it matters here.
    pub state: UnitState,
    /// SubState: `running`, `start-post`, `auto-restart`, …
    pub sub_state: String,
    /// MainPID, or 0.
    pub main_pid: u32,
    /// InvocationID in lower-case hexadecimal; empty when it never ran.
    pub invocation: String,
    /// ControlGroup; empty when it has none now.
    pub control_group: String,
    /// How it ended last: `success`, `exit-code`, `oom-kill`, …
    pub result: String,
    /// What the service says of itself; [`harmless`].
    pub status_text: String,
}

/// A queued or running job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// The unit.
    pub unit: String,
    /// `start`, `stop`, `restart`, …
    pub kind: String,
    /// `waiting` or `running`.
    pub state: String,
}

/// How a unit was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// Unchanged when it did not run.
    pub changed: Changed,
    /// It did not end in time and was killed.
    pub killed: bool,
}

impl Systemd {
    /// systemd on `bus`, subscribed to its signals.
    pub async fn new(bus: &Connection) -> Result<Self, SystemdError> {
        let build = ManagerProxy::builder(bus).cache_properties(CacheProperties::No).build();
        let systemd = Self { manager: bounded("Connect", build).await? };
        match bounded("Subscribe", systemd.manager.subscribe()).await {
            Ok(()) => Ok(systemd),
            Err(SystemdError::Refused { name, .. }) if name.ends_with(".AlreadySubscribed") => Ok(systemd),
            Err(error) => Err(error),
        }
    }

    /// All loaded units of a pattern such as [`UNITS`].
    pub async fn units(&self, pattern: &str) -> Result<Vec<UnitStatus>, SystemdError> {
        let entries =
            bounded("ListUnitsByPatterns", self.manager.list_units_by_patterns(&[], &[pattern])).await?;
        let mut units = Vec::with_capacity(entries.len());
        for (name, ..) in entries {
            units.push(self.unit(&name).await?);
        }
        Ok(units)
    }

    /// One unit; systemd loads it for that if need be. One that has no file is `Inactive`.
    pub async fn unit(&self, name: &str) -> Result<UnitStatus, SystemdError> {
        let path = unit_path(name);
        let (unit, service) = bounded("GetProperties", self.proxies(&path)).await?;
        let read = async {
            tokio::try_join!(
                unit.active_state(),
                unit.sub_state(),
                unit.invocation_id(),
                service.main_pid(),
                service.control_group(),
                service.result(),
                service.status_text(),
            )
        };
        let (active, sub_state, invocation, main_pid, control_group, result, status_text) =
            bounded("GetProperties", read).await?;
        Ok(UnitStatus {
            name: name.to_owned(),
            state: state(&active),
            sub_state,
            main_pid,
            invocation: hexadecimal(&invocation),
            control_group,
            result,
            status_text: harmless(&status_text),
        })
    }

    async fn proxies(
        &self,
        path: &OwnedObjectPath,
    ) -> zbus::Result<(UnitProxy<'static>, ServiceProxy<'static>)> {
        let bus = self.manager.inner().connection();
        let unit = UnitProxy::builder(bus).path(path.clone()).cache_properties(CacheProperties::No);
        let service = ServiceProxy::builder(bus).path(path.clone()).cache_properties(CacheProperties::No);
        Ok((unit.build().await?, service.build().await?))
    }

    /// The unit and invocation that the process behind `pidfd` belongs to: name and InvocationID.
    pub async fn unit_of(&self, pidfd: BorrowedFd<'_>) -> Result<(String, String), SystemdError> {
        match bounded("GetUnitByPIDFD", self.manager.get_unit_by_pidfd(pidfd.into())).await {
            Ok((_, unit, invocation)) => Ok((unit, hexadecimal(&invocation))),
            // Before systemd 253: by number, which is right if the process is there afterwards too.
            Err(SystemdError::Refused { name, .. }) if name.ends_with(".UnknownMethod") => {
                let gone = || SystemdError::NoSuchUnit("the process is gone".into());
                let pid = pid_of(pidfd).ok().flatten().ok_or_else(gone)?;
                let unit = self.unit_of_pid(pid).await?;
                if pid_of(pidfd.as_fd()).ok().flatten() == Some(pid) { Ok(unit) } else { Err(gone()) }
            }
            Err(error) => Err(error),
        }
    }

    /// The same by process id, for a bus that does not hand out descriptors of its callers.
    pub async fn unit_of_pid(&self, pid: u32) -> Result<(String, String), SystemdError> {
        let path = bounded("GetUnitByPID", self.manager.get_unit_by_pid(pid)).await?;
        let (unit, _) = bounded("GetProperties", self.proxies(&path)).await?;
        let (name, invocation) =
            bounded("GetProperties", async { tokio::try_join!(unit.id(), unit.invocation_id()) }).await?;
        Ok((name, hexadecimal(&invocation)))
    }

    /// All queued and running jobs.
    pub async fn jobs(&self) -> Result<Vec<Job>, SystemdError> {
        let jobs = bounded("ListJobs", self.manager.list_jobs()).await?;
        Ok(jobs.into_iter().map(|(_, unit, kind, state, ..)| Job { unit, kind, state }).collect())
    }

    /// Whether the system, or the daemon for good, is going down, so that nothing may be started.
    /// StartUnit alone does not tell: it succeeds while a target is isolated.
    pub async fn is_stopping(&self, jobs: &[Job]) -> Result<bool, SystemdError> {
        Ok(stop_is_queued(jobs) || bounded("SystemState", self.manager.system_state()).await? == "stopping")
    }

    /// Starts a unit and waits until it has started, or has not. Unbounded: loads take as long as
    /// they take, and systemd's own time-out holds.
    pub async fn start_to_end(&self, unit: &str) -> Result<(), SystemdError> {
        let this_unit = [(2, unit)];
        let removed = self.manager.receive_job_removed_with_args(&this_unit);
        let mut removed = bounded("AddMatch", removed).await?;
        let job = bounded("StartUnit", self.manager.start_unit(unit, "replace")).await?;
        while let Some(signal) = next(&mut removed).await {
            if let Ok(ended) = signal.args()
                && ended.job == job
            {
                let result = ended.result.clone();
                let failed = || SystemdError::Job { kind: "start", unit: unit.to_owned(), result };
                return if ended.result == "done" { Ok(()) } else { Err(failed()) };
            }
        }
        Err(SystemdError::Bus("the bus is gone".to_owned()))
    }

    /// Whether a person started the unit: the machine is not booting, and it is not a restart
    /// after a crash.
    pub async fn is_explicit_start(&self, unit: &str) -> Result<bool, SystemdError> {
        let (_, service) = bounded("GetProperties", self.proxies(&unit_path(unit))).await?;
        let restarts = bounded("GetProperties", service.n_restarts()).await?;
        let system = bounded("SystemState", self.manager.system_state()).await?;
        Ok(restarts == 0 && !matches!(system.as_str(), "initializing" | "starting"))
    }

    /// How long systemd gives a unit to stop, before it kills it.
    pub async fn stop_timeout(&self, unit: &str) -> Result<Option<Duration>, SystemdError> {
        let (_, service) = bounded("GetProperties", self.proxies(&unit_path(unit))).await?;
        let usec = bounded("GetProperties", service.timeout_stop_usec()).await?;
        Ok((usec != u64::MAX).then(|| Duration::from_micros(usec)))
    }

    /// Queues the start of a unit; how it ends comes from [`Self::watch`].
    pub async fn start(&self, unit: &str) -> Result<(), SystemdError> {
        bounded("StartUnit", self.manager.start_unit(unit, "replace")).await.map(drop)
    }

    /// Stops a unit and waits until it is. One that does not end before `deadline` is killed:
    /// through systemd, then by its control group, and stopped again, so that `Restart=` does not
    /// start it.
    ///
    /// `group` is the directory of its control group.
    pub async fn stop(
        &self,
        unit: &str,
        group: Option<&Path>,
        deadline: Duration,
    ) -> Result<Stopped, SystemdError> {
        let unchanged = Stopped { changed: Changed::Unchanged, killed: false };
        let running = |state: UnitState| !matches!(state, UnitState::Inactive | UnitState::Failed);
        if !running(self.unit(unit).await?.state) && !self.jobs().await?.iter().any(|job| job.unit == unit) {
            return Ok(unchanged);
        }
        match self.stop_once(unit, deadline).await {
            Ok(()) => return Ok(Stopped { changed: Changed::Changed, killed: false }),
            Err(SystemdError::NoSuchUnit(_)) => return Ok(unchanged),
            Err(SystemdError::Timeout { call: "StopUnit job", .. }) => {}
            // systemd gave up on it, or somebody asked for it to run again.
            Err(SystemdError::Job { ref result, .. }) if result != "canceled" => {}
            Err(error) => return Err(error),
        }
        let killed = bounded("KillUnit", self.manager.kill_unit(unit, "all", nix::libc::SIGKILL)).await;
        if let Some(group) = group {
            // It returns at once; whether it worked shows in the end of the job below.
            let _ = cgroup::kill(group);
        }
        match self.stop_once(unit, AFTER_KILL).await {
            Ok(()) | Err(SystemdError::NoSuchUnit(_)) => {}
            Err(_) if !running(self.unit(unit).await?.state) => {}
            Err(SystemdError::Timeout { .. }) => return Err(SystemdError::Unkillable(unit.to_owned())),
            Err(error) => return killed.and(Err(error)),
        }
        Ok(Stopped { changed: Changed::Changed, killed: true })
    }

    /// StopUnit, and the end of its job.
    async fn stop_once(&self, unit: &str, deadline: Duration) -> Result<(), SystemdError> {
        // Listening begins before the call, and to this unit alone: other jobs don't queue up.
        let this_unit = [(2, unit)];
        let removed = self.manager.receive_job_removed_with_args(&this_unit);
        let mut removed = bounded("AddMatch", removed).await?;
        let job = bounded("StopUnit", self.manager.stop_unit(unit, "replace")).await?;
        let ended = async {
            while let Some(signal) = next(&mut removed).await {
                if let Ok(ended) = signal.args()
                    && ended.job == job
                {
                    return ended.result.clone();
                }
            }
            "lost".to_owned()
        };
        let late = |_| SystemdError::Timeout { call: "StopUnit job", limit: deadline };
        let result = timeout(deadline, ended).await.map_err(late)?;
        if result == "done" {
            return Ok(());
        }
        Err(SystemdError::Job { kind: "stop", unit: unit.to_owned(), result })
    }

    /// Forgets that a unit failed.
    pub async fn reset_failed(&self, unit: &str) -> Result<(), SystemdError> {
        bounded("ResetFailedUnit", self.manager.reset_failed_unit(unit)).await
    }

    /// MemoryMax= of a slice, `None` for infinity; also of one that has no control group yet.
    pub async fn slice_limit(&self, slice: &str) -> Result<Option<Bytes>, SystemdError> {
        let bus = self.manager.inner().connection();
        let proxy = SliceProxy::builder(bus).path(unit_path(slice)).cache_properties(CacheProperties::No);
        let max = bounded("GetProperties", async { proxy.build().await?.memory_max().await }).await?;
        Ok((max != u64::MAX).then_some(Bytes(max)))
    }
}

/// Instances whose start is queued or running.
#[must_use]
pub fn starting(jobs: &[Job]) -> Vec<Instance> {
    let starts = |job: &&Job| matches!(job.kind.as_str(), "start" | "restart" | "try-restart");
    jobs.iter().filter(starts).filter_map(|job| Instance::from_unit(&job.unit)).collect()
}

fn stop_is_queued(jobs: &[Job]) -> bool {
    let ends = |unit: &str| matches!(unit, "multi-user.target" | "plimsolld.service" | "llm.slice");
    jobs.iter().any(|job| job.kind == "stop" && ends(&job.unit))
}

/// ActiveState.
fn state(active: &str) -> UnitState {
    match active {
        "active" | "reloading" | "refreshing" => UnitState::Active,
        "activating" => UnitState::Activating,
        "deactivating" => UnitState::Deactivating,
        "failed" => UnitState::Failed,
        _ => UnitState::Inactive,
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The object of a unit: its name with everything but letters and digits escaped (a leading digit
/// too), as sd_bus_path_encode(3) has it.
fn unit_path(name: &str) -> OwnedObjectPath {
    let mut path = String::from("/org/freedesktop/systemd1/unit/");
    for (n, byte) in name.bytes().enumerate() {
        if byte.is_ascii_alphabetic() || (n > 0 && byte.is_ascii_digit()) {
            path.push(char::from(byte));
        } else {
            path.push_str(&format!("_{byte:02x}"));
        }
    }
    if name.is_empty() {
        path.push('_');
    }
    // The alphabet above is that of object paths: this does not fail.
    OwnedObjectPath::try_from(path).unwrap_or_default()
}

/// A call with its time limit.
async fn bounded<T>(
    call: &'static str,
    future: impl Future<Output = zbus::Result<T>>,
) -> Result<T, SystemdError> {
    match timeout(CALL, future).await {
        Err(_) => Err(SystemdError::Timeout { call, limit: CALL }),
        Ok(Ok(value)) => Ok(value),
        Ok(Err(zbus::Error::MethodError(name, message, _))) => {
            let message = message.unwrap_or_else(|| name.to_string());
            if name.as_str() == "org.freedesktop.systemd1.NoSuchUnit" {
                return Err(SystemdError::NoSuchUnit(message));
            }
            Err(SystemdError::Refused { call, name: name.to_string(), message })
        }
        Ok(Err(error)) => Err(SystemdError::Bus(error.to_string())),
    }
}

async fn next<S: Stream + Unpin>(stream: &mut S) -> Option<S::Item> {
    std::future::poll_fn(|context| Pin::new(&mut *stream).poll_next(context)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_units_object_is_named_as_systemd_does() {
        for (name, path) in [
            ("llm@small.service", "llm_40small_2eservice"),
            ("llm@a-b_c.d@2.service", "llm_40a_2db_5fc_2ed_402_2eservice"),
            ("3.slice", "_33_2eslice"),
            ("", "_"),
        ] {
            assert_eq!(unit_path(name).as_str(), format!("/org/freedesktop/systemd1/unit/{path}"));
        }
    }

    #[test]
    fn jobs_say_who_starts_and_whether_the_machine_goes_down() {
        let job =
            |unit: &str, kind: &str| Job { unit: unit.into(), kind: kind.into(), state: "waiting".into() };
        let jobs = [
            job("llm@a.service", "start"),
            job("llm@b@2.service", "restart"),
            job("llm@c.service", "stop"),
            job("ssh.service", "start"),
        ];
        let names: Vec<String> = starting(&jobs).iter().map(ToString::to_string).collect();
        assert_eq!(names, ["a", "b@2"]);
        assert!(!stop_is_queued(&jobs));
        assert!(stop_is_queued(&[job("multi-user.target", "stop")]));
        assert!(!stop_is_queued(&[job("plimsolld.service", "restart")]));
    }

    #[test]
    fn states_and_ids_are_read() {
        assert_eq!(state("reloading"), UnitState::Active);
        assert_eq!(state("maintenance"), UnitState::Inactive);
        assert_eq!(hexadecimal(&[0, 0xab, 9]), "00ab09");
    }
}

//! `action::systemd`, `action::cgroup` and `host` on a real systemd, and the sandbox of
//! plimsolld.service from inside.
//!
//! These need root on a machine that may be upset, where systemd is PID 1: they do nothing unless
//! `PLIMSOLL_TEST_SYSTEMD` is set to the name of one of them (`all` but `sandbox`, which has to run
//! as plimsolld.service). `cargo xtask test` runs them so in the virtual machine. They make units llm@plimsoll-test-….service under /run.

#![allow(clippy::unwrap_used, clippy::panic)] // a test fails by panicking

use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use plimsoll::action::page_cache::{drop_file, open_regular};
use plimsoll::action::state_file::{Loaded, StateFile};
use plimsoll::action::systemd::{self, Applied, Systemd, SystemdError, UNITS, UnitEvent};
use plimsoll::action::{Changed, cgroup, kernel};
use plimsoll::bytes::Bytes;
use plimsoll::config::Instance;
use plimsoll::host::{ControlGroup, Host};
use plimsoll::ledger::UnitState;
use plimsoll::os::{pidfd_open, resident_bytes};
use plimsoll::policy::limits::Limits;

/// No wait here is longer, and none that works takes as long.
const PATIENCE: Duration = Duration::from_secs(60);

fn wanted(test: &str) -> bool {
    let named = std::env::var("PLIMSOLL_TEST_SYSTEMD").unwrap_or_default();
    named == test || (named == "all" && test != "sandbox")
}

/// A unit of our own; stopped and removed when the test ends.
struct Unit(Instance);

impl Unit {
    fn new(name: &str, service: &str) -> Self {
        let unit = Self(format!("plimsoll-test-{name}").parse().unwrap());
        let text = format!("[Service]\nSlice=llm.slice\nMemoryAccounting=yes\n{service}\n");
        std::fs::create_dir_all("/run/systemd/system").unwrap();
        std::fs::write(unit.file(), text).unwrap();
        run("systemctl", &["daemon-reload"]);
        unit
    }

    fn name(&self) -> String {
        self.0.unit()
    }

    fn file(&self) -> PathBuf {
        Path::new("/run/systemd/system").join(self.name())
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        let name = self.name();
        run("systemctl", &["kill", "-s", "KILL", &name]);
        run("systemctl", &["stop", &name]);
        let _ = std::fs::remove_file(self.file());
        run("systemctl", &["revert", &name]);
    }
}

fn run(program: &str, arguments: &[&str]) -> bool {
    std::process::Command::new(program).args(arguments).status().unwrap().success()
}

async fn systemd() -> Systemd {
    Systemd::new(&zbus::Connection::system().await.unwrap()).await.unwrap()
}

/// Waits until systemd says that the unit is in this state.
async fn until(systemd: &Systemd, unit: &Unit, state: UnitState, sub_state: &str) {
    let wait = async {
        loop {
            let now = systemd.unit(&unit.name()).await.unwrap();
            if now.state == state && now.sub_state == sub_state {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap();
}

/// Sets limits; returns them and whether that changed anything.
async fn limit(
    systemd: &Systemd,
    unit: &str,
    group: &Path,
    limits: Limits,
    previous: Option<&Applied>,
) -> (Applied, Changed) {
    let chosen = systemd.choose_limits(unit, Some(group), limits, previous).await.unwrap();
    (chosen, systemd.set_limits(unit, &chosen).await.unwrap())
}

async fn started(systemd: &Systemd, unit: &Unit) -> (ControlGroup, u32) {
    systemd.start(&unit.name()).await.unwrap();
    until(systemd, unit, UnitState::Active, "running").await;
    let status = systemd.unit(&unit.name()).await.unwrap();
    (status.control_group.parse().unwrap(), status.main_pid)
}

/// A file of `size` bytes that belongs to nobody in particular, not to us.
fn foreign_file(path: &str, size: usize) {
    let mut file = std::fs::File::create(path).unwrap();
    file.write_all(&vec![7; size]).unwrap();
    file.sync_all().unwrap();
    assert!(run("chown", &["65534:65534", path]) && run("chmod", &["600", path]));
}

#[tokio::test(flavor = "current_thread")]
async fn a_unit_runs_is_identified_and_stops() {
    if !wanted("lifecycle") {
        return;
    }
    let unit = Unit::new("life", "ExecStart=/bin/sleep infinity");
    let systemd = systemd().await;
    let (events, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let (_adopted, more) = tokio::sync::mpsc::unbounded_channel();
    let _watch = systemd.watch(events, Instance::from_unit, Vec::new(), more).await.unwrap();
    let before = systemd.unit(&unit.name()).await.unwrap();
    assert_eq!((before.state, before.main_pid, before.invocation.as_str()), (UnitState::Inactive, 0, ""));
    let nothing = systemd.stop(&unit.name(), None, PATIENCE).await.unwrap();
    assert_eq!((nothing.changed, nothing.killed), (Changed::Unchanged, false));

    let (group, pid) = started(&systemd, &unit).await;
    let status = systemd.unit(&unit.name()).await.unwrap();
    let pidfd = pidfd_open(pid).unwrap();
    let identity = (unit.name(), status.invocation.clone());
    assert_eq!(systemd.unit_of(pidfd.as_fd()).await.unwrap(), identity);
    assert_eq!(systemd.unit_of_pid(pid).await.unwrap(), identity);
    assert_eq!(status.invocation.len(), 32);
    assert!(systemd.units(UNITS).await.unwrap().contains(&status));
    let host = Host::default();
    assert_eq!(host.group_of(pid).unwrap(), group);
    assert_eq!(host.processes(&group).unwrap(), [pid]);
    assert!(host.populated(&group).unwrap());
    assert!(!systemd.is_stopping(&systemd.jobs().await.unwrap()).await.unwrap());

    let stopped = systemd.stop(&unit.name(), None, PATIENCE).await.unwrap();
    assert_eq!((stopped.changed, stopped.killed), (Changed::Changed, false));
    assert_eq!(systemd.unit(&unit.name()).await.unwrap().state, UnitState::Inactive);
    assert!(!host.populated(&group).unwrap());
    assert!(systemd.unit_of(pidfd.as_fd()).await.is_err());

    let mut seen = Vec::new();
    let end = UnitEvent::Ended(unit.0.clone(), "done".into());
    while seen.iter().filter(|event| **event == end).count() < 2 {
        seen.push(tokio::time::timeout(PATIENCE, heard.recv()).await.unwrap().unwrap());
    }
    assert!(seen.contains(&UnitEvent::Queued(unit.0.clone())), "{seen:?}");
    assert!(seen.contains(&UnitEvent::Changed(unit.0.clone())), "{seen:?}");
    // Ends by itself, without a job.
    let (_, pid) = started(&systemd, &unit).await;
    while heard.try_recv().is_ok() {}
    assert!(run("kill", &["-9", &pid.to_string()]));
    until(&systemd, &unit, UnitState::Failed, "failed").await;
    let event = tokio::time::timeout(PATIENCE, heard.recv()).await.unwrap().unwrap();
    assert_eq!(event, UnitEvent::Changed(unit.0.clone()));
    assert_eq!(systemd.unit(&unit.name()).await.unwrap().result, "signal");
    systemd.reset_failed(&unit.name()).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn one_that_does_not_end_is_killed_and_stays_down() {
    if !wanted("kill") {
        return;
    }
    // Ready only once the trap is in place: before that, it would end at once.
    let stubborn = "Type=notify\nNotifyAccess=all\n\
                    ExecStart=/bin/sh -c 'trap \"\" TERM; systemd-notify --ready; while :; do sleep 1; done'\n\
                    TimeoutStopSec=infinity\nRestart=always\nRestartSec=0";
    let unit = Unit::new("stubborn", stubborn);
    let systemd = systemd().await;
    let (group, _) = started(&systemd, &unit).await;
    let directory = Host::default().group_directory(&group);
    let stopped = systemd.stop(&unit.name(), Some(&directory), Duration::from_secs(2)).await.unwrap();
    assert_eq!((stopped.changed, stopped.killed), (Changed::Changed, true));
    // A restart would show as the unit's next state (auto-restart), never as failed.
    until(&systemd, &unit, UnitState::Failed, "failed").await;
    let jobs = systemd.jobs().await.unwrap();
    assert!(!systemd::starting(&jobs).contains(&unit.0), "{jobs:?}");
    assert!(!Host::default().populated(&group).unwrap());
}

#[tokio::test(flavor = "current_thread")]
async fn a_missing_unit_is_named() {
    if !wanted("missing") {
        return;
    }
    let systemd = systemd().await;
    let error = systemd.start("plimsoll-test-none.service").await.unwrap_err();
    assert!(matches!(error, SystemdError::NoSuchUnit(_)), "{error:?}");
    assert!(error.to_string().contains("plimsoll-test-none"), "{error}");
    assert_eq!(systemd.unit("plimsoll-test-none.service").await.unwrap().state, UnitState::Inactive);
    assert_eq!(
        systemd.stop("plimsoll-test-none.service", None, PATIENCE).await.unwrap().changed,
        Changed::Unchanged
    );
}

#[tokio::test(flavor = "current_thread")]
async fn memory_is_measured_limited_and_reclaimed() {
    if !wanted("memory") {
        return;
    }
    foreign_file("/var/tmp/plimsoll-test-cache", 96 << 20);
    drop_file(&open_regular(Path::new("/var/tmp/plimsoll-test-cache"), None).unwrap()).unwrap();
    let program = "ExecStart=/usr/bin/perl -e '$$x = \"a\" x (64 << 20); \
                   open F, \"<\", \"/var/tmp/plimsoll-test-cache\"; while (read F, $$y, 1 << 20) {} sleep 9999'\n\
                   MemoryMax=1G";
    let unit = Unit::new("memory", program);
    let systemd = systemd().await;
    let (group, _) = started(&systemd, &unit).await;
    let host = Host::default();
    let directory = host.group_directory(&group);
    let loaded = async {
        while host.measured(&group, &[]).unwrap().file < Bytes::mib(95) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(PATIENCE, loaded).await.unwrap();
    let measured = host.measured(&group, &[]).unwrap();
    assert!((Bytes::mib(64)..Bytes::mib(80)).contains(&measured.private), "{measured:?}");
    assert_eq!(measured.locked_file, Bytes::ZERO);
    assert_eq!(host.memory_limit(&group).unwrap(), Some(Bytes::gib(1)));
    assert_eq!(systemd.slice_limit("llm.slice").await.unwrap(), None);

    // Below what it uses, but not below what can't be reclaimed: the cache goes.
    let limits = Limits { high: Bytes::mib(110), max: Bytes::gib(2), swap_max: Some(Bytes::ZERO) };
    let (applied, changed) = limit(&systemd, &unit.name(), &directory, limits, None).await;
    assert_eq!(changed, Changed::Changed);
    assert_eq!(applied.set.max, Bytes::gib(1), "the administrator's");
    assert_eq!(applied.set.high, Bytes::mib(110));
    assert_eq!(systemd.limits(&unit.name()).await.unwrap(), applied.set);
    assert_eq!(host.memory_limit(&group).unwrap(), Some(Bytes::gib(1)));
    assert!(host.memory_current(&group).unwrap() <= Bytes::mib(110));
    let (again, changed) = limit(&systemd, &unit.name(), &directory, limits, Some(&applied)).await;
    assert_eq!((again.set, changed), (applied.set, Changed::Unchanged));

    // Below what can't be reclaimed: usage is the limit then, and nothing is killed.
    let tight = Limits { high: Bytes::mib(20), max: Bytes::mib(30), ..limits };
    let (tight, _) = limit(&systemd, &unit.name(), &directory, tight, Some(&applied)).await;
    assert!(tight.set.high > Bytes::mib(60) && tight.set.high < Bytes::mib(110), "{tight:?}");
    assert_eq!(systemd.unit(&unit.name()).await.unwrap().state, UnitState::Active);
    assert_eq!(host.memory_events(&group).unwrap().oom_kill, 0);

    let deadline = std::time::Instant::now() + PATIENCE;
    let left = cgroup::reclaim(&directory, Bytes::ZERO, deadline).unwrap().after;
    assert!(left > Bytes::mib(60), "without swap anonymous memory stays: {left}");
    assert_eq!(cgroup::kill(&directory).unwrap(), Changed::Changed);
    until(&systemd, &unit, UnitState::Failed, "failed").await;
    std::fs::remove_file("/var/tmp/plimsoll-test-cache").unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn what_starts_is_seen_in_the_jobs() {
    if !wanted("jobs") {
        return;
    }
    let unit = Unit::new("slow", "Type=oneshot\nExecStart=/bin/sleep 600");
    let systemd = systemd().await;
    systemd.start(&unit.name()).await.unwrap();
    until(&systemd, &unit, UnitState::Activating, "start").await;
    assert!(systemd::starting(&systemd.jobs().await.unwrap()).contains(&unit.0));
}

/// As plimsolld.service: what the daemon has to do must be possible, and nothing beyond it.
/// Expects a running llm@plimsoll-test-other.service of another user, and its files
/// /home/plimsoll-test and /var/tmp/plimsoll-test, which belong to another user too.
#[tokio::test(flavor = "current_thread")]
async fn the_daemons_sandbox_allows_what_it_needs() {
    if !wanted("sandbox") {
        return;
    }
    for path in ["/home/plimsoll-test", "/var/tmp/plimsoll-test"] {
        let file = open_regular(Path::new(path), None).unwrap();
        let size = file.metadata().unwrap().len();
        std::io::copy(&mut &file, &mut std::io::sink()).unwrap();
        assert_eq!(resident_bytes(&file).unwrap(), Bytes(size), "{path}");
        assert_eq!(drop_file(&file).unwrap().gain(), Bytes(size), "{path}");
    }
    for path in
        ["/etc/plimsoll-test", "/home/plimsoll-test2", "/var/tmp/plimsoll-test2", "/proc/sys/vm/swappiness"]
    {
        assert!(std::fs::write(path, "1").is_err(), "{path}");
    }
    let state = StateFile::at("/var/lib/plimsoll/test.json");
    state.save(&1).unwrap();
    assert_eq!(state.load().unwrap(), Loaded::Value(1));
    state.remove().unwrap();
    StateFile::at("/run/plimsoll/test.json").save(&1).unwrap();

    let host = Host::default();
    let unit = "llm@plimsoll-test-other.service";
    let systemd = systemd().await;
    let status = systemd.unit(unit).await.unwrap();
    let group: ControlGroup = status.control_group.parse().unwrap();
    let directory = host.group_directory(&group);
    assert!(host.drm_usage(&[status.main_pid]).is_some(), "fdinfo of another user's process");
    cgroup::reclaim(&directory, Bytes::ZERO, std::time::Instant::now() + PATIENCE).unwrap();
    let limits = Limits { high: Bytes::gib(1), max: Bytes::gib(1), swap_max: None };
    let (applied, _) = limit(&systemd, unit, &directory, limits, None).await;
    assert_eq!(applied.set.max, Bytes::gib(1));
    // A pressure trigger with a window that takes CAP_SYS_RESOURCE.
    let mut trigger = std::fs::File::options().read(true).write(true).open("/proc/pressure/memory").unwrap();
    trigger.write_all(b"some 50000 500000\0").unwrap();
    // The last resort, and systemd's own way, on another user's process.
    let pidfd = pidfd_open(status.main_pid).unwrap();
    plimsoll::os::pidfd_send_signal(pidfd.as_fd(), nix::sys::signal::Signal::SIGURG).unwrap();
    nix::sys::mman::mlockall(nix::sys::mman::MlockAllFlags::MCL_CURRENT).unwrap();
    assert_eq!(systemd.stop(unit, Some(&directory), PATIENCE).await.unwrap().changed, Changed::Changed);
    // Free memory is made of available memory, and nothing else of the kernel is changed.
    kernel::compact(Path::new("/")).unwrap();
    kernel::drop_all_cache(Path::new("/")).unwrap();
    assert!(std::fs::write("/proc/sys/vm/swappiness", "60").is_err(), "another setting of the kernel");

    println!("sandbox: done");
}

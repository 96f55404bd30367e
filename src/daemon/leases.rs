//! Leases: memory held for what is not a model, for as long as a descriptor is open and its holder lives.
//!
//! To the decisions a lease is an instance like a model's: asked for with a request, shown in a reading of the machine
//! as a unit that is there for as long as its holder is. So it is admitted, counted and made room for like a model. It
//! is never evicted, for nobody but its holder can end it.
//!
//! The holder gets the writing end of a pipe. The other end is kept here and in systemd's descriptor store, so that a
//! lease outlives a restart of the daemon.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;

use super::handle::Fault;
use super::input::{Input, Publication};
use super::run::Daemon;
use crate::action::notify::Notifier;
use crate::bytes::Bytes;
use crate::config::{Instance, ModelName};
use crate::host::Host;
use crate::ledger::{Footprint, Machine, Measured, Unit, UnitState};
use crate::os::{pidfd_open, watched};
use crate::policy::request::Patience;
use crate::policy::{Event, Refusal, Request, Rung};

/// Leases that there may be, waiting ones too. Each has a descriptor here and one in systemd's store
/// (FileDescriptorStoreMax= in plimsolld.service).
const MOST: usize = 64;
/// And of one user other than root.
const MOST_OF_A_USER: usize = 16;
/// For how long a reading of the machine looks at what leases hold; the last one of it may take longer.
const MEASURING: Duration = Duration::from_millis(10);
/// After a look a lease is left alone for so many times what that took.
const SPARED: u32 = 10;
/// What was measured before that is too old …
const STALE: Duration = Duration::from_secs(5);
/// … and looked at again so soon.
pub(super) const CATCH_UP: Duration = Duration::from_millis(200);
/// What the names of our descriptors in systemd's store begin with.
const STORED: &str = "lease-";

/// A lease that is asked for.
#[derive(Debug)]
pub struct LeaseAsk {
    /// Its number, which no other lease of this boot has.
    pub id: u64,
    /// Its name for people.
    pub name: ModelName,
    /// The user who asks.
    pub uid: u32,
    /// The process that holds it.
    pub pid: u32,
    /// A descriptor of that.
    pub pidfd: OwnedFd,
    /// What is to be held.
    pub footprint: Footprint,
    /// 0 to 100: only strictly lower ones are evicted for it.
    pub priority: u8,
    /// Wait until there is room, rather than be refused.
    pub wait: bool,
    /// Told once its object is on the bus.
    pub began: Arc<Notify>,
    /// Where the descriptor goes.
    pub reply: oneshot::Sender<Result<OwnedFd, Fault>>,
}

/// What is shown of a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseInfo {
    /// Its number, also in its path on the bus.
    pub id: u64,
    /// Its name in the ledger.
    pub instance: Instance,
    /// The user who holds it.
    pub uid: u32,
    /// The process that does.
    pub pid: u32,
    /// What is held on the host.
    pub bytes: Bytes,
    /// And on GPUs.
    pub gpu_bytes: Bytes,
    /// 0 to 100.
    pub priority: u8,
}

/// What is remembered of a lease across a restart of the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SavedLease {
    /// Its number.
    pub id: u64,
    /// Its name in the ledger.
    pub instance: Instance,
    /// The user who holds it.
    pub uid: u32,
    /// The process that does, told from a later one of the same number by when it started (clock ticks since boot).
    pub pid: u32,
    /// That time.
    pub start_time: u64,
}

/// A lease that was there before a restart of the daemon, and still is.
#[derive(Debug)]
pub struct KeptLease {
    saved: SavedLease,
    reader: OwnedFd,
    pidfd: OwnedFd,
}

#[derive(Debug)]
struct Lease {
    saved: SavedLease,
    state: UnitState,
    reader: OwnedFd,
    watch: JoinHandle<()>,
    /// Of one that waits for an answer.
    asking: Option<Asking>,
    /// What its holder had when that was looked at last.
    seen: Option<Seen>,
}

/// A look at a holder.
#[derive(Debug)]
struct Seen {
    measured: Measured,
    at: Instant,
    took: Duration,
}

#[derive(Debug)]
struct Asking {
    ticket: u64,
    writer: OwnedFd,
    began: Arc<Notify>,
    reply: oneshot::Sender<Result<OwnedFd, Fault>>,
}

impl Lease {
    fn new(saved: SavedLease, state: UnitState, reader: OwnedFd, watch: JoinHandle<()>) -> Self {
        Self { saved, state, reader, watch, asking: None, seen: None }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

/// All leases, by number.
#[derive(Debug, Default)]
pub(super) struct Leases {
    all: BTreeMap<u64, Lease>,
}

/// The InvocationID that stands for a lease.
fn invocation(id: u64) -> String {
    format!("{id:016x}")
}

/// The name of its descriptor in systemd's store.
fn stored_name(id: u64) -> String {
    format!("{STORED}{id:016x}")
}

impl Leases {
    /// Shows them in a reading of the machine: what the decisions go by. What a process holds counts for one of its
    /// leases, and for none of those that it is below.
    ///
    /// Measuring (a process and what it has started but for other holders) takes the loop's time: each lease is left
    /// alone for a while that grows with how long it took, and where they take long together, the rest are shown as they
    /// were before. What was never measured always is: who holds much would be taken for somebody else. Returns whether
    /// any is shown as it was too long ago.
    pub(super) fn show(
        &mut self,
        machine: &mut Machine,
        now: Instant,
        mut measure: impl FnMut(u32, &BTreeSet<u32>) -> (Measured, Duration),
    ) -> bool {
        let holders: BTreeSet<u32> = self.all.values().map(|lease| lease.saved.pid).collect();
        let mut first: BTreeMap<u32, &mut Lease> = BTreeMap::new();
        for lease in self.all.values_mut() {
            match first.entry(lease.saved.pid) {
                Entry::Vacant(entry) => {
                    entry.insert(lease);
                }
                Entry::Occupied(_) => lease.seen = None,
            }
        }
        let mut oldest_first: Vec<&mut Lease> = first.into_values().collect();
        oldest_first.sort_by_key(|lease| lease.seen.as_ref().map(|seen| seen.at));
        let (mut took, mut stale) = (Duration::ZERO, false);
        for lease in oldest_first {
            let age = lease.seen.as_ref().map(|seen| (now.saturating_duration_since(seen.at), seen.took));
            let rests = age.is_some_and(|(age, took)| age < took * SPARED);
            if rests || (age.is_some() && took >= MEASURING) {
                stale |= !rests && age.is_some_and(|(age, _)| age >= STALE);
                continue;
            }
            let (measured, this) = measure(lease.saved.pid, &holders);
            took += this;
            lease.seen = Some(Seen { measured, at: now, took: this });
        }
        for lease in self.all.values() {
            let unit = Unit {
                state: lease.state,
                main_pid: lease.saved.pid,
                invocation: invocation(lease.saved.id),
                measured: lease.seen.as_ref().map(|seen| seen.measured.clone()).unwrap_or_default(),
                ..Unit::default()
            };
            machine.units.insert(lease.saved.instance.clone(), unit);
        }
        stale
    }

    /// What has to survive a restart of the daemon.
    pub(super) fn saved(&self) -> Vec<SavedLease> {
        // Also those that wait: one is saved before it is answered, and without a descriptor it means nothing.
        self.all.values().map(|lease| lease.saved.clone()).collect()
    }

    /// The one of this name in the ledger.
    pub(super) fn find(&self, instance: &Instance) -> Option<&SavedLease> {
        self.all.values().map(|lease| &lease.saved).find(|saved| saved.instance == *instance)
    }

    /// The one whose answer has this ticket.
    fn asked_with(&self, ticket: u64) -> Option<u64> {
        let of = |lease: &&Lease| lease.asking.as_ref().is_some_and(|asking| asking.ticket == ticket);
        self.all.values().find(of).map(|lease| lease.saved.id)
    }

    /// A name in the ledger that is free; none where there are too many of it.
    fn free_name(&self, name: &ModelName) -> Option<Instance> {
        (1..=99).map(|number| Instance::lease(name.clone(), number)).find(|i| self.find(i).is_none())
    }
}

/// The leases that were saved and are still held: `descriptors` are those of systemd's store, by name. What belongs to
/// no lease any more is removed from there.
#[must_use]
pub fn keep(
    saved: Vec<SavedLease>,
    descriptors: Vec<(String, OwnedFd)>,
    host: &Host,
    notifier: &Notifier,
) -> Vec<KeptLease> {
    let mut saved: BTreeMap<String, SavedLease> =
        saved.into_iter().map(|lease| (stored_name(lease.id), lease)).collect();
    let mut kept = Vec::new();
    for (name, reader) in descriptors.into_iter().filter(|(name, _)| name.starts_with(STORED)) {
        // Opened first: if the number was given to another process since, that one started later.
        let alive = saved.remove(&name).and_then(|lease| {
            let pidfd = pidfd_open(lease.pid).ok()?;
            let same = host.start_time(lease.pid).is_ok_and(|time| time == lease.start_time);
            same.then_some(KeptLease { saved: lease, reader, pidfd })
        });
        match alive {
            Some(lease) => kept.push(lease),
            None => forget(notifier, &name),
        }
    }
    kept
}

fn forget(notifier: &Notifier, name: &str) {
    if let Err(error) = notifier.forget(name) {
        tracing::warn!("systemd still keeps the descriptor {name}: {error}");
    }
}

/// Tells the loop when the lease ends: the last descriptor of it is closed, or its holder is gone.
fn watch(
    id: u64,
    reader: &OwnedFd,
    pidfd: OwnedFd,
    sender: tokio::sync::mpsc::UnboundedSender<Input>,
) -> std::io::Result<JoinHandle<()>> {
    // That the other end is closed is always told. Nothing else is listened to: what somebody writes wakes nobody.
    let reader = watched(reader.try_clone()?, Interest::PRIORITY)?;
    let holder = watched(pidfd, Interest::READABLE)?;
    Ok(tokio::spawn(async move {
        tokio::select! {
            _ = reader.ready(Interest::PRIORITY) => {}
            _ = holder.readable() => {}
        }
        // The loop outlives all but the last of them.
        let _ = sender.send(Input::LeaseEnded(id));
    }))
}

impl Daemon {
    /// Takes back the leases that were held before a restart, as far as the ledger knows them.
    pub(super) fn take_back(&mut self, kept: Vec<KeptLease>) {
        for KeptLease { saved, reader, pidfd } in kept {
            let id = saved.id;
            let holder = self.core.holders().get(&saved.instance);
            let known = holder.is_some_and(|holder| holder.invocation == invocation(id));
            let watch = if known { watch(id, &reader, pidfd, self.sender.clone()).ok() } else { None };
            let Some(watch) = watch else {
                forget(&self.parts.notifier, &stored_name(id));
                continue;
            };
            let lease = Lease::new(saved, UnitState::Active, reader, watch);
            self.leases.all.insert(id, lease);
            if let Some(info) = self.lease_info(id) {
                self.tell(Publication::LeaseBegan(info, Arc::new(Notify::new())));
            }
        }
    }

    /// A lease is asked for.
    pub(super) fn lease(&mut self, ask: LeaseAsk) {
        let LeaseAsk { id, name, uid, pid, pidfd, footprint, priority, wait, began, reply } = ask;
        let begun = self.begin_lease(id, &name, uid, pid, pidfd);
        let (mut lease, writer) = match begun {
            Ok(begun) => begun,
            Err(fault) => {
                // Whoever asked may be gone.
                let _ = reply.send(Err(fault));
                return;
            }
        };
        self.next_ticket += 1;
        let ticket = self.next_ticket;
        let request = Request {
            invocation: invocation(id),
            priority,
            // Nobody but its holder can end it.
            pinned: true,
            ladder: vec![Rung { footprint, ..Rung::default() }],
            explicit: true,
            patience: if wait { Patience::Room } else { Patience::None },
            ..Request::of(lease.saved.instance.clone())
        };
        lease.asking = Some(Asking { ticket, writer, began, reply });
        self.leases.all.insert(id, lease);
        self.step(Event::Ask { ticket, request: Box::new(request) });
    }

    fn begin_lease(
        &self,
        id: u64,
        name: &ModelName,
        uid: u32,
        pid: u32,
        pidfd: OwnedFd,
    ) -> Result<(Lease, OwnedFd), Fault> {
        let of_user = self.leases.all.values().filter(|lease| lease.saved.uid == uid).count();
        let too_many = |most: usize, whose: &str| {
            Fault::TooMany(format!("{whose} has {most} leases already, which is as many as there may be"))
        };
        if self.leases.all.len() >= MOST {
            return Err(too_many(MOST, "this machine"));
        }
        if uid != 0 && of_user >= MOST_OF_A_USER {
            return Err(too_many(MOST_OF_A_USER, &format!("user {uid}")));
        }
        let instance =
            self.leases.free_name(name).ok_or_else(|| too_many(99, &format!("the name {name}")))?;
        let failed = |error: std::io::Error| Fault::Failed(format!("a lease can't be made: {error}"));
        let start_time = Host::at("/").start_time(pid).map_err(|error| Fault::Failed(error.to_string()))?;
        let (reader, writer) =
            pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(|error| failed(error.into()))?;
        let watch = watch(id, &reader, pidfd, self.sender.clone()).map_err(failed)?;
        let saved = SavedLease { id, instance, uid, pid, start_time };
        Ok((Lease::new(saved, UnitState::Activating, reader, watch), writer))
    }

    /// Answers the lease that waits with this ticket; false where there is none.
    pub(super) fn answer_lease(&mut self, ticket: u64, answer: &Result<u64, Box<Refusal>>) -> bool {
        let Some(id) = self.leases.asked_with(ticket) else { return false };
        let Some(lease) = self.leases.all.get_mut(&id) else { return false };
        let Some(asking) = lease.asking.take() else { return false };
        if let Err(refusal) = answer {
            self.leases.all.remove(&id);
            let _ = asking.reply.send(Err(Fault::Refused(refusal.clone())));
            return true;
        }
        lease.state = UnitState::Active;
        let name = stored_name(id);
        if let Err(error) = self.parts.notifier.store(&name, lease.reader.as_fd()) {
            tracing::warn!("{} will not survive a restart of the daemon: {error}", lease.saved.instance);
        }
        if let Some(info) = self.lease_info(id) {
            self.tell(Publication::LeaseBegan(info, asking.began));
        }
        // Where the caller is gone, the descriptor goes with the answer, and that ends the lease.
        let _ = asking.reply.send(Ok(asking.writer));
        // The decisions are to see that it is held.
        let _ = self.sender.send(Input::Changed);
        true
    }

    /// A lease has ended, or whoever waited for it is gone.
    pub(super) fn lease_ended(&mut self, id: u64) {
        let Some(lease) = self.leases.all.remove(&id) else { return };
        if lease.state == UnitState::Active {
            forget(&self.parts.notifier, &stored_name(id));
            tracing::info!("{} has ended", lease.saved.instance);
            self.tell(Publication::LeaseEnded(id));
        }
        drop(lease);
        self.step(Event::Tick);
    }

    fn lease_info(&self, id: u64) -> Option<LeaseInfo> {
        let saved = &self.leases.all.get(&id)?.saved;
        let holder = self.core.holders().get(&saved.instance)?;
        let footprint = &holder.predicted;
        Some(LeaseInfo {
            id,
            instance: saved.instance.clone(),
            uid: saved.uid,
            pid: saved.pid,
            bytes: footprint.private + footprint.mapped_bytes(),
            gpu_bytes: footprint.gpus.iter().copied().sum(),
            priority: holder.priority,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLI: Duration = Duration::from_millis(1);

    fn leases(pids: &[u32]) -> Leases {
        let mut leases = Leases::default();
        for (id, pid) in (1..).zip(pids) {
            let instance = Instance::lease("job".parse().unwrap(), id);
            let saved = SavedLease { id: id.into(), instance, uid: 0, pid: *pid, start_time: 0 };
            let (reader, _) = pipe2(OFlag::O_CLOEXEC).unwrap();
            leases
                .all
                .insert(id.into(), Lease::new(saved, UnitState::Active, reader, tokio::spawn(async {})));
        }
        leases
    }

    /// What is shown when each look takes so long and finds `bytes` and the number of the process.
    fn shown(leases: &mut Leases, now: Instant, takes: Duration, bytes: u64) -> (Vec<u64>, bool) {
        let mut machine = Machine::default();
        let measure = |pid: u32, _: &BTreeSet<u32>| {
            (Measured { private: Bytes(bytes + u64::from(pid)), ..Measured::default() }, takes)
        };
        let stale = leases.show(&mut machine, now, measure);
        (machine.units.values().map(|unit| unit.measured.private.0).collect(), stale)
    }

    #[tokio::test]
    async fn a_reading_measures_for_a_bounded_time_and_the_next_goes_on_where_it_ended() {
        let (mut leases, now) = (leases(&[11, 12, 13, 11]), Instant::now());
        let at = |seconds| now + Duration::from_secs(seconds);
        let slow = MEASURING;
        assert_eq!(shown(&mut leases, now, slow, 100), (vec![111, 112, 113, 0], false), "never seen before");
        assert_eq!(shown(&mut leases, now + MILLI * 99, slow, 200).0, [111, 112, 113, 0], "they rest");
        assert_eq!(shown(&mut leases, at(1), slow, 300), (vec![311, 112, 113, 0], false));
        assert_eq!(shown(&mut leases, at(6), slow, 400), (vec![311, 412, 113, 0], true), "one is too old");
        assert_eq!(shown(&mut leases, at(7), slow, 500), (vec![311, 412, 513, 0], true));
        assert_eq!(shown(&mut leases, at(8), slow, 600), (vec![611, 412, 513, 0], false));
        assert_eq!(shown(&mut leases, at(9), MILLI, 700).0, [711, 712, 713, 0], "one process, counted once");
    }

    #[tokio::test]
    async fn what_is_quick_to_measure_is_measured_with_every_reading() {
        let (mut leases, now) = (leases(&[11]), Instant::now());
        for (reading, bytes) in [(0, 100), (20, 200), (40, 300)] {
            assert_eq!(shown(&mut leases, now + MILLI * reading, MILLI, bytes).0, [bytes + 11]);
        }
    }
}

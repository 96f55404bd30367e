//! The admission plan: what has to happen so that a model can run, least harm first.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::decision::Account;
use super::evict::{Candidate, Use, choose};
use super::refusal::{Refusal, RefusalKind, refuse};
use super::request::{Peers, Request, Rules, Rung};
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{Charges, FileId, GpuKind, Machine, PerPool, Phase, Pool, Reservation, capacity};

/// How long a model of equal priority must have been idle before `peers = "replace-idle"` lets an
/// explicit start replace it; milliseconds.
pub const IDLE_AFTER: u64 = 5 * 60 * 1000;

/// Everything that a plan is judged against.
#[derive(Clone, Copy, Debug)]
pub struct Situation<'a> {
    /// Who holds what.
    pub holders: &'a BTreeMap<Instance, Reservation>,
    /// The machine as read just now.
    pub machine: &'a Machine,
    /// The rules.
    pub rules: &'a Rules,
    /// Milliseconds since boot.
    pub now: u64,
}

/// Why a model is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StopReason {
    /// Idle past its own time to live.
    Expired,
    /// Of lower priority than what needs the room.
    Evicted,
    /// Idle, of equal priority, and an explicit start may replace it.
    Replaced,
    /// Named by a person to go.
    Named,
}

/// One step of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub enum Step {
    /// Drop the cached pages of model files that nobody runs.
    DropCache {
        /// The files.
        files: Vec<FileId>,
        /// What of them is in the page cache.
        frees_bytes: Bytes,
    },
    /// Stop a model, through systemd.
    Stop {
        /// Which.
        instance: Instance,
        /// Why.
        reason: StopReason,
        /// What it gives back, its shared weights only where it is the last to go.
        frees_bytes: Bytes,
    },
    /// Drop the page cache of the whole machine, where that is configured.
    DropAllCache {
        /// What of it can be dropped.
        frees_bytes: Bytes,
    },
    /// Move pages about until free memory lies together.
    Compact {
        /// What is to be allocated.
        bytes: Bytes,
    },
    /// Make a swapfile and use it.
    AddSwap {
        /// Its size.
        bytes: Bytes,
    },
    /// Start with a smaller context than configured, but no smaller than `context-min`.
    ReduceContext {
        /// Configured; tokens.
        from: u64,
        /// Chosen; tokens.
        to: u64,
    },
    /// Run with part of the mapped weights left on disk, to be read as they are needed.
    Stream {
        /// What of them has its place in memory.
        resident_bytes: Bytes,
        /// All of them.
        mapped_bytes: Bytes,
        /// How far they are read ahead; zero: as the disk has it.
        #[serde(default)]
        read_ahead_bytes: Bytes,
    },
    /// Run with part of its private memory in swap.
    Swap {
        /// How much of it.
        swapped_bytes: Bytes,
    },
}

impl Step {
    /// Whether once is enough for a request: what it did not bring the first time it does not bring the second.
    #[must_use]
    pub fn is_done_by(&self, done: &Self) -> bool {
        match self {
            Self::DropCache { .. } => self == done,
            Self::DropAllCache { .. } => matches!(done, Self::DropAllCache { .. }),
            Self::Compact { .. } => matches!(done, Self::Compact { .. }),
            _ => false,
        }
    }

    /// Whether it says how the model will run, and is nothing to be done before.
    #[must_use]
    pub fn is_setting(&self) -> bool {
        matches!(self, Self::ReduceContext { .. } | Self::Stream { .. } | Self::Swap { .. })
    }
}

/// In a few words, as part of a sentence.
impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DropCache { frees_bytes, .. } => write!(f, "dropping {frees_bytes} of cold page cache"),
            Self::Stop { instance, reason, frees_bytes } => {
                let why = match reason {
                    StopReason::Expired => "idle past its ttl",
                    StopReason::Evicted => "lower priority",
                    StopReason::Replaced => "idle, same priority",
                    StopReason::Named => "named to go",
                };
                write!(f, "stopping {instance} ({why}, frees {frees_bytes})")
            }
            Self::ReduceContext { from, to } => write!(f, "reducing the context from {from} to {to}"),
            Self::Stream { resident_bytes, mapped_bytes, .. } => {
                write!(f, "keeping {resident_bytes} of {mapped_bytes} of its weights in memory")
            }
            Self::DropAllCache { frees_bytes } => {
                write!(f, "dropping all {frees_bytes} of page cache that can be dropped")
            }
            Self::Compact { bytes } => write!(f, "compacting memory for {bytes}"),
            Self::AddSwap { bytes } => write!(f, "making a swapfile of {bytes}"),
            Self::Swap { swapped_bytes } => write!(f, "leaving {swapped_bytes} of it in swap"),
        }
    }
}

/// A plan that ends with the model running.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The context it will run with, and what it takes there.
    pub rung: Rung,
    /// What has to be done first, in this order.
    pub steps: Vec<Step>,
}

/// A plan that has to wait for others to finish what they are doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wait {
    /// Models that are still loading, or already stopping.
    pub on: Vec<Instance>,
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Planned {
    /// It can run, after these steps.
    Admit(Plan),
    /// It could, once some model has finished loading or stopping.
    Wait(Wait),
    /// It can't.
    Refuse(Box<Refusal>),
}

/// A request in front of the holders, ready to be asked "does this fit without those?".
pub(super) struct Scene<'a> {
    pub(super) request: &'a Request,
    pub(super) situation: Situation<'a>,
    /// The holders by number, without the requesting instance itself.
    pub(super) names: Vec<&'a Instance>,
    pub(super) charges: Charges,
    pub(super) room: PerPool,
}

impl<'a> Scene<'a> {
    fn new(request: &'a Request, situation: Situation<'a>) -> Self {
        let mut charges = Charges::default();
        let mut names = Vec::new();
        for (instance, reservation) in situation.holders {
            if *instance != request.instance {
                charges.add_holder(instance, reservation);
                names.push(instance);
            }
        }
        let room = capacity(situation.machine, situation.rules.reserve, situation.holders);
        Self { request, situation, names, charges, room }
    }

    pub(super) fn fits(&self, rung: &Rung, gone: &[usize]) -> bool {
        self.charge(rung, gone).within(&self.room)
    }

    pub(super) fn charge(&self, rung: &Rung, gone: &[usize]) -> PerPool {
        self.charges.per_pool(self.situation.machine, gone, Some(&rung.footprint))
    }

    pub(super) fn reservation(&self, holder: usize) -> Option<&'a Reservation> {
        self.situation.holders.get(*self.names.get(holder)?)
    }

    /// The numbers of the holders for which `choice` holds.
    pub(super) fn select(&self, choice: impl Fn(&Instance, &Reservation) -> bool) -> Vec<usize> {
        let matches = |n: &usize| self.reservation(*n).is_some_and(|r| choice(self.names[*n], r));
        (0..self.names.len()).filter(matches).collect()
    }

    /// What stopping `holder` frees in memory when `gone` are gone already.
    fn gain(&self, holder: usize, gone: &[usize]) -> Bytes {
        let machine = self.situation.machine;
        let with: Vec<usize> = gone.iter().copied().chain([holder]).collect();
        let before = self.charges.per_pool(machine, gone, None);
        let after = self.charges.per_pool(machine, &with, None);
        // A discrete GPU's bytes are not memory, but they are what its eviction is for.
        let card = |n: usize| machine.gpus.get(n).is_some_and(|gpu| gpu.kind == GpuKind::Discrete);
        let cards: Bytes = (0..before.gpus.len())
            .filter(|n| card(*n))
            .map(|n| before.gpus[n] - after.gpus.get(n).copied().unwrap_or_default())
            .sum();
        before.memory - after.memory + cards
    }

    /// The fewest of `from` that have to go, beside `gone`, for `rung` to fit.
    pub(super) fn fewest(&self, rung: &Rung, from: &[usize], gone: &[usize]) -> Option<Vec<usize>> {
        let candidates: Vec<Candidate> = from
            .iter()
            .filter_map(|n| Some((*n, self.reservation(*n)?)))
            .map(|(holder, r)| Candidate {
                holder,
                priority: r.priority,
                usage: self.use_of(self.names[holder]),
                reload: r.reload,
                last_used: r.last_used,
            })
            .collect();
        choose(&candidates, |set| self.fits(rung, &[gone, set].concat()), |n| self.gain(n, gone))
    }

    fn use_of(&self, instance: &Instance) -> Use {
        let busy = self.situation.machine.units.get(instance).is_some_and(|unit| unit.in_flight() > 0);
        match (busy, self.request.finishing.contains_key(instance)) {
            (false, _) => Use::Idle,
            (true, true) => Use::Finishing,
            (true, false) => Use::Busy,
        }
    }

    /// The holders that may be evicted now.
    pub(super) fn evictable(&self) -> Vec<usize> {
        self.select(|name, r| {
            r.phase == Phase::Running && self.yields(r) && !self.request.stuck.contains(name)
        })
    }

    /// Whether `r` has to yield to the request, once it is running.
    fn yields(&self, r: &Reservation) -> bool {
        if r.pinned {
            return false;
        }
        let idle = self.situation.now.saturating_sub(r.last_used) >= IDLE_AFTER;
        let replaceable = self.situation.rules.peers == Peers::ReplaceIdle && self.request.explicit && idle;
        r.priority < self.request.priority || (r.priority == self.request.priority && replaceable)
    }
}

/// Decides whether and how `request` can run.
///
/// In this order, and only as far as needed: drop cold page cache, stop models that are idle past
/// their time to live, reduce the context as far as allowed, evict; last, leave weights on disk, or in a
/// swapfile. Nothing is stopped by a plan that does not end with the model running.
#[must_use]
pub fn plan(request: &Request, situation: Situation<'_>) -> Planned {
    let scene = Scene::new(request, situation);
    let (Some(wanted), Some(smallest)) = (request.ladder.first(), request.ladder.last()) else {
        return unknown(request, &scene);
    };
    if let Some(limit) = request.unit_limit
        && smallest.footprint.private > limit
        && !request.force
    {
        return Planned::Refuse(Box::new(refuse(&scene, RefusalKind::UnitLimit(limit))));
    }
    let can_go = |name: &Instance| !request.stuck.contains(name);
    let named = scene.select(|name, _| request.instead_of.contains(name) && can_go(name));
    let pinned: Vec<usize> =
        named.iter().copied().filter(|n| scene.reservation(*n).is_some_and(|r| r.pinned)).collect();
    if !pinned.is_empty() && !request.force {
        let names = pinned.iter().map(|n| scene.names[*n].clone()).collect();
        return Planned::Refuse(Box::new(refuse(&scene, RefusalKind::NamedIsPinned(names))));
    }
    let admit = |rung: &Rung, gone: Vec<usize>| Planned::Admit(scene.assemble(rung, gone));
    if scene.fits(wanted, &named) {
        return admit(wanted, named);
    }
    let stopping = scene.select(|_, r| r.phase == Phase::Stopping);
    if scene.fits(wanted, &[&named[..], &stopping].concat()) {
        return scene.wait(stopping);
    }

    let expired: Vec<usize> = scene
        .select(|name, r| r.expired(situation.now) && !request.instead_of.contains(name) && can_go(name));
    let rung = largest(&request.ladder, |rung| scene.fits(rung, &[&named[..], &expired].concat()));
    if let Some(rung) = rung {
        let few = scene.fewest(rung, &expired, &named).unwrap_or(expired);
        return admit(rung, [named, few].concat());
    }

    let evictable: Vec<usize> =
        scene.evictable().into_iter().filter(|n| !named.contains(n) && !expired.contains(n)).collect();
    let base = [&named[..], &expired].concat();
    if let Some(evicted) = scene.fewest(smallest, &evictable, &base) {
        let few = scene.fewest(smallest, &expired, &[&named[..], &evicted].concat()).unwrap_or(expired);
        let gone = [named, few, evicted].concat();
        let rung = largest(&request.ladder, |rung| scene.fits(rung, &gone)).unwrap_or(smallest);
        return admit(rung, gone);
    }

    let busy = scene.select(|_, r| {
        r.phase == Phase::Stopping
            || (matches!(r.phase, Phase::Loading | Phase::Preparing) && scene.yields(r))
    });
    let everyone = [&base[..], &evictable].concat();
    let oversized = |gone: &[usize]| scene.stream(gone).or_else(|| scene.swap(gone));
    if !busy.is_empty() {
        // The more that has come back, the less of it is left on disk or in swap.
        let all = [&everyone[..], &busy].concat();
        if scene.fits(smallest, &all) || oversized(&all).is_some() {
            return scene.wait(busy);
        }
    }
    if let Some(plan) = oversized(&everyone) {
        return Planned::Admit(plan);
    }
    if request.force {
        return admit(wanted, base);
    }
    Planned::Refuse(Box::new(refuse(&scene, RefusalKind::WontFit)))
}

/// A refusal of `request` for something else than its size, with the numbers.
pub(super) fn refusal_of(request: &Request, situation: Situation<'_>, kind: RefusalKind) -> Refusal {
    refuse(&Scene::new(request, situation), kind)
}

/// Whether `request` would fit in memory as things are, at its full context and with nobody stopped. Whether the disk
/// has room for a swapfile is only looked at when it asks.
#[must_use]
pub fn fits_as_is(request: &Request, situation: Situation<'_>) -> bool {
    let scene = Scene::new(request, situation);
    request.ladder.first().is_some_and(|wanted| scene.fits(wanted, &[]))
}

/// The arithmetic of `request` in every pool, before anything is done for it: at the context that it will run with, or
/// at the smallest one where it can't.
#[must_use]
pub fn accounts(request: &Request, planned: &Planned, situation: Situation<'_>) -> Vec<Account> {
    let scene = Scene::new(request, situation);
    let nothing = Rung::default();
    let rung = match planned {
        Planned::Admit(plan) => &plan.rung,
        Planned::Wait(_) | Planned::Refuse(_) => request.ladder.last().unwrap_or(&nothing),
    };
    let machine = situation.machine;
    let (held, with) = (scene.charges.per_pool(machine, &[], None), scene.charge(rung, &[]));
    let mut pools = vec![("memory".to_owned(), Pool::Memory, machine.memory.total)];
    pools.extend(machine.gpus.iter().enumerate().map(|(n, gpu)| (gpu.name.clone(), Pool::Gpu(n), gpu.total)));
    pools.extend(machine.slice_limit.map(|limit| ("llm.slice".to_owned(), Pool::Slice, limit)));
    let account = |(name, pool, total_bytes): (String, Pool, Bytes)| {
        let (room_bytes, held_bytes) = (scene.room.get(pool), held.get(pool));
        let (free_bytes, needed_bytes) = (room_bytes - held_bytes, with.get(pool) - held_bytes);
        let short_bytes = needed_bytes - free_bytes;
        Account { name, total_bytes, room_bytes, held_bytes, needed_bytes, free_bytes, short_bytes }
    };
    pools.into_iter().map(account).collect()
}

/// How `request` would run as things are, with nobody stopped: at its full context, streaming, or with swap.
#[must_use]
pub fn rung_as_is(request: &Request, situation: Situation<'_>) -> Option<Rung> {
    let scene = Scene::new(request, situation);
    let wanted = request.ladder.first()?;
    if scene.fits(wanted, &[]) {
        return Some(wanted.clone());
    }
    scene.stream(&[]).or_else(|| scene.swap(&[])).map(|plan| plan.rung)
}

/// The largest context of the ladder (which descends) for which `fits` holds.
pub(super) fn largest(ladder: &[Rung], fits: impl Fn(&Rung) -> bool) -> Option<&Rung> {
    ladder.get(ladder.partition_point(|rung| !fits(rung)))
}

/// A model of unknown size: admitted only by force, as one that takes nothing that is known.
fn unknown(request: &Request, scene: &Scene<'_>) -> Planned {
    if request.force {
        let rung = Rung::default();
        return Planned::Admit(Plan { rung, steps: Vec::new() });
    }
    let why = request.unknown.clone().unwrap_or_else(|| "no estimate could be made".to_owned());
    Planned::Refuse(Box::new(refuse(scene, RefusalKind::UnknownSize(why))))
}

impl Scene<'_> {
    fn wait(&self, on: Vec<usize>) -> Planned {
        Planned::Wait(Wait { on: on.into_iter().map(|n| self.names[n].clone()).collect() })
    }

    /// The steps that make `rung` run with `gone` stopped, in the order of execution.
    pub(super) fn assemble(&self, rung: &Rung, gone: Vec<usize>) -> Plan {
        let mut steps = Vec::new();
        steps.extend(self.drop_cache(rung, &gone));
        let mut stopped: Vec<usize> = Vec::new();
        for holder in gone {
            let Some(reservation) = self.reservation(holder) else { continue };
            let instance = self.names[holder].clone();
            let reason = if self.request.instead_of.contains(&instance) {
                StopReason::Named
            } else if reservation.expired(self.situation.now) {
                StopReason::Expired
            } else if reservation.priority < self.request.priority {
                StopReason::Evicted
            } else {
                StopReason::Replaced
            };
            let frees_bytes = self.gain(holder, &stopped);
            stopped.push(holder);
            steps.push(Step::Stop { instance, reason, frees_bytes });
        }
        if stopped.is_empty() {
            steps.extend(self.tidy(rung));
        }
        if let Some(wanted) = self.request.ladder.first()
            && wanted.context != rung.context
        {
            steps.push(Step::ReduceContext { from: wanted.context, to: rung.context });
        }
        Plan { rung: rung.clone(), steps }
    }
}

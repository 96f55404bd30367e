//! Why a model can't run, with the arithmetic and the command that would work.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::plan::Scene;
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{Basis, Phase, Pool};

/// What kind of refusal it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusalKind {
    /// There is not enough room, and can't be made.
    WontFit,
    /// Its size can't be estimated: why.
    UnknownSize(String),
    /// The administrator's MemoryMax= of its unit is smaller than what it needs.
    UnitLimit(Bytes),
    /// A model that was named to go is pinned.
    NamedIsPinned(Vec<Instance>),
    /// It was killed just now to keep the machine afloat.
    Killed,
    /// It waited as long as a wait may last, for these.
    WaitedTooLong(Vec<Instance>),
    /// It failed to load so often in a row, and others would have to be stopped for it again.
    FailsToLoad(u32),
}

/// A model that stays, and why it does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Which.
    pub instance: Instance,
    /// What it holds in the pool that binds.
    pub bytes: Bytes,
    /// `pinned`, `priority 80`, or `still loading`.
    pub why: String,
}

/// A refusal with its numbers, all of the pool that binds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Who was refused.
    pub instance: Instance,
    /// What kind.
    pub kind: RefusalKind,
    /// The smallest context that was allowed; tokens.
    pub context: u64,
    /// The pool that binds.
    pub pool: Pool,
    /// Its size.
    pub pool_bytes: Bytes,
    /// What the model needs of it in addition to what is there already (shared weights).
    pub needed_bytes: Bytes,
    /// What the model's figures rest on.
    #[serde(skip_serializing_if = "Basis::is_estimate", default)]
    pub basis: Basis,
    /// What is left of it.
    pub free_bytes: Bytes,
    /// What is kept for the system.
    pub reserve_bytes: Bytes,
    /// What the rest of the system uses.
    pub system_bytes: Bytes,
    /// What models hold.
    pub models_bytes: Bytes,
    /// What stopping everything that may be stopped would free.
    pub evictable_bytes: Bytes,
    /// What is missing even then.
    pub short_bytes: Bytes,
    /// The models that stay.
    pub kept: Vec<Kept>,
    /// Why swap can't help, where it can't.
    pub no_swap: Option<String>,
    /// The complete command that would work, or the one that tells more.
    pub advice: String,
}

/// Works out the refusal of a scene's request.
pub(super) fn refuse(scene: &Scene<'_>, kind: RefusalKind) -> Refusal {
    let request = scene.request;
    let machine = scene.situation.machine;
    let empty = super::Rung::default();
    let smallest = request.ladder.last().unwrap_or(&empty);
    let goes = scene.select(|name, r| {
        request.instead_of.contains(name) || (r.phase == Phase::Running && r.expired(scene.situation.now))
    });
    let evictable: Vec<usize> = scene.evictable().into_iter().filter(|n| !goes.contains(n)).collect();
    let all = [&goes[..], &evictable].concat();

    let with = scene.charge(smallest, &[]);
    let best = scene.charge(smallest, &all);
    let (pool, short) = best
        .shortfall(&scene.room)
        .or_else(|| with.shortfall(&scene.room))
        .unwrap_or((Pool::Memory, Bytes::ZERO));
    let models = scene.charges.per_pool(machine, &[], None).get(pool);
    let needed = with.get(pool) - models;
    let room = scene.room.get(pool);
    let pool_bytes = match pool {
        Pool::Memory => machine.memory.total,
        Pool::Gpu(n) => machine.gpus.get(n).map_or(Bytes::ZERO, |gpu| gpu.total),
        Pool::Slice => machine.slice_limit.unwrap_or_default(),
    };
    let reserve_bytes = if pool == Pool::Memory { scene.situation.rules.reserve } else { Bytes::ZERO };
    let held = |n: usize| {
        let alone = scene.charges.per_pool(machine, &[n], None).get(pool);
        models - alone
    };
    let kept = (0..scene.names.len())
        .filter(|n| !all.contains(n))
        .filter_map(|n| Some((n, scene.reservation(n)?)))
        .map(|(n, r)| Kept {
            instance: scene.names[n].clone(),
            bytes: held(n),
            why: match r.phase {
                _ if scene.names[n].lease => "a lease".to_owned(),
                _ if r.pinned => "pinned".to_owned(),
                Phase::Preparing | Phase::Loading => "still loading".to_owned(),
                Phase::Stopping => "stopping".to_owned(),
                Phase::Running => format!("priority {}", r.priority),
            },
        })
        .collect();
    Refusal {
        instance: request.instance.clone(),
        context: smallest.context,
        pool,
        pool_bytes,
        needed_bytes: needed,
        basis: smallest.basis.clone(),
        free_bytes: room - models,
        reserve_bytes,
        system_bytes: pool_bytes - reserve_bytes - room,
        models_bytes: models,
        evictable_bytes: models - scene.charges.per_pool(machine, &all, None).get(pool),
        short_bytes: short,
        kept,
        no_swap: request.no_swapfile.clone().or_else(|| no_swap(scene, pool, short, &all)),
        advice: advice(scene, &kind, &all),
        kind,
    }
}

/// Why swap can't make up for what is missing once `gone` have stopped.
fn no_swap(scene: &Scene<'_>, pool: Pool, short: Bytes, gone: &[usize]) -> Option<String> {
    if matches!(pool, Pool::Gpu(_)) {
        return Some("GPU memory must not count on swap".to_owned());
    }
    if let Some(most) = scene.request.swap {
        let swapped = scene.swapped_for(short);
        let (missing, room) = (scene.swapped_beyond(swapped, gone), scene.situation.machine.swap_room);
        let full = || {
            format!(
                "a swapfile of {missing} would be needed, and swapfiles may take {room} more (see [swap] in \
                 plimsoll.toml)"
            )
        };
        let has_room = scene.swapfile(swapped, gone).is_some();
        return if most < swapped { Some(only(most)) } else { (!has_room).then(full) };
    }
    let private = scene.request.ladder.last().map_or(Bytes::ZERO, |rung| rung.footprint.private);
    match pool {
        Pool::Slice => Some("the limit of llm.slice binds, not memory".to_owned()),
        _ => (private < short).then(|| only(private)),
    }
}

fn only(bytes: Bytes) -> String {
    format!("only {bytes} of it could be swapped")
}

/// The first that works of: a smaller context than configured, another model of the same or a
/// higher priority in exchange, unpinning; else the command that shows what could run here.
fn advice(scene: &Scene<'_>, kind: &RefusalKind, gone: &[usize]) -> String {
    let request = scene.request;
    let name = &request.instance;
    if name.lease {
        return lease_advice(scene, kind, gone);
    }
    match kind {
        RefusalKind::UnknownSize(_) => return format!("plimsoll load {name} --force"),
        RefusalKind::NamedIsPinned(pinned) => {
            let unpin: Vec<String> = pinned.iter().map(|p| format!("plimsoll unpin {p} && ")).collect();
            let named: Vec<String> =
                request.instead_of.iter().map(|i| format!(" --instead-of {i}")).collect();
            return format!("{}plimsoll load {name}{}", unpin.concat(), named.concat());
        }
        RefusalKind::UnitLimit(_) => return format!("systemctl edit {}", name.unit()),
        RefusalKind::WaitedTooLong(on) => {
            let named: Vec<String> = on.iter().map(|i| format!(" --instead-of {i}")).collect();
            return format!("plimsoll load {name}{}", named.concat());
        }
        RefusalKind::FailsToLoad(_) => return format!("journalctl -u {}", name.unit()),
        RefusalKind::Killed => return format!("plimsoll load {name} --force"),
        RefusalKind::WontFit => {}
    }
    if let Some(rung) = request.advice.iter().find(|rung| scene.fits(rung, gone)) {
        return format!("plimsoll load {name} -c {}", rung.context);
    }
    let loose = scene.select(|name, r| !r.pinned && !request.instead_of.contains(name));
    let others: Vec<usize> = loose.into_iter().filter(|n| !gone.contains(n)).collect();
    let instead = |from: &[usize]| {
        let smallest = request.ladder.last()?;
        let few = scene.fewest(smallest, from, gone)?;
        let named = few.iter().map(|n| scene.names[*n]).chain(&request.instead_of);
        Some(named.map(|i| format!(" --instead-of {i}")).collect::<String>())
    };
    if let Some(named) = instead(&others) {
        return format!("plimsoll load {name}{named}");
    }
    let pinned = scene.select(|name, r| r.pinned && !name.lease);
    let everyone: Vec<usize> = others.iter().chain(&pinned).copied().collect();
    if let Some(named) = instead(&everyone) {
        let unpin: Vec<String> = pinned
            .iter()
            .map(|n| scene.names[*n])
            .filter(|p| named.split(' ').any(|word| word == p.to_string()))
            .map(|p| format!("plimsoll unpin {p} && "))
            .collect();
        return format!("{}plimsoll load {name}{named}", unpin.concat());
    }
    format!("plimsoll fit {} --max-context", name.model)
}

/// A smaller lease, where that would help, or to wait for room.
fn lease_advice(scene: &Scene<'_>, kind: &RefusalKind, gone: &[usize]) -> String {
    let wanted = scene.request.ladder.last().map(|rung| rung.footprint.clone()).unwrap_or_default();
    let of_host_alone = wanted.mapped.is_empty() && wanted.gpus.iter().all(|bytes| bytes.is_zero());
    let charge = scene.charges.per_pool(scene.situation.machine, gone, None);
    let left = (scene.room.memory - charge.memory).min(scene.room.slice - charge.slice);
    if *kind == RefusalKind::WontFit && of_host_alone && left >= Bytes::mib(64) {
        return format!("plimsoll lease {}MiB -- COMMAND, or --wait", left.0 / Bytes::mib(1).0);
    }
    "plimsoll lease --wait".to_owned()
}

/// One line: what was needed, what there was, what would have to go, and what to try.
impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = &self.instance;
        match &self.kind {
            RefusalKind::UnknownSize(why) => {
                return write!(
                    f,
                    "{name} was refused: its size is unknown ({why}); declare memory = in its configuration, or try: {}",
                    self.advice
                );
            }
            RefusalKind::UnitLimit(limit) => {
                return write!(
                    f,
                    "{name} was refused: it needs {} that can't be reclaimed, and MemoryMax= of {} allows {limit}; try: {}",
                    self.needed_bytes,
                    name.unit(),
                    self.advice
                );
            }
            RefusalKind::NamedIsPinned(pinned) => {
                return write!(f, "{name} was refused: {} is pinned; try: {}", list(pinned), self.advice);
            }
            RefusalKind::WaitedTooLong(on) => {
                return write!(
                    f,
                    "{name} was refused: {} did not finish loading or stopping in time; try: {}",
                    list(on),
                    self.advice
                );
            }
            RefusalKind::FailsToLoad(times) => {
                return write!(
                    f,
                    "{name} was refused: it has failed to load {times} times in a row, and others would have to be \
                     stopped for it again, or stay stopped; a start by hand tries once more; try: {}",
                    self.advice
                );
            }
            RefusalKind::Killed => {
                return write!(
                    f,
                    "{name} was refused: it was killed less than a minute ago to keep the machine afloat, and comes \
                     back when there is room; try: {}",
                    self.advice
                );
            }
            RefusalKind::WontFit => {}
        }
        let pool = match self.pool {
            Pool::Memory => "memory".to_owned(),
            Pool::Gpu(_) => "GPU memory (GTT or VRAM)".to_owned(),
            Pool::Slice => "llm.slice's MemoryMax".to_owned(),
        };
        write!(f, "{name} was refused: ")?;
        if !name.lease {
            write!(f, "at context {} ", self.context)?;
        }
        write!(f, "it needs {} of {pool}{}", self.needed_bytes, self.basis)?;
        write!(f, ", {} of {} is free", self.free_bytes, self.pool_bytes)?;
        if self.pool == Pool::Slice {
            write!(f, " (models {})", self.models_bytes)?;
        } else {
            write!(f, " (system {}", self.system_bytes)?;
            if !self.reserve_bytes.is_zero() {
                write!(f, ", reserve {}", self.reserve_bytes)?;
            }
            write!(f, ", models {})", self.models_bytes)?;
        }
        if !self.evictable_bytes.is_zero() {
            write!(f, ", stopping what may be stopped would free {}", self.evictable_bytes)?;
        }
        write!(f, ", {} short", self.short_bytes)?;
        if !self.kept.is_empty() {
            let kept: Vec<String> =
                self.kept.iter().map(|k| format!("{} {} ({})", k.instance, k.bytes, k.why)).collect();
            write!(f, "; staying: {}", kept.join(", "))?;
        }
        if let Some(why) = &self.no_swap {
            write!(f, "; swap can't help: {why}")?;
        }
        write!(f, "; try: {}", self.advice)
    }
}

fn list(instances: &[Instance]) -> String {
    instances.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

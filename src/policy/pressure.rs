//! How short memory is: headroom, levels with hysteresis, and when to look again.
//!
//! The level of memory decides, and how fast it goes down. Pressure (PSI) only ever makes the machine be looked at
//! sooner: without swap it says nothing before it is too late, and a reader under a limit of its own raises it on a
//! machine that has plenty (measured; /proc/pressure counts every task that waits for a page of its own cache).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::decision::Level;
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{Charges, FileId, GpuKind, Machine, Phase, Pool, Reservation, capacity, unified_bytes};

/// What stopping a model takes, until its memory is back; milliseconds. An idle llama-server was gone after 0.1 to 1 s.
pub const STOP: u64 = 2000;
/// What seeing it and killing a control group takes: the shortest look and what cgroup.kill took for 1.2 GB (22 ms),
/// with room; milliseconds.
pub const REACT: u64 = 150;
/// What goes up and down by itself, however small the reserve: with the kernel's watermarks, whose steps are those of
/// memory.
const UNSTEADY: Bytes = Bytes::mib(48);
/// The longest time between two looks while there is something to look at, and that of the daemon's own pulse:
/// whoever has that much time needs no other wake-up; milliseconds.
const PULSE: u64 = 30_000;
/// How fast memory is taken to go down at most where that was not measured; bytes per second.
const FASTEST: Bytes = Bytes::gib(2);
/// Pressure from here on has the machine looked at sooner; per mille.
pub const WAITING: u16 = 100;

/// What is left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gauge {
    /// Available memory without the mapped weights of running models: the kernel counts those as available, and each
    /// token would read them from disk again.
    pub headroom: Bytes,
    /// Available memory.
    pub available: Bytes,
    /// How fast it goes down, beyond what models were promised, as far as that counts; see [`Fall`]. Bytes per second.
    pub falling: Bytes,
    /// The same between the last two looks.
    pub falling_now: Bytes,
    /// How fast it goes down in all; bytes per second.
    pub falling_in_all: Bytes,
    /// What models were promised and have not taken yet: it may go at any rate.
    pub promised: Bytes,
    /// Of that, what those take that load.
    pub loading: Bytes,
}

/// How fast memory goes down beyond what models were promised; bytes per second.
///
/// What the kernel counts goes up and down by itself (by 53 MiB within 2 s in a guest that swaps, measured), and a program
/// that starts is no flood. So the rate of a moment counts for a moment ahead, and for longer once it has cost something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fall {
    /// Between the last two looks.
    pub now: Bytes,
    /// What it may be taken to go on with.
    pub lasting: Bytes,
}

impl Fall {
    /// Of the rate between the last two looks and what was lost since the least was used in the last [`STOP`], `None` at
    /// the first look. Something is a quarter of the reserve, and at least 48 MiB; less is taken for a rate over that time.
    #[must_use]
    pub fn of(now: Bytes, lost: Option<Bytes>, reserve: Bytes) -> Self {
        let lost = lost.unwrap_or_default();
        let something = reserve.mul_div(1, 4).max(UNSTEADY);
        let lasting = if lost >= something { now } else { now.min(lost.mul_div(1000, STOP)) };
        Self { now, lasting }
    }
}

impl Gauge {
    /// Whether nothing will be left within so many milliseconds, whoever takes it.
    #[must_use]
    pub fn is_gone_within(&self, msec: u64) -> bool {
        self.available < self.taken_within(msec)
    }

    /// What will be gone within so many milliseconds, whoever takes it: models take what they were promised and no more.
    fn taken_within(&self, msec: u64) -> Bytes {
        let theirs = (self.falling_in_all - self.falling_now).mul_div(msec, 1000);
        let others = self.falling_now.mul_div(msec.min(REACT), 1000).max(self.lost_within(msec));
        others + theirs.min(self.promised)
    }

    /// What will be gone within so many milliseconds, beyond what was promised.
    #[must_use]
    pub fn lost_within(&self, msec: u64) -> Bytes {
        self.falling.mul_div(msec, 1000)
    }
}

/// Reads the gauge; `fall` is how memory goes down beyond what was promised.
#[must_use]
pub fn gauge(machine: &Machine, holders: &BTreeMap<Instance, Reservation>, fall: Fall) -> Gauge {
    let available = machine.memory.available;
    let falling_in_all = machine.pressure.falling;
    let headroom = available - mapped(holders, &[]);
    let loads = promised(machine, holders, Reservation::loads);
    let promised = loads + promised(machine, holders, |r| r.phase == Phase::Running);
    let Fall { now: falling_now, lasting: falling } = fall;
    Gauge { headroom, available, falling, falling_now, falling_in_all, promised, loading: loads }
}

/// What models have not taken yet of what they were promised.
fn promised(
    machine: &Machine,
    holders: &BTreeMap<Instance, Reservation>,
    counts: impl Fn(&Reservation) -> bool,
) -> Bytes {
    let rest = |r: &Reservation| {
        let (p, m) = (&r.predicted, &r.measured);
        let mapped = if r.streams { Bytes::ZERO } else { p.mapped_bytes() - m.file.max(m.locked_file) };
        p.private - m.private + (unified_bytes(machine, &p.gpus) - unified_bytes(machine, &m.gpus)) + mapped
    };
    holders.values().filter(|r| counts(r)).map(rest).sum()
}

/// What is used of memory beyond what models were promised and hold of it: its growth is nobody's that was planned.
#[must_use]
pub fn beyond(machine: &Machine, holders: &BTreeMap<Instance, Reservation>) -> Bytes {
    let planned = |r: &Reservation| {
        let (p, m) = (&r.predicted, &r.measured);
        m.unreclaimable().min(p.private + p.mapped_bytes())
            + unified_bytes(machine, &m.gpus).min(unified_bytes(machine, &p.gpus))
    };
    (machine.memory.total - machine.memory.available) - holders.values().map(planned).sum()
}

/// The resident part of mapped weights that running models need, if those of `without` were gone. What streams reads
/// from disk anyway.
fn mapped(holders: &BTreeMap<Instance, Reservation>, without: &[&Instance]) -> Bytes {
    // Per file what is resident of it, the most that anyone wants of it, and whether it is still wanted.
    let mut files: BTreeMap<FileId, (Bytes, Bytes, bool)> = BTreeMap::new();
    for (instance, r) in holders {
        let wanted = matches!(r.phase, Phase::Loading | Phase::Running) && !without.contains(&instance);
        let all = r.predicted.mapped_bytes();
        // Pages are charged to whoever read them first, wherever they are mapped.
        let resident = r.measured.file.min(all);
        for file in r.predicted.mapped.iter().filter(|_| !r.streams) {
            let entry = files.entry(file.file).or_default();
            entry.0 += resident.mul_div(file.bytes.0, all.0);
            entry.1 = entry.1.max(file.bytes);
            entry.2 |= wanted;
        }
    }
    files.values().filter(|file| file.2).map(|file| file.0.min(file.1)).sum()
}

/// What stopping `gone` would bring back of a pool, by what they were measured to hold.
#[must_use]
pub fn gain(
    machine: &Machine,
    holders: &BTreeMap<Instance, Reservation>,
    pool: Pool,
    gone: &[&Instance],
) -> Bytes {
    let of = || gone.iter().filter_map(|instance| holders.get(*instance));
    if let Pool::Gpu(n) = pool {
        return of().map(|r| r.measured.gpus.get(n).copied().unwrap_or_default()).sum();
    }
    let own = |r: &Reservation| r.measured.unreclaimable() + unified_bytes(machine, &r.measured.gpus);
    of().map(own).sum::<Bytes>() + (mapped(holders, &[]) - mapped(holders, gone))
}

/// The level of system memory.
///
/// All thresholds come from the reserve, which is what is kept for what was not planned: its last half, and its last
/// eighth. What goes down fast crosses them earlier, so that there is time for a stop; but nothing is done about what
/// leaves the reserve alone, however fast it grows, unless not even a kill would be in time. The danger to the machine
/// is judged by available memory: with weights read from disk again and again it is slow, and not lost. Attention is left
/// a quarter above where it is entered, act an eighth, which stops bring with some to spare, the last one at twice that.
///
/// `gave_way`: a model has given its memory back, and may have been enough, for nobody knows until when memory goes down.
/// So the last half of the reserve has to be reached before anything else is done.
#[must_use]
pub fn level(before: Level, gauge: &Gauge, reserve: Bytes, gave_way: bool) -> Level {
    let last = gauge.falling_now.mul_div(REACT, 1000);
    let most = reserve.mul_div(1, if gave_way { 2 } else { 1 });
    let act = reserve.mul_div(1, 2).max(gauge.lost_within(STOP + STOP / 2).min(most)).max(last);
    // What loads was promised its memory; where others have taken that, it takes the last of it as fast as a disk reads.
    let at_once = gauge.taken_within(REACT);
    let critical = reserve.mul_div(1, 8).max(gauge.lost_within(STOP).min(most)).max(at_once);
    let is = |level, within: bool| if within { level } else { Level::Calm };
    let stays = |level: Level, within: bool| is(level, before >= level && within);
    [
        is(Level::Attention, gauge.headroom < reserve),
        is(Level::Act, gauge.headroom < act),
        is(Level::Critical, gauge.available < critical),
        stays(Level::Attention, gauge.headroom < reserve.mul_div(5, 4)),
        stays(Level::Act, gauge.headroom < content(reserve)),
        stays(Level::Critical, gauge.available < reserve.mul_div(1, 4)),
    ]
    .into_iter()
    .max()
    .unwrap_or_default()
}

/// What is not worth doing anything for: so much may be missing of what is wanted.
#[must_use]
pub fn worthwhile(reserve: Bytes) -> Bytes {
    reserve.mul_div(1, 16).max(Bytes::mib(1))
}

/// The headroom that stops aim at.
#[must_use]
pub fn left(reserve: Bytes) -> Bytes {
    reserve.mul_div(5, 8)
}

/// The headroom at which models are no longer stopped: what is missing to the aim is worth no stop.
fn content(reserve: Bytes) -> Bytes {
    left(reserve) - worthwhile(reserve)
}

/// The headroom that stops have to bring: what they aim at, at the end of the stop and for another one's time. After one
/// that `gave_way`, see [`level`], only what they aim at.
#[must_use]
pub fn wanted(gauge: &Gauge, reserve: Bytes, gave_way: bool) -> Bytes {
    if gave_way {
        return left(reserve) + gauge.lost_within(REACT);
    }
    left(reserve).max(gauge.lost_within(STOP + STOP / 2).min(reserve)) + gauge.lost_within(STOP)
}

/// The pool of a GPU that shares system memory whose models can't get what they were promised, because others took
/// it: which, how much is left of it, and the level.
///
/// Models may fill such a pool to the last byte, and then nothing is wrong. There is no kernel that kills for it.
#[must_use]
pub fn gpu(
    before: Level,
    machine: &Machine,
    holders: &BTreeMap<Instance, Reservation>,
    reserve: Bytes,
) -> Option<(Pool, Bytes, Level)> {
    let mut charges = Charges::default();
    for reservation in holders.values() {
        charges.add(reservation.held());
    }
    let charged = charges.per_pool(machine, &[], None);
    let room = capacity(machine, reserve, holders);
    let short = |n: &usize| {
        let gpu = &machine.gpus[*n];
        let free = gpu.total - gpu.used;
        let level = match free {
            _ if gpu.kind != GpuKind::Unified || charged.gpus[*n] <= room.gpus[*n] => Level::Calm,
            free if free < reserve.mul_div(1, 2) || (before >= Level::Act && free < content(reserve)) => {
                Level::Act
            }
            free if free < reserve => Level::Attention,
            _ => Level::Calm,
        };
        (level > Level::Calm).then_some((Pool::Gpu(*n), free, level))
    };
    (0..machine.gpus.len()).filter_map(|n| short(&n)).max_by_key(|(_, _, level)| *level)
}

/// In how many milliseconds to look again: before what goes down as fast as it can has used up half the reserve. None
/// where the daemon's pulse is soon enough.
#[must_use]
pub fn look_again(machine: &Machine, gauge: &Gauge, level: Level, reserve: Bytes) -> Option<u64> {
    let fastest = match machine.pressure.fastest {
        Bytes(0) => FASTEST,
        measured => measured,
    };
    let fastest = fastest.max(gauge.falling_in_all).0.max(1);
    let room = gauge.headroom - gauge.loading - reserve.mul_div(1, 2);
    let shortest = if level == Level::Critical { 20 } else { 50 };
    let time = room.mul_div(1000, fastest).0.max(shortest);
    let waits = machine.pressure.some.is_some_and(|some| some >= WAITING) && gauge.headroom < reserve * 2;
    let time = if waits { time.min(1000) } else { time };
    (time < PULSE).then_some(time)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Footprint, Mapped, Measured, Memory};

    const RESERVE: Bytes = Bytes::gib(4);

    fn at(headroom: Bytes, falling: Bytes) -> Gauge {
        let (falling_now, falling_in_all) = (falling, falling);
        Gauge { headroom, available: headroom, falling, falling_now, falling_in_all, ..Gauge::default() }
    }

    #[test]
    fn levels_are_left_well_above_where_they_are_entered() {
        let of = |before, mib| level(before, &at(Bytes::mib(mib), Bytes::ZERO), RESERVE, false);
        assert_eq!(of(Level::Calm, 4096), Level::Calm);
        assert_eq!(of(Level::Calm, 4095), Level::Attention);
        assert_eq!(of(Level::Attention, 5119), Level::Attention);
        assert_eq!(of(Level::Attention, 5120), Level::Calm);
        assert_eq!(of(Level::Attention, 2047), Level::Act);
        assert_eq!(of(Level::Act, 2303), Level::Act);
        assert_eq!(of(Level::Act, 2304), Level::Attention);
        assert_eq!(of(Level::Calm, 511), Level::Critical);
        assert_eq!(of(Level::Critical, 1023), Level::Critical);
        assert_eq!(of(Level::Critical, 1024), Level::Act);
        assert_eq!(of(Level::Critical, 9000), Level::Calm);
    }

    #[test]
    fn what_falls_fast_is_met_early_and_never_above_the_reserve() {
        let after = |gave_way, headroom: u64, rate: u64| {
            level(Level::Calm, &at(Bytes::mib(headroom), Bytes::mib(rate)), RESERVE, gave_way)
        };
        let of = |headroom, rate| after(false, headroom, rate);
        assert_eq!(of(2500, 800), Level::Attention);
        assert_eq!(of(2399, 800), Level::Act, "gone in three seconds");
        assert_eq!(of(1599, 800), Level::Critical, "gone in two, which a stop takes");
        assert_eq!(of(4097, 9000), Level::Calm);
        let later = |headroom, rate| after(true, headroom, rate);
        assert_eq!((later(2049, 1500), later(2047, 800)), (Level::Attention, Level::Act));
        assert_eq!((later(2047, 1500), later(2399, 20_000)), (Level::Critical, Level::Critical));
        // A small reserve that is gone before a kill could help is too small.
        let small = level(Level::Calm, &at(Bytes::mib(140), Bytes::gib(1)), Bytes::mib(128), false);
        assert_eq!(small, Level::Critical);
    }

    #[test]
    fn a_moment_is_no_flood() {
        let of = |lost| Fall::of(Bytes::gib(2), lost, RESERVE);
        assert_eq!(of(None), Fall { now: Bytes::gib(2), lasting: Bytes::ZERO });
        assert_eq!(of(Some(Bytes::mib(100))).lasting, Bytes::mib(50));
        assert_eq!(of(Some(Bytes::mib(1023))).lasting, Bytes::mib(1023).mul_div(1, 2), "half a second of it");
        assert_eq!(of(Some(Bytes::mib(1024))).lasting, Bytes::gib(2));
        let slow = Fall::of(Bytes::mib(20), Some(Bytes::mib(40)), RESERVE);
        assert_eq!(slow.lasting, Bytes::mib(20), "one that lasts counts whole");
        // As while a model is loaded into swap; where not even a kill would be in time, there is none to wait for.
        let (reserve, rate) = (Bytes::mib(256), Bytes::mib(620));
        for (left, expected) in [(240, Level::Attention), (92, Level::Critical)] {
            let falling = Fall::of(rate, Some(Bytes::mib(53)), reserve).lasting;
            let gauge = Gauge { falling, ..at(Bytes::mib(left), rate) };
            assert_eq!(level(Level::Calm, &gauge, reserve, false), expected, "{left} MiB are left");
        }
    }

    #[test]
    fn a_fast_load_is_a_danger_only_where_others_have_taken_what_it_was_promised() {
        // The last of 5 GB/s into what was planned for it, beside a small reserve.
        let load = |available: u64, promised: u64| Gauge {
            falling_in_all: Bytes::gib(5),
            promised: Bytes::mib(promised),
            ..at(Bytes::mib(available), Bytes::ZERO)
        };
        let of = |available, promised| {
            let gauge = Gauge { falling: Bytes::ZERO, ..load(available, promised) };
            level(Level::Calm, &gauge, Bytes::mib(512), false)
        };
        assert_eq!(of(880, 340), Level::Calm);
        assert_eq!(of(300, 340), Level::Critical);
        assert!(!load(880, 340).is_gone_within(STOP), "it takes no more than it was promised");
        assert!(load(300, 340).is_gone_within(REACT));
    }

    #[test]
    fn mapped_weights_are_no_headroom_and_leave_the_machine_in_no_danger() {
        let mapped = vec![Mapped { file: FileId { device: 1, inode: 1 }, bytes: Bytes::gib(60) }];
        let mut holder = Reservation::for_test(Footprint { mapped, ..Footprint::default() });
        holder.measured = Measured { file: Bytes::gib(60), private: Bytes::gib(1), ..Measured::default() };
        let (a, b): (Instance, Instance) = ("a".parse().unwrap(), "a@2".parse().unwrap());
        let holders = BTreeMap::from([(a.clone(), holder.clone()), (b, holder.clone())]);
        let memory = Memory { total: Bytes::gib(128), available: Bytes::gib(61), ..Memory::default() };
        let machine = Machine { memory, ..Machine::default() };
        let read = gauge(&machine, &holders, Fall::default());
        assert_eq!(read.headroom, Bytes::gib(1), "shared by two, and counted once");
        assert_eq!(level(Level::Calm, &read, RESERVE, false), Level::Act);
        assert_eq!(gain(&machine, &holders, Pool::Memory, &[&a]), Bytes::gib(1), "the other one needs them");

        holder.streams = true;
        let holders = BTreeMap::from([(a, holder)]);
        assert_eq!(gauge(&machine, &holders, Fall::default()).headroom, Bytes::gib(61));
    }

    #[test]
    fn looks_follow_what_is_left_and_cease_where_that_is_much() {
        let mut machine = Machine::default();
        machine.pressure.fastest = Bytes::gib(1);
        let of = |machine: &Machine, gib, level| {
            look_again(machine, &at(Bytes::gib(gib), Bytes::ZERO), level, RESERVE)
        };
        assert_eq!(of(&machine, 32, Level::Calm), None);
        assert_eq!(of(&machine, 12, Level::Calm), Some(10_000));
        assert_eq!(of(&machine, 2, Level::Act), Some(50));
        assert_eq!(of(&machine, 0, Level::Critical), Some(20));
        machine.pressure.some = Some(500);
        assert_eq!(of(&machine, 7, Level::Calm), Some(1000), "something waits for memory");
        assert_eq!(of(&machine, 12, Level::Calm), Some(10_000), "for its own limit, with as much left");
    }
}

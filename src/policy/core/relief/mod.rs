//! The pressure ladder: what is done when memory runs short though nobody asked for any, least harm first.
//!
//! One thing at a time: the next follows when the memory of the last one is back, or its time is up. Whoever is stopped
//! is owed a return, the later the more often it happened.

mod gentle;
mod rate;
mod say;
mod stop;

use std::collections::{BTreeMap, BTreeSet};

use rate::Readings;

use super::{Action, ActionId, Core, Leak, Outcome};
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{Machine, Phase, Pool, Reservation};
use crate::policy::decision::{Decision, Kind, Level, Relief, Rescue};
use crate::policy::pressure::{self, Fall, Gauge, REACT, STOP, gain};
use crate::policy::request::Mode;

/// How long a stop is waited for while the machine is in no danger; milliseconds.
const PATIENCE: u64 = 20_000;
/// The same for everything else: what takes longer is no relief.
const OTHERS: u64 = 5000;
/// How long the memory of what has ended may take to come back; milliseconds. In danger it is a quarter of that.
const SETTLE: u64 = 2000;
/// How often it is looked at meanwhile; milliseconds.
const SETTLE_STEP: u64 = 50;
/// A model whose engine does not say is idle when it has used no CPU time for so long; milliseconds.
const IDLE: u64 = 10_000;
/// What was just loaded stays for so long after it is ready, unless the machine is in danger; milliseconds.
const STAY: u64 = 60_000;
/// For how long the gate refuses a killed model, which Restart= would have back at once; milliseconds.
const KEPT_OFF: u64 = 60_000;
/// What brought nothing is not tried again for so long; milliseconds.
const IN_VAIN: u64 = 60_000;
/// For how long it has to last at the rate at which it goes down, for anybody to return, and for a shortage to be over;
/// milliseconds.
const LASTS: u64 = 300_000;
/// How long it has to be like that before, and a shortage over; milliseconds.
const CLEAR: u64 = 30_000;
/// The first pause between a stop and the return; it doubles with each; milliseconds.
const BACKOFF: u64 = 60_000;
/// After so long without a stop that is forgotten; milliseconds.
const FORGIVEN: u64 = 60 * 60 * 1000;
/// How often is looked for room while somebody is owed a return; milliseconds.
const LOOK_FOR_ROOM: u64 = 10_000;
/// How often is looked while there is nothing to be done about it; milliseconds.
const HELPLESS: u64 = 250;

/// What the ladder remembers.
#[derive(Clone, Debug, Default)]
pub(super) struct Afloat {
    gauge: Gauge,
    level: Level,
    gpu_level: Level,
    readings: Readings,
    under_way: Option<UnderWay>,
    /// A model has given its memory back, and until when it was not over all the same.
    gave_way: Option<u64>,
    /// One that was told to finish its requests, until when at the latest, and when it was asked last.
    draining: Option<(Instance, u64, u64)>,
    /// Since when each is being stopped, whoever wanted it.
    stopping: BTreeMap<Instance, u64>,
    /// What was tried or said, and until when not again.
    not_before: BTreeMap<(Rescue, Option<Instance>), u64>,
    /// Since when there is room for each of those who are owed a return.
    room: BTreeMap<Instance, u64>,
    killed: BTreeMap<Instance, u64>,
    /// How often each was stopped, and when last.
    stops: BTreeMap<Instance, (u32, u64)>,
}

#[derive(Clone, Debug)]
struct UnderWay {
    id: ActionId,
    instance: Option<Instance>,
    relief: Relief,
    since: u64,
    ended: Option<u64>,
    /// What was in use of each GPU before, and what the model held of it.
    gpus: Vec<(Bytes, Bytes)>,
}

/// Where one is in the order of harm. Only the first three are ever stopped while the machine is in no danger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Harm {
    Expired,
    Idle,
    Busy,
    JustLoaded,
    Pinned,
}

/// What is short.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shortage {
    pub(super) level: Level,
    pub(super) pool: Pool,
    pub(super) headroom: Bytes,
    /// What has to come back for models to be left alone.
    pub(super) needed: Bytes,
}

impl Core {
    /// The level, as of the last step, and what is left of memory.
    #[must_use]
    pub fn gauge(&self, machine: &Machine) -> (Level, Gauge) {
        let Gauge { falling, falling_now, .. } = self.afloat.gauge;
        let fall = Fall { now: falling_now, lasting: falling };
        let gauge = pressure::gauge(machine, &self.holders, fall);
        (self.afloat.level.max(self.afloat.gpu_level), gauge)
    }

    /// Does the next thing that keeps the machine afloat, if anything has to be done.
    pub(super) fn relieve(&mut self, machine: &Machine, now: u64, out: &mut Vec<Action>) {
        if self.holders.is_empty() && self.owed.is_empty() && self.afloat.under_way.is_none() {
            self.afloat = Afloat {
                killed: std::mem::take(&mut self.afloat.killed),
                stops: std::mem::take(&mut self.afloat.stops),
                ..Afloat::default()
            };
            return;
        }
        let mut shortage = self.read(machine, now);
        let gave_way = self.afloat.gave_way.is_some();
        self.follow(machine, &shortage, now, out);
        if self.afloat.gave_way.is_some() != gave_way {
            shortage = self.read(machine, now);
        }
        if self.rules.ladder {
            self.act(machine, &shortage, now, out);
        } else {
            (self.afloat.level, self.afloat.gpu_level) = (Level::Calm, Level::Calm);
        }
        if self.afloat.under_way.is_some() {
            self.wake_at(now + SETTLE_STEP);
        }
    }

    fn act(&mut self, machine: &Machine, shortage: &Shortage, now: u64, out: &mut Vec<Action>) {
        if shortage.level < Level::Act {
            self.afloat.draining = None;
        }
        self.hasten(machine, shortage, now, out);
        if self.afloat.under_way.is_none() && !machine.stopping {
            self.next_rescue(machine, shortage, now, out);
        }
        self.look_again(machine, shortage, now);
    }

    fn read(&mut self, machine: &Machine, now: u64) -> Shortage {
        let reserve = self.rules.reserve;
        let fall = self.falling(machine, now);
        let gauge = pressure::gauge(machine, &self.holders, fall);
        let gpu = pressure::gpu(self.afloat.gpu_level, machine, &self.holders, reserve);
        let afloat = &mut self.afloat;
        let gave_way = afloat.gave_way.is_some();
        afloat.level = pressure::level(afloat.level, &gauge, reserve, gave_way);
        // A look at which the model's memory comes back, or the eater rests, says little.
        let lasts = gauge.headroom >= reserve.mul_div(1, 2) + gauge.lost_within(LASTS);
        let is_over = afloat.level < Level::Act && lasts;
        afloat.gave_way = match afloat.gave_way {
            Some(_) if !is_over => Some(now),
            until => until.filter(|until| now < *until + CLEAR),
        };
        afloat.gpu_level = gpu.map_or(Level::Calm, |(_, _, level)| level);
        afloat.gauge = gauge;
        let holders = &self.holders;
        let stops = |instance: &Instance| holders.get(instance).is_some_and(|r| r.phase == Phase::Stopping);
        afloat.stopping.retain(|instance, _| stops(instance));
        for instance in holders.keys().filter(|instance| stops(instance)) {
            afloat.stopping.entry(instance.clone()).or_insert(now);
        }
        afloat.not_before.retain(|_, until| *until > now);
        afloat.killed.retain(|_, until| *until > now);
        let level = afloat.level;
        match gpu {
            Some((pool, free, gpu_level)) if gpu_level > level => {
                let needed = pressure::left(reserve) - free;
                Shortage { level: gpu_level, pool, headroom: free, needed }
            }
            _ => {
                let needed = pressure::wanted(&gauge, reserve, gave_way) - gauge.headroom;
                Shortage { level, pool: Pool::Memory, headroom: gauge.headroom, needed }
            }
        }
    }

    /// Looks how far what is under way has come.
    ///
    /// A unit may take long to end after its processes have (ExecStopPost=, a slow systemd): what counts is the memory.
    fn follow(&mut self, machine: &Machine, shortage: &Shortage, now: u64, out: &mut Vec<Action>) {
        let Some(under_way) = &self.afloat.under_way else { return };
        let (relief, danger) = (under_way.relief, shortage.level == Level::Critical);
        let stops = matches!(relief.rescue, Rescue::Stop | Rescue::Expire);
        let frees = stops || relief.rescue == Rescue::Kill;
        let gained = self.gained(under_way, machine, now);
        let is_back = gained >= relief.expected_bytes.mul_div(19, 20);
        let ended = under_way.ended.or_else(|| {
            let instance = under_way.instance.as_ref().filter(|_| frees)?;
            let gone = !self.holders.contains_key(instance);
            let left = gain(machine, &self.holders, relief.pool, &[instance]);
            // What it has on cards of their own goes last, and is looked for when it is gone.
            let on_gpus = |r: &Reservation| r.measured.gpus.iter().any(|held| *held >= self.worthwhile());
            let holds = left >= self.worthwhile() || self.holders.get(instance).is_some_and(on_gpus);
            (gone || (is_back && !holds)).then_some(now)
        });
        let Some(ended) = ended else {
            let time = if stops { PATIENCE } else { OTHERS };
            // There is no time for gentle means any more, whatever they may yet bring.
            let gentle = matches!(relief.rescue, Rescue::DropCache | Rescue::Reclaim | Rescue::AddSwap);
            if now >= under_way.since + time || (gentle && danger) {
                let key = (relief.rescue, under_way.instance.clone());
                self.afloat.not_before.insert(key, now + IN_VAIN);
                self.afloat.under_way = None;
            }
            return;
        };
        if let Some(under_way) = &mut self.afloat.under_way {
            under_way.ended = Some(ended);
        }
        let settle = if danger { SETTLE / 4 } else { SETTLE };
        if frees && !is_back && now < ended + settle {
            return;
        }
        let Some(under_way) = self.afloat.under_way.take() else { return };
        if gained < relief.expected_bytes.mul_div(1, 2) || !frees {
            let key = (relief.rescue, under_way.instance.clone());
            let helped = is_back || relief.rescue == Rescue::AddSwap;
            self.afloat.not_before.insert(key, now + if helped { OTHERS } else { IN_VAIN });
        }
        self.tell_gain(&under_way, gained, now, out);
        if frees {
            if gained >= relief.expected_bytes.mul_div(1, 2) && relief.pool == Pool::Memory {
                self.afloat.gave_way = Some(now);
            }
            self.quarantine(&under_way, machine, now, out);
        }
    }

    /// What has come back of what is under way, if memory went down meanwhile as it did before, or as it does now: what is
    /// done at the beginning of a flood is done before its rate is known.
    fn gained(&self, under_way: &UnderWay, machine: &Machine, now: u64) -> Bytes {
        let relief = under_way.relief;
        let headroom = match relief.pool {
            Pool::Gpu(n) => machine.gpus.get(n).map_or(Bytes::ZERO, |gpu| gpu.total - gpu.used),
            _ => self.afloat.gauge.headroom,
        };
        let lost = match relief.pool {
            Pool::Memory => {
                let falling = relief.falling_bytes.max(self.afloat.gauge.falling);
                falling.mul_div(now.saturating_sub(under_way.since), 1000)
            }
            _ => Bytes::ZERO,
        };
        (headroom + lost) - relief.headroom_bytes
    }

    fn tell_gain(&mut self, under_way: &UnderWay, gained: Bytes, now: u64, out: &mut Vec<Action>) {
        let relief = Relief { gained_bytes: Some(gained), ..under_way.relief };
        let took = now.saturating_sub(under_way.since);
        let what = match (&under_way.instance, relief.rescue) {
            (Some(instance), Rescue::Reclaim) => format!("taking memory back from {instance}"),
            (Some(instance), _) if self.holders.contains_key(instance) => {
                format!("{instance} is ending, which")
            }
            (Some(instance), _) => format!("{instance} is gone, which"),
            (None, Rescue::AddSwap) => "a swapfile".to_owned(),
            (None, _) => "dropping cold page cache".to_owned(),
        };
        let text = match relief.rescue {
            Rescue::AddSwap => format!("{what} of {} is in use after {took} ms", relief.expected_bytes),
            _ => format!("{what} brought {gained} of {} back after {took} ms", relief.expected_bytes),
        };
        let decision = self.relief(under_way.instance.clone(), relief, gained, text, now);
        self.record(decision, out);
    }

    /// What a GPU that shares memory did not get back is nobody's to promise.
    fn quarantine(&mut self, under_way: &UnderWay, machine: &Machine, now: u64, out: &mut Vec<Action>) {
        let Some(instance) = under_way.instance.clone() else { return };
        for (n, (before, held)) in under_way.gpus.iter().enumerate() {
            let back = *before - machine.gpus.get(n).map_or(Bytes::ZERO, |gpu| gpu.used);
            let missing = *held - back;
            if missing <= held.mul_div(1, 20).max(Bytes::mib(64)) {
                continue;
            }
            let leak = Leak { instance: instance.clone(), pool: Pool::Gpu(n), bytes: missing, since: now };
            self.leaks.push(leak);
            let text = format!("{instance} was stopped but {missing} of its GPU memory did not come back");
            let decision = Decision {
                kind: Kind::Quarantine,
                relief: None,
                ..self.relief(Some(instance.clone()), under_way.relief, missing, text, now)
            };
            self.record(decision, out);
        }
    }

    /// Kills what is being stopped when the machine can't wait for its end.
    fn hasten(&mut self, machine: &Machine, shortage: &Shortage, now: u64, out: &mut Vec<Action>) {
        let kills = self.afloat.under_way.as_ref().is_some_and(|u| u.relief.rescue == Rescue::Kill);
        let enough = shortage.needed.is_zero();
        if kills || enough || shortage.level != Level::Critical || self.rules.mode == Mode::Observe {
            return;
        }
        let gauge = self.afloat.gauge;
        let late = |since: u64| {
            let elapsed = now.saturating_sub(since);
            elapsed >= STOP || gauge.is_gone_within(STOP - elapsed + REACT)
        };
        let worth = |instance: &Instance| {
            let freed = gain(machine, &self.holders, shortage.pool, &[instance]);
            freed >= self.worthwhile() && !self.was_tried(Rescue::Kill, Some(instance))
        };
        let overrun = self.afloat.stopping.iter().filter(|(_, since)| late(**since));
        let most = overrun
            .map(|(instance, since)| (instance.clone(), now - since))
            .filter(|(instance, _)| worth(instance))
            .max_by_key(|(instance, _)| gain(machine, &self.holders, shortage.pool, &[instance]));
        let Some((instance, elapsed)) = most else { return };
        let expected = gain(machine, &self.holders, shortage.pool, &[&instance]);
        let text = format!(
            "{instance} is killed to keep the machine afloat: {}, and it has not stopped in {elapsed} ms",
            self.shortage_text(shortage)
        );
        self.take_away(instance, Rescue::Kill, expected, text, machine, shortage, now, out);
    }

    /// Chooses the next thing to do, and begins it.
    fn next_rescue(&mut self, machine: &Machine, shortage: &Shortage, now: u64, out: &mut Vec<Action>) {
        if self.rules.mode == Mode::Observe && self.was_tried(Rescue::Nothing, None) {
            return;
        }
        if self.drop_cold_cache(machine, shortage, now, out) || shortage.level < Level::Attention {
            return;
        }
        let gauge = self.afloat.gauge;
        let in_time = shortage.level < Level::Critical && gauge.headroom > gauge.lost_within(2 * STOP);
        if shortage.pool == Pool::Memory
            && in_time
            && (self.reclaim(machine, shortage, now, out) || self.add_swap(machine, shortage, now, out))
        {
            return;
        }
        if shortage.level < Level::Act {
            if shortage.headroom < self.rules.reserve.mul_div(3, 4) {
                // Their answers shall be there when they are needed.
                self.drains_or_asks(machine, shortage, now, out);
            }
            return;
        }
        let time = if shortage.level == Level::Critical { STOP } else { PATIENCE };
        let stopping = self.afloat.stopping.iter().filter(|(_, since)| now < **since + time);
        let coming: Vec<&Instance> = stopping.map(|(instance, _)| instance).collect();
        let coming_bytes = gain(machine, &self.holders, shortage.pool, &coming);
        let alone = coming.is_empty();
        let needed = shortage.needed - coming_bytes;
        if needed <= self.worthwhile() {
            // Should it be needed later on, the time to finish is given anew.
            self.afloat.draining = None;
            return;
        }
        if self.drains_or_asks(machine, shortage, now, out) {
            return;
        }
        // One that has given back all it had may take its time to end.
        let nothing_comes = coming_bytes < self.worthwhile();
        match self.victim(machine, shortage, needed, nothing_comes, now) {
            Some((instance, Harm::Busy)) if self.drain(&instance, machine, shortage, now, out) => {}
            Some((instance, harm)) => self.stop(instance, harm, machine, shortage, now, out),
            None if alone => self.name_the_eater(machine, shortage, now, out),
            None => {}
        }
    }

    /// Less than this is not worth doing anything for.
    fn worthwhile(&self) -> Bytes {
        pressure::worthwhile(self.rules.reserve)
    }

    pub(super) fn was_tried(&self, rescue: Rescue, instance: Option<&Instance>) -> bool {
        self.afloat.not_before.contains_key(&(rescue, instance.cloned()))
    }

    /// One that could not be stopped is not stopped again at once when its time is up.
    pub(super) fn remember_failed(&mut self, instance: &Instance, outcome: &Outcome, now: u64) {
        if let Outcome::Failed(_) = outcome {
            self.afloat.not_before.insert((Rescue::Expire, Some(instance.clone())), now + IN_VAIN);
        }
    }

    /// Takes in the outcome of what was done; false when `id` is none of it.
    pub(super) fn relieved(&mut self, id: ActionId, outcome: &Outcome, now: u64) -> bool {
        let Some(under_way) = self.afloat.under_way.as_mut().filter(|u| u.id == id) else { return false };
        under_way.ended = Some(now);
        if let Outcome::Failed(_) = outcome
            && let Some(failed) = self.afloat.under_way.take()
        {
            self.afloat.not_before.insert((failed.relief.rescue, failed.instance.clone()), now + IN_VAIN);
            if let Some(instance) = &failed.instance {
                self.afloat.killed.remove(instance);
            }
        }
        true
    }

    /// Whether a model was killed so recently that it may not come back yet.
    pub(super) fn is_kept_off(&self, instance: &Instance, now: u64) -> bool {
        self.afloat.killed.get(instance).is_some_and(|until| now < *until)
    }

    /// Whether the end of one that was killed is waited for.
    pub(super) fn is_being_killed(&self, instance: &Instance) -> bool {
        let under_way = self.afloat.under_way.as_ref();
        under_way.is_some_and(|u| u.relief.rescue == Rescue::Kill && u.instance.as_ref() == Some(instance))
    }

    /// Who was killed and is there all the same, or could not be.
    pub(super) fn killed_in_vain(&self) -> BTreeSet<Instance> {
        let of = |(instance, r): (&Instance, &Reservation)| {
            let killed = r.phase == Phase::Stopping && self.afloat.killed.contains_key(instance);
            (killed || self.was_tried(Rescue::Kill, Some(instance))).then(|| instance.clone())
        };
        self.holders.iter().filter_map(of).collect()
    }

    /// Whether one that was stopped to keep the machine afloat, and would fit or not, may come back. Its room has to
    /// have been there for a while, and to last.
    pub(super) fn may_return(&mut self, instance: &Instance, takes: Bytes, fits: bool, now: u64) -> bool {
        let (gauge, reserve) = (&self.afloat.gauge, self.rules.reserve);
        if !fits || gauge.headroom < reserve + takes + gauge.lost_within(LASTS) {
            self.afloat.room.remove(instance);
            return false;
        }
        let since = *self.afloat.room.entry(instance.clone()).or_insert(now);
        if now < since + CLEAR {
            self.wake_at(since + CLEAR);
            return false;
        }
        true
    }

    /// Whether memory is short, or something is being done about it.
    pub(super) fn is_short(&self) -> bool {
        self.afloat.level.max(self.afloat.gpu_level) > Level::Calm || self.afloat.under_way.is_some()
    }

    /// Whether models are being stopped to keep the machine afloat.
    pub(super) fn is_sinking(&self) -> bool {
        self.afloat.level.max(self.afloat.gpu_level) >= Level::Act
    }

    fn look_again(&mut self, machine: &Machine, shortage: &Shortage, now: u64) {
        if self.owed.iter().any(|owed| owed.for_instance.is_none()) {
            self.wake_at(now + LOOK_FOR_ROOM);
        }
        if self.holders.is_empty() {
            return;
        }
        let gauge = self.afloat.gauge;
        let time = pressure::look_again(machine, &gauge, self.afloat.level, self.rules.reserve);
        let helpless =
            self.afloat.under_way.is_none() && shortage.level >= Level::Act && gauge.falling_now.is_zero();
        let time = if helpless { time.map(|time| time.max(HELPLESS)) } else { time };
        let time =
            if self.afloat.gpu_level > Level::Calm { Some(time.unwrap_or(1000).min(1000)) } else { time };
        if let Some(time) = time {
            self.wake_at(now + time);
        }
    }
}

//! How fast memory goes down.

use std::collections::VecDeque;

use crate::bytes::Bytes;
use crate::ledger::{Machine, Phase, Reservation};
use crate::policy::core::Core;
use crate::policy::pressure::{Fall, STOP, beyond};

/// The shortest time between two readings; milliseconds.
const SHORTEST: u64 = 40;
/// The longest that a rate can be taken over; milliseconds.
const LONGEST: u64 = 2000;

/// What was used beyond what was promised, from just before the last [`STOP`] on and three times at least: when, and
/// how much.
#[derive(Clone, Debug, Default)]
pub(super) struct Readings(VecDeque<(u64, Bytes)>);

impl Readings {
    fn add(&mut self, now: u64, beyond: Bytes) {
        if self.0.back().is_some_and(|(at, _)| now < at + SHORTEST) {
            return;
        }
        self.0.push_back((now, beyond));
        while self.0.len() > 3 && self.0[1].0 + STOP <= now {
            self.0.pop_front();
        }
    }

    /// The growth between the reading `back` before the last and the one before that, bytes per second, and over how
    /// long; milliseconds.
    fn rate(&self, back: usize) -> Option<(Bytes, u64)> {
        let mut latest = self.0.iter().rev().skip(back);
        let ((at, beyond), (before_at, before)) = (latest.next()?, latest.next()?);
        let over = at - before_at;
        Some(((*beyond - *before).mul_div(1000, over), over))
    }

    /// What was lost since the least was used; unknown before the second reading.
    fn lost(&self) -> Option<Bytes> {
        let (_, last) = self.0.back().filter(|_| self.0.len() > 1)?;
        let least = self.0.iter().map(|(_, beyond)| *beyond).min()?;
        Some(*last - least)
    }
}

impl Core {
    /// How fast memory goes down beyond what was promised. What loading models take was, and so it is the growth of
    /// the rest that counts, where that is known.
    ///
    /// Memory and what models hold of it are read one after the other: what is loaded in between looks like growth of the
    /// rest in one reading, and the other way round in the next one. So it counts while models load when it lasts for two.
    ///
    /// One that belongs partly in swap is kept at a limit of its own by the kernel, with about the reserve left. What it
    /// holds and what is available go up and down there by a good part of a small reserve (53 MiB within 2 s, measured), so
    /// that a load was taken for a flood: with such a one only the moment counts, beside the levels themselves.
    pub(super) fn falling(&mut self, machine: &Machine, now: u64) -> Fall {
        let readings = &mut self.afloat.readings;
        readings.add(now, beyond(machine, &self.holders));
        let falling = machine.pressure.falling;
        let rate = |back| readings.rate(back).map_or(Bytes::ZERO, |(rate, _)| rate);
        let rate = match readings.rate(0) {
            _ if self.holders.values().any(Reservation::loads) => falling.min(rate(0)).min(rate(1)),
            Some((rate, over)) if over <= LONGEST => falling.min(rate),
            _ => falling,
        };
        let swaps = |r: &Reservation| {
            matches!(r.phase, Phase::Loading | Phase::Running) && !r.predicted.swapped.is_zero()
        };
        let lost = readings.lost().filter(|_| !self.holders.values().any(swaps));
        Fall::of(rate, lost, self.rules.reserve)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Footprint, Measured};

    #[test]
    fn what_a_load_takes_between_two_readings_is_no_eater() {
        let mut core = Core::default();
        let mut machine = Machine::default();
        machine.memory.total = Bytes::gib(128);
        machine.pressure.falling = Bytes::gib(1);
        let mut falling = |at: u64, left: u64, loaded: u64| {
            machine.memory.available = Bytes::mib(left);
            let predicted = Footprint { private: Bytes::gib(40), ..Footprint::default() };
            let measured = Measured { private: Bytes::mib(loaded), ..Measured::default() };
            let phase = Phase::Loading;
            let holder = Reservation { phase, measured, ..Reservation::for_test(predicted) };
            core.holders.insert("a".parse().expect("a name"), holder);
            core.falling(&machine, at).now
        };
        assert_eq!(falling(0, 9000, 1000), Bytes::ZERO);
        assert_eq!(falling(50, 8900, 1050), Bytes::ZERO, "the model was read too early");
        assert_eq!(falling(100, 8850, 1150), Bytes::ZERO, "and now in time");
        assert_eq!(falling(150, 8800, 1150), Bytes::ZERO);
        assert_eq!(falling(200, 8740, 1150), Bytes::mib(1000), "somebody else takes it: the lower of two");
    }

    #[test]
    fn beside_one_that_swaps_only_the_moment_counts() {
        let mut core = Core::default();
        core.rules.reserve = Bytes::mib(256);
        let mut machine = Machine::default();
        machine.memory.total = Bytes::gib(2);
        machine.pressure.falling = Bytes::gib(1);
        let mut fall = |at: u64, left: u64, swapped: Bytes| {
            machine.memory.available = Bytes::mib(left);
            let predicted = Footprint { swapped, ..Footprint::default() };
            let holder = Reservation { phase: Phase::Running, ..Reservation::for_test(predicted) };
            core.holders.insert("a".parse().expect("a name"), holder);
            core.falling(&machine, at)
        };
        let rate = Bytes::mib(1000);
        fall(0, 400, Bytes::ZERO);
        assert_eq!(fall(100, 300, Bytes::ZERO), Fall { now: rate, lasting: rate });
        assert_eq!(fall(200, 200, Bytes::gib(1)), Fall { now: rate, lasting: Bytes::ZERO });
    }

    #[test]
    fn what_was_lost_is_counted_from_the_least_of_the_last_two_seconds() {
        let mut readings = Readings::default();
        let mut lost = |at: u64, used: u64| {
            readings.add(at, Bytes::mib(used));
            readings.lost()
        };
        assert_eq!(lost(0, 300), None, "nothing to compare it with");
        assert_eq!(lost(10_000, 320), Some(Bytes::mib(20)), "however long it is ago");
        assert_eq!(lost(10_050, 290), Some(Bytes::ZERO));
        assert_eq!(lost(10_060, 400), Some(Bytes::ZERO), "too soon for a reading");
        assert_eq!(lost(10_100, 310), Some(Bytes::mib(20)));
        assert_eq!(lost(10_150, 317), Some(Bytes::mib(27)));
        assert_eq!(lost(12_049, 330), Some(Bytes::mib(40)));
        assert_eq!(lost(12_100, 331), Some(Bytes::mib(21)), "290 is more than two seconds ago");
        assert!((13_000..33_000).step_by(50).all(|at| lost(at, at / 100).is_some()));
        assert!(readings.0.len() <= 42, "{}", readings.0.len());
    }
}

//! How fast memory goes down.

use crate::bytes::Bytes;
use crate::ledger::{Machine, Reservation};
use crate::policy::core::Core;
use crate::policy::pressure::beyond;

/// What went on beyond what was promised.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    at: u64,
    beyond: Bytes,
    /// Bytes per second, and what it was in the sample before.
    rate: Bytes,
    before: Bytes,
    /// Over how long; milliseconds.
    over: u64,
}

impl Core {
    /// How fast memory goes down beyond what was promised. What loading models take was, and so it is the growth of
    /// the rest that counts, where that is known.
    ///
    /// Memory and what models hold of it are read one after the other: what is loaded in between looks like growth of the
    /// rest in one sample, and the other way round in the next one. So it counts while models load when it lasts for two.
    pub(super) fn falling(&mut self, machine: &Machine, now: u64) -> Bytes {
        let beyond = beyond(machine, &self.holders);
        let none = Sample { at: now, beyond, rate: Bytes::ZERO, before: Bytes::ZERO, over: 0 };
        let sample = self.afloat.sample.get_or_insert(none);
        let over = now.saturating_sub(sample.at);
        if over >= 40 {
            let rate = (beyond - sample.beyond).mul_div(1000, over);
            *sample = Sample { at: now, beyond, rate, before: sample.rate, over };
        }
        let falling = machine.pressure.falling;
        match sample {
            _ if self.holders.values().any(Reservation::loads) => falling.min(sample.rate).min(sample.before),
            Sample { over: 1..=2000, .. } => falling.min(sample.rate),
            _ => falling,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Footprint, Measured, Phase};

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
            core.falling(&machine, at)
        };
        assert_eq!(falling(0, 9000, 1000), Bytes::ZERO);
        assert_eq!(falling(50, 8900, 1050), Bytes::ZERO, "the model was read too early");
        assert_eq!(falling(100, 8850, 1150), Bytes::ZERO, "and now in time");
        assert_eq!(falling(150, 8800, 1150), Bytes::ZERO);
        assert_eq!(falling(200, 8740, 1150), Bytes::mib(1000), "somebody else takes it: the lower of two");
    }
}

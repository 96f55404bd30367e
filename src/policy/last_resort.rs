//! Who is killed, and when, if the loop itself does not act: what the last rung of the ladder is told beforehand.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use super::request::{Mode, Rules};
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{Machine, Phase, Reservation, unified_bytes};

/// A model that holds less than this is not worth killing: memory is as short afterwards.
const WORTHWHILE: Bytes = Bytes::mib(16);

/// What is done when nothing else is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastResort {
    /// Memory is short enough for it to be watched all the time.
    pub near: bool,
    /// MemAvailable below which it is, though the loop looks at it when it means to.
    pub below: Bytes,
    /// The same when the loop does not.
    pub alone: Bytes,
    /// Who goes, in this order, and what each would give back.
    pub victims: Vec<(Instance, Bytes)>,
}

/// What the last rung stands by with; none where nothing is to be done.
///
/// It is near once the reserve is being used up, and acts where the machine is in danger (the last eighth), which the
/// loop has met long before; where the loop does not move, at half of it, as the loop would have.
/// First goes who is on the way out already, and gives back soonest; then by priority, and among equals who was used
/// least recently. Pinned models come last: they too are better lost than whatever the kernel would choose. Behind them
/// are those of `in_vain`, who were killed and hold their memory all the same: once more brings nothing soon.
#[must_use]
pub fn last_resort(
    holders: &BTreeMap<Instance, Reservation>,
    in_vain: &BTreeSet<Instance>,
    machine: &Machine,
    rules: &Rules,
) -> Option<LastResort> {
    if rules.mode == Mode::Observe {
        return None;
    }
    let mut order: Vec<(&Instance, &Reservation, Bytes)> = holders
        .iter()
        .map(|(instance, r)| {
            (instance, r, r.measured.unreclaimable() + unified_bytes(machine, &r.measured.gpus))
        })
        // What a lease is for is nobody's to kill.
        .filter(|(instance, r, frees)| !instance.lease && r.phase != Phase::Preparing && *frees >= WORTHWHILE)
        .collect();
    order.sort_by_key(|(instance, r, frees)| {
        let again = in_vain.contains(*instance);
        (again, r.phase != Phase::Stopping, r.pinned, r.priority, r.last_used, Reverse(*frees))
    });
    if order.is_empty() {
        return None;
    }
    let victims = order.into_iter().map(|(instance, _, frees)| (instance.clone(), frees)).collect();
    let near = machine.memory.available < rules.reserve;
    // It reads MemAvailable, which leaves out what the ZFS cache would give back.
    let line = |part| rules.reserve.mul_div(1, part) - machine.memory.zfs;
    Some(LastResort { near, below: line(8), alone: line(2), victims })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Footprint, Gpu, GpuKind, Measured};

    fn holder(priority: u8, last_used: u64, mib: u64) -> Reservation {
        let measured = Measured { private: Bytes::mib(mib), ..Measured::default() };
        Reservation { priority, last_used, measured, ..Reservation::for_test(Footprint::default()) }
    }

    fn machine(available: Bytes) -> Machine {
        let mut machine = Machine::default();
        machine.memory.available = available;
        let total = Bytes::gib(24);
        machine.gpus = vec![Gpu { name: "card0".into(), kind: GpuKind::Discrete, total, used: Bytes::ZERO }];
        machine
    }

    #[test]
    fn least_harm_goes_first_and_the_pinned_last() {
        let mut holders: BTreeMap<Instance, Reservation> = BTreeMap::new();
        let mut add = |name: &str, reservation| holders.insert(name.parse().unwrap(), reservation);
        add("tiny", holder(0, 0, 1));
        add("low-fresh", holder(10, 9, 500));
        add("low-old", holder(10, 5, 500));
        add("high", holder(90, 0, 500));
        add("pinned", Reservation { pinned: true, ..holder(1, 0, 500) });
        add("going", Reservation { phase: Phase::Stopping, ..holder(95, 9, 500) });
        add("lease:make", holder(1, 0, 500));
        let on_a_card =
            Measured { private: Bytes::mib(1), gpus: vec![Bytes::gib(20)], ..Measured::default() };
        add("on-a-card", Reservation { measured: on_a_card, ..holder(1, 0, 0) });
        add("coming", Reservation { phase: Phase::Preparing, ..holder(1, 0, 500) });
        let rules = Rules { reserve: Bytes::gib(4), ..Rules::default() };
        let none = BTreeSet::new();
        let last = last_resort(&holders, &none, &machine(Bytes::gib(3)), &rules).unwrap();
        let names = |last: &LastResort| -> Vec<String> {
            last.victims.iter().map(|(instance, _)| instance.to_string()).collect()
        };
        assert_eq!(names(&last), ["going", "low-old", "low-fresh", "high", "pinned"]);
        let killed = BTreeSet::from(["going".parse().unwrap()]);
        let again = last_resort(&holders, &killed, &machine(Bytes::gib(3)), &rules).unwrap();
        assert_eq!(names(&again), ["low-old", "low-fresh", "high", "pinned", "going"]);
        assert_eq!((last.near, last.below, last.alone), (true, Bytes::mib(512), Bytes::gib(2)));
        assert!(
            !last_resort(&holders, &none, &machine(Bytes::gib(4)), &rules).unwrap().near,
            "memory is not short"
        );
        let mut with_zfs = machine(Bytes::gib(3));
        with_zfs.memory.zfs = Bytes::gib(1);
        let orders = last_resort(&holders, &none, &with_zfs, &rules).unwrap();
        assert_eq!((orders.below, orders.alone), (Bytes::ZERO, Bytes::gib(1)), "its cache gives way first");
        assert_eq!(
            last_resort(&BTreeMap::new(), &none, &machine(Bytes::ZERO), &rules),
            None,
            "nobody can go"
        );
        let observing = Rules { mode: Mode::Observe, ..rules };
        assert_eq!(last_resort(&holders, &none, &machine(Bytes::ZERO), &observing), None);
    }
}

//! Bringing the ledger in line with what the machine shows.

use super::{Core, Pending, activity};
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{Machine, Phase, Reservation, Unit, UnitState, unified_bytes};
use crate::policy::plan::rung_as_is;
use crate::policy::request::Request;

impl Core {
    /// Takes over what was measured, moves reservations along, and drops those whose process is gone.
    pub(super) fn sync(&mut self, machine: &Machine, now: u64) {
        let unit = |instance: &Instance| machine.units.get(instance);
        self.count_failed_loads(machine);
        self.holders.retain(|instance, r| lives(unit(instance), &r.invocation));
        for (instance, reservation) in &mut self.holders {
            let Some(unit) = unit(instance) else { continue };
            reservation.measured = unit.measured.clone();
            if instance.is_foreign() {
                whole(reservation, machine);
            }
            self.peaks.note(reservation);
            match (reservation.phase, unit.state) {
                (Phase::Loading | Phase::Running, UnitState::Deactivating) => {
                    reservation.phase = Phase::Stopping
                }
                (Phase::Loading, UnitState::Active) => {
                    reservation.phase = Phase::Running;
                    (reservation.last_used, reservation.ready) = (now, now);
                }
                _ => {}
            }
            activity::note(&mut self.activity, instance, unit, reservation, now);
        }
        let holders = &self.holders;
        let runs = |instance: &Instance| holders.get(instance).is_some_and(|r| r.phase == Phase::Running);
        self.owed.retain(|owed| !runs(&owed.instance));
        self.activity.retain(|instance, _| holders.contains_key(instance));
        // Who is told to stop while it waits at the gate waits no longer, and has taken nothing yet.
        let waits = |p: &Pending| {
            let unit = unit(&p.request.instance);
            unit.is_some_and(|u| u.state == UnitState::Activating) && lives(unit, &p.request.invocation)
        };
        self.pending.retain(waits);
        self.active.take_if(|active| !waits(&active.pending));
        let active = self.active.as_ref().map(|active| &active.pending.request.instance);
        self.holders.retain(|instance, r| r.phase != Phase::Preparing || active == Some(instance));
        // Memory that came back after all is nobody's leak; it is told by the machine being whole again.
        self.leaks.retain(|leak| now.saturating_sub(leak.since) < LEAK_SHOWN);
    }

    /// Counts who ends while it loads, whoever ended it: a person who did starts it by hand again, and that is
    /// another story.
    fn count_failed_loads(&mut self, machine: &Machine) {
        let loading = |(i, r): &(&Instance, &Reservation)| r.phase == Phase::Loading && !i.lease;
        for (instance, reservation) in self.holders.iter().filter(loading) {
            let unit = machine.units.get(instance);
            if !lives(unit, &reservation.invocation)
                || unit.is_some_and(|u| u.state == UnitState::Deactivating)
            {
                *self.failed_loads.entry(instance.clone()).or_default() += 1;
            } else if unit.is_some_and(|u| u.state == UnitState::Active) {
                self.failed_loads.remove(instance);
            }
        }
    }

    /// Takes a running model into the ledger that is not in it.
    pub(super) fn adopt(&mut self, request: &Request, machine: &Machine, now: u64) {
        let (Some(unit), Some(rung)) = (machine.units.get(&request.instance), request.ladder.first()) else {
            return;
        };
        if self.holders.contains_key(&request.instance) || !lives(Some(unit), &request.invocation) {
            return;
        }
        let phase = if unit.state == UnitState::Active { Phase::Running } else { Phase::Loading };
        let as_is = rung_as_is(request, self.situation(machine, now));
        let mut reservation = request.reservation(as_is.as_ref().unwrap_or(rung), phase, now);
        reservation.measured = unit.measured.clone();
        if request.instance.is_foreign() {
            // What it took before it was stopped counts again, though it shows only later.
            let before = self.owed.iter().find(|owed| owed.instance == request.instance);
            reservation.reload = reservation.reload.max(before.map_or(Bytes::ZERO, |o| o.reservation.reload));
            whole(&mut reservation, machine);
        }
        self.holders.insert(request.instance.clone(), reservation);
    }
}

/// Of a unit of somebody else it is known (`reload`) what it takes at its largest, wherever that lies: what it was measured
/// to hold on a GPU that computes from system memory is part of it.
fn whole(reservation: &mut Reservation, machine: &Machine) {
    reservation.predicted.private = reservation.reload - unified_bytes(machine, &reservation.measured.gpus);
}

/// How long a leak stays in the list after it was seen; milliseconds.
const LEAK_SHOWN: u64 = 24 * 60 * 60 * 1000;

/// Whether the process that `invocation` stands for may still exist.
fn lives(unit: Option<&Unit>, invocation: &str) -> bool {
    unit.is_some_and(|unit| {
        // Between a crash and its restart a unit counts as activating, with no process.
        let processless = unit.state == UnitState::Activating && unit.main_pid == 0;
        unit.state.is_alive() && !processless && unit.invocation == invocation
    })
}

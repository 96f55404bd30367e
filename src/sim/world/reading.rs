//! What the simulated machine shows.

use std::collections::BTreeMap;

use super::{SimUnit, World};
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{FileId, GpuKind, Machine, Measured, Memory, Pressure, Unit, UnitState};

impl World {
    /// How much more is in use than the machine has: on a real one the kernel would kill.
    #[must_use]
    pub fn overrun(&self) -> Bytes {
        let unified =
            |n: usize| self.scenario.machine.gpus.get(n).is_none_or(|gpu| gpu.kind == GpuKind::Unified);
        let held = |(instance, unit): (&Instance, &SimUnit)| {
            let measured = self.measured(instance, unit);
            let gpus: Bytes =
                measured.gpus.iter().enumerate().filter(|(n, _)| unified(*n)).map(|(_, b)| *b).sum();
            measured.unreclaimable() + gpus
        };
        // What is no model's can be swapped out by the kernel.
        let swap = self.swap_left();
        let used = self.system + self.leaked + self.gpu + self.eaten() + self.units.iter().map(held).sum();
        used - self.scenario.machine.memory - swap
    }

    /// What the machine shows.
    #[must_use]
    pub fn observe(&self) -> Machine {
        let sim = &self.scenario.machine;
        let mut units = BTreeMap::new();
        let mut starting = Vec::new();
        let mut used = self.system + self.leaked + self.eaten();
        let mut gpus = sim.gpus.clone();
        if let Some(first) = gpus.first_mut() {
            first.used = (first.used + self.gpu + self.gpu_leaked).min(first.total);
            used += if first.kind == GpuKind::Unified { self.gpu } else { Bytes::ZERO };
        }
        for (instance, unit) in &self.units {
            let measured = self.measured(instance, unit);
            used += measured.unreclaimable();
            for (gpu, bytes) in gpus.iter_mut().zip(&measured.gpus) {
                gpu.used += *bytes;
                if gpu.kind == GpuKind::Unified {
                    used += *bytes;
                }
            }
            // Of a restart the unit's state is heard of before its job is.
            let heard = unit.asked || !unit.restarted;
            if unit.state == UnitState::Activating && heard && !instance.is_foreign() {
                starting.push(instance.clone());
            }
            let main_pid = if unit.state.is_alive() { 1000 } else { 0 };
            let reading = Unit {
                state: if unit.awaits_restart { UnitState::Activating } else { unit.state },
                main_pid,
                invocation: unit.invocation.to_string(),
                measured,
                busy: unit.busy,
                cpu_usec: (unit.cpu_msec + unit.busy_since.map_or(0, |since| self.now - since)) * 1000,
                ..Unit::default()
            };
            units.insert(instance.clone(), reading);
        }
        let available = sim.memory - used;
        let swap_total: Bytes = self.swaps.iter().map(|area| area.size).sum();
        let free = available - self.cache - self.cold;
        let cold = (FileId { device: 1, inode: 1 }, self.cold);
        let cached = [cold].into_iter().filter(|(_, bytes)| !bytes.is_zero()).collect();
        let free_large = self.free_large;
        // Pages of what is no model's go first, once there is no other way.
        let spilled = (used - sim.memory).min(self.swap_left());
        let swap_free = self.swap_left() - spilled;
        let mut in_swap = swap_total - swap_free;
        let mut swaps = self.swaps.clone();
        for area in &mut swaps {
            area.used = in_swap.min(area.size);
            in_swap -= area.used;
        }
        let memory = Memory {
            total: sim.memory,
            available,
            free,
            free_large,
            swap_total,
            swap_free,
            zfs: Bytes::ZERO,
        };
        let swap_room = self.swap_room();
        let psi = |value: u16| (!sim.no_psi).then_some(value);
        let waits = if spilled.is_zero() { self.pressure } else { (900, 500) };
        let pressure = Pressure {
            some: psi(waits.0),
            full: psi(waits.1),
            falling: self.falling(),
            fastest: sim.fastest,
        };
        let eater = (!self.eaten().is_zero()).then(|| ("/user.slice/eater.scope".to_owned(), self.eaten()));
        Machine {
            memory,
            gpus,
            units,
            starting,
            cached,
            swaps,
            swap_room,
            pressure,
            eater,
            ..Machine::default()
        }
    }

    /// How fast available memory goes down: what eats, and what loads.
    pub(super) fn falling(&self) -> Bytes {
        let eats = if self.eaten() < self.eater.most { self.eater.rate } else { Bytes::ZERO };
        let loads = |(instance, unit): (&Instance, &SimUnit)| {
            let load = self.scenario.models.get(&instance.model).map_or(0, |m| m.load_seconds);
            let done = unit.state != UnitState::Activating || self.now - unit.loading_since >= load * 1000;
            let all = unit.footprint.private + unit.footprint.gpus.iter().copied().sum();
            if done { Bytes::ZERO } else { all.mul_div(1, load) }
        };
        eats + self.units.iter().map(loads).sum()
    }

    /// What a unit holds: growing evenly while it loads, all of it from then on.
    pub(super) fn measured(&self, instance: &Instance, unit: &SimUnit) -> Measured {
        if !unit.state.is_alive() {
            return Measured::default();
        }
        let load = self.scenario.models.get(&instance.model).map_or(0, |m| m.load_seconds) * 1000;
        let elapsed = (self.now - unit.loading_since).min(load);
        let part = |bytes: Bytes| if load == 0 { bytes } else { bytes.mul_div(elapsed, load) };
        let anonymous = part(unit.footprint.private);
        // Only where swap has room for it does the control group's limit hold.
        let resident = match (self.swaps.is_empty(), unit.high) {
            (false, Some(high)) => anonymous.min(high),
            _ => anonymous,
        };
        let resident = resident - unit.reclaimed.min(resident);
        Measured {
            private: resident,
            swapped: anonymous - resident,
            file: part(unit.footprint.mapped_bytes()),
            gpus: unit.footprint.gpus.iter().map(|b| part(*b)).collect(),
            ..Measured::default()
        }
    }
}

//! The machine to judge for: this one, or one that is described.

use serde_json::{Value, json};

use crate::bytes::Bytes;
use crate::cli::args::{Fit, SizeOrNone};
use crate::cli::failure::Failure;
use crate::config::Reserve;
use crate::fit::{DISK_SPEEDS, Device, DeviceKind, Devices, Settings};
use crate::host::{ControlGroup, Host};
use crate::ledger::{Gpu, GpuKind, Machine, Memory, PerPool};
use crate::policy::request::auto_reserve;
use crate::policy::verdict::Room;

/// A machine and the room in it.
#[derive(Clone, Debug)]
pub struct Target {
    /// Its memory and GPUs.
    pub machine: Machine,
    /// Memory that is kept for the system.
    pub reserve: Bytes,
    /// What models may take.
    pub room: Room,
    /// Described on the command line, rather than this machine.
    pub described: bool,
    /// What its disk reads at the least and at the most; bytes a second.
    pub disk_speeds: [u64; 2],
}

impl Target {
    /// The machine that the command line means.
    pub fn find(args: &Fit, reserve: Reserve) -> Result<Self, Failure> {
        let described = args.ram.is_some() || args.gpu.is_some() || args.swap.is_some();
        let mut machine = Machine::default();
        let mut held = PerPool::default();
        if args.ram.is_none() || !described {
            (machine, held) = this_machine()?;
        }
        if let Some(ram) = args.ram {
            machine.memory = Memory { total: ram, available: ram, free: ram, ..Memory::default() };
        }
        match args.gpu {
            None => {}
            Some(SizeOrNone::None) => machine.gpus.clear(),
            Some(SizeOrNone::Size(total)) => {
                let kind = if args.discrete { GpuKind::Discrete } else { GpuKind::Unified };
                machine.gpus = vec![Gpu { name: "GPU".to_owned(), kind, total, used: Bytes::ZERO }];
                held.gpus.clear();
            }
        }
        if let Some(swap) = args.swap {
            machine.memory.swap_total = swap;
            machine.memory.swap_free = swap;
        }
        let reserve = match reserve {
            Reserve::Size(size) if args.ram.is_none() => size,
            _ => auto_reserve(&machine.memory),
        };
        let room = Room::of(&machine, reserve, &held);
        let disk_speeds = args.disk_speed.map_or(DISK_SPEEDS, |speed| [speed.0; 2]);
        Ok(Self { machine, reserve, room, described, disk_speeds })
    }

    /// This machine.
    pub fn here(reserve: Reserve) -> Result<Self, Failure> {
        let (machine, held) = this_machine()?;
        let reserve = match reserve {
            Reserve::Size(size) => size,
            Reserve::Auto => auto_reserve(&machine.memory),
        };
        let room = Room::of(&machine, reserve, &held);
        Ok(Self { machine, reserve, room, described: false, disk_speeds: DISK_SPEEDS })
    }

    /// Its GPUs as an engine sees them. Their names are what `--device` calls them, where it does.
    pub fn devices(&self, settings: &Settings) -> Devices {
        let name = |n: usize| {
            let given = settings.devices.as_ref().and_then(|names| names.get(n)).cloned();
            given.unwrap_or_else(|| format!("GPU{n}"))
        };
        let device = |(n, gpu): (usize, &Gpu)| {
            let kind = match gpu.kind {
                GpuKind::Unified => DeviceKind::Unified,
                GpuKind::Discrete => DeviceKind::Discrete,
            };
            let free = self.room.emptied.gpus.get(n).map_or(0, |free| free.0);
            Device::new(&name(n), kind, gpu.total.0, free)
        };
        Devices { list: self.machine.gpus.iter().enumerate().map(device).collect() }
    }

    /// Memory that the system itself uses, which models can't have.
    fn system(&self) -> Bytes {
        self.machine.memory.total - self.reserve - self.room.emptied.memory
    }

    /// One line for people.
    pub fn describe(&self) -> String {
        let memory = &self.machine.memory;
        let mut text = format!("{} memory", memory.total);
        if self.system().is_zero() {
            text.push_str(&format!(" ({} kept as reserve)", self.reserve));
        } else {
            text.push_str(&format!(
                " ({} used by the system, {} kept as reserve)",
                self.system(),
                self.reserve
            ));
        }
        for gpu in &self.machine.gpus {
            let kind = match gpu.kind {
                GpuKind::Unified => "of it for the GPU",
                GpuKind::Discrete => "on the GPU",
            };
            text.push_str(&format!(", {} {kind}", gpu.total));
        }
        if self.machine.gpus.is_empty() {
            text.push_str(", no GPU");
        }
        if memory.swap_total.is_zero() {
            text.push_str(", no swap");
        } else {
            text.push_str(&format!(", {} swap", memory.swap_total));
        }
        text
    }

    /// The same as JSON.
    pub fn json(&self) -> Value {
        let memory = &self.machine.memory;
        json!({
            "described": self.described,
            "memory_bytes": memory.total,
            "available_bytes": memory.available,
            "reserve_bytes": self.reserve,
            "system_bytes": self.system(),
            "for_models_bytes": self.room.emptied.memory,
            "swap_total_bytes": memory.swap_total,
            "swap_free_bytes": memory.swap_free,
            "gpus": self.machine.gpus.iter().map(|gpu| json!({
                "name": gpu.name,
                "kind": gpu.kind,
                "total_bytes": gpu.total,
                "used_bytes": gpu.used,
            })).collect::<Vec<_>>(),
        })
    }
}

/// This machine, and what the models in llm.slice hold of it.
fn this_machine() -> Result<(Machine, PerPool), Failure> {
    let host = Host::default();
    let hint = "describe a machine instead: --ram 128GiB --gpu 120GiB";
    let memory = host.memory().map_err(|error| Failure::failed(error.to_string()).hint(hint))?;
    // Without a GPU that tells its size everything is on the host.
    let cards = host.cards().unwrap_or_default();
    let gpus: Vec<Gpu> = cards.iter().filter_map(|card| card.pool()).collect();
    let measured = "/llm.slice"
        .parse::<ControlGroup>()
        .ok()
        .and_then(|slice| host.measured(&slice, &cards).ok())
        .unwrap_or_default();
    let unified = gpus.iter().zip(&measured.gpus).filter(|(gpu, _)| gpu.kind == GpuKind::Unified);
    let held = PerPool {
        memory: measured.unreclaimable() + unified.map(|(_, bytes)| *bytes).sum(),
        gpus: measured.gpus.clone(),
        slice: Bytes::ZERO,
    };
    Ok((Machine { memory, gpus, ..Machine::default() }, held))
}

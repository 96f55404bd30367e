//! GPUs and their memory, from /sys/class/drm.
//!
//! Which pool a GPU's memory is, is decided here by two rules:
//!
//! - An amdgpu device is a card when it has `mem_busy_percent` or `pcie_bw`, which the driver leaves
//!   out on APUs (the first also on Vega 10; default_attr_update() in its amdgpu_pm.c). Only the
//!   names are looked at: reading them, or `gpu_metrics`, asks the GPU's firmware, and waits when
//!   that hangs. Sizes say nothing: a card of 24 GiB in a machine of 128 GiB has a larger GTT than
//!   memory of its own, and an APU may have either way round. In doubt (a virtual function has
//!   neither file) an APU: its bytes are then charged to system memory too, which can refuse too
//!   much but never overcommits.
//! - An APU's models are in GTT, unless the firmware carved out more memory than GTT has: the
//!   driver itself prefers GTT exactly when it is larger. The carve-out is not part of MemTotal,
//!   so an APU that uses it is a pool of its own, like a card. A small carve-out counts for
//!   nothing: what an engine has there is little, and the same bytes of GTT are held for it.

use std::path::Path;

use super::{Host, HostError};
use crate::bytes::Bytes;
use crate::ledger::{Gpu, GpuKind};

const CLASS: &str = "/sys/class/drm";

/// A graphics device as sysfs shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// `card0`
    pub name: String,
    /// The kernel driver: `amdgpu`, `xe`, `nvidia`; empty when not known.
    pub driver: String,
    /// PCI address, `0000:c5:00.0`; empty when not on PCI. Names the card in fdinfo.
    pub pci: String,
    /// It computes in system memory.
    pub apu: bool,
    /// Memory of its own (a card's, or an APU's carve-out), where the driver tells.
    pub vram: Option<Region>,
    /// System memory that it can map, where the driver tells.
    pub gtt: Option<Region>,
}

/// Size and use of one kind of GPU memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Size; changes with `ttm.pages_limit` and the firmware's settings.
    pub total: Bytes,
    /// In use by anyone.
    pub used: Bytes,
}

/// Where a GPU's models are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heap {
    /// System memory, mapped by the GPU.
    Gtt,
    /// Memory that MemTotal does not count: a card's, or a large carve-out.
    Vram,
}

impl Card {
    /// Where its models are; `None` when the driver does not tell sizes (other than amdgpu none
    /// does in sysfs), so that the card can't be a pool.
    #[must_use]
    pub fn heap(&self) -> Option<Heap> {
        match (self.vram, self.gtt) {
            (_, Some(gtt)) if self.apu && self.vram.is_none_or(|vram| vram.total < gtt.total) => {
                Some(Heap::Gtt)
            }
            (Some(_), _) => Some(Heap::Vram),
            (None, _) => None,
        }
    }

    /// The card as a pool of the ledger, where it is one.
    #[must_use]
    pub fn pool(&self) -> Option<Gpu> {
        let (kind, region) = match self.heap()? {
            Heap::Gtt => (GpuKind::Unified, self.gtt?),
            Heap::Vram => (GpuKind::Discrete, self.vram?),
        };
        Some(Gpu { name: self.name.clone(), kind, total: region.total, used: region.used })
    }
}

impl Host {
    /// All graphics devices in the order of their numbers, in which engines enumerate them. None
    /// is an empty list; a file that can't be read leaves its card without that size.
    pub fn cards(&self) -> Result<Vec<Card>, HostError> {
        let path = self.path(CLASS);
        let entries = match std::fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(HostError::Read { path, source }),
        };
        // Connectors (card0-DP-1) and render nodes are not devices of their own.
        let mut numbers: Vec<u32> = entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_prefix("card")?.parse().ok())
            .collect();
        numbers.sort_unstable();
        Ok(numbers.into_iter().map(|number| self.card(number)).collect())
    }

    /// The GPUs that are pools of the ledger, in the engines' order.
    pub fn gpus(&self) -> Result<Vec<Gpu>, HostError> {
        Ok(self.cards()?.iter().filter_map(Card::pool).collect())
    }

    fn card(&self, number: u32) -> Card {
        let name = format!("card{number}");
        let device = format!("{CLASS}/{name}/device");
        let uevent = self.read(&format!("{device}/uevent")).unwrap_or_default();
        let uevent = |key: &str| {
            let value = uevent.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
            value.unwrap_or_default().trim().to_owned()
        };
        let size = |file: &str| -> Option<Bytes> {
            self.read(&format!("{device}/mem_info_{file}")).ok()?.trim().parse().ok().map(Bytes)
        };
        let region = |kind: &str| {
            // A size without use would look empty: then rather no pool at all.
            let (total, used) = (size(&format!("{kind}_total"))?, size(&format!("{kind}_used"))?);
            Some(Region { total, used })
        };
        let driver = uevent("DRIVER");
        Card {
            apu: driver == "amdgpu" && is_apu(&self.path(&device)),
            pci: uevent("PCI_SLOT_NAME"),
            vram: region("vram"),
            gtt: region("gtt"),
            name,
            driver,
        }
    }
}

/// Whether an amdgpu device is an APU.
fn is_apu(device: &Path) -> bool {
    !["mem_busy_percent", "pcie_bw"].iter().any(|name| device.join(name).exists())
}

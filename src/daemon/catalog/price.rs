//! What a model takes at a context length, with everything chosen that is left open.

use crate::engine::Effective;
use crate::fit::{self, Budget, Device, DeviceKind, Devices, Estimate, Facts, FitError, Settings};
use crate::ledger::{FileId, Footprint, Gpu, GpuKind};
use crate::policy::verdict::footprint;

/// What an automatic prompt cache and automatic context checkpoints may take together, as a share
/// of everything else that the model takes: from what is left over, but not all of it.
const SHARE: u64 = 16;
/// llama-server's own default, which an automatic cache never exceeds; MiB.
const MOST_CACHE_MIB: u64 = 8192;
/// Numbers of context checkpoints to choose from; the first is llama-server's own default.
const CHECKPOINTS: [u32; 6] = [32, 16, 8, 4, 2, 1];

/// The devices of a machine as an engine sees them.
pub(super) fn devices(gpus: &[Gpu]) -> Devices {
    let device = |(n, gpu): (usize, &Gpu)| {
        let kind = match gpu.kind {
            GpuKind::Unified => DeviceKind::Unified,
            GpuKind::Discrete => DeviceKind::Discrete,
        };
        Device::new(&format!("GPU{n}"), kind, gpu.total.0, (gpu.total - gpu.used).0)
    };
    Devices { list: gpus.iter().enumerate().map(device).collect() }
}

/// Settings and what they take.
pub(super) type Priced = (Settings, Estimate);

/// The settings to run with at `context`, and what they take; without anything that is only wanted
/// where there is room to spare.
///
/// Layers on the GPU are chosen by the sizes of its memory, not by what is free of it just now:
/// making room is what the decisions are for. A model that may stream or swap and doesn't fit on an APU's GPU has
/// all experts on the host: which of them stay in memory is then for their use to decide, not for their layer.
pub(super) fn needed(
    facts: &Facts,
    effective: &Effective,
    context: u64,
    gpus: &[Gpu],
) -> Result<Priced, FitError> {
    let budget = Budget {
        host: u64::MAX,
        gpu: gpus.iter().map(|gpu| gpu.total.0).fold(0, u64::saturating_add),
        unified: false,
        mapped_resident: true,
    };
    let settings = Settings { context, ..effective.settings.clone() };
    let devices = devices(gpus);
    let placement = fit::place(facts, &settings, &devices, &budget)?;
    let unified = gpus.iter().any(|gpu| gpu.kind == GpuKind::Unified);
    if (effective.streams || effective.swaps) && unified && placement.cpu_moe > 0 {
        let all = Settings { overrides: settings.overrides, ..placement.settings };
        let all = all.with_experts_on_host(facts.layer_count);
        let estimate = fit::estimate(facts, &all, &devices)?;
        return Ok((all, estimate));
    }
    Ok((placement.settings, placement.estimate))
}

/// The same with a prompt cache and context checkpoints, where they are automatic; none where
/// nothing is.
pub(super) fn spacious(
    facts: &Facts,
    effective: &Effective,
    needed: &Priced,
    gpus: &[Gpu],
) -> Result<Option<Priced>, FitError> {
    let automatic = effective.automatic;
    let (mut settings, estimate) = needed.clone();
    let devices = devices(gpus);
    let mut share = estimate.bytes.total_bytes / SHARE;
    if automatic.context_checkpoints {
        for count in CHECKPOINTS {
            let with = Settings { context_checkpoints: count, ..settings.clone() };
            let checkpoints = fit::estimate(facts, &with, &devices)?.extras.checkpoint_bytes;
            if checkpoints <= share / 2 {
                share -= checkpoints;
                settings = with;
                break;
            }
        }
    }
    if automatic.prompt_cache {
        settings.prompt_cache_mib = Some((share >> 20).min(MOST_CACHE_MIB));
    }
    if settings == needed.0 {
        return Ok(None);
    }
    let estimate = fit::estimate(facts, &settings, &devices)?;
    Ok(Some((settings, estimate)))
}

/// An estimate as the ledger counts it; `files` are those of the model, and behind them those of the
/// draft model.
pub(super) fn charge(
    facts: &Facts,
    estimate: &Estimate,
    files: &[FileId],
    settings: &Settings,
    gpus: &[Gpu],
) -> Footprint {
    footprint(estimate, files, &touched(facts, settings, gpus))
}

/// Which of `gpus` each device of an estimate is.
pub(super) fn touched(facts: &Facts, settings: &Settings, gpus: &[Gpu]) -> Vec<usize> {
    let devices = devices(gpus);
    let position = |device: &&Device| devices.list.iter().position(|d| d.name == device.name);
    devices.touched(&facts.beside, settings).iter().filter_map(position).collect()
}

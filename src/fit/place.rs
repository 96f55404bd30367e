//! Choosing what isn't set: how much goes on the devices, and the largest context that fits.

use super::settings::{Devices, GpuLayers, Settings};
use super::{Estimate, Facts, FitError, estimate};

/// What may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Bytes on the host that may be used. On unified memory devices are charged to it too.
    pub host: u64,
    /// Bytes on the devices together.
    pub gpu: u64,
    /// Whether what is on devices is taken from the host's memory too (an APU).
    pub unified: bool,
    /// Whether mapped weights need to be resident: false lets them stay in the files.
    pub mapped_resident: bool,
}

impl Budget {
    /// Whether an estimate stays within.
    #[must_use]
    pub fn holds(&self, estimate: &Estimate) -> bool {
        let gpu = estimate.split.gpu.total_bytes;
        let mut host = estimate.split.host.total_bytes;
        if !self.mapped_resident {
            host = host.saturating_sub(estimate.mapped_bytes);
        }
        if self.unified {
            host = host.saturating_add(gpu);
        }
        gpu <= self.gpu && host <= self.host
    }
}

/// A choice of placement: settings with nothing left to choose, so that the engine's `--fit` can be off.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    /// The settings, explicit.
    pub settings: Settings,
    /// `-ngl`, with the output counted as one.
    pub gpu_layers: u32,
    /// `--n-cpu-moe`: experts of the first so many layers on the host.
    pub cpu_moe: u32,
    /// What it takes.
    pub estimate: Estimate,
    /// Whether it stays within the budget. If not, it is the placement that uses the devices least.
    pub fits: bool,
}

impl Placement {
    /// The arguments that spell the choice out, to stand behind all others.
    #[must_use]
    pub fn args(&self) -> Vec<String> {
        let mut args =
            vec!["--fit".to_owned(), "off".to_owned(), "-ngl".to_owned(), self.gpu_layers.to_string()];
        if self.cpu_moe > 0 {
            args.extend(["--n-cpu-moe".to_owned(), self.cpu_moe.to_string()]);
        }
        args
    }
}

/// Chooses the split where `--gpu-layers` is automatic: everything on the devices when it fits; else the experts
/// of as few layers as needed on the host, which each token touches least; else fewer layers on the devices.
///
/// # Errors
/// As [`estimate`].
pub fn place(
    facts: &Facts,
    settings: &Settings,
    devices: &Devices,
    budget: &Budget,
) -> Result<Placement, FitError> {
    let all = facts.layer_count_all + 1;
    let attempt = |gpu_layers: u32, cpu_moe: u32| -> Result<Placement, FitError> {
        let mut explicit = settings.clone();
        explicit.gpu_layers = GpuLayers::Count(gpu_layers);
        explicit.fit = false;
        if cpu_moe > 0 {
            explicit = explicit.with_experts_on_host(cpu_moe);
        }
        let estimate = estimate(facts, &explicit, devices)?;
        let fits = budget.holds(&estimate);
        Ok(Placement { settings: explicit, gpu_layers, cpu_moe, estimate, fits })
    };
    if devices.used(settings).is_empty() {
        return attempt(0, 0);
    }
    match settings.gpu_layers {
        GpuLayers::Count(n) => return attempt(n.min(all), 0),
        GpuLayers::All => return attempt(all, 0),
        GpuLayers::Auto => {}
    }
    let whole = attempt(all, 0)?;
    if whole.fits {
        return Ok(whole);
    }
    // With more experts on the host the devices hold less and the host more: the first that fits is the
    // one that keeps most on the devices.
    if facts.experts > 0 {
        let bare = attempt(all, facts.layer_count)?;
        if bare.estimate.split.gpu.total_bytes <= budget.gpu {
            let least = first(0, facts.layer_count, |n| {
                Ok(attempt(all, n)?.estimate.split.gpu.total_bytes <= budget.gpu)
            })?;
            let chosen = attempt(all, least)?;
            if chosen.fits || !budget.unified {
                return Ok(chosen);
            }
            return Ok(if bare.fits { bare } else { chosen });
        }
        let layers = first(0, all, |less| {
            Ok(attempt(all - less, facts.layer_count)?.estimate.split.gpu.total_bytes <= budget.gpu)
        })?;
        return attempt(all - layers, facts.layer_count);
    }
    let less =
        first(0, all, |less| Ok(attempt(all - less, 0)?.estimate.split.gpu.total_bytes <= budget.gpu))?;
    attempt(all - less, 0)
}

/// The first number in `low..=high` for which `holds`, which stays true from there on; `high` where none does.
fn first(
    mut low: u32,
    mut high: u32,
    holds: impl Fn(u32) -> Result<bool, FitError>,
) -> Result<u32, FitError> {
    while low < high {
        let middle = low + (high - low) / 2;
        if holds(middle)? { high = middle } else { low = middle + 1 }
    }
    Ok(low)
}

/// The largest context for which `fits` holds, in steps of 256 tokens, at most what the model was trained on
/// (or `limit`, where that is given); none when not even the smallest does.
///
/// # Errors
/// As [`estimate`].
pub fn max_context(
    facts: &Facts,
    settings: &Settings,
    devices: &Devices,
    limit: Option<u64>,
    fits: impl Fn(&Estimate) -> bool,
) -> Result<Option<Estimate>, FitError> {
    let step = 256;
    let top = limit.unwrap_or(facts.context_train).max(step) / step;
    let mut trial = settings.clone();
    let mut at = |steps: u64| {
        trial.context = steps * step;
        estimate(facts, &trial, devices)
    };
    let largest = at(top)?;
    if fits(&largest) {
        return Ok(Some(largest));
    }
    let smallest = at(1)?;
    if !fits(&smallest) {
        return Ok(None);
    }
    let (mut low, mut high, mut best) = (1, top, smallest);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        let trial = at(middle)?;
        if fits(&trial) {
            (low, best) = (middle, trial);
        } else {
            high = middle;
        }
    }
    Ok(Some(best))
}

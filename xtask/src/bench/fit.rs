//! How long estimates take, over every model and setting that the real engine was measured with.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use plimsoll::fit::{Settings, args, estimate, max_context};

use crate::oracle;

/// Times an estimate of a model that has been read, and the search for its largest context.
pub fn estimates() -> Result<()> {
    let (models, cells) = oracle::measured(&oracle::committed())?;
    let (mut one, mut search) = (Vec::new(), Vec::new());
    for cell in cells.iter().filter(|cell| cell.measured.is_some()) {
        let facts = &models[&cell.model];
        let devices = oracle::devices(&cell.device);
        let settings = args::parse(&cell.args, &BTreeMap::new())?.settings;
        let name = format!("{} {} {}", cell.model, cell.device, cell.args.join(" "));
        one.push((middle(9, || estimate(facts, &settings, &devices).map(|_| ()))?, name));
    }
    for (name, facts) in &models {
        for device in ["cpu", "gpu", "gpu2"] {
            let devices = oracle::devices(device);
            let at = |context| {
                let settings = Settings { context, ..Settings::default() };
                estimate(facts, &settings, &devices).map(|e| e.bytes.total_bytes)
            };
            // Half of what context may cost: neither the first nor the last fits, so the search is a whole one.
            let limit = at(256)?.midpoint(at(facts.context_train)?);
            let settings = Settings::default();
            let find = || {
                let fits = |e: &plimsoll::fit::Estimate| e.bytes.total_bytes <= limit;
                max_context(facts, &settings, &devices, None, fits).map(|_| ())
            };
            search.push((middle(5, find)?, format!("{name} {device}")));
        }
    }
    print("estimate", one)?;
    print("largest context", search)
}

/// The middle of several timings.
fn middle<E: std::error::Error + Send + Sync + 'static>(
    times: usize,
    mut run: impl FnMut() -> Result<(), E>,
) -> Result<Duration> {
    super::median(times, || Ok(run()?))
}

fn print(what: &str, mut all: Vec<(Duration, String)>) -> Result<()> {
    all.sort();
    let (worst, name) = all.last().context("no measurements")?;
    let (median, most) = (all[all.len() / 2].0, all[all.len() * 9 / 10].0);
    println!(
        "{what}, {} cases: median {:.1} µs, nine in ten at most {:.1} µs, worst {:.1} µs ({})",
        all.len(),
        median.as_secs_f64() * 1e6,
        most.as_secs_f64() * 1e6,
        worst.as_secs_f64() * 1e6,
        name.trim_end()
    );
    Ok(())
}

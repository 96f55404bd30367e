//! Estimates beside what the real engine allocated, cell by cell, and the report that is made of them: for
//! `tests/oracle.rs` and for `cargo xtask oracle`.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)] // a test: what is wrong has to stop it

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use plimsoll::fit::{self, Device, DeviceKind, Devices, Estimate, Facts};
use plimsoll::gguf::Model;

use super::fixture::{self, Cell, Measured};

/// What compute may be off before it counts as such.
pub const MIB: i64 = 1 << 20;

struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The facts of every model described in a directory, through real (sparse) files.
pub fn models(directory: &Path, test: &str) -> BTreeMap<String, Facts> {
    let to = Temporary(std::env::temp_dir().join(format!("plimsoll-oracle-{test}-{}", std::process::id())));
    std::fs::create_dir_all(&to.0).unwrap();
    let mut models = BTreeMap::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let description = entry.unwrap().path();
        if description.extension().is_none_or(|e| e != "txt") {
            continue;
        }
        let model = Model::open(&fixture::inflate(&description, &to.0)).unwrap();
        let name = description.file_stem().unwrap().to_str().unwrap().to_owned();
        models.insert(name, Facts::from_model(&model).unwrap());
    }
    models
}

/// The oracle's devices: ggml's RPC backend, one or two, with equal free memory.
pub fn devices(name: &str) -> Devices {
    let count = match name {
        "gpu" => 1,
        "gpu2" => 2,
        _ => 0,
    };
    let device = |i| Device::new(&format!("RPC{i}"), DeviceKind::Discrete, 1 << 40, 1 << 40);
    Devices { list: (0..count).map(device).collect() }
}

/// What is estimated for a cell.
///
/// # Errors
/// The settings are refused, in a sentence.
pub fn estimate(models: &BTreeMap<String, Facts>, cell: &Cell) -> Result<Estimate, String> {
    let parsed = fit::args::parse(&cell.args, &BTreeMap::new()).map_err(|e| e.to_string())?;
    fit::estimate(&models[&cell.model], &parsed.settings, &devices(&cell.device)).map_err(|e| e.to_string())
}

fn difference(ours: u64, theirs: u64) -> i64 {
    i64::try_from(ours).unwrap() - i64::try_from(theirs).unwrap()
}

/// Every figure that has to be the same to the byte, by name.
pub fn exact_differences(ours: &Estimate, theirs: &Measured) -> Vec<(&'static str, i64)> {
    let pairs = [
        ("context", ours.context, theirs.context),
        ("slots", u64::from(ours.slots), theirs.slots),
        ("unified", u64::from(ours.kv_unified), u64::from(theirs.unified)),
        ("weights", ours.bytes.weights_bytes, theirs.weights),
        ("weights on devices", ours.split.gpu.weights_bytes, theirs.sum("gpu", |b| b.weights)),
        ("repacked", ours.repacked_bytes, theirs.sum("CPU_REPACK", |b| b.weights)),
        ("kv", ours.bytes.kv_bytes, theirs.kv),
        ("state", ours.bytes.state_bytes, theirs.state),
        (
            "cache and state on devices",
            ours.split.gpu.kv_bytes + ours.split.gpu.state_bytes,
            theirs.sum("gpu", |b| b.cache),
        ),
        ("output", ours.bytes.output_bytes, theirs.output),
    ];
    pairs.iter().map(|(name, o, t)| (*name, difference(*o, *t))).filter(|(_, d)| *d != 0).collect()
}

/// One cell: by how many bytes the estimate is off, negative where it is too low.
pub struct Row<'a> {
    pub cell: &'a Cell,
    /// Everything that the engine allocated.
    pub total: i64,
    pub compute: i64,
    pub weights: i64,
    /// Cache.
    pub kv: i64,
    pub state: i64,
    pub output: i64,
    /// Whether each part is on the right side, to the byte.
    pub split: bool,
}

/// A row for every cell that the engine took and that has an estimate.
pub fn rows<'a>(models: &BTreeMap<String, Facts>, cells: &'a [Cell]) -> Vec<Row<'a>> {
    let row = |cell: &'a Cell| {
        let theirs = cell.measured.as_ref()?;
        let ours = estimate(models, cell).ok()?;
        let off = |part: fn(&fit::Parts) -> u64, measured| difference(part(&ours.bytes), measured);
        let weights = off(|b| b.weights_bytes, theirs.weights);
        let kv = off(|b| b.kv_bytes, theirs.kv);
        let state = off(|b| b.state_bytes, theirs.state);
        let compute = off(|b| b.compute_bytes, theirs.compute);
        let output = off(|b| b.output_bytes, theirs.output);
        let gpu = &ours.split.gpu;
        let split = gpu.weights_bytes == theirs.sum("gpu", |b| b.weights)
            && gpu.kv_bytes + gpu.state_bytes == theirs.sum("gpu", |b| b.cache)
            && gpu.compute_bytes == theirs.sum("gpu", |b| b.compute)
            && ours.repacked_bytes == theirs.sum("CPU_REPACK", |b| b.weights);
        let total = weights + kv + state + compute + output;
        Some(Row { cell, total, compute, weights, kv, state, output, split })
    };
    cells.iter().filter_map(row).collect()
}

/// One line for each architecture and one for all, then every cell that is under; with `every`, every cell that
/// is not exact.
pub fn print(models: &BTreeMap<String, Facts>, rows: &[Row], every: bool) {
    println!(
        "{:16} {:>5} | exact: {:>5} {:>5} {:>5} {:>6} {:>7} {:>5} {:>5} | total off in MiB: {:>8} {:>8} {:>8} {:>8}",
        "",
        "cells",
        "wght",
        "kv",
        "state",
        "output",
        "compute",
        "split",
        "all",
        "median",
        "p95",
        "over",
        "under"
    );
    let mut groups: BTreeMap<&str, Vec<&Row>> = BTreeMap::new();
    for row in rows {
        groups.entry(&models[&row.cell.model].architecture).or_default().push(row);
    }
    for (name, group) in &groups {
        print_group(name, group);
    }
    print_group("all", &rows.iter().collect::<Vec<_>>());
    let worth = |row: &&Row| row.total < 0 || every && (row.total != 0 || !row.split);
    for row in rows.iter().filter(worth) {
        let Cell { model, device, args, .. } = row.cell;
        println!("{:+} bytes (compute {:+}): {model} {device} {}", row.total, row.compute, args.join(" "));
    }
    println!("{} of {} cells are under", rows.iter().filter(|r| r.total < 0).count(), rows.len());
}

fn print_group(name: &str, group: &[&Row]) {
    let count = |holds: fn(&Row) -> bool| group.iter().filter(|row| holds(row)).count();
    let mut off: Vec<i64> = group.iter().map(|row| row.total.abs()).collect();
    off.sort_unstable();
    let quantile = |percent: usize| off.get((off.len() * percent).div_ceil(100).saturating_sub(1)).copied();
    let mib = |bytes: Option<i64>| bytes.unwrap_or(0) as f64 / MIB as f64;
    println!(
        "{name:16} {:5} |        {:5} {:5} {:5} {:6} {:7} {:5} {:5} |                   {:8.3} {:8.3} {:8.3} {:8.3}",
        group.len(),
        count(|r| r.weights == 0),
        count(|r| r.kv == 0),
        count(|r| r.state == 0),
        count(|r| r.output == 0),
        count(|r| r.compute == 0),
        count(|r| r.split),
        count(|r| r.total == 0 && r.compute == 0 && r.split),
        mib(quantile(50)),
        mib(quantile(95)),
        mib(group.iter().map(|r| r.total).max().map(|most| most.max(0))),
        mib(group.iter().map(|r| r.total).min().map(|least| least.min(0))),
    );
}

//! The estimate against what the real engine allocated: `tests/fixtures/oracle/README.md` tells the source.
//!
//! `cargo test --test oracle -- --nocapture` prints the report. `PLIMSOLL_ORACLE=DIR` takes another directory
//! with descriptions and a `cells.tsv`.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)] // a test: what is wrong has to stop it

#[path = "oracle/fixture.rs"]
mod fixture;

use std::collections::BTreeMap;
use std::path::PathBuf;

use fixture::{Cell, Measured};
use plimsoll::fit::{self, Device, DeviceKind, Devices, Estimate, Facts};
use plimsoll::gguf::Model;

const MIB: i64 = 1 << 20;

fn directory() -> PathBuf {
    std::env::var_os("PLIMSOLL_ORACLE").map_or_else(fixture::directory, PathBuf::from)
}

struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The facts of every model, through real (sparse) files.
fn models(test: &str) -> BTreeMap<String, Facts> {
    let to = Temporary(std::env::temp_dir().join(format!("plimsoll-oracle-{test}-{}", std::process::id())));
    std::fs::create_dir_all(&to.0).unwrap();
    let mut models = BTreeMap::new();
    for entry in std::fs::read_dir(directory()).unwrap() {
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
fn devices(name: &str) -> Devices {
    let count = match name {
        "gpu" => 1,
        "gpu2" => 2,
        _ => 0,
    };
    let device = |i| Device::new(&format!("RPC{i}"), DeviceKind::Discrete, 1 << 40, 1 << 40);
    Devices { list: (0..count).map(device).collect() }
}

fn estimate(models: &BTreeMap<String, Facts>, cell: &Cell) -> Result<Estimate, String> {
    let parsed = fit::args::parse(&cell.args, &BTreeMap::new()).map_err(|e| e.to_string())?;
    fit::estimate(&models[&cell.model], &parsed.settings, &devices(&cell.device)).map_err(|e| e.to_string())
}

fn difference(ours: u64, theirs: u64) -> i64 {
    i64::try_from(ours).unwrap() - i64::try_from(theirs).unwrap()
}

/// Every figure that has to be the same to the byte, by name.
fn exact_differences(ours: &Estimate, theirs: &Measured) -> Vec<(&'static str, i64)> {
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

#[test]
fn weights_cache_state_and_output_are_exact() {
    let models = models("exact");
    let mut wrong = Vec::new();
    for cell in fixture::cells(&directory().join("cells.tsv")) {
        let Some(theirs) = &cell.measured else { continue };
        match estimate(&models, &cell) {
            Ok(ours) => {
                for (name, difference) in exact_differences(&ours, theirs) {
                    wrong.push(format!(
                        "{name} {difference:+}: {} {} {:?}",
                        cell.model, cell.device, cell.args
                    ));
                }
            }
            Err(error) => wrong.push(format!("refused ({error}): {} {:?}", cell.model, cell.args)),
        }
    }
    wrong.iter().take(60).for_each(|w| println!("{w}"));
    assert_eq!(wrong.len(), 0);
}

#[test]
fn what_the_engine_refuses_is_refused() {
    let models = models("refused");
    for cell in fixture::cells(&directory().join("cells.tsv")) {
        if cell.measured.is_none() {
            assert!(estimate(&models, &cell).is_err(), "{cell:?}");
        }
    }
}

/// The cells of one model: how far the compute buffers are off.
#[derive(Default)]
struct Distribution {
    cells: usize,
    exact: usize,
    within: usize,
    under: usize,
    worst_under: i64,
    worst_over: i64,
}

#[test]
fn compute_is_within_a_mebibyte() {
    let models = models("compute");
    let mut all: BTreeMap<String, Distribution> = BTreeMap::new();
    for cell in fixture::cells(&directory().join("cells.tsv")) {
        let Some(theirs) = &cell.measured else { continue };
        let Ok(ours) = estimate(&models, &cell) else { continue };
        let devices = difference(ours.split.gpu.compute_bytes, theirs.sum("gpu", |b| b.compute));
        let total = difference(ours.bytes.compute_bytes, theirs.compute);
        for key in [cell.model.clone(), "all".to_owned()] {
            let d = all.entry(key).or_default();
            d.cells += 1;
            d.exact += usize::from(total == 0 && devices == 0);
            d.within += usize::from(total.abs() <= MIB);
            d.under += usize::from(total < -MIB);
            d.worst_under = d.worst_under.min(total);
            d.worst_over = d.worst_over.max(total);
        }
        if (total.abs() > MIB || (total != 0 && std::env::var_os("BYTES").is_some()))
            && std::env::var_os("PLIMSOLL_ORACLE_CELLS").is_some()
        {
            println!(
                "{:8.2} MiB ({:.2} on devices): {} {} {}",
                total as f64 / MIB as f64,
                devices as f64 / MIB as f64,
                cell.model,
                cell.device,
                cell.args.join(" ")
            );
            let ours: Vec<u64> = ours.devices.iter().map(|d| d.compute_bytes).collect();
            println!(
                "         ours {ours:?}, theirs {:?}",
                theirs.buffers.iter().map(|b| b.compute).collect::<Vec<_>>()
            );
        }
    }
    println!("{:32} cells exact  1MiB under      worst under / over in MiB", "");
    for (model, d) in &all {
        println!(
            "{model:32} {:5} {:5} {:5} {:5} {:10.2} {:10.2}",
            d.cells,
            d.exact,
            d.within,
            d.under,
            d.worst_under as f64 / MIB as f64,
            d.worst_over as f64 / MIB as f64
        );
    }
    let d = &all["all"];
    assert_eq!(d.under, 0);
    assert!(d.within * 100 >= d.cells * 95);
}

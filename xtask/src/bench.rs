//! `cargo xtask bench`: figures for what the project promises to be fast or small. No pass or fail.

mod bus;
mod fit;
mod idle;
mod oversized;
mod peers;
mod pressure;
mod ssh;
mod swapfiles;

use crate::lab::{Config, Lab};
use crate::models::{self, deepseek};
use crate::vm::{Guest, ImageOptions, Machine, MachineOptions, image::Image};
use crate::{deb, host, install};
use anyhow::{Context, Result, ensure};
use plimsoll::action::page_cache::drop_file;
use plimsoll::bytes::Bytes;
use plimsoll::config::Instance;
use plimsoll::ledger::{
    Basis, FileId, Footprint, Machine as Reading, Mapped, Measured, Memory, Phase, Reservation,
};
use plimsoll::policy::plan::Situation;
use plimsoll::policy::{Planned, Request, Rules, Rung, plan};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub struct BenchOptions {
    /// Leave out what needs the virtual machine
    #[arg(long)]
    pub no_vm: bool,
    /// Only the parts with this in their name; may be repeated. Here: header, estimates, planner, plans. In
    /// the virtual machine: daemon, idle, swapfiles, oversized, pressure
    #[arg(long, value_name = "PATTERN")]
    pub only: Vec<String>,
    /// Take plimsoll and plimsolld from this directory instead of building a release of them
    #[arg(long, value_name = "DIR")]
    pub programs: Option<PathBuf>,
    /// Of pressure
    #[command(flatten)]
    pub pressure: pressure::Options,
    /// How to boot
    #[command(flatten)]
    pub machine: MachineOptions,
    /// What to boot
    #[command(flatten)]
    pub image: ImageOptions,
}

/// The parts, in their order.
const PARTS: [&str; 9] =
    ["header", "estimates", "planner", "plans", "daemon", "idle", "swapfiles", "oversized", "pressure"];
/// So many of them need no virtual machine.
const HERE: usize = 4;

/// Runs all that are wanted; an unoptimised build starts an optimised one of itself.
pub fn bench(options: &BenchOptions) -> Result<()> {
    let any = |name: &str| {
        options.only.is_empty() || options.only.iter().any(|pattern| name.contains(pattern.as_str()))
    };
    ensure!(PARTS.into_iter().any(any), "no part has that in its name: there are {}", PARTS.join(", "));
    let wanted = |name: &str| any(name) && !(options.no_vm && PARTS[HERE..].contains(&name));
    // Whatever runs in the virtual machine is not this program.
    let here = PARTS[..HERE].iter().any(|name| wanted(name));
    if cfg!(debug_assertions) && here {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command.current_dir(host::source_root()).args([
            "run",
            "--quiet",
            "--release",
            "--package",
            "xtask",
            "--",
        ]);
        return host::run(command.args(std::env::args_os().skip(1)));
    }
    let programs = install::programs(options.programs.as_deref(), "release")?;
    let mut header = None;
    if wanted("header") || wanted("daemon") {
        header = Some(large_header(&programs)?);
    }
    if wanted("estimates") {
        fit::estimates()?;
    }
    if wanted("planner") {
        planner(1000)?;
    }
    if wanted("plans") {
        bus::plans(&programs)?;
    }
    if let Some(header) = header.filter(|_| wanted("daemon")) {
        in_the_machine(options, &programs, &header)?;
    }
    if wanted("idle") {
        idle::bench(options, &programs)?;
    }
    if wanted("swapfiles") {
        swapfiles::bench(options, &programs)?;
    }
    if wanted("oversized") {
        oversized::bench(options, &programs)?;
    }
    if wanted("pressure") {
        let lab = boot(options, &programs, &options.machine, &models::ensure_disk()?)?;
        pressure::bench(&lab, &options.pressure)?;
    }
    Ok(())
}

/// A guest of these options with the package in it, and a disk of models.
fn boot(options: &BenchOptions, programs: &Path, machine: &MachineOptions, disk: &Path) -> Result<Lab> {
    let package = deb::pack(programs, "")?;
    let image = Image::ensure(&options.image)?;
    Lab::new(Guest::connect(Machine::start(&image, disk, machine)?)?, package, "release")
}

/// The middle of several timings.
fn median(times: usize, mut run: impl FnMut() -> Result<()>) -> Result<Duration> {
    let mut all = Vec::with_capacity(times);
    for _ in 0..times {
        let started = Instant::now();
        run()?;
        all.push(started.elapsed());
    }
    all.sort();
    Ok(all[times / 2])
}

/// The smallest of them that at least so many per cent are not above.
fn quantile<T: Copy + Ord>(of: &[T], percent: usize) -> Option<T> {
    let mut sorted = of.to_vec();
    sorted.sort_unstable();
    sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1))).copied()
}

fn large_header(programs: &Path) -> Result<PathBuf> {
    let directory = host::source_root().join("target/bench");
    std::fs::create_dir_all(&directory)?;
    let first = deepseek::write(&directory)?;
    let shards: Vec<PathBuf> =
        std::fs::read_dir(&directory)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    let bytes: u64 = shards.iter().filter_map(|shard| shard.metadata().ok()).map(|meta| meta.len()).sum();
    let program = programs.join("plimsoll");
    let run = || {
        let mut command = Command::new(&program);
        command.arg("fit").arg(&first).args(["-c", "16384", "--ram", "128GiB", "--gpu", "none", "--json"]);
        // A verdict other than "fits" may show in the exit code: the time is what counts.
        let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status()?;
        ensure!(status.code().is_some_and(|code| code != 1 && code != 2), "plimsoll fit: {status}");
        Ok(())
    };
    let warm = median(21, run)?;
    let mut cold = Vec::new();
    for _ in 0..21 {
        for shard in &shards {
            let dropped = drop_file(&std::fs::File::open(shard)?)?;
            ensure!(
                dropped.after.is_zero(),
                "{} of {} stays in the page cache",
                dropped.after,
                shard.display()
            );
        }
        let started = Instant::now();
        run()?;
        cold.push(started.elapsed());
    }
    let cold = quantile(&cold, 50).context("no timings")?;
    println!(
        "plimsoll fit, four shards of together {} GB: {:.1} ms; their headers read from disk: {:.1} ms",
        bytes / 1_000_000_000,
        millis(warm),
        millis(cold)
    );
    peers::python(&first, millis(warm))?;
    Ok(first)
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// A plan on a machine where `count` models run, all of lower priority than what comes.
fn planner(count: u64) -> Result<()> {
    let footprint = |n: u64, weights: u64| Footprint {
        private: Bytes::mib(512 + n % 7 * 100),
        mapped: vec![Mapped { file: FileId { device: 1, inode: n }, bytes: Bytes::mib(weights) }],
        ..Footprint::default()
    };
    let mut holders: BTreeMap<Instance, Reservation> = BTreeMap::new();
    for n in 0..count {
        let reservation = Reservation {
            phase: Phase::Running,
            priority: u8::try_from(n % 60)?,
            pinned: n % 50 == 0,
            context: 4096,
            predicted: footprint(n, 1024 + n % 13 * 300),
            basis: Basis::default(),
            measured: Measured::default(),
            invocation: format!("{n:032x}"),
            last_used: n,
            ttl: None,
            reload: Bytes::gib(1),
            drain: 0,
            may_swap: false,
            streams: false,
            read_ahead: Bytes::ZERO,
            ready: 0,
        };
        holders.insert(format!("model-{n}").parse().ok().context("a bad name")?, reservation);
    }
    let held: Bytes = holders.values().map(|r| r.held().total()).sum();
    let memory = Memory { total: held + Bytes::gib(8), available: held + Bytes::gib(4), ..Memory::default() };
    let machine = Reading { memory, ..Reading::default() };
    let request = Request {
        priority: 90,
        ladder: vec![Rung {
            context: 65536,
            footprint: footprint(count, held.0 / 3 / (1 << 20)),
            ..Rung::default()
        }],
        reload: Bytes::gib(1),
        explicit: true,
        ..Request::of("newcomer".parse().ok().context("a bad name")?)
    };
    let rules = Rules::default();
    let situation = Situation { holders: &holders, machine: &machine, rules: &rules, now: 1_000_000 };
    let mut outcome = String::new();
    let took = median(101, || {
        outcome = match plan(&request, situation) {
            Planned::Admit(plan) => format!("{} steps", plan.steps.len()),
            other => format!("{other:?}").chars().take(80).collect(),
        };
        Ok(())
    })?;
    println!("planner with {count} models ({outcome}): {:.2} ms", millis(took));
    Ok(())
}

fn in_the_machine(options: &BenchOptions, programs: &Path, header: &Path) -> Result<()> {
    let lab = boot(options, programs, &options.machine, &models::ensure_disk()?)?;
    lab.configure(&[Config::new("small", 8001)])?;
    lab.serve("small", 8001)?;
    bus::admissions(&lab)?;
    peers::in_the_guest(&lab, header)
}

//! `cargo xtask test`: everything that has to hold, in one report.

use crate::lab::Lab;
use crate::models;
use crate::scenarios::{self, Scenario};
use crate::vm::{Guest, ImageOptions, Machine, MachineOptions, image::Image};
use crate::{deb, host};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// What to test.
#[derive(Debug, Clone, clap::Args)]
pub struct TestOptions {
    /// Only what needs no virtual machine
    #[arg(long)]
    pub no_vm: bool,
    /// Only what has this in its name (`fmt`, `clippy`, `unit`, or a scenario); may be repeated
    #[arg(long, value_name = "PATTERN")]
    pub only: Vec<String>,
    /// Keep the virtual machine until Enter is pressed, and say how to log in
    #[arg(long)]
    pub keep: bool,
    /// Build profile of what is installed in the virtual machine
    #[arg(long, default_value = "release")]
    pub profile: String,
    /// How to boot
    #[command(flatten)]
    pub machine: MachineOptions,
    /// What to boot
    #[command(flatten)]
    pub image: ImageOptions,
}

/// Passed and failed, counted and named.
#[derive(Debug, Default)]
struct Report {
    passed: usize,
    failed: Vec<String>,
}

impl Report {
    /// Runs one check and prints its name, time and result.
    fn check(&mut self, name: &str, run: impl FnOnce() -> Result<()>) {
        let started = Instant::now();
        let result = run();
        let seconds = started.elapsed().as_secs_f32();
        match result {
            Ok(()) => {
                self.passed += 1;
                println!("{seconds:7.1} s  ok      {name}");
            }
            Err(error) => {
                self.failed.push(name.to_owned());
                println!("{seconds:7.1} s  FAILED  {name}\n{error:#}\n");
            }
        }
    }
}

/// Runs the tests; returns the exit code.
pub fn test(options: &TestOptions) -> Result<u8> {
    let mut report = Report::default();
    let wanted =
        |name: &str| options.only.is_empty() || options.only.iter().any(|pattern| name.contains(pattern));
    let named = scenarios::NAMED.iter().filter(|_| !options.only.is_empty());
    let scenarios: Vec<&Scenario> =
        scenarios::ALL.iter().chain(named).filter(|scenario| wanted(scenario.name)).collect();
    let mut disks = None;
    let mut package = None;
    if !options.no_vm && !scenarios.is_empty() {
        // Linking the release takes one processor for minutes: meanwhile the rest goes on.
        let profile = options.profile.clone();
        package = Some(std::thread::spawn(move || deb::build(&profile, "")));
        // First what may ask for sudo or miss the network.
        report.check("image and models", || {
            disks = Some((Image::ensure(&options.image)?, models::ensure_disk()?));
            Ok(())
        });
    }
    for (name, arguments) in [
        ("fmt", &["fmt", "--all", "--check"][..]),
        ("clippy", &["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]),
    ] {
        if wanted(name) {
            report.check(name, || cargo(arguments).map(|_| ()));
        }
    }
    if wanted("unit") {
        unit_tests(&mut report);
    }
    if let (Some((image, disk)), Some(package)) = (disks, package) {
        let built = || package.join().unwrap_or_else(|_| bail!("building the package panicked"));
        in_the_machine(options, built, (&image, &disk), &scenarios, &mut report);
    }
    for name in &report.failed {
        println!("failed: {name}");
    }
    println!("{} passed, {} failed", report.passed, report.failed.len());
    Ok(u8::from(!report.failed.is_empty()))
}

/// Boots once and runs the scenarios one after the other, each from a clean state.
fn in_the_machine(
    options: &TestOptions,
    package: impl FnOnce() -> Result<PathBuf>,
    (image, disk): (&Image, &Path),
    scenarios: &[&Scenario],
    report: &mut Report,
) {
    let mut lab = None;
    report.check("package and virtual machine", || {
        let package = package()?;
        let guest = Guest::connect(Machine::start(image, disk, &options.machine)?)?;
        lab = Some(Lab::new(guest, package, &options.profile)?);
        Ok(())
    });
    let Some(mut lab) = lab else {
        report.failed.extend(scenarios.iter().map(|scenario| format!("{} (no machine)", scenario.name)));
        return;
    };
    for scenario in scenarios {
        report.check(scenario.name, || {
            lab.clean().context("cleaning up before it")?;
            (scenario.run)(&mut lab)
        });
    }
    if options.keep {
        lab.guest.offer_login();
    }
}

fn cargo(arguments: &[&str]) -> Result<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    host::output(Command::new(cargo).current_dir(host::source_root()).args(arguments))
}

/// `cargo test`, each test counted.
fn unit_tests(report: &mut Report) {
    let mut passed = 0;
    report.check("unit and integration tests", || {
        let said = cargo(&["test", "--workspace", "--no-fail-fast", "--quiet"])?;
        let results = said.lines().filter_map(|line| line.strip_prefix("test result: ok. "));
        passed = results.filter_map(|line| line.split(' ').next()?.parse::<usize>().ok()).sum();
        Ok(())
    });
    // The check itself was counted; what it ran counts instead.
    report.passed = (report.passed + passed).saturating_sub(usize::from(passed > 0));
}

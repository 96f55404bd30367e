//! Plimsoll's development tool: `cargo xtask help`.

mod bench;
mod deb;
mod demo;
mod host;
mod install;
mod lab;
mod man;
mod models;
mod oracle;
mod scenarios;
mod test;
mod vm;

use anyhow::Result;
use clap::{Parser, Subcommand};
use vm::{Guest, ImageOptions, Machine, MachineOptions, image::Image};

/// Plimsoll's development tool
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Check everything: formatting, lints, tests, and the scenarios in the virtual machine
    Test(test::TestOptions),
    /// Measure what the project promises to be fast or small
    Bench(bench::BenchOptions),
    /// Compare the estimates with what the real engine allocated: the committed measurements
    Oracle(oracle::OracleOptions),
    /// See it work: models are admitted, made room for and refused, in a virtual machine
    Demo(demo::DemoOptions),
    /// Build and install on this machine, or below --destdir
    Install(install::InstallOptions),
    /// Build the Debian package
    Deb {
        /// Build profile
        #[arg(long, default_value = "release")]
        profile: String,
        /// Added to the version
        #[arg(long, default_value = "")]
        suffix: String,
    },
    /// Write manual pages and shell completions to target/generated
    Man,
    /// Boot the virtual machine by hand
    Vm {
        #[command(subcommand)]
        action: VmAction,
        #[command(flatten)]
        image: ImageOptions,
    },
}

#[derive(Subcommand)]
enum VmAction {
    /// Build the image and the models, boot nothing
    Build,
    /// Boot and say how to log in; Enter ends the machine
    Shell {
        #[command(flatten)]
        machine: MachineOptions,
    },
    /// Boot, run one shell command as root in the guest, and exit with its code
    Run {
        /// The command
        script: String,
        #[command(flatten)]
        machine: MachineOptions,
    },
    /// Boot, start the distribution's llama-server on a generated model, and ask it for a completion
    Prove {
        /// Name of the model file in the guest's /srv/models, without .gguf
        #[arg(default_value = "small")]
        model: String,
        #[command(flatten)]
        machine: MachineOptions,
    },
}

fn boot(image: &ImageOptions, machine: &MachineOptions) -> Result<Guest> {
    let image = Image::ensure(image)?;
    let disk = models::ensure_disk()?;
    Guest::connect(Machine::start(&image, &disk, machine)?)
}

fn main() -> std::process::ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code.into(),
        Err(error) => {
            eprintln!("xtask: {error:#}");
            1.into()
        }
    }
}

fn run(task: Task) -> Result<u8> {
    match task {
        Task::Test(options) => test::test(&options),
        Task::Bench(options) => bench::bench(&options).map(|()| 0),
        Task::Oracle(options) => oracle::oracle(&options),
        Task::Demo(options) => demo::demo(&options).map(|()| 0),
        Task::Install(options) => install::install(&options).map(|()| 0),
        Task::Deb { profile, suffix } => {
            println!("{}", deb::build(&profile, &suffix)?.display());
            Ok(0)
        }
        Task::Man => {
            println!("{}", man::generate()?.display());
            Ok(0)
        }
        Task::Vm { action: VmAction::Build, image } => {
            println!("image: {}", Image::ensure(&image)?.directory.display());
            println!("models: {}", models::ensure_disk()?.display());
            Ok(0)
        }
        Task::Vm { action: VmAction::Shell { machine }, image } => {
            boot(&image, &machine)?.offer_login();
            Ok(0)
        }
        Task::Vm { action: VmAction::Run { script, machine }, image } => {
            let guest = boot(&image, &machine)?;
            let done = guest.run_within(&script, std::time::Duration::from_secs(600))?;
            print!("{}", done.stdout);
            eprint!("{}", done.stderr);
            Ok(u8::try_from(done.code).unwrap_or(1))
        }
        Task::Vm { action: VmAction::Prove { model, machine }, image } => {
            vm::prove(&boot(&image, &machine)?, &model)
        }
    }
}

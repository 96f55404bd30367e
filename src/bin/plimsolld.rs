//! The root daemon: see `plimsolld --help`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use plimsoll::cli::LocalQuotes;
use plimsoll::dbus::{server, simulated};

/// Decides which large language models may hold memory. Normally started by systemd.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Serve the simulated machine of a scenario file on a private bus; needs no root. Prints
    /// PLIMSOLL_BUS_ADDRESS=..., which `plimsoll` then takes from its environment
    #[arg(long, value_name = "FILE")]
    simulate: Option<PathBuf>,
    /// Carry out an order about a swapfile, as plimsoll-swap@.service does, and end
    #[arg(long, value_name = "ORDER", hide = true, conflicts_with_all = ["simulate", "bus"])]
    swap: Option<String>,
    /// Serve on the bus at this address
    #[arg(long, value_name = "ADDRESS")]
    bus: Option<String>,
    /// Read the configuration, /proc and /sys below this directory
    #[arg(long, value_name = "DIRECTORY", default_value = "/")]
    root: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let bus = arguments.bus.as_deref();
    if let Some(scenario) = arguments.simulate {
        return server::run(simulated::simulate(&scenario, bus));
    }
    if let Some(order) = arguments.swap {
        return server::swap(&arguments.root, &order);
    }
    let quotes = Arc::new(LocalQuotes { root: arguments.root.clone() });
    server::run(server::serve(&arguments.root, bus, quotes))
}

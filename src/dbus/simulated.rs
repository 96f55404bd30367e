//! The daemon on a simulated machine, on a private bus.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use nix::sys::signal::Signal;
use tokio::sync::mpsc;
use zbus::fdo::ObjectManager;

use super::authorize::Authority;
use super::service::{Manager, publish};
use super::{BUS_ADDRESS_VARIABLE, NAME, PATH};
use crate::action::notify::Notifier;
use crate::daemon::{Daemon, Input, Parts, signals};
use crate::os::end_with_parent;
use crate::policy::{Core, Saved};
use crate::sim::{Scenario, SimCatalog, SimPorts};

/// A message bus of our own; ends with the value.
pub(super) struct Bus {
    child: Child,
    pub(super) address: String,
}

impl Bus {
    pub(super) fn start() -> Result<Self, String> {
        let mut command = Command::new("dbus-daemon");
        command.args(["--session", "--nofork", "--nopidfile", "--print-address=1"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        end_with_parent(&mut command, Signal::SIGTERM);
        let mut child = command.spawn().map_err(|error| {
            format!("the private bus can't be started, since dbus-daemon can't be run ({error}): install the package dbus")
        })?;
        let mut address = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut address).map_err(|error| error.to_string())?;
        }
        let bus = Self { child, address: address.trim().to_owned() };
        if bus.address.is_empty() {
            return Err("the private bus did not start: dbus-daemon ended".to_owned());
        }
        Ok(bus)
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Serves the machine of a scenario file until SIGTERM or SIGINT. `bus`: where to serve instead of
/// on a bus of our own, whose address is printed.
///
/// # Errors
/// One sentence.
pub async fn simulate(scenario: &Path, bus: Option<&str>) -> Result<(), String> {
    let scenario = Scenario::read(scenario).map_err(|error| error.to_string())?;
    let (own, address) = match bus {
        Some(address) => (None, address.to_owned()),
        None => {
            let bus = Bus::start()?;
            let address = bus.address.clone();
            (Some(bus), address)
        }
    };
    let (sender, inputs) = mpsc::unbounded_channel();
    signals::watch(&sender, true)?;
    let core = Core::new(scenario.rules(), Saved::default(), true);
    let to_loop = sender.clone();
    let parts = Parts {
        // The loop may have ended before the machine.
        ports: Box::new(SimPorts::new(scenario.clone(), move |event| {
            drop(to_loop.send(Input::Event(event)))
        })),
        catalog: Arc::new(SimCatalog::new(scenario)),
        core,
        mode: None,
        store: None,
        survey: None,
        reloaded: None,
        notifier: Notifier::from_environment(),
        leases: Vec::new(),
    };
    let (daemon, handle, published) = Daemon::new(parts, sender);
    let owner = nix::unistd::geteuid().as_raw();
    let manager = Manager::new(handle, Authority::Owner(owner), None, None, daemon.mode());
    let failed = |error: zbus::Error| format!("the private bus does not work: {error}");
    let connection = zbus::connection::Builder::address(address.as_str())
        .serve_at(PATH, manager)
        .serve_at(PATH, ObjectManager)
        .name(NAME)
        .build()
        .await
        .map_err(failed)?;
    tokio::spawn(publish(connection.clone(), published));
    if own.is_some() {
        println!("{BUS_ADDRESS_VARIABLE}={address}");
    }
    daemon.run(inputs).await
}

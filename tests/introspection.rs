//! Holds `systemd/org.plimsoll1.xml` to what the daemon serves.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A daemon on a simulated machine and a bus of its own.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0.id().try_into().unwrap());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

/// The members of an interface, in the order of their names: methods and signals with their arguments,
/// properties with their access. Names of results are documentation only.
fn members(xml: &str, interface: &str) -> Vec<String> {
    let begin = format!("<interface name=\"{interface}\">");
    let lines = xml.lines().map(str::trim).skip_while(|line| **line != begin).skip(1);
    let mut members: Vec<String> = Vec::new();
    for line in lines.take_while(|line| *line != "</interface>") {
        let value = |name: &str| {
            let value = line.split_once(&format!(" {name}=\"")).and_then(|(_, rest)| rest.split_once('"'));
            value.map_or("", |(value, _)| value).to_owned()
        };
        let element = line.split([' ', '>', '/']).next().unwrap_or_default();
        match element {
            "<method" | "<signal" => members.push(format!("{element} {}", value("name"))),
            "<property" => {
                members.push(format!("{element} {} {} {}", value("name"), value("type"), value("access")))
            }
            "<arg" => {
                let name = if value("direction") == "out" { String::new() } else { value("name") };
                let arg = format!(" ({} {name} {})", value("direction"), value("type"));
                members.last_mut().unwrap().push_str(&arg);
            }
            _ => {}
        }
    }
    members.sort();
    members
}

#[tokio::test(flavor = "current_thread")]
async fn the_interface_shipped_is_the_one_served() {
    if Command::new("dbus-daemon").arg("--version").output().is_err() {
        eprintln!("skipped: dbus-daemon is not installed");
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let child = Command::new(env!("CARGO_BIN_EXE_plimsolld"))
        .arg("--simulate")
        .arg(root.join("config/simulate/small-server.toml"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut daemon = Daemon(child);
    let mut address = String::new();
    BufReader::new(daemon.0.stdout.take().unwrap()).read_line(&mut address).unwrap();
    let address = address.trim().split_once('=').unwrap().1;
    let bus = zbus::connection::Builder::address(address).build().await.unwrap();
    let reply = bus
        .call_method(
            Some("org.plimsoll1"),
            "/org/plimsoll1",
            Some("org.freedesktop.DBus.Introspectable"),
            "Introspect",
            &(),
        )
        .await
        .unwrap();
    let served: String = reply.body().deserialize().unwrap();
    let shipped = std::fs::read_to_string(root.join("systemd/org.plimsoll1.xml")).unwrap();
    let manager = members(&served, "org.plimsoll1.Manager");
    assert!(manager.len() > 10, "{served}");
    assert_eq!(members(&shipped, "org.plimsoll1.Manager"), manager);
}

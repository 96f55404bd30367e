//! What several tests share: the shipped daemon on a simulated machine, and the shipped command on its bus.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

/// A daemon on a machine of its own; ends with the value.
pub struct Simulated {
    daemon: Child,
    /// The address of its bus.
    pub bus: String,
    scenario: PathBuf,
}

impl Simulated {
    /// None, with the reason printed, where there is no dbus-daemon to make a private bus with.
    pub fn start(scenario: &str) -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        if Command::new("dbus-daemon").arg("--version").stdout(Stdio::null()).status().is_err() {
            eprintln!("skipped: dbus-daemon is not installed (package dbus)");
            return None;
        }
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("plimsoll-simulated-{}-{number}.toml", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, scenario).unwrap();
        let mut daemon = Command::new(env!("CARGO_BIN_EXE_plimsolld"))
            .arg("--simulate")
            .arg(&path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(daemon.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let bus = line.trim().strip_prefix("PLIMSOLL_BUS_ADDRESS=").expect("the bus's address").to_owned();
        Some(Self { daemon, bus, scenario: path })
    }

    /// The command, to be run on this machine.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_plimsoll"));
        command.args(arguments).env_clear().env("PLIMSOLL_BUS_ADDRESS", &self.bus).stdin(Stdio::null());
        command
    }

    /// What the command prints when it succeeds.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// What it prints with `--json`.
    pub fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(&[arguments, &["--json"]].concat())).unwrap()
    }

    /// The sentence that it fails with, at this exit code.
    pub fn fails(&self, arguments: &[&str], code: i32) -> String {
        let output = self.command(arguments).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        let line = text.lines().find(|line| line.starts_with("plimsoll: "));
        line.unwrap_or_else(|| panic!("no sentence in {text}")).to_owned()
    }
}

impl Drop for Simulated {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.daemon.id()).unwrap());
        // SIGTERM, so that it ends its bus as well.
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.daemon.wait();
        let _ = std::fs::remove_file(&self.scenario);
    }
}

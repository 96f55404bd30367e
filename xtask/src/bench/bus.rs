//! How long the daemon takes to answer, as a monitor on the bus sees it: from the call to its reply.
//!
//! The time of whatever process calls (its start, its connection to the bus, its end) is not in it.

use crate::host;
use crate::lab::{Config, Lab, PATIENCE};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// What the monitor is asked for: calls of the method, and what the daemon answers.
fn matches(method: &str) -> [String; 2] {
    [
        format!("--match=type='method_call',interface='org.plimsoll1.Manager',member='{method}'"),
        "--match=type='method_return',sender='org.plimsoll1'".to_owned(),
    ]
}

/// The times between calls of a method and their replies, from lines of `busctl --json=short monitor`.
#[derive(Debug, Default)]
struct RoundTrips {
    /// The time of each call, in µs since 1970, by its sender and serial number.
    open: HashMap<(String, u64), u64>,
    /// Microseconds, in the order of the replies.
    done: Vec<u64>,
}

impl RoundTrips {
    fn read(&mut self, line: &str) -> Result<()> {
        let message: Value =
            serde_json::from_str(line).with_context(|| format!("not a message of busctl's: {line}"))?;
        let text = |key: &str| message[key].as_str().unwrap_or_default().to_owned();
        let time = message["timestamp-realtime"].as_u64().context("busctl gives messages no time")?;
        if let Some(serial) = message["reply_cookie"].as_u64() {
            if let Some(called) = self.open.remove(&(text("destination"), serial)) {
                self.done.push(time.saturating_sub(called));
            }
        } else if let Some(serial) = message["cookie"].as_u64() {
            self.open.insert((text("sender"), serial), time);
        }
        Ok(())
    }

    /// The middle and the longest, for people.
    fn summary(mut self) -> Result<String> {
        self.done.sort_unstable();
        let (middle, longest) = (self.done.get(self.done.len() / 2), self.done.last());
        let (middle, longest) = middle.zip(longest).context("the monitor saw no answer of the daemon")?;
        let millis = |micros: u64| Duration::from_micros(micros).as_secs_f64() * 1e3;
        Ok(format!(
            "median {:.1} ms, longest {:.1} ms of {}",
            millis(*middle),
            millis(*longest),
            self.done.len()
        ))
    }
}

/// Real admissions in the guest: units that start, ask at the gate, and are stopped again.
pub fn admissions(lab: &Lab) -> Result<()> {
    // An engine that takes no time and no memory: it listens, and that is all.
    let idler = "command = [\"/usr/bin/systemd-socket-activate\", \"--listen={host}:{port}\", \
                 \"/usr/bin/sleep\", \"infinity\"]\nmemory = \"16MiB\"\nport = 8002\n";
    lab.configure(&[Config::new("small", 8001)])?;
    lab.guest.write("/etc/plimsoll/models.d/idler.toml", idler)?;
    lab.guest.ok("systemctl daemon-reload && systemctl reload plimsolld.service")?;
    for (instance, times, what) in
        [("idler", 15, "of a declared size"), ("small", 5, "estimated from its file")]
    {
        println!("admission over the bus in the guest, a model {what}: {}", admit(lab, instance, times)?);
    }
    Ok(())
}

fn admit(lab: &Lab, instance: &str, times: u32) -> Result<String> {
    let seen = "/run/bench-bus.json";
    let rules: Vec<String> = matches("Admit").iter().map(|rule| format!("\"{rule}\"")).collect();
    lab.guest.ok(&format!(
        "rm -f {seen}; systemd-run --quiet --unit=bench-bus -p StandardOutput=file:{seen} \
         busctl --json=short {} monitor",
        rules.join(" ")
    ))?;
    // What the monitor says of its start is not for a file; that it sees an answer is.
    let ping = "busctl call org.plimsoll1 /org/plimsoll1 org.freedesktop.DBus.Peer Ping";
    lab.guest.wait_until("the bus is monitored", PATIENCE, &format!("{ping} && test -s {seen}"))?;
    let unit = format!("llm@{instance}.service");
    lab.guest.ok_within(
        &format!("systemctl stop {unit}; for n in $(seq {times}); do systemctl start {unit} && systemctl stop {unit} || exit; done"),
        PATIENCE,
    )?;
    // The monitor writes in order: what it sees now comes behind all that was before.
    let size = lab.guest.ok(&format!("stat -c %s {seen}"))?;
    let behind = format!("{ping} && test $(stat -c %s {seen}) -gt {}", size.trim());
    lab.guest.wait_until("the monitor has seen everything", PATIENCE, &behind)?;
    let lines = lab.guest.ok(&format!("systemctl stop bench-bus.service; cat {seen}; rm -f {seen}"))?;
    let mut trips = RoundTrips::default();
    lines.lines().try_for_each(|line| trips.read(line))?;
    ensure!(trips.done.len() == times as usize, "{times} starts, but {} admissions", trips.done.len());
    trips.summary()
}

/// A process that ends with the value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // SIGTERM, so that the simulated daemon takes its bus along; it may have ended already.
        let _ = Command::new("kill").arg(self.0.id().to_string()).status();
        let _ = self.0.wait();
    }
}

fn first_line(stream: Option<impl Read>) -> Result<String> {
    let mut line = String::new();
    BufReader::new(stream.context("no stream")?).read_line(&mut line)?;
    Ok(line.trim_end().to_owned())
}

/// The same decisions on this machine, not emulated: `Plan` of the shipped daemon on a simulated
/// machine. It lacks what only a real unit has, the proof of who asks.
pub fn plans(programs: &Path) -> Result<()> {
    const TIMES: usize = 21;
    let Some(busctl) = host::find("busctl") else {
        println!("plan over the bus on this machine: not measured, busctl is not installed");
        return Ok(());
    };
    let scenario = host::source_root().join("config/simulate/strix-halo.toml");
    let mut command = Command::new(programs.join("plimsolld"));
    let mut daemon = Running(
        command.arg("--simulate").arg(scenario).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?,
    );
    let line = first_line(daemon.0.stdout.take()).context("the simulated daemon did not start")?;
    let bus = line.strip_prefix("PLIMSOLL_BUS_ADDRESS=").context("the simulated daemon names no bus")?;
    let plimsoll = |arguments: &[&str]| {
        host::output(Command::new(programs.join("plimsoll")).env("PLIMSOLL_BUS_ADDRESS", bus).args(arguments))
    };
    let models: Vec<Value> = serde_json::from_str(&plimsoll(&["list", "--json"])?)?;
    let model = models.iter().find_map(|model| model["name"].as_str()).context("no model in the scenario")?;

    let mut command = Command::new(busctl);
    command.arg(format!("--address={bus}")).arg("--json=short").args(matches("Plan")).arg("monitor");
    let mut monitor = Running(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?);
    let said = first_line(monitor.0.stderr.take())?;
    ensure!(said.starts_with("Monitoring"), "busctl does not monitor the bus: {said}");
    let mut seen = BufReader::new(monitor.0.stdout.take().context("no standard output")?).lines();
    let mut trips = RoundTrips::default();
    for planned in 1..=TIMES {
        plimsoll(&["plan", "--json", model])?;
        while trips.done.len() < planned {
            trips.read(&seen.next().context("busctl ended")??)?;
        }
    }
    println!("plan over the bus on this machine, {model} simulated: {}", trips.summary()?);
    Ok(())
}

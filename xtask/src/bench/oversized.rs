//! A mixture of experts half as large again as the guest's memory, in every way to run it: by us, by hand, and
//! by nobody. One table.
//!
//! The machine answers to ssh or does not, as seen from outside of it, for as long as each way takes.

use super::{BenchOptions, boot, quantile, ssh};
use crate::lab::{Config, Lab, PATIENCE};
use crate::models;
use anyhow::{Context, Result};
use serde_json::Value;
use std::path::Path;
use std::time::{Duration, Instant};

/// A way that takes longer is cut off: from the command to the last token.
const LIMIT: Duration = Duration::from_secs(300);
/// What the disks give, together, in bytes a second. The emulated engine answers at about 8 tokens a second when
/// all is in memory, of which each touches 105 MB: this is 8 % of that, as 7 GB/s of an NVMe disk are beside two
/// channels of DDR5.
const DISK_RATE: u64 = 64_000_000;
/// Tokens asked for.
const TOKENS: u32 = 12;
const PORT: u16 = 8002;
const MODEL: &str = "/srv/models/leviathan.gguf";
/// A person's guess at how much swap it takes.
const BY_HAND_MIB: u32 = 2048;
/// What the package adds to units of the system, masked where the machine is to be as it is without.
const PROTECTION: [&str; 4] = ["system.slice", "user.slice", "init.scope", "ssh.service"];

/// One way.
struct Way {
    name: &'static str,
    /// Ours: what `oversize` says, and whether hot ranges may be kept.
    ours: Option<(&'static str, bool)>,
    /// From nothing but the other model to a llama-server that starts: a script.
    start: String,
    /// To nothing again.
    end: String,
}

/// What came of it.
#[derive(Default)]
struct Seen {
    first: Option<Duration>,
    tokens: usize,
    rate: Option<f64>,
    ssh: Vec<Duration>,
    kills: u64,
    read: u64,
    written: u64,
    note: String,
}

/// Runs every way, and prints the table.
pub fn bench(options: &BenchOptions, programs: &Path) -> Result<()> {
    let mut machine = options.machine.clone();
    let rate = *machine.disk_rate.get_or_insert(DISK_RATE);
    let lab = boot(options, programs, &machine, &models::ensure_oversized_disk()?)?;
    println!(
        "a mixture of experts of {:.1} GB in {} MiB of memory, {} MB/s of disk, {TOKENS} tokens, at most {} s each:",
        lab.guest.ok(&format!("stat -c %s {MODEL}"))?.trim().parse::<f64>()? / 1e9,
        machine.memory,
        rate / 1_000_000,
        LIMIT.as_secs()
    );
    println!(
        "{:34}{:>10}{:>10}{:>11}{:>11}{:>10}{:>9}{:>9}",
        "", "first", "tokens/s", "ssh worst", "ssh p99", "OOM kills", "read", "written"
    );
    let ((), greetings) = ssh::asked(&lab, || lab.guest.ok("timeout 20 tail -f /dev/null; true").map(drop))?;
    print("nothing runs", &Seen { ssh: greetings, ..Seen::default() });
    for way in ways() {
        print(way.name, &take(&lab, &way)?);
    }
    Ok(())
}

fn print(name: &str, seen: &Seen) {
    let seconds = |time: Option<Duration>| {
        time.map_or_else(|| "-".to_owned(), |time| format!("{:.1} s", time.as_secs_f64()))
    };
    println!(
        "{name:34}{:>10}{:>10}{:>11}{:>11}{:>10}{:>9}{:>9}  {}",
        seconds(seen.first),
        seen.rate.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.2}")),
        seconds(seen.ssh.iter().max().copied()),
        seconds(quantile(&seen.ssh, 99)),
        seen.kills,
        format!("{:.1} GB", seen.read as f64 / 1e9),
        format!("{:.1} GB", seen.written as f64 / 1e9),
        seen.note
    );
}

fn ways() -> [Way; 5] {
    let start = "systemctl start llm@leviathan.service".to_owned();
    let end = "systemctl stop llm@leviathan.service".to_owned();
    let server = |arguments: &str| {
        format!(
            "systemd-run --quiet --collect --unit=by-hand --slice=user.slice /usr/bin/llama-server -m {MODEL} -c 1024 \
             --parallel 1 --port {PORT} {arguments}; \
             until curl -fs -o /dev/null http://127.0.0.1:{PORT}/health; do \
               systemctl is-active --quiet by-hand.service || {{ echo 'the server is gone'; exit 1; }}; sleep 1; done"
        )
    };
    let stopped = "systemctl stop by-hand.service; swapoff -a; rm -f /swapfile";
    let ritual = format!(
        "echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/zero of=/swapfile bs=1M count={BY_HAND_MIB} 2>&1 | tail -n 1; \
         chmod 0600 /swapfile; mkswap -q /swapfile; swapon /swapfile; "
    );
    let ours = |name, oversize, hot| Way {
        name,
        ours: Some((oversize, hot)),
        start: start.clone(),
        end: end.clone(),
    };
    let theirs = |name, start| Way { name, ours: None, start, end: stopped.to_owned() };
    [
        ours("stream, hot ranges kept", "stream", true),
        ours("stream, hot ranges not kept", "stream", false),
        ours("swap", "swap", true),
        theirs("by hand: dd, swapon, no mmap", ritual + &server("--load-mode none")),
        theirs("plain llama-server", server("")),
    ]
}

/// Everything as it is before a way is taken.
fn prepare(lab: &Lab, way: &Way) -> Result<()> {
    lab.clean()?;
    let leviathan = Config::new("leviathan", PORT).priority(80);
    let mask = |command: &str| {
        PROTECTION.map(|unit| {
            format!("mkdir -p /etc/systemd/system/{unit}.d; {command} /etc/systemd/system/{unit}.d/50-plimsoll.conf")
        })
    };
    let Some((oversize, hot)) = way.ours else {
        // As a machine is without us.
        let masked = mask("ln -sf /dev/null").join("; ");
        lab.guest.ok(&format!(
            "systemctl mask --runtime --now plimsolld.service; {masked}; systemctl daemon-reload"
        ))?;
        return Ok(());
    };
    let lock = if hot { "infinity" } else { "0" };
    lab.guest.write(
        "/etc/systemd/system/llm@leviathan.service.d/lock.conf",
        &format!("[Service]\nLimitMEMLOCK={lock}\n"),
    )?;
    lab.guest.ok(&mask("rm -f").join("; "))?;
    let leviathan = leviathan.with(&format!("oversize = \"{oversize}\"\nworkload = \"batch\""));
    lab.configure(&[Config::new("rival-a", 8001).priority(40), leviathan])?;
    // Somebody has to go for it, and to come back.
    lab.serve("rival-a", 8001)
}

fn take(lab: &Lab, way: &Way) -> Result<Seen> {
    prepare(lab, way).with_context(|| format!("before: {}", way.name))?;
    let cursor = lab.guest.journal_cursor()?;
    let mut seen = Seen::default();
    let before = counters(lab)?;
    let body = format!(
        r#"{{"prompt":"The mark on the hull","n_predict":{TOKENS},"ignore_eos":true,"stream":true}}"#
    );
    let script = format!(
        "date +%s%N; {{ {}; }} || exit; \
         curl -fsSN -H 'Content-Type: application/json' -d '{body}' http://127.0.0.1:{PORT}/completion | \
         while read -r line; do echo \"$(date +%s%N) $line\"; done",
        way.start
    );
    let (done, greetings) = ssh::asked(lab, || lab.guest.run_within(&script, LIMIT))?;
    let (said, code) = (done.all(), done.code);
    seen.ssh = greetings;
    read(&said, &mut seen);
    let after = counters(lab)?;
    seen.kills = after[0] - before[0];
    (seen.read, seen.written) = (512 * (after[1] - before[1]), 512 * (after[2] - before[2]));
    let mut notes = Vec::new();
    match code {
        0 => {}
        124 => notes.push(format!("cut off after {} s, {} tokens", LIMIT.as_secs(), seen.tokens)),
        _ => notes.push(format!("failed: {}", said.lines().last().unwrap_or_default())),
    }
    lab.guest.ok_within(&way.end, PATIENCE)?;
    match way.ours {
        Some((oversize, hot)) => {
            let started = Instant::now();
            lab.guest.wait_until(
                "who went is back",
                PATIENCE,
                "systemctl is-active --quiet llm@rival-a.service",
            )?;
            notes.push(format!("the other was back {:.0} s after its end", started.elapsed().as_secs_f64()));
            let unlocked = lab
                .guest
                .journal_since(&cursor, "-u llm@leviathan.service")?
                .contains("is not kept in memory");
            if oversize == "stream" && unlocked == hot {
                notes.push(format!("hot ranges were {}kept", if unlocked { "not " } else { "" }));
            }
            lab.guest.wait_until("no swap is left", PATIENCE, "test $(wc -l < /proc/swaps) = 1")?;
        }
        None => {
            lab.guest.ok(
                "systemctl unmask --runtime --quiet plimsolld.service; systemctl start plimsolld.service",
            )?;
        }
    }
    seen.note = notes.join("; ");
    Ok(seen)
}

/// OOM kills, sectors read and sectors written of both disks since boot.
fn counters(lab: &Lab) -> Result<[u64; 3]> {
    let said = lab.guest.ok(
        "awk '$1 == \"oom_kill\" {print $2}' /proc/vmstat; \
         awk '$3 == \"vda\" || $3 == \"vdb\" {r += $6; w += $10} END {printf \"%.0f\\n%.0f\\n\", r, w}' /proc/diskstats",
    )?;
    let numbers: Vec<u64> = said.lines().map(str::parse).collect::<Result<_, _>>()?;
    numbers.try_into().ok().with_context(|| format!("not three numbers: {said}"))
}

/// When the first token came, and how fast the others; from lines of nanoseconds and what the server said.
fn read(said: &str, seen: &mut Seen) {
    let mut lines = said.lines();
    let Some(start) = lines.next().and_then(|line| line.trim().parse::<u64>().ok()) else { return };
    let mut times = Vec::new();
    for (time, event) in lines.filter_map(|line| line.split_once(" data: ")) {
        let (Ok(time), Ok(event)) = (time.parse::<u64>(), serde_json::from_str::<Value>(event)) else {
            continue;
        };
        if event["stop"] == Value::Bool(true) {
            seen.rate = event["timings"]["predicted_per_second"].as_f64();
        } else {
            times.push(time);
        }
    }
    seen.tokens = times.len();
    let (Some(first), Some(last)) = (times.first(), times.last()) else { return };
    seen.first = Some(Duration::from_nanos(first.saturating_sub(start)));
    if seen.rate.is_none() && times.len() > 1 {
        seen.rate = Some((times.len() - 1) as f64 / Duration::from_nanos(last - first).as_secs_f64());
    }
}

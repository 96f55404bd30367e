//! What puts the guest's memory under strain, and what watches: a small program of its own, copied into the guest.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use plimsoll::bytes::Bytes;
use plimsoll::os::lock_memory;
use serde_json::json;

/// How often the watcher looks.
const LOOK: Duration = Duration::from_millis(5);
/// Over so long is looked whether everybody waited for memory.
const STRETCH: Duration = Duration::from_millis(100);
/// Written at a time.
const STEP: usize = 1 << 20;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Take memory, hold it for a while, and end
    Eat {
        /// Once this file is there
        #[arg(long)]
        after: Option<PathBuf>,
        /// How much
        #[arg(long)]
        bytes: Bytes,
        /// Bytes in a second; 0: as fast as it goes
        #[arg(long, default_value = "0")]
        rate: Bytes,
        /// Hold it for so many seconds
        #[arg(long, default_value_t = 5)]
        hold: u64,
    },
    /// Take memory and answer on /health, as an engine would
    Engine {
        /// How much
        #[arg(long)]
        bytes: Bytes,
        /// Where
        #[arg(long)]
        port: u16,
    },
    /// Watch memory and processes until a file appears; says what it saw as JSON
    Watch {
        /// Available memory below this is a deficit
        #[arg(long)]
        line: Bytes,
        /// The file
        #[arg(long)]
        until: PathBuf,
        /// Give up after so many seconds
        #[arg(long, default_value_t = 300)]
        seconds: u64,
        /// NAME=PID of each process that may be stopped
        processes: Vec<String>,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().what) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("strain: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(what: What) -> Result<()> {
    match what {
        What::Eat { after, bytes, rate, hold } => {
            while after.as_ref().is_some_and(|path| !path.exists()) {
                std::thread::sleep(LOOK);
            }
            let began = Instant::now();
            let held = take(bytes, rate)?;
            println!("{bytes} taken in {} ms", began.elapsed().as_millis());
            std::thread::sleep(Duration::from_secs(hold));
            drop(held);
            Ok(())
        }
        What::Engine { bytes, port } => serve(bytes, port),
        What::Watch { line, until, seconds, processes } => watch(line, &until, seconds, &processes),
    }
}

/// Memory full of what does not compress, page by page.
fn take(bytes: Bytes, rate: Bytes) -> Result<Vec<Vec<u8>>> {
    let mut random = vec![0; STEP];
    fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
    let steps = usize::try_from(bytes.0)?.div_ceil(STEP);
    let mut held = Vec::with_capacity(steps);
    let began = Instant::now();
    for step in 0..steps {
        held.push(random.clone());
        if !rate.is_zero() {
            let due = Duration::from_secs_f64(((step + 1) * STEP) as f64 / rate.0 as f64);
            std::thread::sleep(due.saturating_sub(began.elapsed()));
        }
    }
    Ok(held)
}

fn serve(bytes: Bytes, port: u16) -> Result<()> {
    let held = take(bytes, Bytes::ZERO)?;
    let listener = TcpListener::bind(("127.0.0.1", port))?;
    for stream in listener.incoming() {
        let mut stream = stream?;
        let mut asked = [0; 1024];
        // Whoever asks and goes away is no reason to end.
        let _ = stream.read(&mut asked);
        let _ = stream.write_all(
            b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\nConnection: close\r\n\r\n{\"status\":\"ok\"}",
        );
    }
    drop(held);
    Ok(())
}

/// The number behind a word in a file of lines.
fn number(path: &str, word: &str) -> Result<u64> {
    let text = fs::read_to_string(path)?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(word))
        .with_context(|| format!("no {word} in {path}"))?;
    let digits: String =
        line.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
    Ok(digits.parse()?)
}

/// Microseconds in which all tasks waited for memory, since boot.
fn stalled() -> Result<u64> {
    let text = fs::read_to_string("/proc/pressure/memory")?;
    let full = text.lines().find(|line| line.starts_with("full")).context("no full pressure")?;
    Ok(full.rsplit_once("total=").context("no total")?.1.trim().parse()?)
}

fn alive(pid: u32) -> bool {
    // State is behind the name, which is in parentheses.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

fn watch(line: Bytes, until: &std::path::Path, seconds: u64, processes: &[String]) -> Result<()> {
    let mut running: Vec<(String, u32)> = Vec::new();
    for process in processes {
        let (name, pid) = process.split_once('=').with_context(|| format!("{process} is not NAME=PID"))?;
        let pid = pid.parse()?;
        ensure!(alive(pid), "{name} does not run");
        running.push((name.to_owned(), pid));
    }
    // What it does is to be on time when nothing else is.
    lock_memory().context("can't lock memory")?;
    let kills = number("/proc/vmstat", "oom_kill ")?;
    let began = Instant::now();
    let millis = |at: Instant| u64::try_from(at.duration_since(began).as_millis()).unwrap_or(u64::MAX);
    let mut deficit = None;
    let mut lowest = Bytes::MAX;
    let mut gone = Vec::new();
    let (mut stretch, mut stalled_then, mut over_half) = (began, stalled()?, 0);
    println!("watching");
    while !until.exists() && began.elapsed() < Duration::from_secs(seconds) {
        let available = Bytes(number("/proc/meminfo", "MemAvailable:")? * 1024);
        let now = Instant::now();
        lowest = lowest.min(available);
        if available < line {
            deficit.get_or_insert(millis(now));
        }
        running.retain(|(name, pid)| {
            let stays = alive(*pid);
            if !stays {
                gone.push(json!({ "name": name, "at_msec": millis(Instant::now()) }));
            }
            stays
        });
        if now.duration_since(stretch) >= STRETCH {
            let stalled_now = stalled()?;
            let micros = u64::try_from(now.duration_since(stretch).as_micros())?;
            if (stalled_now - stalled_then) * 2 > micros {
                over_half += micros / 1000;
            }
            (stretch, stalled_then) = (now, stalled_now);
        }
        std::thread::sleep(LOOK);
    }
    let oom_kills = number("/proc/vmstat", "oom_kill ")? - kills;
    println!(
        "{}",
        json!({ "deficit_msec": deficit, "gone": gone, "over_half_msec": over_half, "oom_kills": oom_kills, "lowest_bytes": lowest })
    );
    Ok(())
}

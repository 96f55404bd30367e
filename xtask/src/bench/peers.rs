//! Reading a large header beside others that read it: the engine's own fit tool, and Python's reader of the format.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::{median, millis};
use crate::host;
use crate::lab::Lab;

/// Where the header lies in the guest.
const GUEST: &str = "/root/bench-header";

/// Python's reader on this machine, where it is installed; `ours` is what `plimsoll fit` took, in milliseconds.
pub fn python(first: &Path, ours: f64) -> Result<()> {
    let python = |script: &str, arguments: &[PathBuf]| {
        let mut command = Command::new(host::find("python3").unwrap_or_else(|| "python3".into()));
        command.args(["-c", script]).args(arguments).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    if !python("import gguf", &[]) {
        println!("Python's gguf reader: not measured, its package gguf is not installed");
        return Ok(());
    }
    let shards = shards(first)?;
    let read = "import gguf, sys\nfor path in sys.argv[1:]: gguf.GGUFReader(path)";
    let took = median(3, || {
        ensure!(python(read, &shards), "Python's gguf reader does not read the header");
        Ok(())
    })?;
    let theirs = millis(took);
    println!(
        "Python's gguf reader, the same four shards: {theirs:.0} ms, {:.0} times as long",
        theirs / ours
    );
    Ok(())
}

fn shards(first: &Path) -> Result<Vec<PathBuf>> {
    let directory = first.parent().context("no directory")?;
    let mut all: Vec<PathBuf> = std::fs::read_dir(directory)?.flatten().map(|entry| entry.path()).collect();
    all.retain(|path| path.extension().is_some_and(|ending| ending == "gguf"));
    all.sort();
    Ok(all)
}

/// What systemd counts of a service that ran: CPU time in milliseconds, memory at its peak in MB.
struct Ran {
    cpu: f64,
    peak: f64,
}

/// Both in the guest: `plimsoll fit` and llama-fit-params, one after the other.
pub fn in_the_guest(lab: &Lab, first: &Path) -> Result<()> {
    const TIMES: usize = 7;
    let shards = shards(first)?;
    let directory = first.parent().context("no directory")?;
    let archive = directory.join("header.tar");
    let names = shards.iter().filter_map(|path| path.file_name());
    host::output(
        Command::new("tar").arg("-C").arg(directory).args(["--sparse", "-cf"]).arg(&archive).args(names),
    )?;
    lab.guest.copy_in(&archive, "/root/header.tar")?;
    std::fs::remove_file(&archive)?;
    lab.guest
        .ok(&format!("mkdir -p {GUEST} && tar -C {GUEST} -xf /root/header.tar && rm /root/header.tar"))?;
    let name = first.file_name().context("no name")?.to_string_lossy().into_owned();
    let ours = format!("/usr/bin/plimsoll fit {GUEST}/{name} -c 16384 --ram 128GiB --gpu none --json");
    let theirs = format!(
        "/usr/bin/llama-fit-params --fit-print on --fit off --model {GUEST}/{name} -c 16384 -ngl 0 --parallel 1"
    );
    let mut seen = Vec::new();
    for command in [&ours, &theirs] {
        let mut all = Vec::new();
        for _ in 0..TIMES {
            all.push(run(lab, command)?);
        }
        all.sort_by(|a, b| a.cpu.total_cmp(&b.cpu));
        let most = all.iter().map(|ran| ran.peak).fold(0.0, f64::max);
        seen.push((all[TIMES / 2].cpu, most));
    }
    lab.guest.ok(&format!("rm -r {GUEST}"))?;
    let [(cpu, peak), (their_cpu, their_peak)] = seen[..] else { return Ok(()) };
    println!(
        "the same in the guest, CPU time and largest memory: plimsoll fit {cpu:.0} ms, {peak:.1} MB; llama-fit-params \
         {their_cpu:.0} ms, {their_peak:.1} MB: {:.1} times as long",
        their_cpu / cpu
    );
    Ok(())
}

fn run(lab: &Lab, command: &str) -> Result<Ran> {
    let said =
        lab.guest.run(&format!("systemd-run --wait --collect -p StandardOutput=null {command}"))?.all();
    let after = |name: &str| {
        let line = said.lines().find_map(|line| line.trim().strip_prefix(name));
        line.with_context(|| format!("systemd-run tells no '{name}': {said}"))
    };
    let cpu = after("CPU time consumed:")?.trim();
    let peak = after("Memory peak:")?.trim();
    Ok(Ran { cpu: span(cpu)?, peak: size(peak.split(' ').next().unwrap_or_default())? })
}

/// A time span as systemd writes it, `1min 2.345s` or `31ms`; milliseconds.
fn span(text: &str) -> Result<f64> {
    let mut sum = 0.0;
    for part in text.split(' ') {
        let digits = part.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = match &part[digits.len()..] {
            "us" => 1e-3,
            "ms" => 1.0,
            "s" => 1e3,
            "min" => 6e4,
            other => anyhow::bail!("no unit of time: {other:?}"),
        };
        sum += digits.parse::<f64>()? * unit;
    }
    Ok(sum)
}

/// A size as systemd writes it, `2.3M`; MB.
fn size(text: &str) -> Result<f64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "B" => 1.0,
        "K" => 1024.0,
        "M" => 1024.0 * 1024.0,
        "G" => 1024.0 * 1024.0 * 1024.0,
        other => anyhow::bail!("no unit of size: {other:?}"),
    };
    Ok(digits.parse::<f64>()? * unit / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_systemd_says_is_read() {
        assert_eq!(span("31ms").unwrap(), 31.0);
        assert_eq!(span("1min 2.5s").unwrap(), 62_500.0);
        assert!((size("2M").unwrap() - 2.097_152).abs() < 1e-9);
        assert!(span("3 apples").is_err() && size("").is_err());
    }
}

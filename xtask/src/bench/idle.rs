//! What a protector costs while nothing happens: memory, wake-ups and processor time, beside earlyoom and systemd-oomd.
//!
//! Three models are loaded and idle; nobody asks anybody for anything. How often the daemon looks follows what is left of
//! memory: `--memory` says how much there is.

use super::{BenchOptions, boot};
use crate::lab::{Lab, PATIENCE};
use crate::models;
use crate::scenarios::pressure::idle_models;
use anyhow::{Context, Result};
use std::path::Path;

/// How long each is looked at; seconds.
const LENGTH: u32 = 120;
/// Who is looked at: names of units.
const PROTECTORS: [&str; 3] = ["plimsolld", "earlyoom", "systemd-oomd"];

/// All three as rows of a table, and where the daemon's own memory lies.
pub fn bench(options: &BenchOptions, programs: &Path) -> Result<()> {
    let machine = &options.machine;
    let lab = boot(options, programs, machine, &models::ensure_disk()?)?;
    let available = idle_models(&lab)?;
    println!(
        "three models idle in {} MiB, of which {available} are available and could be used up at {}/s; each for {LENGTH} s:",
        machine.memory,
        lab.status()?.pressure.fastest_bytes
    );
    println!("| protector | RSS | anonymous | of files | threads | wake-ups in 60 s | CPU ms in 60 s |");
    println!("|---|---:|---:|---:|---:|---:|---:|");
    for protector in PROTECTORS {
        lab.guest.ok_within(&format!("systemctl start {protector}.service"), PATIENCE)?;
        row(&lab, protector)?;
        if protector != PROTECTORS[0] {
            lab.guest
                .ok(&format!("systemctl stop {protector}.service {protector}.socket 2>/dev/null; true"))?;
        }
    }
    let pid = lab.daemon_pid()?;
    println!("the daemon's largest mappings (kB resident, kB private, what):");
    println!(
        "{}",
        lab.guest.ok(&format!(
            "awk '/^[0-9a-f]+-/ {{name = $6 == \"\" ? \"anonymous\" : $6 \" \" $2}} /^Rss:/ {{rss[name] += $2}} \
             /^Private_/ {{own[name] += $2}} END {{for (n in rss) print rss[n], own[n], n}}' /proc/{pid}/smaps | sort -rn | head -n 12"
        ))?
    );
    Ok(())
}

fn row(lab: &Lab, protector: &str) -> Result<()> {
    // After half a minute what a start or the last question left to be done is done.
    let said = lab.guest.ok_within(
        &format!(
            "pid=$(systemctl show --value -p MainPID {protector}.service); timeout 30 tail -f /dev/null; \
             count() {{ for task in /proc/$pid/task/*; do \
               echo \"$(cat $task/comm) $(awk '/^voluntary_ctxt/ {{print $2}}' $task/status)\"; done; }}; \
             cpu() {{ awk '{{print $14 + $15}}' /proc/$pid/stat; }}; \
             count > /run/before; a=$(cpu); timeout {LENGTH} tail -f /dev/null; count > /run/after; b=$(cpu); \
             awk '/^VmRSS|^RssAnon|^RssFile|^Threads/ {{print $1, $2}}' /proc/$pid/status; \
             echo \"ticks: $((b - a))\"; \
             awk 'NR == FNR {{n[$1] -= $2; next}} {{n[$1] += $2}} END {{for (c in n) print \"wakes:\" c, n[c]}}' /run/before /run/after"
        ),
        PATIENCE,
    )?;
    let number = |name: &str| -> Result<u64> {
        let line = said.lines().find_map(|line| line.strip_prefix(name));
        Ok(line.with_context(|| format!("no {name} in {said}"))?.trim().parse()?)
    };
    let threads: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("wakes:")).collect();
    let wakes: i64 = threads.iter().filter_map(|line| line.rsplit(' ').next()?.parse::<i64>().ok()).sum();
    println!(
        "| {protector} | {} kB | {} kB | {} kB | {} | {:.1} ({} in {LENGTH} s) | {} |",
        number("VmRSS:")?,
        number("RssAnon:")?,
        number("RssFile:")?,
        number("Threads:")?,
        wakes as f64 * 60.0 / f64::from(LENGTH),
        threads.join(", "),
        // A tick is 10 ms.
        number("ticks:")? * 10 * 60 / u64::from(LENGTH)
    );
    Ok(())
}

//! Models are admitted, made room for, or refused.

use crate::lab::{Config, Lab, PATIENCE};
use anyhow::{Result, ensure};
use plimsoll::bytes::Bytes;
use std::collections::BTreeSet;

/// "`systemctl start llm@small` and `llm@mid`: both answer a completion over HTTP; `plimsoll status`
/// shows predicted against measured bytes; the cgroup limits stand in `systemctl show`."
pub fn two_models_answer(lab: &mut Lab) -> Result<()> {
    lab.configure(&[Config::new("small", 8001), Config::new("mid", 8002).split("mid", 4)])?;
    lab.serve("small", 8001)?;
    lab.serve("mid", 8002)?;
    // From outside of the guest as well, where the address allows it: the units listen on loopback.
    lab.guest.wait_for("both are measured", PATIENCE, |_| {
        let status = lab.status()?;
        let measured =
            |name: &str| status.models.iter().any(|m| m.instance == name && m.measured.total() > Bytes::ZERO);
        Ok((measured("small") && measured("mid")).then_some(()))
    })?;
    for (name, megabytes) in [("small", 50), ("mid", 220)] {
        let model = lab.model(name)?;
        ensure!(model.state == "running", "{name} is {}", model.state);
        let (predicted, measured) = (model.predicted.total(), model.measured.total());
        ensure!(
            predicted >= Bytes::mib(megabytes) && predicted < Bytes::mib(megabytes * 4),
            "{name}: predicted {predicted}"
        );
        ensure!(
            measured <= predicted + Bytes::mib(32),
            "{name}: measured {measured} is more than the predicted {predicted}"
        );
        for property in ["MemoryHigh", "MemoryMax"] {
            let limit: u64 = lab.property(name, property)?.parse().unwrap_or(u64::MAX);
            ensure!(limit < u64::MAX, "{property} of {name} is not set");
            ensure!(limit >= predicted.0, "{property} of {name} is {limit}, below {predicted}");
        }
    }
    let table = lab.guest.ok("plimsoll status")?;
    ensure!(table.contains("small") && table.contains("mid"), "{table}");
    lab.no_oom_kill()
}

/// "`llm@large` of higher priority: exactly the models that have to go are stopped, through systemd,
/// cleanly; it answers."
pub fn higher_priority_makes_room(lab: &mut Lab) -> Result<()> {
    lab.configure(&[
        Config::new("small", 8001).priority(60),
        Config::new("mid", 8002).split("mid", 4).priority(40),
        Config::new("twin", 8003).priority(30),
        Config::new("large", 8004).priority(80),
    ])?;
    let others = ["small", "mid", "twin"];
    for (name, port) in [("small", 8001), ("mid", 8002), ("twin", 8003)] {
        lab.serve(name, port)?;
    }
    let plan = lab.plan("large")?;
    let planned: BTreeSet<&str> =
        plan.steps.iter().filter(|step| step.step == "stop").map(|step| step.instance.as_str()).collect();
    ensure!(!planned.is_empty(), "the plan stops nothing: {plan:?}");
    ensure!(planned.len() < others.len(), "the plan stops everything: {plan:?}");
    let before = lab.main_pids(&others)?;
    let cursor = lab.guest.journal_cursor()?;

    lab.serve("large", 8004)?;
    for name in others {
        if !planned.contains(name) {
            ensure!(lab.main_pid(name)? == before[name], "{name} was restarted");
            continue;
        }
        ensure!(lab.state(name)? == "inactive", "{name} is not cleanly stopped: {}", lab.unit_status(name)?);
        ensure!(lab.property(name, "Result")? == "success", "{}", lab.unit_status(name)?);
        let journal = lab.guest.journal_since(&cursor, &format!("-u llm@{name}.service"))?;
        ensure!(journal.contains("Deactivated successfully"), "{name} was not stopped by systemd: {journal}");
    }
    let pool = lab.memory_pool()?;
    ensure!(pool.reserved_bytes <= pool.capacity_bytes, "overcommitted: {pool:?}");
    lab.no_oom_kill()
}

/// "`llm@impossible`: refused before anything is allocated, nothing stopped, the one line of
/// arithmetic right in `systemctl status`, no restart loop."
pub fn impossible_is_refused(lab: &mut Lab) -> Result<()> {
    lab.configure(&[Config::new("small", 8001).priority(10), Config::new("impossible", 8004).priority(90)])?;
    lab.serve("small", 8001)?;
    let before = lab.main_pid("small")?;
    let shown = lab.refused("impossible", 75, &["GiB"])?;
    // The line says what the file takes and a little for cache and buffers, and its sum is right.
    let file = Bytes(lab.guest.ok("stat -c %s /srv/models/impossible.gguf")?.parse()?);
    let plan = lab.plan("impossible")?;
    let Some(refusal) = plan.refusal else { anyhow::bail!("no refusal in the plan: {}", plan.text) };
    let needed = refusal.needed_bytes;
    ensure!(needed > file && needed < file + Bytes::gib(1), "needed {needed} for a file of {file}");
    ensure!(
        refusal.free_bytes + refusal.evictable_bytes + refusal.short_bytes == needed,
        "the sum is wrong: {refusal:?}"
    );
    ensure!(shown.contains(&format!("needs {needed}")), "{needed} is not in:\n{shown}");
    ensure!(lab.main_pid("small")? == before, "small was stopped for it");
    lab.guest.completion(8001)?;
    let peak: u64 = lab.property("impossible", "MemoryPeak")?.parse().unwrap_or(0);
    ensure!(peak < 64 << 20, "the refused start took {peak} bytes");
    let explained = lab.guest.ok("plimsoll explain impossible")?;
    ensure!(explained.contains("GiB"), "{explained}");
    Ok(())
}

/// "Ten `plimsoll load` at once of models of which three fit: no kernel OOM kill, no overcommit, the
/// rest refused or queued with a reason."
pub fn ten_at_once(lab: &mut Lab) -> Result<()> {
    let configs: Vec<Config> = (0..10).map(|n| Config::new(&format!("crowd-{n}"), 8100 + n)).collect();
    lab.configure(&configs)?;
    let done = lab.guest.run_within(
        "mkdir -p /tmp/ten; for n in 0 1 2 3 4 5 6 7 8 9; do \
           (plimsoll load crowd-$n > /tmp/ten/$n.out 2>&1; echo $? > /tmp/ten/$n.code) & \
         done; wait; cd /tmp/ten; for n in 0 1 2 3 4 5 6 7 8 9; do echo \"$n $(cat $n.code) $(tail -n 1 $n.out)\"; done",
        PATIENCE * 2,
    )?;
    let mut running = 0;
    for line in done.stdout.lines() {
        let words: Vec<&str> = line.splitn(3, ' ').collect();
        match words[..] {
            [number, "0", _] => {
                running += 1;
                let port = 8100 + number.parse::<u16>()?;
                lab.guest.completion(port)?;
            }
            [_, "75", reason] => ensure!(reason.contains("GiB"), "refused without a reason: {line}"),
            _ => anyhow::bail!("{line}\nof\n{}\n{}", done.all(), lab.guest.evidence()),
        }
    }
    ensure!(done.stdout.lines().count() == 10, "{}", done.all());
    ensure!((2..=4).contains(&running), "{running} of ten run:\n{}", done.all());
    let pool = lab.memory_pool()?;
    ensure!(pool.reserved_bytes <= pool.capacity_bytes, "overcommitted: {pool:?}");
    lab.no_oom_kill()
}

//! What becomes of a model after it was admitted.

use crate::lab::{Config, Lab, PATIENCE};
use anyhow::{Result, ensure};
use plimsoll::bytes::Bytes;

/// "Evicted models return when there is room"; "what a person stopped stays stopped".
pub fn evicted_models_return(lab: &mut Lab) -> Result<()> {
    lab.configure(&[
        Config::new("rival-a", 8001).priority(40),
        Config::new("rival-b", 8002).priority(70),
        Config::new("small", 8003).priority(30),
    ])?;
    lab.serve("rival-a", 8001)?;
    lab.serve("small", 8003)?;
    lab.guest.ok("systemctl stop llm@small.service")?;
    lab.serve("rival-b", 8002)?;
    ensure!(lab.state("rival-a")? == "inactive", "rival-a was not evicted");
    lab.guest.ok("systemctl stop llm@rival-b.service")?;
    lab.guest.wait_until(
        "the evicted model is back",
        PATIENCE,
        "systemctl is-active --quiet llm@rival-a.service",
    )?;
    lab.guest.completion(8001)?;
    ensure!(lab.state("small")? == "inactive", "small was stopped by a person and came back");
    ensure!(lab.state("rival-b")? == "inactive", "rival-b was stopped by a person and came back");
    Ok(())
}

/// "A crash does restart, through the gate again."
pub fn crash_restarts_through_the_gate(lab: &mut Lab) -> Result<()> {
    lab.configure(&[Config::new("small", 8001)])?;
    lab.serve("small", 8001)?;
    let before = lab.main_pid("small")?;
    let cursor = lab.guest.journal_cursor()?;
    lab.guest.ok(&format!("kill -SEGV {before}"))?;
    lab.guest.wait_for("it answers again", PATIENCE, |guest| {
        let now = lab.property("small", "MainPID")?.parse::<u32>()?;
        let active = lab.state("small")? == "active";
        Ok((active && now != 0 && now != before && guest.completion(8001).is_ok()).then_some(()))
    })?;
    ensure!(lab.property("small", "NRestarts")? == "1", "{}", lab.unit_status("small")?);
    let journal = lab.guest.journal_since(&cursor, "-u plimsolld.service")?;
    ensure!(journal.contains("small"), "the restart did not pass the gate: {journal}");
    Ok(())
}

/// "The context down to `context-min` (never without it)": a smaller context before an eviction.
pub fn context_shrinks_before_eviction(lab: &mut Lab) -> Result<()> {
    // A cache of about 17 KiB a token in f32 makes the large context too large for what is left.
    let rival = Config::new("rival-a", 8001).priority(40);
    let large = Config::new("crowd-0", 8002)
        .priority(60)
        .with("cache-type-k = \"f32\"\ncache-type-v = \"f32\"\ncontext-min = 1024");
    lab.configure(&[rival, large.context(32768)])?;
    lab.serve("rival-a", 8001)?;
    let before = lab.main_pid("rival-a")?;
    lab.serve("crowd-0", 8002)?;
    ensure!(lab.main_pid("rival-a")? == before, "rival-a was stopped although a smaller context would do");
    let model = lab.model("crowd-0")?;
    ensure!(
        (1024..32768).contains(&model.context) && model.context_configured == 32768,
        "context {} of {}",
        model.context,
        model.context_configured
    );
    Ok(())
}

/// `plimsoll load` and `unload` go through systemd, wait for the outcome, and report a refusal with
/// the exit code of the contract. Anybody sees on the bus how the model is meanwhile.
pub fn load_and_unload(lab: &mut Lab) -> Result<()> {
    lab.configure(&[Config::new("small", 8001), Config::new("impossible", 8002)])?;
    let shows = |state: &str| {
        let property =
            "busctl get-property org.plimsoll1 /org/plimsoll1/model/small org.plimsoll1.Model State";
        let ask = format!("test \"$(runuser -u nobody -- {property})\" = 's \"{state}\"'");
        lab.guest.wait_until(&format!("its object says that it is {state}"), PATIENCE, &ask)
    };
    lab.guest.ok("plimsoll load small")?;
    lab.guest.completion(8001)?;
    shows("running")?;
    lab.guest.ok("plimsoll unload small")?;
    ensure!(lab.state("small")? == "inactive", "{}", lab.unit_status("small")?);
    shows("inactive")?;
    let refused = lab.guest.run("plimsoll load impossible")?;
    ensure!(refused.code == 75 && refused.stderr.contains("GiB"), "{}: {}", refused.code, refused.all());
    let unknown = lab.guest.run("plimsoll load smal")?;
    ensure!(unknown.code == 78 && unknown.stderr.contains("small"), "{}: {}", unknown.code, unknown.all());
    Ok(())
}

/// "Any other [engine] as `command = […]` with a declared memory. `mode = \"observe\"`."
pub fn other_engines_and_observing(lab: &mut Lab) -> Result<()> {
    lab.configure(&[])?;
    // An engine that serves a directory over HTTP is what a declared size is for; llama-server
    // itself does as well, run by an absolute path.
    let command = "command = [\"/usr/bin/llama-server\", \"-m\", \"/srv/models/small.gguf\", \"--port\", \"8001\", \
                   \"-c\", \"1024\"]\nport = 8001\nhealth-path = \"/health\"\n";
    let write = |name: &str, memory: &str| {
        lab.guest.write(
            &format!("/etc/plimsoll/models.d/{name}.toml"),
            &format!("{command}memory = \"{memory}\"\n"),
        )
    };
    write("declared", "400MiB")?;
    write("boastful", "400GiB")?;
    lab.guest.ok("systemctl daemon-reload && systemctl reload plimsolld")?;
    lab.serve("declared", 8001)?;
    lab.guest.ok("systemctl stop llm@declared.service")?;
    lab.refused("boastful", 75, &["400"])?;
    lab.guest.ok("plimsoll mode observe")?;
    let observed = lab.serve("boastful", 8001);
    lab.guest.ok("plimsoll mode enforce")?;
    observed?;
    let explained = lab.guest.ok("plimsoll explain boastful")?;
    ensure!(!explained.is_empty(), "nothing is said of what would have been done");
    Ok(())
}

/// What every token touches of the model that streams is locked in memory, inside its unit's control group, by a
/// helper of the unit's user that knows nothing of the bus, and of which the engine knows nothing.
fn hot_ranges_are_kept(lab: &Lab) -> Result<()> {
    let (group, main) = (lab.property("monster", "ControlGroup")?, lab.main_pid("monster")?);
    let seen = lab.guest.ok(&format!(
        "cd /sys/fs/cgroup{group}; grep -w unevictable memory.stat; \
         for pid in $(grep -vx {main} cgroup.procs); do \
           tr '\\0' ' ' < /proc/$pid/cmdline; echo; grep -E 'VmLck|^Uid' /proc/$pid/status; done; \
         tr '\\0' '\\n' < /proc/{main}/environ | grep PLIMSOLL_KEEP; true"
    ))?;
    let number = |word: &str| {
        let line = seen.lines().find(|line| line.starts_with(word))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    println!("          kept: {} KiB", number("VmLck:").unwrap_or(0));
    ensure!(seen.matches("hold").count() == 1 && number("Uid:") != Some(0), "not one helper: {seen}");
    let locked = number("VmLck:").unwrap_or(0) << 10;
    ensure!(locked > 8 << 20 && number("unevictable") >= Some(locked * 9 / 10), "not locked: {seen}");
    ensure!(
        !seen.contains("PLIMSOLL_KEEP"),
        "the engine has a variable that is none of its business: {seen}"
    );
    Ok(())
}

/// "Models larger than memory made to run on purpose": a mixture of experts of 2.6 GiB on a machine of 2
/// answers with part of its weights on disk, within its limit, and who went for it comes back.
pub fn one_larger_than_memory_streams(lab: &mut Lab) -> Result<()> {
    let monster = Config::new("monster", 8002).priority(80).with("oversize = \"stream\"");
    lab.configure(&[Config::new("rival-a", 8001).priority(40), monster])?;
    lab.serve("rival-a", 8001)?;
    let planned = lab.plan("monster")?;
    ensure!(planned.verdict == "streams", "{planned:?}");
    let cursor = lab.guest.journal_cursor()?;
    let disk = "cat /sys/block/vdb/queue/read_ahead_kb";
    let before = lab.guest.ok(disk)?;
    lab.serve("monster", 8002)?;
    // Its experts are of 278,528 bytes; the disk is as it was once the engine has opened the file.
    lab.guest.wait_until("the disk is as it was", PATIENCE, &format!("test $({disk}) = {before}"))?;
    let journal = lab.guest.journal_since(&cursor, "-u plimsolld.service")?;
    ensure!(journal.contains("that are opened now are read ahead by 128 KiB"), "{journal}");
    ensure!(lab.state("rival-a")? == "inactive", "rival-a holds room that the monster needs");
    let (model, pool) = (lab.model("monster")?, lab.memory_pool()?);
    let (resident, private) = (model.predicted.mapped_bytes, model.predicted.private_bytes);
    ensure!(resident < Bytes::mib(1600) && resident > Bytes::mib(800), "{resident} of it stay resident");
    // All room is its own; what the system uses goes up and down by a little meanwhile.
    ensure!(pool.reserved_bytes <= pool.capacity_bytes + Bytes::mib(64), "{pool:?}");
    let high: u64 = lab.property("monster", "MemoryHigh")?.parse()?;
    ensure!(
        Bytes(high) >= resident + private && Bytes(high) <= resident + private + Bytes::mib(300),
        "MemoryHigh={high} for {resident} resident and {private} private"
    );
    hot_ranges_are_kept(lab)?;
    lab.guest.ok("systemctl stop llm@monster.service")?;
    let helpers = lab.guest.run("pgrep --full '[p]limsoll hold'")?;
    ensure!(helpers.code == 1, "a helper is left: {}", helpers.all());
    lab.guest.wait_until(
        "the evicted model is back",
        PATIENCE,
        "systemctl is-active --quiet llm@rival-a.service",
    )?;
    lab.no_oom_kill()
}

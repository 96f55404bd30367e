//! Swapfiles on the real kernel: made by hand, made for a model, left behind.

use crate::lab::{Config, Lab, PATIENCE};
use anyhow::{Context, Result, ensure};
use plimsoll::bytes::Bytes;
use plimsoll::daemon::report::{Swap, SwapArea};

/// Where they are by default.
pub const DIRECTORY: &str = "/var/lib/plimsoll/swap";

fn swap(lab: &Lab) -> Result<Swap> {
    let text = lab.guest.ok("plimsoll swap --json")?;
    serde_json::from_str(&text).with_context(|| format!("no swap in {text}"))
}

/// The only swap area of the machine.
pub fn only(lab: &Lab) -> Result<SwapArea> {
    let areas = swap(lab)?.areas;
    ensure!(areas.len() == 1, "not one swap area: {areas:?}");
    areas.into_iter().next().context("no area")
}

/// Fails where swap, a swapfile or the failed unit of an order is left.
pub fn none_left(lab: &Lab) -> Result<()> {
    let left =
        lab.guest.ok(&format!("tail -n +2 /proc/swaps; find {DIRECTORY} -type f 2>/dev/null; true"))?;
    ensure!(left.is_empty(), "swap is left: {left}");
    let failed = lab.guest.ok("systemctl list-units --failed --no-legend --plain 'plimsoll-swap@*'")?;
    ensure!(failed.is_empty(), "a failed unit stands: {failed}");
    Ok(())
}

/// "Mode 0600, no holes", under the path that everybody sees; a size that does not fit changes nothing; only who may
/// configure makes one; one that is left behind is recognised and removed.
pub fn made_by_hand(lab: &mut Lab) -> Result<()> {
    lab.configure(&[])?;
    lab.guest.ok("plimsoll swap add 256MiB")?;
    let area = only(lab)?;
    ensure!(area.owner == "person" && area.active && area.priority < 0, "{area:?}");
    // The header's page is not for use.
    ensure!(area.size_bytes + Bytes(1 << 16) >= Bytes::mib(256), "{area:?}");
    ensure!(area.path == format!("{DIRECTORY}/plimsoll-{}.swap", area.name), "{area:?}");
    let seen = lab.guest.ok(&format!("cat /proc/swaps; stat -c '%a %U %s %b %B' {}", area.path))?;
    ensure!(seen.contains(&format!("{} ", area.path)), "{seen}");
    let stat: Vec<&str> = seen.lines().last().unwrap_or_default().split(' ').collect();
    let [mode, user, size, blocks, unit] = stat[..] else { anyhow::bail!("no stat in {seen}") };
    ensure!((mode, user) == ("600", "root"), "{seen}");
    ensure!(blocks.parse::<u64>()? * unit.parse::<u64>()? >= size.parse()?, "it has holes: {seen}");

    let large = lab.guest.run("plimsoll swap add 1TiB")?;
    ensure!(large.code == 1 && large.stderr.contains("does not fit"), "{}: {}", large.code, large.all());
    let stranger = lab.guest.run("runuser -u nobody -- plimsoll --no-ask-password swap add 16MiB")?;
    ensure!(stranger.code == 77, "{}: {}", stranger.code, stranger.all());
    let unknown = lab.guest.run("plimsoll swap remove hand-0123456789abcdef")?;
    ensure!(unknown.code == 1 && unknown.stderr.contains("swap list"), "{}: {}", unknown.code, unknown.all());
    only(lab)?;
    lab.guest.ok(&format!("plimsoll swap remove {}", area.name))?;
    none_left(lab)?;

    // What a crash or a reboot leaves: a file that is not in use.
    lab.guest.ok("plimsoll swap add 64MiB && swapoff -a && systemctl restart plimsolld.service")?;
    lab.guest.wait_until("the file left behind is gone", PATIENCE, &format!("! ls {DIRECTORY}/*.swap"))?;
    none_left(lab)
}

/// A file system that takes no swapfile, and one that is full: one sentence, nothing left, and nobody was stopped in
/// the hope of it.
pub fn a_disk_that_takes_none(lab: &mut Lab) -> Result<()> {
    const SETTINGS: &str = "/etc/plimsoll/plimsoll.toml";
    const PLACE: &str = "/run/plimsoll-no-swap";
    let before = lab.guest.ok(&format!("cat {SETTINGS}"))?;
    let settings =
        format!("reserve = \"256MiB\"\n[swap]\ndirectories = [\"{PLACE}\"]\nfree-space = \"0B\"\n");
    for (mount, why) in [
        (format!("mount -t tmpfs -o size=4G,mode=0700 none {PLACE}"), "does not take it as swap"),
        (format!("mount -t tmpfs -o size=20M,mode=0700 none {PLACE}"), "does not fit"),
    ] {
        lab.clean()?;
        lab.guest.ok(&format!("mkdir -m 0700 {PLACE} && {mount}"))?;
        lab.guest.write(SETTINGS, &settings)?;
        let shown = none_is_taken(lab, PLACE, why);
        lab.guest.write(SETTINGS, &format!("{before}\n"))?;
        lab.guest.ok(&format!(
            "systemctl reload plimsolld.service; {{ {}; }} && rmdir {PLACE}",
            super::faults::unmounted(PLACE)
        ))?;
        shown?;
    }
    Ok(())
}

fn none_is_taken(lab: &Lab, directory: &str, why: &str) -> Result<()> {
    let monster =
        Config::new("monster", 8002).priority(80).with("oversize = \"swap\"").with("workload = \"batch\"");
    lab.configure(&[Config::new("rival-a", 8001).priority(40), monster])?;
    let done = lab.guest.run("plimsoll swap add 32MiB")?;
    ensure!(done.code == 1 && done.stderr.contains(why), "{}: {}", done.code, done.all());
    lab.serve("rival-a", 8001)?;
    let main = lab.main_pid("rival-a")?;
    // Where there is no room for one, none is planned.
    let said = if why == "does not fit" { "short" } else { why };
    lab.refused("monster", 75, &[said])?;
    ensure!(lab.main_pid("rival-a")? == main, "rival-a was stopped for nothing");
    let left = lab.guest.ok(&format!("ls -A {directory}; tail -n +2 /proc/swaps"))?;
    ensure!(left.is_empty(), "something is left: {left}");
    lab.no_oom_kill()
}

/// `oversize = "swap"`: a mixture of experts of 2.6 GiB on a machine of 2, all in memory of its own, answers with
/// a swapfile that goes with it; who went for it comes back. A daemon that dies meanwhile loses nothing.
pub fn one_larger_than_memory_swaps(lab: &mut Lab) -> Result<()> {
    let monster =
        Config::new("monster", 8002).priority(80).with("oversize = \"swap\"").with("workload = \"batch\"");
    lab.configure(&[Config::new("rival-a", 8001).priority(40), monster])?;
    lab.serve("rival-a", 8001)?;
    let planned = lab.plan("monster")?;
    ensure!(planned.verdict == "fits-with-swap", "{planned:?}");
    let steps: Vec<&str> = planned.steps.iter().map(|step| step.step.as_str()).collect();
    ensure!(steps.contains(&"stop") && steps.contains(&"add-swap"), "{steps:?}");
    lab.serve("monster", 8002)?;
    let (area, model) = (only(lab)?, lab.model("monster")?);
    ensure!(area.owner == "plan" && area.active, "{area:?}");
    println!(
        "          in swap: {} planned, {} measured",
        model.predicted.swapped_bytes, model.measured.swapped_bytes
    );
    ensure!(model.predicted.swapped_bytes > Bytes::mib(500), "{model:?}");
    ensure!(model.measured.swapped_bytes > Bytes::mib(200), "{model:?}");
    ensure!(model.measured.swapped_bytes <= area.size_bytes, "{model:?}");

    let needed = lab.guest.run(&format!("plimsoll swap remove {}", area.name))?;
    ensure!(needed.code == 75 && needed.stderr.contains("monster"), "{}: {}", needed.code, needed.all());
    let main = lab.main_pid("monster")?;
    lab.guest.ok("systemctl kill --signal=SIGKILL plimsolld.service")?;
    lab.guest.wait_until("the daemon is back", PATIENCE, "plimsoll status")?;
    ensure!(lab.main_pid("monster")? == main && only(lab)?.name == area.name, "{}", lab.guest.evidence());

    lab.guest.ok_within("systemctl stop llm@monster.service", PATIENCE)?;
    lab.guest.wait_until(
        "the evicted model is back",
        PATIENCE,
        "systemctl is-active --quiet llm@rival-a.service",
    )?;
    lab.guest.wait_until("the swapfile is gone", PATIENCE, &format!("! ls {DIRECTORY}/*.swap"))?;
    none_left(lab)?;
    lab.no_oom_kill()
}

/// What a swapfile holds does not fit in memory when it is to go: it stays in use, the removal is tried again, and once
/// there is room it is gone.
pub fn one_that_has_no_room_to_come_back_stays(lab: &mut Lab) -> Result<()> {
    // With strict accounting of almost nothing but swap, the kernel has no room for what it would read back: ENOMEM.
    lab.configure(&[])?;
    lab.guest.ok(
        "systemctl stop plimsolld.service; systemctl start plimsoll-swap@add-plan-2147483648-1.service && \
         sysctl -q vm.overcommit_kbytes=4096 vm.overcommit_memory=2; systemctl start plimsolld.service",
    )?;
    let deferred = lab.guest.wait_until(
        "the removal fails",
        PATIENCE,
        "journalctl -b -o cat -u 'plimsoll-swap@remove-*' | grep 'does not fit in memory'",
    );
    let left = swap(lab);
    lab.guest.ok("sysctl -q vm.overcommit_memory=0 vm.overcommit_ratio=50")?;
    deferred?;
    ensure!(left?.areas.iter().any(|area| area.active), "it is out of use");
    lab.guest.wait_until("it is gone", PATIENCE, &format!("! ls {DIRECTORY}/*.swap"))?;
    none_left(lab)
}

//! Memory runs short by what is not ours: the least harm, in time, and the kernel kills nothing.

use crate::lab::{Config, Lab, PATIENCE};
use anyhow::{Result, ensure};
use plimsoll::bytes::Bytes;

/// The eater stays so long.
const MEAL: u64 = 40;

/// A model whose weights are in memory of its own, so that it gives back what it takes.
fn unmapped(config: Config) -> Config {
    config.with("engine-args = [\"--load-mode\", \"none\"]").with("prompt-cache = \"0MiB\"")
}

fn models() -> [Config; 3] {
    [
        unmapped(Config::new("twin", 8001).priority(30)),
        unmapped(Config::new("mid", 8002).split("mid", 4).priority(60)),
        Config::new("small", 8003).priority(80),
    ]
}

/// Models that idle, as they run; and the bytes of memory that are available beside them.
fn idle_models(lab: &Lab) -> Result<Bytes> {
    lab.configure(&models())?;
    for (name, port) in [("twin", 8001), ("mid", 8002), ("small", 8003)] {
        lab.serve(name, port)?;
    }
    lab.available()
}

/// A process in a unit of its own takes so much memory, at full speed.
fn eat(lab: &Lab, bytes: Bytes) -> Result<()> {
    lab.guest
        .ok(&format!(
            "systemctl reset-failed eater.service 2>/dev/null; \
             systemd-run --quiet --unit=eater {} eat --bytes {} --hold {MEAL}",
            Lab::STRAIN,
            bytes.0
        ))
        .map(|_| ())
}

fn meal_ends(lab: &Lab) -> Result<()> {
    lab.guest.wait_until("the eater has ended", PATIENCE, "! systemctl is-active --quiet eater.service")?;
    let result = lab.guest.ok("systemctl show --value -p Result eater.service")?;
    ensure!(result == "success", "the eater ended with {result}\n{}", lab.guest.evidence());
    Ok(())
}

/// The daemon's first thread, which its loop runs on, is frozen (as if it hung): the last rung kills in its place, and
/// the loop says so when it goes on.
pub fn the_last_rung_stands_in(lab: &mut Lab) -> Result<()> {
    lab.bring_strain()?;
    let available = idle_models(lab)?;
    let before = lab.main_pids(&["mid", "small"])?;
    let cursor = lab.guest.journal_cursor()?;
    let daemon = lab.daemon_pid()?;
    // A control group for this thread alone, which is then frozen.
    let group = "/sys/fs/cgroup/plimsoll.slice/plimsolld.service";
    lab.guest.ok(&format!(
        "cd {group} && mkdir held && echo threaded > held/cgroup.type && echo {daemon} > held/cgroup.threads && \
         echo 1 > held/cgroup.freeze"
    ))?;
    lab.guest.wait_until(
        "the loop is stopped",
        PATIENCE,
        &format!("grep -qx 'frozen 1' {group}/held/cgroup.events"),
    )?;
    eat(lab, available - Bytes::mib(40))?;
    let killed = "systemctl show --value -p MainPID llm@twin.service | grep -qx 0";
    lab.guest.wait_until("twin is killed", PATIENCE, killed)?;
    lab.guest.ok(&format!(
        "cd {group} && grep -qx 'frozen 1' held/cgroup.events && echo 0 > held/cgroup.freeze && \
         echo {daemon} > cgroup.threads && rmdir held"
    ))?;
    meal_ends(lab)?;
    lab.no_oom_kill()?;
    ensure!(lab.daemon_pid()? == daemon, "the daemon is another one\n{}", lab.guest.evidence());
    lab.guest.wait_for("the journal says so", PATIENCE, |guest| {
        let journal = guest.journal_since(&cursor, "-u plimsolld.service")?;
        Ok(journal.contains("twin was killed by the last rung").then_some(()))
    })?;
    ensure!(lab.main_pids(&["mid", "small"])? == before, "others were restarted\n{}", lab.guest.evidence());
    lab.guest.wait_until("twin returns", PATIENCE, "systemctl is-active --quiet llm@twin.service")
}

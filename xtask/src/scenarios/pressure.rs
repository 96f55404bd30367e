//! Memory runs short by what is not ours: the least harm, in time, and the kernel kills nothing.

use crate::lab::{Config, Lab, PATIENCE};
use anyhow::{Result, ensure};
use plimsoll::bytes::Bytes;
use std::time::Duration;

/// The eater stays so long.
const MEAL: u64 = 40;
/// What it leaves of what is available beside the models: less than half the reserve, so that one has to go, and more than nothing, so
/// that one is enough.
const LEFT: Bytes = Bytes::mib(100);
/// For how long a turn of the loop may stand still; µs. What it computes takes many times as long in this machine as on
/// real hardware, and is told but not judged.
const LONGEST_PAUSE: u64 = 50_000;

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
pub fn idle_models(lab: &Lab) -> Result<Bytes> {
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

/// An eater makes exactly the lowest idle model go and the kernel kills nothing; the journal names the eater; the model
/// returns afterwards.
pub fn an_eater_makes_the_lowest_go(lab: &mut Lab) -> Result<()> {
    lab.bring_strain()?;
    let available = idle_models(lab)?;
    let before = lab.main_pids(&["mid", "small"])?;
    let cursor = lab.guest.journal_cursor()?;
    eat(lab, available - LEFT)?;
    lab.guest.wait_until("twin goes", PATIENCE, "! systemctl is-active --quiet llm@twin.service")?;
    meal_ends(lab)?;
    ensure!(lab.main_pids(&["mid", "small"])? == before, "others were restarted\n{}", lab.guest.evidence());
    lab.no_oom_kill()?;
    let journal = lab.guest.journal_since(&cursor, "-u plimsolld.service")?;
    ensure!(journal.contains("eater.service"), "the journal does not name the eater:\n{journal}");
    lab.guest.wait_until("twin returns", PATIENCE, "systemctl is-active --quiet llm@twin.service")?;
    lab.guest.completion(8001).map(|_| ())
}

/// Disk load, an mmap reader under a limit of its own and tmpfs within budget are no reason to stop anybody.
pub fn load_that_fits_evicts_nobody(lab: &mut Lab) -> Result<()> {
    calm(lab, Duration::from_secs(90))
}

/// The same for any length of time.
pub fn calm(lab: &Lab, length: Duration) -> Result<()> {
    let names = ["twin", "small"];
    lab.configure(&[
        unmapped(Config::new("twin", 8001).priority(30)),
        Config::new("small", 8003).priority(80),
    ])?;
    lab.serve("twin", 8001)?;
    lab.serve("small", 8003)?;
    let before = lab.main_pids(&names)?;
    let cursor = lab.guest.journal_cursor()?;
    // Longer than it is looked at, so that it is under way to the end.
    let limit = length.as_secs() + 120;
    lab.guest.ok(&format!(
        "systemctl reset-failed 2>/dev/null; \
         systemd-run --quiet --unit=load-disk -p RuntimeMaxSec={limit} sh -c 'while :; do \
           dd if=/dev/vdb of=/dev/null bs=1M count=600 status=none; dd if=/dev/zero of=/var/tmp/load bs=1M count=200 conv=fsync status=none; done'; \
         systemd-run --quiet --unit=load-reader -p RuntimeMaxSec={limit} -p MemoryHigh=200M \
           llama-server -m /srv/models/large.gguf -c 512 --port 8009 --no-warmup; \
         systemd-run --quiet --unit=load-tmpfs -p RuntimeMaxSec={limit} sh -c \
           'dd if=/dev/urandom of=/dev/shm/load bs=1M count=150 status=none; exec sleep {limit}'"
    ))?;
    // The reader touches what it has mapped, over and over.
    lab.guest.ok(&format!(
        "systemd-run --quiet --unit=load-asker -p RuntimeMaxSec={limit} sh -c 'while :; do curl -fsS --max-time 60 -o /dev/null \
         -H \"Content-Type: application/json\" -d \"{{\\\"prompt\\\":\\\"load\\\",\\\"n_predict\\\":8}}\" \
         http://127.0.0.1:8009/completion || sleep 1; done'"
    ))?;
    std::thread::sleep(length);
    let full = lab
        .guest
        .ok("cat /proc/pressure/memory /sys/fs/cgroup/system.slice/load-reader.service/memory.pressure")?;
    println!("          pressure at the end: {}", full.replace('\n', " | "));
    lab.guest
        .ok("systemctl stop load-disk load-reader load-asker load-tmpfs 2>/dev/null; rm -f /dev/shm/load /var/tmp/load; true")?;
    for (name, pid) in &before {
        ensure!(lab.main_pid(name)? == *pid, "{name} was restarted\n{}", lab.guest.evidence());
    }
    let journal = lab.guest.journal_since(&cursor, "-u plimsolld.service")?;
    let harm = journal.contains("is stopped") || journal.contains("is killed");
    ensure!(!harm, "somebody had to go:\n{journal}");
    lab.no_oom_kill()
}

/// An engine that ignores SIGTERM while memory runs out is killed, and does not come back while the memory is gone.
pub fn a_stubborn_one_is_killed(lab: &mut Lab) -> Result<()> {
    lab.bring_strain()?;
    lab.configure(&[Config::new("small", 8003).priority(80)])?;
    lab.guest.write(
        "/etc/plimsoll/models.d/stubborn.toml",
        &format!(
            "command = [\"/bin/sh\", \"-c\", \"trap '' TERM; exec {} engine --bytes 300MiB --port {{port}}\"]\n\
             memory = \"320MiB\"\nport = 8001\npriority = 10\n",
            Lab::STRAIN
        ),
    )?;
    lab.guest.ok("systemctl reload plimsolld.service")?;
    let started = lab.start("stubborn")?;
    ensure!(started.code == 0, "{}\n{}", started.all(), lab.guest.evidence());
    lab.serve("small", 8003)?;
    let before = lab.main_pids(&["small"])?;
    let pid = lab.main_pid("stubborn")?;
    eat(lab, lab.available()? - Bytes::mib(40))?;
    lab.guest.wait_until("the stubborn one is gone", PATIENCE, &format!("! test -d /proc/{pid}"))?;
    let away = "! systemctl is-active --quiet llm@stubborn.service";
    meal_ends(lab)?;
    lab.guest.ok(away)?;
    ensure!(lab.main_pids(&["small"])? == before, "small was restarted\n{}", lab.guest.evidence());
    lab.no_oom_kill()
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
    eat(lab, available - LEFT)?;
    let killed = "systemctl show --value -p MainPID llm@twin.service | grep -qx 0";
    lab.guest.wait_until("twin is killed", PATIENCE, killed)?;
    lab.guest.ok(&format!(
        "cd {group} && grep -qx 'frozen 1' held/cgroup.events && echo 0 > held/cgroup.freeze && \
         echo {daemon} > cgroup.threads && for n in $(seq 50); do rmdir held && break; sleep 0.1; done; ! test -e held"
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

/// Limits far below what models hold (which block whoever writes them), swap going away, an engine that accepts questions and
/// answers none, and a bus that stands still: the loop's turns stay short, and it does not miss one.
pub fn nothing_holds_up_the_loop(lab: &mut Lab) -> Result<()> {
    idle_models(lab)?;
    // What its start took is not asked for.
    lab.guest.ok("systemctl restart plimsolld.service")?;
    let began = lab.status()?.turns;
    let engine = lab.main_pid("small")?;
    lab.guest.ok_within("plimsoll swap add 400MiB", PATIENCE)?;
    let name = super::swap::only(lab)?.name;
    let held_up = lab.guest.ok_within(
        &format!(
            "kill -STOP {engine}; \
             for unit in twin mid; do systemctl set-property --runtime llm@$unit.service MemoryHigh=40M & done; \
             timeout 20 plimsoll status > /dev/null; plimsoll plan mid > /dev/null; \
             bus=$(systemctl show --value -p MainPID dbus.service); kill -STOP $bus; \
             timeout 5 plimsoll status > /dev/null; kill -CONT $bus {engine}; wait; \
             plimsoll swap remove {name} || echo '{name} stays'"
        ),
        PATIENCE,
    )?;
    let turns = lab.status()?.turns;
    println!(
        "          a turn stood still for {} µs at most, longest turn {} µs, latest wake-up {} µs late, {} turns since the start's {}; {held_up}",
        turns.blocked_usec, turns.longest_usec, turns.latest_usec, turns.count, began.count
    );
    ensure!(turns.count > began.count, "the loop has not turned: {turns:?}");
    ensure!(turns.blocked_usec < LONGEST_PAUSE, "the loop was held up: {turns:?}\n{}", lab.guest.evidence());
    lab.no_oom_kill()
}

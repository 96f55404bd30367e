//! What is killed in the middle of an oversized run, at each of its steps: it ends completed or restored, with no
//! swap, no file and nobody stopped for good.

use crate::lab::{Config, Lab, PATIENCE};
use crate::scenarios::swap::{DIRECTORY, none_left};
use anyhow::{Result, ensure};

/// Who goes for the monster, and the monster.
fn models() -> [Config; 2] {
    let monster = Config::new("monster", 8002).priority(80);
    [
        Config::new("rival-a", 8001).priority(40),
        monster.with("oversize = \"swap\"").with("workload = \"batch\""),
    ]
}

/// Starts the monster, and does `deed` as soon as its unit has said `words`.
fn start_and(lab: &Lab, words: &str, deed: &str) -> Result<()> {
    let guest = &lab.guest;
    let done = guest.run_within(
        &format!(
            "from=$(journalctl -n 1 --no-pager -o cat --show-cursor | sed -n 's/^-- cursor: //p'); \
             systemctl start --no-block llm@monster.service; \
             timeout 200 journalctl -f --after-cursor=\"$from\" -o cat -u llm@monster.service | grep -m 1 '{words}' && {deed}"
        ),
        PATIENCE,
    )?;
    ensure!(done.code == 0, "at '{words}': {}\n{}", done.all(), guest.evidence());
    Ok(())
}

/// The monster runs in the end; stopped, it leaves the machine as it was before.
fn completes_and_restores(lab: &Lab) -> Result<()> {
    let guest = &lab.guest;
    guest.wait_until("the monster runs", PATIENCE, "systemctl is-active --quiet llm@monster.service")?;
    guest.completion(8002)?;
    ensure!(lab.state("rival-a")? == "inactive", "rival-a holds room that the monster needs");
    guest.ok_within("systemctl stop llm@monster.service", PATIENCE)?;
    restored(lab)
}

/// Everything is as it was before the monster.
fn restored(lab: &Lab) -> Result<()> {
    let guest = &lab.guest;
    guest.wait_until("who went is back", PATIENCE, "systemctl is-active --quiet llm@rival-a.service")?;
    guest.wait_until("the swapfile is gone", PATIENCE, &format!("! ls {DIRECTORY}/*.swap"))?;
    none_left(lab)?;
    lab.no_oom_kill()
}

/// `kill -9` of the daemon at each step that it makes: the one after it goes on.
pub fn the_daemon_is_killed_at_each_step(lab: &mut Lab) -> Result<()> {
    lab.configure(&models())?;
    lab.serve("rival-a", 8001)?;
    for step in ["making a swapfile", "stopping rival-a"] {
        start_and(lab, step, "systemctl kill --signal=SIGKILL plimsolld.service")?;
        completes_and_restores(lab)?;
        println!("          killed at '{step}': completed, and restored");
    }
    Ok(())
}

/// `kill -9` of the engine while it loads: it is started again through the gate, with the swapfile that is there.
pub fn the_model_is_killed_while_it_loads(lab: &mut Lab) -> Result<()> {
    lab.configure(&models())?;
    lab.serve("rival-a", 8001)?;
    start_and(
        lab,
        "load_model: loading",
        "systemctl kill --kill-whom=main --signal=SIGKILL llm@monster.service",
    )?;
    completes_and_restores(lab)
}

/// The power fails while the monster runs: nothing of it comes back, and who went for it does.
pub fn the_power_fails_in_the_middle(lab: &mut Lab) -> Result<()> {
    lab.configure(&models())?;
    lab.serve("rival-a", 8001)?;
    lab.serve("monster", 8002)?;
    lab.guest.reset_and_wait()?;
    lab.guest.wait_until("the daemon is up", PATIENCE, "systemctl is-active --quiet plimsolld.service")?;
    restored(lab)?;
    ensure!(lab.state("monster")? == "inactive", "nobody asked for the monster after the reboot");
    Ok(())
}

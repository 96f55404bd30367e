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
fn completes_and_restores(lab: &Lab, before: &str) -> Result<()> {
    let guest = &lab.guest;
    guest.wait_until("the monster runs", PATIENCE, "systemctl is-active --quiet llm@monster.service")?;
    guest.completion(8002)?;
    out_of_the_way(lab, before)?;
    guest.ok_within("systemctl stop llm@monster.service", PATIENCE)?;
    restored(lab)
}

/// Who went for the monster holds none of the room that it needs, and was not started again since `before`.
fn out_of_the_way(lab: &Lab, before: &str) -> Result<()> {
    let guest = &lab.guest;
    let state = lab.state("rival-a")?;
    // Failed: its time to stop was over.
    ensure!(["inactive", "failed"].contains(&state.as_str()), "rival-a is {state}\n{}", guest.evidence());
    let started = guest.journal_since(before, "-b -t systemd")?;
    ensure!(!started.contains("Starting llm@rival-a"), "rival-a was started again: {started}");
    Ok(())
}

/// Everything is as it was before the monster.
fn restored(lab: &Lab) -> Result<()> {
    let guest = &lab.guest;
    guest.wait_until("who went is back", PATIENCE, "systemctl is-active --quiet llm@rival-a.service")?;
    guest.wait_until("the swapfile is gone", PATIENCE, &format!("! ls {DIRECTORY}/*.swap"))?;
    none_left(lab)?;
    lab.no_oom_kill()
}

/// The daemon, which is there, dies at once, and is started again after a second however often it has died before.
const KILL: &str = "until pid=$(systemctl show --value -p MainPID plimsolld.service); test $pid != 0; do sleep 0.05; done; \
     systemctl reset-failed plimsolld.service; kill -9 $pid";

/// `kill -9` of the daemon at each step of one run: the one after it goes on where it was.
pub fn the_daemon_is_killed_at_each_step(lab: &mut Lab) -> Result<()> {
    const STEPS: [&str; 4] =
        ["making a swapfile", "of cold page cache", "stopping rival-a", "load_model: loading"];
    let [rival, monster] = models();
    lab.configure(&[rival, monster, Config::new("large", 8003)])?;
    lab.serve("rival-a", 8001)?;
    let guest = &lab.guest;
    let before = guest.journal_cursor()?;
    guest.ok("cat /srv/models/large.gguf > /dev/null")?;
    let steps: Vec<String> = STEPS.map(|step| format!("'{step}'")).into();
    let done = guest.run_within(
        &format!(
            "from=$(journalctl -n 1 --no-pager -o cat --show-cursor | sed -n 's/^-- cursor: //p'); \
             systemctl start --no-block llm@monster.service; \
             timeout 240 journalctl -f --after-cursor=\"$from\" -o cat -u llm@monster.service | \
             {{ for step in {}; do \
                  while read -r line; do case $line in *\"$step\"*) {KILL}; echo \"killed at $step\"; break;; esac; done; \
                done; }}",
            steps.join(" ")
        ),
        PATIENCE,
    )?;
    let killed = done.stdout.lines().filter(|line| line.starts_with("killed")).count();
    ensure!(killed == STEPS.len(), "not at each of {STEPS:?}: {}\n{}", done.all(), guest.evidence());
    guest.wait_until("the monster runs", PATIENCE, "systemctl is-active --quiet llm@monster.service")?;
    guest.completion(8002)?;
    out_of_the_way(lab, &before)?;
    // While it runs, and while the other comes back.
    guest.ok_within(&format!("{KILL}; systemctl stop llm@monster.service"), PATIENCE)?;
    guest.wait_until(
        "who went comes back",
        PATIENCE,
        &format!(
            "test $(systemctl show --value -p ActiveState llm@rival-a.service) != inactive && {{ {KILL}; }}"
        ),
    )?;
    restored(lab)
}

/// `kill -9` of the engine while it loads: it is started again through the gate, with the swapfile that is there. The
/// model that goes for it hangs, and is killed when its time to stop is over.
pub fn the_model_is_killed_while_it_loads(lab: &mut Lab) -> Result<()> {
    const IMPATIENT: &str = "/run/systemd/system/llm@rival-a.service.d";
    lab.configure(&models())?;
    lab.guest.write(&format!("{IMPATIENT}/stop.conf"), "[Service]\nTimeoutStopSec=3s\n")?;
    lab.guest.ok("systemctl daemon-reload")?;
    lab.serve("rival-a", 8001)?;
    let (before, hangs) = (lab.guest.journal_cursor()?, lab.main_pid("rival-a")?);
    lab.guest.ok(&format!("kill -STOP {hangs}"))?;
    start_and(
        lab,
        "load_model: loading",
        "systemctl kill --kill-whom=main --signal=SIGKILL llm@monster.service",
    )?;
    lab.guest.ok(&format!("rm -r {IMPATIENT}; systemctl daemon-reload; ! kill -0 {hangs}"))?;
    completes_and_restores(lab, &before)
}

/// The disk can't be read where the model lies: it fails to load each time, and after a few times nobody is stopped
/// for it any more.
pub fn the_disk_fails_while_it_loads(lab: &mut Lab) -> Result<()> {
    const MAPPED: &str = "/dev/mapper/plimsoll-models";
    // One block of the model's, behind its header, gives an error; all the rest of the disk is as it was.
    lab.guest.ok(&format!(
        "modprobe dm-mod && disk=$(findmnt -n -o SOURCE /srv/models) && \
         set -- $(filefrag -e -v -b512 /srv/models/monster.gguf | tr ':.' '  ' | \
           awk '$1 ~ /^[0-9]+$/ && $2 >= 16384 {{print $4; exit}}') && test -n \"$1\" && \
         {{ {}; }} && size=$(blockdev --getsz $disk) && \
         printf '0 %s linear %s 0\n%s 8 error\n%s %s linear %s %s\n' $1 $disk $1 $(($1 + 8)) $((size - $1 - 8)) $disk \
           $(($1 + 8)) | dmsetup create plimsoll-models && \
         mount {MAPPED} /srv/models",
        unmounted("/srv/models")
    ))?;
    let seen = it_fails_and_the_other_is_back(lab);
    let cleaned = lab.clean();
    lab.guest.ok(&format!(
        "{{ {}; }} && dmsetup remove --retry plimsoll-models; mount /srv/models",
        unmounted("/srv/models")
    ))?;
    seen.and(cleaned)
}

/// A command that unmounts it; the daemon may be looking at a file there just now.
pub fn unmounted(path: &str) -> String {
    format!("for n in $(seq 100); do umount {path} && break; sleep 0.1; done; ! mountpoint -q {path}")
}

fn it_fails_and_the_other_is_back(lab: &Lab) -> Result<()> {
    lab.configure(&models())?;
    lab.serve("rival-a", 8001)?;
    lab.start("monster")?;
    lab.guest.wait_until("it is given up", PATIENCE, "systemctl is-failed --quiet llm@monster.service")?;
    let shown = lab.unit_status("monster")?;
    ensure!(shown.contains("failed to load 3 times in a row"), "{shown}\n{}", lab.guest.evidence());
    restored(lab)
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

/// An orderly reboot while the monster loads: nobody is started on the way down, and afterwards who went is back.
pub fn a_reboot_in_the_middle(lab: &mut Lab) -> Result<()> {
    lab.configure(&models())?;
    lab.serve("rival-a", 8001)?;
    let before = lab.guest.journal_cursor()?;
    start_and(lab, "load_model: loading", "true")?;
    lab.guest.reboot_and_wait()?;
    lab.guest.wait_until("the daemon is up", PATIENCE, "systemctl is-active --quiet plimsolld.service")?;
    restored(lab)?;
    ensure!(lab.state("monster")? == "inactive", "nobody asked for the monster after the reboot");
    let started = lab.guest.journal_since(&before, "-b -1 -t systemd")?;
    ensure!(!started.contains("Starting llm@rival-a"), "started on the way down: {started}");
    Ok(())
}

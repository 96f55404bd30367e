//! Memory held for what is no model, and the journal that tells of it.

use crate::lab::{Config, Lab, PATIENCE};
use anyhow::{Result, ensure};
use plimsoll::daemon::report::Lease;

/// The only lease there is, once it is held.
fn held(lab: &Lab) -> Result<Lease> {
    lab.guest.wait_for("a lease is held", PATIENCE, |_| {
        Ok(lab.status()?.leases.into_iter().find(|lease| lease.state == "held"))
    })
}

fn ended(lab: &Lab) -> Result<()> {
    lab.guest.wait_for("no lease is held", PATIENCE, |_| Ok(lab.status()?.leases.is_empty().then_some(())))
}

/// The size of a lease for which a model has to go: all that is free, and a little more.
fn one_too_many(lab: &Lab) -> Result<String> {
    Ok(format!("{}B", lab.memory_pool()?.headroom_bytes.0 + (8 << 20)))
}

/// "A lease evicts a lower-priority model, the model comes back when the command ends", with its exit code; kill -9 of
/// the holder ends it.
pub fn makes_room_and_ends_with_its_command(lab: &mut Lab) -> Result<()> {
    lab.configure(&[Config::new("small", 8001).priority(30)])?;
    lab.serve("small", 8001)?;
    let size = one_too_many(lab)?;
    let guest = &lab.guest;
    // What the command takes is measured, and is the lease's.
    let command = format!(
        "plimsoll lease {size} -- sh -c 'head -c 64M /dev/zero | tail -c 64M | sleep 600'; echo $? > /run/lease-code"
    );
    guest.ok(&format!(
        "rm -f /run/lease-code; systemd-run --quiet --unit=holder sh -c \"{}\"",
        command.replace('$', "\\$")
    ))?;
    let lease = held(lab)?;
    ensure!(lease.lease == "lease:sh" && lease.uid == 0, "{lease:?}");
    ensure!(lab.state("small")? == "inactive", "small still runs: {}", guest.evidence());
    guest.wait_for("its memory is measured", PATIENCE, |_| {
        let held = held(lab)?;
        Ok((held.measured.private_bytes.0 >= 48 << 20).then_some(()))
    })?;
    guest.ok("pkill -TERM -x sleep")?;
    guest.wait_until("the command's exit code", PATIENCE, "test -s /run/lease-code")?;
    let code = guest.ok("cat /run/lease-code")?;
    ensure!(code == "143", "exit code {code}");
    ended(lab)?;
    guest.wait_until("the model is back", PATIENCE, "systemctl is-active --quiet llm@small.service")?;
    guest.completion(8001)?;

    let size = one_too_many(lab)?;
    guest.ok(&format!("systemd-run --quiet --unit=holder2 -p KillMode=process plimsoll lease {size} --name held -- sleep 600"))?;
    let lease = held(lab)?;
    ensure!(lease.lease == "lease:held" && lab.state("small")? == "inactive", "{lease:?}");
    guest.ok(&format!("kill -9 {}", lease.pid))?;
    guest.wait_until("its command has ended with it", PATIENCE, "! pgrep -x sleep")?;
    ended(lab)?;
    guest.wait_until("the model is back", PATIENCE, "systemctl is-active --quiet llm@small.service")?;
    guest.ok("systemctl reset-failed 'holder*'; true").map(drop)
}

/// Waits for a daemon that is not `before` to answer.
fn another_daemon(lab: &Lab, before: u32) -> Result<()> {
    lab.guest.wait_for("another daemon", PATIENCE, |_| {
        Ok(lab.daemon_pid().ok().filter(|pid| *pid != 0 && *pid != before))
    })?;
    lab.guest.wait_until("it answers", PATIENCE, "plimsoll status >/dev/null")
}

/// The names of those that are held.
fn names(lab: &Lab) -> Result<Vec<String>> {
    let held = lab.status()?.leases.into_iter().filter(|lease| lease.state == "held");
    Ok(held.map(|lease| lease.lease).collect())
}

/// "Restart of the daemon keeps it", also one that is killed; one whose holder went away meanwhile is dropped, and one that
/// still waits for room goes on waiting.
pub fn outlives_the_daemon(lab: &mut Lab) -> Result<()> {
    lab.configure(&[])?;
    let guest = &lab.guest;
    guest.ok("systemd-run --quiet --unit=holder plimsoll lease 64MiB --name kept -- sleep 600")?;
    guest.ok("systemd-run --quiet --unit=brief plimsoll lease 32MiB --name brief -- sleep 600")?;
    guest.wait_for("both are held", PATIENCE, |_| Ok((lab.status()?.leases.len() == 2).then_some(())))?;
    let reserved = lab.memory_pool()?.reserved_bytes;
    for how in ["systemctl restart plimsolld.service", "systemctl kill -s KILL plimsolld.service"] {
        let before = lab.daemon_pid()?;
        guest.ok(how)?;
        another_daemon(lab, before)?;
        let names = names(lab)?;
        ensure!(names == ["lease:brief", "lease:kept"], "{how}: {names:?}{}", guest.evidence());
        ensure!(lab.memory_pool()?.reserved_bytes == reserved, "{how}: less is reserved");
        guest.wait_until(
            "their objects",
            PATIENCE,
            "test $(busctl --list tree org.plimsoll1 | grep -c /org/plimsoll1/lease/) = 2",
        )?;
    }
    // One ends while nobody looks.
    guest.ok("systemctl stop plimsolld.service && systemctl stop brief.service && systemctl start plimsolld.service")?;
    guest.wait_until("it answers", PATIENCE, "plimsoll status >/dev/null")?;
    let left = names(lab)?;
    ensure!(left == ["lease:kept"], "after a stop: {left:?}{}", guest.evidence());
    // One that waits for what is held: more than there is by a margin, and less than with that.
    let late = lab.memory_pool()?.headroom_bytes.0 + (32 << 20);
    guest.ok(&format!(
        "systemd-run --quiet --unit=late plimsoll lease {late}B --wait --name late -- sleep 600"
    ))?;
    let waits = |lab: &Lab| -> Result<Option<()>> {
        Ok(lab.status()?.leases.iter().any(|l| l.lease == "lease:late" && l.state != "held").then_some(()))
    };
    guest.wait_for("one waits for room", PATIENCE, |_| waits(lab))?;
    let before = lab.daemon_pid()?;
    guest.ok("systemctl kill -s KILL plimsolld.service")?;
    another_daemon(lab, before)?;
    guest.wait_for("it waits for room again", PATIENCE, |_| waits(lab))?;
    guest.ok("systemctl stop holder.service")?;
    guest.wait_for("the one that waited", PATIENCE, |_| Ok((names(lab)? == ["lease:late"]).then_some(())))?;
    guest.ok("systemctl stop late.service")?;
    ended(lab)?;
    let store = "test $(systemctl show -P NFileDescriptorStore plimsolld.service) = 0";
    guest.wait_until("nothing is left in systemd's store", PATIENCE, store)?;
    guest.ok("systemctl reset-failed 'holder*' 'brief*' 'late*' 2>/dev/null; true").map(drop)
}

/// "A stranger is refused with 77", "a lease that can't fit exits 75", and a member of the group may.
pub fn not_for_strangers(lab: &mut Lab) -> Result<()> {
    lab.configure(&[])?;
    let guest = &lab.guest;
    guest.ok("id member >/dev/null 2>&1 || useradd --create-home --groups plimsoll member; \
              id stranger >/dev/null 2>&1 || useradd --create-home stranger")?;
    let by = |user: &str, command: &str| {
        guest.run(&format!("runuser -u {user} -- plimsoll --no-ask-password {command}"))
    };
    let refused = by("stranger", "lease 16MiB -- true")?;
    ensure!(refused.code == 77, "a stranger: exit {}: {}", refused.code, refused.all());
    let held = by("member", "lease 16MiB -- sh -c 'exit 3'")?;
    ensure!(held.code == 3, "a member: exit {}: {}", held.code, held.all());
    let vast = guest.run("plimsoll lease 1TiB -- true")?;
    ensure!(vast.code == 75 && vast.stderr.contains("was refused"), "exit {}: {}", vast.code, vast.all());
    ended(lab)
}

/// "Each decision is one structured journal line with a catalogue id and the numbers; `plimsoll log`."
pub fn decisions_are_in_the_journal(lab: &mut Lab) -> Result<()> {
    lab.configure(&[Config::new("small", 8001)])?;
    let guest = &lab.guest;
    guest.ok("plimsoll lease 16MiB --name logged -- true")?;
    let refused = guest.run("plimsoll lease 1TiB --name vast -- true")?;
    ensure!(refused.code == 75, "{}", refused.all());
    guest.ok("journalctl --sync")?;
    let json = guest.ok("plimsoll log lease:vast --json -n 1")?;
    let decision: serde_json::Value = serde_json::from_str(&json)?;
    ensure!(decision["kind"] == "refuse" && decision["refusal"]["short_bytes"].as_u64() > Some(0), "{json}");
    ensure!(
        decision["pools"][0]["name"] == "memory" && decision["realtime_usec"].as_u64() > Some(0),
        "{json}"
    );
    let fields = guest.ok("journalctl -u plimsolld.service PLIMSOLL_MODEL=lease:vast -o verbose -n 1")?;
    for field in
        ["MESSAGE_ID=c83de01840b14124bdc32aef360d4144", "PLIMSOLL_VERDICT=refused", "PLIMSOLL_POOL=memory"]
    {
        ensure!(fields.contains(field), "no {field} in {fields}");
    }
    for field in ["PLIMSOLL_NEEDED_BYTES=1099511627776", "PLIMSOLL_AVAILABLE_BYTES=", "PLIMSOLL_SHORT_BYTES="]
    {
        ensure!(fields.contains(field), "no {field} in {fields}");
    }
    let explained = guest.ok("journalctl -x -u plimsolld.service PLIMSOLL_MODEL=lease:vast -n 1")?;
    ensure!(explained.contains("What to do") && explained.contains("lease:vast was refused"), "{explained}");
    let text = guest.ok("plimsoll log -n 2")?;
    ensure!(text.lines().count() == 2 && text.contains("admit") && !text.contains('\u{1b}'), "{text}");
    let stranger = guest.run(
        "id stranger >/dev/null 2>&1 || useradd --create-home stranger; runuser -u stranger -- plimsoll log",
    )?;
    ensure!(
        stranger.code == 77 && stranger.stderr.contains("systemd-journal"),
        "{}: {}",
        stranger.code,
        stranger.all()
    );
    let wrong = guest.run("plimsoll log --since sometime")?;
    ensure!(wrong.code == 2, "{}: {}", wrong.code, wrong.all());
    // Once it has shown what there is, it follows.
    guest.ok("plimsoll log -f > /run/followed 2>&1 < /dev/null & echo $! > /run/follower")?;
    guest.wait_until("it follows", PATIENCE, "grep -q lease:vast /run/followed")?;
    guest.ok("plimsoll lease 16MiB --name seen -- true")?;
    guest.wait_until("it has seen the next", PATIENCE, "grep -q 'lease:seen is admitted' /run/followed")?;
    guest.ok("kill $(cat /run/follower)")?;
    ended(lab)
}

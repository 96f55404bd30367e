//! Who may do what, and what nobody gets to see.

use crate::lab::{Config, Lab};
use anyhow::{Result, ensure};

/// "A group `plimsoll`": its members load and unload without a password, others don't.
pub fn group_members_may_load(lab: &mut Lab) -> Result<()> {
    lab.configure(&[Config::new("small", 8001)])?;
    let guest = &lab.guest;
    guest.ok("id member >/dev/null 2>&1 || useradd --create-home --groups plimsoll member; \
              id stranger >/dev/null 2>&1 || useradd --create-home stranger")?;
    let by = |user: &str, command: &str| guest.run(&format!("runuser -u {user} -- {command}"));
    let refused = by("stranger", "plimsoll --no-ask-password load small")?;
    ensure!(refused.code == 77, "a stranger: exit {}: {}", refused.code, refused.all());
    let loaded = by("member", "plimsoll load small")?;
    ensure!(loaded.code == 0, "a member: exit {}: {}", loaded.code, loaded.all());
    guest.completion(8001)?;
    let read = by("stranger", "plimsoll status")?;
    ensure!(read.code == 0 && read.stdout.contains("small"), "reading: {}", read.all());
    // Configuring stays with administrators.
    let configured = by("member", "plimsoll --no-ask-password mode observe")?;
    ensure!(configured.code == 77, "a member configures: exit {}: {}", configured.code, configured.all());
    let unloaded = by("member", "plimsoll unload small")?;
    ensure!(unloaded.code == 0, "a member unloads: exit {}: {}", unloaded.code, unloaded.all());
    Ok(())
}

/// The server runs as its own user, sandboxed, and mounts that its model lies on are required.
pub fn engine_is_unprivileged(lab: &mut Lab) -> Result<()> {
    lab.configure(&[Config::new("small", 8001)])?;
    lab.serve("small", 8001)?;
    let pid = lab.main_pid("small")?;
    let guest = &lab.guest;
    let status = guest.ok(&format!(
        "ps -o user= -p {pid}; grep -E '^(CapEff|NoNewPrivs)' /proc/{pid}/status; cat /proc/{pid}/comm"
    ))?;
    for word in ["plimsoll-llm", "CapEff:\t0000000000000000", "NoNewPrivs:\t1", "llama-server"] {
        // ps cuts long names with a plus sign.
        ensure!(
            status.contains(word) || status.replace('+', "").contains(&word[..7]),
            "no {word:?} in {status}"
        );
    }
    let mounts = lab.property("small", "RequiresMountsFor")?;
    ensure!(mounts.contains("/srv/models"), "the generator did not require the mount: {mounts:?}");
    Ok(())
}

/// "Secrets never appear on the bus, in the journal, in JSON or in arguments."
pub fn secrets_stay_secret(lab: &mut Lab) -> Result<()> {
    const SECRET: &str = "c0ffee-of-the-harbour-master";
    lab.guest.ok(&format!(
        "install -m 0640 -o root -g plimsoll-llm /dev/null /etc/plimsoll/keys/small && echo {SECRET} > /etc/plimsoll/keys/small"
    ))?;
    lab.configure(&[Config::new("small", 8001).with("api-key-file = \"/etc/plimsoll/keys/small\"")])?;
    let started = lab.start("small")?;
    ensure!(started.code == 0, "{}{}", started.all(), lab.guest.evidence());
    let pid = lab.main_pid("small")?;
    let without = "curl -s -o /dev/null -w '%{http_code}' -d '{\"prompt\":\"a\",\"n_predict\":1}' http://127.0.0.1:8001/completion";
    ensure!(lab.guest.ok(without)? == "401", "the key is not asked for");
    let with = format!("{without} -H 'Authorization: Bearer {SECRET}'");
    ensure!(lab.guest.ok(&with)? == "200", "the key is not accepted");
    for place in [
        format!("tr '\\0' '\\n' < /proc/{pid}/cmdline"),
        "plimsoll status --json".into(),
        "plimsoll explain small --json".into(),
        "journalctl -b --no-pager -o export".into(),
        "busctl call org.plimsoll1 /org/plimsoll1 org.plimsoll1.Manager Status".into(),
    ] {
        let found = lab.guest.run(&format!("{place} | grep -a -c 'c0ffee-of-the-'"))?;
        // The journal has this very search in it when ssh sessions are logged; sshd does not do that.
        ensure!(found.stdout.trim() == "0", "the key shows in: {place}");
    }
    Ok(())
}

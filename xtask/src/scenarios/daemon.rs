//! The daemon goes and comes back; models don't notice.

use crate::deb;
use crate::lab::{Config, Lab, PATIENCE};
use anyhow::{Result, ensure};

fn configs() -> [Config; 3] {
    [
        Config::new("small", 8001),
        Config::new("large", 8002).priority(60),
        Config::new("impossible", 8003).priority(90),
    ]
}

/// Lets one model serve and has another load for a while: its reads are slowed down.
fn serve_one_and_load_one(lab: &Lab) -> Result<()> {
    lab.configure(&configs())?;
    lab.serve("small", 8001)?;
    lab.guest.ok("systemctl set-property --runtime llm@large.service 'IOReadBandwidthMax=/dev/vdb 40M'")?;
    lab.guest.ok("systemctl start --no-block llm@large.service")?;
    lab.guest.wait_until(
        "large loads its weights",
        PATIENCE,
        "test \"$(cat /proc/$(systemctl show --value -p MainPID llm@large.service)/comm)\" = llama-server",
    )
}

/// Both models go on as before, and the ledger knows them.
fn both_went_on(lab: &Lab, before: &std::collections::BTreeMap<String, u32>) -> Result<()> {
    lab.guest.wait_until("large is loaded", PATIENCE, "systemctl is-active --quiet llm@large.service")?;
    for name in ["small", "large"] {
        ensure!(lab.main_pid(name)? == before[name], "{name} was restarted\n{}", lab.guest.evidence());
    }
    lab.guest.completion(8001)?;
    lab.guest.completion(8002)?;
    lab.guest.wait_for("the ledger holds both", PATIENCE, |_| {
        let status = lab.status()?;
        let running = |name: &str| {
            status.models.iter().any(|m| m.instance == name && m.state == "running" && m.pid == before[name])
        };
        Ok((running("small") && running("large")).then_some(()))
    })?;
    let reserved = lab.memory_pool()?.reserved_bytes;
    let predicted = lab.model("small")?.predicted.total() + lab.model("large")?.predicted.total();
    ensure!(
        reserved + plimsoll::bytes::Bytes::mib(64) >= predicted,
        "{reserved} are reserved for models that take {predicted}"
    );
    // And it still decides.
    lab.refused("impossible", 75, &["GiB"]).map(|_| ())
}

/// "`kill -9` of the daemon while one model serves and another loads: both models go on with the same
/// MainPID; the ledger is right afterwards."
pub fn killed_while_models_run_and_load(lab: &mut Lab) -> Result<()> {
    serve_one_and_load_one(lab)?;
    let before = lab.main_pids(&["small", "large"])?;
    let daemon = lab.daemon_pid()?;
    lab.guest.ok(&format!("kill -9 {daemon}"))?;
    lab.guest.wait_for("systemd restarted the daemon", PATIENCE, |_| {
        let now = lab.daemon_pid()?;
        Ok((now != 0 && now != daemon).then_some(()))
    })?;
    both_went_on(lab, &before)
}

/// "A start while the daemon is down waits and then passes."
pub fn start_waits_for_the_daemon(lab: &mut Lab) -> Result<()> {
    lab.configure(&configs())?;
    // Masked, so that neither the bus nor the unit's Wants= brings it up.
    lab.guest.ok("systemctl stop plimsolld.service && systemctl mask --runtime --quiet plimsolld.service")?;
    lab.guest.ok("systemctl start --no-block llm@small.service")?;
    lab.guest.wait_until(
        "the start waits at the gate",
        PATIENCE,
        "test \"$(cat /proc/$(systemctl show --value -p MainPID llm@small.service)/comm)\" = plimsoll",
    )?;
    ensure!(lab.state("small")? == "activating", "{}", lab.unit_status("small")?);
    lab.guest
        .ok("systemctl unmask --runtime --quiet plimsolld.service && systemctl start plimsolld.service")?;
    lab.guest.wait_until("small runs", PATIENCE, "systemctl is-active --quiet llm@small.service")?;
    lab.guest.completion(8001).map(|_| ())
}

/// "`dpkg -i` of a newer package [while one model serves and another loads]: both models go on with
/// the same MainPID; the ledger is right afterwards."
pub fn upgrade_keeps_models(lab: &mut Lab) -> Result<()> {
    let newer = deb::build(&lab.profile, "+1")?;
    serve_one_and_load_one(lab)?;
    let before = lab.main_pids(&["small", "large"])?;
    let daemon = lab.daemon_pid()?;
    lab.install(&newer)?;
    ensure!(lab.guest.ok("dpkg-query -W -f '${Version}' plimsoll")?.ends_with("+1"), "not upgraded");
    let now = lab.daemon_pid()?;
    ensure!(now != 0 && now != daemon, "the upgrade did not restart the daemon");
    both_went_on(lab, &before)
}

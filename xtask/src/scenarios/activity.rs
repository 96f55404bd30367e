//! Who is busy, as real engines say it, and time for them to finish.

use crate::lab::{Config, Lab, PATIENCE};
use anyhow::{Context, Result, ensure};
use plimsoll::bytes::Bytes;
use std::time::Duration;

/// A request for `tokens` tokens to the model on `port`, which goes on in a unit of its own.
fn ask(lab: &Lab, port: u16, tokens: u32, key: Option<&str>) -> Result<()> {
    let body = format!(r#"{{"prompt":"The mark on the hull","n_predict":{tokens},"ignore_eos":true}}"#);
    lab.guest.write("/run/asker.json", &body)?;
    let key = key.map(|key| format!("-H 'Authorization: Bearer {key}' ")).unwrap_or_default();
    lab.guest.ok(&format!(
        "systemctl stop asker.service 2>/dev/null; systemctl reset-failed asker.service 2>/dev/null; rm -f /run/asker.out; \
         systemd-run --quiet --unit=asker --property=RemainAfterExit=yes curl -sS --max-time 290 -o /run/asker.out \
         -H 'Content-Type: application/json' {key}-d @/run/asker.json http://127.0.0.1:{port}/completion"
    ))?;
    Ok(())
}

/// A request that takes about so many seconds on this machine; returns how many tokens it is for.
fn ask_for_seconds(lab: &Lab, port: u16, seconds: f64, key: Option<&str>) -> Result<u32> {
    ask(lab, port, 8, key)?;
    let reply = reply(lab)?;
    let rate =
        reply["timings"]["predicted_per_second"].as_f64().with_context(|| format!("no rate: {reply}"))?;
    // No more than there is room for in the context of the test models.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small positive number")]
    let tokens = (rate * seconds).clamp(8.0, 900.0) as u32;
    ask(lab, port, tokens, key)?;
    Ok(tokens)
}

/// What the request got; fails when it was cut off.
fn reply(lab: &Lab) -> Result<serde_json::Value> {
    lab.guest.wait_until(
        "the request has ended",
        PATIENCE,
        "systemctl show -P SubState asker.service | grep -qx -e exited -e failed",
    )?;
    let code = lab.guest.ok("systemctl show -P ExecMainStatus asker.service")?;
    let reply = lab.guest.run("cat /run/asker.out")?.stdout;
    ensure!(
        code == "0",
        "the request was cut off: curl exited with {code}: {reply}\n{}",
        lab.guest.evidence()
    );
    serde_json::from_str(&reply).with_context(|| format!("not JSON: {reply}"))
}

/// Fails when the request was cut off, or got fewer tokens than it was for.
fn is_answered(lab: &Lab, tokens: u32) -> Result<()> {
    let reply = reply(lab)?;
    ensure!(reply["tokens_predicted"] == tokens, "not {tokens} tokens: {reply}");
    Ok(())
}

fn is_busy(lab: &Lab, instance: &str) -> Result<()> {
    lab.guest.wait_for(&format!("{instance} says that it is busy"), Duration::from_secs(60), |_| {
        Ok((lab.model(instance)?.requests == Some(1)).then_some(()))
    })
}

/// A model with a request in flight is not expired, however long it takes; one asked with its key says so. Idle, it is.
pub fn a_ttl_ends_no_request(lab: &mut Lab) -> Result<()> {
    const KEY: &str = "the-key-of-the-lock-keeper";
    lab.guest.ok(&format!(
        "install -m 0640 -o root -g plimsoll-llm /dev/null /etc/plimsoll/keys/small && echo {KEY} > /etc/plimsoll/keys/small"
    ))?;
    let config =
        Config::new("small", 8001).with("ttl = \"8s\"").with("api-key-file = \"/etc/plimsoll/keys/small\"");
    lab.configure(&[config.with("engine-args = [\"--metrics\"]")])?;
    let cursor = lab.guest.journal_cursor()?;
    let started = lab.start("small")?;
    ensure!(started.code == 0, "{}{}", started.all(), lab.guest.evidence());
    let before = lab.main_pid("small")?;
    let tokens = ask_for_seconds(lab, 8001, 30.0, Some(KEY))?;
    is_busy(lab, "small")?;
    is_answered(lab, tokens)?;
    let took = lab.guest.ok(
        "systemctl show -P ExecMainExitTimestampMonotonic -P ExecMainStartTimestampMonotonic asker.service",
    )?;
    let times: Vec<u64> = took.split_whitespace().filter_map(|text| text.parse().ok()).collect();
    let took = times.iter().max().zip(times.iter().min()).map_or(0, |(end, start)| (end - start) / 1_000_000);
    println!("          a request of {took} s outlived a ttl of 8 s");
    ensure!(took > 8, "the request took {took} s, which proves nothing");
    ensure!(lab.main_pid("small")? == before, "small was stopped and started again");
    lab.guest.wait_until(
        "the idle model is stopped",
        PATIENCE,
        "systemctl show -P ActiveState llm@small.service | grep -qx inactive",
    )?;
    let journal = lab.guest.journal_since(&cursor, "-u plimsolld.service")?;
    ensure!(journal.contains("idle past its ttl"), "{journal}");
    let found =
        lab.guest.run("journalctl -b --no-pager -o export -u plimsolld | grep -c the-key-of-the-lock")?;
    ensure!(found.stdout.trim() == "0", "the key shows in the journal");
    Ok(())
}

/// Of models of the same priority the idle one goes, though the busy one was loaded first.
pub fn idle_goes_before_busy(lab: &mut Lab) -> Result<()> {
    let crowd = |n: u16| Config::new(&format!("crowd-{n}"), 8100 + n).priority(40);
    let mut configs: Vec<Config> = (0..5).map(crowd).collect();
    configs.push(Config::new("crowd-9", 8109).priority(80));
    lab.configure(&configs)?;
    let mut running: Vec<String> = Vec::new();
    for n in 0..5 {
        let plan = lab.plan("crowd-9")?;
        if plan.steps.iter().any(|step| step.step == "stop") {
            break;
        }
        lab.serve(&format!("crowd-{n}"), 8100 + n)?;
        running.push(format!("crowd-{n}"));
    }
    ensure!(running.len() >= 2, "only {running:?} run");
    let plan = lab.plan("crowd-9")?;
    let natural =
        plan.steps.iter().find(|step| step.step == "stop").context("nobody has to go")?.instance.clone();
    let port = 8100 + natural.rsplit('-').next().and_then(|n| n.parse::<u16>().ok()).context("no number")?;
    let before = lab.main_pid(&natural)?;
    ask_for_seconds(lab, port, 120.0, None)?;
    is_busy(lab, &natural)?;
    lab.serve("crowd-9", 8109)?;
    ensure!(lab.main_pid(&natural)? == before, "{natural} was stopped while it was busy");
    let gone: Vec<&String> =
        running.iter().filter(|name| lab.state(name).is_ok_and(|state| state == "inactive")).collect();
    ensure!(gone.len() == 1 && *gone[0] != natural, "{gone:?} went, {natural} was busy");
    println!("          {natural} was to go, and was busy: {gone:?} went");
    lab.guest.ok("systemctl stop asker.service")?;
    lab.no_oom_kill()
}

/// One that has to go is announced with its deadline, ends its request, and only then is stopped.
pub fn requests_end_before_the_stop(lab: &mut Lab) -> Result<()> {
    lab.configure(&[
        Config::new("rival-a", 8001).priority(40).with("drain = \"4min\""),
        Config::new("rival-b", 8002).priority(70),
    ])?;
    lab.serve("rival-a", 8001)?;
    let tokens = ask_for_seconds(lab, 8001, 50.0, None)?;
    is_busy(lab, "rival-a")?;
    lab.guest.ok(
        "systemctl stop listener.service 2>/dev/null; rm -f /run/heard; systemd-run --quiet --unit=listener \
         --property=StandardOutput=file:/run/heard busctl monitor --match \"interface='org.plimsoll1.Manager',member='AboutToEvict'\"",
    )?;
    lab.guest.wait_until("the listener listens", PATIENCE, "systemctl is-active --quiet listener.service")?;
    lab.guest.ok("systemctl start --no-block llm@rival-b.service")?;
    lab.guest.wait_for("it waits for the request", PATIENCE, |_| {
        let status = lab.unit_status("rival-b")?;
        Ok(status.contains("waiting for rival-a to finish 1 request, 240 s at most").then_some(()))
    })?;
    ensure!(lab.state("rival-a")? == "active", "rival-a was stopped");
    is_answered(lab, tokens)?;
    lab.guest.wait_until("rival-b answers", PATIENCE, "systemctl is-active --quiet llm@rival-b.service")?;
    ensure!(lab.state("rival-a")? == "inactive", "{}", lab.unit_status("rival-a")?);
    let heard = lab.guest.ok("systemctl stop listener.service; cat /run/heard")?;
    ensure!(heard.contains("rival-a") && heard.contains("rival-b"), "not announced: {heard}");
    let deadline =
        heard.split("UINT64 ").nth(1).and_then(|rest| rest.split(';').next()?.trim().parse::<u64>().ok());
    let ends = lab
        .guest
        .ok("systemctl show -P InactiveEnterTimestampMonotonic llm@rival-a.service")?
        .parse::<u64>()?;
    ensure!(
        deadline.is_some_and(|deadline| deadline > ends),
        "deadline {deadline:?}, stopped at {ends}: {heard}"
    );
    lab.no_oom_kill()
}

/// A server of somebody else, adopted by its unit's name: counted as it is measured, stopped through systemd for a
/// model of higher priority, and back when there is room.
pub fn an_adopted_service_goes_and_returns(lab: &mut Lab) -> Result<()> {
    lab.guest.write(
        "/etc/systemd/system/foreign.service",
        "[Service]\nExecStart=/usr/bin/llama-server -m /srv/models/rival-a.gguf --load-mode none --fit off -c 1024 \
         --port 8009\nRestart=always\nSuccessExitStatus=143\nDynamicUser=yes\n",
    )?;
    lab.guest
        .write("/etc/plimsoll/plimsoll.toml.d/adopt.toml", "[adopt.\"foreign.service\"]\npriority = 40\n")?;
    lab.configure(&[Config::new("rival-b", 8002).priority(70), Config::new("small", 8001).priority(30)])?;
    lab.guest.ok("systemctl start foreign.service")?;
    let held = lab.guest.wait_for("it is counted as it is measured", PATIENCE, |_| {
        let foreign = lab.model("foreign.service")?;
        ensure!(foreign.foreign, "it is shown as a model: {foreign:?}");
        let reserved = lab.memory_pool()?.reserved_bytes;
        let whole = foreign.state == "running" && foreign.measured.private_bytes > Bytes::mib(800);
        Ok((whole && reserved >= foreign.measured.private_bytes).then_some(reserved))
    })?;
    println!("          {held} are held for it");
    let refused = lab.guest.run("plimsoll unload foreign.service")?;
    ensure!(
        refused.code == 78 && refused.stderr.contains("systemctl stop foreign.service"),
        "{}",
        refused.all()
    );
    lab.serve("rival-b", 8002)?;
    let state = lab.guest.ok("systemctl show -P ActiveState foreign.service")?;
    ensure!(state == "inactive", "foreign.service is {state}\n{}", lab.guest.evidence());
    let said = lab.model("foreign.service")?.message;
    ensure!(said.contains("comes back"), "{said}");
    lab.guest.ok("systemctl stop llm@rival-b.service")?;
    lab.guest.wait_until(
        "the foreign service is back",
        PATIENCE,
        "systemctl is-active --quiet foreign.service",
    )?;
    lab.guest.wait_for("it is counted again", PATIENCE, |_| {
        Ok((lab.model("foreign.service")?.predicted.private_bytes > Bytes::mib(800)).then_some(()))
    })?;
    let table = lab.guest.ok("plimsoll status")?;
    ensure!(table.contains("+ adopted"), "{table}");
    lab.guest.ok("systemctl stop foreign.service; rm /etc/plimsoll/plimsoll.toml.d/adopt.toml /etc/systemd/system/foreign.service")?;
    lab.no_oom_kill()
}

//! Files and machines that are not as they should be: one clear line each, and nothing is touched.

use crate::lab::{Config, Lab};
use crate::models::broken::HOSTILE;
use anyhow::{Result, ensure};

/// A model that runs, so that something could be stopped for the broken one.
fn with_bystander(lab: &Lab, broken: Config, check: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    lab.configure(&[Config::new("small", 8001).priority(10), broken])?;
    if lab.state("small")? != "active" {
        lab.serve("small", 8001)?;
    }
    let before = lab.main_pid("small")?;
    check(lab)?;
    ensure!(lab.main_pid("small")? == before, "small was stopped for it");
    Ok(())
}

/// "Missing shard 3 of 4, a half-downloaded shard: each fails naming it, and nothing was stopped for it."
pub fn missing_and_half_shards(lab: &mut Lab) -> Result<()> {
    for name in ["missing", "half"] {
        let config = Config::new(name, 8002).split(&format!("{name}/model"), 4).priority(90);
        with_bystander(lab, config, |lab| lab.refused(name, 78, &["model-00003-of-00004.gguf"]).map(|_| ()))?;
    }
    Ok(())
}

/// "A directory 0700: fails naming it, and nothing was stopped for it."
pub fn closed_directory(lab: &mut Lab) -> Result<()> {
    lab.guest
        .ok("mkdir -p /srv/models/private && ln -f /srv/models/small.gguf /srv/models/private/model.gguf \
         && chmod 0700 /srv/models/private")?;
    let config = Config::new("private", 8002).file("private/model.gguf").priority(90);
    with_bystander(lab, config, |lab| {
        lab.refused("private", 78, &["/srv/models/private", "plimsoll-llm"]).map(|_| ())
    })
}

/// "A port taken: fails naming it, and nothing was stopped for it."
pub fn port_taken(lab: &mut Lab) -> Result<()> {
    // A listener that is no model.
    lab.guest.ok("systemd-run --quiet --collect --unit=squatter --socket-property=Accept=yes \
         --listen-stream=127.0.0.1:8777 cat 2>/dev/null || \
         systemd-run --quiet --collect --unit=squatter --socket-property=ListenStream=127.0.0.1:8777 \
         --socket-property=Accept=yes cat")?;
    let config = Config::new("mid", 8777).split("mid", 4).priority(90);
    let shown = with_bystander(lab, config, |lab| lab.refused("mid", 78, &["8777"]).map(|_| ()));
    lab.guest.ok("systemctl stop squatter.socket")?;
    shown
}

/// "A truncated, an empty, a text and a hostile GGUF (huge counts, lengths, nested arrays): one clear
/// line each, exit 1, under 50 MB of memory; the daemon lives."
pub fn hostile_headers(lab: &mut Lab) -> Result<()> {
    let daemon = lab.daemon_pid()?;
    for name in HOSTILE {
        let path = format!("/srv/models/hostile/{name}.gguf");
        // A unit of its own, which the kernel kills beyond 50 MB.
        let done = lab.guest.run(&format!(
            "systemd-run --quiet --collect --pipe --wait -p MemoryMax=50M -p MemorySwapMax=0 plimsoll fit {path}"
        ))?;
        ensure!(done.code == 1, "plimsoll fit {path} exits with {}: {}", done.code, done.all());
        let said: Vec<&str> = done.stderr.lines().filter(|line| !line.trim().is_empty()).collect();
        ensure!(
            said.first().is_some_and(|line| line.contains(name)),
            "does not name the file: {}",
            done.stderr
        );
        ensure!(said.len() <= 2, "more than a sentence and a hint: {}", done.stderr);

        let config = Config::new("hostile", 8002).file(&format!("hostile/{name}.gguf")).priority(90);
        lab.configure(&[config])?;
        let started = lab.start("hostile")?;
        ensure!(started.code != 0, "{name} started");
        let shown = lab.unit_status("hostile")?;
        ensure!(shown.contains(name), "{name} is not named: {shown}");
        ensure!(lab.property("hostile", "NRestarts")? == "0", "restarted: {shown}");
        lab.guest.ok("systemctl reset-failed llm@hostile.service")?;
    }
    ensure!(lab.daemon_pid()? == daemon, "the daemon did not live");
    Ok(())
}

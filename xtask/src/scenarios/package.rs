//! The Debian package in a real machine.

use crate::lab::{Config, Lab};
use anyhow::{Result, ensure};

/// The project's own `.deb` is what is installed: the daemon runs and is enabled, users are there,
/// systemd has nothing to say about the units, and no unit of the machine failed.
pub fn installs_in_good_order(lab: &mut Lab) -> Result<()> {
    let guest = &lab.guest;
    guest.ok(
        "systemctl is-active --quiet plimsolld.service && systemctl is-enabled --quiet plimsolld.service",
    )?;
    guest.ok("getent passwd plimsoll-llm && getent group plimsoll && dpkg --verify plimsoll")?;
    let said = guest.run("systemd-analyze verify plimsolld.service llm@example.service")?.all();
    ensure!(!said.contains("plimsoll") && !said.contains("llm@"), "systemd-analyze verify: {said}");
    let state = guest.run("systemctl is-system-running; systemctl --failed --no-legend")?.all();
    ensure!(state.starts_with("running"), "{state}\n{}", guest.evidence());
    // Everyone may read; the bus brings the daemon up by itself.
    guest.ok("busctl call org.plimsoll1 /org/plimsoll1 org.plimsoll1.Manager Status")?;
    guest.ok("setpriv --reuid=nobody --clear-groups plimsoll status")?;
    // Another user changes nothing without being asked for a password.
    let done = guest.run("setpriv --reuid=nobody --clear-groups plimsoll --no-ask-password mode observe")?;
    ensure!(done.code == 77, "nobody may set the mode: exit {}: {}", done.code, done.all());
    Ok(())
}

/// Removing and purging the package leaves running models, the models' files and the
/// administrator's configuration alone.
pub fn purge_keeps_models(lab: &mut Lab) -> Result<()> {
    lab.configure(&[Config::new("small", 8001)])?;
    lab.serve("small", 8001)?;
    let before = lab.main_pid("small")?;
    lab.guest.ok("mkdir -p /var/cache/plimsoll/small && touch /var/cache/plimsoll/small/download.gguf")?;
    lab.guest.ok("dpkg --purge plimsoll")?;
    lab.guest.ok(&format!("test -d /proc/{before}"))?;
    lab.guest.completion(8001)?;
    lab.guest
        .ok("test -e /var/cache/plimsoll/small/download.gguf && test -e /etc/plimsoll/models.d/small.toml")?;
    lab.guest.ok("test ! -e /var/lib/plimsoll && ! systemctl is-active --quiet plimsolld.service")?;
    lab.guest.ok(&format!("kill {before}"))?;
    let package = lab.package.clone();
    lab.install(&package).map(|_| ())
}

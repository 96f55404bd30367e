//! The Debian package in a real machine.

use crate::lab::{Config, Lab, PATIENCE};
use crate::{host, install};
use anyhow::{Context, Result, ensure};
use std::process::Command;

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
    // Whoever administers the machine is protected from models at once, without a restart of anything.
    let protected = guest.ok(
        "cd /sys/fs/cgroup && cat system.slice/memory.min user.slice/memory.min init.scope/memory.min \
         system.slice/ssh.service/memory.min system.slice/memory.low",
    )?;
    let protected: Vec<u64> = protected.lines().filter_map(|line| line.parse().ok()).collect();
    ensure!(protected.len() == 5 && !protected.contains(&0), "not protected: {protected:?}");
    // Its stacks are not rounded up to huge pages, which would be locked.
    let sizes = guest.ok("cat /proc/$(systemctl show --value -p MainPID plimsolld.service)/status")?;
    ensure!(sizes.lines().any(|line| line == "THP_enabled:\t0"), "it may have huge pages: {sizes}");
    // Everyone may read; the bus brings the daemon up by itself.
    guest.ok("busctl call org.plimsoll1 /org/plimsoll1 org.plimsoll1.Manager Status")?;
    guest.ok("setpriv --reuid=nobody --clear-groups plimsoll status")?;
    // Another user changes nothing without being asked for a password.
    let done = guest.run("setpriv --reuid=nobody --clear-groups plimsoll --no-ask-password mode observe")?;
    ensure!(done.code == 77, "nobody may set the mode: exit {}: {}", done.code, done.all());
    Ok(())
}

/// Brings this tool, the programs and what `install` reads of the source tree into the guest.
fn bring_the_tree(lab: &Lab) -> Result<()> {
    let root = host::source_root();
    let programs = install::build(&lab.profile)?;
    let archive = root.join("target/vm/tree.tar");
    let tree = root.join("target/vm/tree");
    let _ = std::fs::remove_dir_all(&tree);
    std::fs::create_dir_all(&tree)?;
    // Not its path: that leads nowhere once the tool was built again while it runs.
    let tool = std::path::PathBuf::from(format!("/proc/{}/exe", std::process::id()));
    for (from, name) in
        [(programs.join("plimsoll"), "plimsoll"), (programs.join("plimsolld"), "plimsolld"), (tool, "xtask")]
    {
        match host::find("strip") {
            Some(strip) => host::run(Command::new(strip).arg("-o").arg(tree.join(name)).arg(&from))?,
            None => std::fs::copy(&from, tree.join(name)).map(|_| ())?,
        }
    }
    let mut tar = Command::new(host::find("tar").context("tar is not installed")?);
    tar.arg("--create").arg("--file").arg(&archive);
    tar.arg("-C").arg(&tree).args(["plimsoll", "plimsolld", "xtask"]);
    tar.arg("-C").arg(&root).args(["systemd", "config", "packaging", "README.md", "CHANGELOG.md"]);
    host::run(tar.args(["LICENSE-MIT", "LICENSE-APACHE"]))?;
    lab.guest.copy_in(&archive, "/root/tree.tar")?;
    lab.guest
        .ok("rm -rf /root/tree && mkdir /root/tree && tar -xf /root/tree.tar -C /root/tree --no-same-owner && rm /root/tree.tar")
        .map(|_| ())
}

/// `cargo xtask install` on a machine without the package: everything is in its place and works,
/// a second one is an upgrade that stops no model, and the package can take over.
pub fn installs_without_a_package(lab: &mut Lab) -> Result<()> {
    lab.guest.ok("dpkg --purge plimsoll && test ! -e /usr/bin/plimsoll")?;
    bring_the_tree(lab)?;
    let install = || lab.guest.ok_within("cd /root/tree && ./xtask install --programs .", PATIENCE);
    let said = install()?;
    let next = said.lines().find_map(|line| line.strip_prefix("installed; now: "));
    let next = next.with_context(|| format!("it does not say what comes next: {said}"))?;
    lab.guest.ok(next)?;
    let verified = lab.guest.run("systemd-analyze verify plimsolld.service llm@example.service")?.all();
    ensure!(
        !verified.contains("plimsoll") && !verified.contains("llm@"),
        "systemd-analyze verify: {verified}"
    );
    lab.configure(&[Config::new("small", 8001)])?;
    lab.serve("small", 8001)?;
    let (model, daemon) = (lab.main_pid("small")?, lab.daemon_pid()?);
    install()?;
    ensure!(lab.main_pid("small")? == model, "the model was restarted\n{}", lab.guest.evidence());
    ensure!(lab.daemon_pid()? != daemon, "the daemon was not restarted\n{}", lab.guest.evidence());
    lab.guest.wait_for("the ledger holds the model", PATIENCE, |_| {
        Ok((lab.model("small")?.state == "running").then_some(()))
    })?;
    lab.guest.completion(8001)?;
    let package = lab.package.clone();
    lab.install(&package)?;
    ensure!(lab.main_pid("small")? == model, "the package restarted the model\n{}", lab.guest.evidence());
    lab.guest
        .ok("rm -r /root/tree; dpkg --verify plimsoll && systemctl is-active --quiet plimsolld.service")
        .map(|_| ())
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

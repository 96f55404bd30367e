//! What happens when the machine boots.

use crate::lab::{Config, Lab, PATIENCE};
use anyhow::{Result, ensure};

/// "Three enabled units that can't coexist, then a reboot: the highest priority runs, the machine is
/// well." And of `llm@impossible`: refused "at boot too".
pub fn rivals_and_impossible_at_boot(lab: &mut Lab) -> Result<()> {
    lab.configure(&[
        Config::new("rival-a", 8001).priority(40),
        Config::new("rival-b", 8002).priority(70),
        Config::new("rival-c", 8003).priority(60),
        Config::new("impossible", 8004).priority(90),
    ])?;
    lab.guest.ok("systemctl enable --quiet llm@rival-a llm@rival-b llm@rival-c llm@impossible")?;
    lab.guest.reboot_and_wait()?;
    lab.guest.wait_until(
        "every start is decided",
        PATIENCE,
        "! systemctl list-jobs --no-legend | grep -q llm@",
    )?;
    ensure!(lab.state("rival-b")? == "active", "the highest priority does not run\n{}", lab.guest.evidence());
    lab.guest.completion(8002)?;
    for name in ["rival-a", "rival-c", "impossible"] {
        ensure!(lab.state(name)? == "failed", "{name} is {}\n{}", lab.state(name)?, lab.guest.evidence());
        ensure!(lab.property(name, "ExecMainStatus")? == "75", "{}", lab.unit_status(name)?);
        ensure!(lab.property(name, "NRestarts")? == "0", "{name} was restarted: {}", lab.unit_status(name)?);
        let shown = lab.unit_status(name)?;
        ensure!(shown.contains("GiB"), "no arithmetic in the status of {name}: {shown}");
    }
    // Boot did not wait for a model: multi-user.target was reached before the engine was.
    let times =
        lab.guest.ok("systemctl show --value -p ActiveEnterTimestampMonotonic multi-user.target; \
         systemctl show --value -p ExecMainStartTimestampMonotonic llm@rival-b.service")?;
    let times: Vec<u64> = times.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    ensure!(times.len() == 2 && times[0] <= times[1], "the boot waited for a model: {times:?}");
    lab.no_oom_kill()
}

/// The power fails while a model serves: after the next boot the daemon's state is whole, nothing is
/// reserved for what no longer runs, and the model starts again.
pub fn power_fails(lab: &mut Lab) -> Result<()> {
    lab.configure(&[Config::new("small", 8001)])?;
    lab.serve("small", 8001)?;
    lab.guest.reset_and_wait()?;
    lab.guest.wait_until("the daemon is up", PATIENCE, "systemctl is-active --quiet plimsolld.service")?;
    let pool = lab.memory_pool()?;
    ensure!(pool.reserved_bytes.is_zero(), "{} are still reserved", pool.reserved_bytes);
    lab.serve("small", 8001)
}

/// The disk of an enabled model is not there at boot: the boot goes on without it, and when the disk
/// is mounted after all, the model starts.
pub fn a_late_mount_starts_its_models(lab: &mut Lab) -> Result<()> {
    let line = "/var/tmp/late.img /mnt/late ext4 loop,nofail,x-systemd.device-timeout=1s 0 0";
    lab.configure(&[Config::new("rival-a", 8001).at("/mnt/late/small.gguf")])?;
    lab.guest
        .ok(&format!("cp /etc/fstab /etc/fstab.kept; echo '{line}' >> /etc/fstab; mkdir -p /mnt/late"))?;
    lab.guest.ok("systemctl enable --quiet llm@rival-a")?;
    lab.guest.reboot_and_wait()?;
    ensure!(lab.state("rival-a")? == "inactive", "{}", lab.unit_status("rival-a")?);
    // Filled elsewhere: whatever is mounted at the place itself starts the model at once.
    lab.guest.ok_within(
        "mkdir /var/tmp/late && cp /srv/models/small.gguf /var/tmp/late/ \
         && mkfs.ext4 -q -d /var/tmp/late /var/tmp/late.img 256M && rm -r /var/tmp/late && systemctl start mnt-late.mount",
        PATIENCE,
    )?;
    lab.guest.wait_until("the model runs", PATIENCE, "systemctl is-active --quiet llm@rival-a.service")?;
    lab.guest.completion(8001)?;
    lab.guest.ok(
        "systemctl disable --quiet --now llm@rival-a; systemctl stop mnt-late.mount; mv /etc/fstab.kept /etc/fstab; \
         rm -r /mnt/late /var/tmp/late.img; systemctl daemon-reload",
    )?;
    Ok(())
}

//! What talks to systemd and to cgroups, by itself on a real systemd: `tests/systemd.rs`.

use crate::host;
use crate::lab::{Lab, PATIENCE};
use anyhow::{Context, Result, ensure};
use std::path::PathBuf;
use std::process::Command;

/// Where the tests' program lies in the guest: plimsolld.service may execute it there.
const PROGRAM: &str = "/usr/local/lib/plimsoll-systemd-test";

/// Builds the tests' program, as the unit tests have done before (`--workspace`, so that it is the same), and
/// returns its path.
fn build() -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(host::source_root()).args(["test", "--quiet", "--locked", "--workspace"]);
    let said = host::output(command.args(["--test", "systemd", "--no-run", "--message-format=json"]))?;
    let artifacts = said.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let mut program = artifacts.filter(|artifact| artifact["target"]["name"] == "systemd");
    let path = program.find_map(|artifact| artifact["executable"].as_str().map(PathBuf::from));
    path.context("cargo does not say where it put the tests' program")
}

/// Brings the tests' program into the guest, and takes the daemon out of its way.
fn prepare(lab: &Lab) -> Result<()> {
    let mut program = build()?;
    // Symbols are most of it, and of no use in the guest.
    if let Some(strip) = host::find("strip") {
        let small = host::source_root().join("target/vm/systemd-test");
        host::output(Command::new(strip).arg("-o").arg(&small).arg(&program))?;
        program = small;
    }
    lab.guest.copy_in(&program, PROGRAM)?;
    lab.guest.ok(&format!("chmod 0755 {PROGRAM}; systemctl stop plimsolld.service")).map(|_| ())
}

/// Units are started, identified, limited, stopped and killed, and their memory is measured and
/// reclaimed, each by the function that the daemon uses for it.
pub fn its_parts_work(lab: &mut Lab) -> Result<()> {
    prepare(lab)?;
    lab.guest.ok("systemctl mask --runtime --quiet plimsolld.service")?;
    let done =
        lab.guest.run_within(&format!("PLIMSOLL_TEST_SYSTEMD=all {PROGRAM} --test-threads=1"), PATIENCE)?;
    ensure!(done.code == 0, "{}\n{}", done.all(), lab.guest.evidence());
    lab.guest.ok("systemctl unmask --runtime --quiet plimsolld.service").map(|_| ())
}

/// In the daemon's place, with all restrictions of its unit: what the daemon has to do is
/// possible, and nothing beyond it.
pub fn the_daemons_sandbox_holds(lab: &mut Lab) -> Result<()> {
    prepare(lab)?;
    let guest = &lab.guest;
    let drop_in = "/run/systemd/system/plimsolld.service.d/test.conf";
    let other = "/run/systemd/system/llm@plimsoll-test-other.service";
    guest.write(
        drop_in,
        &format!(
            "[Service]\nType=oneshot\nRestart=no\nWatchdogSec=0\nEnvironment=PLIMSOLL_TEST_SYSTEMD=sandbox\n\
             ExecStart=\nExecStart={PROGRAM} --nocapture sandbox\n"
        ),
    )?;
    guest.write(other, "[Service]\nUser=nobody\nSlice=llm.slice\nExecStart=/usr/bin/sleep infinity\n")?;
    guest.ok(
        "for file in /home/plimsoll-test /var/tmp/plimsoll-test; do \
         head -c 1000000 /dev/urandom > $file && chown 65534:65534 $file && chmod 600 $file || exit; done; sync",
    )?;
    guest.ok("systemctl daemon-reload && systemctl start llm@plimsoll-test-other.service")?;
    let done = guest.run_within("systemctl start plimsolld.service", PATIENCE)?;
    let journal =
        guest.ok("journalctl --sync; journalctl -b -u plimsolld.service -n 40 -o cat --no-pager")?;
    ensure!(done.code == 0 && journal.contains("sandbox: done"), "{}{journal}", done.all());
    guest.ok(&format!(
        "rm -rf /run/systemd/system/plimsolld.service.d {other} /home/plimsoll-test /var/tmp/plimsoll-test \
         /var/lib/plimsoll/test.json /run/plimsoll/test.json; systemctl daemon-reload"
    ))
    .map(|_| ())
}

//! How soon a swapfile is in use, on each file system that holds one, beside the way that it is done by hand.

use super::{BenchOptions, boot};
use crate::lab::{Lab, PATIENCE};
use crate::models;
use anyhow::{Context, Result, ensure};
use plimsoll::bytes::Bytes;
use std::path::Path;

/// What is aimed at, in milliseconds.
const AIM: u64 = 250;
/// How large the swapfile is.
const SIZE: Bytes = Bytes::gib(4);
/// How large each disk is.
const DISK: Bytes = Bytes::gib(6);
/// How often it is made; the middle counts.
const TIMES: usize = 5;
/// File systems, with the blank disk that each is made on.
const KINDS: [(&str, &str, &str); 3] = [
    ("ext4", "mkfs.ext4 -q -F", "/dev/vdc"),
    ("xfs", "mkfs.xfs -q -f", "/dev/vdd"),
    ("btrfs", "mkfs.btrfs -q -f", "/dev/vde"),
];

/// Makes them, and prints a line for each file system.
pub fn bench(options: &BenchOptions, programs: &Path) -> Result<()> {
    let mut machine = options.machine.clone();
    machine.blank = vec![DISK.0; KINDS.len()];
    let lab = boot(options, programs, &machine, &models::ensure_disk()?)?;
    println!("a swapfile of {SIZE} in use, in ms (at most {AIM} is aimed at), paired in one run:");
    println!("{:8}{:>14}{:>22}{:>26}", "", "our order", "plimsoll swap add", "dd + mkswap + swapon");
    for (kind, mkfs, device) in KINDS {
        let (order, command, by_hand) = on(&lab, kind, mkfs, device)?;
        let verdict = if order <= AIM { "" } else { "  missed" };
        println!("{kind:8}{order:>14}{command:>22}{by_hand:>26}{verdict}");
    }
    Ok(())
}

/// Of one file system: the order as its unit executes it, the whole command that has it carried out, and the
/// way by hand.
fn on(lab: &Lab, kind: &str, mkfs: &str, device: &str) -> Result<(u64, u64, u64)> {
    let place = format!("/mnt/{kind}");
    let directory = format!("{place}/swap");
    lab.guest
        .ok_within(&format!("{mkfs} {device} && mkdir -p {place} && mount {device} {place}"), PATIENCE)?;
    lab.guest.write(
        "/etc/plimsoll/plimsoll.toml",
        &format!("[swap]\ndirectories = [\"{directory}\"]\nfree-space = \"256MiB\"\n"),
    )?;
    lab.guest.ok("systemctl reload plimsolld.service")?;
    let bytes = SIZE.0;
    let order = format!("/usr/lib/plimsoll/plimsolld --swap add-hand-{bytes}-1");
    let add = format!("plimsoll swap add {}GiB", bytes >> 30);
    // What the one before has freed is on disk before the next is made.
    let (mut orders, mut commands) = (Vec::new(), Vec::new());
    for _ in 0..TIMES {
        orders.push(timed(lab, &order)?);
        removed(lab, &directory)?;
        commands.push(timed(lab, &add)?);
        removed(lab, &directory)?;
    }
    let by_hand = format!(
        "dd if=/dev/zero of={place}/hand bs=1M count={} 2>&1 && chmod 0600 {place}/hand && mkswap -q {place}/hand && \
         swapon {place}/hand",
        bytes >> 20
    );
    // Without this attribute no swapfile can be used there.
    let empty = format!("rm -f {place}/hand; : > {place}/hand");
    let attribute = if kind == "btrfs" { format!("chattr +C {place}/hand") } else { "true".into() };
    lab.guest.ok(&format!("{empty}; {attribute}"))?;
    let by_hand = timed(lab, &by_hand)?;
    lab.guest.ok_within(&format!("swapoff {place}/hand && umount {place}"), PATIENCE)?;
    orders.sort_unstable();
    commands.sort_unstable();
    Ok((orders[TIMES / 2], commands[TIMES / 2], by_hand))
}

/// Milliseconds in the guest from the start of a command to its end, after which swap has to be in use.
fn timed(lab: &Lab, command: &str) -> Result<u64> {
    let said = lab.guest.ok_within(
        &format!(
            "sync; a=$(date +%s%N); {{ {command}; }} > /dev/null || exit; b=$(date +%s%N); \
             test $(tail -n +2 /proc/swaps | wc -l) = 1 || exit; echo $(((b - a) / 1000000))"
        ),
        PATIENCE,
    )?;
    said.trim().parse().with_context(|| format!("no time: {said}"))
}

fn removed(lab: &Lab, directory: &str) -> Result<()> {
    let left = lab.guest.ok(&format!(
        "for file in {directory}/plimsoll-*.swap; do swapoff $file; rm $file; done; ls {directory}"
    ))?;
    ensure!(left.is_empty(), "left in {directory}: {left}");
    Ok(())
}

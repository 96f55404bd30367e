//! Two instances of one model.

use crate::lab::{Config, Lab, PATIENCE};
use anyhow::{Result, ensure};
use plimsoll::bytes::Bytes;

/// What the weights of `twin` are, less a little.
const WEIGHTS: Bytes = Bytes::mib(200);

/// Starts both instances; returns what reservations held before, after one, after both.
fn start_both(lab: &Lab, config: Config) -> Result<[Bytes; 3]> {
    lab.configure(&[config])?;
    let held = || lab.memory_pool().map(|pool| pool.reserved_bytes);
    let none = held()?;
    lab.serve("twin", 8001)?;
    let one = held()?;
    lab.serve("twin@2", 8002)?;
    let both = held()?;
    Ok([none, one, both])
}

/// "Two instances of one mapped model are charged once for its weights; evicting one frees what was
/// said."
pub fn mapped_weights_are_charged_once(lab: &mut Lab) -> Result<()> {
    let [none, one, both] = start_both(lab, Config::new("twin", 8001))?;
    ensure!(one - none > WEIGHTS, "the first takes {}", one - none);
    ensure!(both - one < WEIGHTS, "the second takes {}, the weights again", both - one);
    let private = lab.model("twin@2")?.predicted.private_bytes;
    lab.guest.ok("systemctl stop llm@twin@2.service")?;
    lab.guest.wait_for("what the second held is free again", PATIENCE, |_| {
        let after = lab.memory_pool()?.reserved_bytes;
        // Measurements may move the first one's share a little.
        Ok((both - after + Bytes::mib(8) >= private && after + Bytes::mib(8) >= one).then_some(()))
    })?;
    lab.guest.completion(8001).map(|_| ())
}

/// "… twice without mapping."
pub fn unmapped_weights_are_charged_twice(lab: &mut Lab) -> Result<()> {
    let config = Config::new("twin", 8001).with("engine-args = [\"--load-mode\", \"none\"]");
    let [none, one, both] = start_both(lab, config)?;
    ensure!(one - none > WEIGHTS, "the first takes {}", one - none);
    ensure!(both - one > WEIGHTS, "the second takes only {}", both - one);
    // What was read into memory of its own is not left in the page cache a second time; the engine's libraries are.
    let group = lab.property("twin", "ControlGroup")?;
    let cached =
        lab.guest.ok(&format!("awk '$1 == \"file\" {{print $2}}' /sys/fs/cgroup{group}/memory.stat"))?;
    let cached = Bytes(cached.parse()?);
    println!("          left in the page cache: {cached}");
    ensure!(cached < Bytes::mib(125), "{cached} of page cache are left to the first");
    lab.no_oom_kill()
}

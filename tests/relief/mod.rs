//! What must hold of every model that was stopped to keep the machine afloat.

use plimsoll::bytes::Bytes;
use plimsoll::config::Instance;
use plimsoll::ledger::{Phase, Reservation};
use plimsoll::policy::pressure::{gain, worthwhile};
use plimsoll::policy::{Level, Rescue};
use plimsoll::sim::{Evidence, Simulation};

/// Breaches of: never a busy one while an idle one suffices, never a pinned one while another would do, never two where
/// one suffices, nobody who was just loaded unless the machine is in danger.
pub fn breaches(s: &Simulation) -> Vec<String> {
    s.reliefs.iter().filter_map(|evidence| breach(s, evidence)).collect()
}

fn breach(s: &Simulation, evidence: &Evidence) -> Option<String> {
    let Evidence { decision, machine, holders } = evidence;
    let relief = decision.relief?;
    if !matches!(relief.rescue, Rescue::Stop | Rescue::Kill | Rescue::Expire) {
        return None;
    }
    let (victim, now) = (decision.instance.as_ref()?, decision.at_msec);
    let danger = relief.level == Level::Critical;
    let frees = |instance: &Instance| gain(machine, holders, relief.pool, &[instance]);
    let said = |what: &str| Some(format!("{what}: {decision:?}"));
    let its = holders.get(victim)?;
    if its.phase == Phase::Stopping {
        return if danger { None } else { said("killed in no danger") };
    }
    let coming =
        holders.iter().filter(|(_, r)| r.phase == Phase::Stopping).map(|(i, _)| frees(i)).sum::<Bytes>();
    let needed = relief.needed_bytes - coming;
    let fresh = |r: &Reservation| r.phase == Phase::Loading || now < r.ready + 60_000;
    // What an engine said a moment ago counts more than when it last computed.
    let said_idle = |instance: &Instance| {
        let busy = machine.units.get(instance)?.busy?;
        (now < busy.at + 5000).then_some(busy.requests == 0)
    };
    let idle = |instance: &Instance, r: &Reservation| {
        !fresh(r) && said_idle(instance).unwrap_or(now >= r.last_used + 10_000)
    };
    let worthwhile = worthwhile(s.core.rules().reserve);
    let worth = |instance: &Instance| frees(instance) >= worthwhile;
    let others = || {
        holders.iter().filter(|(instance, r)| {
            *instance != victim && matches!(r.phase, Phase::Loading | Phase::Running) && worth(instance)
        })
    };
    if its.pinned && (!danger || others().any(|(_, r)| !r.pinned)) {
        return said("pinned, and another would do");
    }
    if fresh(its) && !danger {
        return said("just loaded, and no danger");
    }
    let suffices = |(instance, _): &(&Instance, &Reservation)| frees(instance) >= needed;
    if !idle(victim, its)
        && !its.expired(now)
        && others().filter(suffices).any(|(i, r)| idle(i, r) && !r.pinned)
    {
        return said("busy, and an idle one suffices");
    }
    let gentler =
        |i: &Instance, r: &Reservation| !r.pinned && (idle(i, r) || (!idle(victim, its) && !fresh(r)));
    // Half of what is not worth a stop makes no difference.
    if frees(victim) + worthwhile.mul_div(1, 2) < needed
        && !its.pinned
        && others().filter(suffices).any(|(i, r)| gentler(i, r))
    {
        return said("not enough, and another one suffices");
    }
    None
}

//! What is shown of the daemon, worked out from its state and a reading of the machine.

use std::collections::BTreeMap;

use super::leases::Leases;
use super::report::{
    Basis as Correction, Classes, Decision as Shown, Lease, Model, Pool as PoolReport, Pressure, Quarantined,
    Status, Swap, SwapArea,
};
use crate::bytes::Bytes;
use crate::config::{Instance, ModelName};
use crate::ledger::{
    self, Basis, Charges, Footprint, Machine, Measured, PerPool, Phase, Pool, Reservation, SwapOwner, Unit,
    UnitState, capacity,
};
use crate::policy::core::{Leak, Owed};
use crate::policy::decision::{Account, Kind};
use crate::policy::{Core, Decision, Mode, Planned, Refusal, RefusalKind, Request, Verdict};
use crate::ports::{ModelInfo, Rulebook};

/// How many decisions `plimsoll status` gets.
const SHOWN: usize = 16;

/// One line on how the daemon is, for `systemctl status`.
pub(super) fn line(core: &Core, machine: &Machine) -> String {
    let waiting = core.waiting().count();
    let charged = charges(core.holders()).per_pool(machine, &[], None);
    let leases = core.holders().keys().filter(|instance| instance.lease).count();
    let mut line = match core.holders().len() - leases {
        1 => "1 model".to_owned(),
        n => format!("{n} models"),
    };
    match leases {
        0 => {}
        1 => line.push_str(", 1 lease"),
        n => line.push_str(&format!(", {n} leases")),
    }
    line.push_str(&format!(", {} reserved", charged.memory));
    if waiting > 0 {
        line.push_str(&format!(", {waiting} waiting"));
    }
    if core.rules().mode == Mode::Observe {
        line.push_str(", only observing");
    }
    line
}

/// Everything that is shown.
pub(super) fn status(
    core: &Core,
    machine: &Machine,
    leases: &Leases,
    rulebook: &Rulebook,
    now: u64,
) -> Status {
    let mode = match core.rules().mode {
        Mode::Enforce => "enforce",
        Mode::Observe => "observe",
    };
    Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        mode: mode.to_owned(),
        pools: pools(core, machine),
        swap: Swap {
            total_bytes: machine.memory.swap_total,
            used_bytes: machine.memory.swap_total - machine.memory.swap_free,
            room_bytes: machine.swap_room,
            areas: machine.swaps.iter().map(swap_area).collect(),
        },
        pressure: pressure(core, machine),
        models: instances(core, machine, &rulebook.models, now),
        quarantined: core.leaks().iter().map(|leak| quarantined(leak, machine)).collect(),
        leases: self::leases(core, machine, leases),
        decisions: core.decisions().rev().take(SHOWN).map(shown).collect(),
        problems: rulebook.problems.clone(),
        ..Status::default()
    }
}

fn pressure(core: &Core, machine: &Machine) -> Pressure {
    let (level, gauge) = core.gauge(machine);
    let relief = core.decisions().rev().find(|decision| decision.kind == Kind::Relieve);
    Pressure {
        level: level.to_string(),
        headroom_bytes: gauge.headroom,
        falling_bytes: gauge.falling,
        fastest_bytes: machine.pressure.fastest,
        some_permille: machine.pressure.some,
        full_permille: machine.pressure.full,
        last: relief.map(shown),
    }
}

fn quarantined(leak: &Leak, machine: &Machine) -> Quarantined {
    Quarantined {
        instance: leak.instance.to_string(),
        pool: match leak.pool {
            Pool::Memory => "memory".to_owned(),
            Pool::Gpu(n) => machine.gpus.get(n).map(|gpu| gpu.name.clone()).unwrap_or_default(),
            Pool::Slice => "llm.slice".to_owned(),
        },
        bytes: leak.bytes,
        since_msec: leak.since,
    }
}

fn swap_area(area: &ledger::SwapArea) -> SwapArea {
    let name = area.own();
    let owner = match name.map(|name| name.owner) {
        Some(SwapOwner::Plan) => "plan",
        Some(SwapOwner::Person) => "person",
        None => "other",
    };
    SwapArea {
        name: name.map(|name| name.to_string()).unwrap_or_default(),
        owner: owner.to_owned(),
        path: area.path.to_string_lossy().into_owned(),
        size_bytes: area.size,
        used_bytes: area.used,
        priority: area.priority,
        active: area.active,
    }
}

fn charges(holders: &BTreeMap<Instance, Reservation>) -> Charges {
    let mut charges = Charges::default();
    for (instance, reservation) in holders {
        charges.add_holder(instance, reservation);
    }
    charges
}

fn pools(core: &Core, machine: &Machine) -> Vec<PoolReport> {
    let room = capacity(machine, core.rules().reserve, core.holders());
    let reserved = charges(core.holders()).per_pool(machine, &[], None);
    let mut held = Charges::default();
    for measured in core.holders().values().map(|r| &r.measured) {
        held.add(Footprint {
            private: measured.unreclaimable(),
            swapped: Bytes::ZERO,
            mapped: Vec::new(),
            gpus: measured.gpus.clone(),
        });
    }
    let held = held.per_pool(machine, &[], None);
    let pool = |name: &str, pool: Pool, total: Bytes| {
        let of = |per: &PerPool| per.get(pool);
        PoolReport {
            name: name.to_owned(),
            total_bytes: total,
            capacity_bytes: of(&room),
            reserved_bytes: of(&reserved),
            measured_bytes: of(&held),
            headroom_bytes: of(&room) - of(&reserved),
        }
    };
    let mut pools = vec![pool("memory", Pool::Memory, machine.memory.total)];
    pools.extend(machine.gpus.iter().enumerate().map(|(n, gpu)| pool(&gpu.name, Pool::Gpu(n), gpu.total)));
    pools.extend(machine.slice_limit.map(|limit| pool("llm.slice", Pool::Slice, limit)));
    pools
}

/// Each configured model's first instance, and every other instance that lives or has failed.
pub(super) fn instances(core: &Core, machine: &Machine, models: &[ModelInfo], now: u64) -> Vec<Model> {
    let known: BTreeMap<&ModelName, &ModelInfo> =
        models.iter().filter_map(|info| Some((info.name.as_ref()?, info))).collect();
    let mut shown: BTreeMap<Instance, Model> = BTreeMap::new();
    for name in known.keys() {
        shown.insert(Instance::first((*name).clone()), Model::default());
    }
    let alive = machine.units.iter().filter(|(_, unit)| unit.state != UnitState::Inactive);
    let held = alive.map(|(instance, _)| instance).chain(core.holders().keys());
    for instance in held.filter(|instance| !instance.lease) {
        shown.insert(instance.clone(), Model::default());
    }
    let one = |instance: &Instance| {
        let info = known.get(&instance.model).copied();
        model(core, instance, machine.units.get(instance), info, now)
    };
    shown.keys().map(one).collect()
}

/// Every lease, also those that wait.
fn leases(core: &Core, machine: &Machine, leases: &Leases) -> Vec<Lease> {
    let shown = machine.units.iter().filter(|(instance, _)| instance.lease);
    let one = |(instance, unit): (&Instance, &Unit)| {
        let holder = core.holders().get(instance);
        let waits = core.waiting().find(|(waiting, _)| *waiting == instance);
        Lease {
            name: instance.model.to_string(),
            lease: instance.to_string(),
            state: if waits.is_some() { "waiting" } else { "held" }.to_owned(),
            priority: holder.map_or(0, |holder| holder.priority),
            pid: unit.main_pid,
            uid: leases.find(instance).map_or(0, |lease| lease.uid),
            predicted: holder.map(|holder| predicted(instance, holder)).unwrap_or_default(),
            measured: measured(&unit.measured),
            message: waits.map(|(_, told)| told.to_owned()).unwrap_or_default(),
        }
    };
    shown.map(one).collect()
}

/// What an instance waits for, where it does.
fn waits<'a>(core: &'a Core, instance: &Instance) -> Option<&'a str> {
    core.waiting().find(|(waiting, _)| *waiting == instance).map(|(_, told)| told)
}

/// As `plimsoll status` names it.
pub(super) fn state(core: &Core, instance: &Instance, unit: Option<&Unit>) -> &'static str {
    let unit_state = unit.map(|unit| unit.state).unwrap_or_default();
    match (unit_state, core.holders().get(instance).map(|r| r.phase)) {
        (UnitState::Failed, _) => "failed",
        (_, Some(Phase::Stopping)) | (UnitState::Deactivating, _) => "stopping",
        _ if waits(core, instance).is_some() => "waiting",
        (UnitState::Active, _) => "running",
        (UnitState::Activating, Some(_)) => "loading",
        (UnitState::Activating, None) if instance.is_foreign() => "loading",
        (UnitState::Activating, None) => "waiting",
        (UnitState::Inactive, _) => "inactive",
    }
}

fn model(core: &Core, instance: &Instance, unit: Option<&Unit>, info: Option<&ModelInfo>, now: u64) -> Model {
    let holder = core.holders().get(instance);
    let waits = waits(core, instance);
    let last = core.decisions().rev().find(|decision| decision.instance.as_ref() == Some(instance));
    let broken = info.and_then(|info| info.broken.clone());
    let owed = core.owed().iter().find(|owed| owed.instance == *instance && holder.is_none());
    let message = match (waits, last) {
        (Some(told), _) => told.to_owned(),
        _ if owed.is_some() => owed.map(returns).unwrap_or_default(),
        (None, Some(last)) if holder.is_none() && last.kind == Kind::Refuse => last.text.clone(),
        _ => broken.unwrap_or_default(),
    };
    let configured = info.map_or(0, |info| info.context);
    let context = holder.map_or(configured, |r| r.context);
    let answers = holder.filter(|r| r.phase != Phase::Loading && r.phase != Phase::Preparing);
    let used = answers.map(|r| r.last_used);
    let requests = answers.and(unit).and_then(|unit| unit.busy).map(|busy| busy.requests);
    let pinned = core.pins().get(&instance.model).copied().or(info.map(|info| info.pinned));
    Model {
        name: instance.model.to_string(),
        instance: instance.to_string(),
        state: state(core, instance, unit).to_owned(),
        foreign: instance.is_foreign(),
        priority: holder.map(|r| r.priority).or(info.map(|info| info.priority)).unwrap_or_default(),
        pinned: pinned.unwrap_or_default(),
        context,
        context_configured: if configured == 0 { context } else { configured },
        parallel: info.map_or(0, |info| info.parallel),
        address: info.map(|info| address(&info.address, instance)).unwrap_or_default(),
        pid: unit.map_or(0, |unit| unit.main_pid),
        requests,
        last_used_msec: used,
        idle_seconds: used.map(|used| if requests > Some(0) { 0 } else { now.saturating_sub(used) / 1000 }),
        predicted: holder.map(|r| predicted(instance, r)).unwrap_or_default(),
        basis: holder.map(|r| correction(&r.basis)).unwrap_or_default(),
        measured: unit
            .filter(|unit| unit.state.is_alive())
            .map(|u| measured(&u.measured))
            .unwrap_or_default(),
        aliases: info.map(|info| info.aliases.clone()).unwrap_or_default(),
        modes: info.map(|info| info.modes.clone()).unwrap_or_default(),
        message,
    }
}

/// What is said of one that is owed a return.
fn returns(owed: &Owed) -> String {
    match &owed.for_instance {
        Some(other) => format!("it was stopped for {other} and comes back when there is room"),
        None => "it was stopped to keep the machine afloat and comes back when there is room".to_owned(),
    }
}

/// The address of an instance, from that of the first one.
fn address(first: &str, instance: &Instance) -> String {
    let own =
        first.rsplit_once(':').and_then(|(host, port)| Some((host, instance.port(port.parse().ok()?)?)));
    own.map_or_else(|| first.to_owned(), |(host, port)| format!("{host}:{port}"))
}

/// What is reserved for it, as it is shown.
pub(super) fn predicted(instance: &Instance, holder: &Reservation) -> Classes {
    let footprint = &holder.predicted;
    let gpus = footprint.gpus.iter().copied().sum();
    Classes {
        mapped_bytes: footprint.mapped_bytes(),
        private_bytes: footprint.private,
        // Of a unit of somebody else one size is known, and what it was measured to hold on a GPU is taken off `private`.
        gpu_bytes: if instance.is_foreign() { gpus + (holder.reload - footprint.private) } else { gpus },
        swapped_bytes: footprint.swapped,
    }
}

fn correction(basis: &Basis) -> Correction {
    Correction { opinion_bytes: basis.opinion_bytes, measured_bytes: basis.measured_bytes }
}

fn measured(measured: &Measured) -> Classes {
    Classes {
        mapped_bytes: measured.file + measured.locked_file,
        private_bytes: measured.private,
        gpu_bytes: measured.gpus.iter().copied().sum(),
        swapped_bytes: measured.swapped,
    }
}

/// A decision as it is read on the other side of the bus.
fn shown(decision: &Decision) -> Shown {
    let json = serde_json::to_value(decision).unwrap_or_default();
    serde_json::from_value(json).unwrap_or_default()
}

/// A plan as the decision that it would become.
pub(super) fn planned(request: &Request, planned: Planned, pools: Vec<Account>, now: u64) -> Decision {
    let instance = request.instance.clone();
    let decision = |kind, verdict, text| Decision {
        pools: pools.clone(),
        ..Decision::of(kind, instance.clone(), verdict, now, text)
    };
    match planned {
        Planned::Admit(plan) => {
            let steps: Vec<String> = plan.steps.iter().map(ToString::to_string).collect();
            let verdict = Verdict::after(&plan.steps);
            let after = if steps.is_empty() { String::new() } else { format!(" after {}", steps.join(", ")) };
            let (context, bytes, basis) = (plan.rung.context, plan.rung.footprint.total(), plan.rung.basis);
            let text =
                format!("{instance} would be admitted with {bytes}{basis} at context {context}{after}");
            Decision { context, bytes, basis, steps: plan.steps, ..decision(Kind::Admit, verdict, text) }
        }
        Planned::Wait(wait) => {
            let on: Vec<String> = wait.on.iter().map(ToString::to_string).collect();
            let text = format!("{instance} would wait until {} has loaded or stopped", on.join(", "));
            let context = request.ladder.first().map_or(0, |rung| rung.context);
            Decision { context, ..decision(Kind::Wait, Verdict::FitsAfter, text) }
        }
        Planned::Refuse(refusal) => {
            let text = refusal.to_string();
            Decision {
                context: refusal.context,
                bytes: refusal.needed_bytes,
                basis: refusal.basis.clone(),
                refusal: Some(refusal.clone()),
                ..decision(Kind::Refuse, verdict_of(&refusal), text)
            }
        }
    }
}

fn verdict_of(refusal: &Refusal) -> Verdict {
    match refusal.kind {
        RefusalKind::UnknownSize(_) => Verdict::Unknown,
        _ => Verdict::Refused,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Event, Rules, Rung, Saved};

    fn request(gib: u64) -> Request {
        let footprint = Footprint { private: Bytes::gib(gib), ..Footprint::default() };
        Request {
            invocation: "1".into(),
            priority: 50,
            ladder: vec![Rung { context: 4096, footprint, ..Rung::default() }],
            explicit: true,
            ..Request::of("a".parse().unwrap())
        }
    }

    fn machine() -> Machine {
        let mut machine = Machine::default();
        machine.memory.total = Bytes::gib(16);
        machine.memory.available = Bytes::gib(14);
        machine.memory.free = Bytes::gib(14);
        machine
    }

    #[test]
    fn what_runs_is_shown_next_to_what_is_configured() {
        let mut machine = machine();
        let mut core = Core::new(Rules::default(), Saved::default(), true);
        let unit = Unit { state: UnitState::Active, invocation: "1".into(), main_pid: 7, ..Unit::default() };
        machine.units.insert("a@2".parse().unwrap(), unit);
        let adopt = Request { instance: "a@2".parse().unwrap(), ..request(4) };
        core.step(Event::Adopt { request: Box::new(adopt) }, &machine, 5);
        let info = ModelInfo {
            name: "a".parse().ok(),
            priority: 50,
            address: "127.0.0.1:8003".into(),
            context: 4096,
            ..ModelInfo::default()
        };
        let rulebook =
            Rulebook { models: vec![info], problems: vec!["a problem".into()], ..Rulebook::default() };
        let status = status(&core, &machine, &Leases::default(), &rulebook, 65_000);
        let shown: Vec<(&str, &str, &str, u32)> = status
            .models
            .iter()
            .map(|m| (m.instance.as_str(), m.state.as_str(), m.address.as_str(), m.pid))
            .collect();
        assert_eq!(shown, [("a", "inactive", "127.0.0.1:8003", 0), ("a@2", "running", "127.0.0.1:8004", 7)]);
        assert_eq!((status.models[1].requests, status.models[1].idle_seconds), (None, Some(64)));
        assert_eq!(status.models[0].idle_seconds, None);
        assert_eq!(status.pools[0].reserved_bytes, Bytes::gib(4));
        assert_eq!(status.problems.len(), 1);
        assert!(line(&core, &machine).starts_with("1 model, 4.0 GiB reserved"));
    }

    #[test]
    fn a_plan_reads_like_the_decision_it_would_become() {
        let core = Core::new(Rules::default(), Saved::default(), true);
        let fits = request(4);
        let decision = planned(&fits, core.preview(&fits, &machine(), 9), Vec::new(), 9);
        assert_eq!((decision.kind, decision.verdict, decision.context), (Kind::Admit, Verdict::Fits, 4096));
        let too_large = request(40);
        let decision = planned(&too_large, core.preview(&too_large, &machine(), 9), Vec::new(), 9);
        assert_eq!((decision.kind, decision.verdict), (Kind::Refuse, Verdict::Refused));
        assert!(decision.text.contains("was refused"), "{}", decision.text);
        assert!(!shown(&decision).verdict.is_empty());
    }
}

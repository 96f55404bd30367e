//! Whether what the bus says of models by signals has changed.

use std::hash::{DefaultHasher, Hash, Hasher};

use super::view;
use crate::ledger::Machine;
use crate::policy::Core;

/// A digest of it: another one when any of it has changed. What is configured is not in it.
pub(super) fn of(core: &Core, machine: &Machine) -> u64 {
    let mut hasher = DefaultHasher::new();
    for (instance, unit) in machine.units.iter().filter(|(instance, _)| !instance.lease) {
        (instance, view::state(core, instance, Some(unit))).hash(&mut hasher);
    }
    for (instance, holder) in core.holders().iter().filter(|(instance, _)| !instance.lease) {
        (instance, holder.priority, holder.context, view::predicted(instance, holder).total())
            .hash(&mut hasher);
    }
    // Also of whom systemd knows nothing yet.
    core.waiting().for_each(|(instance, _)| instance.hash(&mut hasher));
    core.pins().hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::bytes::Bytes;
    use crate::config::Instance;
    use crate::ledger::{Footprint, Gpu, GpuKind, Unit, UnitState};
    use crate::policy::{Event, Request, Rules, Rung, Saved};

    fn request(gib: u64) -> Request {
        let footprint = Footprint { private: Bytes::gib(gib), ..Footprint::default() };
        Request {
            invocation: "1".into(),
            ladder: vec![Rung { context: 4096, footprint, ..Rung::default() }],
            ..Request::of("a".parse().unwrap())
        }
    }

    fn running() -> Unit {
        Unit { state: UnitState::Active, invocation: "1".into(), main_pid: 7, ..Unit::default() }
    }

    #[test]
    fn what_is_told_by_signals_changes_the_digest_and_what_is_measured_does_not() {
        let mut machine = Machine::default();
        let mut core = Core::new(Rules::default(), Saved::default(), true);
        let instance: Instance = "a".parse().unwrap();
        let mut seen = vec![of(&core, &machine)];
        machine.units.insert(instance.clone(), running());
        seen.push(of(&core, &machine));
        core.step(Event::Adopt { request: Box::new(request(4)) }, &machine, 5);
        seen.push(of(&core, &machine));
        core.step(Event::Pin(instance.model.clone(), true), &machine, 6);
        seen.push(of(&core, &machine));
        machine.units.get_mut(&instance).unwrap().measured.private = Bytes::gib(3);
        machine.memory.available = Bytes::gib(11);
        assert_eq!(seen.last(), Some(&of(&core, &machine)));
        machine.units.get_mut(&instance).unwrap().state = UnitState::Deactivating;
        seen.push(of(&core, &machine));
        let different: BTreeSet<u64> = seen.iter().copied().collect();
        assert_eq!(different.len(), 5, "{seen:?}");
    }

    #[test]
    fn what_was_promised_is_in_the_digest_and_what_an_adopted_one_holds_is_not() {
        let mut machine = Machine::default();
        for text in ["a", "ollama.service"] {
            machine.units.insert(text.parse().unwrap(), running());
        }
        let adopted = |request: Request, machine: &Machine| {
            let mut core = Core::new(Rules::default(), Saved::default(), true);
            core.step(Event::Adopt { request: Box::new(request) }, machine, 5);
            core
        };
        let context = |context| {
            let mut request = request(4);
            request.ladder[0].context = context;
            of(&adopted(request, &machine), &machine)
        };
        assert_ne!(context(4096), context(8192));
        let bytes = |gib| of(&adopted(request(gib), &machine), &machine);
        assert_ne!(bytes(4), bytes(5));
        let priority = |priority| of(&adopted(Request { priority, ..request(4) }, &machine), &machine);
        assert_ne!(priority(50), priority(60));

        let ollama: Instance = "ollama.service".parse().unwrap();
        let gpu =
            Gpu { name: "card0".into(), kind: GpuKind::Unified, total: Bytes::gib(8), used: Bytes::gib(3) };
        machine.gpus = vec![gpu];
        let mut core =
            adopted(Request { instance: ollama.clone(), reload: Bytes::gib(4), ..request(4) }, &machine);
        let before = of(&core, &machine);
        machine.units.get_mut(&ollama).unwrap().measured.gpus = vec![Bytes::gib(3)];
        core.step(Event::Tick, &machine, 6);
        let holder = &core.holders()[&ollama];
        assert_eq!(holder.predicted.private, Bytes::gib(1), "the rest of it");
        let shown = view::predicted(&ollama, holder);
        assert_eq!((shown.private_bytes, shown.gpu_bytes), (Bytes::gib(1), Bytes::gib(3)));
        assert_eq!(of(&core, &machine), before);
    }
}

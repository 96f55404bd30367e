//! What engines have said of themselves.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::engine::{Version, devices, version};
use crate::ledger::Gpu;

/// Programs whose answers are remembered; a machine has one or two.
const REMEMBERED: usize = 16;

/// Which of its answers are about an engine itself.
const KEPT: [&str; 2] = ["version", "devices"];

/// The answers of each program, as it was last asked at the gate. A plan, for which no engine is
/// asked, is priced with them.
#[derive(Debug, Default)]
pub(super) struct Engines {
    said: BTreeMap<PathBuf, BTreeMap<String, String>>,
}

/// What a program sees of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    /// The program itself.
    pub program: PathBuf,
    /// The GPUs that it can offload to.
    pub gpus: Vec<Gpu>,
    /// Its version, where it is known.
    pub version: Option<Version>,
}

impl Engines {
    /// What `program` sees of `gpus`; `said` is empty when it was not asked this time. One that has
    /// never been asked is taken for one that sees them all.
    pub fn seen(&mut self, program: PathBuf, said: &BTreeMap<String, String>, gpus: &[Gpu]) -> Seen {
        let said: BTreeMap<String, String> = said
            .iter()
            .filter(|(name, _)| KEPT.contains(&name.as_str()))
            .map(|(n, v)| (n.clone(), v.clone()))
            .collect();
        if !said.is_empty() && (self.said.len() < REMEMBERED || self.said.contains_key(&program)) {
            self.said.insert(program.clone(), said.clone());
        }
        let none = BTreeMap::new();
        let said = if said.is_empty() { self.said.get(&program).unwrap_or(&none) } else { &said };
        let listed = said.get("devices").and_then(|text| devices::parse(text));
        // A backend that the engine lacks, or that finds no driver, leaves everything on the host.
        let blind = listed.is_some_and(|list| list.is_empty());
        Seen {
            program: program.clone(),
            gpus: if blind { Vec::new() } else { gpus.to_vec() },
            version: said.get("version").and_then(|text| version::parse(text)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::Bytes;
    use crate::ledger::GpuKind;

    #[test]
    fn an_engine_without_a_backend_sees_no_gpu_and_is_remembered() {
        let gpus =
            [Gpu { name: "card0".into(), kind: GpuKind::Unified, total: Bytes::gib(120), used: Bytes::ZERO }];
        let mut engines = Engines::default();
        let program = || PathBuf::from("/usr/bin/llama-server");
        assert_eq!(engines.seen(program(), &BTreeMap::new(), &gpus).gpus, gpus);
        let said = |devices: &str| {
            BTreeMap::from([
                ("devices".to_owned(), format!("log\nAvailable devices:\n{devices}")),
                ("version".to_owned(), "version: 0.7.0 (build 11669, commit Debian)".to_owned()),
            ])
        };
        assert!(engines.seen(program(), &said("  (none)\n"), &gpus).gpus.is_empty());
        let later = engines.seen(program(), &BTreeMap::new(), &gpus);
        assert!(later.gpus.is_empty());
        assert!(later.version.is_some_and(|version| version.has_load_mode()));
        let vulkan = said("  Vulkan0: AMD (112640 MiB, 111000 MiB free)\n");
        assert_eq!(engines.seen(program(), &vulkan, &gpus).gpus, gpus);
    }
}

//! Making free memory of memory that is only available: page cache, and free pages that lie scattered.
//!
//! None of it is a gain in the ledger. It spares a large allocation the wait for reclaim, of which loads have died.

use std::collections::BTreeSet;

use super::plan::{Scene, Step};
use super::request::Rung;
use crate::bytes::Bytes;
use crate::ledger::FileId;

/// Less than this is allocated without trouble wherever it lies.
const LARGE: Bytes = Bytes::gib(1);

impl Scene<'_> {
    /// Cold cache of models' files, where free memory alone would not do.
    pub(super) fn drop_cache(&self, rung: &Rung, gone: &[usize]) -> Option<Step> {
        let machine = self.situation.machine;
        let to_allocate = to_allocate(rung);
        if machine.memory.free >= to_allocate {
            return None;
        }
        let staying = (0..self.names.len()).filter(|n| !gone.contains(n));
        let kept: BTreeSet<FileId> = staying
            .filter_map(|n| self.reservation(n))
            .flat_map(|r| &r.predicted.mapped)
            .chain(&rung.footprint.mapped)
            .map(|m| m.file)
            .collect();
        let cold: Vec<(FileId, Bytes)> = machine
            .cached
            .iter()
            .filter(|(file, bytes)| !kept.contains(file) && !bytes.is_zero())
            .map(|(file, bytes)| (*file, *bytes))
            .collect();
        (!cold.is_empty()).then(|| Step::DropCache {
            files: cold.iter().map(|(file, _)| *file).collect(),
            frees_bytes: cold.iter().map(|(_, bytes)| *bytes).sum(),
        })
    }

    /// What is done to free memory once nobody has to be stopped any more: the page cache of the whole machine goes
    /// where that is configured and the models' own was not enough, and pages are moved together where less than half of
    /// what is to be allocated lies in blocks of 2 MiB, which is what amdgpu takes GTT in.
    pub(super) fn tidy(&self, rung: &Rung) -> Vec<Step> {
        let (memory, rules) = (&self.situation.machine.memory, self.situation.rules);
        let bytes = to_allocate(rung);
        let mut steps = Vec::new();
        if bytes < LARGE {
            return steps;
        }
        let frees_bytes = memory.available - memory.free;
        if rules.drop_all_cache && memory.free < bytes && !frees_bytes.is_zero() {
            steps.push(Step::DropAllCache { frees_bytes });
        }
        if memory.free_large.is_some_and(|large| large < bytes.min(memory.available).mul_div(1, 2)) {
            steps.push(Step::Compact { bytes });
        }
        steps
    }
}

/// What a load allocates at once.
fn to_allocate(rung: &Rung) -> Bytes {
    rung.footprint.private + rung.footprint.gpus.iter().copied().sum()
}

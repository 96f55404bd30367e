//! What engines' own fit tools have said of models.

use std::collections::VecDeque;

use crate::bytes::Bytes;
use crate::engine::opinion::Excess;
use crate::ledger::Footprint;
use crate::policy::Rung;

/// Opinions that are remembered: a dozen models with a few settings each.
const REMEMBERED: usize = 64;

/// Opinions by what was asked about, the one used last at the end.
#[derive(Debug, Default)]
pub(super) struct Opinions {
    kept: VecDeque<Kept>,
}

#[derive(Debug)]
struct Kept {
    /// Stands for files, engine and question, but for the context.
    key: String,
    /// At this context it was asked.
    context: u64,
    excess: Excess,
}

impl Opinions {
    /// Remembers by how much the tool was above the estimate at `context`.
    pub fn keep(&mut self, key: &str, context: u64, excess: Excess) {
        self.kept.retain(|kept| kept.key != key || kept.context != context);
        if self.kept.len() == REMEMBERED {
            self.kept.pop_front();
        }
        self.kept.push_back(Kept { key: key.to_owned(), context, excess });
    }

    /// What is known for a context: what was found at it, or else at the next larger one, since buffers
    /// grow with the context. Nothing is known of larger ones than were asked about.
    pub fn find(&mut self, key: &str, context: u64) -> Option<Excess> {
        let above = |kept: &Kept| kept.key == key && kept.context >= context;
        let found = self.kept.iter().enumerate().filter(|(_, kept)| above(kept));
        let (at, _) = found.min_by_key(|(_, kept)| kept.context)?;
        let kept = self.kept.remove(at)?;
        let excess = kept.excess.clone();
        self.kept.push_back(kept);
        Some(excess)
    }
}

/// A rung that has in it by how much the tool is above its estimate; `devices` says which GPU of the machine
/// each device of the estimate is. What is more on the host is private, whatever it is for.
pub(super) fn corrected(rung: Rung, excess: &Excess, devices: &[usize]) -> Rung {
    let Rung { context, mut footprint, mut basis } = rung;
    add(&mut footprint, excess, devices);
    basis.opinion_bytes = Bytes(excess.total());
    Rung { context, footprint, basis }
}

fn add(footprint: &mut Footprint, excess: &Excess, devices: &[usize]) {
    footprint.private += Bytes(excess.host);
    for (gpu, bytes) in devices.iter().zip(&excess.devices) {
        if let Some(held) = footprint.gpus.get_mut(*gpu) {
            *held += Bytes(*bytes);
        }
    }
}

/// A short name for a text: the same for the same text, on every machine and in every version (FNV-1a).
pub(super) fn digest(text: &str) -> String {
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn excess(host: u64) -> Excess {
        Excess { host, devices: vec![1] }
    }

    #[test]
    fn what_was_found_holds_for_smaller_contexts() {
        let mut opinions = Opinions::default();
        opinions.keep("a", 8192, excess(8));
        opinions.keep("a", 4096, excess(4));
        assert_eq!(opinions.find("a", 4096), Some(excess(4)));
        assert_eq!(opinions.find("a", 5000), Some(excess(8)));
        assert_eq!(opinions.find("a", 8193), None);
        assert_eq!(opinions.find("b", 1), None);
        for n in 0..REMEMBERED {
            opinions.find("a", 4096);
            opinions.keep(&n.to_string(), 1, excess(1));
        }
        assert!(opinions.kept.len() <= REMEMBERED);
        assert_eq!(opinions.find("a", 4096), Some(excess(4)), "used again and again");
        assert_eq!(opinions.find("a", 8192), None, "not used");
    }

    #[test]
    fn the_larger_counts_where_it_is() {
        let footprint =
            Footprint { private: Bytes(10), gpus: vec![Bytes(20), Bytes(30)], ..Footprint::default() };
        let rung = Rung { context: 1, footprint, ..Rung::default() };
        let corrected = corrected(rung, &excess(5), &[1]);
        assert_eq!(
            (corrected.footprint.private, &corrected.footprint.gpus[..]),
            (Bytes(15), &[Bytes(20), Bytes(31)][..])
        );
        assert_eq!(corrected.basis.opinion_bytes, Bytes(6));
    }

    #[test]
    fn names_are_stable() {
        assert_eq!(digest(""), "cbf29ce484222325");
        assert_eq!(digest("a"), "af63dc4c8601ec8c");
    }
}

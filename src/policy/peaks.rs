//! What models were measured to take, where that was more than predicted: it corrects the next estimate of
//! the same files, settings and engine.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::request::{Request, Rung};
use crate::bytes::Bytes;
use crate::ledger::{Basis, Reservation};

/// Peaks that are remembered; the one used least lately goes first.
const REMEMBERED: usize = 64;
/// Peaks are rounded up to this, so that memory that grows a page at a time is not saved as often.
const GRAIN: Bytes = Bytes::mib(16);

/// Peaks by the key of their rung, the one used last at the end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Peaks {
    kept: VecDeque<Peak>,
}

/// The most that was measured, by class.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Peak {
    /// Of which files, settings and program.
    key: String,
    /// The version of that.
    engine: String,
    /// Host memory that can't be given back, in swap or not.
    private: Bytes,
    /// On each GPU.
    gpus: Vec<Bytes>,
}

impl Peaks {
    /// Takes in what a model is measured to hold, where that is more than it was promised. A lower
    /// measurement lowers nothing: it may not have been asked for all yet.
    pub fn note(&mut self, reservation: &Reservation) {
        let (held, promised) = (reservation.held(), &reservation.predicted);
        let Basis { key, engine, .. } = &reservation.basis;
        let of = |list: &[Bytes], n: usize| list.get(n).copied().unwrap_or_default();
        let more_on_gpu = (0..held.gpus.len()).any(|n| of(&held.gpus, n) > of(&promised.gpus, n));
        if key.is_empty() || (held.private <= promised.private && !more_on_gpu) {
            return;
        }
        let same = |peak: &Peak| peak.key == *key && peak.engine == *engine;
        let at = self.kept.iter().position(same).unwrap_or_else(|| {
            if self.kept.len() == REMEMBERED {
                self.kept.pop_front();
            }
            self.kept.push_back(Peak { key: key.clone(), engine: engine.clone(), ..Peak::default() });
            self.kept.len() - 1
        });
        let Some(peak) = self.kept.get_mut(at) else { return };
        if held.private > promised.private {
            peak.private = peak.private.max(grains(held.private + held.swapped));
        }
        peak.gpus.resize(peak.gpus.len().max(held.gpus.len()), Bytes::ZERO);
        for (n, most) in peak.gpus.iter_mut().enumerate() {
            if of(&held.gpus, n) > of(&promised.gpus, n) {
                *most = (*most).max(grains(of(&held.gpus, n)));
            }
        }
    }

    /// The rung with the greater of what is predicted and what was measured, class by class. A plan, for which
    /// no engine is asked after a restart of the daemon, takes it for the one that ran last.
    #[must_use]
    pub fn raised(&self, mut rung: Rung) -> Rung {
        let Some(peak) = self.kept.iter().rfind(|peak| peak.is_of(&rung.basis)) else { return rung };
        let footprint = &mut rung.footprint;
        let before = footprint.total();
        footprint.private = footprint.private.max(peak.private - footprint.swapped);
        footprint.gpus.resize(footprint.gpus.len().max(peak.gpus.len()), Bytes::ZERO);
        for (bytes, most) in footprint.gpus.iter_mut().zip(&peak.gpus) {
            *bytes = (*bytes).max(*most);
        }
        rung.basis.measured_bytes += footprint.total() - before;
        rung
    }

    /// A request with all its rungs raised.
    #[must_use]
    pub fn corrected(&self, mut request: Request) -> Request {
        let all = |rungs: Vec<Rung>| rungs.into_iter().map(|rung| self.raised(rung)).collect();
        request.ladder = all(request.ladder);
        request.advice = all(request.advice);
        request
    }

    /// Keeps a peak that is made use of from being the next to go.
    pub fn used(&mut self, basis: &Basis) {
        if let Some(at) = self.kept.iter().rposition(|peak| peak.is_of(basis))
            && let Some(peak) = self.kept.remove(at)
        {
            self.kept.push_back(peak);
        }
    }
}

impl Peak {
    fn is_of(&self, basis: &Basis) -> bool {
        let engine = basis.engine.is_empty() || self.engine == basis.engine;
        !basis.key.is_empty() && self.key == basis.key && engine
    }
}

fn grains(bytes: Bytes) -> Bytes {
    Bytes(bytes.0.div_ceil(GRAIN.0).saturating_mul(GRAIN.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Footprint, Measured};

    fn mib(n: u64) -> Bytes {
        Bytes::mib(n)
    }

    fn rung(key: &str) -> Rung {
        let footprint = Footprint { private: mib(1000), gpus: vec![mib(2000)], ..Footprint::default() };
        Rung { context: 4096, footprint, basis: Basis { key: key.to_owned(), ..Basis::default() } }
    }

    fn runs(rung: &Rung, private: u64, gpu: u64) -> Reservation {
        Reservation {
            basis: rung.basis.clone(),
            measured: Measured { private: mib(private), gpus: vec![mib(gpu)], ..Measured::default() },
            ..Reservation::for_test(rung.footprint.clone())
        }
    }

    #[test]
    fn the_greater_counts_class_by_class_and_less_lowers_nothing() {
        let mut peaks = Peaks::default();
        peaks.note(&runs(&rung("a"), 990, 2000));
        assert_eq!(peaks, Peaks::default(), "as predicted");
        peaks.note(&runs(&rung("a"), 1100, 1500));
        let raised = peaks.raised(rung("a"));
        // Rounded up to 16 MiB.
        assert_eq!((raised.footprint.private, &raised.footprint.gpus[..]), (mib(1104), &[mib(2000)][..]));
        assert_eq!(raised.basis.measured_bytes, mib(104));
        // The next run is promised so much, and holds it.
        peaks.note(&runs(&raised, 1100, 2000));
        peaks.note(&runs(&raised, 400, 100));
        assert_eq!(peaks.raised(rung("a")), raised);
        assert_eq!(peaks.raised(raised.clone()), raised, "once is enough");
        peaks.note(&runs(&raised, 1100, 2001));
        assert_eq!(peaks.raised(rung("a")).footprint.gpus, [mib(2016)]);
        assert_eq!(peaks.raised(rung("a")).footprint.private, mib(1104));
    }

    #[test]
    fn what_is_in_swap_is_the_models_all_the_same() {
        let mut peaks = Peaks::default();
        let swapping = Rung { footprint: rung("a").footprint.swapping(mib(600)), ..rung("a") };
        let mut runs = runs(&swapping, 500, 0);
        peaks.note(&runs);
        assert_eq!(peaks, Peaks::default(), "more of it is in memory, and not more in all");
        runs.measured.swapped = mib(600);
        peaks.note(&runs);
        assert_eq!(peaks.raised(rung("a")).footprint.private, mib(1104), "500 of 400 beside 600 in swap");
        assert_eq!(peaks.raised(swapping).footprint.private, mib(504));
    }

    #[test]
    fn other_files_settings_or_engines_are_others_and_no_key_is_nobody() {
        let mut peaks = Peaks::default();
        peaks.note(&runs(&rung("a"), 1100, 0));
        peaks.note(&runs(&rung(""), 1100, 0));
        assert_eq!(peaks.raised(rung("b")), rung("b"));
        assert_eq!(peaks.raised(rung("")), rung(""));
    }

    #[test]
    fn another_version_of_the_engine_begins_anew_and_a_plan_takes_the_last() {
        let of = |engine: &str| {
            let mut rung = rung("a");
            rung.basis.engine = engine.to_owned();
            rung
        };
        let mut peaks = Peaks::default();
        peaks.note(&runs(&of("0.7.0"), 1200, 0));
        assert_eq!(peaks.raised(of("0.7.1")), of("0.7.1"));
        assert_eq!(peaks.raised(of("")).footprint.private, mib(1200));
        peaks.note(&runs(&of("0.7.1"), 1100, 0));
        assert_eq!(peaks.raised(of("")).footprint.private, mib(1104));
        assert_eq!(peaks.raised(of("0.7.0")).footprint.private, mib(1200));
    }

    #[test]
    fn few_are_kept_and_those_in_use() {
        let mut peaks = Peaks::default();
        peaks.note(&runs(&rung("used"), 1100, 0));
        for n in 0..2 * REMEMBERED {
            peaks.used(&rung("used").basis);
            peaks.note(&runs(&rung(&n.to_string()), 1100, 0));
        }
        assert_eq!(peaks.kept.len(), REMEMBERED);
        assert_ne!(peaks.raised(rung("used")), rung("used"));
        assert_eq!(peaks.raised(rung("0")), rung("0"));
    }
}

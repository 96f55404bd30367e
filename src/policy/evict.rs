//! Who has to go: the smallest harm that makes enough room.
//!
//! Fewest models first, then the lowest priorities, then idle ones, then what is cheapest to load again, then what
//! was used least recently; never more than needed.

use std::cmp::Reverse;

use crate::bytes::Bytes;

/// A model that may be stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its number among the holders.
    pub holder: usize,
    /// Its priority.
    pub priority: u8,
    /// What it has to do.
    pub usage: Use,
    /// What loading it again reads from disk.
    pub reload: Bytes,
    /// When it was last used; milliseconds since boot.
    pub last_used: u64,
}

/// What a model has to do; the first goes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Use {
    /// Nothing, as far as is known.
    #[default]
    Idle,
    /// It finishes its requests, as it was told to.
    Finishing,
    /// Requests.
    Busy,
}

impl Candidate {
    /// The smaller goes first.
    fn rank(&self) -> (u8, Use, Bytes, u64, usize) {
        (self.priority, self.usage, self.reload, self.last_used, self.holder)
    }
}

/// How many sets are tried before the search stops being exhaustive. Some dozen models, which is
/// more than a machine runs, stay below it.
const BUDGET: usize = 4096;

/// The least harmful subset of `candidates` with which `fits` holds, as holder numbers in the order
/// in which they should be stopped; `None` when even all of them are not enough.
///
/// `fits` must be monotone: more models gone never makes it false. `gain` says how much a model
/// frees by itself and only guides the search among more models than can be tried in full.
pub fn choose(
    candidates: &[Candidate],
    fits: impl Fn(&[usize]) -> bool,
    gain: impl Fn(usize) -> Bytes,
) -> Option<Vec<usize>> {
    let mut sorted = candidates.to_vec();
    sorted.sort_by_key(Candidate::rank);
    let everyone: Vec<usize> = sorted.iter().map(|c| c.holder).collect();
    if fits(&[]) {
        return Some(Vec::new());
    }
    if !fits(&everyone) {
        return None;
    }
    let chosen = exhaustive(&sorted, &fits).unwrap_or_else(|| greedy(&sorted, &fits, &gain));
    Some(chosen.iter().map(|c| c.holder).collect())
}

/// What a set costs, in the order of importance; smaller is better.
fn harm(set: &[Candidate]) -> (usize, u8, usize, Bytes, u64) {
    (
        set.len(),
        set.iter().map(|c| c.priority).max().unwrap_or_default(),
        set.iter().map(|c| c.usage as usize).sum(),
        set.iter().map(|c| c.reload).sum(),
        set.iter().map(|c| c.last_used).max().unwrap_or_default(),
    )
}

/// All sets of one, then of two, and so on, until a size has some that fit; `None` when there are
/// too many sets to try.
fn exhaustive(sorted: &[Candidate], fits: &impl Fn(&[usize]) -> bool) -> Option<Vec<Candidate>> {
    let mut tried = 0;
    for size in 1..=sorted.len() {
        let mut best: Option<Vec<Candidate>> = None;
        let mut picks: Vec<usize> = (0..size).collect();
        loop {
            tried += 1;
            if tried > BUDGET {
                return None;
            }
            let set: Vec<Candidate> = picks.iter().map(|i| sorted[*i]).collect();
            if best.as_ref().is_none_or(|b| harm(&set) < harm(b)) && fits(&holders(&set)) {
                best = Some(set);
            }
            if !advance(&mut picks, sorted.len()) {
                break;
            }
        }
        if best.is_some() {
            return best;
        }
    }
    None
}

/// The next combination of indices below `n` in lexical order; false after the last one.
fn advance(picks: &mut [usize], n: usize) -> bool {
    let k = picks.len();
    let Some(i) = (0..k).rev().find(|i| picks[*i] < n - k + i) else {
        return false;
    };
    picks[i] += 1;
    for j in i + 1..k {
        picks[j] = picks[j - 1] + 1;
    }
    true
}

/// The largest first until it fits, then without those that turned out not to be needed, then
/// with each one exchanged for a less harmful one that does as well.
fn greedy(
    sorted: &[Candidate],
    fits: &impl Fn(&[usize]) -> bool,
    gain: &impl Fn(usize) -> Bytes,
) -> Vec<Candidate> {
    let mut by_gain = sorted.to_vec();
    by_gain.sort_by_key(|c| Reverse(gain(c.holder)));
    let mut low = 1;
    let mut high = by_gain.len();
    while low < high {
        let middle = usize::midpoint(low, high);
        if fits(&holders(&by_gain[..middle])) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    let mut set = by_gain[..low].to_vec();
    let mut costliest_first = set.clone();
    costliest_first.sort_by_key(|c| Reverse(c.rank()));
    for one in &costliest_first {
        let rest: Vec<Candidate> = set.iter().filter(|c| *c != one).copied().collect();
        if fits(&holders(&rest)) {
            set = rest;
        }
    }
    let mut tried = 0;
    for one in costliest_first {
        let Some(place) = set.iter().position(|c| *c == one) else { continue };
        for other in sorted {
            if tried >= BUDGET || set.contains(other) {
                continue;
            }
            if other.rank() >= one.rank() {
                break;
            }
            tried += 1;
            let mut exchanged = set.clone();
            exchanged[place] = *other;
            if fits(&holders(&exchanged)) {
                set = exchanged;
                break;
            }
        }
    }
    set
}

fn holders(set: &[Candidate]) -> Vec<usize> {
    set.iter().map(|c| c.holder).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Candidates as (priority, frees, reload, last used), in GiB and milliseconds.
    fn pick(of: &[(u8, u64, u64, u64)], short: u64) -> Option<Vec<usize>> {
        let candidates: Vec<Candidate> = of
            .iter()
            .enumerate()
            .map(|(holder, c)| Candidate {
                holder,
                priority: c.0,
                usage: if c.3 == u64::MAX { Use::Busy } else { Use::Idle },
                reload: Bytes::gib(c.2),
                last_used: c.3,
            })
            .collect();
        let mut chosen = choose(
            &candidates,
            |gone| gone.iter().map(|n| of[*n].1).sum::<u64>() >= short,
            |n| Bytes::gib(of[n].1),
        )?;
        chosen.sort_unstable();
        Some(chosen)
    }

    #[test]
    fn fewest_then_lowest_priority_then_cheapest_then_oldest() {
        assert_eq!(pick(&[(10, 5, 5, 0), (10, 5, 5, 0), (10, 20, 20, 9)], 10), Some(vec![2]), "one, not two");
        assert_eq!(pick(&[(20, 10, 1, 0), (10, 10, 9, 9)], 10), Some(vec![1]), "the lower priority");
        assert_eq!(pick(&[(10, 10, 9, 0), (10, 10, 1, 9)], 10), Some(vec![1]), "cheaper to reload");
        assert_eq!(pick(&[(10, 10, 9, 0), (10, 10, 1, u64::MAX)], 10), Some(vec![0]), "idle");
        assert_eq!(
            pick(&[(20, 10, 9, 0), (10, 10, 1, u64::MAX)], 10),
            Some(vec![1]),
            "busy and less important"
        );
        assert_eq!(pick(&[(10, 10, 1, 9), (10, 10, 1, 3)], 10), Some(vec![1]), "used longer ago");
    }

    #[test]
    fn nothing_when_nothing_is_short_and_none_when_all_are_not_enough() {
        assert_eq!(pick(&[(10, 5, 5, 0)], 0), Some(vec![]));
        assert_eq!(pick(&[(10, 5, 5, 0), (10, 5, 5, 0)], 11), None);
    }

    #[test]
    fn many_models_are_still_few_evictions_and_none_needless() {
        let many: Vec<(u8, u64, u64, u64)> = (0..1000).map(|n| (10, 1 + n % 13, n, n)).collect();
        let chosen = pick(&many, 130).unwrap();
        assert_eq!(chosen.len(), 10, "ten of the largest cover it");
        let freed: u64 = chosen.iter().map(|n| many[*n].1).sum();
        assert!(chosen.iter().all(|n| freed - many[*n].1 < 130), "none could have stayed");
    }
}

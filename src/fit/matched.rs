//! Which patterns of `--override-tensor` match which tensors.
//!
//! A model is priced dozens of times with the same patterns, and nothing else of a price takes as long as matching
//! thousands of names: so it is done once for a model and a list of patterns, and bounded.

use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};

use super::FitError;
use super::args::shortened;
use super::facts::Named;
use super::pattern::{Pattern, Search};

/// The most patterns of a command line. There are tools that write one for each tensor, of which the largest models
/// have fewer.
pub(super) const MAX_PATTERNS: usize = 2048;
/// Steps of patterns that are looked at, at the most: about a second. A pattern for each of 1700 tensors takes a fifth
/// of them.
const MAX_WORK: u64 = 1 << 28;

/// A list of tensors.
#[derive(Debug, Default)]
pub(super) struct Tensors {
    list: Vec<Named>,
    /// What was asked last: it is asked again.
    last: Mutex<Option<Arc<Matched>>>,
}

/// What a list of patterns matches in a list of tensors.
#[derive(Debug, Default)]
pub(super) struct Matched {
    patterns: Vec<String>,
    first: Vec<Option<u16>>,
}

impl Matched {
    /// The first pattern that matches a tensor, both by their place in the list.
    pub fn first(&self, tensor: usize) -> Option<usize> {
        self.first.get(tensor).copied().flatten().map(usize::from)
    }
}

impl Tensors {
    /// What patterns match in these tensors.
    ///
    /// # Errors
    /// One is no pattern, there are too many, or they take too long.
    pub fn matched(&self, patterns: &[&str]) -> Result<Arc<Matched>, FitError> {
        if patterns.is_empty() {
            return Ok(Arc::default());
        }
        let last = self.last().filter(|last| last.patterns == patterns);
        if let Some(last) = last {
            return Ok(last);
        }
        let first = first_matches(patterns, &self.list, MAX_WORK)?;
        let patterns = patterns.iter().map(|&pattern| pattern.to_owned()).collect();
        let matched = Arc::new(Matched { patterns, first });
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&matched));
        Ok(matched)
    }

    fn last(&self) -> Option<Arc<Matched>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Clone for Tensors {
    fn clone(&self) -> Self {
        Self { list: self.list.clone(), last: Mutex::new(self.last()) }
    }
}

impl From<Vec<Named>> for Tensors {
    fn from(list: Vec<Named>) -> Self {
        Self { list, last: Mutex::default() }
    }
}

impl Deref for Tensors {
    type Target = [Named];

    fn deref(&self) -> &[Named] {
        &self.list
    }
}

/// For each tensor the first pattern that matches its name, within `work` steps. One pattern at a time is compiled.
fn first_matches(patterns: &[&str], tensors: &[Named], mut work: u64) -> Result<Vec<Option<u16>>, FitError> {
    if patterns.len() > MAX_PATTERNS {
        let count = patterns.len();
        return Err(FitError::Unknown(format!(
            "{count} patterns of --override-tensor are too many, {MAX_PATTERNS} is the most"
        )));
    }
    let mut first = vec![None; tensors.len()];
    for (number, text) in (0..).zip(patterns) {
        let pattern = Pattern::new(text).map_err(|why| {
            FitError::Rejected(format!("'{}' of --override-tensor is not {why}", shortened(text)))
        })?;
        let mut search = Search::new(&pattern);
        for (found, tensor) in first.iter_mut().zip(tensors).filter(|(found, _)| found.is_none()) {
            let matches = search.matches(&tensor.name, &mut work).ok_or_else(|| {
                FitError::Unknown(format!(
                    "the patterns of --override-tensor up to '{}' take too long to match with the names of {} \
                     tensors; write fewer or simpler ones",
                    shortened(text),
                    tensors.len()
                ))
            })?;
            *found = matches.then_some(number);
        }
    }
    Ok(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fit::facts::{Class, Group, Place};

    fn tensors(names: &[&str]) -> Tensors {
        let group = Group { place: Place::Output, class: Class::Other, repackable: None, shard: 0, bytes: 0 };
        let named = |name: &&str| Named { name: (*name).to_owned(), group: group.clone(), offset: 0 };
        Tensors::from(names.iter().map(named).collect::<Vec<_>>())
    }

    #[test]
    fn the_first_pattern_that_matches_counts_and_is_looked_for_once() {
        let tensors = tensors(&["output.weight", "blk.0.attn_q.weight", "blk.1.ffn_up.weight"]);
        let firsts = |matched: &Matched| [0, 1, 2].map(|tensor| matched.first(tensor));
        let patterns = ["ffn", "blk", "attn"];
        let matched = tensors.matched(&patterns).unwrap();
        assert_eq!(firsts(&matched), [None, Some(1), Some(0)]);
        assert!(Arc::ptr_eq(&matched, &tensors.matched(&patterns).unwrap()));
        assert!(Arc::ptr_eq(&matched, &tensors.clone().matched(&patterns).unwrap()));
        assert_eq!(firsts(&tensors.matched(&["put"]).unwrap()), [Some(0), None, None]);
        assert_eq!(firsts(&tensors.matched(&[]).unwrap()), [None; 3]);
    }

    #[test]
    fn work_is_bounded() {
        let tensors = tensors(&["output.weight"; 100]);
        assert!(first_matches(&["t.w", "z"], &tensors, 10_000).is_ok());
        let error = first_matches(&["t.w$", "z"], &tensors, 100).unwrap_err();
        assert!(matches!(&error, FitError::Unknown(why) if why.contains("'t.w$' take too long")), "{error}");
        assert!(first_matches(&["x"; MAX_PATTERNS + 1], &tensors, 100).is_err());
    }
}

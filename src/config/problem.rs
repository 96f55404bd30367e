//! What is wrong with a configuration: one [`Problem`] for each thing, with its place and a hint.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// Where in the configuration something stands.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Place {
    /// The file, as an absolute path of the running system (without the root that was loaded from).
    pub file: PathBuf,
    /// The line, from 1; 0 when the file as a whole is meant.
    pub line: u32,
    /// The column in characters, from 1; 0 when the file as a whole is meant.
    pub column: u32,
}

impl Place {
    /// The file as a whole.
    #[must_use]
    pub fn file(file: &Path) -> Self {
        Self { file: file.to_owned(), line: 0, column: 0 }
    }
}

/// `FILE:LINE`, as editors and grep have it.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if self.line > 0 {
            write!(f, ":{}", self.line)?;
        }
        Ok(())
    }
}

/// How bad a [`Problem`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// What it stands in can't be used.
    Error,
    /// It works, but perhaps not as it was meant.
    Warning,
}

/// One thing that is wrong in the configuration.
///
/// Ordered by place, so that a sorted list reads as the files do.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Problem {
    /// Where it stands.
    #[serde(flatten)]
    pub place: Place,
    /// Whether it breaks anything.
    pub severity: Severity,
    /// What is wrong: a clause without a full stop.
    pub message: String,
    /// What to do about it, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Problem {
    /// An error at `place`.
    #[must_use]
    pub fn error(place: Place, message: impl Into<String>) -> Self {
        Self { place, severity: Severity::Error, message: message.into(), hint: None }
    }

    /// A warning at `place`.
    #[must_use]
    pub fn warning(place: Place, message: impl Into<String>) -> Self {
        Self { place, severity: Severity::Warning, message: message.into(), hint: None }
    }

    /// The same with a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Whether it is an error.
    #[must_use]
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}

/// One line: `FILE:LINE:COLUMN: error: MESSAGE; HINT`.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.place)?;
        if self.place.line > 0 {
            write!(f, ":{}", self.place.column)?;
        }
        let severity = if self.is_error() { "error" } else { "warning" };
        write!(f, ": {severity}: {}", self.message)?;
        if let Some(hint) = &self.hint {
            write!(f, "; {hint}")?;
        }
        Ok(())
    }
}

/// `text` in single quotes, short and without control characters: for use in messages.
#[must_use]
pub fn quoted(text: &str) -> String {
    const LONGEST: usize = 80;
    let mut out = String::from("'");
    out.extend(text.chars().take(LONGEST).flat_map(|c| match c {
        '\'' | '"' => c.to_string().chars().collect::<Vec<_>>(),
        _ => c.escape_debug().collect(),
    }));
    if text.chars().nth(LONGEST).is_some() {
        out.push('…');
    }
    out.push('\'');
    out
}

/// The candidate that `word` was probably meant to be: the one that it abbreviates, or the one at the
/// smallest edit distance when that is at most a third of the word's length (at least 1).
#[must_use]
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let candidates: Vec<_> = candidates.into_iter().collect();
    if let [only] =
        candidates.iter().filter(|c| word.len() >= 3 && c.starts_with(word)).collect::<Vec<_>>()[..]
    {
        return Some(only);
    }
    let word: Vec<char> = word.chars().take(64).flat_map(char::to_lowercase).collect();
    candidates
        .into_iter()
        .map(|candidate| (distance(&word, &candidate.chars().collect::<Vec<_>>()), candidate))
        .min_by_key(|&(distance, _)| distance)
        .filter(|&(distance, candidate)| distance <= (word.len().min(candidate.len()) / 3).max(1))
        .map(|(_, candidate)| candidate)
}

/// Edit distance where a swap of two neighbours counts once (optimal string alignment).
fn distance(a: &[char], b: &[char]) -> usize {
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replaced.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suggests_what_is_near_and_nothing_else() {
        let keys = ["context", "context-min", "cache-type-k", "cache-type-v", "port", "ttl"];
        assert_eq!(nearest("contxt", keys), Some("context"));
        assert_eq!(nearest("context_min", keys), Some("context-min"));
        assert_eq!(nearest("cache-tpye-v", keys), Some("cache-type-v"));
        assert_eq!(nearest("Port", keys), Some("port"));
        assert_eq!(nearest("por", keys), Some("port"));
        assert_eq!(nearest("cac", keys), None, "it could be either");
        assert_eq!(nearest("tll", keys), Some("ttl"));
        assert_eq!(nearest("threads", keys), None);
        assert_eq!(nearest("", keys), None);
    }

    #[test]
    fn quotes_without_control_characters() {
        assert_eq!(quoted("a\nb"), r"'a\nb'");
        assert_eq!(quoted("it's"), "'it's'");
        assert_eq!(quoted(&"x".repeat(200)).chars().count(), 83);
    }

    #[test]
    fn prints_as_one_line() {
        let place = Place { file: "/etc/plimsoll/plimsoll.toml".into(), line: 3, column: 1 };
        let problem = Problem::error(place, "unknown key 'mdoe'").hint("did you mean 'mode'?");
        assert_eq!(
            problem.to_string(),
            "/etc/plimsoll/plimsoll.toml:3:1: error: unknown key 'mdoe'; did you mean 'mode'?"
        );
    }
}

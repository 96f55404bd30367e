//! The version of a llama-server, from what `llama-server --version` prints.

use std::fmt;

/// The oldest build that is run: it has `--fit`, `--cache-ram` and `--ctx-checkpoints`, all of which
/// have to be turned down for an estimate to hold.
pub const OLDEST_BUILD: u32 = 7415;

/// Builds from this one on take `--load-mode`; `--no-mmap` and its kin are gone since build 10884.
/// (Those between the two take both.)
const LOAD_MODE_BUILD: u32 = 10470;

/// Builds made from a copy of the source without its history count from 1.
const SHALLOW_BUILDS: u32 = 100;

/// A version of llama-server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Version {
    /// The release, `0.7.0`; builds before August 2026 had none.
    pub release: Option<String>,
    /// The number of the build, where it means anything.
    pub build: Option<u32>,
}

impl Version {
    /// Whether it takes `--load-mode`.
    #[must_use]
    pub fn has_load_mode(&self) -> bool {
        self.release.is_some() || self.build.is_some_and(|build| build >= LOAD_MODE_BUILD)
    }

    /// Whether it is known to be older than what can be run.
    #[must_use]
    pub fn is_too_old(&self) -> bool {
        self.release.is_none() && self.build.is_some_and(|build| build < OLDEST_BUILD)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.release, self.build) {
            (Some(release), Some(build)) => write!(f, "{release} (build {build})"),
            (Some(release), None) => f.write_str(release),
            (None, Some(build)) => write!(f, "build {build}"),
            (None, None) => f.write_str("of unknown version"),
        }
    }
}

/// Reads the output of `llama-server --version`: `version: 0.7.0 (build 11669, commit Debian)`, or
/// before August 2026 `version: 10360 (90e6a9131)`. Other lines are log. None when no line is one.
#[must_use]
pub fn parse(text: &str) -> Option<Version> {
    let line = text.lines().take(200).find_map(|line| line.trim().strip_prefix("version:"))?.trim();
    let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
    let digits = |text: &str| text.chars().take_while(char::is_ascii_digit).collect::<String>();
    let meant = |number: String| number.parse().ok().filter(|build| *build >= SHALLOW_BUILDS);
    if first.contains('.') && first.starts_with(|c: char| c.is_ascii_digit()) {
        let build = rest.split_once("build ").map(|(_, tail)| digits(tail)).and_then(meant);
        return Some(Version { release: Some(first.chars().take(40).collect()), build });
    }
    let number = digits(first.strip_prefix('b').unwrap_or(first));
    if number.is_empty() { None } else { Some(Version { release: None, build: meant(number) }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_both_formats() {
        let now =
            parse("version: 0.7.0 (build 11669, commit Debian)\nbuilt with GNU 16.2.0 for Linux x86_64\n");
        assert_eq!(now, Some(Version { release: Some("0.7.0".to_owned()), build: Some(11669) }));
        let now = now.unwrap();
        assert!(now.has_load_mode() && !now.is_too_old());
        assert_eq!(now.to_string(), "0.7.0 (build 11669)");

        let log = "ggml_vulkan: Found 1 Vulkan devices:\nversion: 9219 (90e6a9131)\nbuilt with cc";
        let before = parse(log).unwrap();
        assert_eq!(before, Version { release: None, build: Some(9219) });
        assert!(!before.has_load_mode() && !before.is_too_old());
        assert!(parse("version: 4000 (abc)").unwrap().is_too_old());
    }

    #[test]
    fn a_build_without_history_has_no_number() {
        let shallow = parse("version: 0.2.0-dev (build 1, commit xxxxxx)").unwrap();
        assert_eq!(shallow, Version { release: Some("0.2.0-dev".to_owned()), build: None });
        assert!(shallow.has_load_mode());
        let unknown = parse("version: 0 (unknown)").unwrap();
        assert_eq!(unknown, Version { release: None, build: None });
        assert!(!unknown.is_too_old());
    }

    #[test]
    fn refuses_the_rest() {
        for text in ["", "llama-server", "version:", "version: unknown", "versions: 5"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}

//! Reads the keys of a table one by one into typed values, collecting everything that is wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use super::problem::{Place, Problem, nearest, quoted};
use super::span;
use super::table::{Entry, Item, Table, Value};
use crate::bytes::Bytes;

/// What is wrong with a value, and where if not at the value itself.
pub(super) struct Wrong {
    place: Option<Place>,
    message: String,
    hint: Option<String>,
    /// What else is wrong with it: further items of a list.
    also: Vec<Wrong>,
}

impl Wrong {
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self { place: None, message: message.into(), hint: None, also: Vec::new() }
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    fn at(mut self, place: &Place) -> Self {
        self.place.get_or_insert_with(|| place.clone());
        self
    }
}

type Read<T> = Result<T, Wrong>;

/// Reads one table; [`Reader::finish`] reports the keys that nobody asked for.
pub(super) struct Reader<'a> {
    table: Table,
    known: BTreeSet<&'static str>,
    given: BTreeMap<&'static str, Place>,
    problems: &'a mut Vec<Problem>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(table: Table, problems: &'a mut Vec<Problem>) -> Self {
        Self { table, known: BTreeSet::new(), given: BTreeMap::new(), problems }
    }

    /// The value of `key`, as `convert` reads it; none when it is not given or wrong.
    pub(super) fn read<T>(&mut self, key: &'static str, convert: impl FnOnce(&Item) -> Read<T>) -> Option<T> {
        self.known.insert(key);
        let Entry { place, item } = self.table.take(key)?;
        self.given.insert(key, place);
        match convert(&item) {
            Ok(value) => Some(value),
            Err(mut wrong) => {
                let also = std::mem::take(&mut wrong.also);
                for wrong in std::iter::once(wrong).chain(also) {
                    let place = wrong.place.unwrap_or_else(|| item.place.clone());
                    let mut problem = Problem::error(place, format!("'{key}' {}", wrong.message));
                    problem.hint = wrong.hint;
                    self.problems.push(problem);
                }
                None
            }
        }
    }

    /// Reports something that is wrong.
    pub(super) fn problem(&mut self, problem: Problem) {
        self.problems.push(problem);
    }

    /// The table under `key` with a place for each of its own keys; none when it is not given.
    pub(super) fn table(&mut self, key: &'static str) -> Option<Table> {
        self.read(key, |item| match &item.value {
            Value::Table(table) => Ok(table.clone()),
            other => Err(expected("a table", other)),
        })
    }

    /// Reports the keys that were not asked for, and answers the places of those that were given.
    /// `elsewhere` explains keys that are known but don't belong here.
    pub(super) fn finish(self, elsewhere: impl Fn(&str) -> Option<String>) -> BTreeMap<&'static str, Place> {
        for (key, entry) in self.table.0 {
            let problem = Problem::error(entry.place, format!("unknown key {}", quoted(&key)));
            let hint = elsewhere(&key)
                .or_else(|| nearest(&key, self.known.iter().copied()).map(|k| format!("did you mean '{k}'?")))
                .unwrap_or_else(|| {
                    let keys: Vec<_> = self.known.iter().copied().collect();
                    format!("the keys here are {}", keys.join(", "))
                });
            self.problems.push(problem.hint(hint));
        }
        self.given
    }
}

fn expected(what: &str, found: &Value) -> Wrong {
    Wrong::new(format!("must be {what}, not {}", found.kind()))
}

pub(super) fn text(item: &Item) -> Read<String> {
    match &item.value {
        Value::Text(text) if text.contains('\0') => Err(Wrong::new("must not hold a NUL character")),
        Value::Text(text) if text.is_empty() => Err(Wrong::new("must not be empty")),
        Value::Text(text) => Ok(text.clone()),
        other => Err(expected("a text in quotes", other)),
    }
}

pub(super) fn boolean(item: &Item) -> Read<bool> {
    match &item.value {
        Value::Boolean(on) => Ok(*on),
        other => Err(expected("true or false, without quotes", other)),
    }
}

/// An integer from `least` to `most`.
pub(super) fn integer<T: TryFrom<i64>>(least: i64, most: i64) -> impl Fn(&Item) -> Read<T> {
    move |item| {
        let range = if most == i64::MAX {
            format!("an integer of at least {least}")
        } else {
            format!("an integer from {least} to {most}")
        };
        match &item.value {
            Value::Integer(n) if (least..=most).contains(n) => {
                T::try_from(*n).map_err(|_| Wrong::new(format!("must be {range}, not {n}")))
            }
            Value::Integer(n) => Err(Wrong::new(format!("must be {range}, not {n}"))),
            other => Err(expected(&format!("{range}, without quotes"), other)),
        }
    }
}

/// A size such as `"40GiB"`, or a number of bytes.
pub(super) fn size(item: &Item) -> Read<Bytes> {
    match &item.value {
        Value::Integer(n) => {
            u64::try_from(*n).map(Bytes).map_err(|_| Wrong::new(format!("must be a size, not {n}")))
        }
        Value::Text(text) => {
            text.parse().map_err(|e: crate::bytes::ParseBytesError| Wrong::new(format!("is wrong: {e}")))
        }
        other => Err(expected("a size such as \"40GiB\"", other)),
    }
}

/// A time span such as `"30min"`.
pub(super) fn duration(item: &Item) -> Read<Duration> {
    match &item.value {
        Value::Integer(n) if *n >= 0 => Ok(Duration::from_secs(n.unsigned_abs())),
        Value::Text(text) => span::parse(text).ok_or_else(|| {
            Wrong::new(format!("must be a time span, not {}", quoted(text)))
                .hint("write \"90s\", \"30min\", \"2h\" or \"1h 30min\"")
        }),
        other => Err(expected("a time span such as \"30min\"", other)),
    }
}

/// One of the given words.
pub(super) fn word<T: Copy>(words: &'static [(&'static str, T)]) -> impl Fn(&Item) -> Read<T> {
    move |item| {
        let Value::Text(text) = &item.value else { return Err(expected(&one_of(words), &item.value)) };
        words.iter().find(|(word, _)| word == text).map(|(_, value)| *value).ok_or_else(|| {
            let wrong = Wrong::new(format!("must be {}, not {}", one_of(words), quoted(text)));
            match nearest(text, words.iter().map(|(word, _)| *word)) {
                Some(near) => wrong.hint(format!("did you mean \"{near}\"?")),
                None => wrong,
            }
        })
    }
}

fn one_of<T>(words: &[(&'static str, T)]) -> String {
    let quoted: Vec<_> = words.iter().map(|(word, _)| format!("\"{word}\"")).collect();
    match quoted.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => quoted.concat(),
    }
}

/// An absolute path without `..`, which the path of a file on this machine never needs.
pub(super) fn path(item: &Item) -> Read<PathBuf> {
    let path = PathBuf::from(text(item)?);
    if !path.is_absolute() {
        return Err(Wrong::new(format!("must be an absolute path, not {}", quoted(&path.to_string_lossy())))
            .hint(if path.starts_with("~") {
                "the server runs as a user of its own: write the whole path instead of '~'"
            } else {
                "write the whole path, beginning with '/'"
            }));
    }
    if path.to_string_lossy().chars().any(char::is_control) {
        return Err(Wrong::new("must not hold control characters"));
    }
    if Path::new(&path).components().any(|part| part == Component::ParentDir) {
        return Err(Wrong::new("must be a path without '..'"));
    }
    Ok(path)
}

/// A list, each item read by `convert`.
pub(super) fn list<T>(convert: impl Fn(&Item) -> Read<T>) -> impl Fn(&Item) -> Read<Vec<T>> {
    move |item| match &item.value {
        Value::Array(items) => {
            let mut wrong = Vec::new();
            let read: Vec<T> = items
                .iter()
                .filter_map(|item| convert(item).map_err(|w| wrong.push(w.at(&item.place))).ok())
                .collect();
            if wrong.is_empty() {
                return Ok(read);
            }
            let mut first = wrong.remove(0);
            first.also = wrong;
            Err(first)
        }
        other => Err(expected("a list in square brackets", other)),
    }
}

/// An argument of a command: a text (which may be empty), or a number for which quotes were
/// forgotten.
pub(super) fn argument(item: &Item) -> Read<String> {
    match &item.value {
        Value::Text(text) if text.is_empty() => Ok(String::new()),
        Value::Integer(n) => Ok(n.to_string()),
        _ => text(item),
    }
}

/// An address or host name to listen on.
pub(super) fn host(item: &Item) -> Read<String> {
    let mut host = text(item)?;
    // By that name an engine may listen on ::1 alone, and would be asked on 127.0.0.1.
    if host.eq_ignore_ascii_case("localhost") {
        host = "127.0.0.1".to_owned();
    }
    let wrong =
        |text: String| Err(Wrong::new(text).hint("for example \"127.0.0.1\", \"::1\" or \"0.0.0.0\""));
    // llama-server makes a socket of that name in its working directory.
    if host.ends_with(".sock") {
        let why = "llama-server takes it for a Unix socket, where the daemon can't reach it";
        return wrong(format!("must not end in '.sock' as {} does: {why}", quoted(&host)));
    }
    let label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && label.len() <= 63
    };
    if host.parse::<IpAddr>().is_ok() || (host.len() <= 253 && host.split('.').all(label)) {
        Ok(host)
    } else {
        wrong(format!("must be an address or a host name, not {}", quoted(&host)))
    }
}

//! TOML with the place of everything in it: what a fragment is parsed into, and how a later one is
//! laid over an earlier one.

use std::collections::BTreeMap;
use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::problem::{Place, Problem};

/// How deep tables and arrays may stand in one another: far more than any key needs.
const DEEPEST: usize = 16;

/// A value, with where it stands.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Item {
    pub(super) place: Place,
    pub(super) value: Value,
}

/// The values of TOML that a configuration may hold.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Text(String),
    Integer(i64),
    Boolean(bool),
    Array(Vec<Item>),
    Table(Table),
    /// A kind that no key takes (by its name).
    Other(&'static str),
}

impl Value {
    /// What kind of value it is, in words.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) => "a text",
            Self::Integer(_) => "an integer",
            Self::Boolean(_) => "true or false",
            Self::Array(_) => "a list",
            Self::Table(_) => "a table",
            Self::Other(kind) => kind,
        }
    }
}

/// Keys with their values and the places of both, in the order of their names.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Table(pub(super) BTreeMap<String, Entry>);

/// One key of a [`Table`].
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    /// Where the key itself stands.
    pub(super) place: Place,
    pub(super) item: Item,
}

impl Table {
    /// Parses `text`, which stands in `file`; every error of syntax is reported, and a text with
    /// one has no table: what could be recovered from it might not be what was meant.
    pub(super) fn parse(file: &Path, text: &str, problems: &mut Vec<Problem>) -> Option<Self> {
        let lines = Lines::new(file, text);
        let (root, errors) = DeTable::parse_recoverable(text);
        if errors.is_empty() {
            return Some(lines.table(root.into_inner(), 0));
        }
        let mut last_line = 0;
        for error in &errors {
            let place = lines.place(error.span().map_or(0, |span| span.start));
            // One error often brings others behind it on the same line.
            if place.line != last_line {
                last_line = place.line;
                let message = error.message().replace('\n', ", ");
                problems.push(Problem::error(place, format!("not valid TOML: {message}")));
            }
        }
        None
    }

    /// Lays `over` over this table: its keys win, and tables are joined key by key.
    pub(super) fn merge(&mut self, over: Self) {
        for (key, entry) in over.0 {
            match (self.0.get_mut(&key).map(|old| &mut old.item.value), entry.item.value) {
                (Some(Value::Table(old)), Value::Table(new)) => old.merge(new),
                (_, value) => {
                    let item = Item { place: entry.item.place, value };
                    self.0.insert(key, Entry { place: entry.place, item });
                }
            }
        }
    }

    /// Removes `key` and answers its value.
    pub(super) fn take(&mut self, key: &str) -> Option<Entry> {
        self.0.remove(key)
    }
}

/// Turns byte offsets into lines and columns.
struct Lines<'a> {
    file: &'a Path,
    text: &'a str,
    /// The offset at which each line starts.
    starts: Vec<usize>,
}

impl<'a> Lines<'a> {
    fn new(file: &'a Path, text: &'a str) -> Self {
        let starts = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        Self { file, text, starts }
    }

    fn place(&self, offset: usize) -> Place {
        let line = self.starts.partition_point(|&start| start <= offset).max(1);
        let before = self.text.get(self.starts[line - 1]..offset).unwrap_or("");
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Place { file: self.file.to_owned(), line: number(line), column: number(before.chars().count() + 1) }
    }

    fn table(&self, table: DeTable<'_>, depth: usize) -> Table {
        let entries = table.into_iter().map(|(key, value)| {
            let place = self.place(key.span().start);
            (key.into_inner().into_owned(), Entry { place, item: self.item(value, depth + 1) })
        });
        Table(entries.collect())
    }

    fn item(&self, value: toml::Spanned<DeValue<'_>>, depth: usize) -> Item {
        let place = self.place(value.span().start);
        let value = match value.into_inner() {
            _ if depth > DEEPEST => Value::Other("too deeply nested a value"),
            DeValue::String(text) => Value::Text(text.into_owned()),
            DeValue::Integer(n) => i64::from_str_radix(n.as_str(), n.radix())
                .map_or(Value::Other("an integer beyond 64 bits"), Value::Integer),
            DeValue::Boolean(on) => Value::Boolean(on),
            DeValue::Array(items) => {
                Value::Array(items.into_iter().map(|item| self.item(item, depth + 1)).collect())
            }
            DeValue::Table(table) => Value::Table(self.table(table, depth)),
            DeValue::Float(_) => Value::Other("a number with a fraction"),
            DeValue::Datetime(_) => Value::Other("a date or time"),
        };
        Item { place, value }
    }
}

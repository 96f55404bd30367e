//! What is printed: text, tables and colours on standard output, progress on standard error.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};

use serde::Serialize;

use super::failure::Failure;
use crate::bytes::{Bytes, GIB};
use crate::text::harmless;

/// Prints `text` and a line feed to standard output. A reader that has gone away is no error.
///
/// # Errors
/// A full disk and the like.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    let line_feed = if text.ends_with('\n') { "" } else { "\n" };
    match out
        .write_all(text.as_bytes())
        .and_then(|()| out.write_all(line_feed.as_bytes()))
        .and_then(|()| out.flush())
    {
        Ok(()) => Ok(()),
        Err(error) => Failure::from_output(&error).map_or(Ok(()), Err),
    }
}

/// Prints one JSON value, indented.
///
/// # Errors
/// As [`print`].
pub fn print_json<T: Serialize>(value: &T) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Failure::failed(e.to_string()))?;
    print(&text)
}

/// A line on standard error; where that goes nowhere, so be it.
pub fn eprint(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// The styles in use; on anything but a terminal, and with NO_COLOR, they do nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// As it is.
    Plain,
    /// Headings and names.
    Bold,
    /// What matters less.
    Dim,
    /// Good.
    Green,
    /// Look here.
    Yellow,
    /// Bad.
    Red,
}

/// Whether to colour standard output: a terminal, TERM not `dumb`, NO_COLOR unset or empty.
#[must_use]
pub fn colour() -> bool {
    wants_colour(
        std::io::stdout().is_terminal(),
        std::env::var("NO_COLOR").ok().as_deref(),
        std::env::var("TERM").ok().as_deref(),
    )
}

fn wants_colour(terminal: bool, no_color: Option<&str>, term: Option<&str>) -> bool {
    terminal && no_color.is_none_or(str::is_empty) && term != Some("dumb")
}

/// Applies colours, or not.
#[derive(Clone, Copy, Debug)]
pub struct Painter {
    on: bool,
}

impl Painter {
    /// For standard output as it is.
    #[must_use]
    pub fn stdout() -> Self {
        Self { on: colour() }
    }

    /// Never a colour.
    #[cfg(test)]
    pub const fn plain() -> Self {
        Self { on: false }
    }

    /// `text` in `style`.
    #[must_use]
    pub fn paint(self, style: Style, text: &str) -> String {
        let code = match style {
            Style::Plain => return text.to_owned(),
            Style::Bold => "1",
            Style::Dim => "2",
            Style::Green => "32",
            Style::Yellow => "33",
            Style::Red => "31",
        };
        if self.on && !text.is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// GiB with one decimal and no unit, for columns whose head names it.
#[must_use]
pub fn gib(bytes: Bytes) -> String {
    let tenths = (u128::from(bytes.0) * 10 + u128::from(GIB) / 2) / u128::from(GIB);
    format!("{}.{}", tenths / 10, tenths % 10)
}

/// `text` folded at blanks to 80 columns, the lines after the first indented, a line feed at the
/// end of each. Escape sequences count as text, which only folds earlier.
#[must_use]
pub fn wrap(text: &str, indent: usize) -> String {
    const WIDTH: usize = 80;
    let mut out = String::new();
    let mut column = 0;
    let lead = text.len() - text.trim_start().len();
    for (n, word) in text.split_whitespace().enumerate() {
        let width = word.chars().count();
        if n == 0 {
            let _ = write!(out, "{:lead$}{word}", "");
            column = lead + width;
        } else if column + 1 + width > WIDTH {
            let _ = write!(out, "\n{:indent$}{word}", "");
            column = indent + width;
        } else {
            let _ = write!(out, " {word}");
            column += 1 + width;
        }
    }
    out.push('\n');
    out
}

/// A table of left- and right-aligned columns, two spaces between them.
#[derive(Clone, Debug, Default)]
pub struct Table {
    head: Vec<(String, Align)>,
    rows: Vec<Vec<(String, Style)>>,
}

/// Which side of a column is straight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

impl Table {
    /// A table with these columns.
    #[must_use]
    pub fn new(columns: &[(&str, Align)]) -> Self {
        Self {
            head: columns.iter().map(|(name, align)| ((*name).to_owned(), *align)).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row; missing cells are empty.
    pub fn row(&mut self, cells: Vec<(String, Style)>) {
        self.rows.push(cells);
    }

    /// The table as text, each line ended by a line feed and without trailing blanks.
    #[must_use]
    pub fn render(&self, painter: Painter) -> String {
        let widths: Vec<usize> = (0..self.head.len())
            .map(|n| {
                let cells =
                    self.rows.iter().filter_map(|row| row.get(n)).map(|(text, _)| text.chars().count());
                cells.chain([self.head[n].0.chars().count()]).max().unwrap_or(0)
            })
            .collect();
        let mut out = String::new();
        let head = self.head.iter().map(|(name, _)| (name.clone(), Style::Bold)).collect();
        for row in std::iter::once(&head).chain(&self.rows) {
            self.render_row(&mut out, row, &widths, painter);
        }
        out
    }

    fn render_row(&self, out: &mut String, row: &[(String, Style)], widths: &[usize], painter: Painter) {
        let mut pending = 0;
        for (n, ((text, style), width)) in row.iter().zip(widths).enumerate() {
            let pad = width - text.chars().count();
            let right = self.head[n].1 == Align::Right;
            pending += if n > 0 { 2 } else { 0 };
            if right {
                pending += pad;
            }
            if !text.is_empty() {
                let _ = write!(out, "{:pending$}{}", "", painter.paint(*style, text));
                pending = 0;
            }
            if !right {
                pending += pad;
            }
        }
        out.push('\n');
    }
}

/// One line on standard error that says what is going on: redrawn on a terminal, and a line for
/// each change elsewhere.
#[derive(Debug)]
pub struct Progress {
    terminal: bool,
    shown: String,
}

impl Progress {
    /// Nothing shown yet.
    #[must_use]
    pub fn new() -> Self {
        Self { terminal: std::io::stderr().is_terminal(), shown: String::new() }
    }

    /// Shows `text`, unless it is what stands there already.
    pub fn show(&mut self, text: &str) {
        let text = harmless(text.lines().next().unwrap_or_default());
        if text == self.shown {
            return;
        }
        self.shown.clone_from(&text);
        let mut err = std::io::stderr().lock();
        if self.terminal {
            let _ = write!(err, "\r\x1b[K{text}").and_then(|()| err.flush());
        } else {
            let _ = writeln!(err, "{text}");
        }
    }

    /// Takes the line away from a terminal.
    pub fn clear(&mut self) {
        if self.terminal && !self.shown.is_empty() {
            let mut err = std::io::stderr().lock();
            let _ = write!(err, "\r\x1b[K").and_then(|()| err.flush());
        }
        self.shown.clear();
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align_and_leave_no_trailing_blanks() {
        let mut table = Table::new(&[("NAME", Align::Left), ("GiB", Align::Right), ("STATE", Align::Left)]);
        let plain = |text: &str| (text.to_owned(), Style::Plain);
        table.row(vec![plain("deepseek"), plain("170.0"), plain("running")]);
        table.row(vec![plain("ä"), plain("1.0"), plain("")]);
        table.row(vec![plain("short")]);
        let text = table.render(Painter::plain());
        assert_eq!(text, "NAME        GiB  STATE\ndeepseek  170.0  running\nä           1.0\nshort\n");
    }

    #[test]
    fn colours_are_for_terminals_that_want_them() {
        assert!(wants_colour(true, None, Some("xterm")));
        assert!(wants_colour(true, Some(""), None));
        assert!(!wants_colour(true, Some("1"), Some("xterm")));
        assert!(!wants_colour(true, None, Some("dumb")));
        assert!(!wants_colour(false, None, Some("xterm")));
        assert_eq!(Painter { on: true }.paint(Style::Red, "no"), "\x1b[31mno\x1b[0m");
        assert_eq!(Painter::plain().paint(Style::Red, "no"), "no");
    }

    #[test]
    fn sizes_in_columns_have_one_decimal() {
        assert_eq!(gib(Bytes::ZERO), "0.0");
        assert_eq!(gib(Bytes::mib(44)), "0.0");
        assert_eq!(gib(Bytes::mib(1480)), "1.4");
        assert_eq!(gib(Bytes(u64::MAX)), "17179869184.0");
    }
}

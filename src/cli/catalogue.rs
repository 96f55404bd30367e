//! `plimsoll catalogue`: the models whose size is known before they are downloaded.

use serde_json::{Value, json};

use super::args::Catalogue;
use super::failure::Failure;
use super::output::{self, Align, Painter, Style, Table, wrap};
use crate::bytes::Bytes;
use crate::catalogue::{self, CatalogueError, Choice, Entry};

impl From<CatalogueError> for Failure {
    fn from(error: CatalogueError) -> Self {
        match error {
            CatalogueError::NoModel { .. } => {
                Self::usage(error.to_string()).hint("'plimsoll catalogue' lists what it has")
            }
            CatalogueError::NoQuantisation { .. } => Self::usage(error.to_string()),
            _ => Self::failed(error.to_string()),
        }
    }
}

pub(super) fn catalogue(args: &Catalogue) -> Result<(), Failure> {
    let entries = catalogue::entries()?;
    let shown: Vec<&Entry> = match &args.name {
        None => entries.iter().collect(),
        Some(name) => vec![catalogue::entry(name)?],
    };
    if args.json {
        let models = shown.iter().map(|entry| json(entry)).collect::<Result<Vec<_>, _>>()?;
        return output::print_json(&json!({ "models": models }));
    }
    let painter = Painter::stdout();
    let text = if args.name.is_some() { one(shown[0], painter)? } else { all(&shown, painter)? };
    output::print(&text)
}

/// The bytes of a file of the catalogue, and its parameters.
fn size(choice: &Choice) -> Result<(u64, u64), Failure> {
    let model = choice.model()?;
    Ok((model.file_bytes(), model.parameters()))
}

fn choices(entry: &'static Entry) -> impl Iterator<Item = Choice> {
    entry.files.iter().map(move |file| Choice { entry, file })
}

fn json(entry: &'static Entry) -> Result<Value, Failure> {
    let file = |choice: Choice| {
        let (bytes, parameters) = size(&choice)?;
        Ok(json!({
            "name": choice.name(),
            "file_bytes": bytes,
            "parameters": parameters,
            "assumed": choice.is_assumed(),
            "provenance": choice.provenance(),
        }))
    };
    Ok(json!({
        "name": entry.name,
        "title": entry.title,
        "aliases": entry.aliases,
        "architecture": entry.architecture,
        "note": entry.note,
        "files": choices(entry).map(file).collect::<Result<Vec<_>, Failure>>()?,
    }))
}

fn all(entries: &[&'static Entry], painter: Painter) -> Result<String, Failure> {
    let mut table = Table::new(&[("MODEL", Align::Left), ("FILES, IN GIB", Align::Left)]);
    for entry in entries {
        let mut files = Vec::new();
        for choice in choices(entry) {
            let (bytes, _) = size(&choice)?;
            files.push(format!("{} {}", choice.file.name, output::gib(Bytes(bytes))));
        }
        let mut files = if files.is_empty() { "none".to_owned() } else { files.join(", ") };
        if entry.status == catalogue::Status::Assumed {
            files.push_str(" (assumed: never published)");
        }
        table.row(vec![(entry.name.clone(), Style::Bold), (files, Style::Plain)]);
    }
    let mut out = table.render(painter);
    out.push_str("\n'plimsoll catalogue NAME' tells the sources; 'plimsoll fit NAME:FILE' prices one.\n");
    Ok(out)
}

fn one(entry: &'static Entry, painter: Painter) -> Result<String, Failure> {
    let mut out = format!("{}\n", painter.paint(Style::Bold, &entry.title));
    let mut line = |name: &str, text: &str| out.push_str(&wrap(&format!("  {name:<9} {text}"), 12));
    line("name", &entry.name);
    if !entry.aliases.is_empty() {
        line("also", &entry.aliases.join(", "));
    }
    line("kind", &entry.architecture);
    line("figures", &entry.source);
    if let Some(note) = &entry.note {
        line("note", note);
    }
    for choice in choices(entry) {
        let (bytes, _) = size(&choice)?;
        let assumed = if choice.is_assumed() { ", assumed" } else { "" };
        line(&choice.file.name, &format!("{}{assumed}: {}", Bytes(bytes), choice.file.source()));
    }
    Ok(out)
}

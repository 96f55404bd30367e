//! Holds the code to the direction of imports that ARCHITECTURE.md states.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

/// The rooms of `src/`, each with its floor. A room may import from lower floors only.
const FLOORS: &[(&str, u8)] = &[
    ("bin", 10),
    ("cli", 9),
    ("dbus", 8),
    ("daemon", 7),
    ("action", 6),
    ("host", 6),
    ("sim", 6),
    ("ports", 5),
    ("policy", 4),
    ("ledger", 3),
    ("engine", 3),
    ("catalogue", 3),
    ("fit", 2),
    ("config", 2),
    ("gguf", 1),
    ("bytes", 0),
    ("text", 0),
    ("os", 1),
];

fn floor(room: &str) -> u8 {
    let found = FLOORS.iter().find(|(name, _)| *name == room);
    found.unwrap_or_else(|| panic!("src/{room} has no floor: give it one here and in ARCHITECTURE.md")).1
}

fn sources(directory: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

/// The rooms that a source names: `crate::ROOM` (and `plimsoll::ROOM` in the binaries), one or several in braces.
fn imports(text: &str) -> Vec<String> {
    let mut rooms = Vec::new();
    let code =
        text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    for prefix in ["crate::", "plimsoll::", "plimsoll_estimate::"] {
        for (at, _) in code.match_indices(prefix) {
            let rest = &code[at + prefix.len()..];
            let word =
                |s: &str| s.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
            if let Some(list) = rest.strip_prefix('{') {
                let mut depth = 0;
                let mut item = String::new();
                for c in list.chars() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => rooms.push(word(std::mem::take(&mut item).trim())),
                        _ if depth == 0 => item.push(c),
                        _ => {}
                    }
                }
                rooms.push(word(item.trim()));
            } else {
                rooms.push(word(rest));
            }
        }
    }
    rooms.retain(|room| room.chars().next().is_some_and(char::is_lowercase));
    rooms
}

#[test]
fn imports_go_down_only() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let mut wrong = Vec::new();
    let mut seen = 0;
    for file in files {
        let inside = file.strip_prefix(&src).unwrap();
        let room = inside.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        if room == "lib" || room == "estimate" {
            continue;
        }
        for import in imports(&std::fs::read_to_string(&file).unwrap()) {
            seen += 1;
            if import != room && floor(&import) >= floor(room) {
                wrong.push(format!(
                    "{} (floor {}) imports {import} (floor {})",
                    inside.display(),
                    floor(room),
                    floor(&import)
                ));
            }
        }
    }
    assert!(seen > 50, "only {seen} imports were found: the reader of imports is broken");
    assert!(wrong.is_empty(), "imports that don't go down:\n{}", wrong.join("\n"));
}

#[test]
fn the_reader_of_imports_sees_single_and_grouped_ones() {
    let text = "use crate::bytes::Bytes;\nuse crate::{fit::{Facts, args}, gguf};\n// use crate::nothing;\nlet x = crate::ledger::Pool::Memory;";
    assert_eq!(imports(text), ["bytes", "fit", "gguf", "ledger"]);
}

#[test]
fn architecture_names_every_room() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    for (room, floor) in FLOORS {
        let row = format!("| {floor} | `{room}");
        assert!(text.contains(&row), "ARCHITECTURE.md has no row '{row}'");
    }
}

//! The estimate against what the real engine allocated: `tests/fixtures/oracle/README.md` tells the source.
//!
//! `cargo test --test oracle -- --nocapture` prints the report, as `cargo xtask oracle` does.
//! `PLIMSOLL_ORACLE=DIR` takes another directory with descriptions and a `cells.tsv`.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)] // a test: what is wrong has to stop it

#[path = "oracle/fixture.rs"]
mod fixture;

#[path = "oracle/compare.rs"]
mod compare;

use std::path::PathBuf;

use compare::{MIB, estimate, exact_differences};

fn directory() -> PathBuf {
    std::env::var_os("PLIMSOLL_ORACLE").map_or_else(fixture::directory, PathBuf::from)
}

#[test]
fn weights_cache_state_and_output_are_exact() {
    let models = compare::models(&directory(), "exact");
    let mut wrong = Vec::new();
    for cell in fixture::cells(&directory().join("cells.tsv")) {
        let Some(theirs) = &cell.measured else { continue };
        match estimate(&models, &cell) {
            Ok(ours) => {
                for (name, difference) in exact_differences(&ours, theirs) {
                    wrong.push(format!(
                        "{name} {difference:+}: {} {} {:?}",
                        cell.model, cell.device, cell.args
                    ));
                }
            }
            Err(error) => wrong.push(format!("refused ({error}): {} {:?}", cell.model, cell.args)),
        }
    }
    wrong.iter().take(60).for_each(|w| println!("{w}"));
    assert_eq!(wrong.len(), 0);
}

#[test]
fn what_the_engine_refuses_is_refused() {
    let models = compare::models(&directory(), "refused");
    for cell in fixture::cells(&directory().join("cells.tsv")) {
        if cell.measured.is_none() {
            assert!(estimate(&models, &cell).is_err(), "{cell:?}");
        }
    }
}

#[test]
fn compute_is_within_a_mebibyte() {
    let models = compare::models(&directory(), "compute");
    let cells = fixture::cells(&directory().join("cells.tsv"));
    let rows = compare::rows(&models, &cells);
    compare::print(&models, &rows, false);
    assert_eq!(rows.iter().filter(|row| row.compute < -MIB).count(), 0);
    let within = rows.iter().filter(|row| row.compute.abs() <= MIB).count();
    assert!(!rows.is_empty() && within * 100 >= rows.len() * 95, "{within} of {}", rows.len());
}

//! `cargo xtask oracle`: the estimates beside what the real engine allocated.

#[path = "../../tests/oracle/compare.rs"]
mod compare;
#[path = "../../tests/oracle/fixture.rs"]
#[allow(dead_code)] // its own directory and a part of the columns are for the tests
mod fixture;

use std::path::PathBuf;

use anyhow::{Result, ensure};

use crate::host;

/// What to compare.
#[derive(Debug, Clone, clap::Args)]
pub struct OracleOptions {
    /// Print every cell that is not exact, not only those that are under
    #[arg(long)]
    pub every: bool,
    /// Descriptions of models and a cells.tsv [default: tests/fixtures/oracle]
    #[arg(long, value_name = "DIR")]
    pub directory: Option<PathBuf>,
}

/// Prints the report; the code is 1 where weights, cache, state or output are not exact, or the engine took
/// settings that are refused here.
pub fn oracle(options: &OracleOptions) -> Result<u8> {
    let directory =
        options.directory.clone().unwrap_or_else(|| host::source_root().join("tests/fixtures/oracle"));
    let table = directory.join("cells.tsv");
    ensure!(table.is_file(), "{} is missing: it holds the measurements", table.display());
    let models = compare::models(&directory, "report");
    let cells = fixture::cells(&table);
    let rows = compare::rows(&models, &cells);
    compare::print(&models, &rows, options.every);
    let mut wrong = 0;
    for cell in &cells {
        let Some(theirs) = &cell.measured else { continue };
        let differences = match compare::estimate(&models, cell) {
            Ok(ours) => compare::exact_differences(&ours, theirs)
                .iter()
                .map(|(part, by)| format!("{part} {by:+}"))
                .collect(),
            Err(error) => vec![format!("refused ({error})")],
        };
        for difference in &differences {
            println!("not exact: {difference}: {} {} {}", cell.model, cell.device, cell.args.join(" "));
        }
        wrong += differences.len();
    }
    Ok(u8::from(wrong > 0))
}

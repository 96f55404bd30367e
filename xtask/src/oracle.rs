//! `cargo xtask oracle`: the estimates beside what the real engine allocated.

#[path = "../../tests/oracle/compare.rs"]
mod compare;
#[path = "../../tests/oracle/fixture.rs"]
#[allow(dead_code)] // its own directory and a part of the columns are for the tests
mod fixture;
mod live;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
pub use compare::devices;
use plimsoll::fit::Facts;

use crate::host;
use crate::vm::{ImageOptions, MachineOptions};

/// What to compare.
#[derive(Debug, Clone, clap::Args)]
pub struct OracleOptions {
    /// Print every cell that is not exact, not only those that are under; with --live, ask about every cell
    #[arg(long)]
    pub every: bool,
    /// Descriptions of models and a cells.tsv [default: tests/fixtures/oracle]
    #[arg(long, value_name = "DIR")]
    pub directory: Option<PathBuf>,
    /// Ask llama-fit-params itself: this machine's, or in the virtual machine the distribution's
    #[arg(long)]
    pub live: bool,
    /// With --live: the tool to ask
    #[arg(long, value_name = "FILE", requires = "live")]
    pub tool: Option<PathBuf>,
    /// How to boot
    #[command(flatten)]
    pub machine: MachineOptions,
    /// What to boot
    #[command(flatten)]
    pub image: ImageOptions,
}

/// The directory of the committed measurements.
pub fn committed() -> PathBuf {
    host::source_root().join("tests/fixtures/oracle")
}

/// The models of a directory by their names, and what was measured with them.
pub fn measured(directory: &Path) -> Result<(BTreeMap<String, Facts>, Vec<fixture::Cell>)> {
    let table = directory.join("cells.tsv");
    ensure!(table.is_file(), "{} is missing: it holds the measurements", table.display());
    Ok((compare::models(directory, "report"), fixture::cells(&table)))
}

/// Prints the report; the code is 1 where weights, cache, state or output are not exact, or the engine took
/// settings that are refused here.
pub fn oracle(options: &OracleOptions) -> Result<u8> {
    if options.live {
        return live::live(options);
    }
    let (models, cells) = measured(&options.directory.clone().unwrap_or_else(committed))?;
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

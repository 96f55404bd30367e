//! `plimsoll validate`: every problem of the configuration at once.

use serde_json::json;

use super::args::Validate;
use super::failure::{Exit, Failure};
use super::output::{self, Painter, Style};
use crate::config::Loaded;
use crate::engine;

pub(super) fn validate(args: &Validate) -> Result<Exit, Failure> {
    let root = &args.root.root;
    if !root.is_dir() {
        return Err(Failure::usage(format!("--root {}: there is no such directory", root.display())));
    }
    let loaded = engine::load(root);
    if args.json {
        output::print_json(&json!({
            "valid": loaded.is_valid(),
            "models": loaded.models.keys().collect::<Vec<_>>(),
            "problems": loaded.problems,
        }))?;
    } else {
        output::print(&report(&loaded, Painter::stdout()))?;
    }
    Ok(if loaded.is_valid() { Exit::Done } else { Exit::Config })
}

/// A line for each problem, as compilers write them, and a last line with the sum.
fn report(loaded: &Loaded, painter: Painter) -> String {
    let mut out = String::new();
    for problem in &loaded.problems {
        let line = problem.to_string();
        let (word, style) =
            if problem.is_error() { ("error:", Style::Red) } else { ("warning:", Style::Yellow) };
        out.push_str(&line.replacen(word, &painter.paint(style, word), 1));
        out.push('\n');
    }
    let errors = loaded.problems.iter().filter(|problem| problem.is_error()).count();
    let warnings = loaded.problems.len() - errors;
    let models = loaded.models.len();
    let count = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    out.push_str(&match (errors, warnings) {
        (0, 0) => format!("{}, no problems\n", count(models, "model")),
        _ => format!(
            "{}, {}, {}\n",
            count(models, "model"),
            count(errors, "error"),
            count(warnings, "warning")
        ),
    });
    out
}

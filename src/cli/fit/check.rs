//! `plimsoll fit --check`: the estimate beside what the engine's own fit tool says.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::machine::Target;
use super::subject::{Provenance, Subject};
use super::{Line, Pricer};
use crate::bytes::{Bytes, MIB};
use crate::cli::failure::Failure;
use crate::cli::inquiry;
use crate::cli::output::{Align, Painter, Style, Table, wrap};
use crate::engine::Engine;
use crate::engine::opinion::{self, Comparison, Row, TOOL};
use crate::fit::{self, Beside, Settings};

/// What became of the question.
#[derive(Clone, Debug)]
pub enum Check {
    /// Nobody was asked: why.
    Unasked(String),
    /// The tool was asked.
    Asked {
        /// Which.
        tool: PathBuf,
        /// For each line of the answer.
        contexts: Vec<Context>,
    },
}

/// What the tool said at one context length.
#[derive(Clone, Debug)]
pub struct Context {
    /// Tokens of all slots together.
    pub context: u64,
    /// With which arguments it was asked.
    pub question: Vec<String>,
    /// Beside the estimate; or why there is nothing to put there, in one sentence.
    pub answer: Result<Comparison, String>,
}

/// Asks the tool beside the subject's engine about each line, in this process's own name.
pub fn check(subject: &Subject, pricer: &Pricer<'_>, lines: &[Line]) -> Check {
    let shard = subject.model.shards().first().filter(|_| subject.provenance == Provenance::File);
    let Some(shard) = shard else {
        return Check::Unasked(format!("{TOOL} can only be asked about files of this machine"));
    };
    if let Some(Engine::Image(image)) = &subject.engine {
        return Check::Unasked(format!(
            "{TOOL} is not asked in a container, and the engine is the image {}",
            image.name
        ));
    }
    let Some(tool) = opinion::tool(subject.engine.as_ref().and_then(Engine::program)) else {
        return Check::Unasked(format!(
            "{TOOL} is not installed: it belongs beside llama-server (Debian's package is llama.cpp-tools-extra), \
             or into /usr/bin"
        ));
    };
    let mut alone = pricer.facts.clone();
    alone.beside = Beside::default();
    let files: Vec<_> = subject.model.shards().iter().map(|shard| shard.identity).collect();
    let ask = |line: &Line| {
        // What was left open is asked for as it was priced.
        let settings = Settings { context: line.estimate.context, ..line.settings.clone() };
        let question = opinion::question(&shard.path, &settings);
        let answer = inquiry::opinion(&tool, &question, &subject.environment, &files, None);
        let answer = answer.and_then(|text| {
            let said = opinion::parse(&text).ok_or_else(|| format!("{TOOL} has printed no table"))?;
            let ours = fit::estimate(&alone, &opinion::in_its_terms(&settings), &pricer.devices);
            opinion::compare(&said, &ours.map_err(|error| error.to_string())?)
        });
        Context { context: line.estimate.context, question, answer }
    };
    let contexts = lines.iter().map(ask).collect();
    Check::Asked { tool, contexts }
}

/// By how much the tool is above the estimate of a configured model at its own context; bytes.
///
/// # Errors
/// There is no such opinion: one sentence.
pub fn second_opinion(root: &Path, name: &str) -> Result<u64, String> {
    let said = |failure: Failure| failure.message;
    let subject = Subject::configured(root, name).map_err(said)?;
    let target = Target::here(subject.reserve).map_err(said)?;
    let pricer = Pricer::new(&subject, &target).map_err(said)?;
    let context = match subject.settings.context {
        0 => pricer.facts.context_train,
        context => context,
    };
    let line = pricer.price(context).map_err(said)?;
    match check(&subject, &pricer, &[line]) {
        Check::Unasked(why) => Err(why),
        Check::Asked { contexts, .. } => contexts
            .into_iter()
            .map(|asked| asked.answer)
            .next()
            .unwrap_or_else(|| Err(format!("{TOOL} was not asked")))
            .map(|comparison| comparison.excess.total()),
    }
}

/// The object `check` of `--json`.
pub fn json(check: &Check) -> Value {
    let (tool, contexts) = match check {
        Check::Unasked(why) => return json!({ "tool": null, "problem": why, "contexts": [] }),
        Check::Asked { tool, contexts } => (tool, contexts),
    };
    let one = |asked: &Context| {
        let (rows, excess, problem) = match &asked.answer {
            Ok(comparison) => (&comparison.rows[..], comparison.excess.total(), None),
            Err(problem) => (&[][..], 0, Some(problem)),
        };
        json!({
            "context": asked.context,
            "arguments": asked.question,
            "problem": problem,
            "agrees": problem.is_none() && rows.iter().all(Row::agrees),
            "excess_bytes": excess,
            "parts": rows.iter().map(|row| json!({
                "place": row.place,
                "kind": row.kind,
                "estimate_bytes": row.estimate,
                "tool_bytes": row.tool,
                "difference_bytes": difference(row),
            })).collect::<Vec<_>>(),
        })
    };
    json!({
        "tool": tool.to_string_lossy(),
        "problem": null,
        "contexts": contexts.iter().map(one).collect::<Vec<_>>(),
    })
}

/// The tool's figure less ours; nothing where the tool's rounding hides it.
fn difference(row: &Row) -> i128 {
    if row.agrees() { 0 } else { i128::from(row.tool) - i128::from(row.estimate) }
}

/// The part of the answer for people.
pub fn text(check: &Check, painter: Painter) -> String {
    let (tool, contexts) = match check {
        Check::Unasked(why) => return wrap(&format!("No second opinion: {why}."), 0),
        Check::Asked { tool, contexts } => (tool, contexts),
    };
    let mut out = format!("Second opinion of {}:\n", tool.display());
    let columns = [
        ("CONTEXT", Align::Right),
        ("PLACE", Align::Left),
        ("PART", Align::Left),
        ("ESTIMATE", Align::Right),
        ("TOOL", Align::Right),
        ("DIFFERENCE", Align::Right),
    ];
    let mut table = Table::new(&columns);
    let plain = |text: String| (text, Style::Plain);
    let mut problems: Vec<&String> = Vec::new();
    for asked in contexts {
        let comparison = match &asked.answer {
            Ok(comparison) => comparison,
            Err(problem) => {
                problems.push(problem);
                continue;
            }
        };
        for row in comparison.rows.iter().filter(|row| row.estimate.max(row.tool) > 0) {
            let (difference, style) = match difference(row) {
                0 => ("0".to_owned(), Style::Plain),
                more @ 1.. => (format!("+{}", mib(more.unsigned_abs())), Style::Yellow),
                less => (format!("-{}", mib(less.unsigned_abs())), Style::Plain),
            };
            table.row(vec![
                plain(asked.context.to_string()),
                plain(row.place.chars().filter(|c| !c.is_control()).collect()),
                plain(row.kind.to_owned()),
                plain(mib(row.estimate.into())),
                plain(mib(row.tool.into())),
                (difference, style),
            ]);
        }
    }
    let answered = || contexts.iter().filter_map(|asked| asked.answer.as_ref().ok());
    if answered().next().is_some() {
        out.push_str(&table.render(painter));
        let mut say = |text: &str| out.push_str(&wrap(text, 0));
        say(
            "In MiB, which the tool rounds down; it is asked, and the estimate made for this, with an output for \
             each token, one slot where slots share a cache, and nothing beside the model.",
        );
        let most = answered().map(|comparison| comparison.excess.total()).max().unwrap_or(0);
        if most > 0 {
            say(&format!("The larger counts: up to {} are reserved on top of the estimate.", Bytes(most)));
        } else if answered().all(|comparison| comparison.rows.iter().all(Row::agrees)) {
            say("They agree.");
        } else {
            say("The estimate is above the tool, and counts.");
        }
    }
    problems.sort();
    problems.dedup();
    for problem in problems {
        out.push_str(&wrap(&format!("No second opinion: {problem}."), 0));
    }
    out
}

/// MiB with one decimal.
fn mib(bytes: u128) -> String {
    let tenths = bytes * 10 / u128::from(MIB);
    format!("{}.{}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(answer: Result<Comparison, String>) -> Check {
        Check::Asked {
            tool: PathBuf::from("/usr/bin/llama-fit-params"),
            contexts: vec![Context { context: 4096, question: vec!["--fit-print".to_owned()], answer }],
        }
    }

    fn row(estimate: u64, tool: u64) -> Row {
        Row { place: "Host".to_owned(), kind: "compute", estimate, tool }
    }

    #[test]
    fn a_difference_is_shown_and_a_rounding_is_not() {
        let excess = opinion::Excess { host: row(2 * MIB, 4 * MIB).excess(), devices: Vec::new() };
        let rows = vec![row(7 * MIB + 9, 7 * MIB), row(2 * MIB, 4 * MIB)];
        let check = asked(Ok(Comparison { rows, excess }));
        let text = text(&check, Painter::plain());
        assert!(text.contains("7.0   7.0           0\n"), "{text}");
        assert!(text.contains("2.0   4.0        +2.0\n"), "{text}");
        assert!(text.contains("The larger counts"), "{text}");
        let json = json(&check);
        assert_eq!(json["contexts"][0]["excess_bytes"], 3 * MIB);
        assert_eq!(json["contexts"][0]["agrees"], false);
        assert_eq!(json["contexts"][0]["parts"][0]["difference_bytes"], 0);
    }

    #[test]
    fn no_opinion_is_a_sentence() {
        let text = text(&asked(Err("it sees nothing".to_owned())), Painter::plain());
        assert!(text.ends_with("No second opinion: it sees nothing.\n"), "{text}");
        let unasked = json(&Check::Unasked("not installed".to_owned()));
        assert_eq!((&unasked["tool"], &unasked["problem"]), (&Value::Null, &json!("not installed")));
    }
}

//! `plimsoll doctor`: what of this machine stands in the way of models, each with the exact fix.

mod checks;
mod containers;
mod engines;
mod snapshot;
mod speed;

use std::path::Path;

use serde_json::json;

use super::args::{Common, Doctor};
use super::failure::{Exit, Failure};
use super::output::{self, Painter, Style, wrap};
use crate::config::{Loaded, Oversize};
use crate::engine;
use checks::{Finding, Level};
use snapshot::Snapshot;

pub(super) fn doctor(common: &Common, args: &Doctor) -> Result<Exit, Failure> {
    let root = &args.root;
    if !root.is_dir() {
        return Err(Failure::usage(format!("--root {}: there is no such directory", root.display())));
    }
    let loaded = engine::load(root);
    let swap = loaded.settings.clone().unwrap_or_default().swap;
    let swaps = loaded.models.values().any(|model| model.oversize == Oversize::Swap);
    let mut found = checks::machine(&Snapshot::read(root, swap, swaps));
    found.push(configuration(&loaded));
    // A recorded machine has no disk to read, no daemon to reach and no engine to run.
    if root == Path::new("/") {
        found.extend(speed::check(&loaded));
        found.push(daemon(common));
        found.extend(engines::check(root, &loaded));
    }
    let healthy = found.iter().all(|finding| finding.level != Level::Problem);
    if args.json {
        output::print_json(&json!({ "healthy": healthy, "checks": found }))?;
    } else {
        output::print(&report(&found, Painter::stdout()))?;
    }
    Ok(if healthy { Exit::Done } else { Exit::Failed })
}

fn configuration(loaded: &Loaded) -> Finding {
    let wrong = loaded.problems.iter().filter(|problem| problem.is_error()).count();
    match (wrong, loaded.models.len()) {
        (0, 0) => Finding::note(
            "configuration",
            "no model is configured: /etc/plimsoll/models.d/NAME.toml has one each",
        ),
        (0, 1) => Finding::ok("configuration", "1 model, no errors"),
        (0, models) => Finding::ok("configuration", format!("{models} models, no errors")),
        (errors, _) => {
            let errors = if errors == 1 { "1 error".to_owned() } else { format!("{errors} errors") };
            Finding::problem(
                "configuration",
                errors,
                "run 'plimsoll validate', which names file and line of each",
            )
        }
    }
}

/// Whether the daemon answers; its name on the bus starts it, where it is installed.
fn daemon(common: &Common) -> Finding {
    let status = super::block_on(async {
        let client = super::connect(common).await?;
        super::answer(client.manager().version()).await
    });
    match status {
        Ok(version) => Finding::ok("daemon", format!("plimsolld {version} answers")),
        Err(failure) => Finding::problem(
            "daemon",
            failure.message,
            "run 'systemctl enable --now plimsolld.service' as root; 'journalctl -u plimsolld' says why it ends",
        ),
    }
}

/// A line for each finding, fixes below; problems last, where they are seen.
fn report(found: &[Finding], painter: Painter) -> String {
    let mut order: Vec<&Finding> = found.iter().collect();
    order.sort_by_key(|finding| match finding.level {
        Level::Ok => 0,
        Level::Note => 1,
        Level::Problem => 2,
    });
    let mut out = String::new();
    for Finding { check, level, text, fix } in order {
        let (word, style) = match level {
            Level::Ok => ("ok", Style::Green),
            Level::Note => ("note", Style::Yellow),
            Level::Problem => ("problem", Style::Red),
        };
        let mut line = wrap(&format!("{:9}{check}: {text}", ""), 9);
        line.replace_range(..word.len(), &painter.paint(style, word));
        out.push_str(&line);
        if let Some(fix) = fix {
            out.push_str(&wrap(&format!("         fix: {fix}"), 14));
        }
    }
    let problems = found.iter().filter(|finding| finding.level == Level::Problem).count();
    out.push_str(&match problems {
        0 => "Nothing needs fixing.\n".to_owned(),
        1 => "1 thing needs fixing.\n".to_owned(),
        n => format!("{n} things need fixing.\n"),
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_come_last_with_their_fix() {
        let found = [
            Finding::problem("pressure", "it is off", "add psi=1"),
            Finding::ok("kernel", "7.2.0"),
            Finding::note("swap", "there is none"),
        ];
        let text = report(&found, Painter::plain());
        assert_eq!(
            text,
            "ok       kernel: 7.2.0\nnote     swap: there is none\nproblem  pressure: it is off\n         fix: \
             add psi=1\n1 thing needs fixing.\n"
        );
    }
}

//! The short verbs: `plan`, `pin`, `unpin`, `mode`, `reload`.

use std::fmt::Write as _;

use serde_json::Value;

use super::agent::Agent;
use super::args::{Common, Mode, Plan};
use super::explain::{change_text, pools_text};
use super::failure::{Exit, Failure};
use super::output::{self, Painter, Style, wrap};
use crate::bytes::Bytes;
use crate::dbus::CallError;
use crate::dbus::report::{Decision, Step};
use crate::os::since_boot;

pub(super) fn plan(common: &Common, args: &Plan) -> Result<(), Failure> {
    let text = super::block_on(async {
        let client = super::connect(common).await?;
        let context = args.context.unwrap_or(0);
        super::answer(client.manager().plan(&args.name, context)).await
    })?;
    show(&text, args.json, plan_text)
}

pub(super) fn pin(common: &Common, names: &[String], pinned: bool) -> Result<(), Failure> {
    let _agent = Agent::start(common);
    super::block_on(async {
        let client = super::connect(common).await?;
        for name in names {
            client.set_pinned(name, pinned).await?;
        }
        Ok(())
    })
}

pub(super) fn mode(common: &Common, args: &Mode) -> Result<(), Failure> {
    let _agent = args.mode.as_ref().map(|_| Agent::start(common));
    let mode = super::block_on(async {
        let client = super::connect(common).await?;
        if let Some(mode) = &args.mode {
            client.set_mode(mode).await?;
        }
        super::answer(client.manager().mode()).await
    })?;
    if args.json {
        return output::print_json(&serde_json::json!({ "mode": mode }));
    }
    // Set as asked: nothing to say.
    if args.mode.is_some() { Ok(()) } else { output::print(&mode) }
}

pub(super) fn reload(common: &Common) -> Result<(), Failure> {
    let _agent = Agent::start(common);
    let problems = super::block_on(async { Ok(super::connect(common).await?.reload().await?) })?;
    let Some((last, others)) = problems.split_last() else { return Ok(()) };
    for problem in others {
        output::eprint(&format!("plimsoll: {problem}"));
    }
    Err(Failure::new(Exit::Config, last.clone())
        .hint("'plimsoll validate' shows where; a model with an error can't be started until it is mended, with one in plimsoll.toml its last good settings stay in force, and where that can't be read at all no model can be started"))
}

/// Prints what the daemon answered with: as it is, or as text.
fn show(answer: &str, json: bool, render: impl FnOnce(&Decision, Painter) -> String) -> Result<(), Failure> {
    let unreadable = |error: serde_json::Error| CallError::Protocol(error.to_string());
    let value: Value = serde_json::from_str(answer).map_err(unreadable)?;
    if json {
        return output::print_json(&value);
    }
    let decision = serde_json::from_value(value).map_err(unreadable)?;
    output::print(&render(&decision, Painter::stdout()))
}

/// A plan as text: the verdict, the steps in order, and the arithmetic.
fn plan_text(plan: &Decision, painter: Painter) -> String {
    let mut out = String::new();
    let style = verdict_style(&plan.verdict);
    let _ = writeln!(out, "{}: {}", plan.instance, painter.paint(style, &plan.verdict));
    // With steps, the sentence says the same again.
    if !plan.text.is_empty() && plan.steps.is_empty() {
        out.push_str(&wrap(&plan.text, 0));
    }
    for (n, step) in plan.steps.iter().enumerate() {
        let _ = writeln!(out, "{:>3}. {}", n + 1, step_text(step));
    }
    if plan.refusal.is_none() && plan.context > 0 {
        let start = format!("start {} with a context of {}", plan.instance, plan.context);
        let _ = writeln!(out, "{:>3}. {start}", plan.steps.len() + 1);
    }
    out.push_str(&pools_text(plan, painter));
    if let Some(refusal) = &plan.refusal {
        out.push_str(&change_text(refusal));
    }
    out
}

pub(super) fn step_text(step: &Step) -> String {
    match step.step.as_str() {
        "drop-cache" => format!("drop cold page cache, frees {}", step.frees_bytes),
        "stop" => {
            let why = match step.reason.as_str() {
                "expired" => "idle past its ttl",
                "evicted" => "lower priority",
                "replaced" => "idle, same priority",
                "named" => "named to go",
                other => other,
            };
            format!("stop {} ({why}), frees {}", step.instance, step.frees_bytes)
        }
        "reduce-context" => format!("reduce the context from {} to {}", step.from, step.to),
        "drop-all-cache" => format!("drop all page cache, frees {}", step.frees_bytes),
        "compact" => format!("compact memory for {}", step.bytes),
        "add-swap" => format!("make a swapfile of {}", step.bytes),
        "stream" => {
            let ahead = match step.read_ahead_bytes {
                Bytes::ZERO => String::new(),
                bytes => format!(", read ahead by {bytes}"),
            };
            format!(
                "keep {} of {} of its weights in memory, the rest on disk{ahead}",
                step.resident_bytes, step.mapped_bytes
            )
        }
        "swap" => format!("leave {} of it in swap", step.swapped_bytes),
        other => format!("{other} {}", step.instance),
    }
}

/// The colour of a verdict.
pub(super) fn verdict_style(verdict: &str) -> Style {
    match verdict {
        "fits" => Style::Green,
        "fits-after" | "fits-with-swap" | "streams" => Style::Yellow,
        "refused" | "unknown" => Style::Red,
        _ => Style::Plain,
    }
}

/// `, 5 min ago` for a time since boot; empty where it can't be told.
pub(super) fn age(at_msec: u64) -> String {
    let Ok(now) = u64::try_from(since_boot().as_millis()) else { return String::new() };
    if at_msec == 0 || at_msec > now {
        String::new()
    } else {
        format!(", {} ago", span((now - at_msec) / 1000))
    }
}

/// A length of time in its largest unit.
fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::Bytes;
    use crate::dbus::report::{Kept, Refusal};

    #[test]
    fn a_plan_is_a_list_of_steps() {
        let stop = Step {
            step: "stop".into(),
            instance: "small".into(),
            reason: "evicted".into(),
            frees_bytes: Bytes::gib(20),
            ..Step::default()
        };
        let cache = Step { step: "drop-cache".into(), frees_bytes: Bytes::gib(3), ..Step::default() };
        let plan = Decision {
            instance: "large".into(),
            verdict: "fits-after".into(),
            context: 16384,
            steps: vec![cache, stop],
            ..Decision::default()
        };
        assert_eq!(
            plan_text(&plan, Painter::plain()),
            "large: fits-after
  1. drop cold page cache, frees 3.0 GiB
  2. stop small (lower priority), frees 20.0 GiB
  3. start large with a context of 16384
"
        );
    }

    #[test]
    fn a_refusal_shows_its_arithmetic() {
        let kept = Kept { instance: "chief".into(), bytes: Bytes::gib(90), why: "pinned".into() };
        let refusal = Refusal {
            needed_bytes: Bytes::gib(100),
            short_bytes: Bytes::gib(70),
            kept: vec![kept],
            advice: "plimsoll load large -c 4096".into(),
            ..Refusal::default()
        };
        let plan = Decision {
            instance: "large".into(),
            verdict: "refused".into(),
            text: "large was refused".into(),
            refusal: Some(refusal),
            ..Decision::default()
        };
        let text = plan_text(&plan, Painter::plain());
        assert!(text.starts_with("large: refused\nlarge was refused\n"), "{text}");
        for line in [
            "  needed           100.0 GiB",
            "  stays: chief 90.0 GiB (pinned)",
            "  try: plimsoll load large -c 4096",
        ] {
            assert!(text.lines().any(|l| l == line), "{line:?} in\n{text}");
        }
    }

    #[test]
    fn ages_have_one_unit() {
        assert_eq!(span(59), "59 s");
        assert_eq!(span(3599), "59 min");
        assert_eq!(span(7200), "2 h");
        assert_eq!(span(400_000), "4 days");
        assert_eq!(age(0), "");
    }
}

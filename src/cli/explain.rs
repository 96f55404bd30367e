//! `plimsoll explain`: the last decision with its numbers, what would have to change, and what has happened since.

use std::fmt::Write as _;

use serde_json::Value;

use super::args::{Common, Explain};
use super::failure::Failure;
use super::output::{self, Align, Painter, Style, Table, gib, wrap};
use super::verbs::{age, step_text, verdict_style};
use crate::dbus::CallError;
use crate::dbus::report::{Decision, Model, Refusal, Status};

/// How many of the decisions since then are shown.
const SINCE: usize = 5;

pub(super) fn explain(common: &Common, args: &Explain) -> Result<(), Failure> {
    let (text, status) = super::block_on(async {
        let client = super::connect(common).await?;
        let text = super::answer(client.manager().explain(&args.name)).await?;
        // What is going on now only adds to it.
        let status = if args.json { None } else { super::answer(client.manager().status()).await.ok() };
        Ok((text, status))
    })?;
    let unreadable = |error: serde_json::Error| CallError::Protocol(error.to_string());
    let value: Value = serde_json::from_str(&text).map_err(unreadable)?;
    if args.json {
        return output::print_json(&value);
    }
    let decision: Decision = serde_json::from_value(value).map_err(unreadable)?;
    let status: Option<Status> = status.and_then(|status| serde_json::from_str(&status).ok());
    output::print(&explained(&decision, status.as_ref(), Painter::stdout()))
}

/// A decision as text: when and what, the numbers, what would have to change, what has happened since.
fn explained(decision: &Decision, status: Option<&Status>, painter: Painter) -> String {
    let mut out = String::new();
    let style = verdict_style(&decision.verdict);
    let name = painter.paint(Style::Bold, &decision.instance);
    let kind = painter.paint(style, &decision.kind);
    let _ = writeln!(out, "{name}  {kind}, {}{}", decision.verdict, age(decision.at_msec));
    if let Some(other) = &decision.for_instance {
        let _ = writeln!(out, "  for     {other}");
    }
    if decision.observed {
        let _ = writeln!(out, "  observe mode: nothing of it was done");
    }
    if !decision.text.is_empty() {
        out.push_str(&wrap(&format!("  {}", decision.text), 2));
    }
    if decision.context > 0 {
        let _ = writeln!(out, "  context {}", decision.context);
    }
    if !decision.bytes.is_zero() {
        let _ = writeln!(out, "  bytes   {}", decision.bytes);
    }
    for (n, step) in decision.steps.iter().enumerate() {
        let _ = writeln!(out, "{:>3}. {}", n + 1, step_text(step));
    }
    out.push_str(&pools_text(decision, painter));
    if let Some(refusal) = &decision.refusal {
        let head = painter.paint(Style::Bold, "What would have to change");
        let _ = writeln!(out, "\n{head}");
        out.push_str(&change_text(refusal));
    }
    if let Some(status) = status {
        out.push_str(&since_text(decision, status, painter));
    }
    out
}

/// The arithmetic of each pool, before anything was done.
pub(super) fn pools_text(decision: &Decision, painter: Painter) -> String {
    if decision.pools.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&[
        ("  POOL (GiB)", Align::Left),
        ("TOTAL", Align::Right),
        ("TO PROMISE", Align::Right),
        ("PROMISED", Align::Right),
        ("FREE", Align::Right),
        ("NEEDED", Align::Right),
        ("SHORT", Align::Right),
    ]);
    for pool in &decision.pools {
        let short = if pool.short_bytes.is_zero() { "-".to_owned() } else { gib(pool.short_bytes) };
        let bytes = [pool.total_bytes, pool.room_bytes, pool.held_bytes, pool.free_bytes, pool.needed_bytes];
        let mut row = vec![(format!("  {}", pool.name), Style::Plain)];
        row.extend(bytes.iter().map(|bytes| (gib(*bytes), Style::Plain)));
        row.push((short, if pool.short_bytes.is_zero() { Style::Plain } else { Style::Red }));
        table.row(row);
    }
    table.render(painter)
}

/// The arithmetic of a refusal, a line for each number, and what to do.
pub(super) fn change_text(refusal: &Refusal) -> String {
    let mut out = String::new();
    for (name, bytes) in [
        ("pool", refusal.pool_bytes),
        ("reserve", refusal.reserve_bytes),
        ("system", refusal.system_bytes),
        ("models", refusal.models_bytes),
        ("free", refusal.free_bytes),
        ("needed", refusal.needed_bytes),
        ("could be freed", refusal.evictable_bytes),
        ("short", refusal.short_bytes),
    ] {
        let _ = writeln!(out, "  {name:<14} {:>11}", bytes.to_string());
    }
    for kept in &refusal.kept {
        let _ = writeln!(out, "  stays: {} {} ({})", kept.instance, kept.bytes, kept.why);
    }
    if let Some(why) = &refusal.no_swap {
        let _ = writeln!(out, "  swap can't help: {why}");
    }
    if !refusal.advice.is_empty() {
        let _ = writeln!(out, "  try: {}", refusal.advice);
    }
    out
}

/// How it is now, and the decisions that came after this one.
fn since_text(decision: &Decision, status: &Status, painter: Painter) -> String {
    let mut out = String::new();
    let model = status.models.iter().find(|model| model.instance == decision.instance);
    if let Some(model) = model {
        out.push_str(&wrap(&format!("  {}", now_text(model, decision)), 2));
    }
    let later = |d: &&Decision| d.at_msec > decision.at_msec;
    // They come newest first.
    let after: Vec<&Decision> = status.decisions.iter().filter(later).collect();
    for decision in after.iter().take(SINCE).rev() {
        let when = age(decision.at_msec);
        let kind = painter.paint(verdict_style(&decision.verdict), &decision.kind);
        out.push_str(&wrap(&format!("  {kind}{when}: {}", decision.text), 4));
    }
    if after.len() > SINCE {
        let _ = writeln!(out, "  and {} before these: plimsoll log", after.len() - SINCE);
    }
    if out.is_empty() { out } else { format!("\n{}\n{out}", painter.paint(Style::Bold, "Since then")) }
}

fn now_text(model: &Model, decision: &Decision) -> String {
    let mut text = format!("it is {} now", model.state);
    if !model.measured.total().is_zero() {
        let _ = write!(text, " and takes {}", model.measured.total());
        if !model.predicted.total().is_zero() {
            let _ = write!(text, " of {} promised", model.predicted.total());
        }
    }
    // A refusal's own sentence stands above.
    if !model.message.is_empty() && model.message != decision.text {
        let _ = write!(text, ": {}", model.message);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::Bytes;
    use crate::dbus::report::{Account, Classes};

    #[test]
    fn the_numbers_pool_by_pool_and_what_came_after() {
        let account = Account {
            name: "card0".into(),
            total_bytes: Bytes::gib(120),
            room_bytes: Bytes::gib(118),
            held_bytes: Bytes::gib(90),
            needed_bytes: Bytes::gib(40),
            free_bytes: Bytes::gib(28),
            short_bytes: Bytes::gib(12),
        };
        let refused = Decision {
            kind: "refuse".into(),
            instance: "large".into(),
            verdict: "refused".into(),
            at_msec: 1000,
            text: "large was refused".into(),
            pools: vec![account],
            refusal: Some(Refusal { advice: "plimsoll load large -c 4096".into(), ..Refusal::default() }),
            ..Decision::default()
        };
        let decisions = (0..7).rev().map(|n| Decision {
            kind: "admit".into(),
            instance: format!("m{n}"),
            at_msec: 998 + n,
            text: format!("m{n} is admitted"),
            ..Decision::default()
        });
        let model = Model {
            instance: "large".into(),
            state: "running".into(),
            predicted: Classes { gpu_bytes: Bytes::gib(40), ..Classes::default() },
            measured: Classes { gpu_bytes: Bytes::gib(39), ..Classes::default() },
            ..Model::default()
        };
        let status = Status { models: vec![model], decisions: decisions.collect(), ..Status::default() };
        let text = explained(&refused, Some(&status), Painter::plain());
        for line in [
            "  POOL (GiB)  TOTAL  TO PROMISE  PROMISED  FREE  NEEDED  SHORT",
            "  card0       120.0       118.0      90.0  28.0    40.0   12.0",
            "What would have to change",
            "  try: plimsoll load large -c 4096",
            "Since then",
            "  it is running now and takes 39.0 GiB of 40.0 GiB promised",
        ] {
            assert!(text.lines().any(|l| l == line), "{line:?} in\n{text}");
        }
        assert!(text.contains("m3 is admitted") && text.contains("m6 is admitted"), "{text}");
        assert!(!text.contains("m2 is admitted"), "that one was before: {text}");
    }
}

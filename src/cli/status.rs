//! `plimsoll status` and `list`: what runs, what it was promised and what it takes.

use std::fmt::Write as _;

use serde_json::Value;

use super::args::{Common, List, Status as Args};
use super::failure::{Exit, Failure};
use super::output::{self, Align, Painter, Style, Table, gib, wrap};
use super::verbs::{age, verdict_style};
use crate::bytes::Bytes;
use crate::dbus::CallError;
use crate::dbus::report::{Classes, Decision, Lease, Model, Pressure, Quarantined, Status};

/// How many decisions the overview shows.
const DECISIONS: usize = 5;

pub(super) fn status(common: &Common, args: &Args) -> Result<(), Failure> {
    let value = fetch(common)?;
    let Some(name) = &args.name else {
        if args.json {
            return output::print_json(&value);
        }
        return output::print(&overview(&read(value)?, Painter::stdout()));
    };
    let model = find(&value, name)?;
    if args.json {
        return output::print_json(&model);
    }
    let model: Model = serde_json::from_value(model).map_err(unreadable)?;
    output::print(&detail(&model, &read(value)?.decisions, Painter::stdout()))
}

pub(super) fn list(common: &Common, args: &List) -> Result<(), Failure> {
    let value = fetch(common)?;
    if args.json {
        return output::print_json(value.get("models").unwrap_or(&Value::Array(Vec::new())));
    }
    output::print(&list_text(&read(value)?.models, Painter::stdout()))
}

/// The daemon's answer, as it came: what --json prints is not filtered through this version.
pub(super) fn fetch(common: &Common) -> Result<Value, Failure> {
    let text = super::block_on(async {
        let client = super::connect(common).await?;
        super::answer(client.manager().status()).await
    })?;
    serde_json::from_str(&text).map_err(unreadable)
}

pub(super) fn read(value: Value) -> Result<Status, Failure> {
    serde_json::from_value(value).map_err(unreadable)
}

fn unreadable(error: serde_json::Error) -> Failure {
    CallError::Protocol(error.to_string()).into()
}

/// The entry of an instance, named so or by an alias of its model.
fn find(status: &Value, name: &str) -> Result<Value, Failure> {
    let models = status.get("models").and_then(Value::as_array);
    let text = |model: &Value, key: &str| model.get(key).and_then(Value::as_str).map(str::to_owned);
    let has_alias = |model: &Value| {
        let aliases = model.get("aliases").and_then(Value::as_array);
        aliases.is_some_and(|aliases| aliases.iter().any(|alias| alias.as_str() == Some(name)))
    };
    let by =
        |test: &dyn Fn(&Value) -> bool| models.and_then(|models| models.iter().find(|m| test(m))).cloned();
    by(&|model| text(model, "instance").as_deref() == Some(name)).or_else(|| by(&has_alias)).ok_or_else(
        || {
            Failure::new(Exit::Config, format!("there is no model '{name}'"))
                .hint("'plimsoll list' shows the models that are configured")
        },
    )
}

/// Everything at a glance, 80 columns wide.
pub(super) fn overview(status: &Status, painter: Painter) -> String {
    let mut out = String::new();
    let mode = if status.mode == "enforce" { Style::Plain } else { Style::Yellow };
    let _ = writeln!(out, "plimsolld {}, mode {}\n", status.version, painter.paint(mode, &status.mode));
    out.push_str(&pools(status, painter));
    out.push_str(&pressure(&status.pressure, painter));

    let (shown, quiet): (Vec<&Model>, Vec<&Model>) =
        status.models.iter().partition(|m| m.state != "inactive");
    if shown.is_empty() {
        out.push_str("\nNo model runs.\n");
    } else {
        out.push('\n');
        out.push_str(&models(&shown, painter));
        out.push_str("GiB, predicted/measured. MAPPED weights are pages of their files, HOST is private.\n");
        if shown.iter().any(|m| m.pinned) {
            out.push_str("* pinned: never evicted\n");
        }
        if shown.iter().any(|m| m.foreign) {
            out.push_str("+ adopted: a service of somebody else, counted as it is measured\n");
        }
        for model in shown.iter().filter(|m| !m.message.is_empty()) {
            let message = &model.message;
            let own = message.starts_with(&model.instance);
            out.push_str(&wrap(
                &if own { message.clone() } else { format!("{}: {message}", model.instance) },
                2,
            ));
        }
    }
    if !status.leases.is_empty() {
        out.push('\n');
        out.push_str(&leases(&status.leases, painter));
        for lease in status.leases.iter().filter(|lease| !lease.message.is_empty()) {
            out.push_str(&wrap(&format!("{}: {}", lease.lease, lease.message), 2));
        }
    }
    if !quiet.is_empty() {
        let names: Vec<&str> = quiet.iter().map(|m| m.instance.as_str()).collect();
        out.push_str(
            &painter.paint(Style::Dim, wrap(&format!("Not running: {}", names.join(", ")), 2).trim_end()),
        );
        out.push('\n');
    }
    for leak in &status.quarantined {
        let Quarantined { instance, pool, bytes, .. } = leak;
        let text = format!(
            "{instance} did not return {bytes} of {pool} when it stopped: they are promised to nobody"
        );
        out.push_str(&painter.paint(Style::Yellow, wrap(&text, 2).trim_end()));
        out.push('\n');
    }
    if !status.decisions.is_empty() {
        let _ = writeln!(out, "\n{}", painter.paint(Style::Bold, "Last decisions"));
        for decision in status.decisions.iter().take(DECISIONS) {
            out.push_str(&decision_line(decision, painter));
        }
    }
    for unseen in &status.unseen {
        let _ = writeln!(out, "\n{} {unseen}", painter.paint(Style::Yellow, "note:"));
    }
    for problem in &status.problems {
        let _ = writeln!(out, "\n{} {problem}", painter.paint(Style::Red, "configuration:"));
    }
    out
}

/// The level of memory where it is short, and what was done last about it; nothing on a machine that never was.
fn pressure(pressure: &Pressure, painter: Painter) -> String {
    let mut out = String::new();
    if !matches!(pressure.level.as_str(), "" | "calm") {
        let style = if pressure.level == "attention" { Style::Yellow } else { Style::Red };
        let level = painter.paint(style, &pressure.level);
        let falling = match pressure.falling_bytes {
            Bytes::ZERO => String::new(),
            rate => format!(", {rate} less each second"),
        };
        let _ = writeln!(out, "Pressure: {level}, {} of memory left{falling}", pressure.headroom_bytes);
    }
    if let Some(last) = &pressure.last {
        out.push_str(&wrap(&format!("Last relief{}: {}", age(last.at_msec), last.text), 2));
    }
    out
}

fn plain(text: impl Into<String>) -> (String, Style) {
    (text.into(), Style::Plain)
}

fn pools(status: &Status, painter: Painter) -> String {
    let mut table = Table::new(&[
        ("POOL (GiB)", Align::Left),
        ("TOTAL", Align::Right),
        ("FOR MODELS", Align::Right),
        ("RESERVED", Align::Right),
        ("MEASURED", Align::Right),
        ("FREE", Align::Right),
    ]);
    for pool in &status.pools {
        let low = pool.headroom_bytes < pool.capacity_bytes.per_mille(50);
        table.row(vec![
            plain(&pool.name),
            plain(gib(pool.total_bytes)),
            plain(gib(pool.capacity_bytes)),
            plain(gib(pool.reserved_bytes)),
            plain(gib(pool.measured_bytes)),
            (gib(pool.headroom_bytes), if low { Style::Yellow } else { Style::Plain }),
        ]);
    }
    let swap = &status.swap;
    let used = if swap.total_bytes.is_zero() { String::new() } else { gib(swap.used_bytes) };
    let free = if used.is_empty() { used.clone() } else { gib(swap.total_bytes - swap.used_bytes) };
    let total = if used.is_empty() { "none".to_owned() } else { gib(swap.total_bytes) };
    table.row(vec![plain("swap"), plain(total), plain(""), plain(""), plain(used), plain(free)]);
    table.render(painter)
}

/// `33.1/32.8`, or nothing where neither is known.
fn against(predicted: Bytes, measured: Bytes) -> String {
    if predicted.is_zero() && measured.is_zero() {
        return "-".to_owned();
    }
    format!("{}/{}", gib(predicted), gib(measured))
}

fn context(model: &Model) -> String {
    match (model.context, model.parallel) {
        (0, _) => "-".to_owned(),
        (context, 0 | 1) => context.to_string(),
        (context, slots) => format!("{slots}x{}", context / slots),
    }
}

/// `busy`, or for how long it has had nothing to do.
fn idle(model: &Model) -> String {
    match (model.requests, model.idle_seconds) {
        (Some(1..), _) => "busy".to_owned(),
        (_, Some(seconds)) => match seconds {
            0..60 => format!("{seconds} s"),
            60..7200 => format!("{} min", seconds / 60),
            _ => format!("{} h", seconds / 3600),
        },
        (_, None) => "-".to_owned(),
    }
}

fn state_style(state: &str) -> Style {
    match state {
        "running" => Style::Green,
        "waiting" | "loading" | "stopping" => Style::Yellow,
        "failed" => Style::Red,
        _ => Style::Plain,
    }
}

fn models(shown: &[&Model], painter: Painter) -> String {
    let mut table = Table::new(&[
        ("MODEL", Align::Left),
        ("STATE", Align::Left),
        ("PRIO", Align::Right),
        ("CONTEXT", Align::Right),
        ("MAPPED", Align::Right),
        ("HOST", Align::Right),
        ("GPU", Align::Right),
        ("IDLE", Align::Right),
    ]);
    for model in shown {
        let (p, m): (&Classes, &Classes) = (&model.predicted, &model.measured);
        table.row(vec![
            (model.instance.clone(), Style::Bold),
            (model.state.clone(), state_style(&model.state)),
            plain(format!(
                "{}{}{}",
                model.priority,
                if model.pinned { "*" } else { "" },
                if model.foreign { "+" } else { "" }
            )),
            plain(context(model)),
            plain(against(p.mapped_bytes, m.mapped_bytes)),
            plain(against(p.private_bytes, m.private_bytes)),
            plain(against(p.gpu_bytes, m.gpu_bytes)),
            plain(idle(model)),
        ]);
    }
    table.render(painter)
}

/// What is held for something that is no model.
fn leases(shown: &[Lease], painter: Painter) -> String {
    let mut table = Table::new(&[
        ("LEASE", Align::Left),
        ("STATE", Align::Left),
        ("PRIO", Align::Right),
        ("MAPPED", Align::Right),
        ("HOST", Align::Right),
        ("GPU", Align::Right),
        ("PROCESS", Align::Right),
        ("USER", Align::Right),
    ]);
    for lease in shown {
        let (p, m): (&Classes, &Classes) = (&lease.predicted, &lease.measured);
        let held = lease.state == "held";
        table.row(vec![
            (lease.lease.clone(), Style::Bold),
            (lease.state.clone(), if held { Style::Green } else { Style::Yellow }),
            plain(lease.priority.to_string()),
            plain(against(p.mapped_bytes, m.mapped_bytes)),
            plain(against(p.private_bytes, m.private_bytes)),
            plain(against(p.gpu_bytes, m.gpu_bytes)),
            plain(lease.pid.to_string()),
            plain(user(lease.uid)),
        ]);
    }
    table.render(painter)
}

/// A user's name, or number.
fn user(uid: u32) -> String {
    let known = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid)).ok().flatten();
    known.map_or_else(|| uid.to_string(), |user| user.name)
}

fn decision_line(decision: &Decision, painter: Painter) -> String {
    let text = if decision.text.is_empty() {
        format!("{} {}", decision.instance, decision.kind)
    } else {
        decision.text.clone()
    };
    let when = age(decision.at_msec);
    let when = when.trim_start_matches(", ");
    let kind = painter.paint(verdict_style(&decision.verdict), &decision.kind);
    let head = if when.is_empty() { kind } else { format!("{kind} {when}") };
    wrap(&format!("  {head}: {text}"), 4)
}

/// One model in full.
fn detail(model: &Model, decisions: &[Decision], painter: Painter) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{}  {}",
        painter.paint(Style::Bold, &model.instance),
        painter.paint(state_style(&model.state), &model.state)
    );
    let mut line = |key: &str, value: &str| {
        if !value.is_empty() {
            let _ = writeln!(out, "  {key:<9} {value}");
        }
    };
    line("message", &model.message);
    line("kind", if model.foreign { "a service of somebody else, adopted" } else { "" });
    line("priority", &format!("{}{}", model.priority, if model.pinned { ", pinned" } else { "" }));
    if model.context > 0 {
        let slots = model.parallel.max(1);
        let mut text = model.context.to_string();
        if slots > 1 {
            let _ = write!(text, ", {slots} slots of {}", model.context / slots);
        }
        if model.context_configured > model.context {
            let _ = write!(text, " (reduced from {})", model.context_configured);
        }
        line("context", &text);
    }
    line("address", &model.address);
    line(
        "requests",
        &match model.requests {
            Some(n) => format!("{n} in flight"),
            None => String::new(),
        },
    );
    line(
        "idle",
        &if matches!(model.requests, Some(1..)) { String::new() } else { idle(model).replace('-', "") },
    );
    line("process", &if model.pid == 0 { String::new() } else { model.pid.to_string() });
    line("aliases", &model.aliases.join(", "));
    line("modes", &model.modes.join(", "));
    out.push('\n');
    let mut table =
        Table::new(&[("GiB", Align::Left), ("PREDICTED", Align::Right), ("MEASURED", Align::Right)]);
    let (p, m) = (&model.predicted, &model.measured);
    for (name, predicted, measured) in [
        ("mapped weights", p.mapped_bytes, m.mapped_bytes),
        ("host, private", p.private_bytes, m.private_bytes),
        ("GPU", p.gpu_bytes, m.gpu_bytes),
        ("total", p.total(), m.total()),
        ("in swap", p.swapped_bytes, m.swapped_bytes),
    ] {
        if name != "in swap" || !measured.is_zero() {
            table.row(vec![plain(name), plain(gib(predicted)), plain(gib(measured))]);
        }
    }
    out.push_str(&table.render(painter));
    let own: Vec<&Decision> =
        decisions.iter().filter(|d| d.instance == model.instance).take(DECISIONS).collect();
    if !own.is_empty() {
        let _ = writeln!(out, "\n{}", painter.paint(Style::Bold, "Last decisions"));
        own.iter().for_each(|decision| out.push_str(&decision_line(decision, painter)));
    }
    out
}

fn list_text(models: &[Model], painter: Painter) -> String {
    if models.is_empty() {
        return "No model is configured: put one into /etc/plimsoll/models.d/NAME.toml.\n".to_owned();
    }
    let mut table = Table::new(&[
        ("MODEL", Align::Left),
        ("STATE", Align::Left),
        ("PRIO", Align::Right),
        ("CONTEXT", Align::Right),
        ("ADDRESS", Align::Left),
        ("ALIASES", Align::Left),
        ("MODES", Align::Left),
    ]);
    for model in models {
        table.row(vec![
            (model.instance.clone(), Style::Bold),
            (model.state.clone(), state_style(&model.state)),
            plain(format!("{}{}", model.priority, if model.pinned { "*" } else { "" })),
            plain(context(model)),
            plain(&model.address),
            plain(model.aliases.join(",")),
            plain(model.modes.join(",")),
        ]);
    }
    table.render(painter)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dbus::report::{Pool, Swap};

    fn sample() -> Status {
        let model = |name: &str, state: &str| Model {
            name: name.into(),
            instance: name.into(),
            state: state.into(),
            priority: 50,
            context: 65536,
            parallel: 4,
            predicted: Classes {
                mapped_bytes: Bytes::gib(33),
                private_bytes: Bytes::gib(4),
                gpu_bytes: Bytes::ZERO,
                swapped_bytes: Bytes::ZERO,
            },
            measured: Classes { mapped_bytes: Bytes::gib(32), ..Classes::default() },
            aliases: vec!["flash".into()],
            ..Model::default()
        };
        Status {
            version: "0.1.0".into(),
            mode: "enforce".into(),
            pools: vec![Pool {
                name: "memory".into(),
                total_bytes: Bytes::gib(128),
                capacity_bytes: Bytes::gib(118),
                reserved_bytes: Bytes::gib(37),
                measured_bytes: Bytes::gib(36),
                headroom_bytes: Bytes::gib(81),
            }],
            swap: Swap { total_bytes: Bytes::gib(8), used_bytes: Bytes::gib(1), ..Swap::default() },
            models: vec![
                Model { pinned: true, requests: Some(2), ..model("glm-flash", "running") },
                model("deepseek", "inactive"),
            ],
            pressure: Pressure::default(),
            quarantined: Vec::new(),
            decisions: vec![Decision {
                kind: "refuse".into(),
                instance: "deepseek".into(),
                verdict: "refused".into(),
                text: "deepseek was refused: at context 65536 it needs 174.0 GiB of memory, 81.0 GiB is free"
                    .into(),
                ..Decision::default()
            }],
            leases: vec![Lease {
                lease: "lease:make".into(),
                state: "held".into(),
                priority: 50,
                pid: 4711,
                uid: 0,
                predicted: Classes { private_bytes: Bytes::gib(20), ..Classes::default() },
                measured: Classes { private_bytes: Bytes::gib(3), ..Classes::default() },
                ..Lease::default()
            }],
            problems: Vec::new(),
            ..Status::default()
        }
    }

    #[test]
    fn what_was_not_returned_is_shown() {
        let leak = Quarantined {
            instance: "glm-flash".into(),
            pool: "card0".into(),
            bytes: Bytes::gib(35),
            since_msec: 7,
        };
        let text = overview(&Status { quarantined: vec![leak], ..sample() }, Painter::plain());
        assert!(text.contains("glm-flash did not return 35.0 GiB of card0 when it stopped"), "{text}");
    }

    #[test]
    fn the_level_is_shown_where_memory_is_short_and_the_last_relief_after_that() {
        let last = Decision { kind: "relieve".into(), text: "low is stopped".into(), ..Decision::default() };
        let short = Pressure {
            level: "act".into(),
            headroom_bytes: Bytes::gib(2),
            falling_bytes: Bytes::mib(200),
            last: Some(last.clone()),
            ..Pressure::default()
        };
        let text = overview(&Status { pressure: short, ..sample() }, Painter::plain());
        assert!(text.contains("Pressure: act, 2.0 GiB of memory left, 0.2 GiB less each second\n"), "{text}");
        assert!(text.contains("Last relief: low is stopped"), "{text}");
        let calm = Pressure { level: "calm".into(), last: Some(last), ..Pressure::default() };
        let text = overview(&Status { pressure: calm, ..sample() }, Painter::plain());
        assert!(!text.contains("Pressure:") && text.contains("Last relief"), "{text}");
    }

    #[test]
    fn the_overview_is_readable_at_80_columns() {
        let text = overview(&sample(), Painter::plain());
        let expected = "\
plimsolld 0.1.0, mode enforce

POOL (GiB)  TOTAL  FOR MODELS  RESERVED  MEASURED  FREE
memory      128.0       118.0      37.0      36.0  81.0
swap          8.0                             1.0   7.0

MODEL      STATE    PRIO  CONTEXT     MAPPED     HOST  GPU  IDLE
glm-flash  running   50*  4x16384  33.0/32.0  4.0/0.0    -  busy
GiB, predicted/measured. MAPPED weights are pages of their files, HOST is private.
* pinned: never evicted

LEASE       STATE  PRIO  MAPPED      HOST  GPU  PROCESS  USER
lease:make  held     50       -  20.0/3.0    -     4711  root
Not running: deepseek

Last decisions
  refuse: deepseek was refused: at context 65536 it needs 174.0 GiB of memory,
    81.0 GiB is free
";
        assert_eq!(text, expected);
        assert!(text.lines().all(|line| line.chars().count() <= 82));
    }

    #[test]
    fn one_model_in_full() {
        let status = sample();
        let text = detail(&status.models[0], &status.decisions, Painter::plain());
        assert!(text.contains("  context   65536, 4 slots of 16384\n"), "{text}");
        assert!(text.contains("  requests  2 in flight\n"), "{text}");
        assert!(text.contains("total                37.0      32.0\n"), "{text}");
        assert!(!text.contains("Last decisions"));
    }

    #[test]
    fn names_and_aliases_find_a_model() {
        let value = serde_json::to_value(sample()).unwrap();
        let name = |found: Value| found["instance"].as_str().map(str::to_owned);
        assert_eq!(name(find(&value, "deepseek").unwrap()), Some("deepseek".into()));
        assert_eq!(name(find(&value, "flash").unwrap()), Some("glm-flash".into()));
        assert_eq!(find(&value, "nobody").unwrap_err().exit, Exit::Config);
    }

    #[test]
    fn an_older_or_newer_daemon_is_understood() {
        let status = read(serde_json::json!({"mode": "enforce", "of-the-future": [1]})).unwrap();
        assert!(overview(&status, Painter::plain()).contains("No model runs."));
    }
}

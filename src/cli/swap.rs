//! `plimsoll swap`: what swap there is, and swapfiles made and removed by hand.

use std::fmt::Write as _;

use serde_json::Value;

use super::agent::Agent;
use super::args::{Common, Swap as Args, SwapCommand};
use super::failure::{Exit, Failure};
use super::output::{self, Align, Painter, Style, Table, gib};
use crate::bytes::Bytes;
use crate::dbus::report::{Swap, SwapArea};
use crate::dbus::{CallError, Client, Kind};

pub(super) fn swap(common: &Common, args: &Args) -> Result<(), Failure> {
    match &args.command {
        None => list(common, args.json),
        Some(SwapCommand::List { json }) => list(common, args.json || *json),
        Some(SwapCommand::Add { size }) => add(common, *size),
        Some(SwapCommand::Remove { names, all }) => remove(common, names, *all),
    }
}

fn list(common: &Common, json: bool) -> Result<(), Failure> {
    let value = fetch(common)?;
    if json {
        return output::print_json(&value);
    }
    output::print(&text(&read(value)?, Painter::stdout()))
}

fn add(common: &Common, size: Bytes) -> Result<(), Failure> {
    if size.is_zero() {
        return Err(Failure::new(Exit::Usage, "a swapfile of nothing is no help")
            .hint("such as: plimsoll swap add 64GiB"));
    }
    let _agent = Agent::start(common);
    super::block_on(async { Ok(super::connect(common).await?.add_swap(size.0).await?) })
}

fn remove(common: &Common, names: &[String], all: bool) -> Result<(), Failure> {
    let _agent = Agent::start(common);
    super::block_on(async {
        let client = super::connect(common).await?;
        if all {
            return remove_all(&client).await;
        }
        for name in names {
            client.remove_swap(name).await?;
        }
        Ok(())
    })
}

/// Removes all that no model needs. One that can't be removed does not keep the others; the last failure is returned,
/// and those before it are said.
async fn remove_all(client: &Client) -> Result<(), Failure> {
    let mut failures: Vec<Failure> = Vec::new();
    for name in own(client).await? {
        let Err(error) = client.remove_swap(&name).await else { continue };
        match &error {
            CallError::Answered(answer) if answer.kind == Kind::Busy => {
                output::eprint(&format!("note: {answer}"));
            }
            CallError::Answered(answer) if answer.kind != Kind::NotAuthorized => {
                // The daemon removes by itself what nobody needs any more.
                let gone = own(client).await.is_ok_and(|left| !left.contains(&name));
                if !gone {
                    failures.push(error.into());
                }
            }
            // The others would end in the same way.
            _ => {
                failures.push(error.into());
                break;
            }
        }
    }
    let Some(last) = failures.pop() else { return Ok(()) };
    for failure in failures {
        output::eprint(&format!("plimsoll: {}", failure.message));
    }
    Err(last)
}

/// The names of the daemon's own swapfiles.
async fn own(client: &Client) -> Result<Vec<String>, Failure> {
    let swap = read(ask(client).await?)?;
    Ok(swap.areas.into_iter().map(|area| area.name).filter(|name| !name.is_empty()).collect())
}

fn fetch(common: &Common) -> Result<Value, Failure> {
    super::block_on(async { ask(&super::connect(common).await?).await })
}

async fn ask(client: &Client) -> Result<Value, Failure> {
    let text = super::answer(client.manager().status()).await?;
    let status: Value = serde_json::from_str(&text).map_err(unreadable)?;
    Ok(status.get("swap").cloned().unwrap_or_default())
}

fn read(value: Value) -> Result<Swap, Failure> {
    serde_json::from_value(value).map_err(unreadable)
}

fn unreadable(error: serde_json::Error) -> Failure {
    CallError::Protocol(error.to_string()).into()
}

fn text(swap: &Swap, painter: Painter) -> String {
    let mut out = String::new();
    if swap.areas.is_empty() {
        out.push_str("No swap.\n");
    } else {
        let mut table = Table::new(&[
            ("NAME", Align::Left),
            ("SIZE", Align::Right),
            ("USED", Align::Right),
            ("PRIORITY", Align::Right),
            ("FOR", Align::Left),
            ("PATH", Align::Left),
        ]);
        for area in &swap.areas {
            table.row(row(area));
        }
        out.push_str(&table.render(painter));
        out.push_str("GiB. The highest priority is used first.\n");
    }
    let _ = writeln!(out, "Swapfiles may take {} more.", swap.room_bytes);
    out
}

fn row(area: &SwapArea) -> Vec<(String, Style)> {
    let plain = |text: &str| (text.to_owned(), Style::Plain);
    let purpose = match (area.owner.as_str(), area.active) {
        (_, false) => ("left behind, goes", Style::Yellow),
        ("plan", _) => ("models", Style::Plain),
        ("person", _) => ("made by hand", Style::Plain),
        _ => ("the system", Style::Plain),
    };
    vec![
        plain(if area.name.is_empty() { "-" } else { &area.name }),
        plain(&gib(area.size_bytes)),
        plain(&gib(area.used_bytes)),
        plain(&area.priority.to_string()),
        (purpose.0.to_owned(), purpose.1),
        plain(&area.path),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_are_listed_with_their_purpose() {
        let area = |name: &str, owner: &str, active| SwapArea {
            name: name.into(),
            owner: owner.into(),
            path: format!("/s/{owner}"),
            size_bytes: Bytes::gib(4),
            used_bytes: Bytes::gib(1),
            priority: -2,
            active,
        };
        let areas =
            vec![area("", "other", true), area("plan-1", "plan", true), area("hand-2", "person", false)];
        let shown = text(&Swap { room_bytes: Bytes::gib(60), areas, ..Swap::default() }, Painter::plain());
        let lines: Vec<&str> = shown.lines().collect();
        assert!(lines[1].starts_with("-") && lines[1].contains("the system"), "{shown}");
        assert!(lines[2].contains("models") && lines[3].contains("left behind"), "{shown}");
        assert!(shown.ends_with("Swapfiles may take 60.0 GiB more.\n"), "{shown}");
    }
}

//! `plimsoll log`: the decisions of the past, from the journal.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::args::Log;
use super::failure::{Exit, Failure};
use super::output::{self, Painter, Style};
use super::verbs::verdict_style;
use crate::config::{self, Instance, NameError};
use crate::daemon::journal::message_id;
use crate::os::local_time;
use crate::policy::decision::Kind;

/// Never looked for in PATH: this may run as root.
const JOURNALCTL: &str = "/usr/bin/journalctl";
/// Where journals are kept.
const JOURNALS: [&str; 2] = ["/run/log/journal", "/var/log/journal"];
/// How many are shown when nothing else is said.
const SHOWN: u32 = 50;
/// What is kept of journalctl's complaints; bytes.
const COMPLAINTS: u64 = 64 * 1024;

pub(super) fn log(args: &Log) -> Result<(), Failure> {
    let named = args.name.as_deref().map(|name| meant(name, Path::new("/"))).transpose()?;
    let painter = Painter::stdout();
    let show = |entry: &Value| match args.json {
        true => output::print(&as_json(entry).to_string()),
        false => output::print(&as_text(entry, painter)),
    };
    if args.follow {
        // One that may read nothing would wait for ever.
        read(&arguments(named.as_ref(), Some(1), None, false), args.since.as_deref(), |_| Ok(()))?;
    }
    let lines = args.lines.or_else(|| args.since.is_none().then_some(SHOWN));
    let shown = read(
        &arguments(named.as_ref(), lines, args.since.as_deref(), args.follow),
        args.since.as_deref(),
        show,
    )?;
    if shown == 0 && !JOURNALS.iter().any(|directory| Path::new(directory).is_dir()) {
        return Err(no_journal());
    }
    if shown == 0 && !args.json {
        output::eprint("The journal has no such decision.");
    }
    Ok(())
}

/// The instance of a name or alias: the journal has names only. What is not configured any more may still be there.
fn meant(name: &str, root: &Path) -> Result<Instance, Failure> {
    let named: Instance = name.parse().map_err(|error: NameError| Failure::usage(error.to_string()))?;
    // A lease is never called by an alias.
    let configured = (!named.lease).then(|| config::load(root));
    let instance = configured.and_then(|loaded| Some(loaded.instance(name).ok()?.0));
    Ok(instance.unwrap_or(named))
}

/// journalctl's arguments: decisions of the daemon only, for anybody may write fields of any name.
fn arguments(named: Option<&Instance>, lines: Option<u32>, since: Option<&str>, follow: bool) -> Vec<String> {
    let mut arguments = vec![
        "--output=json".to_owned(),
        // Without it long fields are left out.
        "--all".to_owned(),
        "--no-pager".to_owned(),
        "--output-fields=MESSAGE,PLIMSOLL_JSON,PLIMSOLL_MODEL,PLIMSOLL_DECISION,PLIMSOLL_VERDICT".to_owned(),
    ];
    arguments.extend(lines.map(|lines| format!("--lines={lines}")));
    arguments.extend(since.map(|since| format!("--since={since}")));
    if follow {
        arguments.push("--follow".to_owned());
    }
    let base: Vec<String> = std::iter::once("_SYSTEMD_UNIT=plimsolld.service".to_owned())
        .chain(Kind::ALL.into_iter().map(|kind| format!("MESSAGE_ID={}", message_id(kind))))
        .collect();
    match named {
        None => arguments.extend(base),
        Some(name) => {
            arguments.extend(base.iter().cloned());
            arguments.extend([format!("PLIMSOLL_MODEL={name}"), "+".to_owned()]);
            arguments.extend(base);
            arguments.push(format!("PLIMSOLL_FOR={name}"));
        }
    }
    arguments
}

/// Hands each entry to `take`; returns how many there were.
fn read(
    arguments: &[String],
    since: Option<&str>,
    mut take: impl FnMut(&Value) -> Result<(), Failure>,
) -> Result<u64, Failure> {
    let mut command = Command::new(JOURNALCTL);
    command.args(arguments).env("LC_ALL", "C").env("SYSTEMD_COLORS", "0").stdin(Stdio::null());
    let spawned = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = spawned.map_err(|error| {
        Failure::failed(format!("the decisions are in the journal, and {JOURNALCTL} can't be run: {error}"))
            .hint("'plimsoll status' shows the latest without it")
    })?;
    let complaints = child.stderr.take().map(|stderr| {
        std::thread::spawn(move || {
            let mut text = Vec::new();
            // What can't be read of them is not told.
            let _ = stderr.take(COMPLAINTS).read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        })
    });
    let mut shown = 0;
    let mut outcome = Ok(());
    for line in child.stdout.take().map(BufReader::new).into_iter().flat_map(BufRead::lines) {
        let Ok(line) = line else { break };
        // journalctl says that it is rotated and the like on lines of their own.
        let Ok(entry) = serde_json::from_str::<Value>(&line) else { continue };
        shown += 1;
        outcome = take(&entry);
        if outcome.is_err() {
            // Nobody reads any more.
            let _ = child.kill();
            break;
        }
    }
    let ended = child.wait()?;
    outcome?;
    let complaints = complaints.and_then(|reader| reader.join().ok()).unwrap_or_default();
    trouble(&complaints, ended.success() || ended.code().is_none(), shown, since).map_or(Ok(shown), Err)
}

fn no_journal() -> Failure {
    Failure::failed("this machine keeps no journal, which is where the decisions are")
        .hint("'plimsoll status' shows the latest without it")
}

/// What journalctl could not do.
fn trouble(complaints: &str, succeeded: bool, shown: u64, since: Option<&str>) -> Option<Failure> {
    let says = |text: &str| complaints.contains(text);
    if says("insufficient permissions") || (shown == 0 && says("not seeing messages from other users")) {
        let failure = Failure::new(Exit::NotAuthorized, "you may not read the system's journal");
        return Some(failure.hint(
            "run it with sudo, or as a member of the group 'systemd-journal' or 'adm'; 'plimsoll status' shows the latest decisions",
        ));
    }
    if says("No journal files were found") || says("No journal files were opened") {
        return Some(no_journal());
    }
    if says("Failed to parse timestamp") {
        let failure = Failure::usage(format!("'{}' is not a time", since.unwrap_or_default()));
        return Some(failure.hint("such as 'yesterday', '2 hours ago' or '2026-11-25 12:00'"));
    }
    let last = complaints.lines().last().unwrap_or("it does not say why");
    (!succeeded).then(|| Failure::failed(format!("journalctl failed: {last}")))
}

/// A field as text; journalctl gives what is not UTF-8 as a list of bytes.
fn field(entry: &Value, name: &str) -> String {
    match entry.get(name) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(bytes)) => {
            let bytes = bytes.iter().filter_map(|byte| u8::try_from(byte.as_u64()?).ok());
            String::from_utf8_lossy(&bytes.collect::<Vec<_>>()).into_owned()
        }
        _ => String::new(),
    }
}

/// The decision with all its keys, and when it was: `realtime_usec`, microseconds since 1970.
fn as_json(entry: &Value) -> Value {
    let mut decision = serde_json::from_str(&field(entry, "PLIMSOLL_JSON"))
        .ok()
        .filter(Value::is_object)
        .unwrap_or_else(|| {
            serde_json::json!({
                "kind": field(entry, "PLIMSOLL_DECISION"),
                "instance": field(entry, "PLIMSOLL_MODEL"),
                "text": field(entry, "MESSAGE"),
            })
        });
    decision["realtime_usec"] = usec(entry).into();
    decision
}

fn usec(entry: &Value) -> u64 {
    field(entry, "__REALTIME_TIMESTAMP").parse().unwrap_or_default()
}

fn as_text(entry: &Value, painter: Painter) -> String {
    let seconds = i64::try_from(usec(entry) / 1_000_000).unwrap_or(i64::MAX);
    let time = local_time(seconds).unwrap_or_default();
    let (kind, verdict) = (field(entry, "PLIMSOLL_DECISION"), field(entry, "PLIMSOLL_VERDICT"));
    let style =
        if kind == "relieve" || kind == "quarantine" { Style::Yellow } else { verdict_style(&verdict) };
    // A terminal is not to be steered by what is logged.
    let text: String = field(entry, "MESSAGE").chars().filter(|c| !c.is_control()).collect();
    let pad = 10_usize.saturating_sub(kind.chars().count());
    format!("{}  {}{:pad$}  {text}", painter.paint(Style::Dim, &time), painter.paint(style, &kind), "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Value {
        serde_json::json!({
            "__REALTIME_TIMESTAMP": "1764086027000000",
            "MESSAGE": "small is \u{1b}[31madmitted",
            "PLIMSOLL_DECISION": "admit",
            "PLIMSOLL_MODEL": "small",
            "PLIMSOLL_VERDICT": "fits",
            "PLIMSOLL_JSON": r#"{"kind":"admit","instance":"small","bytes":5,"pools":[{"name":"memory"}]}"#,
        })
    }

    #[test]
    fn an_entry_is_a_line() {
        let text = as_text(&entry(), Painter::plain());
        assert!(text.ends_with("  admit       small is [31madmitted"), "{text:?}");
    }

    #[test]
    fn json_has_every_key_and_the_time() {
        let json = as_json(&entry());
        assert_eq!((&json["bytes"], &json["pools"][0]["name"]), (&5.into(), &"memory".into()));
        assert_eq!(json["realtime_usec"], 1_764_086_027_000_000_u64);
        // As an older daemon logged, and what is no UTF-8.
        let old = serde_json::json!({ "PLIMSOLL_DECISION": "evict", "MESSAGE": [97, 255, 98] });
        let json = as_json(&old);
        assert_eq!((&json["kind"], &json["text"]), (&"evict".into(), &"a\u{fffd}b".into()));
    }

    #[test]
    fn the_daemons_own_entries_are_asked_for_and_nobody_elses() {
        let name: Instance = "small".parse().unwrap();
        let arguments = arguments(Some(&name), Some(5), Some("-1h"), true);
        assert!(arguments.contains(&"--since=-1h".to_owned()) && arguments.contains(&"--lines=5".to_owned()));
        let either: Vec<&[String]> = arguments.split(|argument| argument == "+").collect();
        assert_eq!(either.len(), 2);
        for (matches, field) in either.iter().zip(["PLIMSOLL_MODEL=small", "PLIMSOLL_FOR=small"]) {
            assert!(matches.contains(&"_SYSTEMD_UNIT=plimsolld.service".to_owned()));
            assert!(matches.contains(&field.to_owned()));
            assert_eq!(matches.iter().filter(|m| m.starts_with("MESSAGE_ID=")).count(), Kind::ALL.len());
        }
    }

    #[test]
    fn an_alias_is_asked_for_by_the_models_name() {
        let root = std::env::temp_dir().join(format!("plimsoll-log-{}", std::process::id()));
        let models = root.join("etc/plimsoll/models.d");
        std::fs::create_dir_all(&models).unwrap();
        let text = "command = [\"/bin/true\"]\nmemory = \"1GiB\"\nport = 8001\naliases = [\"deepseek\"]\n";
        std::fs::write(models.join("deepseek-tq1.toml"), text).unwrap();
        let name = |text: &str| meant(text, &root).map(|instance| instance.to_string());
        let got = ["deepseek", "deepseek@2", "deepseek-tq1", "gone", "lease:deepseek"].map(name);
        let wrong = name("no name").unwrap_err().exit;
        std::fs::remove_dir_all(&root).unwrap();
        let expected = ["deepseek-tq1", "deepseek-tq1@2", "deepseek-tq1", "gone", "lease:deepseek"];
        assert_eq!(got, expected.map(|name| Ok(name.to_owned())));
        assert_eq!(wrong, Exit::Usage);
    }

    #[test]
    fn what_stands_in_the_way_is_told() {
        let hint = "Hint: You are currently not seeing messages from other users and the system.\n";
        let exit = |text, ok, shown| trouble(text, ok, shown, Some("noon-ish")).map(|failure| failure.exit);
        assert_eq!(exit(hint, true, 0), Some(Exit::NotAuthorized));
        assert_eq!(exit(hint, true, 3), None);
        let denied = "No journal files were opened due to insufficient permissions.\n";
        assert_eq!(exit(denied, false, 0), Some(Exit::NotAuthorized));
        assert_eq!(exit("No journal files were found.\n", true, 0), Some(Exit::Failed));
        assert_eq!(exit("Failed to parse timestamp: noon-ish\n", false, 0), Some(Exit::Usage));
        assert_eq!(exit("", false, 0), Some(Exit::Failed));
        assert_eq!(exit("", true, 0), None);
    }
}

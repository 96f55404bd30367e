//! The answer of `fit`: a table for people, an object for programs.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::machine::Target;
use super::subject::{Provenance, Subject};
use super::{Line, settings};
use crate::bytes::{Bytes, MIB};
use crate::cli::output::{Align, Painter, Style, Table, gib, wrap};
use crate::cli::verbs::verdict_style;
use crate::config::{Oversize, Workload};
use crate::fit::{ENGINE_VERSION, Parts, millitokens_per_second};
use crate::ledger::Pool;
use crate::policy::Verdict;

/// The verdict in the word that JSON has for it.
pub fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Fits => "fits",
        Verdict::FitsAfter => "fits-after",
        Verdict::FitsWithSwap => "fits-with-swap",
        Verdict::Streams => "streams",
        Verdict::Refused => "refused",
        Verdict::Unknown => "unknown",
    }
}

/// The object that `--json` prints.
pub fn json(subject: &Subject, target: &Target, lines: &[Line]) -> Value {
    json!({
        "model": model_json(subject),
        "settings": settings::json(subject),
        "engine": ENGINE_VERSION,
        "machine": target.json(),
        "estimates": lines.iter().map(|line| estimate(target, line)).collect::<Vec<_>>(),
    })
}

/// The model, and where its description comes from.
pub fn model_json(subject: &Subject) -> Value {
    let model = &subject.model;
    let (source, assumed, notes) = match &subject.provenance {
        Provenance::File => ("file", false, &[][..]),
        Provenance::Address => ("address", false, &[][..]),
        Provenance::Catalogue { assumed, notes, .. } => ("catalogue", *assumed, &notes[..]),
    };
    json!({
        "name": model.name().unwrap_or(&subject.name),
        "architecture": model.architecture(),
        "files": model.shards().iter().map(|shard| shard.path.to_string_lossy()).collect::<Vec<_>>(),
        "parameters": model.parameters(),
        "file_bytes": model.file_bytes(),
        "context_train": model.context_train(),
        "source": source,
        "assumed": assumed,
        "provenance": notes,
    })
}

/// One estimate with its verdict.
pub fn estimate(target: &Target, line: &Line) -> Value {
    let mut value = serde_json::to_value(&line.estimate).unwrap_or_default();
    if let Value::Object(object) = &mut value {
        // Neither the daemon's concern nor stable: indices of files and devices.
        object.remove("mapped_by_shard");
        object.insert("cpu_moe".to_owned(), json!(line.cpu_moe));
        object.insert("swap_needed_bytes".to_owned(), json!(line.judgement.swap_needed));
        object.insert("verdict".to_owned(), json!(word(line.judgement.verdict)));
        object.insert("resident_per_mille".to_owned(), json!(line.judgement.resident_per_mille));
        object.insert("short_bytes".to_owned(), json!(line.judgement.short.map_or(Bytes::ZERO, |(_, b)| b)));
        object.insert("read_bytes_per_token".to_owned(), json!(line.reading.map(|r| r.read_bytes)));
        object.insert("tokens_per_second".to_owned(), json!(tokens_per_second(target, line)));
    }
    value
}

/// From the slowest disk to the fastest that it may have, where a line streams.
fn tokens_per_second(target: &Target, line: &Line) -> Option<[f64; 2]> {
    let reading = line.reading?;
    let at = |speed| Some(f64::from(u32::try_from(millitokens_per_second(&reading, speed)?).ok()?) / 1000.0);
    let [least, most] = target.disk_speeds;
    Some([at(least)?, at(most)?])
}

/// What a token reads where lines stream, and how many a second that makes.
fn reading(target: &Target, lines: &[Line]) -> Option<String> {
    let read: Vec<Bytes> = lines.iter().filter_map(|line| Some(Bytes(line.reading?.read_bytes))).collect();
    let rates: Vec<[f64; 2]> = lines.iter().filter_map(|line| tokens_per_second(target, line)).collect();
    let least = rates.iter().map(|rate| rate[0]).reduce(f64::min)?;
    let most = rates.iter().map(|rate| rate[1]).reduce(f64::max)?;
    let each = range(&gib(*read.iter().min()?), &gib(*read.iter().max()?), " GiB");
    let gigabytes = |speed: u64| format!("{}.{}", speed / 1_000_000_000, speed / 100_000_000 % 10);
    let [slow, fast] = target.disk_speeds.map(gigabytes);
    let given = if slow == fast { "" } else { " (--disk-speed says which)" };
    Some(format!(
        "A token reads {each} from disk if experts are used evenly: {} at the most, on a disk of {}{given}.",
        range(&format!("{least:.1}"), &format!("{most:.1}"), " tokens a second"),
        range(&slow, &fast, " GB/s")
    ))
}

/// The answer for people.
pub fn text(
    subject: &Subject,
    target: &Target,
    lines: &[Line],
    max_context: bool,
    painter: Painter,
) -> String {
    let mut out = heading(subject, target, painter);
    out.push('\n');
    out.push_str(&table(lines, painter));
    out.push_str(&footnotes(subject, target, lines));
    if let (true, Some(line)) = (max_context, lines.first()) {
        let trained = subject.model.context_train();
        let _ = match line.estimate.context {
            all if all >= trained => writeln!(out, "All of the {trained} tokens that it was trained on fit."),
            most => {
                writeln!(out, "The largest context that fits is {most}, of {trained} that it was trained on.")
            }
        };
    }
    out
}

fn heading(subject: &Subject, target: &Target, painter: Painter) -> String {
    let model = &subject.model;
    let shards = match model.shards().len() {
        1 => "1 file".to_owned(),
        n => format!("{n} files"),
    };
    let title = model.name().map_or_else(|| subject.name.clone(), printable);
    let mut out = format!("{}\n", painter.paint(Style::Bold, &title));
    let mut line = |name: &str, text: &str| out.push_str(&wrap(&format!("  {name:<9} {text}"), 12));
    line(
        "model",
        &format!(
            "{}, {} parameters, {shards} of {}, trained on {} tokens",
            printable(model.architecture()),
            parameters(model.parameters()),
            Bytes(model.file_bytes()),
            model.context_train()
        ),
    );
    match &subject.provenance {
        Provenance::File => {}
        Provenance::Address => line("from", "an address: only the headers were read"),
        Provenance::Catalogue { notes, .. } => notes.iter().enumerate().for_each(|(n, note)| {
            line(if n == 0 { "from" } else { "" }, note.strip_prefix("from ").unwrap_or(note));
        }),
    }
    let changed = settings::changed(subject);
    if !changed.is_empty() {
        line("settings", &changed.join(" "));
    }
    if !subject.passed_on.is_empty() {
        line("unknown", &format!("{} (taken to need no memory)", subject.passed_on.join(" ")));
    }
    line(if target.described { "for" } else { "here" }, &target.describe());
    out
}

/// Names come out of files: no control characters, and not longer than a line.
pub fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(70).collect()
}

/// `671.0 B`, `30.5 B`, `360.0 M`.
fn parameters(count: u64) -> String {
    let tenths = |unit: u64| {
        let tenths = (u128::from(count) * 10 + u128::from(unit) / 2) / u128::from(unit);
        format!("{}.{}", tenths / 10, tenths % 10)
    };
    match count {
        1_000_000_000.. => format!("{} B", tenths(1_000_000_000)),
        1_000_000.. => format!("{} M", tenths(1_000_000)),
        _ => count.to_string(),
    }
}

/// A column of the table: its head, and what stands in it.
type Column = (&'static str, fn(&Parts) -> u64);

const COLUMNS: [Column; 7] = [
    ("WEIGHTS", |parts| parts.weights_bytes),
    ("KV", |parts| parts.kv_bytes),
    ("STATE", |parts| parts.state_bytes),
    ("COMP", |parts| parts.compute_bytes),
    ("OUTPUT", |parts| parts.output_bytes),
    ("EXTRAS", |parts| parts.extras_bytes),
    ("BESIDE", |parts| parts.beside_bytes),
];

fn table(lines: &[Line], painter: Painter) -> String {
    // What is nothing in every line needs no column; it is in the JSON all the same.
    let shown: Vec<&Column> = COLUMNS
        .iter()
        .filter(|(_, of)| lines.iter().any(|line| of(&line.estimate.bytes) >= 52 * MIB))
        .collect();
    let mut columns = vec![("CONTEXT", Align::Right)];
    columns.extend(shown.iter().map(|(name, _)| (*name, Align::Right)));
    columns.extend([
        ("TOTAL", Align::Right),
        ("GPU", Align::Right),
        ("HOST", Align::Right),
        ("VERDICT", Align::Left),
    ]);
    let mut table = Table::new(&columns);
    let plain = |text: String| (text, Style::Plain);
    for line in lines {
        let estimate = &line.estimate;
        let mut row = vec![plain(estimate.context.to_string())];
        row.extend(shown.iter().map(|(_, of)| plain(gib(Bytes(of(&estimate.bytes))))));
        let bound = if estimate.exact { "" } else { "~" };
        row.push((format!("{bound}{}", gib(Bytes(estimate.bytes.total_bytes))), Style::Bold));
        row.push(plain(gib(Bytes(estimate.split.gpu.total_bytes))));
        row.push(plain(gib(Bytes(estimate.split.host.total_bytes))));
        row.push((verdict(line), verdict_style(word(line.judgement.verdict))));
        table.row(row);
    }
    table.render(painter)
}

/// The verdict with the number that it turns on.
fn verdict(line: &Line) -> String {
    let judgement = &line.judgement;
    let word = word(judgement.verdict);
    match (judgement.verdict, judgement.short) {
        (Verdict::FitsWithSwap, _) => format!("{word}, {}", gib(judgement.swap_needed)),
        (Verdict::Streams, _) => format!("{word}, {} %", judgement.resident_per_mille / 10),
        (Verdict::Refused, Some((_, short))) => format!("{word}, {} short", gib(short)),
        _ => word.to_owned(),
    }
}

/// What the table has no room for: each thing once, however many lines it is true of.
fn footnotes(subject: &Subject, target: &Target, lines: &[Line]) -> String {
    let mut out = "Sizes in GiB.".to_owned();
    if !subject.has_exact_weights() {
        out.push_str(" ~: which types its tensors have only the file's header tells.");
    } else if lines.iter().any(|line| !line.estimate.exact) {
        out.push_str(" ~: with an upper bound for some of it.");
    }
    out.push('\n');
    let mut say = |text: String| out.push_str(&wrap(&text, 0));
    if let Some(cache) = lines.first().map(|line| line.estimate.extras.prompt_cache_bytes)
        && cache > 0
        && !subject.configured
    {
        let limit = Bytes(cache);
        say(format!("EXTRAS has {limit} for llama-server's prompt cache; '-- --cache-ram 0' leaves it out."));
    }
    if let Some(beside) = lines.last().map(|line| line.estimate.beside) {
        let parts = [
            ("the draft model", beside.draft_bytes),
            ("the projector", beside.projector_bytes),
            ("adapters", beside.adapter_bytes),
            ("the control vector", beside.control_vector_bytes),
        ];
        let shown = parts.iter().filter(|(_, bytes)| *bytes > 0);
        let shown: Vec<String> = shown.map(|(name, bytes)| format!("{} for {name}", Bytes(*bytes))).collect();
        if !shown.is_empty() {
            say(format!("TOTAL has {}.", shown.join(", ")));
        }
    }
    let of = |verdict: Verdict| lines.iter().filter(move |line| line.judgement.verdict == verdict);
    if of(Verdict::FitsAfter).next().is_some() {
        let which = if subject.configured {
            format!("; 'plimsoll plan {}' says which", subject.name)
        } else {
            String::new()
        };
        say(format!("fits-after: once models that run are stopped{which}."));
    }
    if of(Verdict::FitsWithSwap).next().is_some() {
        say(format!(
            "fits-with-swap: with so much of it in swap.{}",
            permission(subject, Verdict::FitsWithSwap)
        ));
    }
    if of(Verdict::Streams).next().is_some() {
        say(format!(
            "streams: only so much of the mapped weights stays resident, the rest is read from disk again and again.{}",
            permission(subject, Verdict::Streams)
        ));
        reading(target, lines).into_iter().for_each(&mut say);
    }
    for (pool, name) in
        [(Pool::Memory, "memory"), (Pool::Gpu(0), "GPU memory"), (Pool::Slice, "llm.slice's limit")]
    {
        let is = |found: Pool| std::mem::discriminant(&found) == std::mem::discriminant(&pool);
        let short = |line: &&Line| line.judgement.short.is_some_and(|(found, _)| is(found));
        if of(Verdict::Refused).any(|line| short(&line)) {
            say(format!("short: of {name}."));
        }
    }
    let swap: Vec<Bytes> =
        of(Verdict::Refused).map(|line| line.judgement.swap_needed).filter(|swap| !swap.is_zero()).collect();
    if let (Some(least), Some(most)) = (swap.iter().min(), swap.iter().max()) {
        let permission = permission(subject, Verdict::FitsWithSwap);
        say(format!(
            "Swap of {} would make up for it.{permission}",
            range(&gib(*least), &gib(*most), " GiB")
        ));
    }
    if let Some(line) = lines.iter().find_map(|line| line.mapped.as_ref()) {
        let share = line.resident_per_mille / 10;
        say(format!(
            "With '-- --load-mode mmap' it streams: {share} % of the weights on the host stay resident."
        ));
    }
    let experts: Vec<u32> = lines.iter().map(|line| line.cpu_moe).filter(|layers| *layers > 0).collect();
    if let (Some(least), Some(most)) = (experts.iter().min(), experts.iter().max()) {
        let layers = range(&least.to_string(), &most.to_string(), " layers");
        say(format!("The experts of {layers} stay on the host, which each token touches least."));
    }
    let mut notes: Vec<&String> = lines.iter().flat_map(|line| &line.estimate.notes).collect();
    notes.sort();
    notes.dedup();
    notes.into_iter().for_each(|note| say(format!("Note: {note}.")));
    out
}

/// What the model's configuration has to say before plimsolld lets it run like that; nothing where it does.
fn permission(subject: &Subject, verdict: Verdict) -> String {
    let batch = subject.workload == Workload::Batch;
    let wanted = match verdict {
        Verdict::Streams if subject.oversize != Oversize::Stream => r#"oversize = "stream""#,
        Verdict::FitsWithSwap if subject.oversize != Oversize::Swap || !batch => {
            r#"oversize = "swap" and workload = "batch", and makes a swapfile for it: other swap does not count"#
        }
        _ => return String::new(),
    };
    let whose = if subject.configured { "its configuration has" } else { "a model's configuration has" };
    format!(" plimsolld refuses that unless {whose} {wanted}.")
}

/// `19 layers`, or `19 to 22 layers`.
fn range(least: &str, most: &str, unit: &str) -> String {
    if least == most { format!("{least}{unit}") } else { format!("{least} to {most}{unit}") }
}

/// Why a line does not fit, as part of a sentence.
pub fn why(line: &Line) -> String {
    let (pool, bytes) = match line.judgement.short {
        Some((Pool::Memory, bytes)) => ("memory", bytes),
        Some((Pool::Gpu(_), bytes)) => ("GPU memory", bytes),
        Some((Pool::Slice, bytes)) => ("the limit of llm.slice", bytes),
        None => return "its size is unknown".to_owned(),
    };
    format!("{bytes} of {pool} are missing at {} tokens", line.estimate.context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_short() {
        assert_eq!(parameters(671_026_419_200), "671.0 B");
        assert_eq!(parameters(361_821_120), "361.8 M");
        assert_eq!(parameters(999), "999");
    }

    #[test]
    fn names_from_files_can_not_draw_on_the_terminal() {
        assert_eq!(printable("a\x1b[31mb\n"), "a[31mb");
        assert_eq!(printable(&"x".repeat(500)).len(), 70);
    }
}

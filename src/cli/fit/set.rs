//! `plimsoll fit --set`: several models at once, what they take of each pool, and whether they all fit.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::machine::Target;
use super::subject::{self, Provenance, Subject};
use super::{Line, Pricer, report};
use crate::bytes::Bytes;
use crate::cli::args::Fit;
use crate::cli::failure::Failure;
use crate::cli::output::{self, Align, Painter, Style, Table, gib, wrap};
use crate::cli::verbs::verdict_style;
use crate::fit::ENGINE_VERSION;
use crate::ledger::{Charges, FileId, Footprint, Mapped, PerPool, Pool};
use crate::policy::Verdict;
use crate::policy::verdict::{Judgement, judge};

/// Tokens of a model that nothing says the context of.
const CONTEXT: u64 = 16384;
/// The most models of a set; nobody has more on one machine.
const MOST: usize = 64;

/// A set with what it takes.
struct Set {
    members: Vec<Member>,
    /// Each pool's share of all of them, mapped files once.
    charge: PerPool,
    /// Mapped bytes that several members share, and that are therefore counted once.
    shared: Bytes,
    judgement: Judgement,
}

struct Member {
    subject: Subject,
    line: Line,
}

pub(super) fn fit(args: &Fit) -> Result<(), Failure> {
    let (set, target) = price(args)?;
    if args.json {
        return output::print_json(&json(&set, &target));
    }
    output::print(&text(&set, &target, Painter::stdout()))
}

fn price(args: &Fit) -> Result<(Set, Target), Failure> {
    let context = match args.contexts[..] {
        [] => None,
        [context] => Some(context),
        _ => return Err(Failure::usage("a set is priced at one context: give -c once")),
    };
    if args.set.len() > MOST {
        return Err(Failure::usage(format!("a set has at most {MOST} models")));
    }
    let (variables, arguments) = subject::assignments(&args.arguments);
    let mut subjects = Vec::new();
    for name in args.set.iter().map(|name| name.trim()) {
        if name.is_empty() {
            return Err(Failure::usage("a name of --set is empty"));
        }
        let mut subject = Subject::named(name, &args.root.root, arguments, &variables)?;
        as_configured(&mut subject);
        subjects.push(subject);
    }
    let reserve = subjects.first().map(|subject| subject.reserve).unwrap_or_default();
    let target = Target::find(args, reserve)?;
    let mut charges = Charges::default();
    let mut members = Vec::new();
    for subject in subjects {
        // Each is placed in the room that those before it leave.
        let held = charges.per_pool(&target.machine, &[], None);
        let mut pricer = Pricer::new(&subject, &target)?;
        let room = &target.room.emptied;
        pricer.budget.host = (room.memory - held.memory).0;
        pricer.budget.gpu =
            (room.gpus.iter().copied().sum::<Bytes>() - held.gpus.iter().copied().sum::<Bytes>()).0;
        let mut settings = subject.settings.clone();
        settings.context = match (context, settings.context) {
            (Some(context), _) => context,
            (None, 0) => CONTEXT.min(pricer.facts.context_train.max(1)),
            (None, context) => context,
        };
        let line = pricer.price_settings(&settings)?;
        charges.add(line.footprint.clone());
        members.push(Member { subject, line });
    }
    let charge = charges.per_pool(&target.machine, &[], None);
    let together = together(members.iter().map(|m| &m.line.footprint));
    let known = members.iter().all(|m| m.line.estimate.known);
    let always = members.iter().map(|m| Bytes(m.line.estimate.mapped_always_bytes)).sum();
    let judgement = judge(&together, always, known, &target.machine, &target.room);
    let all: Bytes = members.iter().map(|m| m.line.footprint.mapped_bytes()).sum();
    let shared = all - together.mapped_bytes();
    Ok((Set { members, charge, shared, judgement }, target))
}

/// What isn't configured is priced as a model file without further keys would be: one slot, and a prompt cache
/// from what is left over, which is never a reason that something doesn't fit.
fn as_configured(subject: &mut Subject) {
    if subject.configured {
        return;
    }
    if !subject.sources.contains_key("parallel") {
        subject.settings.parallel = Some(1);
    }
    if !subject.sources.contains_key("cache-ram") {
        subject.settings.prompt_cache_mib = Some(0);
    }
}

/// All footprints as one, each mapped file once.
fn together<'a>(footprints: impl Iterator<Item = &'a Footprint>) -> Footprint {
    let mut sum = Footprint::default();
    let mut files: BTreeMap<FileId, Bytes> = BTreeMap::new();
    for one in footprints {
        sum.private += one.private;
        for mapped in &one.mapped {
            let bytes = files.entry(mapped.file).or_default();
            *bytes = (*bytes).max(mapped.bytes);
        }
        if sum.gpus.len() < one.gpus.len() {
            sum.gpus.resize(one.gpus.len(), Bytes::ZERO);
        }
        sum.gpus.iter_mut().zip(&one.gpus).for_each(|(sum, bytes)| *sum += *bytes);
    }
    sum.mapped = files.into_iter().map(|(file, bytes)| Mapped { file, bytes }).collect();
    sum
}

fn pool_name(pool: Pool) -> String {
    match pool {
        Pool::Memory => "memory".to_owned(),
        Pool::Gpu(n) => format!("gpu{n}"),
        Pool::Slice => "slice".to_owned(),
    }
}

fn json(set: &Set, target: &Target) -> Value {
    let member = |member: &Member| {
        let Member { subject, line } = member;
        json!({ "model": report::model_json(subject), "estimate": report::estimate(target, line) })
    };
    let room = &target.room.emptied;
    json!({
        "engine": ENGINE_VERSION,
        "machine": target.json(),
        "set": set.members.iter().map(member).collect::<Vec<_>>(),
        "together": {
            "memory_bytes": set.charge.memory,
            "gpu_bytes": set.charge.gpus,
            "shared_bytes": set.shared,
            "memory_room_bytes": room.memory,
            "gpu_room_bytes": room.gpus,
            "verdict": report::word(set.judgement.verdict),
            "short_pool": set.judgement.short.map(|(pool, _)| pool_name(pool)),
            "short_bytes": set.judgement.short.map_or(Bytes::ZERO, |(_, bytes)| bytes),
            "swap_needed_bytes": set.judgement.swap_needed,
        },
    })
}

fn text(set: &Set, target: &Target, painter: Painter) -> String {
    let mut out =
        wrap(&format!("{} {}", if target.described { "for" } else { "here" }, target.describe()), 2);
    out.push('\n');
    let right = |name| (name, Align::Right);
    let mut table = Table::new(&[
        ("MODEL", Align::Left),
        right("CONTEXT"),
        right("WEIGHTS"),
        right("CACHE"),
        right("OTHER"),
        right("TOTAL"),
        right("GPU"),
        right("HOST"),
    ]);
    let plain = |text: String| (text, Style::Plain);
    for Member { subject, line } in &set.members {
        let bytes = &line.estimate.bytes;
        let cache = bytes.kv_bytes + bytes.state_bytes;
        let other = bytes.total_bytes.saturating_sub(bytes.weights_bytes + cache);
        let mut row = vec![plain(report::printable(&subject.name)), plain(line.estimate.context.to_string())];
        row.extend([bytes.weights_bytes, cache, other].map(|n| plain(gib(Bytes(n)))));
        let bound = if line.estimate.exact { "" } else { "~" };
        row.push((format!("{bound}{}", gib(Bytes(bytes.total_bytes))), Style::Bold));
        row.push(plain(gib(Bytes(line.estimate.split.gpu.total_bytes))));
        row.push(plain(gib(Bytes(line.estimate.split.host.total_bytes))));
        table.row(row);
    }
    out.push_str(&table.render(painter));
    out.push_str("Sizes in GiB.\n\n");
    let word = report::word(set.judgement.verdict);
    let mut sentence = format!("together {} of {} memory", set.charge.memory, target.room.emptied.memory);
    for (n, (bytes, room)) in set.charge.gpus.iter().zip(&target.room.emptied.gpus).enumerate() {
        let name = if target.machine.gpus.len() > 1 { format!("GPU {n}") } else { "GPU".to_owned() };
        sentence.push_str(&format!(", {bytes} of {room} {name}"));
    }
    if let Some((pool, bytes)) = set.judgement.short {
        sentence.push_str(&format!("; {} is {bytes} short", pool_name(pool)));
    }
    if !set.judgement.swap_needed.is_zero() {
        let needs = if set.judgement.verdict == Verdict::Refused { "they would need" } else { "they need" };
        sentence.push_str(&format!("; {needs} {} of swap", set.judgement.swap_needed));
    }
    out.push_str(&wrap(&format!("{}: {sentence}", painter.paint(verdict_style(word), word)), 2));
    if !set.shared.is_zero() {
        out.push_str(&wrap(&format!("{} of mapped weights are shared and count once.", set.shared), 2));
    }
    let assumed = |m: &&Member| matches!(m.subject.provenance, Provenance::Catalogue { assumed: true, .. });
    let named = |m: &Member| report::printable(&m.subject.name);
    let from: Vec<String> = set
        .members
        .iter()
        .filter(|m| matches!(m.subject.provenance, Provenance::Catalogue { .. }))
        .map(named)
        .collect();
    if !from.is_empty() {
        out.push_str(&wrap(&format!("From the catalogue, not from files: {}.", from.join(", ")), 2));
    }
    let assumed: Vec<String> = set.members.iter().filter(assumed).map(named).collect();
    if !assumed.is_empty() {
        out.push_str(&wrap(&format!("Assumed, never published so: {}.", assumed.join(", ")), 2));
    }
    if set.members.iter().any(|m| !m.subject.configured) {
        out.push_str(&wrap(
            "Without a prompt cache, which takes only what is left over, and with one slot each unless the \
             arguments say otherwise.",
            2,
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::GIB;
    use crate::cli::args::{Cli, Verb};
    use clap::Parser;

    /// Prices a set on the machine of the roadmap: 128 GiB, of which the GPU may have 120, no swap.
    fn set(names: &str, context: &str) -> Set {
        let line = ["plimsoll", "fit", "--set", names, "-c", context, "--ram", "128GiB", "--gpu", "120GiB"];
        let cli = Cli::try_parse_from(line.iter().chain(&["--swap", "0"])).unwrap();
        let Verb::Fit(fit) = cli.verb else { panic!() };
        price(&fit).unwrap().0
    }

    fn gib_of(set: &Set) -> u64 {
        set.charge.memory.0 / GIB
    }

    #[test]
    fn the_strategies_of_the_roadmap() {
        // Name, models, the roadmap's sum in GB, whether they fit at 16K.
        let strategies = [
            ("1, speed and quality", "gpt-oss-20b:f16,qwen3-coder-30b:q8_0", 48, true),
            ("2, balanced triple", "nemo-12b,qwen3-coder-30b,starcoder2-15b", 64, true),
            ("3, Qwen and REAP", "qwen3-coder-30b:q8_0,reap-218b:q3", 127, false),
            ("3, GLM and REAP", "glm-4.7-flash:q8_0,reap-218b:q3", 125, false),
            ("4, the same thrice", "qwen3-coder-14b,qwen3-coder-14b,qwen3-coder-14b", 54, true),
            (
                "the speed machine",
                "gpt-oss-20b:f16,qwen3-coder-30b:q8_0,qwen3-coder-14b:q8_0,starcoder2-15b:q8_0",
                82,
                true,
            ),
            ("medium 3", "qwen3-coder-14b:q8_0,qwen3-next-80b:q8_0", 105, true),
            ("large 3", "qwen3-next-80b:q8_0,nemo-12b:q8_0", 100, true),
        ];
        for (name, models, theirs, fits) in strategies {
            let set = set(models, "16384");
            let fitted = matches!(set.judgement.verdict, Verdict::Fits);
            let ours = gib_of(&set);
            assert_eq!(fitted, fits, "{name}: {ours} GiB, {:?}", set.judgement);
            assert!(ours.abs_diff(theirs) <= 16, "{name}: {ours} GiB, the roadmap says {theirs} GB");
        }
    }

    #[test]
    fn what_is_there_twice_counts_twice_but_for_mapped_weights() {
        let one = set("starcoder2-15b:q8_0", "4096");
        let two = set("starcoder2-15b:q8_0,starcoder2-15b:q8_0", "4096");
        assert_eq!(two.charge.memory.0, 2 * one.charge.memory.0);
        let line =
            ["plimsoll", "fit", "--set", "starcoder2-15b,starcoder2-15b", "--ram", "64GiB", "--gpu", "none"];
        let Verb::Fit(fit) = Cli::try_parse_from(line).unwrap().verb else { panic!() };
        let (mapped, _) = price(&fit).unwrap();
        assert!(mapped.shared.0 > 15 * GIB, "{}", mapped.shared);
        assert!(mapped.charge.memory.0 < 24 * GIB, "{}", mapped.charge.memory);
    }

    #[test]
    fn the_answer_says_where_it_comes_from() {
        let set = set("yi-coder-34b:q8_0,gpt-oss-20b", "4096");
        let line = ["plimsoll", "fit", "--set", "x", "--ram", "128GiB", "--gpu", "120GiB"];
        let Verb::Fit(fit) = Cli::try_parse_from(line).unwrap().verb else { panic!() };
        let target = Target::find(&fit, crate::config::Reserve::default()).unwrap();
        let text = text(&set, &target, Painter::plain());
        assert!(
            text.contains("From the catalogue, not from files: yi-coder-34b:q8_0, gpt-oss-20b:"),
            "{text}"
        );
        assert!(text.contains("Assumed, never published so: yi-coder-34b:q8_0."), "{text}");
        let json = json(&set, &target);
        assert_eq!(json["set"][0]["model"]["assumed"], true);
        assert_eq!(json["together"]["verdict"], "fits");
    }

    #[test]
    fn sets_that_can_not_be_meant_are_refused() {
        let failure = |line: &[&str]| {
            let line = ["plimsoll", "fit", "--set"].iter().chain(line);
            let Verb::Fit(fit) = Cli::try_parse_from(line).unwrap().verb else { panic!() };
            price(&fit).map(|_| ()).unwrap_err().message
        };
        assert!(failure(&["nemo-12b", "-c", "1", "-c", "2"]).contains("one context"));
        assert!(failure(&["nemo-12b,,gpt-oss-20b"]).contains("empty"));
        assert!(failure(&["nemo-13c"]).contains("nemo-13c"));
    }
}

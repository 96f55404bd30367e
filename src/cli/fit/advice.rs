//! What could be changed so that a model fits, or fits with more context: each change priced, none guessed.

use serde_json::{Value, json};

use super::report::word;
use super::{Line, Pricer, STEP, fits};
use crate::bytes::Bytes;
use crate::cli::failure::Failure;
use crate::cli::output::wrap;
use crate::fit::Settings;
use crate::gguf::TensorType;
use crate::policy::Verdict;

/// How many ways are told.
const TOLD: usize = 3;

/// One change of the settings, and what comes of it.
#[derive(Clone, Debug)]
pub struct Change {
    /// As llama-server has it: `--cache-ram 0`.
    pub arguments: String,
    /// What it saves in all, at the same context.
    pub saves: Bytes,
    /// With the change.
    pub line: Line,
}

/// What may be told beside the table.
#[derive(Clone, Debug, Default)]
pub struct Advice {
    /// Single changes with which the smallest context that does not fit would, the least painful first; where
    /// none is enough, several at once, if those are.
    pub changes: Vec<Change>,
    /// The context that they are about; tokens.
    pub context: u64,
    /// The largest context that fits as it is.
    pub instead: Option<Line>,
    /// The search was for the largest context: that, with each change that gives more.
    pub larger: Vec<Change>,
    /// The line behind the largest context.
    pub next: Option<Line>,
}

type Alteration = (String, Box<dyn Fn(&mut Settings)>);

/// What can be done without, the least painful first.
fn alterations(line: &Line) -> Vec<Alteration> {
    let (settings, estimate) = (&line.settings, &line.estimate);
    let mut all: Vec<Alteration> = Vec::new();
    if estimate.extras.prompt_cache_bytes > 0 {
        all.push(("--cache-ram 0".to_owned(), Box::new(|s| s.prompt_cache_mib = Some(0))));
    }
    if estimate.extras.checkpoint_bytes > 0 {
        all.push(("--ctx-checkpoints 0".to_owned(), Box::new(|s| s.context_checkpoints = 0)));
    }
    if estimate.slots > 1 {
        all.push(("-np 1".to_owned(), Box::new(|s| s.parallel = Some(1))));
    }
    let width = |kind: TensorType| kind.row_bytes(256);
    for kind in [TensorType::Q8_0, TensorType::Q4_0] {
        if width(settings.cache_type_k) > width(kind) || width(settings.cache_type_v) > width(kind) {
            let arguments = format!("-ctk {0} -ctv {0}", kind.name());
            let narrow = move |s: &mut Settings| {
                for cache in [&mut s.cache_type_k, &mut s.cache_type_v] {
                    if width(*cache) > width(kind) {
                        *cache = kind;
                    }
                }
            };
            all.push((arguments, Box::new(narrow)));
        }
    }
    if settings.ubatch > 512 {
        all.push(("-ub 512".to_owned(), Box::new(|s| s.ubatch = 512)));
    }
    all
}

/// Tries what could be changed for the smallest context that does not fit.
///
/// # Errors
/// The model can't be priced.
pub fn find(pricer: &Pricer<'_>, lines: &[Line]) -> Result<Advice, Failure> {
    let Some(line) = lines.iter().find(|line| !fits(line) && line.judgement.verdict != Verdict::Unknown)
    else {
        return Ok(Advice::default());
    };
    let context = line.estimate.context;
    let asked = Settings { context: line.settings.context, ..pricer.subject.settings.clone() };
    let mut changes = Vec::new();
    for (arguments, alter) in alterations(line) {
        let mut settings = asked.clone();
        alter(&mut settings);
        // A change that the engine would refuse with the rest is none to advise.
        let Ok(changed) = pricer.price_settings(&settings) else { continue };
        if fits(&changed) {
            changes.push(change(arguments, line, changed));
        }
    }
    if changes.is_empty() {
        changes.extend(together(pricer, line, asked));
    }
    changes.truncate(TOLD);
    let instead = pricer.largest_of(&pricer.subject.settings)?;
    let instead = instead.filter(|largest| largest.estimate.context < context);
    Ok(Advice { changes, context, instead, ..Advice::default() })
}

/// One change on top of the other until it fits.
fn together(pricer: &Pricer<'_>, line: &Line, mut settings: Settings) -> Option<Change> {
    let mut said: Vec<String> = Vec::new();
    for (arguments, alter) in alterations(line) {
        alter(&mut settings);
        // The later of two cache types is what counts.
        said.retain(|before| !(before.starts_with("-ctk") && arguments.starts_with("-ctk")));
        said.push(arguments);
        let changed = pricer.price_settings(&settings).ok()?;
        if fits(&changed) {
            return Some(change(said.join(" "), line, changed));
        }
    }
    None
}

/// What the largest context turns on: what the next step would cost, and what would give more.
///
/// # Errors
/// The model can't be priced.
pub fn beyond(pricer: &Pricer<'_>, largest: &Line) -> Result<Advice, Failure> {
    let mut advice = Advice { context: largest.estimate.context, ..Advice::default() };
    if largest.estimate.context >= pricer.facts.context_train {
        return Ok(advice);
    }
    let slots = if largest.estimate.kv_unified { 1 } else { u64::from(largest.estimate.slots) };
    advice.next = Some(pricer.price(largest.estimate.context + STEP * slots)?);
    for (arguments, alter) in alterations(largest) {
        let mut settings = pricer.subject.settings.clone();
        alter(&mut settings);
        let Ok(Some(line)) = pricer.largest_of(&settings) else { continue };
        if line.estimate.context > largest.estimate.context {
            advice.larger.push(change(arguments, largest, line));
        }
    }
    advice.larger.truncate(TOLD);
    Ok(advice)
}

/// Where not even the smallest context fits: single changes with which one does, with the largest that then fits.
///
/// # Errors
/// The model can't be priced.
pub fn at_all(pricer: &Pricer<'_>, smallest: &Line) -> Result<Vec<Change>, Failure> {
    let mut changes = Vec::new();
    for (arguments, alter) in alterations(smallest) {
        let mut settings = pricer.subject.settings.clone();
        alter(&mut settings);
        let Ok(Some(line)) = pricer.largest_of(&settings) else { continue };
        changes.push(change(arguments, smallest, line));
    }
    Ok(changes)
}

fn change(arguments: String, before: &Line, line: Line) -> Change {
    let of = |line: &Line| Bytes(line.estimate.bytes.total_bytes);
    Change { arguments, saves: of(before) - of(&line), line }
}

/// For people, below the table.
pub fn text(advice: &Advice) -> String {
    let mut out = String::new();
    if let Some(next) = &advice.next
        && let Some((_, short)) = next.judgement.short
    {
        let text = format!("The next step, {} tokens, is {} too much.", next.estimate.context, fine(short));
        out.push_str(&wrap(&text, 0));
    }
    if !advice.larger.is_empty() {
        let one = |change: &Change| format!("'{}' {}", change.arguments, change.line.estimate.context);
        let all: Vec<String> = advice.larger.iter().map(one).collect();
        out.push_str(&wrap(&format!("With {} tokens fit.", all.join(", with ")), 0));
    }
    if !advice.changes.is_empty() {
        let one = |change: &Change| format!("'{}' (saves {})", change.arguments, fine(change.saves));
        let all: Vec<String> = advice.changes.iter().map(one).collect();
        out.push_str(&wrap(&format!("{} tokens fit with {}.", advice.context, all.join(", or with ")), 0));
    }
    if let Some(largest) = &advice.instead {
        out.push_str(&format!("As it is, {} tokens fit.\n", largest.estimate.context));
    }
    out
}

/// MiB where GiB would say nothing.
fn fine(bytes: Bytes) -> String {
    if bytes < Bytes::mib(100) {
        format!("{:.1} MiB", bytes.0 as f64 / f64::from(1 << 20))
    } else {
        bytes.to_string()
    }
}

/// For programs.
pub fn json(advice: &Advice) -> Value {
    let change = |change: &Change| {
        json!({
            "arguments": change.arguments,
            "context": change.line.estimate.context,
            "saves_bytes": change.saves,
            "total_bytes": change.line.estimate.bytes.total_bytes,
            "verdict": word(change.line.judgement.verdict),
        })
    };
    json!({
        "context": advice.context,
        "largest_context": advice.instead.as_ref().map(|line| line.estimate.context),
        "changes": advice.changes.iter().map(change).collect::<Vec<_>>(),
        "larger": advice.larger.iter().map(change).collect::<Vec<_>>(),
        "next": advice.next.as_ref().map(|line| json!({
            "context": line.estimate.context,
            "total_bytes": line.estimate.bytes.total_bytes,
            "short_bytes": line.judgement.short.map_or(Bytes::ZERO, |(_, short)| short),
        })),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::{Cli, Fit, Verb};
    use crate::cli::output::Painter;
    use clap::Parser;

    use super::super::machine::Target;
    use super::super::subject::Subject;

    fn arguments(line: &str) -> Fit {
        let words = ["plimsoll", "fit"].into_iter().chain(line.split_whitespace());
        match Cli::parse_from(words).verb {
            Verb::Fit(fit) => fit,
            other => panic!("{other:?}"),
        }
    }

    fn with<T>(line: &str, ask: impl FnOnce(&Pricer<'_>) -> T) -> T {
        let args = arguments(line);
        let subject = Subject::find(&args).unwrap();
        let target = Target::find(&args, subject.reserve).unwrap();
        ask(&Pricer::new(&subject, &target).unwrap())
    }

    #[test]
    fn what_is_advised_fits_and_what_is_not_does_not() {
        with("qwen3-coder-30b --ram 45GiB --gpu none", |pricer| {
            let line = pricer.price(131_072).unwrap();
            assert!(!fits(&line));
            let advice = find(pricer, std::slice::from_ref(&line)).unwrap();
            let told: Vec<&str> = advice.changes.iter().map(|c| c.arguments.as_str()).collect();
            // 30.2 of weights and 12 of cache beside 43.7: without the 8 of prompts, or with a quarter of the cache.
            assert_eq!(told, ["--cache-ram 0", "-ctk q4_0 -ctv q4_0"]);
            assert!(
                advice
                    .changes
                    .iter()
                    .all(|change| fits(&change.line) && change.line.estimate.context == 131_072)
            );
            let largest = advice.instead.unwrap().estimate.context;
            assert!(fits(&pricer.price(largest).unwrap()) && !fits(&pricer.price(largest + STEP).unwrap()));
        });
    }

    #[test]
    fn several_changes_are_told_where_one_is_not_enough() {
        with("qwen3-coder-30b --ram 40GiB --gpu none", |pricer| {
            let line = pricer.price(131_072).unwrap();
            let advice = find(pricer, &[line]).unwrap();
            let told: Vec<&str> = advice.changes.iter().map(|c| c.arguments.as_str()).collect();
            assert_eq!(told, ["--cache-ram 0 -np 1 -ctk q8_0 -ctv q8_0"]);
        });
    }

    #[test]
    fn the_largest_context_comes_with_the_price_of_the_next() {
        with("qwen3-coder-30b --ram 40GiB --gpu none -- --cache-ram 0", |pricer| {
            let largest = pricer.largest().unwrap();
            let advice = beyond(pricer, &largest).unwrap();
            assert!(!fits(advice.next.as_ref().unwrap()));
            assert!(advice.larger.iter().all(|c| fits(&c.line) && c.line.estimate.context > advice.context));
            let said = text(&advice);
            assert!(said.contains("MiB too much") && said.contains("-ctk q8_0"), "{said}");
        });
        with("qwen3-coder-30b --ram 200GiB --gpu none", |pricer| {
            let advice = beyond(pricer, &pricer.largest().unwrap()).unwrap();
            assert!(advice.next.is_none() && text(&advice).is_empty());
        });
    }

    #[test]
    fn what_the_gate_asks_for_is_told() {
        let told = |line: &str| {
            with(line, |pricer| {
                let line = pricer.price(4096).unwrap();
                super::super::report::text(pricer.subject, pricer.target, &[line], false, Painter::plain())
                    .replace('\n', " ")
            })
        };
        let streams = told("qwen3-coder-480b --ram 128GiB --gpu none");
        assert!(streams.contains("unless a model's configuration has oversize = \"stream\"."), "{streams}");
        let swaps = told("nemo-12b --ram 8GiB --gpu none --swap 64GiB -- --load-mode none");
        assert!(swaps.contains("oversize = \"swap\" and workload = \"batch\""), "{swaps}");
        let fits = told("nemo-12b --ram 64GiB --gpu none");
        assert!(!fits.contains("oversize"), "{fits}");
    }
}

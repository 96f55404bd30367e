//! `plimsoll fit`: what a model takes at each context length, and whether it fits.

mod advice;
mod beside;
mod check;
mod machine;
mod quotes;
mod report;
mod set;
mod settings;
mod subject;

use crate::bytes::Bytes;
use crate::config::Oversize;
use crate::fit::{self, Budget, Devices, Estimate, Facts, FitError, LoadMode, Reading, Settings};
use crate::ledger::{FileId, Footprint};
use crate::policy::Verdict;
use crate::policy::verdict::{Judgement, footprint, judge, unified};

use super::args::Fit;
use super::failure::{Exit, Failure};
use super::output::{self, Painter};
pub(super) use check::second_opinion;
use machine::Target;
pub use quotes::Local;
use subject::Subject;

/// Shown when no context is asked for, as far as the model was trained.
const CONTEXTS: [u64; 5] = [4096, 16384, 32768, 65536, 131_072];
/// Contexts are padded up to this; the smallest and the step of `--max-context`.
const STEP: u64 = 256;

/// One line of the answer.
#[derive(Clone, Debug)]
struct Line {
    /// With everything chosen that was left open, but the context as it was asked for.
    settings: Settings,
    estimate: Estimate,
    judgement: Judgement,
    footprint: Footprint,
    /// Of how many layers the experts stay on the host, in the placement that was priced.
    cpu_moe: u32,
    /// Where it does not fit: what would come of mapping the weights, if it would then stream.
    mapped: Option<Judgement>,
    /// Where it streams: what a token reads.
    reading: Option<Reading>,
}

pub(super) fn fit(args: &Fit) -> Result<(), Failure> {
    if !args.set.is_empty() {
        return set::fit(args);
    }
    let subject = Subject::find(args)?;
    let target = Target::find(args, subject.reserve)?;
    let pricer = Pricer::new(&subject, &target)?;
    let lines = if args.max_context {
        vec![pricer.largest()?]
    } else {
        let contexts = contexts(&args.contexts, &subject, pricer.facts.context_train);
        contexts.into_iter().map(|context| pricer.price(context)).collect::<Result<_, _>>()?
    };
    let advice = match lines.first() {
        Some(largest) if args.max_context => advice::beyond(&pricer, largest)?,
        _ => advice::find(&pricer, &lines)?,
    };
    let checked = args.check.then(|| check::check(&subject, &pricer, &lines));
    if args.json {
        let mut answer = report::json(&subject, &target, &lines);
        answer["advice"] = advice::json(&advice);
        if let Some(checked) = &checked {
            answer["check"] = check::json(checked);
        }
        return output::print_json(&answer);
    }
    let painter = Painter::stdout();
    let mut text = report::text(&subject, &target, &lines, args.max_context, painter);
    text.push_str(&advice::text(&advice));
    if let Some(checked) = &checked {
        text.push('\n');
        text.push_str(&check::text(checked, painter));
    }
    output::print(&text)
}

/// The contexts to show, in ascending order: those asked for; else that of the arguments; else
/// the usual ones and the configured one.
fn contexts(asked: &[u64], subject: &Subject, trained: u64) -> Vec<u64> {
    let mut contexts = match (asked, subject.settings.context) {
        ([], 0) => usual(trained),
        ([], context) if subject.configured => [&usual(trained)[..], &[context]].concat(),
        ([], context) => vec![context],
        (asked, _) => asked.to_vec(),
    };
    contexts.sort_unstable();
    contexts.dedup();
    contexts
}

fn usual(trained: u64) -> Vec<u64> {
    let usual: Vec<u64> =
        CONTEXTS.into_iter().filter(|context| trained == 0 || *context <= trained).collect();
    if usual.is_empty() { vec![trained] } else { usual }
}

/// Prices contexts of one model for one machine.
struct Pricer<'a> {
    subject: &'a Subject,
    target: &'a Target,
    facts: Facts,
    devices: Devices,
    budget: Budget,
    files: Vec<FileId>,
}

impl<'a> Pricer<'a> {
    fn new(subject: &'a Subject, target: &'a Target) -> Result<Self, Failure> {
        let mut facts = Facts::from_model(&subject.model).map_err(|error| subject.failure(&error))?;
        let (beside, more) = subject.beside.open()?;
        facts.beside = beside;
        let files = subject.model.shards().iter().map(|shard| &shard.identity);
        let files = files.map(|file| FileId { device: file.device, inode: file.inode });
        let room = &target.room.emptied;
        Ok(Self {
            facts,
            devices: target.devices(&subject.settings),
            budget: Budget {
                host: room.memory.0,
                gpu: room.gpus.iter().copied().sum::<Bytes>().0,
                unified: unified(&target.machine),
                mapped_resident: subject.oversize != Oversize::Stream,
            },
            files: files.chain(more).collect(),
            subject,
            target,
        })
    }

    fn price(&self, context: u64) -> Result<Line, Failure> {
        let mut settings = self.subject.settings.clone();
        settings.context = context;
        let mut line = self.price_settings(&settings)?;
        let refused = line.judgement.verdict == Verdict::Refused;
        if refused && settings.load_mode == LoadMode::Auto && line.estimate.anonymous_weights_bytes > 0 {
            settings.load_mode = LoadMode::Mmap;
            let mapped = self.price_settings(&settings)?.judgement;
            line.mapped = (mapped.verdict == Verdict::Streams).then_some(mapped);
        }
        Ok(line)
    }

    fn price_settings(&self, settings: &Settings) -> Result<Line, Failure> {
        let failure = |error: FitError| self.subject.failure(&error);
        let placement = fit::place(&self.facts, settings, &self.devices, &self.budget).map_err(failure)?;
        let mut estimate = placement.estimate;
        estimate.exact &= self.subject.has_exact_weights();
        let used = self.devices.touched(&self.facts.beside, &placement.settings);
        let gpus: Vec<usize> = used
            .iter()
            .filter_map(|device| self.devices.list.iter().position(|d| d.name == device.name))
            .collect();
        let footprint = footprint(&estimate, &self.files, &gpus);
        let judgement = judge(
            &footprint,
            Bytes(estimate.mapped_always_bytes),
            estimate.known,
            &self.target.machine,
            &self.target.room,
        );
        let streams = judgement.verdict == Verdict::Streams;
        let resident = footprint.mapped_bytes().mul_div(judgement.resident_per_mille, 1000);
        let reading = streams.then(|| fit::reading(&self.facts, &estimate, resident.0)).flatten();
        Ok(Line {
            settings: placement.settings,
            estimate,
            judgement,
            footprint,
            cpu_moe: placement.cpu_moe,
            mapped: None,
            reading,
        })
    }

    /// The largest context, in steps of 256 tokens and at most what the model was trained on, that
    /// fits without swap and without streaming.
    fn largest(&self) -> Result<Line, Failure> {
        if let Some(line) = self.largest_of(&self.subject.settings)? {
            return Ok(line);
        }
        let smallest = self.price(STEP)?;
        let why = report::why(&smallest);
        let failure =
            Failure::new(Exit::Refused, format!("{} does not fit at any context: {why}", self.subject.name));
        let changes = advice::at_all(self, &smallest)?;
        let ways: Vec<String> = changes
            .iter()
            .map(|change| format!("'-- {}' {} tokens fit", change.arguments, change.line.estimate.context))
            .collect();
        let could_stream = smallest.judgement.verdict == Verdict::Streams || smallest.mapped.is_some();
        Err(if ways.is_empty() && could_stream {
            failure.hint("it would stream from disk, see 'plimsoll fit' without --max-context: plimsolld lets it with oversize = \"stream\" in its configuration")
        } else if ways.is_empty() {
            failure.hint("a smaller quantisation takes less; without --max-context all numbers are shown")
        } else {
            failure.hint(format!("with {}", ways.join(", with ")))
        })
    }

    /// The same with other settings; none where not even the smallest context fits.
    fn largest_of(&self, settings: &Settings) -> Result<Option<Line>, Failure> {
        let price = |context| self.price_settings(&Settings { context, ..settings.clone() });
        let top = (self.facts.context_train / STEP).max(1);
        let whole = price(top * STEP)?;
        if fits(&whole) {
            return Ok(Some(whole));
        }
        let mut best = price(STEP)?;
        if !fits(&best) {
            return Ok(None);
        }
        let (mut low, mut high) = (1, top);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            let line = price(middle * STEP)?;
            if fits(&line) {
                (low, best) = (middle, line);
            } else {
                high = middle;
            }
        }
        Ok(Some(best))
    }
}

/// Whether it fits without swap and without streaming.
fn fits(line: &Line) -> bool {
    matches!(line.judgement.verdict, Verdict::Fits | Verdict::FitsAfter)
}

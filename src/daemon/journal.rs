//! The journal: decisions as structured entries, everything else as lines.
//!
//! A decision has one of the message ids below, whose explanation is in `systemd/plimsoll.catalog`, and fields, so
//! that `journalctl PLIMSOLL_MODEL=NAME` or `MESSAGE_ID=…` finds it whatever its words are: `PLIMSOLL_MODEL`,
//! `PLIMSOLL_DECISION`, `PLIMSOLL_VERDICT`, `PLIMSOLL_FOR`, `PLIMSOLL_BYTES`, `PLIMSOLL_CONTEXT` and
//! `PLIMSOLL_STEPS` always (though some may be empty); `PLIMSOLL_POOL`, `PLIMSOLL_POOL_BYTES`,
//! `PLIMSOLL_NEEDED_BYTES`, `PLIMSOLL_AVAILABLE_BYTES`, `PLIMSOLL_SHORT_BYTES`, `PLIMSOLL_EVICTABLE_BYTES`,
//! `PLIMSOLL_ADVICE`, `PLIMSOLL_RESCUE`, `PLIMSOLL_LEVEL`, `PLIMSOLL_FALLING_BYTES`, `PLIMSOLL_EXPECTED_BYTES`,
//! `PLIMSOLL_GAINED_BYTES` where they are known; and `PLIMSOLL_JSON`, which is all of it, as `Explain` has it.

use std::cmp::Reverse;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use serde::Serialize;
use tracing::field::{Field, Visit};
use tracing::{Event, Metadata, Subscriber, Value};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::debug_fn;
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::prelude::*;

use crate::config::Instance;
use crate::policy::Decision;
use crate::policy::decision::{Account, Kind};

/// The message id of each kind of decision; these never change.
#[must_use]
pub const fn message_id(kind: Kind) -> &'static str {
    match kind {
        Kind::Admit => "292eb7d1480142cfa28324a9294b87a5",
        Kind::Refuse => "c83de01840b14124bdc32aef360d4144",
        Kind::Wait => "4286a413c8224160b2ede3a48208d564",
        Kind::Evict => "aa774c5a08e14788ab1f9e9192dfd9ce",
        Kind::Expire => "2936332cf21246d3b8fa7ad063540a92",
        Kind::Restore => "8a7d792f394048b7a847c9c76f4dad77",
        Kind::Quarantine => "daf8970e95474deea3cbf623121f7ac9",
        Kind::Relieve => "7c1f0e6a3b9d4c52a8e4d1b7f06c93ea",
    }
}

/// The word that a value has in JSON.
fn word(value: impl Serialize) -> String {
    let value = serde_json::to_value(value).unwrap_or_default();
    value.as_str().unwrap_or_default().to_owned()
}

/// What is logged.
const LEVEL: LevelFilter = LevelFilter::INFO;
/// Lines that wait for the journal at most.
const WAITING: usize = 1024;
/// For how long the last of them are waited for.
const LAST: Duration = Duration::from_secs(2);
/// Fields that a line has at most.
const FIELDS: usize = 32;
/// The stack of the thread that writes.
const STACK: usize = 256 * 1024;

/// What was started; see [`start`].
#[derive(Debug)]
#[must_use]
pub struct Journal {
    left: Option<Arc<AtomicUsize>>,
}

impl Journal {
    /// Waits for the last lines to be written, but not for ever.
    pub fn end(self) {
        let deadline = Instant::now() + LAST;
        let left = || self.left.as_ref().is_some_and(|left| left.load(Ordering::Acquire) > 0);
        while left() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A line on its way to the journal.
#[derive(Debug)]
struct Line {
    metadata: &'static Metadata<'static>,
    fields: Fields,
    /// How many before it did not fit.
    lost: u64,
}

impl Line {
    /// Says it again, to whom this thread says it.
    fn say(&self) {
        let Some((first, _)) = self.fields.0.first() else { return };
        let mut values: [(&Field, Option<&dyn Value>); FIELDS] = [(first, None); FIELDS];
        for (place, (field, value)) in values.iter_mut().zip(&self.fields.0) {
            *place = (field, Some(value));
        }
        Event::dispatch(self.metadata, &self.metadata.fields().value_set(&values));
    }
}

/// Fields and their values, as the journal has them: everything is text there.
#[derive(Debug, Default, PartialEq, Eq)]
struct Fields(Vec<(Field, String)>);

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.push((field.clone(), value.to_owned()));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.push((field.clone(), format!("{value:?}")));
    }
}

/// Hands lines to the thread that writes them: the journal's socket blocks while nobody reads it, and the loop is not
/// to stand still for that.
struct Queue {
    lines: SyncSender<Line>,
    /// How many are not written yet.
    left: Arc<AtomicUsize>,
    /// How many did not fit since the last one that did.
    lost: AtomicU64,
}

impl Queue {
    /// Starts the thread.
    fn start(journal: tracing_journald::Layer) -> io::Result<Self> {
        let (lines, taken) = sync_channel(WAITING);
        let left = Arc::new(AtomicUsize::new(0));
        let of_thread = Arc::clone(&left);
        std::thread::Builder::new().name("journal".to_owned()).stack_size(STACK).spawn(move || {
            let journal = tracing_subscriber::registry().with(LEVEL).with(journal);
            tracing::subscriber::with_default(journal, || write(&taken, &of_thread));
        })?;
        Ok(Self { lines, left, lost: AtomicU64::new(0) })
    }
}

impl<S: Subscriber> Layer<S> for Queue {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let lost = self.lost.swap(0, Ordering::Relaxed);
        self.left.fetch_add(1, Ordering::AcqRel);
        if self.lines.try_send(Line { metadata: event.metadata(), fields, lost }).is_err() {
            self.left.fetch_sub(1, Ordering::AcqRel);
            self.lost.fetch_add(lost + 1, Ordering::Relaxed);
        }
    }
}

/// Writes lines until there can be no more.
fn write(lines: &Receiver<Line>, left: &AtomicUsize) {
    for line in lines {
        if line.lost > 0 {
            tracing::warn!("lines missing here, for the journal did not take them: {}", line.lost);
        }
        line.say();
        left.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Logs to the journal, or to standard error where there is none.
pub fn start() -> Journal {
    let journal =
        if std::env::var_os("JOURNAL_STREAM").is_some() { tracing_journald::layer().ok() } else { None };
    let queue = journal.and_then(|journal| {
        let journal = journal.with_field_prefix(None).with_syslog_identifier("plimsolld".to_owned());
        Queue::start(journal).ok()
    });
    let left = queue.as_ref().map(|queue| Arc::clone(&queue.left));
    let registry = tracing_subscriber::registry();
    // A subscriber that is there already is a test's.
    let _ = match queue {
        Some(queue) => registry.with(queue.with_filter(LEVEL)).try_init(),
        None => {
            let lines = tracing_subscriber::fmt::layer()
                .with_writer(std::io::stderr)
                .without_time()
                .with_target(false)
                .with_ansi(false)
                .fmt_fields(debug_fn(|writer, field, value| match field.name() {
                    "message" => write!(writer, "{value:?}"),
                    _ => Ok(()),
                }));
            registry.with(lines.with_filter(LEVEL)).try_init()
        }
    };
    Journal { left }
}

/// The numbers that only some decisions have.
#[derive(Debug, Default)]
struct Numbers {
    pool: Option<String>,
    pool_size: Option<u64>,
    needed: Option<u64>,
    available: Option<u64>,
    short: Option<u64>,
    evictable: Option<u64>,
    advice: Option<String>,
    rescue: Option<String>,
    level: Option<String>,
    falling: Option<u64>,
    expected: Option<u64>,
    gained: Option<u64>,
}

/// Those of the pool that binds: where most is missing, or where the least would be left.
fn numbers(decision: &Decision) -> Numbers {
    let mut numbers = Numbers::default();
    let binds =
        |account: &&Account| (account.short_bytes, Reverse(account.free_bytes - account.needed_bytes));
    if let Some(account) = decision.pools.iter().filter(|a| !a.needed_bytes.is_zero()).max_by_key(binds) {
        numbers.pool = Some(account.name.clone());
        numbers.pool_size = Some(account.total_bytes.0);
        numbers.needed = Some(account.needed_bytes.0);
        numbers.available = Some(account.free_bytes.0);
        numbers.short = Some(account.short_bytes.0);
    }
    if let Some(refusal) = &decision.refusal {
        numbers.needed = Some(refusal.needed_bytes.0);
        numbers.available = Some(refusal.free_bytes.0);
        // Of a refusal, what is missing even after all that may be stopped.
        numbers.short = Some(refusal.short_bytes.0);
        numbers.evictable = Some(refusal.evictable_bytes.0);
        numbers.advice = Some(refusal.advice.clone());
    }
    if let Some(relief) = &decision.relief {
        numbers.needed = Some(relief.needed_bytes.0);
        numbers.available = Some(relief.headroom_bytes.0);
        numbers.rescue = Some(word(relief.rescue));
        numbers.level = Some(word(relief.level));
        numbers.falling = Some(relief.falling_bytes.0);
        numbers.expected = Some(relief.expected_bytes.0);
        numbers.gained = relief.gained_bytes.map(|bytes| bytes.0);
    }
    numbers
}

/// Logs a decision.
pub fn record(decision: &Decision) {
    let kind = decision.kind;
    let name = |instance: &Option<Instance>| instance.as_ref().map(ToString::to_string).unwrap_or_default();
    let (model, other) = (name(&decision.instance), name(&decision.for_instance));
    let steps: Vec<String> = decision.steps.iter().map(ToString::to_string).collect();
    let json = serde_json::to_string(decision).unwrap_or_default();
    let n = numbers(decision);
    macro_rules! entry {
        ($level:ident) => {
            tracing::$level!(
                MESSAGE_ID = message_id(kind),
                PLIMSOLL_MODEL = model,
                PLIMSOLL_DECISION = word(kind),
                PLIMSOLL_VERDICT = word(decision.verdict),
                PLIMSOLL_FOR = other,
                PLIMSOLL_BYTES = decision.bytes.0,
                PLIMSOLL_CONTEXT = decision.context,
                PLIMSOLL_STEPS = steps.join("; "),
                PLIMSOLL_POOL = n.pool,
                PLIMSOLL_POOL_BYTES = n.pool_size,
                PLIMSOLL_NEEDED_BYTES = n.needed,
                PLIMSOLL_AVAILABLE_BYTES = n.available,
                PLIMSOLL_SHORT_BYTES = n.short,
                PLIMSOLL_EVICTABLE_BYTES = n.evictable,
                PLIMSOLL_ADVICE = n.advice,
                PLIMSOLL_RESCUE = n.rescue,
                PLIMSOLL_LEVEL = n.level,
                PLIMSOLL_FALLING_BYTES = n.falling,
                PLIMSOLL_EXPECTED_BYTES = n.expected,
                PLIMSOLL_GAINED_BYTES = n.gained,
                PLIMSOLL_JSON = json,
                "{}",
                decision.text
            )
        };
    }
    match kind {
        Kind::Quarantine | Kind::Relieve => entry!(warn),
        _ => entry!(info),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::bytes::Bytes;

    #[test]
    fn message_ids_are_128_bits_and_differ() {
        let ids: BTreeSet<&str> = Kind::ALL.into_iter().map(message_id).collect();
        assert_eq!(ids.len(), Kind::ALL.len());
        assert!(ids.iter().all(|id| id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit())));
    }

    /// The catalogue: what happened, why and what to do, for each kind and for nothing else; with fields that every
    /// decision has, for journalctl shows the name of one that an entry lacks.
    #[test]
    fn every_kind_is_explained_in_the_catalogue() {
        let text = include_str!("../../systemd/plimsoll.catalog");
        let mut entries: BTreeMap<&str, String> = BTreeMap::new();
        let mut id = None;
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            match line.strip_prefix("-- ") {
                Some(next) => {
                    id = Some(next);
                    assert!(entries.insert(next, String::new()).is_none(), "{next} twice");
                }
                None => {
                    let entry = id.and_then(|id| entries.get_mut(id));
                    entry.into_iter().for_each(|entry| entry.extend([line, "\n"]));
                }
            }
        }
        let known: BTreeSet<&str> = Kind::ALL.into_iter().map(message_id).collect();
        assert_eq!(entries.keys().copied().collect::<BTreeSet<_>>(), known);
        let always = ["MESSAGE", "PLIMSOLL_MODEL", "PLIMSOLL_FOR", "PLIMSOLL_VERDICT", "PLIMSOLL_STEPS"];
        for (id, entry) in entries {
            let (head, body) = entry.split_once("\n\n").unwrap_or_else(|| panic!("{id} has no text"));
            for key in ["Subject: ", "Defined-By: Plimsoll", "Support: ", "Documentation: "] {
                assert!(head.lines().any(|line| line.starts_with(key)), "{id}: {key}");
            }
            assert!(body.contains("What to do: "), "{id}: {body}");
            for field in entry.split('@').skip(1).step_by(2) {
                assert!(always.contains(&field), "{id}: {field}");
            }
        }
    }

    #[test]
    fn lines_are_said_again_as_they_were_and_what_does_not_fit_is_counted() {
        let (lines, taken) = sync_channel(1);
        let queue = Queue { lines, left: Arc::default(), lost: AtomicU64::new(0) };
        let left = Arc::clone(&queue.left);
        let said = |line: &Line| -> Vec<(&'static str, String)> {
            line.fields.0.iter().map(|(field, value)| (field.name(), value.clone())).collect()
        };
        tracing::subscriber::with_default(tracing_subscriber::registry().with(queue), || {
            let nothing: Option<u64> = None;
            tracing::warn!(PLIMSOLL_MODEL = "a b", PLIMSOLL_BYTES = 7_u64, PLIMSOLL_POOL = nothing, "{}!", 2);
            tracing::info!("there is no room for this");
            tracing::info!("nor for this");
            let first = taken.recv().unwrap();
            let expected = [("message", "2!"), ("PLIMSOLL_MODEL", "a b"), ("PLIMSOLL_BYTES", "7")];
            assert_eq!(said(&first), expected.map(|(name, value)| (name, value.to_owned())));
            // What is lost is told with the next one that fits.
            first.say();
            let again = taken.recv().unwrap();
            assert_eq!((&again.fields, again.metadata), (&first.fields, first.metadata));
            assert_eq!((first.lost, again.lost), (0, 2));
            tracing::info!("last");
            assert_eq!((taken.recv().unwrap().lost, left.load(Ordering::Acquire)), (0, 3));
        });
    }

    #[test]
    fn the_pool_that_binds_gives_the_numbers() {
        let account = |name: &str, needed: u64, free: u64| Account {
            name: name.into(),
            total_bytes: Bytes::gib(128),
            room_bytes: Bytes::gib(120),
            held_bytes: Bytes::gib(120) - Bytes::gib(free),
            needed_bytes: Bytes::gib(needed),
            free_bytes: Bytes::gib(free),
            short_bytes: Bytes::gib(needed) - Bytes::gib(free),
        };
        let decision = |pools| Decision {
            kind: Kind::Admit,
            instance: "a".parse().ok(),
            for_instance: None,
            verdict: crate::policy::Verdict::FitsAfter,
            at_msec: 0,
            context: 0,
            bytes: Bytes::ZERO,
            basis: Default::default(),
            steps: Vec::new(),
            refusal: None,
            relief: None,
            pools,
            observed: false,
            text: String::new(),
        };
        let of = |pools| {
            let n = numbers(&decision(pools));
            (n.pool.unwrap_or_default(), n.short.unwrap_or_default())
        };
        let gib = |n| Bytes::gib(n).0;
        assert_eq!(of(vec![account("memory", 30, 20), account("card0", 30, 8)]), ("card0".into(), gib(22)));
        assert_eq!(of(vec![account("memory", 3, 20), account("card0", 0, 0)]), ("memory".into(), 0));
        assert_eq!(of(vec![account("memory", 3, 20), account("card0", 1, 2)]), ("card0".into(), 0));
        assert_eq!(of(Vec::new()), (String::new(), 0));
    }
}

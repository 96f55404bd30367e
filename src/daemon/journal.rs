//! The journal: decisions as structured entries, everything else as lines.
//!
//! A decision has the fields `PLIMSOLL_MODEL`, `PLIMSOLL_DECISION`, `PLIMSOLL_FOR`,
//! `PLIMSOLL_BYTES` and `PLIMSOLL_CONTEXT`, and one of the message ids below, so that
//! `journalctl PLIMSOLL_MODEL=NAME` or `MESSAGE_ID=…` finds it whatever its words are.

use tracing_subscriber::fmt::format::debug_fn;
use tracing_subscriber::prelude::*;

use crate::config::Instance;
use crate::policy::Decision;
use crate::policy::decision::Kind;

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

/// The word of each kind of decision.
const fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::Admit => "admit",
        Kind::Refuse => "refuse",
        Kind::Wait => "wait",
        Kind::Evict => "evict",
        Kind::Expire => "expire",
        Kind::Restore => "restore",
        Kind::Quarantine => "quarantine",
        Kind::Relieve => "relieve",
    }
}

/// Logs to the journal, or to standard error where there is none.
pub fn start() {
    let journal =
        if std::env::var_os("JOURNAL_STREAM").is_some() { tracing_journald::layer().ok() } else { None };
    let level = tracing_subscriber::filter::LevelFilter::INFO;
    let registry = tracing_subscriber::registry();
    // A subscriber that is there already is a test's.
    let _ = match journal {
        Some(journal) => {
            let journal = journal.with_field_prefix(None).with_syslog_identifier("plimsolld".to_owned());
            registry.with(journal.with_filter(level)).try_init()
        }
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
            registry.with(lines.with_filter(level)).try_init()
        }
    };
}

/// Logs a decision.
pub fn record(decision: &Decision) {
    let kind = decision.kind;
    let name = |instance: &Option<Instance>| instance.as_ref().map(ToString::to_string).unwrap_or_default();
    let (model, other) = (name(&decision.instance), name(&decision.for_instance));
    macro_rules! entry {
        ($level:ident) => {
            tracing::$level!(
                MESSAGE_ID = message_id(kind),
                PLIMSOLL_MODEL = model,
                PLIMSOLL_DECISION = word(kind),
                PLIMSOLL_FOR = other,
                PLIMSOLL_BYTES = decision.bytes.0,
                PLIMSOLL_CONTEXT = decision.context,
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
    use super::*;

    #[test]
    fn message_ids_are_128_bits_and_differ() {
        let kinds = [
            Kind::Admit,
            Kind::Refuse,
            Kind::Wait,
            Kind::Evict,
            Kind::Expire,
            Kind::Restore,
            Kind::Quarantine,
            Kind::Relieve,
        ];
        let ids: std::collections::BTreeSet<&str> = kinds.into_iter().map(message_id).collect();
        assert_eq!(ids.len(), kinds.len());
        assert!(ids.iter().all(|id| id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit())));
    }
}

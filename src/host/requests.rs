//! Requests in flight, as a llama-server says them itself.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::http::{ApiKey, HttpError, Page, Server};

/// A slot is told of in a few KiB, and there are at most 256.
const LONGEST: usize = 1 << 20;

/// What an engine was heard to say of its requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// So many are in flight.
    Requests {
        /// Being worked on, and queued where it says so.
        in_flight: u32,
        /// Another one when a request was taken since.
        mark: u64,
    },
    /// It accepts connections and has no time to answer.
    Late,
    /// It does not say.
    Silent,
}

/// A slot of `GET /slots`.
#[derive(Deserialize)]
struct Slot {
    is_processing: bool,
    /// Of its last request; absent before the first one.
    #[serde(default)]
    id_task: i64,
}

/// Asks a llama-server of one of `users`: `/slots`, or where that is off `/metrics`. One that is of nobody among them is
/// not asked, and silent. Returns within `limit`, but for a moment.
#[must_use]
pub fn requests_in_flight(
    server: &Server,
    users: &BTreeSet<u32>,
    key: Option<&ApiKey>,
    limit: Duration,
) -> Heard {
    let deadline = Instant::now() + limit;
    for (path, read) in [("/slots", slots as fn(&[u8]) -> Option<Heard>), ("/metrics", metrics)] {
        let left = deadline.saturating_duration_since(Instant::now());
        match server.get(path, users, key, LONGEST, left) {
            Ok(Page { status: 200, body: Some(body) }) => {
                if let Some(heard) = read(&body) {
                    return heard;
                }
            }
            Ok(_) => {}
            Err(HttpError::Late) => return Heard::Late,
            Err(_) => return Heard::Silent,
        }
    }
    Heard::Silent
}

fn slots(body: &[u8]) -> Option<Heard> {
    let slots: Vec<Slot> = serde_json::from_slice(body).ok()?;
    if slots.is_empty() {
        return None;
    }
    let working = slots.iter().filter(|slot| slot.is_processing).count();
    let last = slots.iter().map(|slot| slot.id_task).max().unwrap_or_default();
    Some(Heard::Requests {
        in_flight: u32::try_from(working).unwrap_or(u32::MAX),
        mark: u64::try_from(last).unwrap_or_default(),
    })
}

/// Of Prometheus' text format, the lines that are looked for.
fn metrics(body: &[u8]) -> Option<Heard> {
    let text = std::str::from_utf8(body).ok()?;
    let value = |name: &str| {
        let of = |line: &str| line.strip_prefix("llamacpp:")?.strip_prefix(name)?.trim().parse::<u64>().ok();
        text.lines().find_map(of)
    };
    let waiting = value("requests_deferred ").unwrap_or_default();
    let in_flight = value("requests_processing ")?.saturating_add(waiting);
    let tokens = ["prompt_tokens_total ", "tokens_predicted_total "].into_iter().filter_map(value);
    Some(Heard::Requests {
        in_flight: u32::try_from(in_flight).unwrap_or(u32::MAX),
        mark: tokens.fold(0, u64::saturating_add),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(in_flight: u32, mark: u64) -> Option<Heard> {
        Some(Heard::Requests { in_flight, mark })
    }

    #[test]
    fn slots_are_counted() {
        let text = r#"[{"id":0,"n_ctx":1024,"is_processing":true,"id_task":7,"params":{"seed":1}},
                       {"id":1,"is_processing":false},{"id":2,"is_processing":true,"id_task":9}]"#;
        assert_eq!(slots(text.as_bytes()), heard(2, 9));
        assert_eq!(slots(br#"[{"is_processing":false}]"#), heard(0, 0));
        for hostile in [
            &b""[..],
            b"[]",
            b"{}",
            b"null",
            br#"{"error":{"code":501}}"#,
            br#"[{"is_processing":"yes"}]"#,
            br#"[{"is_processing":true}"#,
            b"\xff\xfe",
            &[b'['; 100_000],
        ] {
            assert_eq!(slots(hostile), None);
        }
        assert_eq!(slots(br#"[{"is_processing":true,"id_task":-1}]"#), heard(1, 0));
    }

    #[test]
    fn metrics_are_counted() {
        let text = "# HELP llamacpp:requests_processing Number of requests processing.\n\
                    # TYPE llamacpp:requests_processing gauge\nllamacpp:requests_processing 2\n\
                    llamacpp:requests_deferred 1\nllamacpp:prompt_tokens_total 30\nllamacpp:tokens_predicted_total 12\n";
        assert_eq!(metrics(text.as_bytes()), heard(3, 42));
        assert_eq!(metrics(b"vllm:num_requests_running 1\n"), None);
        assert_eq!(metrics(b"llamacpp:requests_processing 99999999999\n"), heard(u32::MAX, 0));
        for hostile in ["NaN", "1e99", "-1", "many", ""] {
            assert_eq!(metrics(format!("llamacpp:requests_processing {hostile}\n").as_bytes()), None);
        }
    }
}

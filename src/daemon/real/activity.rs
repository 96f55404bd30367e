//! What the engines say of their requests, asked at the addresses that they are configured with.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::effects::boot_msec;
use crate::config::Instance;
use crate::host::{ApiKey, Heard, Server, requests_in_flight};
use crate::ledger::Busy;

/// How long an engine may take to answer. An idle one takes milliseconds, one that works answers between two batches.
const LIMIT: Duration = Duration::from_secs(2);
/// How many are asked at a time.
const AT_A_TIME: usize = 16;

/// Where an engine answers, and the file with its keys.
pub type Place = (Server, Option<PathBuf>);

type Places = dyn Fn(&Instance) -> Option<Place> + Send + Sync;

/// What was heard last, of each start of a unit.
pub struct Activities {
    heard: Mutex<BTreeMap<Instance, (String, Option<Busy>)>>,
    place: Box<Places>,
}

impl Activities {
    /// Nothing heard yet; `place` says where an instance answers.
    #[must_use]
    pub fn new(place: impl Fn(&Instance) -> Option<Place> + Send + Sync + 'static) -> Self {
        Self { heard: Mutex::default(), place: Box::new(place) }
    }

    /// What an instance said last in the start that has this InvocationID.
    #[must_use]
    pub fn busy(&self, instance: &Instance, invocation: &str) -> Option<Busy> {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.get(instance).filter(|(of, _)| of == invocation).and_then(|(_, busy)| *busy)
    }

    /// Asks these instances, each with its InvocationID. Blocks, for each [`AT_A_TIME`] of them
    /// as long as one may take, and a moment.
    pub fn ask(&self, instances: &[(Instance, String)]) {
        for some in instances.chunks(AT_A_TIME) {
            std::thread::scope(|scope| {
                for (instance, invocation) in some {
                    // Without a thread nothing is known of it, as of one that does not answer.
                    let _ = std::thread::Builder::new()
                        .stack_size(256 * 1024)
                        .spawn_scoped(scope, || self.ask_one(instance, invocation));
                }
            });
        }
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        // A name that is gone from the configuration keeps nothing behind.
        heard.retain(|instance, _| (self.place)(instance).is_some());
    }

    fn ask_one(&self, instance: &Instance, invocation: &str) {
        let before = self.busy(instance, invocation);
        let heard = (self.place)(instance).map_or(Heard::Silent, |(server, keys)| {
            let key = keys.as_deref().and_then(ApiKey::first_of);
            requests_in_flight(&server, key.as_ref(), LIMIT)
        });
        let at = boot_msec();
        let busy = match (heard, before) {
            (Heard::Requests { in_flight, mark }, _) => Some(Busy { requests: in_flight, mark, at }),
            // It has answered before, so it is at work on something that takes longer.
            (Heard::Late, Some(before)) => Some(Busy { requests: before.requests.max(1), at, ..before }),
            (Heard::Late, None) | (Heard::Silent, _) => None,
        };
        let mut all = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(instance.clone(), (invocation.to_owned(), busy));
    }
}

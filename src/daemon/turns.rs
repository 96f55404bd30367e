//! How long the loop takes for a turn, how long it stands still in one, and how late it is.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use tokio::time::Instant;

use super::report;

/// The measurement.
#[derive(Debug, Default)]
pub(super) struct Turns {
    begun: Option<(Instant, Duration)>,
    count: u64,
    longest: Duration,
    blocked: Duration,
    latest: Duration,
}

impl Turns {
    /// A turn begins; `due`: it had itself woken then.
    pub fn begin(&mut self, due: Option<Instant>) {
        let now = Instant::now();
        self.begun = Some((now, computed()));
        self.latest = self.latest.max(due.map_or(Duration::ZERO, |due| now.saturating_duration_since(due)));
    }

    /// It has ended.
    pub fn end(&mut self) {
        if let Some((begun, before)) = self.begun.take() {
            let took = begun.elapsed();
            self.count += 1;
            self.longest = self.longest.max(took);
            self.blocked = self.blocked.max(took.saturating_sub(computed().saturating_sub(before)));
        }
    }

    /// So far.
    pub fn report(&self) -> report::Turns {
        let usec = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        report::Turns {
            count: self.count,
            longest_usec: usec(self.longest),
            blocked_usec: usec(self.blocked),
            latest_usec: usec(self.latest),
        }
    }
}

/// The processor's time that this thread has used.
pub(super) fn computed() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

//! How long the loop takes for a turn, and how late it is.

use std::time::Duration;

use tokio::time::Instant;

use super::report;

/// The measurement.
#[derive(Debug, Default)]
pub(super) struct Turns {
    begun: Option<Instant>,
    count: u64,
    longest: Duration,
    latest: Duration,
}

impl Turns {
    /// A turn begins; `due`: it had itself woken then.
    pub fn begin(&mut self, due: Option<Instant>) {
        let now = Instant::now();
        self.begun = Some(now);
        self.latest = self.latest.max(due.map_or(Duration::ZERO, |due| now.saturating_duration_since(due)));
    }

    /// It has ended.
    pub fn end(&mut self) {
        if let Some(begun) = self.begun.take() {
            self.count += 1;
            self.longest = self.longest.max(begun.elapsed());
        }
    }

    /// So far.
    pub fn report(&self) -> report::Turns {
        let usec = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        report::Turns { count: self.count, longest_usec: usec(self.longest), latest_usec: usec(self.latest) }
    }
}

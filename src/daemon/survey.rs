//! Looks at disks beside the loop.

use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a survey is waited for.
const SURVEY: Duration = Duration::from_secs(2);

/// Looks at what readings of the machine take from disks, which may not answer: the page cache and the swapfiles.
/// There is one look at a time, so that a disk that hangs holds one thread.
pub struct Survey {
    look: Arc<dyn Fn() + Send + Sync>,
    /// When the last look that has ended began; locked while one is under way.
    begun: Arc<tokio::sync::Mutex<Option<Instant>>>,
}

impl Survey {
    /// `look` takes what it sees to where readings find it. It may block.
    #[must_use]
    pub fn new(look: impl Fn() + Send + Sync + 'static) -> Self {
        Self { look: Arc::new(look), begun: Arc::default() }
    }

    /// Looks again. Where the disks take too long, what was seen before has to do.
    pub async fn look(&self) {
        let _ = tokio::time::timeout(SURVEY, self.look_to_the_end()).await;
    }

    /// Looks again, however long it takes.
    pub async fn look_to_the_end(&self) {
        let asked = Instant::now();
        let mut begun = Arc::clone(&self.begun).lock_owned().await;
        // Somebody else who waited has had it done. A look that was under way already does not count.
        if begun.is_some_and(|begun| begun >= asked) {
            return;
        }
        let look = Arc::clone(&self.look);
        // It keeps the lock until it ends, whether or not anybody still waits for it.
        let done = tokio::task::spawn_blocking(move || {
            let now = Instant::now();
            look();
            *begun = Some(now);
        });
        let _ = done.await;
    }
}

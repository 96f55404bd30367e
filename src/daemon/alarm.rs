//! What wakes the loop at a time.
//!
//! A timer of the kernel's, for it wakes once. The runtime's own are in a wheel whose slots get larger with the time that is left
//! (1 ms, 64 ms, 4 s), and one that is seconds away wakes it up to three times.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until};

use crate::os::watched;

/// The shortest time: none at all would switch the timer off (timerfd_settime(2)).
const SHORTEST: Duration = Duration::from_nanos(1);

/// A timer, and its descriptor once more for the runtime to wait for.
#[derive(Debug)]
pub(super) struct Alarm {
    timer: TimerFd,
    rung: AsyncFd<OwnedFd>,
}

impl Alarm {
    /// Not set. Inside of a runtime.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        let rung = watched(timer.as_fd().try_clone_to_owned()?, Interest::READABLE)?;
        Ok(Self { timer, rung })
    }

    /// Waits until then. Whoever gives up waiting can set it anew.
    pub async fn at(&self, time: Instant) {
        if self.ring(time).await.is_err() {
            sleep_until(time).await;
        }
    }

    async fn ring(&self, time: Instant) -> io::Result<()> {
        let left = time.saturating_duration_since(Instant::now()).max(SHORTEST);
        let once = Expiration::OneShot(TimeSpec::from_duration(left));
        self.timer.set(once, TimerSetTimeFlags::empty())?;
        loop {
            // What is left of an earlier time reads as not yet.
            let mut ready = self.rung.readable().await?;
            if let Ok(rung) = ready.try_io(|_| Ok(self.timer.wait()?)) {
                return rung;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    const SOON: Duration = Duration::from_millis(300);

    #[test]
    fn it_wakes_once_and_not_too_early() {
        let woken = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&woken);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .on_thread_unpark(move || {
                count.fetch_add(1, Ordering::Relaxed);
            })
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let alarm = Alarm::new().expect("a timer");
            let begun = Instant::now();
            let before = woken.load(Ordering::Relaxed);
            alarm.at(begun + SOON).await;
            assert!(begun.elapsed() >= SOON);
            assert_eq!(woken.load(Ordering::Relaxed) - before, 1);
        });
    }

    #[tokio::test]
    async fn it_is_set_anew_and_rings_for_what_is_over() {
        let alarm = Alarm::new().expect("a timer");
        let begun = Instant::now();
        // Rung, and nobody took it.
        tokio::select! {
            biased;
            () = alarm.at(begun + Duration::from_millis(20)) => panic!("it was not waited for"),
            () = async {
                let mut timer = [PollFd::new(alarm.timer.as_fd(), PollFlags::POLLIN)];
                poll(&mut timer, PollTimeout::NONE).expect("it rings");
            } => {}
        }
        alarm.at(begun + SOON).await;
        assert!(begun.elapsed() >= SOON);
        alarm.at(begun).await;
        let instead = tokio::time::timeout(Duration::from_millis(50), alarm.at(begun + SOON * 100)).await;
        assert!(instead.is_err(), "it rang for what was over");
    }
}

//! The last rung: a thread that kills a model's control group when memory is as good as gone and the loop has not acted.
//!
//! It needs no bus, no allocation and nothing that could have to be read in: what it uses is open, touched once, and
//! locked with the rest of the daemon's memory. It watches while the loop says that memory is near the level at which models go,
//! and when the loop is overdue: it has not looked again when it meant to. Otherwise it sleeps on a timer that the loop puts off
//! each time it looks, so that it costs no wake-up. Whom to kill, and in what order, the loop has told it before.
//!
//! It shares a process with the loop: it covers a loop that hangs, waits for a page or a lock of the allocator, or has
//! too little of the processor. It does not cover a process that is stopped or killed as a whole; the kernel does that.

use std::fs::File;
use std::hint::black_box;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::bytes::{Bytes, KIB};
use crate::config::Instance;

/// How often memory is looked at while it stands by: reading /proc/meminfo takes some 30 µs.
const LOOK: Duration = Duration::from_millis(10);
/// As good as now.
const SOON: Duration = Duration::from_nanos(1);
/// How long memory is below the level before it acts in the loop's place, which looks at least as often by then.
const GRACE: Duration = Duration::from_millis(60);
/// How much later than it meant to the loop may look again.
const OVERDUE: Duration = Duration::from_secs(1);
/// The same while memory is near the level at which models go, and every moment counts.
const OVERDUE_NEAR: Duration = Duration::from_millis(200);
/// How long the memory of a killed model may take to come back: freeing 1.2 GB took 22 ms.
const SETTLE: Duration = Duration::from_secs(2);
/// At most so many victims are kept ready; a machine runs a few.
pub const MOST: usize = 16;
/// The thread needs a few KiB.
const STACK: usize = 64 << 10;
/// /proc/meminfo has some 1.5 KiB.
const MEMINFO: usize = 4096;

/// A model that may be killed.
#[derive(Clone, Debug)]
pub struct Victim {
    /// Which.
    pub instance: Instance,
    /// What is expected back of it.
    pub frees: Bytes,
    /// Its control group's cgroup.kill, open for writing.
    pub kill: Arc<File>,
}

/// What to do when the loop does not.
#[derive(Clone, Debug)]
pub struct Orders {
    /// Watch now; otherwise only when the loop is overdue.
    pub near: bool,
    /// When the loop means to look again.
    pub due: Instant,
    /// Available memory (MemAvailable less CmaFree) below which it acts.
    pub below: Bytes,
    /// The same while the loop is overdue.
    pub alone: Bytes,
    /// Whom to kill, the first one first; those beyond [`MOST`] are left out.
    pub victims: Vec<Victim>,
}

/// One that was killed.
#[derive(Clone, Debug)]
pub struct Killed {
    /// Which.
    pub instance: Instance,
    /// What was available then.
    pub available: Bytes,
}

/// The thread, seen from the loop. It ends with the value.
#[derive(Debug)]
pub struct LastRung {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Wakes the thread. Whoever changes the orders sets it, under the lock.
    timer: TimerFd,
}

#[derive(Debug, Default)]
struct State {
    orders: Option<Orders>,
    /// The loop is at it until then.
    spared: Option<Instant>,
    /// Has room for [`MOST`] from the start.
    killed: Vec<(Victim, Bytes)>,
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the thread wake when these orders want it to.
    fn set_timer(&self, orders: Option<&Orders>) {
        let set = match orders {
            None => self.timer.unset(),
            Some(orders) => {
                let sleeps = (orders.due + OVERDUE).saturating_duration_since(Instant::now());
                // Zero would never wake it.
                let sleeps = if orders.near { SOON } else { sleeps.max(SOON) };
                self.timer.set(Expiration::OneShot(sleeps.into()), TimerSetTimeFlags::empty())
            }
        };
        // Fails for times that are none, and there are none of these.
        debug_assert!(set.is_ok(), "{set:?}");
    }
}

impl LastRung {
    /// Starts the thread. `meminfo` is /proc/meminfo. A byte comes out of the socket for each one that it killed, whom
    /// [`LastRung::killed`] then tells.
    ///
    /// # Errors
    /// The file can't be opened, or there can be no more threads.
    pub fn start(meminfo: &Path) -> io::Result<(Self, UnixStream)> {
        let meminfo = File::open(meminfo)?;
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        let state = State { killed: Vec::with_capacity(MOST), ..State::default() };
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC)?;
        let shared = Arc::new(Shared { state: Mutex::new(state), timer });
        let for_thread = Arc::clone(&shared);
        let null = File::options().write(true).open("/dev/null")?;
        std::thread::Builder::new().name("last-rung".to_owned()).stack_size(STACK).spawn(move || {
            touch(&meminfo, &null);
            watch(&for_thread, &meminfo, &theirs);
        })?;
        Ok((Self { shared }, ours))
    }

    /// From now on it acts by these orders, or sleeps where there are none.
    pub fn stand_by(&self, orders: Option<Orders>) {
        let orders = orders.map(|mut orders| {
            orders.victims.truncate(MOST);
            orders
        });
        let mut state = self.shared.lock();
        self.shared.set_timer(orders.as_ref());
        let before = std::mem::replace(&mut state.orders, orders);
        drop(state);
        // Freed here, not under the lock.
        drop(before);
    }

    /// The loop has begun to make room: nothing is to be done for so long.
    pub fn spare(&self, time: Duration) {
        self.shared.lock().spared = Some(Instant::now() + time);
    }

    /// Those who were killed since it was last asked.
    #[must_use]
    pub fn killed(&self) -> Vec<Killed> {
        let room = Vec::with_capacity(MOST);
        let killed = std::mem::replace(&mut self.shared.lock().killed, room);
        killed
            .into_iter()
            .map(|(victim, available)| Killed { instance: victim.instance, available })
            .collect()
    }
}

impl Drop for LastRung {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        let _ = self.shared.timer.set(Expiration::OneShot(SOON.into()), TimerSetTimeFlags::empty());
    }
}

/// Has everything that the thread will use read in: its stack, and the code on its path.
fn touch(meminfo: &File, mut null: &File) {
    std::thread::sleep(SOON);
    let stack = [1_u8; STACK / 2];
    black_box(&stack);
    black_box(available(meminfo));
    // Opened by us: it takes whatever it is given.
    let _ = null.write(b"1");
    black_box(Instant::now());
}

/// What the thread does. From here on nothing is allocated or freed.
fn watch(shared: &Shared, meminfo: &File, mut told: &UnixStream) {
    let mut below_since: Option<Instant> = None;
    // Until when, or up to what is available, the one killed last is waited for.
    let mut settling: Option<(Instant, Bytes)> = None;
    loop {
        let state = shared.lock();
        if state.ended {
            return;
        }
        let orders = state.orders.as_ref();
        let watching = orders.filter(|orders| orders.near || Instant::now() >= orders.due + OVERDUE);
        let Some((near, due, on_time, alone)) =
            watching.map(|orders| (orders.near, orders.due, orders.below, orders.alone))
        else {
            below_since = None;
            // Once more: it may have gone off a little early.
            shared.set_timer(orders);
            drop(state);
            // An interrupted wait is a look too many.
            let _ = shared.timer.wait();
            continue;
        };
        drop(state);
        let seen = available(meminfo);
        let now = Instant::now();
        let mut state = shared.lock();
        let overdue = now >= due + if near { OVERDUE_NEAR } else { OVERDUE };
        let below = if overdue { alone } else { on_time };
        settling = settling.filter(|(until, enough)| now < *until && seen.is_some_and(|seen| seen < *enough));
        match seen {
            Some(seen) if seen < below => {
                let since = *below_since.get_or_insert(now);
                let late = now.duration_since(since) >= GRACE;
                let spared = state.spared.is_some_and(|until| now < until);
                if late
                    && !spared
                    && settling.is_none()
                    && let Some(frees) = kill_first(&mut state, seen)
                {
                    settling = Some((now + SETTLE, seen + Bytes(frees.0 / 2)));
                    // A full socket has woken the loop already.
                    let _ = told.write(b"k");
                }
            }
            _ => below_since = None,
        }
        drop(state);
        std::thread::sleep(LOOK);
    }
}

/// Kills the first victim that can be killed; what is expected back of it.
fn kill_first(state: &mut State, available: Bytes) -> Option<Bytes> {
    if state.killed.len() == state.killed.capacity() {
        return None;
    }
    let victims = &mut state.orders.as_mut()?.victims;
    // ENODEV: its group is gone already. Any other error is no reason not to try the next one.
    let first = victims.iter().position(|victim| (&*victim.kill).write(b"1").is_ok())?;
    // Moved, since to drop it would free.
    let victim = victims.remove(first);
    let frees = victim.frees;
    state.killed.push((victim, available));
    Some(frees)
}

/// MemAvailable less CmaFree, which only movable pages can use. Nothing is allocated.
fn available(meminfo: &File) -> Option<Bytes> {
    let mut text = [0_u8; MEMINFO];
    let length = meminfo.read_at(&mut text, 0).ok()?;
    let text = text.get(..length)?;
    let available = field(text, b"MemAvailable:")?;
    Some(available - field(text, b"CmaFree:").unwrap_or_default())
}

/// A field of /proc/meminfo that counts kB.
fn field(text: &[u8], name: &[u8]) -> Option<Bytes> {
    let line = text.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(name))?;
    let mut digits =
        line.iter().copied().skip_while(|byte| *byte == b' ').take_while(u8::is_ascii_digit).peekable();
    digits.peek()?;
    let number = digits.fold(0_u64, |n, digit| n.saturating_mul(10).saturating_add(u64::from(digit - b'0')));
    Some(Bytes(KIB) * number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::path::PathBuf;

    /// Files that stand in for /proc/meminfo and for control groups.
    struct Files(PathBuf);

    impl Files {
        fn new(test: &str) -> Self {
            let path = std::env::temp_dir().join(format!("plimsoll-last-rung-{test}-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            let files = Self(path);
            files.available(900);
            files
        }

        fn available(&self, mib: u64) {
            // In one write of the same length: what is read meanwhile is the one or the other.
            let text = format!("MemTotal:  2048000 kB\nMemAvailable: {:9} kB\nCmaFree:   0 kB\n", mib * 1024);
            let file = File::options().write(true).create(true).truncate(false).open(self.0.join("meminfo"));
            file.unwrap().write_all_at(text.as_bytes(), 0).unwrap();
        }

        fn victim(&self, name: &str) -> Victim {
            let kill = File::create(self.0.join(name)).unwrap();
            Victim { instance: name.parse().unwrap(), frees: Bytes::mib(100), kill: Arc::new(kill) }
        }

        fn killed(&self, name: &str) -> bool {
            std::fs::read(self.0.join(name)).unwrap() == b"1"
        }
    }

    impl Drop for Files {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn near(victims: Vec<Victim>) -> Orders {
        let due = Instant::now() + Duration::from_secs(3600);
        Orders { near: true, due, below: Bytes::mib(200), alone: Bytes::mib(400), victims }
    }

    /// Waits for the thread's word.
    fn heard(told: &UnixStream) {
        told.set_nonblocking(false).unwrap();
        told.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut byte = [0];
        (&mut &*told).read_exact(&mut byte).unwrap();
    }

    #[test]
    fn one_goes_and_the_next_only_when_that_was_not_enough() {
        let files = Files::new("one");
        let (rung, told) = LastRung::start(&files.0.join("meminfo")).unwrap();
        let orders = near(vec![files.victim("a"), files.victim("b")]);
        rung.stand_by(Some(orders));
        files.available(90);
        let began = Instant::now();
        heard(&told);
        assert!(began.elapsed() >= GRACE, "the loop has its time");
        let killed = rung.killed();
        assert_eq!(killed.len(), 1, "{killed:?}");
        assert_eq!((killed[0].instance.to_string(), killed[0].available), ("a".to_owned(), Bytes::mib(90)));
        assert!(files.killed("a") && !files.killed("b"));
        // Its memory does not come back: the next one, after its time.
        let began = Instant::now();
        heard(&told);
        assert!(began.elapsed() >= SETTLE / 2, "{:?}", began.elapsed());
        assert!(files.killed("b"));
    }

    #[test]
    fn a_loop_that_does_not_come_back_is_stood_in_for() {
        let files = Files::new("overdue");
        let (rung, told) = LastRung::start(&files.0.join("meminfo")).unwrap();
        let far = |due| Orders { near: false, due: Instant::now() + due, ..near(vec![files.victim("a")]) };
        rung.stand_by(Some(far(Duration::from_secs(3600))));
        // Not below the level for a loop that is on time.
        files.available(300);
        // The loop has looked once more and means to come back at once.
        let began = Instant::now();
        rung.stand_by(None);
        rung.stand_by(Some(far(Duration::ZERO)));
        heard(&told);
        assert!(began.elapsed() >= OVERDUE, "{:?}", began.elapsed());
        assert!(files.killed("a"));
    }

    #[test]
    fn who_is_at_it_is_left_alone() {
        let files = Files::new("spared");
        let (rung, told) = LastRung::start(&files.0.join("meminfo")).unwrap();
        let spared = Duration::from_millis(700);
        files.available(90);
        let began = Instant::now();
        rung.spare(spared);
        rung.stand_by(Some(near(vec![files.victim("a")])));
        heard(&told);
        assert!(began.elapsed() >= spared, "{:?}", began.elapsed());
    }

    #[test]
    fn one_that_can_not_be_killed_is_passed_over() {
        let files = Files::new("gone");
        let (rung, told) = LastRung::start(&files.0.join("meminfo")).unwrap();
        let closed = File::open(files.0.join("meminfo")).unwrap();
        let gone = Victim { kill: Arc::new(closed), ..files.victim("gone") };
        files.available(90);
        rung.stand_by(Some(near(vec![gone, files.victim("b")])));
        heard(&told);
        assert_eq!(rung.killed()[0].instance.to_string(), "b");
        assert!(!files.killed("gone"));
    }

    #[test]
    fn meminfo_is_read_without_trusting_it() {
        assert_eq!(field(b"CmaFree:  2 kB\nMemAvailable:   7 kB\n", b"MemAvailable:"), Some(Bytes(7 * KIB)));
        assert_eq!(field(b"MemAvailable: 99999999999999999999 kB", b"MemAvailable:"), Some(Bytes::MAX));
        for text in [&b""[..], b"MemAvailable:", b"MemAvailable: x kB", b"XMemAvailable: 1 kB"] {
            assert_eq!(field(text, b"MemAvailable:"), None);
        }
    }
}

//! The main process of a unit, as `wait-ready` watches it.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::bytes::{Bytes, MIB};
use crate::os::pidfd_open;

/// Processes of a unit that are looked at; an engine has a handful.
const FAMILY: usize = 64;

/// A process, told from a later one with the same number by its start time.
#[derive(Debug)]
pub struct Process {
    root: PathBuf,
    pid: u32,
    start_time: u64,
    /// Readable once it has ended; absent where the kernel has none, or in tests.
    pidfd: Option<OwnedFd>,
}

/// How far a unit's main process has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Still `plimsoll run`, waiting for admission.
    Gate,
    /// The engine.
    Engine,
    /// It ended.
    Gone,
}

/// What a load moves: any difference of a MiB or more is movement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Movement {
    /// What the unit's cgroup is charged: anon, file and kernel of memory.stat.
    pub resident: Bytes,
    /// Read by its processes, from wherever: `rchar` of /proc/PID/io.
    pub read: Bytes,
    /// `read_bytes` of /proc/PID/io: page faults on mapped files count here only.
    disk: Bytes,
    /// Resident pages of its processes: mapped files that others have charged count here only.
    pages: Bytes,
}

impl Movement {
    /// Whether something has moved since `earlier`.
    #[must_use]
    pub fn differs(&self, earlier: &Self) -> bool {
        [
            (self.resident, earlier.resident),
            (self.read, earlier.read),
            (self.disk, earlier.disk),
            (self.pages, earlier.pages),
        ]
        .into_iter()
        .any(|(a, b)| a.0.abs_diff(b.0) >= MIB)
    }
}

impl Process {
    /// The process `pid` as it is now, if it lives. `root` is `/` but in tests.
    #[must_use]
    pub fn find(root: &Path, pid: u32) -> Option<Self> {
        // Opened first: if the number was given to another process since, its start time is later.
        let pidfd = if root == Path::new("/") { pidfd_open(pid).ok() } else { None };
        let process = Self { root: root.to_owned(), pid, start_time: 0, pidfd };
        let (alive, start_time) = process.stat()?;
        alive.then_some(Self { start_time, ..process })
    }

    /// Lets `time` pass, or less when the process ends meanwhile.
    pub fn sleep(&self, time: Duration) {
        match &self.pidfd {
            Some(pidfd) => {
                let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
                // Interrupted or ended: the caller looks anyway.
                let _ = poll(&mut fds, PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX));
            }
            None => std::thread::sleep(time),
        }
    }

    /// Whether the process behind the descriptor has ended.
    fn ended(&self) -> bool {
        let Some(pidfd) = &self.pidfd else { return false };
        let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// How far it has come.
    #[must_use]
    pub fn stage(&self) -> Stage {
        match (self.stat(), &self.pidfd) {
            (None, None) => return Stage::Gone,
            // The descriptor knows best: a process whose first thread has ended may live on in another.
            (_, Some(_)) if self.ended() => return Stage::Gone,
            // With ProtectProc=invisible an engine whose program can't be read can't be looked at.
            (None, Some(_)) => return Stage::Engine,
            (Some((alive, _)), None) if !alive => return Stage::Gone,
            (Some((_, start_time)), _) if start_time != self.start_time => return Stage::Gone,
            _ => {}
        }
        let arguments = self.read("cmdline").unwrap_or_default();
        let mut arguments = arguments.split('\0');
        let program = arguments.next().unwrap_or_default();
        let ours = Path::new(program).file_name().is_some_and(|name| name == "plimsoll");
        // Empty for a moment while it executes the engine.
        if program.is_empty() || (ours && arguments.any(|argument| argument == "run")) {
            Stage::Gate
        } else {
            Stage::Engine
        }
    }

    /// What it and its cgroup have moved so far; zero where it can't be read.
    #[must_use]
    pub fn movement(&self) -> Movement {
        let stat = self.of_group("memory.stat").unwrap_or_default();
        // shmem is a part of file.
        let charged = ["anon", "file", "kernel"].iter().filter_map(|key| field(&stat, key, ' '));
        let mut movement = Movement { resident: charged.map(Bytes).sum(), ..Movement::default() };
        for pid in self.family() {
            let io = self.read_of(pid, "io").unwrap_or_default();
            let pages =
                self.read_of(pid, "statm").and_then(|text| text.split(' ').nth(1)?.parse::<u64>().ok());
            movement.read += Bytes(field(&io, "rchar:", ' ').unwrap_or(0));
            movement.disk += Bytes(field(&io, "read_bytes:", ' ').unwrap_or(0));
            movement.pages += Bytes(pages.unwrap_or(0)) * 4096;
        }
        movement
    }

    /// It, and whatever else is in its cgroup, where this process is too and doesn't count: an engine in a container is
    /// a descendant of the unit's main process.
    #[must_use]
    pub fn family(&self) -> Vec<u32> {
        let procs = self.of_group("cgroup.procs").unwrap_or_default();
        let others = procs.lines().filter_map(|line| line.trim().parse::<u32>().ok());
        let others = others.filter(|pid| *pid != self.pid && *pid != std::process::id());
        std::iter::once(self.pid).chain(others.take(FAMILY)).collect()
    }

    /// Whether it lives, and its start time: fields 3 and 22 of /proc/PID/stat.
    fn stat(&self) -> Option<(bool, u64)> {
        let text = self.read("stat")?;
        // The name in parentheses may hold anything, parentheses too.
        let mut fields = text.get(text.rfind(')')? + 1..)?.split_whitespace();
        let state = fields.next()?;
        let start_time = fields.nth(18)?.parse().ok()?;
        Some((!matches!(state, "Z" | "X" | "x"), start_time))
    }

    /// A file of its cgroup.
    fn of_group(&self, file: &str) -> Option<String> {
        let groups = self.read("cgroup")?;
        let group = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
        read_bounded(&self.root.join("sys/fs/cgroup").join(group).join(file))
    }

    fn read(&self, file: &str) -> Option<String> {
        self.read_of(self.pid, file)
    }

    fn read_of(&self, pid: u32, file: &str) -> Option<String> {
        read_bounded(&self.root.join("proc").join(pid.to_string()).join(file))
    }
}

/// The number after `key` and `separator` on a line of its own.
fn field(text: &str, key: &str, separator: char) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(separator)?.trim().parse().ok())
}

fn read_bounded(path: &Path) -> Option<String> {
    const LIMIT: u64 = 256 * 1024;
    let mut text = Vec::new();
    std::fs::File::open(path).ok()?.take(LIMIT).read_to_end(&mut text).ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Writes what the kernel would show of a process under `root`.
    pub fn write_process(root: &Path, pid: u32, state: &str, arguments: &[&str]) {
        let directory = root.join("proc").join(pid.to_string());
        std::fs::create_dir_all(&directory).unwrap();
        let rest: Vec<String> = (4..30).map(|n| n.to_string()).collect();
        std::fs::write(directory.join("stat"), format!("{pid} (a ) name) {state} {}", rest.join(" ")))
            .unwrap();
        let command: String = arguments.iter().map(|argument| format!("{argument}\0")).collect();
        std::fs::write(directory.join("cmdline"), command).unwrap();
    }

    #[test]
    fn the_gate_and_the_engine_are_told_apart() {
        let root = std::env::temp_dir().join(format!("plimsoll-process-{}", std::process::id()));
        assert!(Process::find(&root, 9).is_none());
        write_process(&root, 9, "S", &["/usr/bin/plimsoll", "run", "deepseek"]);
        let process = Process::find(&root, 9).unwrap();
        assert_eq!(process.start_time, 22);
        assert_eq!(process.stage(), Stage::Gate);
        write_process(&root, 9, "R", &[]);
        assert_eq!(process.stage(), Stage::Gate);
        write_process(&root, 9, "D", &["/usr/bin/llama-server", "run"]);
        assert_eq!(process.stage(), Stage::Engine);
        write_process(&root, 9, "Z", &[]);
        assert_eq!(process.stage(), Stage::Gone);
        assert!(Process::find(&root, 9).is_none());
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn one_that_has_ended_is_gone_before_anybody_has_asked_for_its_code() {
        let mut child = std::process::Command::new("/bin/sleep").arg("600").spawn().unwrap();
        let process = Process::find(Path::new("/"), child.id()).unwrap();
        assert_ne!(process.stage(), Stage::Gone);
        child.kill().unwrap();
        process.sleep(Duration::from_secs(20));
        assert_eq!(process.stage(), Stage::Gone);
        child.wait().unwrap();
        assert_eq!(process.stage(), Stage::Gone);
    }

    #[test]
    fn movement_is_a_mebibyte_anywhere() {
        let root = std::env::temp_dir().join(format!("plimsoll-movement-{}", std::process::id()));
        write_process(&root, 9, "S", &["engine"]);
        let directory = root.join("proc/9");
        let group = root.join("sys/fs/cgroup/llm.slice/llm@x.service");
        std::fs::create_dir_all(&group).unwrap();
        std::fs::write(directory.join("cgroup"), "0::/llm.slice/llm@x.service\n").unwrap();
        std::fs::write(directory.join("io"), "rchar: 1000\nwchar: 5\nread_bytes: 0\n").unwrap();
        std::fs::write(directory.join("statm"), "1000 100 50 1 0 1 0\n").unwrap();
        std::fs::write(group.join("memory.stat"), "anon 100\nfile 2000\nkernel 10\nshmem 500\n").unwrap();
        let process = Process::find(&root, 9).unwrap();
        let before = process.movement();
        assert_eq!((before.resident, before.read, before.pages), (Bytes(2110), Bytes(1000), Bytes(409_600)));
        std::fs::write(directory.join("io"), "rchar: 2000\nread_bytes: 0\n").unwrap();
        assert!(!process.movement().differs(&before));
        std::fs::write(directory.join("io"), "rchar: 1000\nread_bytes: 1048576\n").unwrap();
        assert!(process.movement().differs(&before));
        // What another process of the unit reads counts as well, and what this one does never.
        std::fs::write(directory.join("io"), "rchar: 1000\nread_bytes: 0\n").unwrap();
        let ours = std::process::id();
        for pid in [11, ours] {
            write_process(&root, pid, "S", &["llama-server"]);
            std::fs::write(root.join(format!("proc/{pid}/io")), "rchar: 5000000\nread_bytes: 0\n").unwrap();
        }
        std::fs::write(group.join("cgroup.procs"), format!("9\n{ours}\n")).unwrap();
        assert!(!process.movement().differs(&before));
        std::fs::write(group.join("cgroup.procs"), format!("9\n11\n{ours}\n")).unwrap();
        assert!(process.movement().differs(&before));
        assert_eq!(process.family(), [9, 11]);
        std::fs::remove_dir_all(&root).unwrap();
    }
}

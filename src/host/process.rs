//! Identity of processes and of this boot.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::{ControlGroup, Host, HostError};

/// Processes of a unit whose users are looked at; an engine has a handful.
const FAMILY: usize = 64;

impl Host {
    /// The boot id: changes with every boot, so that what a file remembers of processes is known
    /// to be of this one.
    pub fn boot_id(&self) -> Result<String, HostError> {
        const PATH: &str = "/proc/sys/kernel/random/boot_id";
        let text = self.read(PATH)?;
        let id = text.trim();
        if id.is_empty() { Err(self.content(PATH, "the boot's id")) } else { Ok(id.to_owned()) }
    }

    /// When process `pid` started, in clock ticks since boot. With the pid it identifies a process
    /// for as long as the machine is up, where no pidfd can be kept (across a restart).
    pub fn start_time(&self, pid: u32) -> Result<u64, HostError> {
        self.stat(pid, 22)?
            .ok_or_else(|| self.content(&format!("/proc/{pid}/stat"), "when the process started"))
    }

    /// Where the stack of process `pid` began. The kernel draws that anew with each execve(2) and leaves it with each
    /// fork(2), so that a process whose stack began where its parent's did has inherited its memory. None where it
    /// can't be read.
    pub(super) fn start_stack(&self, pid: u32) -> Option<u64> {
        // 0 and 1 are said of processes that one may not look into.
        self.stat(pid, 28).ok().flatten().filter(|address| *address > 1)
    }

    /// A numbered field of /proc/PID/stat behind the name; see proc_pid_stat(5).
    fn stat(&self, pid: u32, number: usize) -> Result<Option<u64>, HostError> {
        let text = self.read(&format!("/proc/{pid}/stat"))?;
        // The name in parentheses may hold anything, also parentheses and spaces: the third field follows the last of them.
        Ok(text.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(number - 3)?.parse().ok()))
    }

    /// Whether process `pid` is of user `uid`: really, effectively, or as what it may become again.
    pub fn is_of_user(&self, pid: u32, uid: u32) -> Result<bool, HostError> {
        Ok(self.users(pid)?.contains(&uid))
    }

    /// Whom process `pid` is of: really, effectively, as what it may become again, and for files.
    fn users(&self, pid: u32) -> Result<BTreeSet<u32>, HostError> {
        let path = format!("/proc/{pid}/status");
        let text = self.read(&path)?;
        let uids = text.lines().find_map(|line| line.strip_prefix("Uid:"));
        let uids = uids.ok_or_else(|| self.content(&path, "the users of the process"))?;
        Ok(uids.split_whitespace().filter_map(|word| word.parse().ok()).collect())
    }

    /// Whom any of these processes is of, as [`Host::is_of_user`] has it; those that are gone, or can't be looked at,
    /// are nobody's.
    #[must_use]
    pub fn users_of(&self, pids: &[u32]) -> BTreeSet<u32> {
        pids.iter().filter_map(|pid| self.users(*pid).ok()).flatten().collect()
    }

    /// Whom the processes of a unit are of, `main` first and some more; nobody where the group is gone. A main process
    /// that is not in it has ended, and its number may be anybody's.
    #[must_use]
    pub fn users_of_unit(&self, group: &ControlGroup, main: u32) -> BTreeSet<u32> {
        let mut pids = self.processes(group).unwrap_or_default();
        pids.sort_by_key(|pid| *pid != main);
        pids.truncate(FAMILY);
        self.users_of(&pids)
    }

    /// The control group (version 2) that process `pid` is in.
    pub fn group_of(&self, pid: u32) -> Result<ControlGroup, HostError> {
        let path = format!("/proc/{pid}/cgroup");
        let text = self.read(&path)?;
        let group = text.lines().find_map(|line| line.strip_prefix("0::"));
        group
            .and_then(|group| group.parse().ok())
            .ok_or_else(|| self.content(&path, "a control group of version 2"))
    }
}

impl Host {
    /// Where the program that process `pid` runs was when it was started, from /proc/PID/exe.
    pub fn executable(&self, pid: u32) -> Result<PathBuf, HostError> {
        let path = self.path(&format!("/proc/{pid}/exe"));
        let target = std::fs::read_link(&path).map_err(|source| HostError::Read { path, source })?;
        // The kernel marks a file that was replaced meanwhile.
        let text = target.to_str().and_then(|text| text.strip_suffix(" (deleted)")).map(PathBuf::from);
        Ok(text.unwrap_or(target))
    }
}

//! What kind of system this is: kernel, its parameters, distribution, other programs that watch memory.

use std::fs;

use super::{Host, HostError};

/// Processes that are looked at; a machine has a few hundred.
const PROCESSES: usize = 1 << 16;

/// A kernel's version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// As the kernel says it: `6.12.57+deb13-amd64`.
    pub release: String,
    /// Its first two numbers.
    pub version: (u32, u32),
}

/// A process that was looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its name, from /proc/PID/comm.
    pub name: String,
    /// Its command line.
    pub arguments: Vec<String>,
}

impl Host {
    /// The kernel that runs.
    ///
    /// # Errors
    /// /proc does not tell.
    pub fn kernel(&self) -> Result<Kernel, HostError> {
        const PATH: &str = "/proc/sys/kernel/osrelease";
        let release = self.read(PATH)?.trim().to_owned();
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => Ok(Kernel { version: (major, minor), release }),
            _ => Err(self.content(PATH, "a kernel's version")),
        }
    }

    /// The kernel's command line, word by word; nothing where it can't be read.
    #[must_use]
    pub fn kernel_arguments(&self) -> Vec<String> {
        let text = self.read("/proc/cmdline").unwrap_or_default();
        text.split_whitespace().map(str::to_owned).collect()
    }

    /// The value of a kernel module's parameter, where the module is loaded and has it.
    #[must_use]
    pub fn module_parameter(&self, module: &str, name: &str) -> Option<String> {
        let text = self.read(&format!("/sys/module/{module}/parameters/{name}")).ok()?;
        Some(text.trim().to_owned())
    }

    /// Whether the kernel has pressure stall information, turned on or not.
    #[must_use]
    pub fn knows_pressure(&self) -> bool {
        self.path("/proc/pressure/memory").exists()
    }

    /// Whether control groups of version 2 account for memory.
    #[must_use]
    pub fn has_memory_controller(&self) -> bool {
        let controllers = self.read("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
        controllers.split_whitespace().any(|name| name == "memory")
    }

    /// Whether a place is set that the machine would hibernate to.
    #[must_use]
    pub fn hibernates(&self) -> bool {
        self.read("/sys/power/resume").is_ok_and(|device| !matches!(device.trim(), "" | "0:0"))
    }

    /// The identifiers of the distribution and of those that it is like, from os-release: `ubuntu`, `debian`.
    #[must_use]
    pub fn distributions(&self) -> Vec<String> {
        let read = |path| self.read(path).ok();
        let text = read("/etc/os-release").or_else(|| read("/usr/lib/os-release")).unwrap_or_default();
        let value = |key: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
            value.unwrap_or_default().trim_matches(['"', '\'']).to_owned()
        };
        let all = format!("{} {}", value("ID"), value("ID_LIKE"));
        all.split_whitespace().map(str::to_owned).collect()
    }

    /// The processes of these names; those that end meanwhile, or can't be looked at, are left out.
    #[must_use]
    pub fn named_processes(&self, names: &[&str]) -> Vec<Process> {
        let entries = fs::read_dir(self.path("/proc")).into_iter().flatten().flatten().take(PROCESSES);
        let mut pids: Vec<u32> =
            entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        pids.sort_unstable();
        let process = |pid: u32| {
            let name = self.read(&format!("/proc/{pid}/comm")).ok()?.trim().to_owned();
            if !names.contains(&name.as_str()) {
                return None;
            }
            let line = self.read(&format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let arguments = line.split('\0').filter(|word| !word.is_empty()).map(str::to_owned).collect();
            Some(Process { name, arguments })
        };
        pids.into_iter().filter_map(process).collect()
    }
}

//! Control groups (version 2): what a unit holds, and what it may hold.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::{Card, Host, HostError, flat_keyed};
use crate::bytes::Bytes;
use crate::ledger::Measured;

const MOUNT: &str = "/sys/fs/cgroup";

/// Groups below a unit are looked into this deep, and this many processes are listed. An engine
/// has a handful; a container's payload a few levels.
const DEPTH: usize = 8;
const PROCESSES: usize = 16_384;
/// So many groups are looked at, which takes some milliseconds: below a unit, where an engine has one, and for one that eats
/// memory, where a machine has some dozen at the top two levels.
const GROUPS: usize = 512;

/// The path of a control group below the hierarchy's root, as systemd's ControlGroup property and
/// /proc/PID/cgroup have it: `/llm.slice/llm@small.service`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ControlGroup(String);

/// Not the path of a control group.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not the path of a control group")]
pub struct ControlGroupError(String);

impl FromStr for ControlGroup {
    type Err = ControlGroupError;

    /// Refuses what is not absolute, has `..` in it (a process outside of our cgroup namespace)
    /// or is the root.
    fn from_str(text: &str) -> Result<Self, ControlGroupError> {
        let parts = text.strip_prefix('/').unwrap_or_default();
        let sound = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
        if text.len() <= 4096 && parts.split('/').all(sound) {
            Ok(Self(text.to_owned()))
        } else {
            Err(ControlGroupError(text.chars().take(200).collect()))
        }
    }
}

impl fmt::Display for ControlGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl ControlGroup {
    /// The group that this one is in; `None` for one directly below the root.
    #[must_use]
    pub fn parent(&self) -> Option<Self> {
        match self.0.rsplit_once('/') {
            Some((parent, _)) if !parent.is_empty() => Some(Self(parent.to_owned())),
            _ => None,
        }
    }

    /// The name of the system's unit that it belongs to: below systemd's slices there is nothing but units, and what
    /// a unit makes below its own group is part of that. `init` is the group of process 1; in a container that shares
    /// the host's groups all of systemd's lie below the container's.
    #[must_use]
    pub fn unit(&self, init: Option<&Self>) -> Option<&str> {
        let above = init.and_then(|init| init.0.strip_suffix("/init.scope")).unwrap_or_default();
        let path = self.0.strip_prefix(above).filter(|path| path.starts_with('/'))?;
        path.split('/').find(|part| !part.is_empty() && !part.ends_with(".slice"))
    }

    pub(super) fn file(&self, name: &str) -> String {
        format!("{MOUNT}{}/{name}", self.0)
    }
}

/// What memory.events counts since the group was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryEvents {
    /// Times that usage was held at memory.high.
    pub high: u64,
    /// Times that usage ran into memory.max.
    pub max: u64,
    /// Times that an allocation was about to fail.
    pub oom: u64,
    /// Processes killed for memory, for this group's limit or the machine's.
    pub oom_kill: u64,
}

impl Host {
    /// Whether /sys/fs/cgroup is the unified hierarchy (version 2), which everything here needs.
    #[must_use]
    pub fn has_cgroup_v2(&self) -> bool {
        self.path(&format!("{MOUNT}/cgroup.controllers")).exists()
    }

    /// The directory of a group.
    #[must_use]
    pub fn group_directory(&self, group: &ControlGroup) -> PathBuf {
        self.path(&format!("{MOUNT}{group}"))
    }

    /// What a unit holds, on the host and on each GPU of `cards` that is a pool (in their order,
    /// as in `ledger::Machine::gpus`). GPU bytes are left empty where its processes can't all be looked at.
    pub fn measured(&self, group: &ControlGroup, cards: &[Card]) -> Result<Measured, HostError> {
        let mut measured = self.group_memory(group)?;
        let pools: Vec<&Card> = cards.iter().filter(|card| card.heap().is_some()).collect();
        if !pools.is_empty()
            && let Ok(pids) = self.processes(group)
            && let Some(usage) = self.drm_usage(&pids)
        {
            measured.gpus = pools.iter().map(|card| usage.of(card)).collect();
        }
        Ok(measured)
    }

    /// Host memory charged to a group, by class.
    fn group_memory(&self, group: &ControlGroup) -> Result<Measured, HostError> {
        let stat = group.file("memory.stat");
        let text = self.read(&stat)?;
        let swapped = self.read_if_there(&group.file("memory.swap.current"))?;
        let swapped = swapped.and_then(|text| text.trim().parse().ok()).unwrap_or_default();
        measured_from_stat(&text, Bytes(swapped)).ok_or_else(|| self.content(&stat, "anon and file"))
    }

    /// The smallest memory.max of `group` and all groups above it; `None` where none is set.
    /// The root has one only inside a container.
    pub fn memory_limit(&self, group: &ControlGroup) -> Result<Option<Bytes>, HostError> {
        let mut limit = self.limit_in(&format!("{MOUNT}/memory.max"))?;
        let mut next = Some(group.clone());
        while let Some(group) = next {
            limit = limit.into_iter().chain(self.limit_in(&group.file("memory.max"))?).min();
            next = group.parent();
        }
        Ok(limit)
    }

    fn limit_in(&self, path: &str) -> Result<Option<Bytes>, HostError> {
        match self.read_if_there(path)? {
            None => Ok(None),
            Some(text) if text.trim() == "max" => Ok(None),
            Some(text) => {
                let bytes =
                    text.trim().parse().map_err(|_| self.content(path, "a number of bytes or max"))?;
                Ok(Some(Bytes(bytes)))
            }
        }
    }

    /// memory.current, clean page cache included: what a limit is compared with, not what the
    /// unit needs.
    pub fn memory_current(&self, group: &ControlGroup) -> Result<Bytes, HostError> {
        let path = group.file("memory.current");
        let text = self.read(&path)?;
        text.trim().parse().map(Bytes).map_err(|_| self.content(&path, "a number of bytes"))
    }

    /// CPU time used by a group so far, from cpu.stat; microseconds.
    pub fn cpu_usec(&self, group: &ControlGroup) -> Result<u64, HostError> {
        let path = group.file("cpu.stat");
        flat_keyed(&self.read(&path)?, "usage_usec").ok_or_else(|| self.content(&path, "usage_usec"))
    }

    /// The group's memory.events.
    pub fn memory_events(&self, group: &ControlGroup) -> Result<MemoryEvents, HostError> {
        let text = self.read(&group.file("memory.events"))?;
        let count = |key| flat_keyed(&text, key).unwrap_or_default();
        Ok(MemoryEvents {
            high: count("high"),
            max: count("max"),
            oom: count("oom"),
            oom_kill: count("oom_kill"),
        })
    }

    /// Whether any process is left in the group or below; a group that is gone has none.
    pub fn populated(&self, group: &ControlGroup) -> Result<bool, HostError> {
        let text = self.read_if_there(&group.file("cgroup.events"))?;
        Ok(text.is_some_and(|text| flat_keyed(&text, "populated") == Some(1)))
    }

    /// The processes in the group and below it; none when it is gone.
    ///
    /// # Errors
    /// A list of them can't be read, or there are more than [`GROUPS`] groups: what is listed would be too little.
    pub fn processes(&self, group: &ControlGroup) -> Result<Vec<u32>, HostError> {
        let mut pids = Vec::new();
        self.visit(group, |pid| {
            pids.push(pid);
            pids.len() < PROCESSES
        })?;
        Ok(pids)
    }

    /// Whether there are processes in the group or below it, and all of them are `ours`.
    ///
    /// # Errors
    /// As those of [`Host::processes`].
    pub(super) fn holds_only(&self, group: &ControlGroup, ours: &[u32]) -> Result<bool, HostError> {
        let mut last = None;
        self.visit(group, |pid| *last.insert(ours.contains(&pid)))?;
        Ok(last == Some(true))
    }

    /// Visits the processes in the group and below it, until `visit` returns false. Whoever has a group delegated makes as
    /// many below it as they like, so only so many are looked at.
    fn visit(&self, group: &ControlGroup, mut visit: impl FnMut(u32) -> bool) -> Result<(), HostError> {
        let mut level = vec![group.clone()];
        let mut groups = 1;
        for _ in 0..DEPTH {
            let mut below = Vec::new();
            for group in level {
                if let Some(text) = self.read_if_there(&group.file("cgroup.procs"))? {
                    let mut pids = text.lines().filter_map(|line| line.trim().parse::<u32>().ok());
                    if !pids.all(&mut visit) {
                        return Ok(());
                    }
                }
                let directory = self.group_directory(&group);
                let Ok(entries) = std::fs::read_dir(&directory) else { continue };
                for entry in entries.filter_map(Result::ok) {
                    if entry.file_type().is_ok_and(|kind| kind.is_dir())
                        && let Some(name) = entry.file_name().to_str()
                    {
                        groups += 1;
                        if groups > GROUPS {
                            return Err(HostError::TooMany { path: directory });
                        }
                        below.push(ControlGroup(format!("{group}/{name}")));
                    }
                }
            }
            level = below;
        }
        Ok(())
    }
}

impl Host {
    /// What each control group outside of `except` holds without clean page cache: those directly below the root, or
    /// where they have groups of their own, these. At most [`GROUPS`] are looked at, which takes some milliseconds.
    #[must_use]
    pub fn held_by_groups(&self, except: &str) -> Vec<(ControlGroup, Bytes)> {
        let mut found = Vec::new();
        for top in self.groups_in("").into_iter().filter(|top| top.0 != except) {
            let below = self.groups_in(&top.0);
            found.extend(if below.is_empty() { vec![top] } else { below });
        }
        found.truncate(GROUPS);
        let held = |group: ControlGroup| {
            let held = self.group_memory(&group).ok()?.private;
            Some((group, held))
        };
        found.into_iter().filter_map(held).collect()
    }

    /// The groups directly below one, by its path; empty for the root.
    pub(crate) fn groups_in(&self, path: &str) -> Vec<ControlGroup> {
        let entries = std::fs::read_dir(self.path(&format!("{MOUNT}{path}"))).into_iter().flatten().flatten();
        let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let names = directories.filter_map(|entry| entry.file_name().into_string().ok());
        names.take(GROUPS).map(|name| ControlGroup(format!("{path}/{name}"))).collect()
    }
}

/// The classes of memory.stat (cgroup-v2.rst). `None` when `anon` or `file` are missing.
fn measured_from_stat(text: &str, swapped: Bytes) -> Option<Measured> {
    let field = |key| flat_keyed(text, key).map(Bytes);
    let or_zero = |key| field(key).unwrap_or_default();
    let (anon, file) = (field("anon")?, field("file")?);
    // `file` counts shared memory (tmpfs, memfd) too, which no disk holds.
    let shmem = or_zero("shmem");
    // `kernel` came with Linux 5.18; before that its parts have to be added up.
    let kernel = match field("kernel") {
        Some(kernel) => kernel - or_zero("slab_reclaimable"),
        None => ["kernel_stack", "pagetables", "sec_pagetables", "percpu", "vmalloc", "slab_unreclaimable"]
            .into_iter()
            .map(or_zero)
            .sum(),
    };
    // Locked pages of any kind are on one list, `unevictable`; the anonymous ones among them are
    // those that the two lists of anonymous pages lack. The rest are locked weights.
    let unevictable = or_zero("unevictable");
    let locked_anon = (anon + shmem) - (or_zero("active_anon") + or_zero("inactive_anon"));
    let locked_file = (unevictable - locked_anon).min(file - shmem);
    Some(Measured {
        private: anon + shmem + kernel,
        locked_file,
        file: file - shmem - locked_file,
        swapped,
        gpus: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::Region;
    use super::*;

    #[test]
    fn a_group_belongs_to_one_unit() {
        for (path, unit) in [
            ("/llm.slice/llm@a.service", Some("llm@a.service")),
            ("/llm.slice/llm-big.slice/llm@a.service/payload", Some("llm@a.service")),
            // A user names groups below their own manager's as they like.
            (
                "/user.slice/user-1000.slice/user@1000.service/app.slice/llm@a.service",
                Some("user@1000.service"),
            ),
            ("/init.scope", Some("init.scope")),
            ("/llm.slice", None),
        ] {
            let group: ControlGroup = path.parse().unwrap();
            assert_eq!(group.unit(None), unit, "{path}");
            assert_eq!(group.unit(Some(&"/init.scope".parse().unwrap())), unit, "{path}");
        }
        let init: ControlGroup = "/system.slice/docker-7.scope/init.scope".parse().unwrap();
        for (path, unit) in [
            ("/system.slice/docker-7.scope/llm.slice/llm@a.service", Some("llm@a.service")),
            ("/system.slice/docker-77.scope/llm.slice/llm@a.service", None),
            ("/llm.slice/llm@a.service", None),
        ] {
            assert_eq!(path.parse::<ControlGroup>().unwrap().unit(Some(&init)), unit, "{path}");
        }
    }

    #[test]
    fn hostile_paths_are_refused() {
        for text in ["", "/", "llm.slice", "/a/../b", "/..", "/a//b", "/a/", "/a\0b", "/./a"] {
            assert!(text.parse::<ControlGroup>().is_err(), "{text:?}");
        }
        let group: ControlGroup = "/llm.slice/llm@a@2.service".parse().unwrap();
        assert_eq!(group.parent().unwrap().to_string(), "/llm.slice");
        assert_eq!(group.parent().unwrap().parent(), None);
    }

    #[test]
    fn locked_pages_are_told_apart() {
        // 100 anonymous of which 30 are locked, 10 shared, 500 of files of which 200 are locked.
        let text = "anon 100\nfile 510\nkernel 9\nslab_reclaimable 4\nshmem 10\n\
                    inactive_anon 60\nactive_anon 20\nunevictable 230\n";
        let measured = measured_from_stat(text, Bytes(7)).unwrap();
        assert_eq!(measured.private, Bytes(115));
        assert_eq!(measured.locked_file, Bytes(200));
        assert_eq!(measured.file, Bytes(300));
        assert_eq!(measured.swapped, Bytes(7));
        assert_eq!(measured.unreclaimable(), Bytes(315));
    }

    #[test]
    fn so_many_groups_are_looked_at_and_no_more() {
        let root = std::env::temp_dir().join(format!("plimsoll-groups-{}", std::process::id()));
        let (host, group) = (Host::at(&root), "/a.service".parse::<ControlGroup>().unwrap());
        let directory = host.group_directory(&group);
        let child = |number: usize| {
            let child = directory.join(number.to_string());
            std::fs::create_dir_all(&child).unwrap();
            std::fs::write(child.join("cgroup.procs"), format!("{number}\n")).unwrap();
        };
        // With the group itself as many as are looked at.
        (1..GROUPS).for_each(child);
        std::fs::write(directory.join("memory.stat"), "anon 100\nfile 0\nkernel 5\n").unwrap();
        std::fs::write(directory.join("cgroup.procs"), "9000\n").unwrap();
        let mut all: Vec<u32> = host.processes(&group).unwrap();
        assert_eq!(all.len(), GROUPS);
        assert!(host.holds_only(&group, &all).unwrap());
        let foreign = all.pop().unwrap();
        assert!(!host.holds_only(&group, &all).unwrap(), "{foreign} is in it as well");
        assert!(!host.holds_only(&"/gone.service".parse().unwrap(), &all).unwrap(), "nobody is in it");
        child(GROUPS);
        let error = host.processes(&group).unwrap_err();
        assert!(matches!(error, HostError::TooMany { .. }) && !error.is_gone(), "{error}");
        assert!(!host.holds_only(&group, &[]).unwrap(), "the first process tells");
        assert!(host.holds_only(&group, &[9000]).is_err(), "whose the rest are is unknown");
        // What the kernel charges to it is told all the same.
        let card = Card {
            name: "card0".to_owned(),
            driver: "amdgpu".to_owned(),
            pci: "0000:c5:00.0".to_owned(),
            apu: false,
            vram: Some(Region { total: Bytes::gib(8), used: Bytes::ZERO }),
            gtt: None,
        };
        let measured = host.measured(&group, &[card]).unwrap();
        assert_eq!((measured.private, measured.gpus), (Bytes(105), vec![]));
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn contents_that_make_no_sense_do_no_harm() {
        assert_eq!(measured_from_stat("", Bytes::ZERO), None);
        let absurd = format!("anon {0}\nfile 0\nshmem {0}\nunevictable {0}\n", u64::MAX);
        let measured = measured_from_stat(&absurd, Bytes::ZERO).unwrap();
        assert_eq!(measured.private, Bytes::MAX);
        assert_eq!(measured.locked_file, Bytes::ZERO);
    }
}

//! What a process and all that it has started hold.

use std::collections::{BTreeMap, BTreeSet};

use super::{Card, Host};
use crate::bytes::{Bytes, KIB};
use crate::ledger::Measured;

/// Processes that are looked at below one; a build may have more, and then its last ones count for the system.
const PROCESSES: usize = 256;
/// Threads of all of them that are asked for children; some milliseconds.
const THREADS: usize = 1024;

impl Host {
    /// Process `pid` and what it has started, and those have, from `/proc/PID/task/TID/children`; empty when it is
    /// gone. One whose parent has ended is not among them, unless an ancestor has adopted it (PR_SET_CHILD_SUBREAPER),
    /// and `others` with what is below them are not.
    #[must_use]
    pub fn tree(&self, pid: u32, others: &BTreeSet<u32>) -> Vec<u32> {
        self.family(pid, others).into_iter().map(|(pid, _)| pid).collect()
    }

    /// The same, each with its parent; the first one's is 0.
    fn family(&self, pid: u32, others: &BTreeSet<u32>) -> Vec<(u32, u32)> {
        let mut tree = Vec::new();
        let mut seen = others.clone();
        seen.insert(pid);
        let mut next = vec![(pid, 0)];
        let mut asked = 0;
        while let Some((pid, parent)) = next.pop() {
            let Ok(threads) = std::fs::read_dir(self.path(&format!("/proc/{pid}/task"))) else { continue };
            tree.push((pid, parent));
            if tree.len() == PROCESSES {
                break;
            }
            for thread in threads.filter_map(Result::ok).take(THREADS - asked) {
                asked += 1;
                let Some(thread) = thread.file_name().to_str().map(str::to_owned) else { continue };
                let children =
                    self.read_if_there(&format!("/proc/{pid}/task/{thread}/children")).ok().flatten();
                let children = children.unwrap_or_default();
                let children = children.split_whitespace().filter_map(|child| child.parse::<u32>().ok());
                next.extend(children.filter(|child| seen.insert(*child)).map(|child| (child, pid)));
            }
        }
        tree
    }

    /// What process `pid` and its descendants but for `others` hold: as their control group is charged, where they have one to
    /// themselves and not too many below it, and as the processes' own files say otherwise.
    #[must_use]
    pub fn measured_tree(&self, pid: u32, others: &BTreeSet<u32>, cards: &[Card]) -> Measured {
        let family = self.family(pid, others);
        if family.is_empty() {
            return Measured::default();
        }
        let tree: Vec<u32> = family.iter().map(|(pid, _)| *pid).collect();
        let own = self.group_of(pid).ok().filter(|group| self.holds_only(group, &tree).unwrap_or(false));
        if let Some(measured) = own.and_then(|group| self.measured(&group, cards).ok()) {
            return measured;
        }
        let mut measured = Measured::default();
        let mut shared = Bytes::ZERO;
        // What each has, and where its stack began.
        let mut seen: BTreeMap<u32, (Bytes, Option<u64>)> = BTreeMap::new();
        for (pid, parent) in &family {
            let status =
                self.read_if_there(&format!("/proc/{pid}/status")).ok().flatten().unwrap_or_default();
            let (anon, stack) = (field(&status, "RssAnon:"), self.start_stack(*pid));
            // One that was forked and runs nothing else still shares its parent's pages, which both are said to have:
            // only what it has beyond that is its own for certain.
            let inherited = seen.get(parent).filter(|(_, of)| stack.is_some() && *of == stack);
            measured.private += anon - inherited.map_or(Bytes::ZERO, |(anon, _)| *anon);
            seen.insert(*pid, (anon, stack));
            measured.swapped += field(&status, "VmSwap:");
            // Mostly the same pages in each of them: counted once rather than too often, for what is counted here
            // is taken off what the system uses.
            shared = shared.max(field(&status, "RssShmem:"));
        }
        measured.private += shared;
        let pools: Vec<&Card> = cards.iter().filter(|card| card.heap().is_some()).collect();
        if !pools.is_empty()
            && let Some(usage) = self.drm_usage(&tree)
        {
            measured.gpus = pools.iter().map(|card| usage.of(card)).collect();
        }
        measured
    }
}

/// A size of /proc/PID/status, which is in KiB whatever it says.
fn field(status: &str, name: &str) -> Bytes {
    let value = status.lines().find_map(|line| line.strip_prefix(name));
    let number = value.and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok());
    Bytes(number.unwrap_or_default()) * KIB
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn process(root: &Path, pid: u32, children: &str, anon: u64, shared: u64) {
        let task = root.join(format!("proc/{pid}/task/{pid}"));
        std::fs::create_dir_all(&task).unwrap();
        std::fs::write(task.join("children"), children).unwrap();
        let status = format!("Name:\tx\nRssAnon:\t{anon} kB\nRssShmem:\t{shared} kB\nVmSwap:\t1 kB\n");
        std::fs::write(root.join(format!("proc/{pid}/status")), status).unwrap();
        let group = root.join(format!("proc/{pid}/cgroup"));
        std::fs::write(group, "0::/user.slice/session-1.scope\n").unwrap();
    }

    #[test]
    fn what_forked_ones_inherited_counts_once() {
        let root = std::env::temp_dir().join(format!("plimsoll-forked-{}", std::process::id()));
        let stack = |pid: u32, address: u64| {
            let stat = format!("{pid} (a ) b) S{} {address} 0 0", " 0".repeat(24));
            std::fs::write(root.join(format!("proc/{pid}/stat")), stat).unwrap();
        };
        process(&root, 10, "11 12 13 14", 1000, 0);
        stack(10, 0x7ffd_0000);
        // Forked: one that has written nothing, and one that has 200 of its own.
        process(&root, 11, "", 1000, 0);
        stack(11, 0x7ffd_0000);
        process(&root, 12, "", 1200, 0);
        stack(12, 0x7ffd_0000);
        // One that runs another program, and one that nothing is known of.
        process(&root, 13, "", 300, 0);
        stack(13, 0x7fff_0000);
        process(&root, 14, "", 40, 0);
        let measured = Host::at(&root).measured_tree(10, &BTreeSet::new(), &[]);
        assert_eq!(measured.private, Bytes((1000 + 200 + 300 + 40) * KIB));
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_forked_child_is_told_from_one_that_runs_a_program() {
        let host = Host::at(Path::new("/"));
        let own = host.start_stack(std::process::id());
        let mut child = std::process::Command::new("/bin/sleep").arg("600").spawn().unwrap();
        // In the middle of its execve(2) it has none for a moment.
        let other = (0..2000).find_map(|_| {
            let stack = host.start_stack(child.id());
            if stack.is_none() {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            stack
        });
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(own.is_some() && other.is_some() && own != other, "{own:?} {other:?}");
    }

    #[test]
    fn a_holder_is_measured_with_all_that_it_has_started() {
        let root = std::env::temp_dir().join(format!("plimsoll-tree-{}", std::process::id()));
        // One that names itself, and one that is gone.
        process(&root, 10, "11 12 99 ", 100, 50);
        process(&root, 11, "13 11", 200, 50);
        process(&root, 12, "", 300, 40);
        process(&root, 13, "", 400, 0);
        process(&root, 20, "", 5000, 5000);
        let (host, none) = (Host::at(&root), BTreeSet::new());
        let mut tree = host.tree(10, &none);
        tree.sort_unstable();
        assert_eq!(tree, [10, 11, 12, 13]);
        // One below it that is counted by itself.
        assert_eq!(host.measured_tree(10, &BTreeSet::from([10, 11]), &[]).private, Bytes(450 * KIB));
        let measured = host.measured_tree(10, &none, &[]);
        assert_eq!((measured.private, measured.swapped), (Bytes(1050 * KIB), Bytes(4 * KIB)));

        // A group that others are in as well is not theirs; one that is theirs alone says more.
        let group = root.join("sys/fs/cgroup/user.slice/session-1.scope");
        std::fs::create_dir_all(&group).unwrap();
        std::fs::write(group.join("memory.stat"), "anon 7000000\nfile 0\nkernel 5\n").unwrap();
        std::fs::write(group.join("cgroup.procs"), "10\n11\n12\n13\n20\n").unwrap();
        assert_eq!(host.measured_tree(10, &none, &[]).private, Bytes(1050 * KIB));
        std::fs::write(group.join("cgroup.procs"), "10\n11\n12\n13\n").unwrap();
        assert_eq!(host.measured_tree(10, &none, &[]).private, Bytes(7_000_005));
        assert_eq!(host.measured_tree(77, &none, &[]), Measured::default());
        // One with more groups below it than are looked at may hold anybody.
        for number in 0..1000 {
            std::fs::create_dir(group.join(number.to_string())).unwrap();
        }
        assert_eq!(host.measured_tree(10, &none, &[]).private, Bytes(1050 * KIB));
        std::fs::remove_dir_all(root).unwrap();
    }
}

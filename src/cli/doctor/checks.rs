//! The checks of the machine: from one reading to findings, each with the exact fix.

use serde::Serialize;

use super::snapshot::{Groups, Pressure, Snapshot};
use crate::bytes::{Bytes, GIB};
use crate::host::{Card, Heap, Kernel, Process};
use crate::policy::request::auto_reserve;

/// The oldest kernel that the daemon's own means are all in: `memory.reclaim` and `memory.peak`.
const OLDEST: (u32, u32) = (5, 19);
/// What newer ones bring: cachestat(2), and a `memory.peak` that can be reset.
const NEWER: [((u32, u32), &str); 2] = [((6, 5), "cachestat"), ((6, 12), "a memory.peak that can be reset")];
/// `ttm.pages_limit` counts these.
const PAGE: u64 = 4096;

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Worth knowing.
    Note,
    /// To be fixed.
    Problem,
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was checked, in a word.
    pub check: &'static str,
    /// How it came out.
    pub level: Level,
    /// In a sentence.
    pub text: String,
    /// What to do about it, where something is to be done.
    pub fix: Option<String>,
}

impl Finding {
    /// As it should be.
    pub fn ok(check: &'static str, text: impl Into<String>) -> Self {
        Self { check, level: Level::Ok, text: text.into(), fix: None }
    }

    /// Worth knowing.
    pub fn note(check: &'static str, text: impl Into<String>) -> Self {
        Self { level: Level::Note, ..Self::ok(check, text) }
    }

    /// To be fixed.
    pub fn problem(check: &'static str, text: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { check, level: Level::Problem, text: text.into(), fix: Some(fix.into()) }
    }

    /// With what to do about it.
    pub fn with_fix(self, fix: impl Into<String>) -> Self {
        Self { fix: Some(fix.into()), ..self }
    }
}

/// Every check of the machine.
pub fn machine(snapshot: &Snapshot) -> Vec<Finding> {
    let mut found = Vec::new();
    if let Some(container) = &snapshot.container {
        found.push(Finding::note(
            "container",
            format!("this is a container ({container}): what the kernel needs is set on its host"),
        ));
    }
    found.push(kernel(snapshot.kernel.as_ref()));
    found.push(pressure(snapshot));
    found.push(groups(snapshot));
    found.extend(gtt(snapshot));
    found.extend(swap(snapshot));
    found.push(disk(snapshot));
    found.extend(killers(&snapshot.killers));
    found
}

fn kernel(kernel: Option<&Kernel>) -> Finding {
    let Some(kernel) = kernel else {
        return Finding::note("kernel", "its version can't be read");
    };
    let release = &kernel.release;
    if kernel.version < OLDEST {
        let (major, minor) = OLDEST;
        return Finding::problem(
            "kernel",
            format!("{release} is older than {major}.{minor}, which brought memory.reclaim and memory.peak"),
            "install a newer kernel, best 6.12 or later",
        );
    }
    let lacks = NEWER.iter().filter(|(version, _)| kernel.version < *version);
    let lacks: Vec<String> =
        lacks.map(|((major, minor), what)| format!("{what} (since {major}.{minor})")).collect();
    if lacks.is_empty() {
        Finding::ok("kernel", release)
    } else {
        Finding::note("kernel", format!("{release} lacks {}; Plimsoll does without", lacks.join(" and ")))
    }
}

fn pressure(snapshot: &Snapshot) -> Finding {
    match snapshot.pressure {
        Pressure::On => Finding::ok("pressure", "the kernel tells memory pressure (PSI)"),
        Pressure::Off => Finding::problem(
            "pressure",
            "pressure stall information (PSI) is turned off: memory is watched by its level alone",
            on_kernel_line(snapshot, "psi=1"),
        ),
        Pressure::Missing => Finding::problem(
            "pressure",
            "the kernel has no pressure stall information (PSI): memory is watched by its level alone",
            format!(
                "{}; if that changes nothing, take a kernel that is built with CONFIG_PSI=y",
                on_kernel_line(snapshot, "psi=1")
            ),
        ),
    }
}

fn groups(snapshot: &Snapshot) -> Finding {
    match snapshot.groups {
        Groups::Memory => Finding::ok("cgroups", "version 2, with memory accounted"),
        Groups::WithoutMemory => Finding::problem(
            "cgroups",
            "control groups don't account for memory",
            on_kernel_line(snapshot, "cgroup_enable=memory"),
        ),
        Groups::Old => Finding::problem(
            "cgroups",
            "control groups are of version 1, or mixed: no model can be limited or measured",
            on_kernel_line(snapshot, "systemd.unified_cgroup_hierarchy=1"),
        ),
    }
}

/// How an argument gets onto the kernel's command line.
fn on_kernel_line(snapshot: &Snapshot, argument: &str) -> String {
    if snapshot.container.is_some() {
        return format!("on the container's host, add {argument} to the kernel's command line");
    }
    let like = |name: &str| snapshot.distributions.iter().any(|own| own == name);
    if like("fedora") || like("rhel") {
        format!("run 'grubby --update-kernel=ALL --args={argument}' as root and reboot")
    } else if like("debian") || like("ubuntu") {
        format!(
            "append {argument} to GRUB_CMDLINE_LINUX in /etc/default/grub, run 'update-grub' as root, and reboot"
        )
    } else {
        format!("add {argument} to the kernel's command line in the boot loader's configuration, and reboot")
    }
}

/// What the GPU of an APU may map, against memory.
fn gtt(snapshot: &Snapshot) -> Vec<Finding> {
    let Some(memory) = &snapshot.memory else { return Vec::new() };
    // All that models could have, in whole GiB.
    let wanted = Bytes((memory.total - auto_reserve(memory)).0 / GIB * GIB);
    let line = format!("ttm.pages_limit={}", wanted.0 / PAGE);
    let mut found = Vec::new();
    let given = snapshot.arguments.iter().find(|word| word.starts_with("amdgpu.gttsize="));
    let by_module = || snapshot.gttsize.filter(|mib| *mib >= 0).map(|mib| format!("amdgpu.gttsize={mib}"));
    if let Some(setting) = given.cloned().or_else(by_module) {
        found.push(Finding::problem(
            "gtt",
            format!("{setting} is set, which is deprecated and at odds with ttm.pages_limit"),
            format!(
                "remove it from the kernel's command line and from /etc/modprobe.d; then {}",
                on_kernel_line(snapshot, &line)
            ),
        ));
    }
    for card in snapshot.cards.iter().filter(|card| card.apu) {
        found.push(of_apu(snapshot, card, memory.total, wanted, &line));
    }
    found
}

fn of_apu(snapshot: &Snapshot, card: &Card, total: Bytes, wanted: Bytes, line: &str) -> Finding {
    let name = &card.name;
    if card.heap() == Some(Heap::Vram) {
        let own = card.vram.map_or(Bytes::ZERO, |vram| vram.total);
        return Finding::note(
            "gtt",
            format!("the firmware has set aside {own} for {name}, which nothing else can use"),
        )
        .with_fix(
            "for memory that is shared as needed, set the smallest UMA frame buffer in the firmware's setup",
        );
    }
    let Some(gtt) = card.gtt else {
        return Finding::note("gtt", format!("{name} does not tell what it may map"));
    };
    let may = gtt.total;
    if snapshot.container.is_some() {
        // Memory is the container's here, and the GPU the whole machine's.
        Finding::note("gtt", format!("{name} may map {may} of its host's memory"))
    } else if may > total {
        Finding::problem(
            "gtt",
            format!("{name} may map {may}, more than the {total} that there are"),
            on_kernel_line(snapshot, line),
        )
    } else if may.0 / 3 < wanted.0 / 4 {
        Finding::problem(
            "gtt",
            format!("{name} may map {may} of {total}: models on the GPU can't be larger"),
            on_kernel_line(snapshot, line),
        )
    } else {
        Finding::ok("gtt", format!("{name} may map {may} of {total}"))
    }
}

fn swap(snapshot: &Snapshot) -> Vec<Finding> {
    let areas = &snapshot.swaps;
    let size = |compressed: bool| -> Bytes {
        areas.iter().filter(|area| area.compressed() == compressed).map(|area| area.size).sum()
    };
    let mut found = Vec::new();
    // In a container the areas are not to be seen.
    let total = snapshot.memory.map_or(Bytes::ZERO, |memory| memory.swap_total);
    match (size(false), size(true)) {
        (disk, zram) if disk.is_zero() && zram.is_zero() && !total.is_zero() => {
            found.push(Finding::ok("swap", total.to_string()));
        }
        (disk, zram) if disk.is_zero() && zram.is_zero() => found.push(Finding::note(
            "swap",
            "there is none: pressure is seen late, and what has not been used for long stays in memory",
        )),
        (disk, zram) if zram.is_zero() => found.push(Finding::ok("swap", format!("{disk} on disk"))),
        (disk, zram) => {
            let beside = if disk.is_zero() { String::new() } else { format!(" beside {disk} on disk") };
            found.push(Finding::note(
                "swap",
                format!("{zram} compressed in memory (zram){beside}: it holds what compresses, and takes memory for it"),
            ));
        }
    }
    if snapshot.zswap && !areas.is_empty() {
        found.push(Finding::note("zswap", "on: what goes to swap is first compressed in memory"));
    }
    if snapshot.hibernates {
        found.push(Finding::note(
            "hibernation",
            "set up: with models in memory its image may not fit into swap; unload them before",
        ));
    }
    found
}

/// Room for swapfiles of models that run from swap.
fn disk(snapshot: &Snapshot) -> Finding {
    let swap = &snapshot.swap;
    if swap.max_size.is_zero() {
        return Finding::ok("disk", "no swapfiles are made (max-size is 0)");
    }
    let room: Bytes = snapshot.rooms.iter().map(|(_, room)| *room).sum();
    let places: Vec<String> = swap.directories.iter().map(|place| place.display().to_string()).collect();
    let places = places.join(", ");
    if snapshot.rooms.is_empty() {
        return Finding::note(
            "disk",
            format!("{places} for swapfiles is not there: the daemon makes it when it starts"),
        );
    }
    if !room.is_zero() {
        return Finding::ok("disk", format!("room for {room} of swapfiles in {places}"));
    }
    let text = format!("no room for swapfiles in {places}, where {} are left free", swap.free_space);
    let fix = "free some space there, or name a directory on another disk: directories = [..] under [swap] in \
               /etc/plimsoll/plimsoll.toml";
    if snapshot.swaps_models {
        Finding::problem("disk", format!("{text}; a model has oversize = \"swap\""), fix)
    } else {
        Finding::note("disk", text).with_fix(fix)
    }
}

/// Other programs that end processes when memory is short, and how to live together.
fn killers(running: &[Process]) -> Vec<Finding> {
    if running.is_empty() {
        return vec![Finding::ok("others", "no other program ends processes when memory is short")];
    }
    running.iter().map(killer).collect()
}

/// The value of a flag, of several the last one's, which is the one that counts.
fn last_value<'a>(arguments: &'a [String], flag: &str) -> Option<&'a str> {
    let value = |(at, word): (usize, &'a String)| match word.strip_prefix(flag)? {
        "" => arguments.get(at + 1).map(String::as_str),
        rest => rest.strip_prefix('='),
    };
    arguments.iter().enumerate().filter_map(value).next_back()
}

fn killer(process: &Process) -> Finding {
    let (avoid, ignore) =
        (last_value(&process.arguments, "--avoid"), last_value(&process.arguments, "--ignore"));
    let spared = [avoid, ignore].into_iter().flatten().any(|expression| expression.contains("llama"));
    match process.name.as_str() {
        "systemd-oomd" => Finding::note(
            "others",
            "systemd-oomd runs: llm@.service has ManagedOOMPreference=avoid, so that it looks for others first",
        ),
        "earlyoom" if spared => Finding::ok("others", "earlyoom runs, and spares the engines"),
        "earlyoom" => Finding::problem(
            "others",
            "earlyoom runs, and takes the largest process first: a model",
            match avoid {
                // A second one would take the place of the first, and of what that protects.
                Some(expression) => format!(
                    "put llama-server|plimsolld into the expression of --avoid ('{expression}') in EARLYOOM_ARGS in \
                     /etc/default/earlyoom, which heeds one --avoid only, and run 'systemctl restart earlyoom' as root"
                ),
                None => "add --avoid '^(llama-server|plimsolld)$' to EARLYOOM_ARGS in /etc/default/earlyoom, and run \
                         'systemctl restart earlyoom' as root"
                    .to_owned(),
            },
        ),
        "nohang" => Finding::note("others", "nohang runs, and prefers large processes").with_fix(
            "add '@BADNESS_ADJ_RE_NAME -500 /// ^(llama-server|plimsolld)$' to /etc/nohang/nohang.conf, and run \
             'systemctl restart nohang' as root",
        ),
        // oomd heeds what systemd marks a control group with for systemd-oomd (user.oomd_avoid), and what is marked is not
        // inherited: the units have it, and the slice they compete in needs it as well. systemd does it at each start.
        other => Finding::note("others", format!("{other} runs, and may choose a model")).with_fix(
            "have it look for others first: run 'systemctl set-property llm.slice ManagedOOMPreference=avoid' as root",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn level(version: (u32, u32)) -> Level {
        kernel(Some(&Kernel { release: "x".to_owned(), version })).level
    }

    #[test]
    fn kernels_by_what_they_have() {
        assert_eq!(level((7, 2)), Level::Ok);
        assert_eq!(level((6, 12)), Level::Ok);
        assert_eq!(level((6, 1)), Level::Note);
        assert_eq!(level((5, 15)), Level::Problem);
        let lacks = kernel(Some(&Kernel { release: "6.8.0".to_owned(), version: (6, 8) }));
        assert_eq!(
            lacks.text,
            "6.8.0 lacks a memory.peak that can be reset (since 6.12); Plimsoll does without"
        );
    }

    #[test]
    fn earlyoom_is_fine_where_it_spares_the_engines() {
        let earlyoom = |arguments: &[&str]| {
            let arguments = arguments.iter().map(|word| (*word).to_owned()).collect();
            killer(&Process { name: "earlyoom".to_owned(), arguments }).level
        };
        assert_eq!(earlyoom(&["/usr/bin/earlyoom", "-r", "3600"]), Level::Problem);
        assert_eq!(earlyoom(&["earlyoom", "--avoid", "^(Xorg)$"]), Level::Problem);
        assert_eq!(earlyoom(&["earlyoom", "--avoid", "^(Xorg|llama-server)$"]), Level::Ok);
        assert_eq!(earlyoom(&["earlyoom", "--ignore=llama"]), Level::Ok);
        assert_eq!(earlyoom(&["earlyoom", "--ignore-root-user", "llama"]), Level::Problem, "another flag");
        // The last one counts.
        let (xorg, llama) = ("^(Xorg)$", "^(llama-server)$");
        assert_eq!(earlyoom(&["earlyoom", "--avoid", xorg, "--avoid", llama]), Level::Ok);
        assert_eq!(earlyoom(&["earlyoom", "--avoid", llama, "--avoid", xorg]), Level::Problem);
        assert_eq!(earlyoom(&["earlyoom", "--avoid"]), Level::Problem, "without a value");
    }

    #[test]
    fn what_earlyoom_avoids_already_stays_avoided() {
        let fix = |arguments: &[&str]| {
            let arguments = arguments.iter().map(|word| (*word).to_owned()).collect();
            killer(&Process { name: "earlyoom".to_owned(), arguments }).fix.unwrap()
        };
        let of_fedora = fix(&["earlyoom", "--prefer", "^(chromium)$", "--avoid", "(^|/)(gnome-shell)$"]);
        assert!(of_fedora.contains("into the expression of --avoid ('(^|/)(gnome-shell)$')"), "{of_fedora}");
        assert!(!of_fedora.contains("add --avoid"), "{of_fedora}");
        assert!(fix(&["earlyoom", "-r", "3600"]).contains("add --avoid"));
    }
}

//! `host` on recorded machines (`tests/fixtures/host`).

#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::path::{Path, PathBuf};

use plimsoll::bytes::{Bytes, GIB, KIB, MIB};
use plimsoll::host::{Card, ControlGroup, Heap, Host, Stall};
use plimsoll::ledger::{Gpu, GpuKind};
use proptest::prelude::*;

fn tree(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/host").join(name)
}

fn host(name: &str) -> Host {
    Host::at(tree(name))
}

fn group(path: &str) -> ControlGroup {
    path.parse().unwrap()
}

/// A copy of a recorded machine that a test may change.
struct Copy(PathBuf);

impl Copy {
    fn of(name: &str, test: &str) -> Self {
        let to = std::env::temp_dir().join(format!("plimsoll-host-{test}-{}", std::process::id()));
        fn copy(from: &Path, to: &Path) {
            std::fs::create_dir_all(to).unwrap();
            for entry in std::fs::read_dir(from).unwrap() {
                let entry = entry.unwrap();
                let to = to.join(entry.file_name());
                if entry.file_type().unwrap().is_dir() {
                    copy(&entry.path(), &to);
                } else {
                    std::fs::copy(entry.path(), to).unwrap();
                }
            }
        }
        copy(&tree(name), &to);
        Self(to)
    }

    fn write(&self, path: &str, text: &str) {
        std::fs::write(self.0.join(path), text).unwrap();
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn strix_halo_is_a_unified_pool_of_its_gtt() {
    let host = host("strix-halo");
    let gpu =
        Gpu { name: "card1".into(), kind: GpuKind::Unified, total: Bytes::gib(120), used: Bytes::gib(38) };
    assert_eq!(host.gpus().unwrap(), [gpu]);
    let memory = host.memory().unwrap();
    assert_eq!(memory.total, Bytes(131_338_240 * KIB));
    assert_eq!(memory.available, Bytes((88_000_000 - 131_072) * KIB), "less CmaFree");
    assert_eq!(memory.free, Bytes((61_000_000 - 131_072) * KIB), "less CmaFree");
    assert_eq!(memory.swap_total, Bytes(8_388_604 * KIB));
    assert_eq!(memory.swap_free, Bytes(8_000_000 * KIB));
    assert_eq!(host.memory_limit(&group("/llm.slice")).unwrap(), Some(Bytes::gib(96)));
    assert_eq!(host.memory_limit(&group("/llm.slice/llm@glm-flash.service")).unwrap(), Some(Bytes::gib(96)));
    assert_eq!(host.memory_pressure().unwrap(), Some(Stall { some: 123_456, full: 100_200 }));
    assert_eq!(host.container(), None);
    assert!(host.has_cgroup_v2());
}

#[test]
fn a_unit_is_measured_by_class_and_a_client_counts_once() {
    let host = host("strix-halo");
    let cards = host.cards().unwrap();
    let unit = group("/llm.slice/llm@glm-flash.service");
    let measured = host.measured(&unit, &cards).unwrap();
    assert_eq!(measured.private, Bytes((900 + 100 + 60 - 20) * MIB), "anon, shmem, kernel less its caches");
    assert_eq!(measured.locked_file, Bytes::gib(4));
    assert_eq!(measured.file, Bytes(GIB - 100 * MIB));
    assert_eq!(measured.swapped, Bytes::mib(12));
    assert_eq!(measured.gpus, [Bytes(36 * GIB + 512 * MIB)], "client 31 is open three times");
    assert_eq!(host.memory_current(&unit).unwrap(), Bytes::gib(6));
    assert!(host.populated(&unit).unwrap());
    assert_eq!(host.memory_events(&unit).unwrap().high, 3);
    assert_eq!(host.group_pressure(&unit).unwrap(), Some(Stall { some: 77, full: 55 }));
    assert_eq!(host.processes(&group("/llm.slice")).unwrap().len(), 3, "below the slice too");

    let cpu_only = host.measured(&group("/llm.slice/llm@cpu-only@2.service"), &cards).unwrap();
    assert_eq!(cpu_only.gpus, [Bytes::ZERO]);
    assert_eq!(cpu_only.unreclaimable(), Bytes(2 * GIB + 20 * MIB));
}

#[test]
fn processes_and_mounts_are_identified() {
    let host = host("strix-halo");
    assert_eq!(host.boot_id().unwrap(), "0f6d9f5e-9a50-4f6a-8f7e-2f5b0c2f9b11");
    assert_eq!(host.start_time(4242).unwrap(), 42_420);
    assert_eq!(host.start_time(4243).unwrap(), 42_430, "a name with parentheses and spaces");
    assert_eq!(host.group_of(4242).unwrap(), group("/llm.slice/llm@glm-flash.service"));
    assert!(host.start_time(1).unwrap_err().is_gone());
    for (path, point) in [
        ("/mnt/ai-models/x.gguf", "/mnt/ai-models"),
        ("/mnt/ai-models-2/x.gguf", "/"),
        ("/mnt/ai models/x.gguf", "/mnt/ai models"),
    ] {
        let mount = host.mount_of(Path::new(path)).unwrap().unwrap();
        assert_eq!(mount.point, Path::new(point), "{path}");
    }
}

#[test]
fn a_large_carve_out_is_a_pool_of_its_own() {
    let host = host("strix-halo-carve-out");
    let cards = host.cards().unwrap();
    assert!(cards[0].apu);
    assert_eq!(cards[0].heap(), Some(Heap::Vram));
    let gpu = cards[0].pool().unwrap();
    assert_eq!((gpu.kind, gpu.total, gpu.used), (GpuKind::Discrete, Bytes::gib(96), Bytes::gib(41)));
    assert!(host.memory().unwrap().total < Bytes::gib(32), "MemTotal does not count the carve-out");
    let measured = host.measured(&group("/llm.slice/llm@glm-flash.service"), &cards).unwrap();
    assert_eq!(measured.gpus, [Bytes::gib(40)]);
    assert_eq!(host.memory_limit(&group("/llm.slice")).unwrap(), None);
}

#[test]
fn a_card_is_a_card_though_its_gtt_is_larger() {
    let host = host("discrete");
    let cards = host.cards().unwrap();
    assert_eq!(cards.len(), 2, "connectors are no cards");
    assert_eq!((cards[0].driver.as_str(), cards[0].heap()), ("i915", None));
    let gpus = host.gpus().unwrap();
    assert_eq!(gpus.len(), 1);
    assert_eq!((gpus[0].kind, gpus[0].total), (GpuKind::Discrete, Bytes(24 * GIB - 16 * MIB)));
    let measured = host.measured(&group("/llm.slice/llm@coder.service"), &cards).unwrap();
    assert_eq!(measured.gpus, [Bytes::gib(13)], "only the pool's device counts");
}

#[test]
fn without_a_gpu_and_on_an_old_kernel() {
    let host = host("no-gpu");
    assert_eq!(host.gpus().unwrap(), []);
    assert_eq!(host.memory_pressure().unwrap(), None);
    let memory = host.memory().unwrap();
    // 30 GiB of the ZFS cache are clean, and 4 GiB of the rest hold its minimum of 2 GiB.
    assert_eq!(memory.available, Bytes(9_000_000 * KIB + 30 * GIB));
    assert_eq!(memory.free, Bytes(4_000_000 * KIB));
    let measured = host.measured(&group("/llm.slice/llm@small.service"), &[]).unwrap();
    assert_eq!(measured.private, Bytes(GIB + 40 * MIB), "the kernel's parts added up");
    assert_eq!(measured.swapped, Bytes::ZERO);
    assert!(!host.populated(&group("/llm.slice/llm@small.service")).unwrap());
    assert!(!host.populated(&group("/llm.slice/llm@gone.service")).unwrap());
    let gone = host.measured(&group("/llm.slice/llm@gone.service"), &[]).unwrap_err();
    assert!(gone.is_gone());
}

#[test]
fn in_a_container_its_own_memory_counts() {
    let host = host("lxc");
    assert_eq!(host.container().as_deref(), Some("lxc"));
    let memory = host.memory().unwrap();
    assert_eq!(memory.total, Bytes::gib(64));
    assert_eq!(memory.available, Bytes(64_000_000 * KIB), "the host's ZFS cache is not the container's");
    assert_eq!(host.memory_limit(&group("/llm.slice")).unwrap(), Some(Bytes::gib(64)));
    assert_eq!(host.gpus().unwrap()[0].total, Bytes::gib(120), "sysfs is the whole machine's");
}

#[test]
fn the_size_of_gtt_is_read_again() {
    let copy = Copy::of("strix-halo", "gtt");
    let host = Host::at(&copy.0);
    copy.write("sys/class/drm/card1/device/mem_info_gtt_total", "66571993088\n");
    assert_eq!(host.gpus().unwrap()[0].total, Bytes(66_571_993_088));
    // A size that can't be had leaves no pool rather than an empty one.
    copy.write("sys/class/drm/card1/device/mem_info_gtt_used", "\n");
    assert_eq!(host.cards().unwrap()[0].gtt, None);
}

#[test]
fn nonsense_is_an_error_or_left_out() {
    let host = host("hostile");
    let error = host.memory().unwrap_err().to_string();
    assert!(error.ends_with("proc/meminfo does not say MemTotal"), "{error}");
    assert!(host.memory_pressure().is_err());
    assert!(host.memory_limit(&group("/llm.slice")).is_err());
    assert!(host.mounts().is_err());
    assert!(host.start_time(7).is_err());
    assert!(host.group_of(7).is_err());
    let unit = group("/llm.slice/llm@small.service");
    assert!(host.measured(&unit, &[]).is_err());
    assert_eq!(host.processes(&unit).unwrap(), [7]);
    let cards = host.cards().unwrap();
    assert_eq!(cards.iter().map(|card| card.name.as_str()).collect::<Vec<_>>(), ["card0", "card1"]);
    assert_eq!(cards[0].heap(), Some(Heap::Gtt), "in doubt an APU");
    assert_eq!(cards[1].gtt, None);
    let usage = host.drm_usage(&[7]).unwrap();
    assert!(cards.iter().all(|card: &Card| usage.of(card) == Bytes::ZERO));
}

#[test]
fn a_file_of_endless_length_is_refused() {
    let copy = Copy::of("strix-halo", "endless");
    let file = std::fs::File::create(copy.0.join("proc/meminfo")).unwrap();
    file.set_len(1 << 40).unwrap();
    assert!(Host::at(&copy.0).memory().is_err());
}

#[test]
fn this_machine_can_be_read() {
    let host = Host::default();
    let memory = host.memory().unwrap();
    assert!(memory.total >= memory.available && !memory.available.is_zero());
    assert!(!host.boot_id().unwrap().is_empty());
    assert!(host.start_time(std::process::id()).unwrap() > 0);
    host.cards().unwrap();
    host.mounts().unwrap();
}

/// Lines that look somewhat like what the kernel writes, and bytes that don't.
fn contents() -> impl Strategy<Value = Vec<u8>> {
    let word = prop_oneof![
        "[a-z_]{1,12}:?",
        "-?[0-9]{1,24}",
        prop::sample::select(vec![
            "MemTotal:",
            "MemAvailable:",
            "MemFree:",
            "kB",
            "anon",
            "file",
            "kernel",
            "unevictable",
            "some",
            "full",
            "avg10=0.0",
            "total=9",
            "total=",
            "drm-client-id:",
            "drm-pdev:",
            "drm-memory-gtt:",
            "KiB",
            "MiB",
            "max",
            "populated",
            "0::/",
            "/..",
            "(",
            ")",
            "7",
            "S",
            "rw,relatime",
            "-",
            "\\04",
            "\\777",
            "\u{e9}",
            "29 1 259:2 / / rw - ext4 a rw",
        ])
        .prop_map(str::to_owned),
    ];
    let line = prop::collection::vec(word, 0..14).prop_map(|words| words.join(" "));
    prop_oneof![
        prop::collection::vec(line, 0..20).prop_map(|lines| lines.join("\n").into_bytes()),
        prop::collection::vec(any::<u8>(), 0..200),
    ]
}

#[test]
fn no_contents_make_it_panic() {
    let copy = Copy::of("hostile", "any");
    proptest!(ProptestConfig::with_cases(16), |(files in prop::collection::vec(contents(), 8))| {
        let unit = "sys/fs/cgroup/llm.slice/llm@small.service";
        for (path, contents) in [
            "proc/meminfo", "proc/pressure/memory", "proc/self/mountinfo", "proc/7/stat", "proc/7/cgroup",
            "proc/7/fdinfo/3", &format!("{unit}/memory.stat"), &format!("{unit}/cgroup.procs"),
        ].into_iter().zip(&files) {
            std::fs::write(copy.0.join(path), contents).unwrap();
        }
        for file in ["memory.current", "memory.max", "memory.events", "cgroup.events"] {
            std::fs::write(copy.0.join(unit).join(file), &files[0]).unwrap();
        }
        for file in ["uevent", "mem_info_gtt_total", "mem_info_vram_used"] {
            std::fs::write(copy.0.join("sys/class/drm/card0/device").join(file), &files[1]).unwrap();
        }
        let host = Host::at(&copy.0);
        let unit = group("/llm.slice/llm@small.service");
        let cards = host.cards().unwrap();
        let _ = (host.memory(), host.memory_pressure(), host.mounts(), host.mount_of(Path::new("/a")));
        let _ = (host.start_time(7), host.group_of(7), host.drm_usage(&[7]), host.processes(&unit));
        let _ = (host.measured(&unit, &cards), host.memory_current(&unit), host.memory_limit(&unit));
        let _ = (host.memory_events(&unit), host.populated(&unit), host.gpus());
    });
}

//! GPU memory of processes, from /proc/PID/fdinfo (drm-usage-stats.rst).

use std::collections::BTreeMap;
use std::io;

use super::{Card, Heap, Host, read_bounded};
use crate::bytes::{Bytes, KIB, MIB};

/// Descriptors that are looked at in one process, the lowest ones. An engine has a few dozen, and opens the GPU before
/// anybody connects.
const DESCRIPTORS: usize = 256;
/// And in all of them together, each process counted as one more: some milliseconds.
const OF_ALL: usize = 2048;

/// GPU memory that a set of processes holds, per device and place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DrmUsage {
    clients: BTreeMap<(String, u64), Held>,
}

/// What one client (an open device) holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Held {
    vram: Bytes,
    gtt: Bytes,
}

impl DrmUsage {
    /// What is held of the pool that `card` is.
    #[must_use]
    pub fn of(&self, card: &Card) -> Bytes {
        let clients = self.clients.iter().filter(|((pci, _), _)| *pci == card.pci);
        match card.heap() {
            Some(Heap::Gtt) => clients.map(|(_, held)| held.gtt).sum(),
            Some(Heap::Vram) => clients.map(|(_, held)| held.vram).sum(),
            None => Bytes::ZERO,
        }
    }

    /// Counts a descriptor; one client seen through several (after fork or dup) counts once.
    fn add(&mut self, fdinfo: &str) {
        if let Some((key, held)) = parse(fdinfo) {
            self.clients.insert(key, held);
        }
    }
}

impl Host {
    /// GPU memory held by `pids`. `None` when one of them can't be looked at (other users'
    /// processes take CAP_SYS_PTRACE): an answer would be too small. Those that are gone hold
    /// nothing.
    #[must_use]
    pub fn drm_usage(&self, pids: &[u32]) -> Option<DrmUsage> {
        let mut usage = DrmUsage::default();
        let mut seen = 0;
        for pid in pids {
            if seen >= OF_ALL {
                break;
            }
            seen += 1;
            let directory = self.path(&format!("/proc/{pid}/fdinfo"));
            let entries = match std::fs::read_dir(&directory) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return None,
                Err(_) => continue,
            };
            for entry in entries.filter_map(Result::ok).take(DESCRIPTORS.min(OF_ALL - seen)) {
                seen += 1;
                match read_bounded(&entry.path()) {
                    Ok(bytes) => usage.add(&String::from_utf8_lossy(&bytes)),
                    Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return None,
                    Err(_) => {}
                }
            }
        }
        Some(usage)
    }
}

/// The client behind a descriptor and what it holds; `None` when it is no DRM device.
///
/// `drm-resident-` says what is really there now; `drm-memory-` is the older name of it.
fn parse(fdinfo: &str) -> Option<((String, u64), Held)> {
    let mut fields = BTreeMap::new();
    for line in fdinfo.lines() {
        if let Some((key, value)) = line.strip_prefix("drm-").and_then(|rest| rest.split_once(':')) {
            fields.insert(key, value.trim());
        }
    }
    let client = fields.get("client-id")?.parse().ok()?;
    let pci = (*fields.get("pdev")?).to_owned();
    let held = |place: &str| {
        let of = |kind: &str| fields.get(format!("{kind}-{place}").as_str()).and_then(|value| size(value));
        of("resident").or_else(|| of("memory")).unwrap_or_default()
    };
    // amdgpu names memory pages outside of the GPU's address space `cpu`; those are not held here.
    Some(((pci, client), Held { vram: held("vram"), gtt: held("gtt") }))
}

/// A number with an optional unit, KiB or MiB.
fn size(text: &str) -> Option<Bytes> {
    let mut words = text.split_whitespace();
    let number = Bytes(words.next()?.parse().ok()?);
    match words.next() {
        None => Some(number),
        Some("KiB") => Some(number * KIB),
        Some("MiB") => Some(number * MIB),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_old_and_new_names_and_units() {
        let old = "pos:\t0\ndrm-driver:\tamdgpu\ndrm-client-id:\t7\ndrm-pdev:\t0000:c5:00.0\n\
                   drm-memory-vram:\t3 KiB\ndrm-memory-gtt: \t2 MiB\n";
        let held = |vram, gtt| Held { vram: Bytes(vram), gtt: Bytes(gtt) };
        let key = ("0000:c5:00.0".to_owned(), 7);
        assert_eq!(parse(old), Some((key.clone(), held(3 * KIB, 2 * MIB))));
        let new = format!("{old}drm-resident-gtt: 1 MiB\ndrm-total-gtt: 9 MiB\ndrm-resident-vram: 5\n");
        assert_eq!(parse(&new), Some((key, held(5, MIB))));
    }

    #[test]
    fn what_is_no_client_counts_nothing() {
        for text in
            ["", "pos: 0\nflags: 02\n", "drm-client-id: x\ndrm-pdev: a\n", "drm-client-id: 1\n", "drm-"]
        {
            assert_eq!(parse(text), None, "{text:?}");
        }
        let absurd = format!(
            "drm-client-id: 1\ndrm-pdev: a\ndrm-memory-gtt: {} MiB\ndrm-memory-vram: 1 GiBs\n",
            u64::MAX
        );
        assert_eq!(parse(&absurd).unwrap().1, Held { vram: Bytes::ZERO, gtt: Bytes::MAX });
    }

    #[test]
    fn so_many_processes_are_looked_at_and_no_more() {
        let root = std::env::temp_dir().join(format!("plimsoll-drm-{}", std::process::id()));
        let last = u32::try_from(OF_ALL).unwrap();
        let fdinfo = root.join(format!("proc/{last}/fdinfo"));
        std::fs::create_dir_all(&fdinfo).unwrap();
        let client = "drm-client-id: 1\ndrm-pdev: a\ndrm-memory-gtt: 1 MiB\n";
        std::fs::write(fdinfo.join("3"), client).unwrap();
        // Nothing is known of the others, and each takes a look.
        let clients = |first: u32| {
            let pids: Vec<u32> = (first..=last).collect();
            Host::at(&root).drm_usage(&pids).unwrap().clients.len()
        };
        assert_eq!((clients(2), clients(0)), (1, 0));
        std::fs::remove_dir_all(root).unwrap();
    }
}

//! Mounted file systems.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use procfs::FromRead;
use procfs::process::{MountInfo, MountInfos};

use super::{Host, HostError};

/// A mounted file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where.
    pub point: PathBuf,
    /// `ext4`, `btrfs`, `nfs4`, …
    pub kind: String,
    /// What: a device, a server's export.
    pub source: String,
    /// Major and minor number of the file system's device, as `8:1`.
    pub device: String,
}

impl Host {
    /// The mounts that this process sees, in the order of /proc/self/mountinfo.
    pub fn mounts(&self) -> Result<Vec<Mount>, HostError> {
        const PATH: &str = "/proc/self/mountinfo";
        let text = self.read(PATH)?;
        let mounts = MountInfos::from_read(text.as_bytes());
        let mounts = mounts.map_err(|_| self.content(PATH, "what is mounted where"))?;
        Ok(mounts.into_iter().map(Mount::from).collect())
    }

    /// The mount that the absolute path `path` lies on, symbolic links not followed.
    pub fn mount_of(&self, path: &Path) -> Result<Option<Mount>, HostError> {
        // The longest mount point wins, and of several on one point the last.
        let on = self.mounts()?.into_iter().filter(|mount| path.starts_with(&mount.point));
        Ok(on.max_by_key(|mount| mount.point.components().count()))
    }
}

impl From<MountInfo> for Mount {
    fn from(info: MountInfo) -> Self {
        Self {
            point: unescape(&info.mount_point.to_string_lossy()).into(),
            kind: info.fs_type,
            source: unescape(&info.mount_source.unwrap_or_default()).to_string_lossy().into_owned(),
            device: info.majmin,
        }
    }
}

/// Undoes the kernel's `\040` for bytes that would break the line apart.
pub(super) fn unescape(text: &str) -> OsString {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((first, tail)) = rest.split_first() {
        if let [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] = rest {
            plain.push((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'));
            rest = &rest[4..];
        } else {
            plain.push(*first);
            rest = tail;
        }
    }
    OsString::from_vec(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_undone() {
        assert_eq!(unescape("/a\\040b\\134c"), "/a b\\c");
        for text in ["\\", "\\04", "\\048", "/a\\", "\\777"] {
            assert_eq!(unescape(text), text);
        }
    }
}

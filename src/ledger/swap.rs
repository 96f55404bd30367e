//! Swap: what the machine has of it, and which of it is the daemon's own.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::machine::Machine;
use crate::bytes::Bytes;

/// A swap area in use, or a swapfile of the daemon's own that is not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SwapArea {
    /// Its file or device, as /proc/swaps has it.
    pub path: PathBuf,
    /// How much it can hold.
    pub size: Bytes,
    /// How much it holds.
    pub used: Bytes,
    /// The larger is used first.
    pub priority: i32,
    /// The kernel uses it; a file left behind by a crash or a reboot is not in use.
    pub active: bool,
}

impl SwapArea {
    /// Which of the daemon's own it is; none for anybody else's. Only root can have a file used as swap, so
    /// that the name is proof enough.
    #[must_use]
    pub fn own(&self) -> Option<SwapName> {
        SwapName::of(&self.path)
    }

    /// Whether what it holds is in memory all the same, only smaller (zram). Weights don't get smaller.
    #[must_use]
    pub fn compressed(&self) -> bool {
        self.path.to_str().is_some_and(|path| path.starts_with("/dev/zram"))
    }
}

/// Who a swapfile was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SwapOwner {
    /// For a model, by a plan: it goes when nobody needs it any more.
    Plan,
    /// For a person (`plimsoll swap add`): it stays until it is removed, or the machine restarts.
    Person,
}

/// What tells a swapfile of the daemon's own from all others: `plan-3f2a…` or `hand-3f2a…`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SwapName {
    /// Who it was made for.
    pub owner: SwapOwner,
    /// A random number.
    pub id: u64,
}

impl SwapName {
    /// That of a path, if it is one of the daemon's own.
    #[must_use]
    pub fn of(path: &Path) -> Option<Self> {
        path.file_name()?.to_str()?.strip_prefix("plimsoll-")?.strip_suffix(".swap")?.parse().ok()
    }

    /// The name of its file.
    #[must_use]
    pub fn file_name(&self) -> String {
        format!("plimsoll-{self}.swap")
    }
}

impl fmt::Display for SwapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let owner = match self.owner {
            SwapOwner::Plan => "plan",
            SwapOwner::Person => "hand",
        };
        write!(f, "{owner}-{:016x}", self.id)
    }
}

impl FromStr for SwapName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("'{text}' is no swapfile of plimsoll's: 'plimsoll swap list' shows their names");
        let (owner, id) = text.split_once('-').ok_or_else(wrong)?;
        let owner = match owner {
            "plan" => SwapOwner::Plan,
            "hand" => SwapOwner::Person,
            _ => return Err(wrong()),
        };
        let plain = id.len() == 16 && id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        let id = u64::from_str_radix(id, 16).ok().filter(|_| plain).ok_or_else(wrong)?;
        Ok(Self { owner, id })
    }
}

impl Serialize for SwapName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The size of the swapfile for so many bytes of a model: an eighth more, for the kernel swaps out a little
/// more than it has to.
#[must_use]
pub fn swapfile_bytes(swapped: Bytes) -> Bytes {
    if swapped.is_zero() { swapped } else { swapped + swapped.mul_div(1, 8).max(Bytes::mib(64)) }
}

impl Machine {
    /// What the swapfiles in use that were made for models can hold together.
    #[must_use]
    pub fn swap_of_plans(&self) -> Bytes {
        let of_plans = |area: &&SwapArea| area.own().is_some_and(|name| name.owner == SwapOwner::Plan);
        self.swaps.iter().filter(|area| area.active).filter(of_plans).map(|area| area.size).sum()
    }

    /// What compressed swap can still take. The kernel fills it first, for it has the higher priority, and
    /// that frees nothing: so much more has to be swapped out.
    #[must_use]
    pub fn swap_in_memory(&self) -> Bytes {
        let compressed = self.swaps.iter().filter(|area| area.active && area.compressed());
        compressed.map(|area| area.size - area.used).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_swapfiles_are_known_by_their_names() {
        let name = SwapName { owner: SwapOwner::Person, id: 0xab };
        assert_eq!(name.file_name(), "plimsoll-hand-00000000000000ab.swap");
        assert_eq!(SwapName::of(&Path::new("/var/lib/x").join(name.file_name())), Some(name));
        for other in ["/swapfile", "/x/plimsoll-hand-ab.swap", "/x/plimsoll-plan-00000000000000AB.swap", "/"]
        {
            assert_eq!(SwapName::of(Path::new(other)), None, "{other}");
        }
    }
}

//! Memory limits of units, never above what the administrator set.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use zbus::Variant;

use super::{Systemd, SystemdError, bounded, unit_path};
use crate::action::{Changed, cgroup};
use crate::bytes::Bytes;
use crate::policy::limits::Limits;

/// How long is reclaimed before a limit that is below usage is set at usage instead.
const RECLAIM: Duration = Duration::from_secs(20);

/// Limits of a unit; [`Bytes::MAX`] for `infinity`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Values {
    /// MemoryHigh=
    pub high: Bytes,
    /// MemoryMax=
    pub max: Bytes,
    /// MemorySwapMax=
    pub swap_max: Bytes,
}

/// What is set for a unit, and what stood there before.
///
/// systemd keeps what is set at run time under /run until the machine restarts, and shows it like
/// any other value. So the daemon must remember it as long, in /run too, and before it is set, to
/// tell its own limits from the administrator's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Applied {
    /// Ours.
    pub set: Values,
    /// What stood there when ours were chosen: ours of before, or the administrator's. It still
    /// does when the daemon ended before it had set them.
    pub before: Values,
    /// The administrator's.
    pub administrator: Values,
}

/// The administrator's limits where `current` stands and `previous` was chosen last: a value that is
/// as we set it is ours, any other the administrator's.
#[must_use]
pub fn administrators(current: Values, previous: Option<&Applied>) -> Values {
    let pick = |of: fn(&Values) -> Bytes| match previous {
        Some(previous) if [previous.set, previous.before].iter().any(|ours| of(ours) == of(&current)) => {
            of(&previous.administrator)
        }
        _ => of(&current),
    };
    Values { high: pick(|v| v.high), max: pick(|v| v.max), swap_max: pick(|v| v.swap_max) }
}

/// What to set where `wanted` is wanted and `current` stands: each at most the administrator's.
#[must_use]
pub fn merge(wanted: Limits, current: Values, previous: Option<&Applied>) -> Applied {
    let administrator = administrators(current, previous);
    let max = wanted.max.min(administrator.max);
    let set = Values {
        high: wanted.high.min(administrator.high).min(max),
        max,
        swap_max: wanted.swap_max.unwrap_or(Bytes::MAX).min(administrator.swap_max),
    };
    Applied { set, before: current, administrator }
}

impl Applied {
    /// With limits that a group which uses `usage` can be given: MemoryMax= below it kills, and
    /// MemoryHigh= below it blocks systemd.
    fn above(mut self, usage: Bytes) -> Self {
        self.set.max = self.set.max.max(usage).min(self.administrator.max);
        self.set.high = self.set.high.max(usage).min(self.administrator.high);
        self
    }
}

impl Systemd {
    /// The limits of a unit as they stand.
    pub async fn limits(&self, unit: &str) -> Result<Values, SystemdError> {
        let (_, service) = bounded("GetProperties", self.proxies(&unit_path(unit))).await?;
        let read = async {
            tokio::try_join!(service.memory_high(), service.memory_max(), service.memory_swap_max())
        };
        let (high, max, swap_max) = bounded("GetProperties", read).await?;
        Ok(Values { high: Bytes(high), max: Bytes(max), swap_max: Bytes(swap_max) })
    }

    /// Chooses a unit's limits and makes room for them: where its control group, whose directory is
    /// `group`, uses more, it is reclaimed from, and what then remains is not cut off. `previous`
    /// is what this returned last for the unit. To be remembered, then given to [`Self::set_limits`].
    pub async fn choose_limits(
        &self,
        unit: &str,
        group: Option<&Path>,
        wanted: Limits,
        previous: Option<&Applied>,
    ) -> Result<Applied, SystemdError> {
        let current = self.limits(unit).await?;
        let chosen = merge(wanted, current, previous);
        match group {
            Some(group) if chosen.set.high < current.high => {
                Ok(chosen.above(shrink(group.to_owned(), chosen.set.high).await))
            }
            _ => Ok(chosen),
        }
    }

    /// Sets a unit's limits until the machine restarts.
    pub async fn set_limits(&self, unit: &str, chosen: &Applied) -> Result<Changed, SystemdError> {
        if chosen.set == chosen.before {
            return Ok(Changed::Unchanged);
        }
        let properties = [
            ("MemoryHigh", Variant::from(chosen.set.high.0)),
            ("MemoryMax", Variant::from(chosen.set.max.0)),
            ("MemorySwapMax", Variant::from(chosen.set.swap_max.0)),
        ];
        bounded("SetUnitProperties", self.manager.set_unit_properties(unit, true, &properties)).await?;
        Ok(Changed::Changed)
    }
}

/// Reclaims down to `target` on a thread that may block; returns the usage afterwards, or zero
/// where there is none to be had (the group does not exist yet).
async fn shrink(group: PathBuf, target: Bytes) -> Bytes {
    let deadline = Instant::now() + RECLAIM;
    let reclaim = move || cgroup::reclaim(&group, target, deadline);
    match tokio::task::spawn_blocking(reclaim).await {
        Ok(Ok(reclaimed)) => reclaimed.after,
        _ => Bytes::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Values = Values { high: Bytes::MAX, max: Bytes::MAX, swap_max: Bytes::MAX };

    fn wanted(high: u64, max: u64) -> Limits {
        Limits { high: Bytes::gib(high), max: Bytes::gib(max), swap_max: Some(Bytes::ZERO) }
    }

    #[test]
    fn without_an_administrators_limit_ours_stand() {
        let applied = merge(wanted(10, 11), NONE, None);
        assert_eq!(applied.set, Values { high: Bytes::gib(10), max: Bytes::gib(11), swap_max: Bytes::ZERO });
        assert_eq!(applied.administrator, NONE);
        // Ours are found the next time and are not taken for the administrator's.
        let grown = merge(wanted(20, 21), applied.set, Some(&applied));
        assert_eq!((grown.set.max, grown.administrator), (Bytes::gib(21), NONE));
    }

    #[test]
    fn the_administrators_limit_is_never_exceeded() {
        let limited = Values { max: Bytes::gib(8), ..NONE };
        let applied = merge(wanted(10, 11), limited, None);
        assert_eq!((applied.set.high, applied.set.max), (Bytes::gib(8), Bytes::gib(8)));
        let again = merge(wanted(10, 11), applied.set, Some(&applied));
        assert_eq!((again.set, again.administrator), (applied.set, applied.administrator));
        // A limit that was changed meanwhile is the administrator's.
        let changed = merge(wanted(10, 11), Values { max: Bytes::gib(9), ..applied.set }, Some(&applied));
        assert_eq!((changed.set.max, changed.administrator.max), (Bytes::gib(9), Bytes::gib(9)));
    }

    #[test]
    fn limits_that_were_chosen_and_never_set_are_no_trap() {
        let limited = Values { max: Bytes::gib(30), ..NONE };
        let first = merge(wanted(10, 11), limited, None);
        // The daemon ended between remembering the second and setting it: the first still stand.
        let second = merge(wanted(20, 21), first.set, Some(&first));
        let third = merge(wanted(40, 41), first.set, Some(&second));
        assert_eq!((third.set.max, third.administrator), (Bytes::gib(30), limited));
        // The same before anything was ever set.
        assert_eq!(administrators(limited, Some(&first)), limited);
    }

    #[test]
    fn no_swap_limit_leaves_the_administrators() {
        let limits = Limits { swap_max: None, ..wanted(1, 2) };
        let limited = Values { swap_max: Bytes::gib(4), ..NONE };
        let applied = merge(limits, limited, None);
        assert_eq!(applied.set.swap_max, Bytes::gib(4));
        // What we once set ourselves is taken back.
        let ours = merge(wanted(1, 2), limited, None);
        assert_eq!(merge(limits, ours.set, Some(&ours)).set.swap_max, Bytes::gib(4));
    }

    #[test]
    fn what_is_in_use_is_not_cut_off() {
        let applied = merge(wanted(10, 11), NONE, None).above(Bytes::gib(15));
        assert_eq!((applied.set.high, applied.set.max), (Bytes::gib(15), Bytes::gib(15)));
        let limited = Values { max: Bytes::gib(12), ..NONE };
        assert_eq!(merge(wanted(10, 11), limited, None).above(Bytes::gib(15)).set.max, Bytes::gib(12));
    }
}

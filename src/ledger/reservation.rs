//! A reservation: memory promised to one holder, from the moment of the decision until its
//! processes are gone.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::footprint::{Footprint, Mapped};
use super::machine::Measured;
use crate::bytes::Bytes;

/// Where in its life the holder of a reservation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Admitted; room is being made for it.
    Preparing,
    /// Its engine is loading.
    Loading,
    /// It answers.
    Running,
    /// It is being stopped; its bytes count until they have come back.
    Stopping,
}

/// What figures rest on beyond the estimate.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Basis {
    /// The same for the same files and settings of the same program, and different for others; empty where
    /// they aren't known.
    pub key: String,
    /// The program's version as it says it; empty where it was not asked.
    pub engine: String,
    /// By how much the engine's own fit tool is above the estimate. The figures have it in.
    pub opinion_bytes: Bytes,
    /// By how much an earlier run was measured to take more than that. The figures have it in.
    pub measured_bytes: Bytes,
}

impl Basis {
    /// Whether the estimate counts alone.
    #[must_use]
    pub fn is_estimate(&self) -> bool {
        self.opinion_bytes.is_zero() && self.measured_bytes.is_zero()
    }
}

/// For people, to stand behind the bytes that it is about; nothing where the estimate counts alone.
impl fmt::Display for Basis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (opinion, measured) = (self.opinion_bytes, self.measured_bytes);
        match (opinion.is_zero(), measured.is_zero()) {
            (true, true) => Ok(()),
            (false, true) => write!(f, " ({opinion} of it because llama-fit-params says so)"),
            (true, false) => write!(f, " ({measured} of it because an earlier run took it)"),
            (false, false) => write!(
                f,
                " ({opinion} of it because llama-fit-params says so, {measured} because an earlier run took it)"
            ),
        }
    }
}

/// What one holder is promised and what it holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Reservation {
    /// Phase of life.
    pub phase: Phase,
    /// Admission priority, 0 to 100.
    pub priority: u8,
    /// Never evicted for another model.
    pub pinned: bool,
    /// Context length, all slots together; tokens.
    pub context: u64,
    /// What the estimate says, and what it was corrected by.
    pub predicted: Footprint,
    /// What `predicted` rests on.
    #[serde(default)]
    pub basis: Basis,
    /// What was read last.
    #[serde(default)]
    pub measured: Measured,
    /// The unit's InvocationID that it was given to.
    pub invocation: String,
    /// When it was last known to serve a request, or became ready; milliseconds since boot.
    pub last_used: u64,
    /// Stop after this long without a request; milliseconds.
    pub ttl: Option<u64>,
    /// What loading it again would read from disk.
    pub reload: Bytes,
    /// How long it may take to finish its requests before it is stopped for another; milliseconds.
    #[serde(default)]
    pub drain: u64,
    /// Its anonymous memory may be swapped out.
    #[serde(default)]
    pub may_swap: bool,
    /// It runs with part of its mapped weights left on disk.
    #[serde(default)]
    pub streams: bool,
    /// How far its files are read ahead; zero: as the disk has it.
    #[serde(default)]
    pub read_ahead: Bytes,
    /// Since when it answers; milliseconds since boot.
    #[serde(default)]
    pub ready: u64,
}

impl Reservation {
    /// Whether it may still take, as fast as a disk reads, what it was promised: it loads, or was told to stop before it
    /// answered, which an engine heeds late.
    #[must_use]
    pub fn loads(&self) -> bool {
        self.phase == Phase::Loading || (self.phase == Phase::Stopping && self.ready == 0)
    }

    /// What it counts for: the greater of predicted and measured, class by class.
    #[must_use]
    pub fn held(&self) -> Footprint {
        let gpus = (0..self.predicted.gpus.len().max(self.measured.gpus.len()))
            .map(|n| {
                let of = |list: &[Bytes]| list.get(n).copied().unwrap_or_default();
                of(&self.predicted.gpus).max(of(&self.measured.gpus))
            })
            .collect();
        let mapped: Vec<Mapped> = self.predicted.mapped.clone();
        let anonymous = self.measured.private + self.measured.swapped;
        let locked_beyond = self.measured.locked_file - self.predicted.mapped_bytes();
        Footprint {
            private: self.predicted.private.max(anonymous - self.predicted.swapped) + locked_beyond,
            swapped: self.predicted.swapped,
            mapped,
            gpus,
        }
    }

    /// Whether it was idle past its time to live at `now` (milliseconds since boot).
    #[must_use]
    pub fn expired(&self, now: u64) -> bool {
        self.phase == Phase::Running && self.ttl.is_some_and(|ttl| now.saturating_sub(self.last_used) >= ttl)
    }
}

#[cfg(test)]
impl Reservation {
    /// A running reservation of priority 50, for tests.
    pub(crate) fn for_test(predicted: Footprint) -> Self {
        Self {
            phase: Phase::Running,
            priority: 50,
            pinned: false,
            context: 4096,
            predicted,
            basis: Basis::default(),
            measured: Measured::default(),
            invocation: "i".into(),
            last_used: 0,
            ttl: None,
            reload: Bytes::ZERO,
            drain: 0,
            may_swap: false,
            streams: false,
            read_ahead: Bytes::ZERO,
            ready: 0,
        }
    }
}

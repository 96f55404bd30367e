//! The record of a decision: what the journal, `plimsoll explain` and the bus show of it.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::plan::Step;
use super::refusal::Refusal;
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::{Basis, Pool};

/// What was decided, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It fits as things are.
    Fits,
    /// It fits after the steps named.
    FitsAfter,
    /// It fits with part of it in swap.
    FitsWithSwap,
    /// Its mapped weights are larger than what stays resident; it runs from disk.
    Streams,
    /// It does not fit.
    Refused,
    /// Its size is unknown; treated as refused.
    Unknown,
}

impl Verdict {
    /// That of a model which is admitted after these steps.
    #[must_use]
    pub fn after(steps: &[Step]) -> Self {
        match steps {
            [] => Self::Fits,
            steps if steps.iter().any(|step| matches!(step, Step::Stream { .. })) => Self::Streams,
            steps if steps.iter().any(|step| matches!(step, Step::Swap { .. })) => Self::FitsWithSwap,
            _ => Self::FitsAfter,
        }
    }
}

/// What happened to a model because of a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Admitted.
    Admit,
    /// Refused.
    Refuse,
    /// It waits for others.
    Wait,
    /// Stopped for another model.
    Evict,
    /// Stopped at the end of its time to live.
    Expire,
    /// Started again after an eviction.
    Restore,
    /// Memory that a stopped model did not give back.
    Quarantine,
    /// Something was done, or would have been, to keep the machine afloat.
    Relieve,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 8] = [
        Self::Admit,
        Self::Refuse,
        Self::Wait,
        Self::Evict,
        Self::Expire,
        Self::Restore,
        Self::Quarantine,
        Self::Relieve,
    ];
}

/// The arithmetic of a request in one pool, as it was when it was first weighed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// `memory`, a GPU's name, or `llm.slice`.
    pub name: String,
    /// Its size.
    pub total_bytes: Bytes,
    /// What of it may be promised in all: less the reserve, and less what the system uses.
    pub room_bytes: Bytes,
    /// What others were promised of it.
    pub held_bytes: Bytes,
    /// What is asked of it in addition to that.
    pub needed_bytes: Bytes,
    /// What was left of it.
    pub free_bytes: Bytes,
    /// What was missing in it.
    pub short_bytes: Bytes,
}

/// How short memory is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Not at all.
    #[default]
    Calm,
    /// The reserve is being used up: what does no harm is done.
    Attention,
    /// Half of it is gone: models are stopped.
    Act,
    /// The machine itself is in danger.
    Critical,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Calm => "calm",
            Self::Attention => "attention",
            Self::Act => "act",
            Self::Critical => "critical",
        })
    }
}

/// What is done to keep the machine afloat, least harm first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rescue {
    /// Cold page cache is dropped.
    DropCache,
    /// Memory is taken back from an idle model that may swap.
    Reclaim,
    /// A swapfile is made for models that may swap.
    AddSwap,
    /// A model idle past its ttl is stopped.
    Expire,
    /// A model is stopped.
    Stop,
    /// A model is killed.
    Kill,
    /// Nothing that models could give back would help.
    Nothing,
}

/// The numbers of what is done to keep the machine afloat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Relief {
    /// What is done.
    pub rescue: Rescue,
    /// How short memory was.
    pub level: Level,
    /// Which memory.
    pub pool: Pool,
    /// How much of it was left, without what running models would read from disk again.
    pub headroom_bytes: Bytes,
    /// How fast it went down, beyond what models were promised, as far as that could be taken to go on; bytes per second.
    pub falling_bytes: Bytes,
    /// What would have been enough.
    pub needed_bytes: Bytes,
    /// What was expected to come back.
    pub expected_bytes: Bytes,
    /// What has come back; none while that is not known.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub gained_bytes: Option<Bytes>,
}

/// A decision and its numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// What was done.
    pub kind: Kind,
    /// To whom; none where it is about the machine.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub instance: Option<Instance>,
    /// For whom, where one model had to go for another.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub for_instance: Option<Instance>,
    /// In one word.
    pub verdict: Verdict,
    /// Milliseconds since boot.
    pub at_msec: u64,
    /// Context length; tokens.
    pub context: u64,
    /// The bytes that it was about: needed, freed, or missing.
    pub bytes: Bytes,
    /// What the bytes rest on.
    #[serde(skip_serializing_if = "Basis::is_estimate", default)]
    pub basis: Basis,
    /// What was done first.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub steps: Vec<Step>,
    /// The numbers of a refusal.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub refusal: Option<Box<Refusal>>,
    /// The numbers of what was done to keep the machine afloat.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub relief: Option<Relief>,
    /// The arithmetic of an admission or a refusal, pool by pool.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub pools: Vec<Account>,
    /// Only observed: what would have been done was not.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub observed: bool,
    /// One line for people.
    pub text: String,
}

impl Decision {
    /// One without numbers yet: of nothing, for nobody.
    #[must_use]
    pub fn of(
        kind: Kind,
        instance: impl Into<Option<Instance>>,
        verdict: Verdict,
        at_msec: u64,
        text: String,
    ) -> Self {
        Self {
            kind,
            instance: instance.into(),
            for_instance: None,
            verdict,
            at_msec,
            context: 0,
            bytes: Bytes::ZERO,
            basis: Basis::default(),
            steps: Vec::new(),
            refusal: None,
            relief: None,
            pools: Vec::new(),
            observed: false,
            text,
        }
    }
}

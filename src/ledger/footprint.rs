//! What a model will take, in the classes that behave differently.

use serde::{Deserialize, Serialize};

use super::machine::FileId;
use crate::bytes::Bytes;

/// The bytes that a model (or anything that holds a reservation) takes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Footprint {
    /// Host memory that can't be given back while it runs: anonymous weights, KV cache, state,
    /// buffers, prompt cache, runtime.
    pub private: Bytes,
    /// Weights that stay pages of their files, per file; charged once however many share them.
    #[serde(default)]
    pub mapped: Vec<Mapped>,
    /// Host memory that is planned to be in swap, beyond `private`.
    #[serde(default)]
    pub swapped: Bytes,
    /// Bytes on each GPU, in the order of `Machine::gpus`; may be shorter.
    #[serde(default)]
    pub gpus: Vec<Bytes>,
}

/// Mapped weights of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapped {
    /// The file.
    pub file: FileId,
    /// How many of its bytes the model wants resident.
    pub bytes: Bytes,
}

impl Footprint {
    /// Everything together, mapped weights and what is swapped included.
    #[must_use]
    pub fn total(&self) -> Bytes {
        self.private + self.swapped + self.mapped_bytes() + self.gpus.iter().copied().sum()
    }

    /// The same with only so many of the mapped bytes resident, each file in proportion.
    #[must_use]
    pub fn resident(&self, bytes: Bytes) -> Self {
        let all = self.mapped_bytes();
        let share = |m: &Mapped| Mapped { bytes: m.bytes.mul_div(bytes.min(all).0, all.0.max(1)), ..*m };
        Self { mapped: self.mapped.iter().map(share).collect(), ..self.clone() }
    }

    /// The same with so much of the private memory in swap.
    #[must_use]
    pub fn swapping(&self, bytes: Bytes) -> Self {
        let bytes = bytes.min(self.private);
        Self { private: self.private - bytes, swapped: self.swapped + bytes, ..self.clone() }
    }

    /// Mapped weights of all files.
    #[must_use]
    pub fn mapped_bytes(&self) -> Bytes {
        self.mapped.iter().map(|m| m.bytes).sum()
    }
}

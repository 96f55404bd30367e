//! Models by name, before they are downloaded: hyperparameters from public configurations, and published sizes.
//!
//! An [`Entry`] together with one of its [`File`]s becomes a [`Model`] as if its header had been read, so that
//! there is one way only to an estimate. The data (`data/*.toml`) name the source of each figure; a model that was
//! never published says so, and is marked as assumed.

mod data;
mod keys;
mod mix;
mod rules;
mod tensors;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::OnceLock;

use crate::config;
use crate::gguf::{Header, Identity, Model, ModelError, Tensor, Value};

pub use data::{Entry, File, Status};

use data::Data;

/// Bytes of a header for each token of the vocabulary: its text, length, type and merge.
const HEADER_PER_TOKEN: u64 = 40;

/// Why the catalogue has no answer. Each is one sentence.
#[derive(Debug, thiserror::Error)]
pub enum CatalogueError {
    /// No model of that name.
    #[error("the catalogue has no model '{name}'{}", near.as_ref().map(|n| format!("; did you mean {n}?")).unwrap_or_default())]
    NoModel {
        /// What was asked for.
        name: String,
        /// A name that is near.
        near: Option<String>,
    },
    /// The model is there, but not in that quantisation.
    #[error("the catalogue has no {quantisation} of {model}; it has {}", has.join(", "))]
    NoQuantisation {
        /// The model.
        model: String,
        /// What was asked for.
        quantisation: String,
        /// What there is.
        has: Vec<String>,
    },
    /// There is nothing to estimate.
    #[error("{model} can't be estimated: {why}")]
    NotEstimable {
        /// The model.
        model: String,
        /// Why.
        why: String,
    },
    /// The data that is built in is wrong: a defect of this program.
    #[error("the catalogue's data is wrong: {0}")]
    Data(String),
    /// The model that was made up is none: a defect of this program.
    #[error("the catalogue's model is wrong: {0}")]
    Model(#[from] ModelError),
}

/// A model of the catalogue in one quantisation.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// The model.
    pub entry: &'static Entry,
    /// The quantisation.
    pub file: &'static File,
}

/// All models, in the order of the data.
///
/// # Errors
/// The data is wrong, which a test rules out.
pub fn entries() -> Result<&'static [Entry], CatalogueError> {
    Ok(&data()?.entries)
}

fn data() -> Result<&'static Data, CatalogueError> {
    static DATA: OnceLock<Result<Data, String>> = OnceLock::new();
    DATA.get_or_init(Data::load).as_ref().map_err(|what| CatalogueError::Data(what.clone()))
}

/// Finds `MODEL:QUANTISATION`, whatever its case and punctuation; `MODEL` alone is its first file. Names as
/// llama-server's `-hf` takes them (`unsloth/DeepSeek-V3.1-GGUF:UD-TQ1_0`) are found as well.
///
/// # Errors
/// There is none; says what is near.
pub fn find(name: &str) -> Result<Choice, CatalogueError> {
    let (model, quantisation) = match name.split_once(':') {
        Some((model, quantisation)) => (model, Some(quantisation.trim()).filter(|q| !q.is_empty())),
        None => (name, None),
    };
    let entry = entry(model)?;
    let file = match quantisation {
        None => entry.files.first(),
        Some(wanted) => entry.files.iter().find(|file| file.is(wanted)),
    };
    match file {
        Some(file) => Ok(Choice { entry, file }),
        None if entry.files.is_empty() => Err(CatalogueError::NotEstimable {
            model: entry.title.clone(),
            why: entry.note.clone().unwrap_or_default(),
        }),
        None => Err(CatalogueError::NoQuantisation {
            model: entry.name.clone(),
            quantisation: quantisation.unwrap_or_default().to_owned(),
            has: entry.files.iter().map(|f| f.name.clone()).collect(),
        }),
    }
}

/// Finds a model, whatever its name's case and punctuation.
///
/// # Errors
/// There is none; says what is near.
pub fn entry(name: &str) -> Result<&'static Entry, CatalogueError> {
    let entries = entries()?;
    let wanted = plain(name.rsplit('/').next().unwrap_or(name));
    let wanted = wanted.strip_suffix("gguf").unwrap_or(&wanted);
    let named = |entry: &&Entry| entry.names().any(|n| plain(n) == wanted);
    entries.iter().find(named).ok_or_else(|| {
        let all = entries.iter().flat_map(Entry::names);
        let near = config::nearest(&name.to_lowercase(), all).map(str::to_owned);
        CatalogueError::NoModel { name: name.to_owned(), near }
    })
}

/// A name's letters and digits, in lower case.
fn plain(name: &str) -> String {
    name.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
}

impl Choice {
    /// `MODEL:QUANTISATION`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}:{}", self.entry.name, self.file.name)
    }

    /// Whether the model or the file was never published, or its size is that of something near.
    #[must_use]
    pub fn is_assumed(&self) -> bool {
        self.entry.status == Status::Assumed || self.file.assumed
    }

    /// Whether every tensor's type follows from the name, so that the weights are exact. Mixtures are a
    /// publisher's choice, which only the header of the file tells.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        !self.is_assumed() && !self.file.is_mixed()
    }

    /// Where the figures come from, one sentence each.
    #[must_use]
    pub fn provenance(&self) -> Vec<String> {
        let mut notes = vec![match self.is_assumed() {
            false => "from the catalogue, not from a file".to_owned(),
            true => "assumed: from the catalogue, not from a file".to_owned(),
        }];
        notes.push(format!("hyperparameters: {}", self.entry.source));
        notes.extend(self.entry.parameters.as_ref().map(|count| format!("published parameters: {count}")));
        notes.push(format!("types and size: {}", self.file.source()));
        notes.extend(self.entry.note.clone());
        notes.extend(self.file.note.clone());
        notes
    }

    /// The model, as if its header had been read.
    ///
    /// # Errors
    /// A defect of the data, which a test rules out.
    pub fn model(&self) -> Result<Model, CatalogueError> {
        let (entry, file) = (self.entry, self.file);
        let wrong = |what: String| CatalogueError::Data(format!("{}: {what}", self.name()));
        let keys = keys::Keys::from_toml(&entry.keys).map_err(wrong)?;
        let tensors = tensors::tensors(&entry.architecture, &keys, entry.tied, entry.rope_freqs)
            .ok_or_else(|| wrong(format!("no tensors are known of {}", entry.architecture)))?;
        let vocabulary = keys.get("vocab_size").unwrap_or(0);
        let data_offset = vocabulary.saturating_mul(HEADER_PER_TOKEN).next_multiple_of(32);
        let target = file.size.as_ref().map(|size| size.bytes.saturating_sub(data_offset));
        let types = if file.by_rule() {
            rules::types(&file.name, &entry.architecture, &keys, entry.tied, &tensors)
                .ok_or_else(|| wrong("there is no rule for it".to_owned()))?
        } else {
            data()?.mix(file).map_err(wrong)?.types(&tensors, target)
        };
        let mut offset = 0_u64;
        let tensors: Vec<Tensor> = tensors
            .into_iter()
            .zip(types)
            .map(|(blank, kind)| {
                let bytes = mix::size(&blank, kind);
                let at = offset;
                offset = offset.saturating_add(bytes.next_multiple_of(32));
                Tensor { name: blank.name, dims: blank.dims, kind, offset: at, bytes, shard: 0 }
            })
            .collect();
        let mut metadata: BTreeMap<String, Value> =
            keys.0.into_iter().map(|(key, value)| (format!("{}.{key}", entry.architecture), value)).collect();
        for (key, value) in [
            ("general.architecture", entry.architecture.clone()),
            ("general.type", "model".to_owned()),
            ("general.name", format!("{} {}", entry.title, file.title())),
        ] {
            metadata.insert(key.to_owned(), Value::Text(value));
        }
        let header = Header { version: 3, metadata, tensors, data_offset, alignment: 32 };
        let identity = Identity::of_name(&self.name(), header.file_length());
        Ok(Model::from_headers(vec![(PathBuf::from(self.name()), identity, header)])?)
    }
}

#[cfg(test)]
mod tests;

//! The catalogue's data as it is written, and its checks.

use serde::Deserialize;

use super::mix::Mix;
use super::plain;
use crate::bytes::Bytes;
use crate::gguf::TensorType;

/// The files that are built in.
const FILES: &[(&str, &str)] = &[
    ("glm.toml", include_str!("data/glm.toml")),
    ("qwen.toml", include_str!("data/qwen.toml")),
    ("openai.toml", include_str!("data/openai.toml")),
    ("deepseek.toml", include_str!("data/deepseek.toml")),
    ("minimax.toml", include_str!("data/minimax.toml")),
    ("llama.toml", include_str!("data/llama.toml")),
    ("mistral.toml", include_str!("data/mistral.toml")),
    ("others.toml", include_str!("data/others.toml")),
];
const MIXES: &str = include_str!("data/mixes.toml");

/// Where a figure comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// The model or file is public.
    #[default]
    Published,
    /// It was never published: the figures are those of something near.
    Assumed,
}

/// A model.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Entry {
    /// The name to ask for.
    pub name: String,
    /// What its publisher calls it.
    pub title: String,
    /// Other names to ask for.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// `general.architecture` of its files.
    pub architecture: String,
    /// Whether there is such a model.
    #[serde(default)]
    pub status: Status,
    /// What one should know of it, in a sentence.
    pub note: Option<String>,
    /// Where the hyperparameters come from.
    pub source: String,
    /// How many parameters it has, as published with it: all digits, or rounded as in `31.6B`.
    pub parameters: Option<String>,
    /// The output is the embedding.
    #[serde(default)]
    pub tied: bool,
    /// Files have a table of rotary frequencies.
    #[serde(default)]
    pub rope_freqs: bool,
    /// Hyperparameters by the keys of model files, without the architecture.
    pub(super) keys: toml::Table,
    /// Its quantisations, the usual one first.
    #[serde(default)]
    pub files: Vec<File>,
}

impl Entry {
    /// Its name and its other names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&self.name).chain(&self.aliases).map(String::as_str)
    }
}

/// A quantisation of a model.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct File {
    /// Its name, such as `q8_0`.
    pub name: String,
    /// Other names to ask for.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// The mixture of types; the type of the same name where there is none, and the rule of llama.cpp's
    /// quantiser where it is `rule`.
    mix: Option<String>,
    /// The published size of all files together.
    pub size: Option<Size>,
    /// Where the size comes from.
    source: Option<String>,
    /// The size is that of something near, or there is no such file.
    #[serde(default)]
    pub assumed: bool,
    /// What one should know of it, in a sentence.
    pub note: Option<String>,
}

impl File {
    /// Whether it is meant by `name`; publishers' marks before it (`UD-`) don't count.
    pub(super) fn is(&self, name: &str) -> bool {
        let wanted = plain(name);
        let wanted = wanted.strip_prefix("ud").unwrap_or(&wanted);
        std::iter::once(&self.name).chain(&self.aliases).any(|n| plain(n) == wanted)
    }

    /// Its name as publishers write it.
    #[must_use]
    pub fn title(&self) -> String {
        self.name.to_uppercase()
    }

    /// Whether its tensors have several types.
    pub(super) fn is_mixed(&self) -> bool {
        self.mix.is_some()
    }

    /// Whether its types follow the rule of llama.cpp's quantiser.
    pub(super) fn by_rule(&self) -> bool {
        self.mix.as_deref() == Some("rule")
    }

    /// Where its types and size come from.
    #[must_use]
    pub fn source(&self) -> String {
        let types = match &self.mix {
            None => format!("every matrix in {}, as the name says", self.name),
            Some(_) if self.by_rule() => {
                "types by the rule of llama.cpp's quantiser for this name".to_owned()
            }
            Some(_) if self.size.is_some() => "types chosen by the size".to_owned(),
            Some(_) => "experts in mxfp4, all else as the name says".to_owned(),
        };
        match (&self.size, &self.source) {
            (Some(size), Some(source)) => format!("{types}; {} ({source})", size.text),
            (Some(size), None) => format!("{types}; {}", size.text),
            (None, Some(source)) => format!("{types}; {source}"),
            (None, None) => types,
        }
    }
}

/// A size as it was published, with what its rounding leaves open.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Size {
    /// As it was published: `31.84GB`.
    pub text: String,
    /// The same in bytes.
    pub bytes: u64,
    /// How far the real size may be from it.
    pub rounding: u64,
}

impl TryFrom<String> for Size {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let bytes: Bytes = text.parse().map_err(|e: crate::bytes::ParseBytesError| e.to_string())?;
        let (number, unit): (_, u64) = match (text.strip_suffix("GiB"), text.strip_suffix("GB")) {
            (Some(number), _) => (number, 1 << 30),
            (_, Some(number)) => (number, 1_000_000_000),
            _ => return Err(format!("'{text}' is neither GB nor GiB")),
        };
        let decimals = number.split_once('.').map_or(0, |(_, d)| d.len());
        let rounding = (0..decimals).fold(unit, |n, _| n / 10) / 2;
        Ok(Self { bytes: bytes.0, rounding, text })
    }
}

/// One of the files as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    model: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenMixes {
    mix: Vec<Mix>,
}

/// All of it.
#[derive(Debug)]
pub struct Data {
    /// The models.
    pub entries: Vec<Entry>,
    mixes: Vec<Mix>,
}

impl Data {
    /// Reads what is built in.
    pub fn load() -> Result<Self, String> {
        let mixes: WrittenMixes = toml::from_str(MIXES).map_err(|e| format!("mixes.toml: {e}"))?;
        let mut data = Self { entries: Vec::new(), mixes: mixes.mix };
        for (name, text) in FILES {
            let written: Written = toml::from_str(text).map_err(|e| format!("{name}: {e}"))?;
            data.entries.extend(written.model);
        }
        Ok(data)
    }

    /// The mixture of types of a file.
    pub fn mix(&self, file: &File) -> Result<Mix, String> {
        let Some(name) = &file.mix else {
            let kind = TensorType::ALL.iter().find(|t| t.name().eq_ignore_ascii_case(&file.name));
            return kind.map(|t| Mix::uniform(*t)).ok_or_else(|| format!("there is no type {}", file.name));
        };
        let found = self.mixes.iter().find(|m| m.name == *name).cloned();
        found.ok_or_else(|| format!("there is no mixture {name}"))
    }
}

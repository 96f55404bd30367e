//! Names of models and of the units that run them.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::problem::quoted;

/// The name of a configured model: `[A-Za-z0-9][A-Za-z0-9_.-]{0,62}`, or that of a unit of somebody else, which ends in
/// `.service`.
///
/// The alphabet is what systemd takes in an instance name as it stands, so that a unit's name
/// never needs escaping.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelName(String);

/// What a text that means a lease begins with; no model's name has a colon.
const LEASE: &str = "lease:";

/// How the names of units of others end; no model is called so.
const FOREIGN: &str = ".service";

/// A running copy of a model: `NAME`, or `NAME@2` for the second one. Or something else that holds memory like one, a
/// lease of that name: `lease:NAME`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instance {
    /// The configured model.
    pub model: ModelName,
    /// 1 for `NAME`, n for `NAME@n`; at most 99.
    pub number: u8,
    /// A lease, not a model.
    pub lease: bool,
}

/// Why a text is not the name of a model or an instance.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Characters or length outside of the alphabet.
    #[error(
        "{0} can't be a model's name: use up to 63 letters, digits, '-', '_' and '.', beginning with a letter or a digit"
    )]
    Model(String),
    /// No name that a service can have.
    #[error("{0} can't be the name of a service")]
    Unit(String),
    /// What stands after the `@` is not 2 to 99.
    #[error("{0} is not an instance: after '@' stands its number, 2 to 99, as in NAME@2")]
    Number(String),
}

impl ModelName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is the name of a unit of somebody else, and of no model.
    #[must_use]
    pub fn is_foreign(&self) -> bool {
        self.0.ends_with(FOREIGN)
    }
}

impl FromStr for ModelName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let plain = |c: char| c.is_ascii_alphanumeric();
        let allowed = text.starts_with(plain)
            && text.len() <= 63
            && text.chars().all(|c| plain(c) || matches!(c, '-' | '_' | '.'));
        if text.ends_with(FOREIGN) {
            return foreign(text);
        }
        if allowed { Ok(Self(text.to_owned())) } else { Err(NameError::Model(quoted(text))) }
    }
}

/// The name of a service, by systemd's alphabet for names of units.
fn foreign(text: &str) -> Result<ModelName, NameError> {
    let name = text.strip_suffix(FOREIGN).unwrap_or_default();
    let allowed = name.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && text.len() <= 255
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b":-_.\\@".contains(&b));
    if allowed { Ok(ModelName(text.to_owned())) } else { Err(NameError::Unit(quoted(text))) }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// So that maps by name can be asked with a text.
impl Borrow<str> for ModelName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl Instance {
    /// The first (normally the only) instance of a model.
    #[must_use]
    pub fn first(model: ModelName) -> Self {
        Self { model, number: 1, lease: false }
    }

    /// A lease.
    #[must_use]
    pub fn lease(name: ModelName, number: u8) -> Self {
        Self { model: name, number, lease: true }
    }

    /// Whether it is a unit of somebody else that was adopted: counted and stopped like a model, and no model.
    #[must_use]
    pub fn is_foreign(&self) -> bool {
        !self.lease && self.model.is_foreign()
    }

    /// Its systemd unit.
    #[must_use]
    pub fn unit(&self) -> String {
        if self.is_foreign() { self.model.0.clone() } else { format!("llm@{self}.service") }
    }

    /// The instance that a systemd unit runs, if it is one of ours.
    #[must_use]
    pub fn from_unit(unit: &str) -> Option<Self> {
        let instance: Self = unit.strip_prefix("llm@")?.strip_suffix(FOREIGN)?.parse().ok()?;
        Some(instance).filter(|instance| !instance.lease && !instance.is_foreign())
    }

    /// The port at which it serves when the first instance of its model serves at `first`; none
    /// past the last port.
    #[must_use]
    pub fn port(&self, first: u16) -> Option<u16> {
        first.checked_add(u16::from(self.number.saturating_sub(1)))
    }
}

impl From<ModelName> for Instance {
    fn from(model: ModelName) -> Self {
        Self::first(model)
    }
}

impl FromStr for Instance {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let (text, lease) = text.strip_prefix(LEASE).map_or((text, false), |name| (name, true));
        let numbered = text.split_once('@').filter(|_| !text.ends_with(FOREIGN));
        let Some((model, number)) = numbered else {
            return Ok(Self { model: text.parse()?, number: 1, lease });
        };
        let digits =
            !number.is_empty() && !number.starts_with('0') && number.bytes().all(|b| b.is_ascii_digit());
        match number.parse::<u8>() {
            Ok(number) if digits && (2..=99).contains(&number) => {
                Ok(Self { model: model.parse()?, number, lease })
            }
            _ => Err(NameError::Number(quoted(text))),
        }
    }
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.lease, self.number) {
            (false, 1) => f.pad(self.model.as_str()),
            (true, 1) => f.pad(&format!("{LEASE}{}", self.model)),
            (lease, number) => f.pad(&format!("{}{}@{number}", if lease { LEASE } else { "" }, self.model)),
        }
    }
}

macro_rules! serde_as_text {
    ($($name:ty),*) => {$(
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}
serde_as_text!(ModelName, Instance);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_units_go_both_ways() {
        for (text, unit) in [("deepseek-tq1", "llm@deepseek-tq1.service"), ("a.b_c@2", "llm@a.b_c@2.service")]
        {
            let instance: Instance = text.parse().unwrap();
            assert_eq!(instance.to_string(), text);
            assert_eq!(instance.unit(), unit);
            assert_eq!(Instance::from_unit(unit), Some(instance));
        }
    }

    #[test]
    fn a_lease_is_no_model_and_has_no_unit() {
        for text in ["lease:make", "lease:make@7"] {
            let lease: Instance = text.parse().unwrap();
            assert!(lease.lease);
            assert_eq!(lease.to_string(), text);
            assert_eq!(Instance::from_unit(&format!("llm@{text}.service")), None);
        }
        assert_ne!("lease:make".parse::<Instance>(), "make".parse());
        for text in ["lease:", "lease:lease:a", "lease:a@1", "a:b", "lease:a/b"] {
            assert!(text.parse::<Instance>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_unit_of_somebody_else_is_told_by_its_name() {
        for unit in ["ollama.service", "llama-server@gpu0.service", r"my\x2dquadlet.service"] {
            let instance: Instance = unit.parse().unwrap();
            assert!(instance.is_foreign());
            assert_eq!((instance.to_string(), instance.unit()), (unit.to_owned(), unit.to_owned()));
        }
        for text in [".service", "-x.service", "a/b.service", "a b.service", "ä.service", "%i.service"] {
            assert!(text.parse::<Instance>().is_err(), "{text:?}");
        }
        assert_eq!(Instance::from_unit("ollama.service"), None);
        assert_eq!(Instance::from_unit("llm@ollama.service.service"), None);
    }

    #[test]
    fn an_instance_serves_at_the_next_port() {
        let second: Instance = "a@2".parse().unwrap();
        assert_eq!(second.port(8080), Some(8081));
        assert_eq!(second.port(65535), None);
        assert_eq!(Instance::first(second.model).port(65535), Some(65535));
    }

    #[test]
    fn hostile_names_are_refused() {
        let long = "a".repeat(64);
        for text in [
            "", "-a", ".", "..", "a/b", "a b", "a@", "a@1", "a@02", "a@100", "a@2@3", "ä", "a\n", "%i", &long,
        ] {
            assert!(text.parse::<Instance>().is_err(), "{text:?}");
        }
        for unit in ["llm@.service", "llm@a.service.d", "ssh.service", "llm@a@x.service", "llm.slice"] {
            assert_eq!(Instance::from_unit(unit), None, "{unit}");
        }
    }
}

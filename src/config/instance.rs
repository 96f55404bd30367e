//! Names of models and of the units that run them.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::problem::quoted;

/// The name of a configured model: `[A-Za-z0-9][A-Za-z0-9_.-]{0,62}`.
///
/// The alphabet is what systemd takes in an instance name as it stands, so that a unit's name
/// never needs escaping.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelName(String);

/// What a text that means a lease begins with; no model's name has a colon.
const LEASE: &str = "lease:";

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
}

impl FromStr for ModelName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let plain = |c: char| c.is_ascii_alphanumeric();
        let allowed = text.starts_with(plain)
            && text.len() <= 63
            && text.chars().all(|c| plain(c) || matches!(c, '-' | '_' | '.'));
        if allowed { Ok(Self(text.to_owned())) } else { Err(NameError::Model(quoted(text))) }
    }
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

    /// Its systemd unit.
    #[must_use]
    pub fn unit(&self) -> String {
        format!("llm@{self}.service")
    }

    /// The instance that a systemd unit runs, if it is one of ours.
    #[must_use]
    pub fn from_unit(unit: &str) -> Option<Self> {
        let instance: Self = unit.strip_prefix("llm@")?.strip_suffix(".service")?.parse().ok()?;
        Some(instance).filter(|instance| !instance.lease)
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
        let Some((model, number)) = text.split_once('@') else {
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

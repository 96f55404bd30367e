//! Hyperparameters by the names that model files have for them.

use std::collections::BTreeMap;

use toml::Value as Toml;

use crate::gguf::{Array, Value};

/// Hyperparameters of a model, by key without the architecture's name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Keys(pub BTreeMap<String, Value>);

impl Keys {
    /// Flattens a TOML table: `attention = { head_count = 8 }` is `attention.head_count`.
    ///
    /// # Errors
    /// Names a key with a value that no model file would have.
    pub fn from_toml(table: &toml::Table) -> Result<Self, String> {
        let mut keys = Self::default();
        keys.flatten("", table)?;
        Ok(keys)
    }

    fn flatten(&mut self, prefix: &str, table: &toml::Table) -> Result<(), String> {
        for (name, value) in table {
            let key = format!("{prefix}{name}");
            let value = match value {
                Toml::Table(inner) => {
                    self.flatten(&format!("{key}."), inner)?;
                    continue;
                }
                Toml::Integer(n) => {
                    Value::Unsigned(u64::try_from(*n).map_err(|_| format!("{key} is negative"))?)
                }
                Toml::Float(x) => Value::Float(*x),
                Toml::Boolean(b) => Value::Bool(*b),
                Toml::String(s) => Value::Text(s.clone()),
                Toml::Array(list) => {
                    let numbers: Option<Vec<i64>> = list.iter().map(Toml::as_integer).collect();
                    let numbers = numbers.ok_or_else(|| format!("{key} is no list of integers"))?;
                    Value::Array(Array::Integers(numbers))
                }
                Toml::Datetime(_) => return Err(format!("{key} is a date")),
            };
            self.0.insert(key, value);
        }
        Ok(())
    }

    /// A number.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<u64> {
        self.0.get(key)?.as_u64()
    }

    /// A number of a layer: the same for all, or from a list.
    #[must_use]
    pub fn of_layer(&self, key: &str, layer: u64) -> u64 {
        let Some(value) = self.0.get(key) else { return 0 };
        let listed = || {
            let list = value.as_array()?.integers()?;
            u64::try_from(*list.get(usize::try_from(layer).ok()?)?).ok()
        };
        value.as_u64().or_else(listed).unwrap_or(0)
    }
}

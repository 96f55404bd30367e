//! Metadata values, with only as much kept of each as an estimate can need.

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// A floating-point number.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// A short text.
    Text(String),
    /// A text that was too long to keep (a chat template): its length in bytes.
    LongText(u64),
    /// A list.
    Array(Array),
}

/// A metadata list.
#[derive(Clone, Debug, PartialEq)]
pub enum Array {
    /// Integers of any width; unsigned ones above `i64::MAX` are held at that.
    Integers(Vec<i64>),
    /// Floating-point numbers.
    Floats(Vec<f64>),
    /// Truth values.
    Bools(Vec<bool>),
    /// A list that isn't kept: texts, everything of the tokenizer, and very long lists.
    Omitted {
        /// How many elements it has.
        len: u64,
    },
}

impl Array {
    /// How many elements the list has in the file.
    #[must_use]
    pub fn len(&self) -> u64 {
        let kept = match self {
            Self::Integers(v) => v.len(),
            Self::Floats(v) => v.len(),
            Self::Bools(v) => v.len(),
            Self::Omitted { len } => return *len,
        };
        u64::try_from(kept).unwrap_or(u64::MAX)
    }

    /// Whether the list has no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as integers (truth values count as 0 and 1), where they were kept.
    #[must_use]
    pub fn integers(&self) -> Option<Vec<i64>> {
        match self {
            Self::Integers(v) => Some(v.clone()),
            Self::Bools(v) => Some(v.iter().map(|&b| i64::from(b)).collect()),
            Self::Floats(_) | Self::Omitted { .. } => None,
        }
    }
}

impl Value {
    /// What it is, for messages.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Unsigned(_) | Self::Signed(_) => "an integer",
            Self::Float(_) => "a floating-point number",
            Self::Bool(_) => "a truth value",
            Self::Text(_) | Self::LongText(_) => "a text",
            Self::Array(_) => "a list",
        }
    }

    /// What it takes beside the value itself, in bytes.
    pub(super) fn kept_bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Array(Array::Integers(list)) => size_of_val(list.as_slice()),
            Self::Array(Array::Floats(list)) => size_of_val(list.as_slice()),
            Self::Array(Array::Bools(list)) => size_of_val(list.as_slice()),
            _ => 0,
        }
    }

    /// The value as a number that isn't negative.
    #[must_use]
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Unsigned(n) => Some(*n),
            Self::Signed(n) => u64::try_from(*n).ok(),
            Self::Bool(b) => Some(u64::from(*b)),
            _ => None,
        }
    }

    /// The value as a floating-point number.
    #[must_use]
    #[allow(clippy::cast_precision_loss)] // metadata integers are small; the figure is no size
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Float(x) => Some(*x),
            Self::Unsigned(n) => Some(*n as f64),
            Self::Signed(n) => Some(*n as f64),
            _ => None,
        }
    }

    /// The value as a text.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Text(s) => Some(s),
            _ => None,
        }
    }

    /// The value as a truth value.
    #[must_use]
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Bool(b) => Some(*b),
            _ => None,
        }
    }

    /// The value as a list.
    #[must_use]
    pub fn as_array(&self) -> Option<&Array> {
        match self {
            Self::Array(a) => Some(a),
            _ => None,
        }
    }
}

//! Sizes in bytes: one type for all of them, with checked arithmetic, parsing and display.
//!
//! People write sizes with binary units (`40GiB`, `40G`) or with decimal ones (`40GB`); programs
//! read plain bytes. [`Bytes`] prints GiB with one decimal, and `{:#}` prints plain bytes.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Mul, Sub, SubAssign};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number of bytes.
///
/// Addition and multiplication saturate at `u64::MAX` and subtraction at zero: a size that is
/// absurd stays absurd (and is refused as too large), and none wraps around to a small one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

/// One kibibyte (1024 bytes).
pub const KIB: u64 = 1 << 10;
/// One mebibyte (1024 KiB).
pub const MIB: u64 = 1 << 20;
/// One gibibyte (1024 MiB).
pub const GIB: u64 = 1 << 30;
/// One tebibyte (1024 GiB).
pub const TIB: u64 = 1 << 40;

impl Bytes {
    /// No bytes.
    pub const ZERO: Self = Self(0);
    /// The largest size that can be expressed.
    pub const MAX: Self = Self(u64::MAX);

    /// `n` mebibytes.
    #[must_use]
    pub const fn mib(n: u64) -> Self {
        Self(n.saturating_mul(MIB))
    }

    /// `n` gibibytes.
    #[must_use]
    pub const fn gib(n: u64) -> Self {
        Self(n.saturating_mul(GIB))
    }

    /// `self * num / den`, computed in 128 bits; zero when `den` is zero.
    #[must_use]
    pub fn mul_div(self, num: u64, den: u64) -> Self {
        if den == 0 {
            return Self::ZERO;
        }
        let wide = u128::from(self.0) * u128::from(num) / u128::from(den);
        Self(u64::try_from(wide).unwrap_or(u64::MAX))
    }

    /// `self` scaled by `per_mille` thousandths.
    #[must_use]
    pub fn per_mille(self, per_mille: u64) -> Self {
        self.mul_div(per_mille, 1000)
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }
}

impl Add for Bytes {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl AddAssign for Bytes {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sub for Bytes {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl SubAssign for Bytes {
    fn sub_assign(&mut self, other: Self) {
        *self = *self - other;
    }
}

impl Mul<u64> for Bytes {
    type Output = Self;
    fn mul(self, n: u64) -> Self {
        Self(self.0.saturating_mul(n))
    }
}

impl Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::ZERO, |a, b| a + b)
    }
}

/// GiB with one decimal (`13.4 GiB`); below a tenth of a GiB, MiB with one decimal (`44.0 MiB`);
/// with `{:#}`, plain bytes.
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if f.alternate() {
            return f.pad(&self.0.to_string());
        }
        let (unit, name) = if self.0 == 0 || self.0 >= GIB / 10 { (GIB, "GiB") } else { (MIB, "MiB") };
        let tenths = (u128::from(self.0) * 10 + u128::from(unit) / 2) / u128::from(unit);
        f.pad(&format!("{}.{} {name}", tenths / 10, tenths % 10))
    }
}

/// Why a text is not a size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseBytesError {
    /// No digits at the front.
    #[error("'{0}' is not a size: write a number with a unit, such as 40GiB, 512MiB or 16GB")]
    NotANumber(String),
    /// A unit that is none.
    #[error("'{unit}' is not a unit of size: use KiB, MiB, GiB, TiB (1024), or KB, MB, GB, TB (1000)")]
    Unit {
        /// The text that stood where a unit should.
        unit: String,
    },
    /// More bytes than 64 bits can count.
    #[error("'{0}' is too large to be a size")]
    TooLarge(String),
}

/// Reads `40GiB`, `40 GiB`, `40G`, `1.5TiB`, `40GB` (decimal) and plain bytes.
///
/// A single letter is binary, as in systemd and llama.cpp's documentation.
impl FromStr for Bytes {
    type Err = ParseBytesError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let trimmed = text.trim();
        let end = trimmed.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(trimmed.len());
        let (number, unit) = (&trimmed[..end], trimmed[end..].trim());
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || fraction.contains('.') || (number.contains('.') && fraction.is_empty()) {
            return Err(ParseBytesError::NotANumber(text.to_owned()));
        }
        let scale: u64 = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kib" => KIB,
            "m" | "mib" => MIB,
            "g" | "gib" => GIB,
            "t" | "tib" => TIB,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            _ => return Err(ParseBytesError::Unit { unit: unit.to_owned() }),
        };
        let too_large = || ParseBytesError::TooLarge(text.to_owned());
        let whole: u128 = whole.parse().map_err(|_| too_large())?;
        let mut value = whole.checked_mul(u128::from(scale)).ok_or_else(too_large)?;
        let mut place = u128::from(scale);
        for digit in fraction.bytes().take(15) {
            value += place * u128::from(digit - b'0') / 10;
            place /= 10;
        }
        u64::try_from(value).map(Self).map_err(|_| too_large())
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

/// From a plain number of bytes or from a text such as `40GiB`.
impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Bytes;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"40GiB\", or a number of bytes")
            }
            fn visit_u64<E>(self, n: u64) -> Result<Bytes, E> {
                Ok(Bytes(n))
            }
            fn visit_i64<E: serde::de::Error>(self, n: i64) -> Result<Bytes, E> {
                u64::try_from(n).map(Bytes).map_err(|_| E::custom("a size can't be negative"))
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Bytes, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_binary_and_decimal_units() {
        for (text, bytes) in [
            ("0", 0),
            ("123", 123),
            ("40GiB", 40 * GIB),
            ("40 gib", 40 * GIB),
            ("40G", 40 * GIB),
            ("40GB", 40_000_000_000),
            ("1.5TiB", TIB + TIB / 2),
            ("0.5k", 512),
            ("170GB", 170_000_000_000),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
    }

    #[test]
    fn refuses_what_is_no_size() {
        for text in [
            "",
            "GiB",
            "-1",
            "1.2.3GiB",
            "1.GiB",
            "40XB",
            "99999999999TiB",
            "999999999999999999999999999999999999999999",
        ] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
    }

    #[test]
    fn prints_gib_with_one_decimal() {
        assert_eq!(Bytes::gib(13).to_string(), "13.0 GiB");
        assert_eq!(Bytes(GIB * 134 / 10).to_string(), "13.4 GiB");
        assert_eq!(Bytes::mib(44).to_string(), "44.0 MiB");
        assert_eq!(Bytes::ZERO.to_string(), "0.0 GiB");
        assert_eq!(format!("{:#}", Bytes(5)), "5");
        assert_eq!(Bytes::MAX.to_string(), "17179869184.0 GiB");
    }

    #[test]
    fn arithmetic_saturates() {
        assert_eq!(Bytes(1) - Bytes(2), Bytes::ZERO);
        assert_eq!(Bytes::MAX + Bytes(1), Bytes::MAX);
        assert_eq!(Bytes::MAX.per_mille(2000), Bytes::MAX);
        assert_eq!(Bytes::gib(2).mul_div(1, 0), Bytes::ZERO);
    }
}

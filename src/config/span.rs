//! Time spans as systemd writes them: `90s`, `30min`, `1h 30min`, `2d`, `infinity`.

use std::time::Duration;

const SECOND: u64 = 1_000_000;

/// The units of systemd.time(7), in microseconds.
const UNITS: [(&[&str], u64); 9] = [
    (&["us", "usec", "µs", "μs"], 1),
    (&["ms", "msec"], 1_000),
    (&["", "s", "sec", "second", "seconds"], SECOND),
    (&["m", "min", "minute", "minutes"], 60 * SECOND),
    (&["h", "hr", "hour", "hours"], 3_600 * SECOND),
    (&["d", "day", "days"], 86_400 * SECOND),
    (&["w", "week", "weeks"], 604_800 * SECOND),
    (&["M", "month", "months"], 2_629_800 * SECOND),
    (&["y", "year", "years"], 31_557_600 * SECOND),
];

/// Reads a time span; a number without a unit is seconds, `infinity` is [`Duration::MAX`].
/// None when it is not one.
#[must_use]
pub fn parse(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    if rest == "infinity" {
        return Some(Duration::MAX);
    }
    if rest.is_empty() {
        return None;
    }
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let number_end = rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(rest.len());
        let (number, tail) = rest.split_at(number_end);
        let tail = tail.trim_start();
        let unit_end = tail.find(|c: char| !c.is_alphabetic()).unwrap_or(tail.len());
        let (unit, after) = tail.split_at(unit_end);
        total = total.checked_add(scaled(number, unit)?)?;
        rest = after.trim_start();
    }
    Some(Duration::from_micros(total))
}

/// `number` (perhaps with a fraction) of `unit`, in microseconds.
fn scaled(number: &str, unit: &str) -> Option<u64> {
    let (_, scale) = UNITS.iter().find(|(names, _)| names.contains(&unit))?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if fraction.is_empty() || !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let mut micros = whole.parse::<u64>().ok()?.checked_mul(*scale)?;
    let mut place = *scale;
    for digit in fraction.bytes().take(12) {
        place /= 10;
        micros = micros.checked_add(place * u64::from(digit - b'0'))?;
    }
    Some(micros)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_systemd_time_spans() {
        for (text, seconds) in [
            ("90s", 90),
            ("90", 90),
            ("30min", 1800),
            ("2h", 7200),
            ("1h 30min", 5400),
            ("1h30m", 5400),
            ("1.5h", 5400),
            ("2 days", 172_800),
            ("5m 30", 330),
            ("1w", 604_800),
        ] {
            assert_eq!(parse(text), Some(Duration::from_secs(seconds)), "{text}");
        }
        assert_eq!(parse("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(parse("infinity"), Some(Duration::MAX));
    }

    #[test]
    fn refuses_the_rest() {
        for text in ["", " ", "s", "-1s", "1.s", "1..2s", "1fortnight", "half an hour", "99999999999y"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}

//! The time of day where this machine is.

use nix::libc;

/// `2026-11-25 15:53:47` for seconds since 1970, in the machine's time zone (or `TZ`); `None` for a time that has no
/// date.
#[must_use]
pub fn local_time(seconds: i64) -> Option<String> {
    let mut parts = std::mem::MaybeUninit::<libc::tm>::zeroed();
    // SAFETY: both pointers are to values of ours that live for the call, and localtime_r keeps neither.
    let filled = unsafe { libc::localtime_r(&raw const seconds, parts.as_mut_ptr()) };
    if filled.is_null() {
        return None;
    }
    // SAFETY: all zeroes are a valid `tm`, and localtime_r has filled it in.
    let tm = unsafe { parts.assume_init() };
    let (year, month) = (i64::from(tm.tm_year) + 1900, tm.tm_mon + 1);
    Some(format!("{year}-{month:02}-{:02} {:02}:{:02}:{:02}", tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_reads_as_a_date() {
        // Whatever the zone of the machine that tests: within a day of it.
        let text = local_time(1_764_086_027).unwrap();
        assert!(text.starts_with("2025-11-2") && text.len() == 19, "{text}");
        assert_eq!(&text[16..], ":47");
        assert_eq!(local_time(i64::MAX), None);
    }
}

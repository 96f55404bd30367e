//! Which parts of a model's files are to be kept in memory while it streams: on its way from the daemon to
//! `plimsoll run`, as a variable that the engine never sees.

use crate::fit::FileRange;

/// The variable's name.
pub const VARIABLE: &str = "PLIMSOLL_KEEP";
/// What a variable may have at most; Linux takes 128 KiB (`MAX_ARG_STRLEN`). A hundred layers need a tenth of it.
const LONGEST: usize = 100 << 10;

/// The variable for `ranges`: `FILE:OFFSET+BYTES`, separated by spaces. None where there is nothing to keep, or more
/// pieces than go into a variable: what is kept so makes a model faster, and nothing else.
#[must_use]
pub fn variable(ranges: &[FileRange]) -> Option<(String, String)> {
    let text: Vec<String> = ranges.iter().map(|r| format!("{}:{}+{}", r.file, r.offset, r.bytes)).collect();
    let text = text.join(" ");
    (!text.is_empty() && text.len() <= LONGEST).then(|| (VARIABLE.to_owned(), text))
}

/// Reads the variable's value; what is none is left out.
#[must_use]
pub fn ranges(value: &str) -> Vec<FileRange> {
    let range = |word: &str| {
        let (file, rest) = word.split_once(':')?;
        let (offset, bytes) = rest.split_once('+')?;
        Some(FileRange { file: file.parse().ok()?, offset: offset.parse().ok()?, bytes: bytes.parse().ok()? })
    };
    value.split(' ').filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_arrives() {
        let sent = [
            FileRange { file: 0, offset: 4096, bytes: 17 },
            FileRange { file: 3, offset: u64::MAX, bytes: 0 },
        ];
        let (name, value) = variable(&sent).unwrap();
        assert_eq!((name.as_str(), value.as_str()), (VARIABLE, "0:4096+17 3:18446744073709551615+0"));
        assert_eq!(ranges(&value), sent);
        assert_eq!(variable(&[]), None);
        assert_eq!(variable(&vec![sent[1]; 10_000]), None, "too long for a variable");
    }

    #[test]
    fn what_is_no_range_is_left_out() {
        assert_eq!(ranges(""), []);
        assert_eq!(ranges("0:1 -1:2+3 0:x+1 1:2+3"), [FileRange { file: 1, offset: 2, bytes: 3 }]);
    }
}

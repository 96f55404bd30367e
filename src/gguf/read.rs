//! A reader that counts, and that trusts no length.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use super::error::HeaderError;
use crate::text::{REPLACEMENT, is_obeyed};

/// The most bytes that are read of one file: a vocabulary of 256k tokens takes about 12 MiB.
const MAX_HEADER: u64 = 64 << 20;
/// How much is read at once.
const CHUNK: usize = 64 << 10;

/// How many bytes of headers are kept: those of the largest real models (3000 tensors) take less than half a MiB.
const MAX_KEPT: u64 = 4 << 20;

/// How much may still be kept of headers, in bytes. One is for all files that are read together, so that many
/// can't add up.
#[derive(Debug)]
pub struct Allowance {
    left: u64,
}

impl Default for Allowance {
    fn default() -> Self {
        Self { left: MAX_KEPT }
    }
}

impl Allowance {
    /// Takes so many bytes; none where there are not as many left.
    pub(super) fn take(&mut self, bytes: usize) -> Option<()> {
        self.left = self.left.checked_sub(u64::try_from(bytes).ok()?)?;
        Some(())
    }
}

/// Reads a file by offset, so that a descriptor shared with others keeps its position.
pub(super) struct At<'a> {
    file: &'a File,
    offset: u64,
}

impl<'a> At<'a> {
    pub(super) fn start(file: &'a File) -> Self {
        Self { file, offset: 0 }
    }
}

impl Read for At<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buffer, self.offset)?;
        self.offset = self.offset.saturating_add(u64::try_from(n).unwrap_or(0));
        Ok(n)
    }
}

/// Little-endian values from a stream, with the position and a limit on all that is read.
pub(super) struct Reader<R> {
    inner: R,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// The offset in the file of what is read next.
    pub(super) offset: u64,
}

impl<R: Read> Reader<R> {
    pub(super) fn new(inner: R) -> Self {
        Self { inner, buffer: vec![0; CHUNK], start: 0, end: 0, offset: 0 }
    }

    /// Makes at least one byte available; false at the end of the file.
    fn fill(&mut self) -> Result<bool, HeaderError> {
        while self.start == self.end {
            if self.offset >= MAX_HEADER {
                return Err(HeaderError::TooLarge {
                    offset: self.offset,
                    what: "the header's length".to_owned(),
                    value: self.offset,
                    limit: MAX_HEADER,
                });
            }
            match self.inner.read(&mut self.buffer) {
                Ok(0) => return Ok(false),
                Ok(n) => (self.start, self.end) = (0, n),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(HeaderError::Io { offset: self.offset, source }),
            }
        }
        Ok(true)
    }

    fn advance(&mut self, n: usize) {
        self.start += n;
        self.offset += u64::try_from(n).unwrap_or(0);
    }

    /// Fills `out`; `what` is for the message when the file ends first.
    pub(super) fn exact(&mut self, out: &mut [u8], what: &str) -> Result<(), HeaderError> {
        let mut done = 0;
        while done < out.len() {
            if !self.fill()? {
                return Err(HeaderError::Truncated { offset: self.offset, what: what.to_owned() });
            }
            let n = (out.len() - done).min(self.end - self.start);
            out[done..done + n].copy_from_slice(&self.buffer[self.start..self.start + n]);
            self.advance(n);
            done += n;
        }
        Ok(())
    }

    /// Passes over `n` bytes.
    pub(super) fn skip(&mut self, n: u64, what: &str) -> Result<(), HeaderError> {
        let mut left = n;
        while left > 0 {
            if !self.fill()? {
                return Err(HeaderError::Truncated { offset: self.offset, what: what.to_owned() });
            }
            let have = self.end - self.start;
            let n = usize::try_from(left).unwrap_or(usize::MAX).min(have);
            self.advance(n);
            left -= u64::try_from(n).unwrap_or(left);
        }
        Ok(())
    }

    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], HeaderError> {
        let mut bytes = [0; N];
        // The common case: the whole value stands in the buffer.
        if self.end - self.start >= N {
            bytes.copy_from_slice(&self.buffer[self.start..self.start + N]);
            self.advance(N);
        } else {
            self.exact(&mut bytes, what)?;
        }
        Ok(bytes)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, HeaderError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, HeaderError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A length or count of at most `limit`.
    pub(super) fn count(&mut self, what: &str, limit: u64) -> Result<u64, HeaderError> {
        let offset = self.offset;
        let value = self.u64(what)?;
        if value > limit {
            return Err(HeaderError::TooLarge { offset, what: what.to_owned(), value, limit });
        }
        Ok(value)
    }

    /// A text of at most `limit` bytes, as it may be shown.
    pub(super) fn text(&mut self, what: &str, limit: u64) -> Result<String, HeaderError> {
        let len = self.count(&format!("the length of {what}"), limit)?;
        self.characters(what, len)
    }

    /// A text of `len` bytes, as it may be shown.
    pub(super) fn characters(&mut self, what: &str, len: u64) -> Result<String, HeaderError> {
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        self.exact(&mut bytes, what)?;
        Ok(harmless(bytes))
    }
}

/// A text of which everything is replaced that is no UTF-8, or that a terminal obeys instead of showing it: it ends
/// up in messages.
fn harmless(bytes: Vec<u8>) -> String {
    let text = String::from_utf8(bytes)
        .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned());
    if text.contains(is_obeyed) { text.replace(is_obeyed, REPLACEMENT) } else { text }
}

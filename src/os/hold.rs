//! Keeping parts of files in memory.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mlock, mmap};

use super::residency::page_size;

/// Reads a part of a file into memory and locks it there, until this process ends.
///
/// It is charged to this process's control group, unless another had it in the page cache before. Returns the bytes
/// locked: whole pages.
///
/// # Errors
/// EPERM, ENOMEM, EAGAIN: more than RLIMIT_MEMLOCK allows, or than there is memory; ENOMEM also where the file ends
/// before, or can't be read.
pub fn hold_range(file: &File, offset: u64, bytes: u64) -> io::Result<u64> {
    let too_large = || io::Error::from_raw_os_error(libc::EOVERFLOW);
    let start = offset - offset % page_size();
    let length = offset.checked_add(bytes).ok_or_else(too_large)? - start;
    let Some(size) = NonZeroUsize::new(usize::try_from(length).map_err(|_| too_large())?) else {
        return Ok(0);
    };
    let from = libc::off_t::try_from(start).map_err(|_| too_large())?;
    let whole = libc::off_t::try_from(length).map_err(|_| too_large())?;
    // In large pieces, where locking alone would read page after page.
    let _ = posix_fadvise(file, from, whole, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
    // SAFETY: a new mapping at an address of the kernel's choice, never read or written through: a file that shrinks
    // meanwhile can't raise SIGBUS. It is never unmapped.
    let address = unsafe { mmap(None, size, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, file, from)? };
    // SAFETY: the mapping is `size` long; locking reads nothing through it.
    unsafe { mlock(address, size.get())? };
    Ok(length.next_multiple_of(page_size()))
}

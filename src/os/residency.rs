//! How much of a file is in the page cache.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;

use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::bytes::{Bytes, GIB};

/// Why the residency of a file is not known.
#[derive(Debug, thiserror::Error)]
pub enum ResidencyError {
    /// The kernel tells only the owner, those who may write, and holders of CAP_FOWNER; to others
    /// mincore(2) reports every page as resident, which is worse than no answer.
    #[error("the page cache of a file that belongs to another user can't be seen without CAP_FOWNER")]
    NotPermitted,
    /// Anything else.
    #[error("can't tell how much of a file is in the page cache: {0}")]
    Io(#[from] io::Error),
}

/// struct cachestat_range of linux/mman.h.
#[repr(C)]
struct Range {
    offset: u64,
    length: u64,
}

/// struct cachestat of linux/mman.h: pages by state.
#[repr(C)]
#[derive(Default)]
struct CacheStat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// The number that every architecture gave cachestat(2), which the C library's headers may lack.
const SYS_CACHESTAT: libc::c_long = 451;

/// The mapping through which mincore(2) looks is at most this large: its vector then takes 256 KiB.
const WINDOW: u64 = GIB;

/// Bytes of `file` in the page cache, whole pages, at most the file's length.
///
/// By cachestat(2) (Linux 6.5), before that by mincore(2). May take a second on files of hundreds
/// of GiB: not for an event loop.
pub fn resident_bytes(file: &File) -> Result<Bytes, ResidencyError> {
    let metadata = file.metadata()?;
    if metadata.len() == 0 {
        return Ok(Bytes::ZERO);
    }
    let pages = match cachestat(file.as_raw_fd()) {
        Ok(pages) => pages,
        Err(error) => match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) if !is_filtered() => return Err(ResidencyError::NotPermitted),
            Some(libc::EPERM | libc::EACCES | libc::ENOSYS | libc::EOPNOTSUPP) => {
                if !mincore_is_true(&metadata) {
                    return Err(ResidencyError::NotPermitted);
                }
                mincore_pages(file, metadata.len())?
            }
            _ => return Err(error.into()),
        },
    };
    Ok(Bytes(pages.saturating_mul(page_size()).min(metadata.len())))
}

/// Whether it is a filter that says no to cachestat(2) rather than the kernel, which would say that there is no such
/// file: systemd before 254 has a filter answer so for calls that its libseccomp does not know.
fn is_filtered() -> bool {
    cachestat(-1).is_err_and(|error| matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES)))
}

/// The size of a page; bytes.
pub(super) fn page_size() -> u64 {
    nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|size| u64::try_from(size).ok())
        .unwrap_or(4096)
}

/// Pages of the whole file that are cached.
fn cachestat(file: RawFd) -> io::Result<u64> {
    // A length of 0 means to the end of the file.
    let range = Range { offset: 0, length: 0 };
    let mut stat = CacheStat::default();
    // SAFETY: both structures have the kernel's layout and outlive the call; the kernel writes
    // only `stat`.
    let result = unsafe { libc::syscall(SYS_CACHESTAT, file, &raw const range, &raw mut stat, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(stat.cached) }
}

/// Whether mincore(2) tells this process the truth about the file. Root is taken to hold
/// CAP_FOWNER, as plimsolld.service grants it.
fn mincore_is_true(metadata: &std::fs::Metadata) -> bool {
    let user = nix::unistd::geteuid();
    user.is_root() || user.as_raw() == metadata.uid()
}

/// The same by mincore(2), window by window.
fn mincore_pages(file: &File, length: u64) -> io::Result<u64> {
    let mut pages = 0;
    let mut offset = 0;
    while offset < length {
        let window = WINDOW.min(length - offset);
        pages += mincore_window(file, offset, window)?;
        offset += window;
    }
    Ok(pages)
}

fn mincore_window(file: &File, offset: u64, length: u64) -> io::Result<u64> {
    let too_large = |_| io::Error::from_raw_os_error(libc::EOVERFLOW);
    let size = usize::try_from(length).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    let size = NonZeroUsize::new(size).ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
    let offset = libc::off_t::try_from(offset).map_err(too_large)?;
    let count = usize::try_from(length.div_ceil(page_size()))
        .map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    let mut vector = vec![0u8; count];
    // SAFETY: a new mapping at an address of the kernel's choice, never read or written through:
    // a file that shrinks meanwhile can't raise SIGBUS.
    let address = unsafe { mmap(None, size, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, file, offset)? };
    // SAFETY: the mapping is `size` long, and the vector has a byte for each of its pages.
    let result = unsafe { libc::mincore(address.as_ptr(), size.get(), vector.as_mut_ptr()) };
    let outcome = if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: this is the mapping made above, and no reference into it exists.
    unsafe { munmap(address, size.get())? };
    outcome?;
    Ok(vector.iter().map(|page| u64::from(page & 1)).sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn temporary() -> File {
        let path = std::env::temp_dir().join(format!("plimsoll-residency-{}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file
    }

    #[test]
    fn what_was_just_written_is_resident_by_both_ways() {
        let mut file = temporary();
        assert_eq!(resident_bytes(&file).unwrap(), Bytes::ZERO, "an empty file");
        file.write_all(&vec![1; 3 * 65536 + 5]).unwrap();
        assert_eq!(resident_bytes(&file).unwrap(), Bytes(3 * 65536 + 5));
        assert_eq!(mincore_pages(&file, 3 * 65536 + 5).unwrap(), (3 * 65536u64 + 5).div_ceil(page_size()));
    }
}

//! Swap areas and the attributes of files that become one.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::libc;

/// `FS_NOCOW_FL` of linux/fs.h: no copy-on-write, which btrfs wants of a swapfile.
const NOCOW: libc::c_long = 0x0080_0000;

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

fn outcome(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Uses a file as swap, with no priority of its own: below every area that was given one (zram generators do), and behind
/// those without one that are in use already. The newest kernels have all of those without one take turns; no call can put an
/// area below them.
///
/// # Errors
/// EINVAL: the file system can't hold it (holes, copy-on-write); EBUSY: it is in use already.
pub fn swap_on(path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: swapon reads a NUL-terminated path, which lives until it returns.
    outcome(unsafe { libc::swapon(path.as_ptr(), 0) })
}

/// Takes a swap area out of use. Blocks until everything in it has been read back; a signal that ends the
/// process ends it too, and leaves the area in use.
///
/// # Errors
/// ENOMEM: what it holds does not fit in memory; EINVAL: it is not in use.
pub fn swap_off(path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: swapoff reads a NUL-terminated path, which lives until it returns.
    outcome(unsafe { libc::swapoff(path.as_ptr()) })
}

/// Switches copy-on-write off for a file that is still empty.
///
/// # Errors
/// The file system knows no such attribute, or refuses it.
pub fn no_copy_on_write(file: &File) -> io::Result<()> {
    let mut flags: libc::c_long = 0;
    // SAFETY: FS_IOC_GETFLAGS writes an int or a long, for which `flags` has room, and keeps no pointer.
    outcome(unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_GETFLAGS as _, &raw mut flags) })?;
    flags |= NOCOW;
    // SAFETY: FS_IOC_SETFLAGS only reads `flags`.
    outcome(unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_SETFLAGS as _, &raw const flags) })
}

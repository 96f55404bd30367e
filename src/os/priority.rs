//! Files that the kernel reports exceptional conditions of (POLLPRI).

use std::fs::File;
use std::io;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Has the runtime wait for POLLPRI on a file. Inside of a runtime.
///
/// # Errors
/// EPERM: the file is of a kind that can't be polled.
pub fn wait_for_priority(file: File) -> io::Result<AsyncFd<File>> {
    // SAFETY: the file goes into the value, which takes the descriptor from the runtime before it closes it; until
    // then a `File` owns its descriptor and always gives the same one.
    unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }.map_err(|error| error.into_parts().1)
}

//! Descriptors that the event loop waits for.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Has the event loop of this thread's runtime wait for `interest` in a descriptor.
pub fn watched(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor until it is dropped, and the AsyncFd owns it until then.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, interest) }?)
}

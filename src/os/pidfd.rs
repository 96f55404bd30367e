//! Process file descriptors: a process's identity that is never given to another one.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::libc;
use nix::sys::signal::Signal;

/// Opens a descriptor of process `pid`, pidfd_open(2). ESRCH when there is none.
pub fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::Error::from_raw_os_error(libc::ESRCH))?;
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    let raw = RawFd::try_from(raw).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the kernel has just returned this descriptor, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// The process id behind `pidfd` in this pid namespace; `None` when the process is gone.
pub fn pid_of(pidfd: BorrowedFd<'_>) -> io::Result<Option<u32>> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pid:"));
    // Gone is -1, in another namespace 0; a descriptor of something else has no such line.
    let line = line.ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))?;
    Ok(line.trim().parse::<u32>().ok().filter(|pid| *pid != 0))
}

/// Sends `signal` to the process behind `pidfd`, pidfd_send_signal(2). ESRCH when it is gone.
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: Signal) -> io::Result<()> {
    let info: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: the descriptor is borrowed for the call, and a null siginfo is allowed: the kernel
    // then fills one in as for kill(2).
    let result = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal as libc::c_int, info, 0)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::process::Command;

    #[test]
    fn a_descriptor_names_its_process_until_it_is_gone() {
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let pidfd = pidfd_open(child.id()).unwrap();
        assert_eq!(pid_of(pidfd.as_fd()).unwrap(), Some(child.id()));
        pidfd_send_signal(pidfd.as_fd(), Signal::SIGKILL).unwrap();
        child.wait().unwrap();
        assert_eq!(pid_of(pidfd.as_fd()).unwrap(), None);
        let gone = pidfd_send_signal(pidfd.as_fd(), Signal::SIGKILL).unwrap_err();
        assert_eq!(gone.raw_os_error(), Some(libc::ESRCH));
    }

    #[test]
    fn what_is_no_process_is_an_error() {
        assert!(pidfd_open(u32::MAX).is_err());
        let file = std::fs::File::open("/proc/self/stat").unwrap();
        assert!(pid_of(file.as_fd()).is_err());
    }
}

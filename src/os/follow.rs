//! A child that does not outlive its parent.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::libc;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};

/// Has the child get `signal` when the thread that starts it ends, in whatever way (PR_SET_PDEATHSIG of prctl(2)).
///
/// Its own children don't inherit that, and a program that changes its user (sudo) loses it.
pub fn end_with_parent(command: &mut Command, signal: Signal) {
    let parent = Pid::this();
    let follow = move || {
        set_pdeathsig(signal)?;
        // It may have ended before that.
        if getppid() == parent { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ESRCH)) }
    };
    // SAFETY: between fork and exec only prctl(2) and getppid(2) are called, which are async-signal-safe; nothing is
    // allocated and no lock is taken.
    unsafe { command.pre_exec(follow) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn a_child_ends_with_the_thread_that_started_it() {
        let mut child = std::thread::spawn(|| {
            let mut command = Command::new("/bin/sleep");
            end_with_parent(command.arg("600"), Signal::SIGTERM);
            command.spawn().unwrap()
        })
        .join()
        .unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGTERM));
    }
}

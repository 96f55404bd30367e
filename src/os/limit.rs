//! Limits on what another program may take.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::libc;

/// Has `command` run with at most so many bytes of private memory (RLIMIT_DATA) and seconds of
/// processor time (RLIMIT_CPU), and without a core dump.
///
/// Not its address space: GPU runtimes reserve hundreds of GiB of it and use little.
pub fn limit_child(command: &mut Command, data: u64, seconds: u64) {
    let limit = |resource, most: u64| {
        let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
        // SAFETY: the pointer is to a live value that the kernel only reads.
        if unsafe { libc::setrlimit(resource, &limit) } < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    };
    let limits = move || {
        limit(libc::RLIMIT_DATA, data)?;
        limit(libc::RLIMIT_CPU, seconds)?;
        limit(libc::RLIMIT_CORE, 0)
    };
    // SAFETY: between fork and exec only setrlimit(2) is called, which is async-signal-safe;
    // nothing is allocated and no lock is taken.
    unsafe { command.pre_exec(limits) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_has_its_limits() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "ulimit -d; ulimit -t; ulimit -c"]);
        limit_child(&mut command, 64 << 20, 7);
        let said = String::from_utf8(command.output().unwrap().stdout).unwrap();
        assert_eq!(said.lines().collect::<Vec<_>>(), ["65536", "7", "0"]);
    }
}

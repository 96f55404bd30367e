//! `plimsoll lease`: memory held for a command while it runs.

use std::ffi::OsString;
use std::io::{IsTerminal, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpgrp, tcgetpgrp};
use signal_hook::low_level::pipe;

use super::agent::Agent;
use super::args::{Common, Lease};
use super::failure::Failure;
use super::gate::{self, Patience};
use super::output::Progress;
use crate::config::{ModelName, NameError};
use crate::dbus::Client;
use crate::dbus::client::LeaseOptions;
use crate::os::{end_with_parent, pidfd_open, pidfd_send_signal};

/// What is passed on to the command. What a terminal sends it has sent to the command as well.
const PASSED: [Signal; 6] =
    [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2];
/// A name may be so long.
const LONGEST_NAME: usize = 32;

/// Holds the memory, runs the command and returns its exit code: 128 and the number of a signal that ended it.
pub(super) fn lease(common: &Common, args: &Lease) -> Result<u8, Failure> {
    let Some((program, arguments)) = args.command.split_first() else {
        return Err(Failure::usage("there is no command to hold the memory for")
            .hint("plimsoll lease 20GiB -- make -j8"));
    };
    if args.size.is_none() && args.like.is_none() {
        return Err(Failure::usage("how much is to be held? Give a size, or --like a model")
            .hint("plimsoll lease 20GiB -- make -j8"));
    }
    if args.context.is_some() && args.like.is_none() {
        return Err(Failure::usage("a context length means something with --like only"));
    }
    // Nobody is to be stopped for a command that can't be run.
    let program = find(program)?;
    let name = match &args.name {
        Some(name) => {
            name.parse::<ModelName>().map_err(|error: NameError| Failure::usage(error.to_string()))?
        }
        None => name_of(&program)?,
    };
    let held = hold(common, args, &name)?;
    let code = run(&program, arguments)?;
    drop(held);
    Ok(code)
}

/// Asks for it, and tells what it waits for.
fn hold(common: &Common, args: &Lease, name: &ModelName) -> Result<OwnedFd, Failure> {
    let _agent = Agent::start(common);
    let options = LeaseOptions {
        bytes: args.size.unwrap_or_default().0,
        gpu_bytes: args.gpu.unwrap_or_default().0,
        like: args.like.clone(),
        context: args.context,
        priority: args.priority,
        wait: args.wait,
    };
    let mut shown = Progress::new();
    let ours = format!("lease:{name}");
    // Of several of one name, each shows what the others wait for: better than nothing.
    let about = |instance: &str| instance.split('@').next() == Some(ours.as_str());
    let patience = if args.wait { Patience::LONG } else { Patience::NONE };
    let bus = super::bus_address(common);
    super::block_on(async {
        let connect = || Client::connect(bus.as_deref(), !common.no_ask_password);
        let acquire = async |client: &Client| client.acquire_lease(name.as_str(), &options).await;
        Ok(gate::insist(connect, acquire, &about, patience, &mut |text| shown.show(text)).await?)
    })
}

/// Runs the command with what it is sent passed on, and waits for its end.
fn run(program: &Path, arguments: &[OsString]) -> Result<u8, Failure> {
    // What the command leaves behind stays below this process, and so within the lease.
    let _ = set_child_subreaper(true);
    let ignored = ignored(&std::fs::read_to_string("/proc/self/status").unwrap_or_default());
    let mut signals = Vec::new();
    // What is ignored here, as by nohup, the command is to ignore as well: a handler would be its default again.
    for signal in PASSED.into_iter().filter(|signal| !is_in(ignored, *signal)) {
        signals.push((Some(signal), listen(signal)?));
    }
    signals.push((None, listen(Signal::SIGCHLD)?));
    let mut command = Command::new(program);
    // Without this process there is no lease, and so no memory for it.
    end_with_parent(command.args(arguments), Signal::SIGTERM);
    let child = command.spawn();
    let child =
        child.map_err(|error| Failure::failed(format!("{} can't be run: {error}", program.display())))?;
    // Until it is reaped below the number is its own.
    let pidfd = pidfd_open(child.id())?;
    let pid = Pid::from_raw(i32::try_from(child.id()).map_err(|error| Failure::failed(error.to_string()))?);
    loop {
        if let Some(code) = reap(pid)? {
            return Ok(code);
        }
        let ready: Vec<Option<Signal>> = {
            let mut fds: Vec<PollFd<'_>> =
                signals.iter().map(|(_, pipe)| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)).collect();
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(Failure::failed(format!("signals can't be waited for: {error}"))),
            }
            let came = |fd: &PollFd<'_>| fd.any().unwrap_or_default();
            let came: Vec<bool> = fds.iter().map(came).collect();
            drop(fds);
            let came = signals.iter_mut().zip(came).filter(|(_, came)| *came);
            came.map(|((signal, pipe), _)| {
                let _ = pipe.read(&mut [0; 64]);
                *signal
            })
            .collect()
        };
        for signal in ready.into_iter().flatten().filter(|signal| !has_it_already(*signal)) {
            // It may have ended just now.
            let _ = pidfd_send_signal(pidfd.as_fd(), signal);
        }
    }
}

/// Whether the terminal has sent the signal to the command too: it sends its own to all of the group in front.
fn has_it_already(signal: Signal) -> bool {
    let stdin = std::io::stdin();
    matches!(signal, Signal::SIGINT | Signal::SIGQUIT)
        && stdin.is_terminal()
        && tcgetpgrp(stdin.as_fd()).is_ok_and(|in_front| in_front == getpgrp())
}

/// The signals that a process ignores, of its `/proc/PID/status`: a bit for each. None where it does not say.
fn ignored(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or_default()
}

fn is_in(set: u64, signal: Signal) -> bool {
    (set >> (signal as u32 - 1)) & 1 == 1
}

fn listen(signal: Signal) -> Result<UnixStream, Failure> {
    let (ours, handlers) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    pipe::register(signal as i32, handlers)?;
    Ok(ours)
}

/// Takes in every child that has ended; the exit code, if the command is among them.
fn reap(command: Pid) -> Result<Option<u8>, Failure> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == command => {
                return Ok(Some(u8::try_from(code & 0xff).unwrap_or(1)));
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == command => {
                return Ok(Some(u8::try_from(128 + signal as i32).unwrap_or(1)));
            }
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(None),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(Failure::failed(format!("the command can't be waited for: {error}"))),
        }
    }
}

/// The program that a shell would run.
fn find(program: &OsString) -> Result<PathBuf, Failure> {
    let runs = |path: &PathBuf| {
        let about = std::fs::metadata(path);
        about.is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o111 != 0)
    };
    let given = PathBuf::from(program);
    let found = if given.components().count() > 1 {
        Some(given.clone()).filter(runs)
    } else {
        let path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin"));
        std::env::split_paths(&path).map(|directory| directory.join(&given)).find(runs)
    };
    found.ok_or_else(|| Failure::usage(format!("there is no program '{}' to run", given.display())))
}

/// A name for people: what the program is called, as far as a name allows.
fn name_of(program: &Path) -> Result<ModelName, Failure> {
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    let fits = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' };
    let name: String =
        name.chars().map(fits).skip_while(|c| !c.is_ascii_alphanumeric()).take(LONGEST_NAME).collect();
    let name = if name.is_empty() { "command".to_owned() } else { name };
    name.parse().map_err(|error: NameError| Failure::usage(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Exit;

    #[test]
    fn a_lease_is_named_after_what_it_is_for() {
        let name = |path: &str| name_of(Path::new(path)).unwrap().to_string();
        assert_eq!(name("/usr/bin/make"), "make");
        assert_eq!(name("./-my build!.sh"), "my-build-.sh");
        assert_eq!(name("/opt/ä"), "command");
        assert_eq!(name(&"x".repeat(90)).len(), LONGEST_NAME);
    }

    #[test]
    fn ignored_signals_are_a_bit_each() {
        let set =
            ignored("SigBlk:\t0000000000000003\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000000002\n");
        assert!(is_in(set, Signal::SIGHUP) && !is_in(set, Signal::SIGINT) && !is_in(set, Signal::SIGUSR2));
        assert_eq!((ignored(""), ignored("SigIgn:\tnone\n")), (0, 0));
    }

    #[test]
    fn programs_are_found_before_memory_is_asked_for() {
        assert!(find(&OsString::from("sh")).unwrap().is_absolute());
        assert_eq!(find(&OsString::from("/etc/passwd")).unwrap_err().exit, Exit::Usage);
        assert_eq!(find(&OsString::from("no-such-program-here")).unwrap_err().exit, Exit::Usage);
    }
}

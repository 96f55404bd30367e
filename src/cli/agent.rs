//! A password prompt on the terminal for what polkit wants to have confirmed: where no desktop
//! does it, as over ssh, systemctl starts pkttyagent, and so do we.

use std::io::{IsTerminal, Read};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::args::Common;

/// A running agent, ended with this value.
#[derive(Debug)]
pub struct Agent {
    child: Option<Child>,
}

/// How long the agent may take to register.
const REGISTER: Duration = Duration::from_secs(3);

impl Agent {
    /// Starts the agent, when there is somebody to ask and something to ask for.
    #[must_use]
    pub fn start(common: &Common) -> Self {
        let root = nix::unistd::geteuid().is_root();
        let terminal = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
        let wanted = !common.no_ask_password && !root && terminal && super::bus_address(common).is_none();
        Self { child: if wanted { spawn() } else { None } }
    }
}

fn spawn() -> Option<Child> {
    // Not close-on-exec on purpose: the agent inherits the end to write to, and closes it when it
    // has registered. This process starts no other program.
    let (mut ready, theirs) = nix::unistd::pipe().map(|(r, w)| (std::fs::File::from(r), w)).ok()?;
    let child = Command::new("pkttyagent")
        .arg("--notify-fd")
        .arg(theirs.as_raw_fd().to_string())
        .arg("--fallback")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .ok();
    drop(theirs);
    let timeout = PollTimeout::try_from(REGISTER).unwrap_or(PollTimeout::ZERO);
    if child.is_some() {
        let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(&ready), PollFlags::POLLIN)];
        let _ = poll(&mut fds, timeout).map(|n| (n > 0).then(|| ready.read(&mut [0; 1])));
    }
    child
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let pid = i32::try_from(child.id()).map(nix::unistd::Pid::from_raw);
            // SIGTERM first: the agent puts the terminal's echo back.
            match pid {
                Ok(pid) if nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).is_ok() => {}
                _ => drop(child.kill()),
            }
            let _ = child.wait();
        }
    }
}

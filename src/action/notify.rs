//! Messages to the service manager, sd_notify(3).

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use nix::time::{ClockId, clock_gettime};

/// The service manager that started this process, if one did.
#[derive(Debug)]
pub struct Notifier {
    socket: Option<(UnixDatagram, SocketAddr)>,
}

impl Notifier {
    /// From `NOTIFY_SOCKET`. Without it, or when it can't be used, messages go nowhere: a program
    /// that runs by hand is not worse for it.
    #[must_use]
    pub fn from_environment() -> Self {
        let address = std::env::var("NOTIFY_SOCKET").ok();
        Self { socket: address.and_then(|address| Self::socket(&address).ok()) }
    }

    /// To the socket of this name: a path, or an abstract one after an `@`.
    pub fn to(address: &str) -> io::Result<Self> {
        Ok(Self { socket: Some(Self::socket(address)?) })
    }

    fn socket(address: &str) -> io::Result<(UnixDatagram, SocketAddr)> {
        let address = match address.strip_prefix('@') {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None if address.starts_with('/') => SocketAddr::from_pathname(address)?,
            None => return Err(io::Error::from(io::ErrorKind::Unsupported)),
        };
        let socket = UnixDatagram::unbound()?;
        // A service manager that is behind must not hold us up.
        socket.set_nonblocking(true)?;
        Ok((socket, address))
    }

    /// Whether anybody listens.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.socket.is_some()
    }

    /// Started, or done with reloading.
    pub fn ready(&self) -> io::Result<()> {
        self.send("READY=1")
    }

    /// The configuration is being read again; `ready` ends it.
    pub fn reloading(&self) -> io::Result<()> {
        let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}", now.as_micros()))
    }

    /// On the way out.
    pub fn stopping(&self) -> io::Result<()> {
        self.send("STOPPING=1")
    }

    /// One line for `systemctl status`.
    pub fn status(&self, text: &str) -> io::Result<()> {
        self.send(&format!("STATUS={}", one_line(text)))
    }

    /// The watchdog's sign of life.
    pub fn watchdog(&self) -> io::Result<()> {
        self.send("WATCHDOG=1")
    }

    /// Puts off the time-out of what is under way (a start or a stop) to `time` from now.
    pub fn extend_timeout(&self, time: Duration) -> io::Result<()> {
        self.send(&format!("EXTEND_TIMEOUT_USEC={}", time.as_micros()))
    }

    /// Has a copy of `descriptor` kept across a restart of this service, under this name; a store that is full or not
    /// there drops it silently.
    pub fn store(&self, name: &str, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        let Some((socket, address)) = &self.socket else { return Ok(()) };
        let to = match (address.as_pathname(), address.as_abstract_name()) {
            (Some(path), _) => UnixAddr::new(path)?,
            (None, Some(name)) => UnixAddr::new_abstract(name)?,
            (None, None) => return Err(io::Error::from(io::ErrorKind::Unsupported)),
        };
        let message = format!("FDSTORE=1\nFDNAME={}", one_line(name));
        let (parts, descriptors) = ([IoSlice::new(message.as_bytes())], [descriptor.as_raw_fd()]);
        let with = [ControlMessage::ScmRights(&descriptors)];
        sendmsg(socket.as_raw_fd(), &parts, &with, MsgFlags::empty(), Some(&to))?;
        Ok(())
    }

    /// Has the descriptors of this name kept no longer.
    pub fn forget(&self, name: &str) -> io::Result<()> {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={}", one_line(name)))
    }

    fn send(&self, message: &str) -> io::Result<()> {
        let Some((socket, address)) = &self.socket else { return Ok(()) };
        socket.send_to_addr(message.as_bytes(), address).map(drop)
    }
}

/// How often the service manager wants a sign of life from this process: `WATCHDOG_USEC`, where
/// `WATCHDOG_PID` names no other. Send one after half of it.
#[must_use]
pub fn watchdog_interval() -> Option<Duration> {
    let variable = |name| std::env::var(name).ok();
    watchdog(variable("WATCHDOG_USEC").as_deref(), variable("WATCHDOG_PID").as_deref(), std::process::id())
}

fn watchdog(usec: Option<&str>, pid: Option<&str>, own: u32) -> Option<Duration> {
    if pid.is_some_and(|pid| pid.parse() != Ok(own)) {
        return None;
    }
    usec?.parse().ok().filter(|usec| *usec > 0).map(Duration::from_micros)
}

/// A line break would begin another message.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn received(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 512];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }

    #[test]
    fn messages_arrive_at_both_kinds_of_socket() {
        let name = format!("plimsoll-notify-{}", std::process::id());
        let path = std::env::temp_dir().join(&name);
        let by_path = UnixDatagram::bind(&path).unwrap();
        let by_name =
            UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(name.as_bytes()).unwrap()).unwrap();
        let addresses = [path.to_str().unwrap().to_owned(), format!("@{name}")];
        for (socket, address) in [by_path, by_name].iter().zip(addresses) {
            let notifier = Notifier::to(&address).unwrap();
            assert!(notifier.is_connected());
            notifier.ready().unwrap();
            assert_eq!(received(socket), "READY=1");
            notifier.status("loading\nMAINPID=1").unwrap();
            assert_eq!(received(socket), "STATUS=loading MAINPID=1");
            notifier.extend_timeout(Duration::from_secs(120)).unwrap();
            assert_eq!(received(socket), "EXTEND_TIMEOUT_USEC=120000000");
            notifier.store("lease-1", socket.as_fd()).unwrap();
            assert_eq!(received(socket), "FDSTORE=1\nFDNAME=lease-1");
            notifier.forget("lease-1").unwrap();
            assert_eq!(received(socket), "FDSTOREREMOVE=1\nFDNAME=lease-1");
            notifier.reloading().unwrap();
            let message = received(socket);
            let time = message.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
            assert!(time.parse::<u64>().unwrap() > 0);
        }
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn without_a_manager_nothing_is_sent() {
        assert!(Notifier::to("vsock:2:1234").is_err());
        Notifier { socket: None }.ready().unwrap();
    }

    #[test]
    fn the_watchdog_is_for_the_process_it_names() {
        let minute = Some(Duration::from_secs(60));
        assert_eq!(watchdog(Some("60000000"), None, 7), minute);
        assert_eq!(watchdog(Some("60000000"), Some("7"), 7), minute);
        assert_eq!(watchdog(Some("60000000"), Some("8"), 7), None);
        for usec in [None, Some("0"), Some("x"), Some("")] {
            assert_eq!(watchdog(usec, None, 7), None);
        }
    }
}

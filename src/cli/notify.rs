//! Messages to systemd: the datagrams of sd_notify(3).

use std::ffi::OsStr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// The service manager, if one listens.
#[derive(Debug)]
pub struct Notify {
    socket: Option<(UnixDatagram, SocketAddr)>,
}

impl Notify {
    /// The one that NOTIFY_SOCKET names; without it every message goes nowhere.
    #[must_use]
    pub fn from_env() -> Self {
        Self { socket: std::env::var_os("NOTIFY_SOCKET").and_then(|name| connect(&name)) }
    }

    /// What `systemctl status` shows as the unit's status.
    pub fn status(&self, text: &str) {
        self.send(&format!("STATUS={}", text.lines().next().unwrap_or_default()));
    }

    /// Don't time the start out before so long from now.
    pub fn extend_timeout(&self, by: std::time::Duration) {
        self.send(&format!("EXTEND_TIMEOUT_USEC={}", by.as_micros()));
    }

    fn send(&self, message: &str) {
        if let Some((socket, address)) = &self.socket {
            // Nothing depends on it: a manager that does not listen shows less, no more.
            let _ = socket.send_to_addr(message.as_bytes(), address);
        }
    }
}

fn connect(name: &OsStr) -> Option<(UnixDatagram, SocketAddr)> {
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        [b'/', ..] => SocketAddr::from_pathname(name),
        _ => return None,
    };
    let socket = UnixDatagram::unbound().ok()?;
    // A manager with a full queue must not hold the model up.
    socket.set_nonblocking(true).ok()?;
    Some((socket, address.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_at_an_abstract_socket() {
        let name = format!("plimsoll-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let manager = UnixDatagram::bind_addr(&address).unwrap();
        let notify = Notify { socket: connect(OsStr::new(&format!("@{name}"))) };
        notify.status("waiting\nsecond line");
        notify.extend_timeout(std::time::Duration::from_secs(2));
        let mut buffer = [0; 64];
        let read = manager.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..read], b"STATUS=waiting");
        let read = manager.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..read], b"EXTEND_TIMEOUT_USEC=2000000");
    }

    #[test]
    fn no_manager_is_no_error() {
        assert!(connect(OsStr::new("vsock:2:1")).is_none());
        Notify { socket: None }.status("nobody listens");
    }
}

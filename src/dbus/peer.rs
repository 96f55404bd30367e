//! Who is at the other end of a call.

use std::os::fd::OwnedFd;

use zbus::Connection;
use zbus::fdo::DBusProxy;
use zbus::message::Header;

use super::error::{Error, Kind};
use crate::daemon::Peer;
use crate::host::Host;

/// What the bus vouches for about the sender of a call: its process, by pidfd where the bus has
/// one, for a number alone may have been given to another process meanwhile.
///
/// # Errors
/// The sender is gone, or the bus can't tell.
pub async fn of(connection: &Connection, header: &Header<'_>) -> Result<Peer, Error> {
    let unknown = |why: String| Error::new(Kind::NotTheUnit, why);
    let sender = header.sender().ok_or_else(|| unknown("the call has no sender".to_owned()))?;
    let bus = DBusProxy::new(connection).await?;
    let credentials = bus
        .get_connection_credentials(sender.clone().into())
        .await
        .map_err(|error| unknown(format!("the bus does not know who calls: {error}")))?;
    let pid = credentials
        .process_id()
        .ok_or_else(|| unknown("the bus does not know the caller's process".to_owned()))?;
    let uid = credentials
        .unix_user_id()
        .ok_or_else(|| unknown("the bus does not know the caller's user".to_owned()))?;
    let pidfd = credentials.into_process_fd().map(OwnedFd::from);
    if pidfd.is_none() {
        still_theirs(&Host::default(), pid, uid)?;
    }
    Ok(Peer { pid, uid, pidfd })
}

/// A number alone is that of the process which connected, and may be another's by now: one of another user is taken
/// for nobody.
fn still_theirs(host: &Host, pid: u32, uid: u32) -> Result<(), Error> {
    match host.is_of_user(pid, uid) {
        Ok(true) => Ok(()),
        Ok(false) => {
            Err(Error::new(Kind::NotTheUnit, format!("process {pid} is not of user {uid}, who called")))
        }
        Err(error) => Err(Error::new(Kind::NotTheUnit, format!("the caller is gone: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_is_of_another_user_is_nobody() {
        let root = std::env::temp_dir().join(format!("plimsoll-peer-{}", std::process::id()));
        let process = root.join("proc/10");
        std::fs::create_dir_all(&process).unwrap();
        // Root for a moment, and the engines' user otherwise.
        std::fs::write(process.join("status"), "Name:\tx\nUid:\t1000\t0\t1000\t0\nGid:\t7\t7\t7\t7\n")
            .unwrap();
        let host = Host::at(&root);
        assert_eq!((still_theirs(&host, 10, 1000), still_theirs(&host, 10, 0)), (Ok(()), Ok(())));
        for (pid, uid) in [(10, 7), (10, 100), (11, 1000)] {
            assert_eq!(still_theirs(&host, pid, uid).unwrap_err().kind, Kind::NotTheUnit, "{pid} {uid}");
        }
        std::fs::remove_dir_all(root).unwrap();
    }
}

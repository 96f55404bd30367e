//! Who is at the other end of a call.

use std::os::fd::OwnedFd;

use zbus::Connection;
use zbus::fdo::DBusProxy;
use zbus::message::Header;

use super::error::{Error, Kind};
use crate::daemon::Peer;

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
    Ok(Peer { pid, uid, pidfd: credentials.into_process_fd().map(OwnedFd::from) })
}

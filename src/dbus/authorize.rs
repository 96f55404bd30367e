//! Who may change something: root, and whom polkit lets.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::timeout;
use zbus::fdo::DBusProxy;
use zbus::message::{Flags, Header};
use zbus::{Connection, Variant, proxy};

use super::error::{Error, Kind};

/// Loading, unloading and pinning.
pub const MANAGE_MODELS: &str = "org.plimsoll1.manage-models";
/// Holding memory for something that is no model.
pub const ACQUIRE_LEASE: &str = "org.plimsoll1.acquire-lease";
/// Changing how memory is managed.
pub const CONFIGURE: &str = "org.plimsoll1.configure";

/// polkit may ask the user for a password.
const ALLOW_USER_INTERACTION: u32 = 1;
/// How long a person may take to type it.
const PATIENCE: Duration = Duration::from_secs(300);

/// polkit's answer: authorised, could be after a challenge, details.
type Answer = (bool, bool, HashMap<String, String>);

#[proxy(
    interface = "org.freedesktop.PolicyKit1.Authority",
    default_service = "org.freedesktop.PolicyKit1",
    default_path = "/org/freedesktop/PolicyKit1/Authority"
)]
trait PolicyKit {
    fn check_authorization(
        &self,
        subject: &(&str, HashMap<&str, Variant<'_>>),
        action: &str,
        details: &HashMap<&str, &str>,
        flags: u32,
        cancellation: &str,
    ) -> zbus::Result<Answer>;
}

/// Who decides on changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Authority {
    /// The system's: root passes, all others are polkit's to judge.
    Polkit,
    /// That of a private bus: its owner passes, and nobody else.
    Owner(u32),
}

impl Authority {
    /// Whether the sender of a call may do what `action` stands for.
    ///
    /// # Errors
    /// [`Kind::NotAuthorized`] with the reason.
    pub async fn check(
        self,
        connection: &Connection,
        header: &Header<'_>,
        action: &'static str,
    ) -> Result<(), Error> {
        let denied = |why: String| Error::new(Kind::NotAuthorized, why);
        let sender = header.sender().ok_or_else(|| denied("the call has no sender".to_owned()))?;
        let bus = DBusProxy::new(connection).await?;
        let user = bus
            .get_connection_unix_user(sender.clone().into())
            .await
            .map_err(|error| denied(format!("the bus does not know who calls: {error}")))?;
        match self {
            Self::Owner(owner) if user == owner => return Ok(()),
            Self::Owner(owner) => return Err(denied(format!("only user {owner}, whose bus this is, may"))),
            Self::Polkit if user == 0 => return Ok(()),
            Self::Polkit => {}
        }
        let interactive = header.primary().flags().contains(Flags::ALLOW_INTERACTIVE_AUTH);
        let subject = ("system-bus-name", HashMap::from([("name", Variant::from(sender.as_str()))]));
        let polkit = PolicyKitProxy::new(connection).await?;
        let flags = if interactive { ALLOW_USER_INTERACTION } else { 0 };
        let details = HashMap::new();
        let asked = polkit.check_authorization(&subject, action, &details, flags, "");
        match timeout(PATIENCE, asked).await {
            Ok(Ok((true, ..))) => Ok(()),
            Ok(Ok((false, true, _))) => Err(denied(
                "you are not authorised to do this without a password, and could not be asked for it; run it as root, or on a terminal"
                    .to_owned(),
            )),
            Ok(Ok((false, false, _))) => Err(denied("you are not authorised to do this".to_owned())),
            Ok(Err(error)) => {
                Err(denied(format!("only root may do this, since polkit does not answer: {error}")))
            }
            Err(_) => Err(denied("nobody authenticated in time".to_owned())),
        }
    }
}

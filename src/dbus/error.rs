//! Error names of `org.plimsoll1.Error`, and what they mean to a caller.

use zbus::names::ErrorName;

/// What all error names begin with.
const PREFIX: &str = "org.plimsoll1.Error.";

/// The kinds of error that the daemon answers with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// No plan makes enough room.
    WontFit,
    /// Something else has to end first: the same model is loading, or is going away.
    Busy,
    /// The room is held by models that are pinned.
    Pinned,
    /// How much it takes is not known, and nobody declared it.
    UnknownSize,
    /// No model or instance of that name.
    NotFound,
    /// The model's configuration can't work as it stands.
    Config,
    /// polkit said no.
    NotAuthorized,
    /// The caller of `Admit` is not the main process of that instance's unit.
    NotTheUnit,
    /// There are as many leases as there may be.
    TooMany,
    /// Anything else that failed.
    Failed,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 10] = [
        Self::WontFit,
        Self::Busy,
        Self::Pinned,
        Self::UnknownSize,
        Self::NotFound,
        Self::Config,
        Self::NotAuthorized,
        Self::NotTheUnit,
        Self::TooMany,
        Self::Failed,
    ];

    /// The full error name on the bus.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::WontFit => "org.plimsoll1.Error.WontFit",
            Self::Busy => "org.plimsoll1.Error.Busy",
            Self::Pinned => "org.plimsoll1.Error.Pinned",
            Self::UnknownSize => "org.plimsoll1.Error.UnknownSize",
            Self::NotFound => "org.plimsoll1.Error.NotFound",
            Self::Config => "org.plimsoll1.Error.Config",
            Self::NotAuthorized => "org.plimsoll1.Error.NotAuthorized",
            Self::NotTheUnit => "org.plimsoll1.Error.NotTheUnit",
            Self::TooMany => "org.plimsoll1.Error.TooMany",
            Self::Failed => "org.plimsoll1.Error.Failed",
        }
    }

    /// The kind of an error name; a name of ours that this version does not know is a failure.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        name.strip_prefix(PREFIX)?;
        Some(Self::ALL.into_iter().find(|kind| kind.name() == name).unwrap_or(Self::Failed))
    }

    /// The exit code that a command ends with: 75 refused now, 77 not authorised, 78 configuration.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::WontFit | Self::Busy | Self::Pinned | Self::UnknownSize | Self::TooMany => 75,
            Self::NotAuthorized | Self::NotTheUnit => 77,
            Self::NotFound | Self::Config => 78,
            Self::Failed => 1,
        }
    }
}

/// An error that the service answers a call with: a name and one sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// Which of the names.
    pub kind: Kind,
    /// One sentence for people; may be followed by a line feed and a hint.
    pub message: String,
}

impl Error {
    /// An error of `kind`.
    #[must_use]
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

impl zbus::DBusError for Error {
    fn create_reply(&self, call: &zbus::message::Header<'_>) -> zbus::Result<zbus::Message> {
        zbus::Message::error(call, self.name()).build(&(&self.message,))
    }

    fn name(&self) -> ErrorName<'_> {
        ErrorName::from_static_str_unchecked(self.kind.name())
    }

    fn description(&self) -> Option<&str> {
        Some(&self.message)
    }
}

impl From<zbus::Error> for Error {
    fn from(error: zbus::Error) -> Self {
        Self::new(Kind::Failed, error.to_string())
    }
}

/// Why a call to the daemon has no result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// There is no bus or no daemon on it, or it went away before it answered.
    #[error("the daemon can't be reached: {0}")]
    Unreachable(String),
    /// The daemon answered with an error of ours.
    #[error(transparent)]
    Answered(#[from] Error),
    /// The bus itself refused the call: its policy keeps this user away.
    #[error("the message bus does not let this user call the daemon: {0}")]
    Denied(String),
    /// The daemon does not know the call, or answered with something that can't be read.
    #[error("the daemon did not understand the call: {0}")]
    Protocol(String),
}

impl From<zbus::Error> for CallError {
    fn from(error: zbus::Error) -> Self {
        use zbus::fdo::Error as Fdo;
        let text = error.to_string();
        match error {
            zbus::Error::MethodError(name, message, _) => match Kind::from_name(name.as_str()) {
                Some(kind) => {
                    let message = message.unwrap_or_else(|| format!("the daemon answered {name}"));
                    Self::Answered(Error { kind, message })
                }
                // systemd's word for why it does not start the daemon that the bus asks it for: masked, or not found.
                None if name.starts_with("org.freedesktop.systemd1.") => {
                    Self::Unreachable(message.unwrap_or(text))
                }
                None => Self::Protocol(text),
            },
            zbus::Error::FDO(fdo) => match *fdo {
                Fdo::AccessDenied(text) => Self::Denied(text),
                Fdo::InteractiveAuthorizationRequired(text) => {
                    Self::Answered(Error::new(Kind::NotAuthorized, text))
                }
                Fdo::ServiceUnknown(text) => Self::Unreachable(text),
                Fdo::NameHasNoOwner(_)
                | Fdo::NoReply(_)
                | Fdo::NoServer(_)
                | Fdo::Disconnected(_)
                | Fdo::Timeout(_)
                | Fdo::TimedOut(_)
                | Fdo::SpawnExecFailed(_)
                | Fdo::SpawnForkFailed(_)
                | Fdo::SpawnChildExited(_)
                | Fdo::SpawnChildSignaled(_)
                | Fdo::SpawnFailed(_)
                | Fdo::SpawnServiceNotFound(_) => Self::Unreachable(text),
                _ => Self::Protocol(text),
            },
            zbus::Error::InputOutput(_)
            | zbus::Error::Connection(..)
            | zbus::Error::Handshake(_)
            | zbus::Error::Address(_) => Self::Unreachable(text),
            _ => Self::Protocol(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_exit_codes_are_the_contract() {
        for (kind, name, code) in [
            (Kind::WontFit, "WontFit", 75),
            (Kind::Busy, "Busy", 75),
            (Kind::Pinned, "Pinned", 75),
            (Kind::UnknownSize, "UnknownSize", 75),
            (Kind::NotFound, "NotFound", 78),
            (Kind::Config, "Config", 78),
            (Kind::NotAuthorized, "NotAuthorized", 77),
            (Kind::NotTheUnit, "NotTheUnit", 77),
            (Kind::Failed, "Failed", 1),
        ] {
            let name = format!("{PREFIX}{name}");
            assert_eq!(kind.name(), name);
            assert_eq!(Kind::from_name(&name), Some(kind));
            assert_eq!(kind.exit_code(), code, "{name}");
            assert!(ErrorName::try_from(kind.name()).is_ok());
        }
        assert_eq!(Kind::from_name("org.plimsoll1.Error.OfTheFuture"), Some(Kind::Failed));
        assert_eq!(Kind::from_name("org.freedesktop.DBus.Error.Failed"), None);
    }

    #[test]
    fn a_daemon_that_can_not_be_started_is_not_reached() {
        let answer = |name: &str| {
            let of = zbus::message::Message::signal("/", "a.b", "C").build(&()).unwrap();
            let name = zbus::names::OwnedErrorName::try_from(name.to_owned()).unwrap();
            CallError::from(zbus::Error::MethodError(
                name,
                Some("Unit plimsolld.service is masked.".into()),
                of,
            ))
        };
        let masked = answer("org.freedesktop.systemd1.UnitMasked");
        assert_eq!(masked, CallError::Unreachable("Unit plimsolld.service is masked.".into()));
        assert!(matches!(answer("org.example.Error"), CallError::Protocol(_)));
    }
}

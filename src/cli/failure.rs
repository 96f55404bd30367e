//! How a command ends when it does not end well: one sentence, a hint, an exit code.

use super::remote::RemoteError;
use crate::dbus::{CallError, Kind};

/// Exit codes, as systemd names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// It failed.
    Failed = 1,
    /// The command line is wrong.
    Usage = 2,
    /// The daemon can't be reached (UNAVAILABLE).
    Unavailable = 69,
    /// Refused: it would not fit now (TEMPFAIL).
    Refused = 75,
    /// Not authorised (NOPERM).
    NotAuthorized = 77,
    /// The configuration can't work (CONFIG).
    Config = 78,
}

/// Why a command did not do what it was asked to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The process's exit code.
    pub exit: Exit,
    /// One sentence: what, where.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Failure {
    /// A failure without a hint.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), hint: None }
    }

    /// The same with a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Something that failed: exit code 1.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Exit::Failed, message)
    }

    /// A command line that can't be meant: exit code 2.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// A configuration that can't work: exit code 78.
    pub fn config(message: impl Into<String>) -> Self {
        Self::new(Exit::Config, message)
    }

    /// The daemon is not there: exit code 69.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(Exit::Unavailable, message).hint(
            "is it running? see 'systemctl status plimsolld.service', or start it with 'systemctl start plimsolld.service'",
        )
    }

    /// A standard output that is closed or full. Quiet when the reader simply went away.
    #[must_use]
    pub fn from_output(error: &std::io::Error) -> Option<Self> {
        (error.kind() != std::io::ErrorKind::BrokenPipe)
            .then(|| Self::failed(format!("can't write to standard output: {error}")))
    }
}

impl From<RemoteError> for Failure {
    fn from(error: RemoteError) -> Self {
        match error {
            RemoteError::Address(_) | RemoteError::NotFirst(_) => Self::usage(error.to_string()),
            _ => Self::failed(error.to_string()),
        }
    }
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Unreachable(_) => Self::unavailable(error.to_string()),
            CallError::Denied(_) => Self::new(Exit::NotAuthorized, error.to_string())
                .hint("the bus policy of org.plimsoll1 is in /usr/share/dbus-1/system.d/org.plimsoll1.conf"),
            CallError::Protocol(_) => Self::failed(error.to_string()).hint(
                "the command and the daemon may be of different versions: 'systemctl restart plimsolld.service' stops no model",
            ),
            CallError::Answered(error) => {
                let mut lines = error.message.splitn(2, '\n');
                let message = lines.next().unwrap_or_default().to_owned();
                let hint = lines.next().map(|hint| hint.trim_start_matches("hint: ").to_owned());
                let hint = hint.or_else(|| match error.kind {
                    Kind::NotAuthorized => Some(
                        "run it with sudo; members of the group 'plimsoll' may load, unload, pin and lease".to_owned(),
                    ),
                    Kind::NotFound => Some("'plimsoll list' shows the models that are configured".to_owned()),
                    _ => None,
                });
                Self { exit: error.kind.into(), message, hint }
            }
        }
    }
}

impl From<Kind> for Exit {
    fn from(kind: Kind) -> Self {
        match kind.exit_code() {
            75 => Self::Refused,
            77 => Self::NotAuthorized,
            78 => Self::Config,
            _ => Self::Failed,
        }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::failed(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dbus::Error;

    #[test]
    fn every_kind_of_error_keeps_its_exit_code() {
        for kind in Kind::ALL {
            let failure = Failure::from(CallError::Answered(Error::new(kind, "no\nhint: try this")));
            assert_eq!(failure.exit as u8, kind.exit_code());
            assert_eq!((failure.message.as_str(), failure.hint.as_deref()), ("no", Some("try this")));
        }
        assert_eq!(Failure::from(CallError::Unreachable(String::new())).exit, Exit::Unavailable);
    }

    #[test]
    fn a_reader_that_goes_away_is_no_failure() {
        let gone = std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        assert_eq!(Failure::from_output(&gone), None);
    }
}

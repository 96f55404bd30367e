//! Proves that who asks at the gate is the main process of its unit.

use std::os::fd::AsFd;
use std::sync::Arc;

use super::units::Units;
use crate::action::systemd::{Systemd, SystemdError};
use crate::config::Instance;
use crate::daemon::handle::{Asker, Asking, Fault, Peer, Proof};
use crate::ledger::UnitState;

/// The real gate.
pub struct Gate {
    systemd: Systemd,
    units: Arc<Units>,
}

impl From<SystemdError> for Fault {
    fn from(error: SystemdError) -> Self {
        match error {
            SystemdError::NoSuchUnit(why) => Self::NotTheUnit(why),
            error => Self::Failed(error.to_string()),
        }
    }
}

impl Gate {
    /// The gate of this machine.
    #[must_use]
    pub fn new(systemd: Systemd, units: Arc<Units>) -> Self {
        Self { systemd, units }
    }

    async fn look(&self, peer: Peer, instance: Instance) -> Result<Asker, Fault> {
        let unit = instance.unit();
        if instance.is_foreign() {
            return Err(Fault::NotTheUnit(format!("{unit} is not started through this gate")));
        }
        let (theirs, invocation) = match &peer.pidfd {
            Some(pidfd) => self.systemd.unit_of(pidfd.as_fd()).await?,
            None => self.systemd.unit_of_pid(peer.pid).await?,
        };
        let not = |why: String| Err(Fault::NotTheUnit(why));
        if theirs != unit {
            return not(format!(
                "only {unit} itself may ask for {instance}, and process {} is of {theirs}: use 'systemctl start {unit}' or 'plimsoll load {instance}'",
                peer.pid
            ));
        }
        // Nothing is decided on a unit that systemd's signals have not told of yet.
        let status = self.units.refresh(&self.systemd, &instance).await?;
        if status.main_pid != peer.pid || status.invocation != invocation {
            return not(format!("only the main process of {unit} may ask, and that is {}", status.main_pid));
        }
        if !matches!(status.state, UnitState::Activating | UnitState::Active) {
            return not(format!("{unit} is stopping"));
        }
        self.units.refresh_limits(&self.systemd, &instance).await?;
        self.units.refresh_jobs(&self.systemd).await?;
        let explicit = self.systemd.is_explicit_start(&unit).await?;
        Ok(Asker { instance, invocation, explicit })
    }
}

impl Asking for Gate {
    fn prove(&self, peer: Peer, instance: Instance) -> Proof<'_> {
        Box::pin(self.look(peer, instance))
    }
}

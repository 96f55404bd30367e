//! Proves that who asks at the gate is the main process of its unit.

use std::os::fd::AsFd;
use std::sync::Arc;

use super::units::Units;
use crate::action::systemd::{Systemd, SystemdError};
use crate::config::Instance;
use crate::daemon::handle::{Asker, Asking, Fault, Peer, Proof};
use crate::host::Host;
use crate::ledger::UnitState;

/// The real gate.
pub struct Gate {
    systemd: Systemd,
    units: Arc<Units>,
    host: Host,
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
    pub fn new(systemd: Systemd, units: Arc<Units>, host: Host) -> Self {
        Self { systemd, units, host }
    }

    async fn look(&self, peer: Peer, instance: Instance) -> Result<Asker, Fault> {
        let unit = instance.unit();
        near(&self.host, peer.pid, &instance)?;
        let (theirs, invocation) = match &peer.pidfd {
            Some(pidfd) => self.systemd.unit_of(pidfd.as_fd()).await?,
            None => self.systemd.unit_of_pid(peer.pid).await?,
        };
        let not = |why: String| Err(Fault::NotTheUnit(why));
        if theirs != unit {
            return Err(stranger(peer.pid, &theirs, &instance));
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

fn stranger(pid: u32, theirs: &str, instance: &Instance) -> Fault {
    let unit = instance.unit();
    Fault::NotTheUnit(format!(
        "only {unit} itself may ask for {instance}, and process {pid} is of {theirs}: use 'systemctl start {unit}' or 'plimsoll load {instance}'"
    ))
}

/// That process `pid` is in the control group of an instance's unit, as far as that can be told without systemd.
/// Everybody may call, and an answer of systemd costs it time and the daemon's connection one of few calls that
/// may be open at once: a stranger gets none.
fn near(host: &Host, pid: u32, instance: &Instance) -> Result<(), Fault> {
    let unit = instance.unit();
    if instance.is_foreign() || instance.lease {
        return Err(Fault::NotTheUnit(format!("{unit} is not started through this gate")));
    }
    let group = host.group_of(pid).map_err(|error| {
        let why =
            format!("only {unit} itself may ask for {instance}, and where process {pid} belongs is unknown");
        Fault::NotTheUnit(format!("{why}: {error}"))
    })?;
    match group.unit(host.group_of(1).ok().as_ref()) {
        Some(theirs) if theirs == unit => Ok(()),
        Some(theirs) => Err(stranger(pid, theirs, instance)),
        None => Err(stranger(pid, "no unit", instance)),
    }
}

impl Asking for Gate {
    fn prove(&self, peer: Peer, instance: Instance) -> Proof<'_> {
        Box::pin(self.look(peer, instance))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_are_refused_without_systemd() {
        let root = std::env::temp_dir().join(format!("plimsoll-gate-{}", std::process::id()));
        for (pid, group) in [
            (10, "0::/llm.slice/llm@a.service\n"),
            (11, "0::/llm.slice/llm@a@2.service\n"),
            (12, "0::/user.slice/user-1000.slice/user@1000.service/app.slice/llm@a.service\n"),
            (13, "0::/../llm.slice/llm@a.service\n"),
            (14, "0::/llm.slice/llm@lease:a.service\n"),
            (15, "0::/system.slice/ollama.service\n"),
        ] {
            let process = root.join(format!("proc/{pid}"));
            std::fs::create_dir_all(&process).unwrap();
            std::fs::write(process.join("cgroup"), group).unwrap();
        }
        let host = Host::at(&root);
        let asks = |pid: u32, text: &str| near(&host, pid, &text.parse().unwrap());
        assert_eq!(asks(10, "a"), Ok(()));
        assert_eq!(asks(11, "a@2"), Ok(()));
        let whose = asks(12, "a").unwrap_err().to_string();
        assert!(whose.contains("process 12 is of user@1000.service"), "{whose}");
        // Another instance, outside of what is seen, gone; and what passes no gate, even from its own unit.
        for (pid, text) in [(11, "a"), (13, "a"), (99, "a"), (14, "lease:a"), (15, "ollama.service")] {
            assert!(matches!(asks(pid, text), Err(Fault::NotTheUnit(_))), "{pid} {text}");
        }
        std::fs::remove_dir_all(root).unwrap();
    }
}

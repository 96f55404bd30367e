//! Keeps the last rung ready: whom it may kill, by files that are open already.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::libc;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::mpsc::UnboundedSender;

use crate::action::last_rung::{LastRung, Orders, Victim};
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::daemon::Input;
use crate::host::Host;
use crate::policy::LastResort;
use crate::policy::core::Effect;

/// How long a stop that the loop has begun may take to give memory back before the last rung goes on.
const STOPPING: Duration = Duration::from_millis(2500);
/// The same for a kill.
const KILLING: Duration = Duration::from_secs(1);

/// The last rung and what it needs.
pub(super) struct StandBy {
    rung: LastRung,
    /// cgroup.kill of each model that it may kill, with the InvocationID that it is of: another start is another group.
    open: BTreeMap<Instance, (String, Arc<File>)>,
    ready: bool,
}

impl StandBy {
    /// Starts its thread, whose deeds come to `inputs`. Inside of a runtime.
    pub fn start(host: &Host, inputs: UnboundedSender<Input>) -> Result<Self, String> {
        let failed = |error: std::io::Error| format!("the last rung can't be prepared: {error}");
        let (rung, told) = LastRung::start(&host.meminfo_file()).map_err(failed)?;
        let mut told = UnixStream::from_std(told).map_err(failed)?;
        tokio::spawn(async move {
            let mut words = [0; 16];
            while told.read(&mut words).await.is_ok_and(|count| count > 0) {
                if inputs.send(Input::Killed).is_err() {
                    return;
                }
            }
        });
        Ok(Self { rung, open: BTreeMap::new(), ready: false })
    }

    /// What it has to do from now on, while the loop means to look again in `due`; `group` finds a model's control group, and the
    /// InvocationID that it is of.
    pub fn orders(
        &mut self,
        last: Option<LastResort>,
        due: Duration,
        group: impl Fn(&Instance) -> Option<(PathBuf, String)>,
    ) {
        let Some(last) = last else {
            if std::mem::take(&mut self.ready) {
                self.rung.stand_by(None);
                self.open.clear();
            }
            return;
        };
        let mut open = BTreeMap::new();
        let mut victims = Vec::with_capacity(last.victims.len());
        for (instance, frees) in last.victims {
            let Some((group, invocation)) = group(&instance) else { continue };
            let kept = self.open.remove(&instance).filter(|(of, _)| *of == invocation);
            let Some(kill) = kept.map(|(_, kill)| kill).or_else(|| open_kill(&group)) else { continue };
            open.insert(instance.clone(), (invocation, Arc::clone(&kill)));
            victims.push(Victim { instance, frees, kill });
        }
        self.open = open;
        self.ready = true;
        let (near, below, alone) = (last.near, last.below, last.alone);
        self.rung.stand_by(Some(Orders { near, due: Instant::now() + due, below, alone, victims }));
    }

    /// The loop makes room by itself.
    pub fn spare(&self, effect: &Effect) {
        match effect {
            Effect::Stop(_) => self.rung.spare(STOPPING),
            Effect::Kill(_) => self.rung.spare(KILLING),
            _ => {}
        }
    }

    /// Whom it has killed, and what was available then.
    pub fn killed(&self) -> Vec<(Instance, Bytes)> {
        self.rung.killed().into_iter().map(|killed| (killed.instance, killed.available)).collect()
    }
}

/// A group that is gone can't be opened, and needs no killing.
fn open_kill(group: &std::path::Path) -> Option<Arc<File>> {
    let mut options = File::options();
    options.write(true).custom_flags(libc::O_NOFOLLOW);
    options.open(group.join("cgroup.kill")).ok().map(Arc::new)
}

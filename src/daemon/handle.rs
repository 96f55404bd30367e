//! What the bus talks to: calls that become inputs of the daemon's loop, and come back answered.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Notify, Semaphore, mpsc, oneshot};

use super::input::{Command, Input};
use super::jobs::{Job, JobKind};
use super::leases::LeaseAsk;
use super::report::Status;
use crate::bytes::Bytes;
use crate::config::{Instance, ModelName};
use crate::ledger::{Footprint, Machine, SwapName, SwapOwner, UnitState};
use crate::os::{pidfd_open, since_boot};
use crate::policy::core::Effect;
use crate::policy::{Decision, Mode, Refusal};
use crate::ports::{Catalog, CatalogError, Launch, Wish};

/// Turns at something that blocks: a few at a time, some that wait, and the rest is told to come
/// again.
struct Turns {
    working: Semaphore,
    waiting: Semaphore,
}

impl Turns {
    fn new(working: usize, waiting: usize) -> Arc<Self> {
        Arc::new(Self { working: Semaphore::new(working), waiting: Semaphore::new(working + waiting) })
    }

    /// Works something out on another thread.
    async fn take<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Fault> {
        let busy = || Fault::Busy("the daemon is overrun with calls; try again".to_owned());
        let _place = self.waiting.try_acquire().map_err(|_| busy())?;
        let _turn = self.working.acquire().await.map_err(|_| busy())?;
        let done = tokio::task::spawn_blocking(work).await;
        done.map_err(|error| Fault::Failed(format!("the daemon has a fault: {error}")))
    }
}

/// Why a call has no result. Each is one sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The decisions refused it.
    #[error("{0}")]
    Refused(Box<Refusal>),
    /// The model, its files or the wish are wrong.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// The caller is not the main process of that instance's unit.
    #[error("{0}")]
    NotTheUnit(String),
    /// Something else has to end first.
    #[error("{0}")]
    Busy(String),
    /// There are as many as there may be.
    #[error("{0}")]
    TooMany(String),
    /// Anything else.
    #[error("{0}")]
    Failed(String),
}

/// The main process of a unit at the gate, proven to be that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asker {
    /// The instance whose unit it is.
    pub instance: Instance,
    /// InvocationID of the unit.
    pub invocation: String,
    /// A person started it: the machine is not booting, and it is not a restart after a crash.
    pub explicit: bool,
}

/// The process at the other end of a call, as the bus vouches for it.
#[derive(Debug)]
pub struct Peer {
    /// Its id.
    pub pid: u32,
    /// A descriptor of it, where the bus has one.
    pub pidfd: Option<OwnedFd>,
    /// Its user.
    pub uid: u32,
}

/// Memory to be held for something that is no model.
#[derive(Debug)]
pub struct LeaseWish {
    /// The process that holds it: it ends with that.
    pub holder: Peer,
    /// Its name for people.
    pub name: ModelName,
    /// How much of the host's memory.
    pub bytes: Bytes,
    /// How much of the first GPU's.
    pub gpu_bytes: Bytes,
    /// As much as this model takes, at this context or the configured one, instead.
    pub like: Option<(String, Option<u64>)>,
    /// 0 to 100: only strictly lower ones are evicted for it.
    pub priority: u8,
    /// Wait until there is room, rather than be refused.
    pub wait: bool,
}

/// The outcome of [`Asking::prove`], later.
pub type Proof<'a> = Pin<Box<dyn Future<Output = Result<Asker, Fault>> + Send + 'a>>;

/// Proves who asks at the gate.
pub trait Asking: Send + Sync {
    /// Whether `peer` is the main process of `instance`'s unit; if so, what the daemon has to know
    /// of its start.
    fn prove(&self, peer: Peer, instance: Instance) -> Proof<'_>;
}

/// That an instance is a model: what was adopted is started and stopped by whoever it belongs to, which is done
/// `otherwise`; and a lease is its holder's.
fn ours(instance: &Instance, otherwise: impl FnOnce(&Instance) -> String) -> Result<(), Fault> {
    let why = if instance.lease {
        format!("{instance} is a lease, which ends with its holder")
    } else if instance.is_foreign() {
        format!("{instance} is a service of somebody else: {}", otherwise(instance))
    } else {
        return Ok(());
    };
    Err(Fault::Catalog(CatalogError::NotFound(why)))
}

fn by_systemctl(verb: &str) -> impl Fn(&Instance) -> String {
    move |instance| format!("use 'systemctl {verb} {instance}'")
}

/// How a model is to be loaded, once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// Another context than the configured one; tokens.
    pub context: Option<u64>,
    /// Models that may be stopped for it whatever their priority.
    pub instead_of: BTreeSet<Instance>,
    /// Load it whatever the arithmetic says.
    pub force: bool,
    /// Whoever is stopped for it stays stopped when it ends.
    pub no_restore: bool,
}

/// The daemon, for those who call it.
#[derive(Clone)]
pub struct Handle {
    inputs: mpsc::UnboundedSender<Input>,
    catalog: Arc<dyn Catalog>,
    latest: Arc<Mutex<Arc<Machine>>>,
    /// For what reads the configuration alone.
    quick: Arc<Turns>,
    /// For what reads the configured models' files, on disks that may not answer.
    slow: Arc<Turns>,
    /// For files of callers, which may be made to block for ever.
    foreign: Arc<Turns>,
    jobs: Arc<AtomicU32>,
    leases: Arc<AtomicU64>,
}

impl Handle {
    pub(super) fn new(
        inputs: mpsc::UnboundedSender<Input>,
        catalog: Arc<dyn Catalog>,
        latest: Arc<Mutex<Arc<Machine>>>,
    ) -> Self {
        let boot_usec = u64::try_from(since_boot().as_micros()).unwrap_or(u64::MAX);
        Self {
            inputs,
            catalog,
            latest,
            quick: Turns::new(2, 64),
            slow: Turns::new(2, 32),
            foreign: Turns::new(1, 4),
            jobs: Arc::new(AtomicU32::new(0)),
            // Later than that of any daemon before it.
            leases: Arc::new(AtomicU64::new(boot_usec)),
        }
    }

    /// The gate: returns once there is room.
    ///
    /// # Errors
    /// The refusal, or what is wrong with the model.
    pub async fn admit(
        &self,
        asker: Asker,
        files: Vec<(PathBuf, File)>,
        environment: BTreeMap<String, String>,
        engine: BTreeMap<String, String>,
    ) -> Result<Launch, Fault> {
        self.call(|reply| Command::Admit { asker, files, environment, engine, reply }).await?
    }

    /// What loading would do now. Changes nothing.
    ///
    /// # Errors
    /// There is no such model, or something is wrong with it.
    pub async fn plan(&self, instance: String, context: Option<u64>) -> Result<Decision, Fault> {
        let gpus = self.machine().gpus.clone();
        let catalog = Arc::clone(&self.catalog);
        let weigh = move || {
            let instance = Some(catalog.resolve(&instance)?);
            catalog.request(&Wish { instance, context, explicit: true, ..Wish::default() }, &gpus)
        };
        let request = self.read_models(weigh).await??;
        self.call(|reply| Command::Plan(Box::new(request), reply)).await
    }

    /// Checks the names of a load (`instead_of` those of `options`) and numbers its job, which [`Handle::begin_load`] begins. Files are
    /// for the unit to look at: the mounts that they are on may only come with its start.
    ///
    /// # Errors
    /// There is no such model, or something is wrong with it.
    pub async fn prepare_load(
        &self,
        instance: String,
        instead_of: Vec<String>,
        options: LoadOptions,
    ) -> Result<(Job, LoadOptions), Fault> {
        let check = move |catalog: &dyn Catalog| {
            let instance = catalog.resolve(&instance)?;
            let others: Result<BTreeSet<Instance>, _> =
                instead_of.iter().map(|other| catalog.resolve(other)).collect();
            Ok::<_, CatalogError>((instance, LoadOptions { instead_of: others?, ..options }))
        };
        let (instance, options) = self.read(check).await??;
        ours(&instance, by_systemctl("start"))?;
        // Whatever their priority: that is for whoever they belong to.
        options.instead_of.iter().try_for_each(|other| ours(other, by_systemctl("stop")))?;
        let runs = self.machine().units.get(&instance).is_some_and(|unit| unit.state == UnitState::Active);
        if runs && options != LoadOptions::default() {
            let why = format!("{instance} runs already: 'plimsoll unload {instance}' first");
            return Err(Fault::Busy(why));
        }
        Ok((self.job(instance, JobKind::Load), options))
    }

    /// Begins a job that [`Handle::prepare_load`] made.
    pub fn begin_load(&self, job: Job, options: LoadOptions) {
        self.send(Command::Load(job, options));
    }

    /// Numbers the job of an unload. What runs may be stopped even where its configuration is gone.
    ///
    /// # Errors
    /// Nothing of that name is configured or runs.
    pub async fn prepare_unload(&self, instance: String) -> Result<Job, Fault> {
        let instance = self.shown(instance).await?;
        ours(&instance, by_systemctl("stop"))?;
        Ok(self.job(instance, JobKind::Unload))
    }

    /// Begins a job that [`Handle::prepare_unload`] made.
    pub fn begin_unload(&self, job: Job) {
        self.send(Command::Unload(job));
    }

    /// Never evict a model, or allow it again.
    ///
    /// # Errors
    /// There is no such model.
    pub async fn pin(&self, instance: String, pinned: bool) -> Result<(), Fault> {
        let instance = self.shown(instance).await?;
        ours(&instance, |unit| format!("plimsoll.toml pins it, by 'pinned' under [adopt.\"{unit}\"]"))?;
        self.call(|reply| Command::Pin(instance, pinned, reply)).await
    }

    /// Everything that is shown of the daemon.
    ///
    /// # Errors
    /// The daemon is overrun with calls, or ending.
    pub async fn status(&self) -> Result<Status, Fault> {
        if let Some(rules) = self.read(|catalog| catalog.rulebook()).await? {
            let _ = self.inputs.send(Input::Rules(Box::new(rules)));
        }
        self.call(Command::Status).await
    }

    /// The last decision on an instance; none where nothing was decided yet.
    ///
    /// # Errors
    /// The name makes no sense.
    pub async fn explain(&self, instance: String) -> Result<Option<Decision>, Fault> {
        let instance = self.name(instance).await?;
        self.call(|reply| Command::Explain(instance, reply)).await
    }

    /// Reads the configuration again; returns what is wrong with it.
    ///
    /// # Errors
    /// The daemon is overrun with calls, or ending.
    pub async fn reload(&self) -> Result<Vec<String>, Fault> {
        let problems = self.read(|catalog| catalog.reload()).await?;
        let _ = self.inputs.send(Input::Reload);
        Ok(problems)
    }

    /// Holds memory for as long as the descriptor that it returns is open somewhere, and its holder lives.
    ///
    /// # Errors
    /// The refusal, or what is wrong with the wish.
    pub async fn lease(&self, wish: LeaseWish) -> Result<(u64, OwnedFd), Fault> {
        let LeaseWish { holder, name, bytes, gpu_bytes, like, priority, wait } = wish;
        let footprint = match like {
            Some((model, context)) => self.footprint_like(model, context).await?,
            None => Footprint { private: bytes, ..Footprint::default() },
        };
        let mut footprint = footprint;
        if !gpu_bytes.is_zero() {
            if self.machine().gpus.is_empty() {
                return Err(Fault::Failed("this machine has no GPU whose memory could be held".to_owned()));
            }
            footprint.gpus.resize(footprint.gpus.len().max(1), Bytes::ZERO);
            footprint.gpus[0] = gpu_bytes.max(footprint.gpus[0]);
        }
        if footprint.total().is_zero() {
            return Err(Fault::Failed("a lease of nothing holds nothing: give it a size".to_owned()));
        }
        let gone = |_| Fault::Failed("the process that asks has ended".to_owned());
        let pidfd = holder.pidfd.map_or_else(|| pidfd_open(holder.pid), Ok).map_err(gone)?;
        let id = self.leases.fetch_add(1, Ordering::Relaxed);
        let began = Arc::new(Notify::new());
        let (uid, pid, told) = (holder.uid, holder.pid, Arc::clone(&began));
        let held = self
            .call(|reply| {
                let ask =
                    LeaseAsk { id, name, uid, pid, pidfd, footprint, priority, wait, began: told, reply };
                Command::Lease(ask)
            })
            .await??;
        // Its object is there before anybody can look for it.
        began.notified().await;
        Ok((id, held))
    }

    /// What a model would take.
    async fn footprint_like(&self, model: String, context: Option<u64>) -> Result<Footprint, Fault> {
        let gpus = self.machine().gpus.clone();
        let catalog = Arc::clone(&self.catalog);
        let weigh = move || {
            let instance = Some(catalog.resolve(&model)?);
            catalog.request(&Wish { instance, context, ..Wish::default() }, &gpus)
        };
        let request = self.read_models(weigh).await??;
        let rung = request.ladder.into_iter().next();
        rung.map(|rung| rung.footprint).ok_or_else(|| {
            let why = request.unknown.unwrap_or_else(|| "there is no estimate".to_owned());
            let name = request.instance;
            Fault::Catalog(CatalogError::Config(format!("the size of {name} is unknown: {why}; give a size")))
        })
    }

    /// Makes a swapfile of this size, and returns once it is in use.
    ///
    /// # Errors
    /// There is no room for it, or the daemon is ending.
    pub async fn add_swap(&self, size: Bytes) -> Result<(), Fault> {
        self.call(|reply| Command::Swap(Effect::AddSwap(SwapOwner::Person, size), reply)).await?
    }

    /// Takes a swapfile of the daemon's own out of use and removes it.
    ///
    /// # Errors
    /// There is none of that name, a model needs it, or what it holds does not fit in memory.
    pub async fn remove_swap(&self, name: &str) -> Result<(), Fault> {
        let name: SwapName = name.parse().map_err(Fault::Failed)?;
        self.call(|reply| Command::Swap(Effect::RemoveSwap(name), reply)).await?
    }

    /// Enforce or observe, until the configuration is read again.
    ///
    /// # Errors
    /// The daemon is ending.
    pub async fn set_mode(&self, mode: Mode) -> Result<(), Fault> {
        self.call(|reply| Command::SetMode(mode, reply)).await
    }

    /// The machine as it was read last.
    fn machine(&self) -> Arc<Machine> {
        Arc::clone(&self.latest.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn job(&self, instance: Instance, kind: JobKind) -> Job {
        Job { number: self.jobs.fetch_add(1, Ordering::Relaxed).wrapping_add(1), instance, kind }
    }

    /// The instance of that name, which is configured or still runs without a configuration.
    async fn shown(&self, text: String) -> Result<Instance, Fault> {
        let resolve = move |catalog: &dyn Catalog| catalog.resolve(&text).map_err(|error| (error, text));
        let (error, text) = match self.read(resolve).await? {
            Ok(instance) => return Ok(instance),
            Err(unknown) => unknown,
        };
        let shown = self.status().await?.models.into_iter().any(|model| model.instance == text);
        text.parse().ok().filter(|_| shown).ok_or(Fault::Catalog(error))
    }

    /// The instance that a text means; what only looks like a name will do where nothing is
    /// configured under it (any more).
    async fn name(&self, text: String) -> Result<Instance, Fault> {
        let resolve = move |catalog: &dyn Catalog| match catalog.resolve(&text) {
            Ok(instance) => Ok(instance),
            Err(error) => text.parse().map_err(|_| error),
        };
        Ok(self.read(resolve).await??)
    }

    /// Looks something up in the configuration, on another thread.
    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn Catalog) -> T + Send + 'static,
    ) -> Result<T, Fault> {
        let catalog = Arc::clone(&self.catalog);
        self.quick.take(move || work(&*catalog)).await
    }

    /// Reads the files of configured models, on another thread.
    ///
    /// # Errors
    /// The daemon is overrun with calls.
    pub async fn read_models<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Fault> {
        self.slow.take(work).await
    }

    /// Reads files that a caller has opened, on another thread.
    ///
    /// # Errors
    /// The daemon is overrun with calls.
    pub async fn read_foreign<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Fault> {
        self.foreign.take(work).await
    }

    fn send(&self, command: Command) {
        // The loop outlives every call but the last ones.
        let _ = self.inputs.send(Input::Command(Box::new(command)));
    }

    async fn call<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Fault> {
        let (reply, answer) = oneshot::channel();
        self.send(command(reply));
        answer.await.map_err(|_| Fault::Failed("the daemon is ending".to_owned()))
    }
}

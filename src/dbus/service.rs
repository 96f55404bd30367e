//! The daemon on the bus: `org.plimsoll1.Manager` and the objects of its jobs and leases.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;
use zbus::message::Header;
use zbus::object_server::SignalEmitter;
use zbus::{Connection, OwnedObjectPath, OwnedVariant, Variant, interface};

use super::authorize::{ACQUIRE_LEASE, Authority, CONFIGURE, MANAGE_MODELS, modest};
use super::error::{Error, Kind};
use super::models::Models;
use super::{PATH, peer};
use crate::bytes::Bytes;
use crate::config::{DEFAULT_PRIORITY, Instance, NameError};
use crate::daemon::{Asking, Fault, Handle, Job, LeaseInfo, LeaseWish, LoadOptions, Publication};
use crate::os::release_memory;
use crate::policy::{Mode, RefusalKind};
use crate::ports::CatalogError;

/// A call has at most this many files, variables and names; real ones have a few.
const LONGEST: u32 = 1100;
/// At most this many contexts are priced for a call, as nobody can stop it; real ones ask for a few.
const MOST_CONTEXTS: u32 = 32;
/// A call that asks for a name, and contexts, has at most so many bytes …
const NAMING: u32 = 16 << 10;
/// … and one with paths and an engine's arguments or variables so many. Everybody may call these.
const BRINGING: u32 = 256 << 10;

/// What models take, as the JSON of `plimsoll fit`; for the daemon's own machine. May block.
pub trait Quotes: Send + Sync {
    /// A configured model.
    ///
    /// # Errors
    /// There is none, or something is wrong with it.
    fn configured(&self, name: &str, contexts: &[u64]) -> Result<String, Error>;

    /// A model in files that the caller has opened, all shards of it; the names are labels.
    /// `arguments` are the engine's.
    ///
    /// # Errors
    /// Something is wrong with them.
    fn files(
        &self,
        files: Vec<(PathBuf, File)>,
        arguments: &[String],
        contexts: &[u64],
    ) -> Result<String, Error>;
}

/// `org.plimsoll1.Manager`.
pub struct Manager {
    handle: Handle,
    authority: Authority,
    /// Proves who asks at the gate; none where the gate is simulated.
    asking: Option<Arc<dyn Asking>>,
    /// None where the machine is simulated, and models have no files.
    quotes: Option<Arc<dyn Quotes>>,
    mode: Arc<Mutex<Mode>>,
}

/// `org.plimsoll1.Job`.
struct JobObject {
    job: Job,
    progress: Mutex<String>,
}

/// `org.plimsoll1.Lease`.
struct LeaseObject(LeaseInfo);

type Variants = HashMap<&'static str, Variant<'static>>;

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        let kind = match &fault {
            Fault::Refused(refusal) => match refusal.kind {
                RefusalKind::WontFit | RefusalKind::UnitLimit(_) | RefusalKind::FailsToLoad(_) => {
                    Kind::WontFit
                }
                RefusalKind::UnknownSize(_) => Kind::UnknownSize,
                RefusalKind::NamedIsPinned(_) => Kind::Pinned,
                RefusalKind::WaitedTooLong(_) | RefusalKind::Killed => Kind::Busy,
            },
            Fault::Catalog(CatalogError::NotFound(_)) => Kind::NotFound,
            Fault::Catalog(CatalogError::Config(_)) => Kind::Config,
            Fault::NotTheUnit(_) => Kind::NotTheUnit,
            Fault::Busy(_) => Kind::Busy,
            Fault::TooMany(_) => Kind::TooMany,
            Fault::Failed(_) => Kind::Failed,
        };
        Self::new(kind, fault.to_string())
    }
}

/// The path of a job's object.
fn job_path(number: u32) -> Result<OwnedObjectPath, Error> {
    let path = OwnedObjectPath::try_from(format!("{PATH}/job/{number}"));
    path.map_err(|error| Error::new(Kind::Failed, error.to_string()))
}

/// The path of a lease's object.
fn lease_path(id: u64) -> Result<OwnedObjectPath, Error> {
    let path = OwnedObjectPath::try_from(format!("{PATH}/lease/{id}"));
    path.map_err(|error| Error::new(Kind::Failed, error.to_string()))
}

fn json(value: &impl serde::Serialize) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|error| Error::new(Kind::Failed, error.to_string()))
}

fn bounded(length: usize, what: &str) -> Result<(), Error> {
    at_most(LONGEST, length, what)
}

fn at_most(most: u32, length: usize, what: &str) -> Result<(), Error> {
    if length > most as usize {
        let why = format!("{length} {what} are too many for one call, {most} is the most");
        return Err(Error::new(Kind::Failed, why));
    }
    Ok(())
}

/// A vocabulary takes tens of MiB while it is read; these are given back.
fn trimmed<T>(quoted: T) -> T {
    release_memory();
    quoted
}

fn files(list: Vec<(String, zbus::OwnedFd)>) -> Vec<(PathBuf, File)> {
    list.into_iter().map(|(path, fd)| (PathBuf::from(path), File::from(OwnedFd::from(fd)))).collect()
}

impl Manager {
    /// The manager of a daemon.
    #[must_use]
    pub fn new(
        handle: Handle,
        authority: Authority,
        asking: Option<Arc<dyn Asking>>,
        quotes: Option<Arc<dyn Quotes>>,
        mode: Mode,
    ) -> Self {
        Self { handle, authority, asking, quotes, mode: Arc::new(Mutex::new(mode)) }
    }

    /// The quotes, for use on a thread that may block.
    fn quotes(&self) -> Result<Arc<dyn Quotes>, Error> {
        let none = || Error::new(Kind::Failed, "simulated models have no files to read");
        self.quotes.clone().ok_or_else(none)
    }

    async fn add_job(&self, connection: &Connection, job: &Job) -> Result<OwnedObjectPath, Error> {
        let path = job_path(job.number)?;
        let object = JobObject { job: job.clone(), progress: Mutex::new(String::new()) };
        connection.object_server().at(&path, object).await?;
        Ok(path)
    }
}

#[interface(name = "org.plimsoll1.Manager", introspection_docs = false)]
impl Manager {
    async fn fit(
        &self,
        #[zbus(header)] header: Header<'_>,
        name: String,
        contexts: Vec<u64>,
    ) -> Result<String, Error> {
        modest(&header, NAMING, 0)?;
        at_most(MOST_CONTEXTS, contexts.len(), "contexts")?;
        let quotes = self.quotes()?;
        self.handle.read_models(move || trimmed(quotes.configured(&name, &contexts))).await?
    }

    async fn fit_files(
        &self,
        #[zbus(header)] header: Header<'_>,
        files: Vec<(String, zbus::OwnedFd)>,
        arguments: Vec<String>,
        contexts: Vec<u64>,
    ) -> Result<String, Error> {
        modest(&header, BRINGING, LONGEST)?;
        bounded(files.len(), "files")?;
        bounded(arguments.len(), "arguments")?;
        at_most(MOST_CONTEXTS, contexts.len(), "contexts")?;
        let files = self::files(files);
        let quotes = self.quotes()?;
        self.handle.read_foreign(move || trimmed(quotes.files(files, &arguments, &contexts))).await?
    }

    async fn plan(
        &self,
        #[zbus(header)] header: Header<'_>,
        instance: String,
        context: u64,
    ) -> Result<String, Error> {
        modest(&header, NAMING, 0)?;
        let context = (context != 0).then_some(context);
        json(&self.handle.plan(instance, context).await?)
    }

    async fn load(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        instance: String,
        options: HashMap<String, OwnedVariant>,
    ) -> Result<OwnedObjectPath, Error> {
        self.authority.check(connection, &header, MANAGE_MODELS).await?;
        let (mut loading, mut instead_of) = (LoadOptions::default(), Vec::new());
        for (key, value) in options {
            let wrong = |_| Error::new(Kind::Failed, format!("option '{key}' has the wrong type"));
            match key.as_str() {
                "context" => loading.context = Some(u64::try_from(value).map_err(wrong)?).filter(|n| *n != 0),
                "instead-of" => instead_of = Vec::<String>::try_from(value).map_err(wrong)?,
                "force" => loading.force = bool::try_from(value).map_err(wrong)?,
                "restore" => loading.no_restore = !bool::try_from(value).map_err(wrong)?,
                _ => return Err(Error::new(Kind::Failed, format!("there is no option '{key}'"))),
            }
        }
        bounded(instead_of.len(), "names")?;
        let (job, options) = self.handle.prepare_load(instance, instead_of, loading).await?;
        // The object is there before anything can happen to it.
        let path = self.add_job(connection, &job).await?;
        self.handle.begin_load(job, options);
        Ok(path)
    }

    async fn unload(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        instance: String,
    ) -> Result<OwnedObjectPath, Error> {
        self.authority.check(connection, &header, MANAGE_MODELS).await?;
        let job = self.handle.prepare_unload(instance).await?;
        let path = self.add_job(connection, &job).await?;
        self.handle.begin_unload(job);
        Ok(path)
    }

    #[zbus(out_args("argv", "engine_environment"))]
    async fn admit(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        instance: String,
        files: Vec<(String, zbus::OwnedFd)>,
        environment: BTreeMap<String, String>,
        engine: BTreeMap<String, String>,
    ) -> Result<(Vec<String>, BTreeMap<String, String>), Error> {
        modest(&header, BRINGING, LONGEST)?;
        bounded(files.len(), "files")?;
        bounded(engine.len(), "answers")?;
        bounded(environment.len(), "variables")?;
        let instance: Instance =
            instance.parse().map_err(|error| Error::new(Kind::NotFound, format!("{error}")))?;
        let Some(asking) = &self.asking else {
            let why = "a simulated machine has a gate of its own";
            return Err(Error::new(Kind::NotTheUnit, why));
        };
        let asker = asking.prove(peer::of(connection, &header).await?, instance).await?;
        // Anything else is none of the daemon's business, and may be a secret.
        let environment =
            environment.into_iter().filter(|(name, _)| crate::engine::is_relevant_variable(name)).collect();
        let launch = self.handle.admit(asker, self::files(files), environment, engine).await?;
        Ok((launch.argv, launch.environment))
    }

    async fn pin(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        instance: String,
    ) -> Result<(), Error> {
        self.authority.check(connection, &header, MANAGE_MODELS).await?;
        Ok(self.handle.pin(instance, true).await?)
    }

    async fn unpin(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        instance: String,
    ) -> Result<(), Error> {
        self.authority.check(connection, &header, MANAGE_MODELS).await?;
        Ok(self.handle.pin(instance, false).await?)
    }

    #[zbus(out_args("problems"))]
    async fn reload(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<Vec<String>, Error> {
        self.authority.check(connection, &header, CONFIGURE).await?;
        Ok(self.handle.reload().await?)
    }

    async fn set_mode(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        mode: String,
    ) -> Result<(), Error> {
        self.authority.check(connection, &header, CONFIGURE).await?;
        let mode = match mode.as_str() {
            "enforce" => Mode::Enforce,
            "observe" => Mode::Observe,
            _ => return Err(Error::new(Kind::Failed, "the mode is either 'enforce' or 'observe'")),
        };
        Ok(self.handle.set_mode(mode).await?)
    }

    #[zbus(out_args("descriptor", "lease"))]
    async fn acquire_lease(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        name: String,
        bytes: u64,
        options: HashMap<String, OwnedVariant>,
    ) -> Result<(zbus::OwnedFd, OwnedObjectPath), Error> {
        let holder = peer::of(connection, &header).await?;
        self.authority.check(connection, &header, ACQUIRE_LEASE).await?;
        let name = name.parse().map_err(|error: NameError| Error::new(Kind::Failed, error.to_string()))?;
        let (mut like, mut context) = (None, None);
        let mut wish = LeaseWish {
            holder,
            name,
            bytes: Bytes(bytes),
            gpu_bytes: Bytes::ZERO,
            like: None,
            priority: DEFAULT_PRIORITY,
            wait: false,
        };
        for (key, value) in options {
            let wrong = |_| Error::new(Kind::Failed, format!("option '{key}' has the wrong type"));
            match key.as_str() {
                "gpu-bytes" => wish.gpu_bytes = Bytes(u64::try_from(value).map_err(wrong)?),
                "like" => like = Some(String::try_from(value).map_err(wrong)?),
                "context" => context = Some(u64::try_from(value).map_err(wrong)?).filter(|n| *n != 0),
                "wait" => wish.wait = bool::try_from(value).map_err(wrong)?,
                "priority" => {
                    let priority = u8::try_from(u32::try_from(value).map_err(wrong)?).ok();
                    let above = || Error::new(Kind::Failed, "a priority is between 0 and 100");
                    wish.priority = priority.filter(|priority| *priority <= 100).ok_or_else(above)?;
                }
                _ => return Err(Error::new(Kind::Failed, format!("there is no option '{key}'"))),
            }
        }
        wish.like = like.map(|like| (like, context));
        let (id, descriptor) = self.handle.lease(wish).await?;
        Ok((zbus::OwnedFd::from(descriptor), lease_path(id)?))
    }

    async fn add_swap(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        bytes: u64,
    ) -> Result<(), Error> {
        self.authority.check(connection, &header, CONFIGURE).await?;
        Ok(self.handle.add_swap(Bytes(bytes)).await?)
    }

    async fn remove_swap(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        name: String,
    ) -> Result<(), Error> {
        self.authority.check(connection, &header, CONFIGURE).await?;
        Ok(self.handle.remove_swap(&name).await?)
    }

    async fn list_models(&self) -> Result<Vec<Variants>, Error> {
        let row = |model: crate::daemon::report::Model| {
            let requests = model.requests.map(|n| ("requests", Variant::from(n)));
            let idle = model.idle_seconds.map(|seconds| ("idle-seconds", Variant::from(seconds)));
            let always = HashMap::from([
                ("predicted-bytes", Variant::from(model.predicted.total().0)),
                ("measured-bytes", Variant::from(model.measured.total().0)),
                ("name", Variant::from(model.name)),
                ("instance", Variant::from(model.instance)),
                ("state", Variant::from(model.state)),
                ("priority", Variant::from(u32::from(model.priority))),
                ("pinned", Variant::from(model.pinned)),
                ("context", Variant::from(model.context)),
            ]);
            always.into_iter().chain(requests).chain(idle).collect()
        };
        Ok(self.handle.status().await?.models.into_iter().map(row).collect())
    }

    async fn status(&self) -> Result<String, Error> {
        json(&self.handle.status().await?)
    }

    async fn explain(&self, #[zbus(header)] header: Header<'_>, instance: String) -> Result<String, Error> {
        modest(&header, NAMING, 0)?;
        if let Some(decision) = self.handle.explain(instance.clone()).await? {
            return json(&decision);
        }
        let none = format!("nothing has been decided on '{instance}' yet");
        let models = self.handle.status().await?.models;
        Err(if models.iter().any(|model| model.instance == instance || model.name == instance) {
            Error::new(
                Kind::Failed,
                format!("{none}\nhint: 'plimsoll plan {instance}' says what a load would do"),
            )
        } else {
            Error::new(Kind::NotFound, none)
        })
    }

    #[zbus(signal)]
    async fn decision(emitter: &SignalEmitter<'_>, json: &str) -> zbus::Result<()>;

    #[zbus(signal)]
    async fn admit_progress(emitter: &SignalEmitter<'_>, instance: &str, text: &str) -> zbus::Result<()>;

    #[zbus(signal)]
    async fn about_to_evict(
        emitter: &SignalEmitter<'_>,
        instance: &str,
        for_instance: &str,
        deadline_usec: u64,
    ) -> zbus::Result<()>;

    #[zbus(signal)]
    async fn pressure_changed(
        emitter: &SignalEmitter<'_>,
        level: &str,
        headroom_bytes: u64,
    ) -> zbus::Result<()>;

    #[zbus(signal)]
    async fn job_removed(
        emitter: &SignalEmitter<'_>,
        job: OwnedObjectPath,
        instance: &str,
        result: &str,
        message: &str,
    ) -> zbus::Result<()>;

    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> String {
        env!("CARGO_PKG_VERSION").to_owned()
    }

    #[zbus(property)]
    fn mode(&self) -> String {
        let mode = match *self.mode.lock().unwrap_or_else(PoisonError::into_inner) {
            Mode::Enforce => "enforce",
            Mode::Observe => "observe",
        };
        mode.to_owned()
    }
}

#[interface(name = "org.plimsoll1.Job", introspection_docs = false)]
impl JobObject {
    #[zbus(property(emits_changed_signal = "const"))]
    fn instance(&self) -> String {
        self.job.instance.to_string()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn kind(&self) -> String {
        self.job.kind.as_str().to_owned()
    }

    #[zbus(property)]
    fn progress(&self) -> String {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    #[zbus(property)]
    fn state(&self) -> String {
        "running".to_owned()
    }
}

#[interface(name = "org.plimsoll1.Lease", introspection_docs = false)]
impl LeaseObject {
    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> String {
        self.0.instance.model.to_string()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn instance(&self) -> String {
        self.0.instance.to_string()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn bytes(&self) -> u64 {
        self.0.bytes.0
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn gpu_bytes(&self) -> u64 {
        self.0.gpu_bytes.0
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn priority(&self) -> u32 {
        u32::from(self.0.priority)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn user(&self) -> u32 {
        self.0.uid
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn process(&self) -> u32 {
        self.0.pid
    }
}

/// Sends out what the daemon publishes, and keeps the objects of its models, until it ends.
pub async fn publish(connection: Connection, mut published: mpsc::UnboundedReceiver<Publication>) {
    let mut models = Models::default();
    while let Some(publication) = published.recv().await {
        if let Err(error) = emit(&connection, &mut models, publication).await {
            tracing::warn!("a signal could not be sent: {error}");
        }
    }
}

async fn emit(connection: &Connection, models: &mut Models, publication: Publication) -> Result<(), Error> {
    let emitter = SignalEmitter::new(connection, PATH)?;
    match publication {
        Publication::Decision(decision) => Manager::decision(&emitter, &json(&decision)?).await?,
        Publication::Progress(instance, text) => {
            Manager::admit_progress(&emitter, &instance.to_string(), &text).await?;
        }
        Publication::AboutToEvict(instance, other, deadline) => {
            let other = other.map(|other| other.to_string()).unwrap_or_default();
            Manager::about_to_evict(&emitter, &instance.to_string(), &other, deadline).await?;
        }
        Publication::Pressure(level, headroom) => {
            Manager::pressure_changed(&emitter, &level.to_string(), headroom.0).await?;
        }
        Publication::JobProgress(number, text) => {
            let job = connection.object_server().interface::<_, JobObject>(job_path(number)?).await?;
            let object = job.get().await;
            *object.progress.lock().unwrap_or_else(PoisonError::into_inner) = text;
            object.progress_changed(job.signal_emitter()).await?;
        }
        Publication::JobEnded(job, result, message) => {
            let path = job_path(job.number)?;
            let instance = job.instance.to_string();
            Manager::job_removed(&emitter, path.clone(), &instance, result.as_str(), &message).await?;
            connection.object_server().remove::<JobObject, _>(path).await?;
        }
        Publication::LeaseBegan(lease, began) => {
            let path = lease_path(lease.id)?;
            let added = connection.object_server().at(path, LeaseObject(lease)).await;
            // Without an object it is a lease all the same.
            began.notify_one();
            added?;
        }
        Publication::LeaseEnded(id) => {
            connection.object_server().remove::<LeaseObject, _>(lease_path(id)?).await?;
        }
        Publication::Mode(mode) => {
            let manager = connection.object_server().interface::<_, Manager>(PATH).await?;
            let object = manager.get().await;
            *object.mode.lock().unwrap_or_else(PoisonError::into_inner) = mode;
            object.mode_changed(manager.signal_emitter()).await?;
        }
        Publication::Models(now) => models.show(connection.object_server(), now).await?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_prices_few_contexts() {
        let contexts = |count: usize| at_most(MOST_CONTEXTS, count, "contexts").map_err(|e| e.to_string());
        assert!(contexts(32).is_ok());
        assert!(contexts(33).unwrap_err().contains("33 contexts are too many for one call, 32 is the most"));
    }
}

//! The daemon on the real machine and the system bus.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use zbus::Connection;
use zbus::fdo::{ObjectManager, RequestNameFlags};

use super::authorize::{Authority, Polkit};
use super::service::{Manager, Quotes, publish};
use super::{NAME, PATH};
use crate::action::notify::Notifier;
use crate::action::read_ahead::ReadAhead;
use crate::action::systemd::{Systemd, SystemdError};
use crate::config::Instance;
use crate::daemon::catalog::RealCatalog;
use crate::daemon::real::{
    Activities, Effects, Files, Gate, PageCache, RealPorts, SwapFiles, Units, call_off_removals, carry_out,
    follow, past_the_gate,
};
use crate::daemon::survey::Survey;
use crate::daemon::{Daemon, Input, Parts, journal, leases, signals};
use crate::host::Host;
use crate::os::{lock_memory, refuse_huge_pages, stored_descriptors};
use crate::policy::{Core, Rules};
use crate::ports::Catalog;

/// Threads for what blocks: headers of models, page cache, engines that are asked, state files. Each kind has its own
/// bound where it is begun, or is begun by decisions that wait for its end; together they stay below this one, so that
/// none keeps another from running.
const BLOCKING_THREADS: usize = 32;

/// Runs a daemon to its end, on this thread.
pub fn run(daemon: impl Future<Output = Result<(), String>>) -> ExitCode {
    // Before there is another thread. Where that can't be had, the daemon is larger.
    let _ = refuse_huge_pages();
    let journal = journal::start();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(Duration::from_secs(1))
        .build();
    let ended = match runtime {
        Ok(runtime) => {
            let ended = runtime.block_on(daemon);
            // What still blocks (a disk that does not answer) must not hold up the end.
            runtime.shutdown_background();
            ended
        }
        Err(error) => Err(format!("the runtime can't be started: {error}")),
    };
    let code = match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            tracing::error!("{why}");
            ExitCode::FAILURE
        }
    };
    journal.end();
    code
}

/// Carries out one order about a swapfile, for `plimsoll-swap@.service`: what came of it is its status.
pub fn swap(root: &Path, order: &str) -> ExitCode {
    let outcome = carry_out(root, order);
    let (Ok(text) | Err(text)) = &outcome;
    // Nobody hears it where it was started by hand.
    let _ = Notifier::from_environment().status(text);
    eprintln!("{text}");
    if outcome.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Serves this machine on the system bus (or that at `bus`) until SIGTERM; all models go on running.
/// `quotes` are what models take by themselves.
///
/// # Errors
/// One sentence.
pub async fn serve(root: &Path, bus: Option<&str>, quotes: Arc<dyn Quotes>) -> Result<(), String> {
    if let Err(error) = lock_memory() {
        tracing::warn!(
            "the daemon's memory can't be locked, so it may be slow when memory is short: {error}"
        );
    }
    let (sender, inputs) = mpsc::unbounded_channel();
    signals::watch(&sender, false)?;
    let connection = connect(bus).await?;

    let host = Host::at(root);
    let boot = host.boot_id().map_err(|error| error.to_string())?;
    let files = Arc::new(Files::new(root, boot));
    let (durable, same_boot) = files.load();

    let catalog = Arc::new(RealCatalog::new(root));
    // Listened to before it is read, so that nothing is missed between the two.
    let no_systemd = |error: SystemdError| error.to_string();
    let systemd = Systemd::new(&connection).await.map_err(no_systemd)?;
    let units = Arc::new(Units::default());
    units.remember_limits(files.load_limits());
    let (unit_events, happened) = mpsc::unbounded_channel();
    let (found, more) = mpsc::unbounded_channel();
    let look_at_adopted = look_at_adopted(&catalog, found);
    let stranger = Arc::new(Notify::new());
    let of = whose(&catalog, &stranger);
    let adopted = catalog.adopted();
    let _watch = systemd.watch(unit_events, of, adopted.clone(), more).await.map_err(no_systemd)?;
    units.fill(&systemd, &adopted).await.map_err(no_systemd)?;
    tokio::spawn(look_when_told(Arc::clone(&look_at_adopted), stranger));
    call_off_removals(&systemd).await;

    let cache = Arc::new(PageCache::default());
    let swap = Arc::new(SwapFiles::default());
    let survey = Arc::new(survey(&catalog, &cache, &swap));
    let configured = Arc::clone(&catalog);
    let activities = Activities::new(host.clone(), move |instance| configured.place(instance));
    let read_ahead = Arc::new(ReadAhead::new(root));
    // What a daemon before this one has left.
    for said in read_ahead.set(&BTreeMap::new()).unwrap_or_else(|error| vec![error]) {
        tracing::info!("{said}");
    }
    let effects = Effects {
        systemd: systemd.clone(),
        host: host.clone(),
        units: Arc::clone(&units),
        cache: Arc::clone(&cache),
        activities: Arc::new(activities),
        read_ahead: Arc::clone(&read_ahead),
        files: Arc::clone(&files),
        survey: Arc::clone(&survey),
    };
    let ports = RealPorts::new(host.clone(), Arc::clone(&units), cache, swap, effects, sender.clone())?;
    let notifier = Notifier::from_environment();
    let leases = leases::keep(durable.leases, stored_descriptors(), &host, &notifier);
    let parts = Parts {
        leases,
        ports: Box::new(ports),
        catalog: Arc::clone(&catalog) as Arc<dyn Catalog>,
        core: Core::new(Rules::default(), durable.saved, same_boot),
        mode: durable.mode,
        store: Some(files),
        survey: Some(Arc::clone(&survey)),
        reloaded: Some(look_at_adopted),
        notifier,
    };
    let (daemon, handle, published) = Daemon::new(parts, sender.clone());
    for (instance, invocation) in past_the_gate(&units, &host) {
        daemon.adopt(instance, invocation);
    }

    // Swapfiles that were left behind are seen, and removed, without anybody asking for a model.
    let changed = sender.clone();
    tokio::spawn(async move {
        survey.look_to_the_end().await;
        let _ = changed.send(Input::Changed);
    });

    let failed = |error: zbus::Error| format!("the message bus does not work: {error}");
    let gate = Gate::new(systemd.clone(), Arc::clone(&units), host);
    // Its own connection: a bus lets each have only so many calls without an answer, and callers may keep polkit from
    // answering. Systemd is to be reached all the same.
    let polkit = Polkit::new(&connect(bus).await?).await.map_err(failed)?;
    let manager = Manager::new(
        handle,
        Authority::Polkit(Arc::new(polkit)),
        Some(Arc::new(gate)),
        Some(quotes),
        daemon.mode(),
    );
    connection.object_server().at(PATH, manager).await.map_err(failed)?;
    connection.object_server().at(PATH, ObjectManager).await.map_err(failed)?;
    tokio::spawn(publish(connection.clone(), published));
    tokio::spawn(follow(systemd, units, happened, sender));
    let alone = RequestNameFlags::DO_NOT_QUEUE;
    connection.request_name_with_flags(NAME, alone).await.map_err(|error| match error {
        zbus::Error::NameTaken => format!("{NAME} is taken: another plimsolld runs"),
        error => format!("the name {NAME} can't be had: {error}"),
    })?;
    let outcome = daemon.run(inputs).await;
    // Where it is started again, its first step sets them anew.
    for said in read_ahead.set(&BTreeMap::new()).unwrap_or_else(|error| vec![error]) {
        tracing::info!("{said}");
    }
    outcome
}

async fn connect(bus: Option<&str>) -> Result<Connection, String> {
    let builder = match bus {
        Some(address) => zbus::connection::Builder::address(address),
        None => zbus::connection::Builder::system(),
    };
    builder.build().await.map_err(|error| format!("no connection to the message bus: {error}"))
}

/// Says whose a unit is without a look at any file. `stranger` is told of a unit that is nobody's, and may have been
/// adopted since the configuration was read.
fn whose(
    catalog: &Arc<RealCatalog>,
    stranger: &Arc<Notify>,
) -> impl Fn(&str) -> Option<Instance> + Send + 'static {
    let (catalog, stranger) = (Arc::clone(catalog), Arc::clone(stranger));
    move |unit| {
        let instance = catalog.instance_of_unit(unit);
        let adoptable = || unit.parse().is_ok_and(|instance: Instance| instance.is_foreign());
        if instance.is_none() && adoptable() {
            stranger.notify_one();
        }
        instance
    }
}

/// Looks, on a thread that may block, whenever it is told to. One look at a time, however often that is: a disk that
/// does not answer holds one thread.
async fn look_when_told(look: Arc<dyn Fn() + Send + Sync>, told: Arc<Notify>) {
    loop {
        told.notified().await;
        let look = Arc::clone(&look);
        // One that panics has seen nothing.
        let _ = tokio::task::spawn_blocking(move || look()).await;
    }
}

/// Has units listened to that have just been adopted: one that runs already says nothing by itself. Blocks.
fn look_at_adopted(
    catalog: &Arc<RealCatalog>,
    found: mpsc::UnboundedSender<Instance>,
) -> Arc<dyn Fn() + Send + Sync> {
    let catalog = Arc::clone(catalog);
    Arc::new(move || {
        // Nobody hears it where the daemon is ending.
        catalog.adopted().into_iter().for_each(|instance| drop(found.send(instance)));
    })
}

/// Looks at what of the models' files is in the page cache, and at the swapfiles of the daemon's own.
fn survey(catalog: &Arc<RealCatalog>, cache: &Arc<PageCache>, swap: &Arc<SwapFiles>) -> Survey {
    let (catalog, cache, swap) = (Arc::clone(catalog), Arc::clone(cache), Arc::clone(swap));
    Survey::new(move || {
        cache.look(&catalog.model_files());
        swap.look(&catalog.swap());
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_adopted_is_found_by_its_next_job_beside_the_loop() {
        let root = std::env::temp_dir().join(format!("plimsoll-adopted-{}", std::process::id()));
        std::fs::create_dir_all(root.join("etc/plimsoll")).unwrap();
        let catalog = Arc::new(RealCatalog::new(&root));
        let (found, mut more) = mpsc::unbounded_channel();
        let stranger = Arc::new(Notify::new());
        let of = whose(&catalog, &stranger);
        let looking = tokio::spawn(look_when_told(look_at_adopted(&catalog, found), stranger));
        let adopted = "[adopt.\"ollama.service\"]\npriority = 40\n";
        std::fs::write(root.join("etc/plimsoll/plimsoll.toml"), adopted).unwrap();
        // What no configuration can name makes nobody look.
        assert_eq!((of("dev-sda.device"), of("session-1.scope")), (None, None));
        assert!(tokio::time::timeout(Duration::from_millis(100), more.recv()).await.is_err());
        assert_eq!(of("ollama.service"), None, "as it was read last");
        let instance = tokio::time::timeout(Duration::from_secs(10), more.recv()).await.unwrap();
        assert_eq!(instance, Some("ollama.service".parse().unwrap()));
        assert_eq!(of("ollama.service"), instance);
        looking.abort();
        std::fs::remove_dir_all(root).unwrap();
    }
}

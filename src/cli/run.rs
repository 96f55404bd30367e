//! `plimsoll run`: the gate in front of an engine, and the engine's own process afterwards.
//!
//! What could never work is found first, as the unit's own user, and costs nobody anything: then
//! the daemon is asked, and only its answer is executed.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::ffi::{CString, OsString};
use std::fs::File;
use std::net::ToSocketAddrs;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage, sockopt};

use super::args::{Common, Run};
use super::failure::{Exit, Failure};
use super::files::{open_all, user_name};
use super::gate::{self, Patience, Question};
use super::{hold, inquiry, opinion, output};
use crate::action::notify::Notifier;
use crate::config::{self, Instance, Model};
use crate::dbus::{BUS_ADDRESS_VARIABLE, CallError};
use crate::engine::{self, Purpose, kept};

pub(super) fn run(common: &Common, args: &Run) -> Result<Exit, Failure> {
    let notify = Notifier::from_environment();
    let failed = |failure: Failure| {
        tell(&notify, &failure.message);
        failure
    };
    match gate(common, args, &notify) {
        Ok(Passed { argv, environment, shards }) => {
            match become_engine(&argv, keep(args, &notify, environment, &shards)) {
                Err(failure) => Err(failed(failure)),
                Ok(never) => match never {},
            }
        }
        Err(failure) => Err(failed(failure)),
    }
}

/// What passed the gate.
struct Passed {
    argv: Vec<String>,
    environment: HashMap<String, String>,
    /// The model's own files, in order.
    shards: Vec<PathBuf>,
}

/// Has what every token touches kept in memory, where the daemon says that the model streams; returns the rest of the
/// environment. Without it the model is slower, and runs.
fn keep(
    args: &Run,
    notify: &Notifier,
    mut environment: HashMap<String, String>,
    shards: &[PathBuf],
) -> HashMap<String, String> {
    let ranges = environment.remove(kept::VARIABLE).map(|value| kept::ranges(&value)).unwrap_or_default();
    if !ranges.is_empty()
        && let Err(why) = hold::keep(shards, &ranges, |text| tell(notify, text))
    {
        output::eprint(&format!("{}: what every token touches is not kept in memory: {why}", args.instance));
    }
    environment
}

/// Everything up to the daemon's answer.
fn gate(common: &Common, args: &Run, notify: &Notifier) -> Result<Passed, Failure> {
    let loaded = config::load(&args.root.root);
    let (instance, model) =
        loaded.instance(&args.instance).map_err(|error| Failure::config(error.to_string()))?;
    called_by_name(&args.instance, &instance)?;
    let environment = relevant(std::env::vars_os());
    let daemon = loaded.settings.clone().unwrap_or_default();
    let Checked { files, shards, program } = check(&instance, model, &daemon, &environment)?;
    let name = instance.to_string();
    let mut engine = BTreeMap::new();
    if model.command.is_none() {
        tell(notify, "asking the engine for its devices");
        let cache = std::env::var_os("CACHE_DIRECTORY").map(PathBuf::from);
        engine = inquiry::ask(&program, &model.environment.0, cache.as_deref());
        tell(notify, "asking the engine's tool for its opinion");
        let gate = opinion::Gate {
            root: &args.root.root,
            instance: &instance,
            model,
            program: &program,
            files: &files,
            environment: &environment,
            engine: &engine,
            cache: cache.as_deref(),
        };
        match opinion::ask(&gate) {
            Ok(opinion) => engine.extend(opinion),
            Err(why) => output::eprint(&format!("{name}: the estimate counts alone: {why}")),
        }
    }

    let environment: HashMap<String, String> = environment.into_iter().collect();
    let engine: HashMap<String, String> = engine.into_iter().collect();
    let question = Question { instance: &name, files: &files, environment: &environment, engine: &engine };
    tell(notify, "waiting for admission");
    let mut said = String::new();
    let mut say = |text: &str| {
        tell(notify, text);
        // In the journal once for each change, for whoever asks later what took so long.
        if text != said {
            text.clone_into(&mut said);
            output::eprint(&format!("{name}: {text}"));
        }
    };
    let bus = super::bus_address(common);
    let (argv, mut environment) = super::block_on(async {
        gate::ask(bus.as_deref(), &question, Patience::NORMAL, &mut say).await.map_err(|error| match error {
            CallError::Unreachable(_) => {
                Failure::new(Exit::Unavailable, format!("{name} was not admitted: {error}"))
            }
            error => error.into(),
        })
    })?;
    // What sounds like a secret never goes over the bus.
    let secret = model.environment.0.iter().filter(|(name, _)| config::sounds_secret(name));
    environment.extend(secret.map(|(name, value)| (name.clone(), value.clone())));
    Ok(Passed { argv, environment, shards })
}

/// A unit is of the model that it is named after: another one would be a second process of it that
/// the daemon knows nothing of.
fn called_by_name(asked: &str, instance: &Instance) -> Result<(), Failure> {
    if asked.parse().is_ok_and(|asked: Instance| asked == *instance) {
        return Ok(());
    }
    Err(Failure::config(format!(
        "'{asked}' is an alias of {instance}, and a unit has to be named after the model"
    ))
    .hint(format!("use 'systemctl start {}'", instance.unit())))
}

/// The unit's status line. Nothing depends on it: a service manager that does not listen shows less.
fn tell(notify: &Notifier, text: &str) {
    let _ = notify.status(text.lines().next().unwrap_or_default());
}

/// What a start needs, found to be there.
struct Checked {
    /// The files that the estimate is made of.
    files: Vec<(String, File)>,
    /// Those of the model itself, in order.
    shards: Vec<PathBuf>,
    /// The engine.
    program: PathBuf,
}

/// What could never succeed: engine, files, port.
fn check(
    instance: &Instance,
    model: &Model,
    daemon: &config::Daemon,
    environment: &BTreeMap<String, String>,
) -> Result<Checked, Failure> {
    let wrong = |error: engine::Error| Failure::config(error.to_string());
    let effective = match model.command {
        Some(_) => None,
        None => Some(engine::effective(model, environment).map_err(wrong)?),
    };
    let needed = engine::files(model, effective.as_ref()).map_err(wrong)?;
    let opened = open_all(&needed, model.command.is_none())?;
    let program = engine::locate(model, daemon)
        .map_err(|error| Failure::config(format!("{error} (as user {})", user_name())))?;
    check_port(instance, model)?;
    let of_model = needed.iter().filter(|file| file.purpose == Purpose::Model);
    let shards = of_model.map(|file| file.path.clone()).collect();
    // Keys are for the engine alone. Paths that are not UTF-8 can't be in the configuration.
    let sent = needed.iter().zip(opened).filter(|(file, _)| file.purpose != Purpose::ApiKeys);
    let files = sent.map(|(needed, file)| (needed.path.to_string_lossy().into_owned(), file)).collect();
    Ok(Checked { files, shards, program })
}

/// The variables that change what an engine takes.
fn relevant(all: impl Iterator<Item = (OsString, OsString)>) -> BTreeMap<String, String> {
    all.filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| engine::is_relevant_variable(name))
        .collect()
}

/// That the instance's address can be listened on. Bound and let go at once, never listened on, so
/// that no client takes this for the engine.
fn check_port(instance: &Instance, model: &Model) -> Result<(), Failure> {
    // llama-server takes a host that ends so for the path of a socket.
    if model.host.ends_with(".sock") {
        return Ok(());
    }
    let config = |text: String| Failure::config(format!("{instance} can't start: {text}"));
    let port = instance
        .port(model.port)
        .ok_or_else(|| config("its port would be above 65535".to_owned()).hint("choose a smaller 'port'"))?;
    let place = format!("port {port} of {}", model.host);
    let addresses = (model.host.as_str(), port)
        .to_socket_addrs()
        .map_err(|_| config(format!("its host '{}' is no address", model.host)))?;
    for address in addresses {
        match bind(&SockaddrStorage::from(address)) {
            Ok(()) => {}
            Err(Errno::EADDRINUSE) => {
                return Err(config(format!("{place} is taken by another program"))
                    .hint(format!("'ss -ltnp sport = :{port}' as root shows which; or set another 'port'")));
            }
            Err(Errno::EACCES) => {
                return Err(config(format!("{place} may not be used by user {}", user_name()))
                    .hint("ports below 1024 are for root: set another 'port'"));
            }
            Err(Errno::EADDRNOTAVAIL) => {
                return Err(config(format!("this machine has no address {}", model.host)));
            }
            // Whatever else it is, the engine will say it better.
            Err(_) => {}
        }
    }
    Ok(())
}

fn bind(address: &SockaddrStorage) -> nix::Result<()> {
    let family = match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
        (Some(_), _) => AddressFamily::Inet,
        (_, Some(_)) => AddressFamily::Inet6,
        _ => return Ok(()),
    };
    let socket = socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // As engines do: connections of a predecessor that linger are no hindrance.
    socket::setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    socket::bind(std::os::fd::AsRawFd::as_raw_fd(&socket), address)
}

/// Replaces this process with the engine. What it had open was opened close-on-exec, and no signal
/// was touched; SIGPIPE stays ignored, as systemd has it for services (IgnoreSIGPIPE=).
fn become_engine(argv: &[String], added: HashMap<String, String>) -> Result<Infallible, Failure> {
    let Some(program) = argv.first().filter(|program| program.starts_with('/')) else {
        return Err(Failure::failed("the daemon's answer names no program by its whole path"));
    };
    let text = |text: Vec<u8>| {
        CString::new(text).map_err(|_| Failure::failed("the daemon's answer has a NUL byte in it"))
    };
    let mut environment: BTreeMap<OsString, OsString> = std::env::vars_os().collect();
    environment.remove(&OsString::from(BUS_ADDRESS_VARIABLE));
    environment.extend(added.into_iter().map(|(name, value)| (name.into(), value.into())));
    let environment = environment
        .into_iter()
        .map(|(name, value)| text([&name.into_vec()[..], b"=", &value.into_vec()].concat()))
        .collect::<Result<Vec<_>, _>>()?;
    let arguments =
        argv.iter().map(|argument| text(argument.clone().into_bytes())).collect::<Result<Vec<_>, _>>()?;
    let path = text(program.clone().into_bytes())?;
    let errno = match nix::unistd::execve(&path, &arguments, &environment) {
        Ok(never) => match never {},
        Err(errno) => errno,
    };
    let exit = match errno {
        Errno::ENOENT | Errno::EACCES | Errno::ENOEXEC | Errno::ENOTDIR => Exit::Config,
        _ => Exit::Failed,
    };
    Err(Failure::new(exit, format!("can't execute {program} as user {}: {}", user_name(), errno.desc())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn only_what_matters_and_is_no_secret_is_told() {
        let all = [
            ("LLAMA_ARG_CTX_SIZE", "4096"),
            ("HSA_OVERRIDE_GFX_VERSION", "11.5.1"),
            ("GGML_CUDA_ENABLE_UNIFIED_MEMORY", "1"),
            ("LLAMA_ARG_API_KEY", "hush"),
            ("LLAMA_API_KEY", "hush"),
            ("HF_TOKEN", "hush"),
            ("HOME", "/"),
        ];
        let told = relevant(all.into_iter().map(|(n, v)| (n.into(), v.into())));
        let names: Vec<&str> = told.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            ["GGML_CUDA_ENABLE_UNIFIED_MEMORY", "HSA_OVERRIDE_GFX_VERSION", "LLAMA_ARG_CTX_SIZE"]
        );
    }

    #[test]
    fn a_port_that_is_taken_is_found_and_a_free_one_stays_free() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert_eq!(bind(&SockaddrStorage::from(address)), Err(Errno::EADDRINUSE));
        drop(listener);
        assert_eq!(bind(&SockaddrStorage::from(address)), Ok(()));
        assert_eq!(bind(&SockaddrStorage::from(address)), Ok(()));
    }

    #[test]
    fn an_answer_without_a_program_is_not_executed() {
        for argv in [&[][..], &["llama-server".to_owned()], &["/nowhere/llama\0server".to_owned()]] {
            assert_eq!(become_engine(argv, HashMap::new()).unwrap_err().exit, Exit::Failed);
        }
        let gone = become_engine(&["/nowhere/llama-server".to_owned()], HashMap::new()).unwrap_err();
        assert_eq!(gone.exit, Exit::Config);
        assert!(gone.message.starts_with("can't execute /nowhere/llama-server as user"), "{}", gone.message);
    }
}

//! `plimsoll run`: the gate in front of an engine, and the engine's own process afterwards.
//!
//! What could never work is found first, as the unit's own user, and costs nobody anything: then
//! the daemon is asked, and only its answer is executed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::convert::Infallible;
use std::ffi::{CString, OsString};
use std::fs::File;
use std::net::ToSocketAddrs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage, sockopt};

use super::args::{Common, Run};
use super::container::Ready;
use super::failure::{Exit, Failure};
use super::files::{open_all, user_name};
use super::gate::{self, Patience, Question};
use super::user::EngineUser;
use super::{hold, inquiry, opinion, output};
use crate::action::notify::Notifier;
use crate::config::{self, Instance, Model};
use crate::dbus::{BUS_ADDRESS_VARIABLE, CallError};
use crate::engine::{self, Engine, Purpose, kept};

pub(super) fn run(common: &Common, args: &Run) -> Result<Exit, Failure> {
    let notify = Notifier::from_environment();
    match admitted(common, args, &notify) {
        Err(failure) => {
            tell(&notify, &failure.message);
            Err(failure)
        }
        Ok(never) => match never {},
    }
}

/// Passes the gate and becomes the engine.
fn admitted(common: &Common, args: &Run, notify: &Notifier) -> Result<Infallible, Failure> {
    let user = args.container.then(EngineUser::become_it).transpose()?;
    let Passed { argv, environment, checked } = gate(common, args, notify, user.as_ref())?;
    let added = keep(args, notify, environment, &checked.shards);
    let Runs::Image(ready) = checked.runs else {
        return execute(&argv, extended(added));
    };
    let (argv, environment) = ready.command(&argv, added, &checked.paths)?;
    user.map_or(Ok(()), EngineUser::give_up)?;
    execute(&argv, environment)
}

/// What passed the gate.
struct Passed<'a> {
    argv: Vec<String>,
    environment: HashMap<String, String>,
    checked: Checked<'a>,
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

/// Everything up to the daemon's answer. `user` is who this is, where root has started it to run a container.
fn gate<'a>(
    common: &Common,
    args: &Run,
    notify: &Notifier,
    user: Option<&'a EngineUser>,
) -> Result<Passed<'a>, Failure> {
    let loaded = config::load(&args.root.root);
    let (instance, model) =
        loaded.instance(&args.instance).map_err(|error| Failure::config(error.to_string()))?;
    called_by_name(&args.instance, &instance)?;
    let environment = relevant(std::env::vars_os());
    let daemon = loaded.settings.clone().unwrap_or_default();
    let cache = std::env::var_os("CACHE_DIRECTORY").map(PathBuf::from);
    let checked = check(&instance, model, &daemon, &environment, (user, cache.as_deref()))?;
    let files = &checked.files;
    let name = instance.to_string();
    let alone = |why: &str| output::eprint(&format!("{name}: the estimate counts alone: {why}"));
    let mut engine = BTreeMap::new();
    if model.command.is_none() {
        tell(notify, "asking the engine for its devices");
    }
    match &checked.runs {
        Runs::Image(ready) => {
            engine = ready.ask(&model.environment.0)?;
            alone("llama-fit-params is not asked in a container");
        }
        Runs::Program(program) if model.command.is_none() => {
            engine = inquiry::ask(program, &model.environment.0, cache.as_deref());
            tell(notify, "asking the engine's tool for its opinion");
            let gate = opinion::Gate {
                root: &args.root.root,
                instance: &instance,
                model,
                program,
                files,
                environment: &environment,
                engine: &engine,
                cache: cache.as_deref(),
            };
            match opinion::ask(&gate) {
                Ok(opinion) => engine.extend(opinion),
                Err(why) => alone(&why),
            }
        }
        Runs::Program(_) => {}
    }

    let environment: HashMap<String, String> = environment.into_iter().collect();
    let engine: HashMap<String, String> = engine.into_iter().collect();
    let question = Question { instance: &name, files, environment: &environment, engine: &engine };
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
    Ok(Passed { argv, environment, checked })
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
struct Checked<'a> {
    /// The files that the estimate is made of.
    files: Vec<(String, File)>,
    /// All that the engine reads.
    paths: BTreeSet<PathBuf>,
    /// The files of the model itself, in order.
    shards: Vec<PathBuf>,
    /// The engine.
    runs: Runs<'a>,
}

/// What is run.
enum Runs<'a> {
    /// A program of this machine.
    Program(PathBuf),
    /// An image.
    Image(Box<Ready<'a>>),
}

/// What could never succeed: engine, files, port.
fn check<'a>(
    instance: &Instance,
    model: &Model,
    daemon: &config::Daemon,
    environment: &BTreeMap<String, String>,
    (user, cache): (Option<&'a EngineUser>, Option<&Path>),
) -> Result<Checked<'a>, Failure> {
    let wrong = |error: engine::Error| Failure::config(error.to_string());
    let effective = match model.command {
        Some(_) => None,
        None => Some(engine::effective(model, environment).map_err(wrong)?),
    };
    let needed = engine::files(model, effective.as_ref()).map_err(wrong)?;
    let opened = open_all(&needed, model.command.is_none())?;
    let engine = engine::locate(model, daemon)
        .map_err(|error| Failure::config(format!("{error} (as user {})", user_name())))?;
    check_port(instance, model)?;
    let runs = match (engine, user) {
        (Engine::Program(program), None) => Runs::Program(program),
        (Engine::Image(image), Some(user)) => Runs::Image(Ready::find(instance, &image, user, cache)?.into()),
        (engine, _) => return Err(other_unit(instance, &engine)),
    };
    let of_model = needed.iter().filter(|file| file.purpose == Purpose::Model);
    let shards = of_model.map(|file| file.path.clone()).collect();
    let paths = needed.iter().map(|file| file.path.clone()).collect();
    // Keys are for the engine alone. Paths that are not UTF-8 can't be in the configuration.
    let sent = needed.iter().zip(opened).filter(|(file, _)| file.purpose != Purpose::ApiKeys);
    let files = sent.map(|(needed, file)| (needed.path.to_string_lossy().into_owned(), file)).collect();
    Ok(Checked { files, paths, shards, runs })
}

/// The unit has rights for a container, and the engine is none; or the other way round.
fn other_unit(instance: &Instance, engine: &Engine) -> Failure {
    let unit = instance.unit();
    let (what, is) = match engine {
        Engine::Image(image) => {
            (format!("the engine is the image {}", image.name), "is not prepared for containers yet")
        }
        Engine::Program(path) => {
            (format!("the engine is {}", path.display()), "still has the rights of a container")
        }
    };
    let failure = Failure::config(format!("{what}, and {unit} {is}"));
    // The generator sees the first instance of a model, and others that are enabled.
    if instance.number > 1 {
        failure.hint(format!("run 'systemctl enable {unit}' and 'systemctl daemon-reload' as root"))
    } else {
        failure.hint("run 'systemctl daemon-reload' as root, which has plimsoll's generator write it anew")
    }
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

/// This process's environment with more in it.
fn extended(added: HashMap<String, String>) -> BTreeMap<OsString, OsString> {
    let mut environment: BTreeMap<OsString, OsString> = std::env::vars_os().collect();
    environment.remove(&OsString::from(BUS_ADDRESS_VARIABLE));
    environment.extend(added.into_iter().map(|(name, value)| (name.into(), value.into())));
    environment
}

/// Replaces this process with the engine. What it had open was opened close-on-exec, and no signal
/// was touched; SIGPIPE stays ignored, as systemd has it for services (IgnoreSIGPIPE=).
fn execute(argv: &[String], environment: BTreeMap<OsString, OsString>) -> Result<Infallible, Failure> {
    let Some(program) = argv.first().filter(|program| program.starts_with('/')) else {
        return Err(Failure::failed("the daemon's answer names no program by its whole path"));
    };
    let text = |text: Vec<u8>| {
        CString::new(text).map_err(|_| Failure::failed("the daemon's answer has a NUL byte in it"))
    };
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
    fn a_unit_that_is_not_the_engines_says_what_to_do() {
        let image = Engine::Image(crate::config::Image { name: "x:1".to_owned(), program: None });
        let failure = other_unit(&"m".parse().unwrap(), &image);
        assert_eq!(failure.exit, Exit::Config);
        assert_eq!(
            failure.message,
            "the engine is the image x:1, and llm@m.service is not prepared for containers yet"
        );
        assert!(failure.hint.unwrap().starts_with("run 'systemctl daemon-reload'"));
        let program = Engine::Program("/usr/bin/llama-server".into());
        let failure = other_unit(&"m@2".parse().unwrap(), &program);
        assert!(failure.message.ends_with("llm@m@2.service still has the rights of a container"));
        assert!(failure.hint.unwrap().contains("'systemctl enable llm@m@2.service'"));
    }

    #[test]
    fn an_answer_without_a_program_is_not_executed() {
        for argv in [&[][..], &["llama-server".to_owned()], &["/nowhere/llama\0server".to_owned()]] {
            assert_eq!(execute(argv, BTreeMap::new()).unwrap_err().exit, Exit::Failed);
        }
        let gone = execute(&["/nowhere/llama-server".to_owned()], BTreeMap::new()).unwrap_err();
        assert_eq!(gone.exit, Exit::Config);
        assert!(gone.message.starts_with("can't execute /nowhere/llama-server as user"), "{}", gone.message);
    }
}

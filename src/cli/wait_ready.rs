//! `plimsoll wait-ready`: holds `systemctl start` until the model answers.
//!
//! There is no limit on how long a load takes, only on how long nothing moves. systemd's own
//! time-out is pushed ahead for as long as this process is content.

use std::collections::BTreeSet;
use std::net::ToSocketAddrs;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::unistd::geteuid;

use super::args::WaitReady;
use super::failure::{Exit, Failure};
use super::process::{Process, Stage};
use super::read_behind::ReadBehind;
use crate::action::notify::Notifier;
use crate::config::{self, Instance, Model};
use crate::gguf;
use crate::host::{Host, HttpError, Page, Server};

/// How often systemd is asked for more time.
const EXTEND_EVERY: Duration = Duration::from_secs(5);
/// What it is asked for beyond the time that may pass without movement.
const EXTEND_MARGIN: Duration = Duration::from_secs(30);
/// The most of that at a time, also where nothing ends a load: it is asked for again long before.
const EXTEND_MOST: Duration = Duration::from_secs(3600);
/// How long the engine may take to accept a connection, or to answer on it.
const HTTP_TIMEOUT: Duration = Duration::from_secs(2);
/// How much of an answer is read.
const LONGEST_REPLY: usize = 8192;

pub(super) fn wait_ready(args: &WaitReady) -> Result<Exit, Failure> {
    let loaded = config::load(&args.root.root);
    let (instance, model) =
        loaded.instance(&args.instance).map_err(|error| Failure::config(error.to_string()))?;
    let pid = std::env::var("MAINPID").ok().and_then(|pid| pid.parse().ok()).ok_or_else(|| {
        Failure::usage("MAINPID is not set").hint("wait-ready belongs into ExecStartPost= of a unit")
    })?;
    let endpoint = Endpoint::of(&instance, model)?;
    let Some(process) = Process::find(Path::new("/"), pid) else {
        // Refused or broken within the first moments: it has said why itself.
        return Ok(Exit::Failed);
    };
    let files = match (&model.command, &model.model) {
        (None, Some(path)) => gguf::shard_paths(path).unwrap_or_default(),
        _ => Vec::new(),
    };
    let mut behind = ReadBehind::new(&files);
    wait(&process, &endpoint, model.stall_timeout, &Notifier::from_environment(), || {
        behind.follow(&process.family());
    })
}

/// Waits for `endpoint` to answer. `Exit::Failed` without a word when the process ended at the
/// gate, for then it has said why itself. `meanwhile` is done now and again while the engine loads.
fn wait(
    process: &Process,
    endpoint: &Endpoint,
    stall: Duration,
    notify: &Notifier,
    mut meanwhile: impl FnMut(),
) -> Result<Exit, Failure> {
    let started = Instant::now();
    let mut moved = Instant::now();
    let mut extended: Option<Instant> = None;
    let mut seen = process.movement();
    let mut at_gate = true;
    let mut last = Answer::Nothing;
    loop {
        let stage = process.stage();
        match stage {
            Stage::Gone if at_gate => return Ok(Exit::Failed),
            Stage::Gone => return Err(ended(endpoint, last)),
            Stage::Gate => moved = Instant::now(),
            Stage::Engine => {
                at_gate = false;
                last = endpoint.ask(&users(process));
                meanwhile();
                if last == Answer::Ready {
                    let _ = notify.status(&format!("ready at {}", endpoint.name()));
                    return Ok(Exit::Done);
                }
                let now = process.movement();
                if now.differs(&seen) {
                    seen = now;
                    moved = Instant::now();
                }
            }
        }
        if moved.elapsed() >= stall {
            return Err(stalled(endpoint, stall, last));
        }
        if extended.is_none_or(|at| at.elapsed() >= EXTEND_EVERY) {
            extended = Some(Instant::now());
            // A service manager that does not take it ends this process at its own time-out.
            let _ = notify.extend_timeout(stall.min(EXTEND_MOST) + EXTEND_MARGIN);
            if stage == Stage::Engine {
                let loading = || format!("loading: {} in memory, {} read", seen.resident, seen.read);
                let _ = notify.status(&doubt(endpoint, last).unwrap_or_else(loading));
            }
        }
        process.sleep(pause(started.elapsed()));
    }
}

/// Whom the engine may be of: the users of the unit's processes as far as this one, which is in the unit too, may look
/// at them (ProtectProc=invisible hides those of others), and its own.
fn users(process: &Process) -> BTreeSet<u32> {
    let mut users = Host::default().users_of(&process.family());
    users.insert(geteuid().as_raw());
    users
}

/// What is wrong where somebody listens who is not, or may not be, the engine.
fn doubt(endpoint: &Endpoint, last: Answer) -> Option<String> {
    let port = endpoint.server.port();
    match last {
        Answer::Stranger(user) => Some(format!("port {port} is held by user {user}, not by this unit")),
        Answer::Unknown => Some(format!("whose port {port} is can't be told from /proc/net/tcp")),
        Answer::Nothing | Answer::Status(_) | Answer::Ready => None,
    }
}

/// What to do about it.
fn find_holder(port: u16) -> String {
    format!(
        "'ss -ltnp sport = :{port}' as root shows which program that is. Set another 'port', or ProtectProc=default in \
         the unit if that is its own, as another user"
    )
}

fn ended(endpoint: &Endpoint, last: Answer) -> Failure {
    let message = "the engine ended before it answered";
    match (doubt(endpoint, last), last) {
        (Some(doubt), Answer::Stranger(_)) => {
            Failure::failed(format!("{message}, and {doubt}")).hint(find_holder(endpoint.server.port()))
        }
        _ => Failure::failed(message)
            .hint("its own messages stand above, and in 'journalctl -u' with the unit's name"),
    }
}

fn stalled(endpoint: &Endpoint, stall: Duration, last: Answer) -> Failure {
    let heard = match last {
        Answer::Status(code) => format!("{} answers {code}", endpoint.name()),
        _ => doubt(endpoint, last).unwrap_or_else(|| format!("{} does not answer", endpoint.name())),
    };
    let failure = Failure::failed(format!("nothing has moved for {} s, and {heard}", stall.as_secs()));
    match last {
        Answer::Stranger(_) => failure.hint(find_holder(endpoint.server.port())),
        Answer::Unknown => failure.hint("the unit has to see /proc/net (no ProcSubset=pid)"),
        Answer::Status(404) => failure.hint("set health-path to a path that the engine answers with 200"),
        _ => failure.hint("a load that is only slow needs a longer stall-timeout in its configuration"),
    }
}

/// Between two looks: short while a small model loads, longer for a large one.
fn pause(waited: Duration) -> Duration {
    match waited.as_secs() {
        0..5 => Duration::from_millis(50),
        5..60 => Duration::from_millis(250),
        _ => Duration::from_secs(1),
    }
}

/// Where the engine answers.
#[derive(Debug)]
struct Endpoint {
    server: Server,
    /// What is asked for; without one a connection is answer enough.
    path: Option<String>,
}

/// What was heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// No connection, or nothing that makes sense.
    Nothing,
    /// Some other status than 200, 503 while it loads.
    Status(u16),
    /// Somebody else's program listens there, of this user.
    Stranger(u32),
    /// Somebody listens, and it can't be told who.
    Unknown,
    /// It is ready.
    Ready,
}

impl Endpoint {
    fn of(instance: &Instance, model: &Model) -> Result<Self, Failure> {
        let path = model.health_path.clone();
        let port = instance.port(model.port).ok_or_else(|| {
            Failure::config(format!("{instance} would need a port above 65535"))
                .hint("choose a smaller 'port'")
        })?;
        if let Some(server) = Server::at(&model.host, port) {
            return Ok(Self { server, path });
        }
        let address = (model.host.as_str(), port)
            .to_socket_addrs()
            .ok()
            .and_then(|mut addresses| addresses.next())
            .ok_or_else(|| Failure::config(format!("host '{}' is no address of this machine", model.host)))?;
        Ok(Self { server: Server::of(&model.host, address), path })
    }

    fn name(&self) -> &str {
        self.server.name()
    }

    /// What it says, if it is of one of `users`.
    fn ask(&self, users: &BTreeSet<u32>) -> Answer {
        let heard = match &self.path {
            Some(path) => self.server.get(path, users, None, LONGEST_REPLY, HTTP_TIMEOUT).map(Some),
            None => self.server.accepts(users, HTTP_TIMEOUT).map(|()| None),
        };
        match heard {
            // It speaks TLS, but not to us. Better taken for ready than never.
            Ok(None | Some(Page { status: 200, .. })) | Err(HttpError::Tls) => Answer::Ready,
            Ok(Some(page)) => Answer::Status(page.status),
            Err(HttpError::Stranger(user)) => Answer::Stranger(user),
            Err(HttpError::Unknown) => Answer::Unknown,
            Err(HttpError::Unreachable | HttpError::Late | HttpError::Nonsense) => Answer::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    #[test]
    fn an_engine_is_asked_for_its_health() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let engine = std::thread::spawn(move || {
            let mut requests = Vec::new();
            for status in ["503 Service Unavailable", "200 OK"] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 256];
                let read = stream.read(&mut request).unwrap();
                requests.push(String::from_utf8_lossy(&request[..read]).into_owned());
                write!(stream, "HTTP/1.1 {status}\r\n\r\n{{}}").unwrap();
            }
            requests
        });
        let endpoint = Endpoint { server: Server::of("127.0.0.1", address), path: Some("/health".into()) };
        let own = BTreeSet::from([geteuid().as_raw()]);
        assert_eq!(endpoint.ask(&own), Answer::Status(503));
        assert_eq!(endpoint.ask(&own), Answer::Ready);
        let requests = engine.join().unwrap();
        assert!(
            requests[0].starts_with(&format!("GET /health HTTP/1.1\r\nHost: {address}\r\n")),
            "{requests:?}"
        );
        // Nobody listens any more.
        assert_eq!(endpoint.ask(&own), Answer::Nothing);
    }

    #[test]
    fn a_stranger_is_no_engine_and_is_named() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let user = geteuid().as_raw();
        let others = BTreeSet::from([user + 1]);
        for path in [None, Some("/health".to_owned())] {
            let endpoint = Endpoint { server: Server::of("127.0.0.1", address), path };
            let heard = endpoint.ask(&others);
            assert_eq!(heard, Answer::Stranger(user));
            // Nothing was said to it.
            assert_eq!(listener.accept().unwrap().0.read(&mut [0; 16]).unwrap(), 0);
            let held = format!("port {} is held by user {user}, not by this unit", address.port());
            assert_eq!(
                stalled(&endpoint, Duration::from_secs(9), heard).message,
                format!("nothing has moved for 9 s, and {held}")
            );
            assert_eq!(
                ended(&endpoint, heard).message,
                format!("the engine ended before it answered, and {held}")
            );
        }
    }

    #[test]
    fn a_process_that_ended_at_the_gate_has_spoken_for_itself() {
        let endpoint = Endpoint { server: Server::at("127.0.0.1", 1).unwrap(), path: None };
        let root = tempdir("gone");
        crate::cli::process::tests::write_process(&root, 7, "S", &["/usr/bin/plimsoll", "run", "x"]);
        let process = Process::find(&root, 7).unwrap();
        crate::cli::process::tests::write_process(&root, 7, "Z", &[]);
        let ended = wait(&process, &endpoint, Duration::from_secs(60), &Notifier::from_environment(), || ());
        assert_eq!(ended, Ok(Exit::Failed));
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_load_that_may_take_for_ever_is_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let engine = std::thread::spawn(move || {
            for status in ["503 Service Unavailable", "200 OK"] {
                let (mut stream, _) = listener.accept().unwrap();
                let _ = stream.read(&mut [0; 256]).unwrap();
                write!(stream, "HTTP/1.1 {status}\r\n\r\n{{}}").unwrap();
            }
        });
        let endpoint = Endpoint { server: Server::of("127.0.0.1", address), path: Some("/health".into()) };
        let root = tempdir("for-ever");
        crate::cli::process::tests::write_process(&root, 7, "S", &["/usr/bin/llama-server"]);
        let process = Process::find(&root, 7).unwrap();
        let ended = wait(&process, &endpoint, Duration::MAX, &Notifier::from_environment(), || ());
        assert_eq!(ended, Ok(Exit::Done));
        engine.join().unwrap();
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn what_does_not_move_fails_and_says_so() {
        let endpoint = Endpoint { server: Server::at("127.0.0.1", 1).unwrap(), path: None };
        let root = tempdir("stalled");
        crate::cli::process::tests::write_process(&root, 7, "S", &["/usr/bin/llama-server"]);
        let process = Process::find(&root, 7).unwrap();
        let failure =
            wait(&process, &endpoint, Duration::ZERO, &Notifier::from_environment(), || ()).unwrap_err();
        assert_eq!(failure.message, "nothing has moved for 0 s, and 127.0.0.1:1 does not answer");
        std::fs::remove_dir_all(root).unwrap();
    }

    fn tempdir(name: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("plimsoll-wait-ready-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        path
    }
}

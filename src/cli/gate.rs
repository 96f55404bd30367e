//! Asking the daemon for memory, whatever happens to the daemon meanwhile.
//!
//! `Admit` is idempotent within one start of a unit, and a lease that nobody has heard of has ended, so the answer to
//! every disturbance is the same: wait until the name has an owner, and ask (again). What bounds it is the time
//! without an owner and the number of times that an owner went away in mid-call.

use std::collections::HashMap;
use std::fs::File;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until, timeout};
use zbus::fdo::DBusProxy;
use zbus::names::{OwnedUniqueName, WellKnownName};
use zbus::{Fd, fdo};

use crate::dbus::client::next;
use crate::dbus::proxy::Admitted;
use crate::dbus::{CallError, Client, NAME};

/// What `Admit` is asked with.
#[derive(Debug)]
pub struct Question<'a> {
    /// The instance.
    pub instance: &'a str,
    /// Paths and read-only descriptors of what the engine will read.
    pub files: &'a [(String, File)],
    /// The variables that change what it takes.
    pub environment: &'a HashMap<String, String>,
    /// What the engine says of itself.
    pub engine: &'a HashMap<String, String>,
}

/// How long to put up with what.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Time without a bus, or without an owner of the name on it.
    pub absent: Duration,
    /// How often to ask: a daemon that dies of the question shall not do so for ever.
    pub asks: u32,
}

impl Patience {
    /// What `plimsoll run` has: an upgrade or a crash of the daemon takes seconds.
    pub const NORMAL: Self = Self { absent: Duration::from_secs(60), asks: 10 };
    /// For what a person may as well ask again; the time is for a daemon that the bus starts.
    pub const NONE: Self = Self { absent: Duration::from_secs(25), asks: 1 };
    /// For what waits as long as it takes: the daemon may go away as often as it likes.
    pub const LONG: Self = Self { asks: u32::MAX, ..Self::NORMAL };

    /// Whether a daemon that is not there, and does not start, is told at once.
    fn is_none(self) -> bool {
        self.asks == 1
    }
}

/// What dbus-daemon lets pass in a message on the system bus; it cuts the connection at more. A
/// model of more files is opened by the daemon itself, which every shard having been opened here
/// makes no less safe.
const MOST_DESCRIPTORS: usize = 16;
/// Between two attempts to connect to a bus that is not there, or to ask a daemon that failed.
const PAUSE: Duration = Duration::from_millis(500);

/// Asks for admission until there is an answer. `say` is told what is being waited for.
///
/// # Errors
/// The daemon's own answer, or [`CallError::Unreachable`] when patience ends.
pub async fn ask(
    bus: Option<&str>,
    question: &Question<'_>,
    patience: Patience,
    say: &mut dyn FnMut(&str),
) -> Result<Admitted, CallError> {
    let about = |instance: &str| instance == question.instance;
    insist(
        || Client::connect(bus, false),
        async |client: &Client| admit(client, question).await,
        &about,
        patience,
        say,
    )
    .await
}

async fn admit(client: &Client, question: &Question<'_>) -> Result<Admitted, CallError> {
    let all = question.files;
    let sent = if all.len() > MOST_DESCRIPTORS { &[] } else { all };
    let files: Vec<(&str, Fd<'_>)> =
        sent.iter().map(|(path, file)| (path.as_str(), Fd::from(file))).collect();
    let Question { instance, environment, engine, .. } = question;
    Ok(client.manager().admit(instance, &files, environment, engine).await?)
}

/// Makes a call until it is answered. `about` tells of whose progress `say` is told.
///
/// # Errors
/// The daemon's own answer, or [`CallError::Unreachable`] when patience ends.
pub async fn insist<T, C: AsyncFn(&Client) -> Result<T, CallError>>(
    connect: impl AsyncFn() -> Result<Client, CallError>,
    call: C,
    about: &dyn Fn(&str) -> bool,
    patience: Patience,
    say: &mut dyn FnMut(&str),
) -> Result<T, CallError> {
    let mut asker = Asker { call, about, patience, asked: 0, deadline: Instant::now() + patience.absent };
    loop {
        let error = match connect().await {
            Ok(client) => match asker.on_bus(&client, say).await {
                Err(error @ CallError::Unreachable(_)) => error,
                answer => return answer,
            },
            Err(error) => error,
        };
        // The bus itself is gone or never was: it may come back as well.
        if patience.is_none() || asker.exhausted() {
            return Err(error);
        }
        say("waiting for the message bus");
        sleep(PAUSE).await;
    }
}

struct Asker<'a, C> {
    call: C,
    about: &'a dyn Fn(&str) -> bool,
    patience: Patience,
    asked: u32,
    deadline: Instant,
}

/// How one call ended.
enum Ended<T> {
    Answered(Result<T, CallError>),
    /// The name has another owner, or none: the call's reply will never come.
    OwnerChanged(Option<OwnedUniqueName>),
}

impl<T, C: AsyncFn(&Client) -> Result<T, CallError>> Asker<'_, C> {
    fn exhausted(&self) -> bool {
        Instant::now() >= self.deadline || self.asked >= self.patience.asks
    }

    /// Asks on one connection until it is answered; `Unreachable` when the connection is gone or
    /// patience has ended.
    async fn on_bus(&mut self, client: &Client, say: &mut dyn FnMut(&str)) -> Result<T, CallError> {
        let bus = DBusProxy::new(client.connection()).await?;
        // Subscribed before the first look, so that no change is missed.
        let mut owners = client.manager().inner().receive_owner_changed().await?;
        let mut progress = client.manager().receive_admit_progress().await?;
        let mut owner = owner_of(&bus).await?;
        loop {
            let Some(asked) = owner.take() else {
                say("waiting for plimsolld");
                owner = self.wait_for_owner(&bus, &mut owners).await?;
                continue;
            };
            if self.asked >= self.patience.asks {
                let times = if self.asked == 1 { String::new() } else { format!(" {} times", self.asked) };
                return Err(CallError::Unreachable(format!("it went away{times} in mid-call")));
            }
            self.asked += 1;
            let ended = self.ask_owner(client, &bus, &asked, &mut owners, &mut progress, say).await;
            // The answer may have been waited for long: absence counts from here.
            self.deadline = Instant::now() + self.patience.absent;
            match ended? {
                Ended::Answered(Err(CallError::Unreachable(_))) => {
                    sleep(PAUSE).await;
                    owner = owner_of(&bus).await?;
                }
                Ended::Answered(answer) => return answer,
                Ended::OwnerChanged(new) => owner = new,
            }
        }
    }

    /// Waits for the name to have an owner, having asked the bus to start one.
    async fn wait_for_owner(
        &self,
        bus: &DBusProxy<'_>,
        owners: &mut zbus::proxy::OwnerChangedStream<'_>,
    ) -> Result<Option<OwnedUniqueName>, CallError> {
        let name = WellKnownName::from_static_str_unchecked(NAME);
        // Where activation fails, somebody may still start it by hand within the time.
        let why = match timeout(self.deadline - Instant::now(), bus.start_service_by_name(name, 0)).await {
            Ok(Err(error)) => error.to_string(),
            _ => "it does not start".to_owned(),
        };
        if let Some(owner) = owner_of(bus).await? {
            return Ok(Some(owner));
        }
        if self.patience.is_none() {
            return Err(CallError::Unreachable(why));
        }
        loop {
            tokio::select! {
                change = next(owners) => match change {
                    Some(Some(owner)) => return Ok(Some(owner.into())),
                    Some(None) => {}
                    None => return Err(CallError::Unreachable("the bus closed the connection".to_owned())),
                },
                () = sleep_until(self.deadline) => {
                    let waited = self.patience.absent.as_secs();
                    return Err(CallError::Unreachable(format!("nobody has owned the name {NAME} for {waited} s ({why})")));
                }
            }
        }
    }

    async fn ask_owner(
        &self,
        client: &Client,
        bus: &DBusProxy<'_>,
        asked: &OwnedUniqueName,
        owners: &mut zbus::proxy::OwnerChangedStream<'_>,
        progress: &mut crate::dbus::proxy::AdmitProgressStream,
        say: &mut dyn FnMut(&str),
    ) -> Result<Ended<T>, CallError> {
        let call = (self.call)(client);
        tokio::pin!(call);
        loop {
            tokio::select! {
                biased;
                answer = &mut call => return Ok(Ended::Answered(answer)),
                // Told in order: what was said before the owner changed is said before it is asked about.
                signal = next(progress) => match signal {
                    Some(signal) => {
                        if let Ok(args) = signal.args()
                            && (self.about)(&args.instance)
                        {
                            say(&args.text);
                        }
                    }
                    None => return Err(CallError::Unreachable("the bus closed the connection".to_owned())),
                },
                change = next(owners) => match change {
                    // Changes up to this owner may be told only now; to ask the same one twice would be two questions.
                    Some(_) => match owner_of(bus).await? {
                        Some(owner) if owner == *asked => {}
                        owner => return Ok(Ended::OwnerChanged(owner)),
                    },
                    None => return Err(CallError::Unreachable("the bus closed the connection".to_owned())),
                },
            }
        }
    }
}

/// Who owns the daemon's name.
async fn owner_of(bus: &DBusProxy<'_>) -> Result<Option<OwnedUniqueName>, CallError> {
    let name = WellKnownName::from_static_str_unchecked(NAME);
    match bus.get_name_owner(name.into()).await {
        Ok(owner) => Ok(Some(owner)),
        Err(fdo::Error::NameHasNoOwner(_)) => Ok(None),
        Err(error) => Err(zbus::Error::from(error).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::process::{Child, Command, Stdio};

    use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

    use crate::dbus::{Error, Kind, PATH};

    /// A message bus of the test's own; none where dbus-daemon is not installed.
    struct Bus {
        child: Child,
        address: String,
    }

    impl Bus {
        fn start() -> Option<Self> {
            let mut child = Command::new("dbus-daemon")
                .args(["--session", "--nofork", "--nopidfile", "--print-address=1"])
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .ok()?;
            let mut address = String::new();
            BufReader::new(child.stdout.take()?).read_line(&mut address).ok()?;
            Some(Self { child, address: address.trim().to_owned() })
        }
    }

    impl Drop for Bus {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    /// What a test's daemon does with a call to `Admit`.
    #[derive(Clone, Copy)]
    enum Behaviour {
        Admit,
        Refuse,
        /// Says that it was asked, and never answers.
        Hang,
    }

    struct Daemon {
        behaviour: Behaviour,
        asked: UnboundedSender<(String, usize)>,
    }

    #[zbus::interface(name = "org.plimsoll1.Manager")]
    impl Daemon {
        async fn admit(
            &self,
            instance: String,
            files: Vec<(String, zbus::OwnedFd)>,
            environment: HashMap<String, String>,
            _engine: HashMap<String, String>,
            #[zbus(signal_emitter)] emitter: zbus::object_server::SignalEmitter<'_>,
        ) -> Result<Admitted, Error> {
            Self::admit_progress(&emitter, "another".into(), "not for us".into()).await?;
            Self::admit_progress(&emitter, instance.clone(), "stopping small".into()).await?;
            self.asked.send((instance, files.len())).unwrap();
            match self.behaviour {
                Behaviour::Admit => Ok((vec!["/bin/true".to_owned()], environment)),
                Behaviour::Refuse => Err(Error::new(Kind::WontFit, "x does not fit")),
                Behaviour::Hang => std::future::pending().await,
            }
        }

        #[zbus(signal)]
        async fn admit_progress(
            emitter: &zbus::object_server::SignalEmitter<'_>,
            instance: String,
            text: String,
        ) -> zbus::Result<()>;
    }

    async fn serve(
        bus: &Bus,
        behaviour: Behaviour,
    ) -> (zbus::Connection, UnboundedReceiver<(String, usize)>) {
        let (asked, heard) = unbounded_channel();
        let connection = zbus::connection::Builder::address(bus.address.as_str())
            .serve_at(PATH, Daemon { behaviour, asked })
            .name(NAME)
            .build()
            .await
            .unwrap();
        (connection, heard)
    }

    const SHORT: Patience = Patience { absent: Duration::from_millis(300), asks: 3 };
    const LONG: Patience = Patience { absent: Duration::from_secs(60), asks: 3 };

    async fn ask_on(
        address: &str,
        files: &[(String, File)],
        patience: Patience,
    ) -> (Result<Admitted, CallError>, Vec<String>) {
        let environment = HashMap::from([("LLAMA_ARG_X".to_owned(), "1".to_owned())]);
        let question = Question { instance: "x", files, environment: &environment, engine: &environment };
        let mut said = Vec::new();
        let mut say = |text: &str| said.push(text.to_owned());
        let answer = ask(Some(address), &question, patience, &mut say).await;
        (answer, said)
    }

    #[tokio::test]
    async fn admission_passes_files_and_tells_progress() {
        let Some(bus) = Bus::start() else { return };
        let (_daemon, mut heard) = serve(&bus, Behaviour::Admit).await;
        let files = [("/dev/null".to_owned(), File::open("/dev/null").unwrap())];
        let (answer, said) = ask_on(&bus.address, &files, LONG).await;
        let (argv, environment) = answer.unwrap();
        assert_eq!(argv, ["/bin/true"]);
        assert_eq!(environment["LLAMA_ARG_X"], "1");
        assert_eq!(heard.recv().await, Some(("x".to_owned(), 1)));
        assert!(!said.iter().any(|text| text == "not for us"), "{said:?}");
    }

    #[tokio::test]
    async fn a_refusal_is_the_answer() {
        let Some(bus) = Bus::start() else { return };
        let (_daemon, _heard) = serve(&bus, Behaviour::Refuse).await;
        let (answer, _) = ask_on(&bus.address, &[], LONG).await;
        assert_eq!(answer, Err(CallError::Answered(Error::new(Kind::WontFit, "x does not fit"))));
    }

    #[tokio::test]
    async fn a_daemon_that_dies_is_asked_again_when_it_is_back() {
        let Some(bus) = Bus::start() else { return };
        let (daemon, mut heard) = serve(&bus, Behaviour::Hang).await;
        let restart = async {
            heard.recv().await.unwrap();
            // As if killed in the middle of the call: the name goes, no reply ever comes.
            daemon.close().await.unwrap();
            serve(&bus, Behaviour::Admit).await
        };
        let ((answer, said), (_again, mut heard)) = tokio::join!(ask_on(&bus.address, &[], LONG), restart);
        assert!(answer.is_ok(), "{answer:?}");
        assert_eq!(heard.recv().await, Some(("x".to_owned(), 0)));
        assert!(heard.try_recv().is_err(), "the new one was asked twice");
        assert!(said.contains(&"stopping small".to_owned()), "{said:?}");
    }

    #[tokio::test]
    async fn a_daemon_that_comes_late_is_waited_for() {
        let Some(bus) = Bus::start() else { return };
        let (waiting, mut waits) = unbounded_channel();
        let environment = HashMap::new();
        let question =
            Question { instance: "x", files: &[], environment: &environment, engine: &environment };
        let mut say = |text: &str| waiting.send(text.to_owned()).unwrap();
        let late = async {
            assert_eq!(waits.recv().await.as_deref(), Some("waiting for plimsolld"));
            serve(&bus, Behaviour::Admit).await
        };
        let (answer, _daemon) = tokio::join!(ask(Some(&bus.address), &question, LONG, &mut say), late);
        assert!(answer.is_ok(), "{answer:?}");
    }

    #[tokio::test]
    async fn patience_ends() {
        let Some(bus) = Bus::start() else { return };
        let (answer, said) = ask_on(&bus.address, &[], SHORT).await;
        assert!(matches!(&answer, Err(CallError::Unreachable(why)) if why.contains(NAME)), "{answer:?}");
        assert_eq!(said, ["waiting for plimsolld"]);
        let (answer, _) = ask_on("unix:path=/nowhere/bus", &[], SHORT).await;
        assert!(matches!(answer, Err(CallError::Unreachable(_))), "{answer:?}");
    }

    #[tokio::test]
    async fn without_patience_a_daemon_that_can_not_be_started_is_told_at_once() {
        let Some(bus) = Bus::start() else { return };
        // The bus knows of no such service, and is asked once; the time is for one that takes long to start.
        for address in [bus.address.as_str(), "unix:path=/nowhere/bus"] {
            let asked = tokio::time::timeout(Patience::NONE.absent / 2, ask_on(address, &[], Patience::NONE));
            let (answer, _) = asked.await.unwrap();
            assert!(matches!(answer, Err(CallError::Unreachable(_))), "{answer:?}");
        }
    }

    #[tokio::test]
    async fn a_model_of_many_shards_passes() {
        let Some(bus) = Bus::start() else { return };
        let (_daemon, mut heard) = serve(&bus, Behaviour::Admit).await;
        let open = |n| (format!("/shard-{n}"), File::open("/dev/null").unwrap());
        let files: Vec<(String, File)> = (0..40).map(open).collect();
        let (answer, _) = ask_on(&bus.address, &files, LONG).await;
        assert!(answer.is_ok(), "{answer:?}");
        // More than the bus lets pass: the daemon opens them itself.
        assert_eq!(heard.recv().await, Some(("x".to_owned(), 0)));
    }
}

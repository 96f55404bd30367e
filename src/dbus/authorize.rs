//! Who may change something: root, and whom polkit lets.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::timeout;
use zbus::fdo::DBusProxy;
use zbus::message::{Flags, Header};
use zbus::proxy::CacheProperties;
use zbus::{Connection, Variant, proxy};

use super::error::{Error, Kind};

/// Loading, unloading and pinning.
pub const MANAGE_MODELS: &str = "org.plimsoll1.manage-models";
/// Holding memory for something that is no model.
pub const ACQUIRE_LEASE: &str = "org.plimsoll1.acquire-lease";
/// Changing how memory is managed.
pub const CONFIGURE: &str = "org.plimsoll1.configure";

/// polkit may ask the user for a password.
const ALLOW_USER_INTERACTION: u32 = 1;
/// How long a person may take to type it.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long polkit may take to call a check off.
const CALL_OFF: Duration = Duration::from_secs(5);

/// Checks that are open at once, in all and of one user: those that polkit decides by itself, in milliseconds, and those
/// for which it asks a person. Together they stay below the 128 calls without an answer that a bus lets a connection
/// have. A user whose agent never answers keeps nobody from the first kind, and so from what polkit's rules allow.
const QUICK: (usize, usize) = (64, 16);
const SLOW: (usize, usize) = (32, 4);

/// A call that is checked is no longer than this; what the longest real one says is a few names.
const LONGEST: u32 = 64 << 10;

/// polkit's answer: authorised, could be after a challenge, details.
type Answer = (bool, bool, HashMap<String, String>);

#[proxy(
    interface = "org.freedesktop.PolicyKit1.Authority",
    default_service = "org.freedesktop.PolicyKit1",
    default_path = "/org/freedesktop/PolicyKit1/Authority"
)]
trait PolicyKit {
    fn check_authorization(
        &self,
        subject: &(&str, HashMap<&str, Variant<'_>>),
        action: &str,
        details: &HashMap<&str, &str>,
        flags: u32,
        cancellation: &str,
    ) -> zbus::Result<Answer>;

    fn cancel_check_authorization(&self, cancellation: &str) -> zbus::Result<()>;
}

fn denied(why: impl Into<String>) -> Error {
    Error::new(Kind::NotAuthorized, why)
}

/// Checks that are open, bounded.
struct Places {
    most: usize,
    each: usize,
    taken: Mutex<BTreeMap<u32, usize>>,
}

/// One of them; it is free again with the end of the value.
struct Place<'a> {
    places: &'a Places,
    user: u32,
}

impl Places {
    fn new((most, each): (usize, usize)) -> Self {
        Self { most, each, taken: Mutex::default() }
    }

    fn take(&self, user: u32) -> Result<Place<'_>, Error> {
        let busy =
            |why: &str| Err(Error::new(Kind::Busy, format!("{why} are not decided on yet; try again")));
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.get(&user).is_some_and(|own| *own >= self.each) {
            return busy("too many of your calls");
        }
        if taken.values().sum::<usize>() >= self.most {
            return busy("too many calls of other users");
        }
        *taken.entry(user).or_default() += 1;
        Ok(Place { places: self, user })
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let left = taken.get(&self.user).map_or(0, |own| own.saturating_sub(1));
        if left == 0 {
            taken.remove(&self.user)
        } else {
            taken.insert(self.user, left)
        };
    }
}

/// The system's polkit.
pub struct Polkit {
    authority: PolicyKitProxy<'static>,
    patience: Duration,
    quick: Places,
    slow: Places,
    checks: AtomicU64,
}

impl Polkit {
    /// polkit by way of `connection`, which should be used for nothing else.
    ///
    /// # Errors
    /// The connection does not work.
    pub async fn new(connection: &Connection) -> zbus::Result<Self> {
        Ok(Self {
            authority: PolicyKitProxy::builder(connection)
                .cache_properties(CacheProperties::No)
                .build()
                .await?,
            patience: PATIENCE,
            quick: Places::new(QUICK),
            slow: Places::new(SLOW),
            checks: AtomicU64::new(0),
        })
    }

    /// Whether `sender`, who is `user`, may do what `action` stands for. A person is asked only where polkit does not
    /// know without, and where that is wanted.
    async fn judge(&self, user: u32, sender: &str, action: &str, interactive: bool) -> Result<(), Error> {
        let mut answer = {
            let _place = self.quick.take(user)?;
            self.ask(sender, action, 0).await?
        };
        if interactive && matches!(answer, (false, true, _)) {
            let _place = self.slow.take(user)?;
            answer = self.ask(sender, action, ALLOW_USER_INTERACTION).await?;
        }
        match answer {
            (true, ..) => Ok(()),
            (false, true, _) => Err(denied(
                "you are not authorised to do this without a password, and could not be asked for it; run it as root, or on a terminal",
            )),
            (false, false, _) => Err(denied("you are not authorised to do this")),
        }
    }

    async fn ask(&self, sender: &str, action: &str, flags: u32) -> Result<Answer, Error> {
        let id = format!("plimsoll-{}", self.checks.fetch_add(1, Ordering::Relaxed));
        let subject = ("system-bus-name", HashMap::from([("name", Variant::from(sender))]));
        let details = HashMap::new();
        let asked = self.authority.check_authorization(&subject, action, &details, flags, &id);
        match timeout(self.patience, asked).await {
            Ok(answer) => answer.map_err(|error| {
                denied(format!("only root may do this, since polkit does not answer: {error}"))
            }),
            Err(_) => {
                // Otherwise it stays open, at the bus as well. It may just have ended by itself.
                let _ = timeout(CALL_OFF, self.authority.cancel_check_authorization(&id)).await;
                Err(denied("nobody authenticated in time"))
            }
        }
    }
}

/// Who decides on changes.
#[derive(Clone)]
pub enum Authority {
    /// The system's: root passes, all others are polkit's to judge.
    Polkit(Arc<Polkit>),
    /// That of a private bus: its owner passes, and nobody else.
    Owner(u32),
}

impl Authority {
    /// Whether the sender of a call may do what `action` stands for.
    ///
    /// # Errors
    /// [`Kind::NotAuthorized`] with the reason; [`Kind::Busy`] where too much is open already.
    pub async fn check(
        &self,
        connection: &Connection,
        header: &Header<'_>,
        action: &'static str,
    ) -> Result<(), Error> {
        modest(header, LONGEST, 0)?;
        let sender = header.sender().ok_or_else(|| denied("the call has no sender"))?;
        let bus = DBusProxy::new(connection).await?;
        let user = bus
            .get_connection_unix_user(sender.clone().into())
            .await
            .map_err(|error| denied(format!("the bus does not know who calls: {error}")))?;
        match self {
            Self::Owner(owner) if user == *owner => Ok(()),
            Self::Owner(owner) => Err(denied(format!("only user {owner}, whose bus this is, may"))),
            Self::Polkit(_) if user == 0 => Ok(()),
            Self::Polkit(polkit) => {
                let interactive = header.primary().flags().contains(Flags::ALLOW_INTERACTIVE_AUTH);
                polkit.judge(user, sender.as_str(), action, interactive).await
            }
        }
    }
}

/// A call lies in memory, which the daemon's is locked in, for as long as it is decided on, waits for its turn or is
/// answered, and with it the descriptors that it brings: refuses one of more than so many bytes and descriptors.
///
/// # Errors
/// [`Kind::Failed`] with the limit.
pub fn modest(header: &Header<'_>, bytes: u32, descriptors: u32) -> Result<(), Error> {
    let length = header.primary().body_len();
    if length > bytes {
        let why = format!("a call of {length} bytes is too long, {bytes} is the most");
        return Err(Error::new(Kind::Failed, why));
    }
    match header.unix_fds().unwrap_or_default() {
        count if count <= descriptors => Ok(()),
        _ if descriptors == 0 => Err(Error::new(Kind::Failed, "this call takes no descriptors")),
        count => {
            let why = format!("{count} descriptors are too many, {descriptors} are the most");
            Err(Error::new(Kind::Failed, why))
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::Notify;
    use zbus::{Message, OwnedVariant, interface};

    use super::super::simulated::Bus;
    use super::*;

    /// A polkit whose agents never answer.
    #[derive(Clone, Default)]
    struct Fake {
        open: Arc<Mutex<BTreeMap<String, Arc<Notify>>>>,
    }

    #[interface(name = "org.freedesktop.PolicyKit1.Authority")]
    impl Fake {
        async fn check_authorization(
            &self,
            _subject: (String, HashMap<String, OwnedVariant>),
            action: String,
            _details: HashMap<String, String>,
            flags: u32,
            cancellation: String,
        ) -> zbus::fdo::Result<(Answer,)> {
            if action == "allowed" || flags == 0 {
                return Ok(((action == "allowed", action != "allowed", HashMap::new()),));
            }
            let cancelled = Arc::new(Notify::new());
            self.open.lock().unwrap().insert(cancellation, Arc::clone(&cancelled));
            cancelled.notified().await;
            Err(zbus::fdo::Error::Failed("cancelled".into()))
        }

        fn cancel_check_authorization(&self, cancellation: String) {
            if let Some(cancelled) = self.open.lock().unwrap().remove(&cancellation) {
                cancelled.notify_one();
            }
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn agents_that_never_answer_keep_nobody_else_away() {
        let Ok(bus) = Bus::start() else {
            eprintln!("skipped: dbus-daemon is not installed (package dbus)");
            return;
        };
        let connect = || zbus::connection::Builder::address(bus.address.as_str());
        let fake = Fake::default();
        let served = connect()
            .serve_at("/org/freedesktop/PolicyKit1/Authority", fake.clone())
            .name("org.freedesktop.PolicyKit1");
        let _served = served.build().await.unwrap();
        let mut polkit = Polkit::new(&connect().build().await.unwrap()).await.unwrap();
        // Long enough to have all of them open at once on a busy machine.
        polkit.patience = Duration::from_secs(15);
        let polkit = Arc::new(polkit);
        let ask = |user: u32, action: &'static str| {
            let polkit = Arc::clone(&polkit);
            tokio::spawn(async move { polkit.judge(user, ":1.1", action, true).await.map_err(|e| e.kind) })
        };
        let mut asked = Vec::new();
        for user in 1000..1008 {
            for _ in 0..SLOW.1 {
                asked.push(ask(user, "asks"));
            }
        }
        let opened = async {
            while fake.open.lock().unwrap().len() < SLOW.0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(60), opened).await.expect("all of them are open at once");
        // One user too often, and one too many: at once. What polkit knows by itself goes on.
        assert_eq!(ask(1000, "asks").await.unwrap(), Err(Kind::Busy));
        assert_eq!(ask(2000, "asks").await.unwrap(), Err(Kind::Busy));
        assert_eq!(ask(2000, "allowed").await.unwrap(), Ok(()));
        assert_eq!(fake.open.lock().unwrap().len(), SLOW.0, "all of this while they were open");
        // In the end each is called off, and there is room again.
        for asked in asked {
            assert_eq!(asked.await.unwrap(), Err(Kind::NotAuthorized));
        }
        assert_eq!(fake.open.lock().unwrap().len(), 0);
        assert!(polkit.slow.taken.lock().unwrap().is_empty());
    }

    #[test]
    fn one_user_has_few_places() {
        let places = Places::new((3, 2));
        let first = places.take(7).unwrap();
        let _second = places.take(7).unwrap();
        assert_eq!(places.take(7).err().map(|error| error.kind), Some(Kind::Busy));
        let third = places.take(8).unwrap();
        assert_eq!(places.take(9).err().map(|error| error.kind), Some(Kind::Busy));
        drop((first, third));
        let _again = places.take(7).unwrap();
        assert_eq!(places.taken.lock().unwrap().len(), 1, "who has none is forgotten");
    }

    #[test]
    fn a_call_that_is_waited_with_is_small() {
        let call = |text: &str| {
            let options = HashMap::<&str, Variant<'_>>::new();
            Message::method_call("/org/plimsoll1", "Load").build(&(text, options)).unwrap()
        };
        let small = |call: &Message, descriptors| modest(&call.header(), LONGEST, descriptors);
        assert_eq!(small(&call("small"), 0), Ok(()));
        assert!(small(&call(&"x".repeat(65536)), 0).is_err());
        let input = std::io::stdin();
        let call = Message::method_call("/org/plimsoll1", "Load").build(&(zbus::Fd::from(&input),)).unwrap();
        assert!(small(&call, 0).is_err());
        assert_eq!(small(&call, 1), Ok(()));
    }
}

//! A page of a server on this machine over HTTP/1.1: bounded in time and size, no redirects, no TLS.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::OpenOptions;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::libc;

use super::Host;
use super::sockets::{Connection, Doubt};

/// Longer is no file of keys.
const LONGEST_KEYS: u64 = 64 * 1024;
/// Longer are no headers.
const LONGEST_HEAD: usize = 16 * 1024;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// For people, and for the Host header.
    name: String,
    address: SocketAddr,
}

/// What was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// 200, 503, …
    pub status: u16,
    /// The body; none where it is longer than was asked for, cut off, or in an encoding that isn't read here.
    pub body: Option<Vec<u8>>,
}

/// Why there is no page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HttpError {
    /// Nobody listens, or may be connected to.
    #[error("can't be connected to")]
    Unreachable,
    /// Somebody listens who is not meant; nothing was said to them.
    #[error("belongs to user {0}")]
    Stranger(u32),
    /// Whoever listens, it can't be told whose they are; nothing was said to them.
    #[error("can't be told whose it is")]
    Unknown,
    /// It accepts connections and did not answer in time.
    #[error("does not answer in time")]
    Late,
    /// It speaks TLS.
    #[error("speaks TLS")]
    Tls,
    /// It speaks something else.
    #[error("does not speak HTTP")]
    Nonsense,
}

/// A key that a server wants to see. It is in no `Debug` and no message.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(hidden)")
    }
}

impl ApiKey {
    /// The first key of a file that has one on each line, as llama-server's `--api-key-file`; none where the file
    /// can't be read, is no regular file, or holds nothing that may stand in a header.
    #[must_use]
    pub fn first_of(path: &Path) -> Option<Self> {
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
        if !file.metadata().ok()?.is_file() {
            return None;
        }
        let mut text = String::new();
        file.take(LONGEST_KEYS).read_to_string(&mut text).ok()?;
        let key = text.lines().find(|line| !line.is_empty())?;
        key.bytes().all(|b| b.is_ascii_graphic()).then(|| Self(key.to_owned()))
    }
}

impl Server {
    /// The one that listens at `host`, an address. None for a name: looking it up may lead anywhere.
    #[must_use]
    pub fn at(host: &str, port: u16) -> Option<Self> {
        let ip = match host {
            "localhost" => Ipv4Addr::LOCALHOST.into(),
            other => other.parse::<IpAddr>().ok()?,
        };
        Some(Self::of(host, SocketAddr::new(ip, port)))
    }

    /// The one that listens at `address`, for which `host` is the name. One that listens everywhere is asked on the
    /// loopback.
    #[must_use]
    pub fn of(host: &str, mut address: SocketAddr) -> Self {
        let name = format!("{host}:{}", address.port());
        match address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
            IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
            _ => {}
        }
        Self { name, address }
    }

    /// Where it listens, for people.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// That it accepts a connection, and is of one of `users`.
    ///
    /// # Errors
    /// It does not, or is not.
    pub fn accepts(&self, users: &BTreeSet<u32>, limit: Duration) -> Result<(), HttpError> {
        self.connect(users, limit).map(drop)
    }

    /// The port that it listens on.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// A connection to a server of one of `users`.
    fn connect(&self, users: &BTreeSet<u32>, limit: Duration) -> Result<TcpStream, HttpError> {
        let unreachable = |_| HttpError::Unreachable;
        let stream = TcpStream::connect_timeout(&self.address, limit).map_err(unreachable)?;
        let ours = stream.local_addr().map_err(unreachable)?;
        let theirs = stream.peer_addr().map_err(unreachable)?;
        // A connection is of this machine, wherever else it is that processes are read.
        match Host::default().leads_to(Connection::new(ours, theirs), users) {
            Ok(()) => Ok(stream),
            Err(Doubt::Stranger(user)) => Err(HttpError::Stranger(user)),
            Err(Doubt::Unknown) => Err(HttpError::Unknown),
        }
    }

    /// The page at `path`, of which at most `longest` bytes are read. Where the server is not of one of `users`, nothing
    /// is said to it: anybody may listen on a port that is free. Returns within `limit`, but for a moment.
    ///
    /// # Errors
    /// It has none.
    pub fn get(
        &self,
        path: &str,
        users: &BTreeSet<u32>,
        key: Option<&ApiKey>,
        longest: usize,
        limit: Duration,
    ) -> Result<Page, HttpError> {
        let deadline = Instant::now() + limit;
        let authorization = key.map(|key| format!("Authorization: Bearer {}\r\n", key.0)).unwrap_or_default();
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: {}\r\nUser-Agent: plimsoll\r\n{authorization}Connection: close\r\n\r\n",
            self.name
        );
        let stream = self.connect(users, limit)?;
        stream.set_write_timeout(Some(limit)).map_err(|_| HttpError::Unreachable)?;
        read_page(&talk(stream, &request, longest, deadline), longest)
    }
}

/// Asks, and reads what comes until it is whole, too long or too late.
fn talk(mut stream: TcpStream, request: &str, longest: usize, deadline: Instant) -> Vec<u8> {
    let mut reply = Vec::new();
    if stream.write_all(request.as_bytes()).is_err() {
        return reply;
    }
    let mut part = [0; 8192];
    while reply.len() < LONGEST_HEAD + longest && !is_whole(&reply) {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || stream.set_read_timeout(Some(left)).is_err() {
            break;
        }
        match stream.read(&mut part) {
            Ok(0) => break,
            Ok(read) => reply.extend_from_slice(&part[..read]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    reply
}

/// The length of the head with the empty line after it.
fn head_length(reply: &[u8]) -> Option<usize> {
    let head = &reply[..reply.len().min(LONGEST_HEAD)];
    head.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}

/// The value of a header, in lower case.
fn header(head: &[u8], name: &str) -> Option<String> {
    let text = String::from_utf8_lossy(head).to_ascii_lowercase();
    let of = |line: &str| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim().to_owned());
    text.split("\r\n").find_map(of)
}

fn is_whole(reply: &[u8]) -> bool {
    let Some(head) = head_length(reply) else { return false };
    let length = header(&reply[..head], "content-length").and_then(|text| text.parse::<usize>().ok());
    length.is_some_and(|length| reply.len() - head >= length)
}

fn read_page(reply: &[u8], longest: usize) -> Result<Page, HttpError> {
    if reply.is_empty() {
        return Err(HttpError::Late);
    }
    if reply.starts_with(&[0x15, 0x03]) {
        return Err(HttpError::Tls);
    }
    // `HTTP/1.1 200 OK` and so on.
    let status = reply
        .strip_prefix(b"HTTP/1.")
        .and_then(|rest| rest.get(2..5))
        .and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok())
        .ok_or(HttpError::Nonsense)?;
    let body = head_length(reply).and_then(|head| {
        let (head, body) = reply.split_at(head);
        let plain = header(head, "transfer-encoding").is_none();
        let length: usize = header(head, "content-length")?.parse().ok()?;
        (plain && length <= longest).then(|| body.get(..length).map(<[u8]>::to_vec))?
    });
    Ok(Page { status, body })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn page(reply: &[u8]) -> Result<Page, HttpError> {
        read_page(reply, 100)
    }

    /// Whom this test is of.
    fn own() -> BTreeSet<u32> {
        BTreeSet::from([nix::unistd::geteuid().as_raw()])
    }

    /// What comes of asking a listener at `address`, this test's own, that should be of `users`; and what it was told.
    fn asked_as(users: &BTreeSet<u32>, address: &str) -> (Result<Page, HttpError>, String) {
        let listener = TcpListener::bind(address).unwrap();
        let server = Server::of("engine", listener.local_addr().unwrap());
        let users = users.clone();
        let asked = std::thread::spawn(move || {
            let key = ApiKey("hush".to_owned());
            server.get("/slots", &users, Some(&key), 1000, Duration::from_secs(5))
        });
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut request = [0; 512];
        let read = stream.read(&mut request).unwrap();
        if read > 0 {
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").unwrap();
        }
        (asked.join().unwrap(), String::from_utf8_lossy(&request[..read]).into_owned())
    }

    #[test]
    fn a_stranger_is_told_nothing() {
        let other = own().into_iter().map(|user| user + 1).collect();
        let stranger = own().into_iter().next().map(HttpError::Stranger).unwrap();
        for address in ["127.0.0.1:0", "0.0.0.0:0", "[::]:0", "[::1]:0"] {
            if TcpListener::bind(address).is_err() {
                eprintln!("skipped: {address} is none of this machine's");
                continue;
            }
            let (page, told) = asked_as(&own(), address);
            assert_eq!(page.map(|page| page.status), Ok(200), "{address}");
            assert!(told.contains("Bearer hush"), "{told}");
            for users in [&other, &BTreeSet::new()] {
                assert_eq!(asked_as(users, address), (Err(stranger), String::new()), "{address}");
            }
        }
    }

    #[test]
    fn one_that_takes_both_kinds_of_addresses_is_found() {
        let Ok(listener) = TcpListener::bind("[::]:0") else { return };
        let server = Server::at("127.0.0.1", listener.local_addr().unwrap().port()).unwrap();
        let limit = Duration::from_secs(5);
        let stranger = own().into_iter().next().map(HttpError::Stranger).unwrap();
        assert_eq!(server.accepts(&own(), limit), Ok(()));
        assert_eq!(server.accepts(&BTreeSet::new(), limit), Err(stranger));
    }

    #[test]
    fn status_lines_are_understood() {
        let status = |reply: &[u8]| page(reply).map(|page| page.status);
        assert_eq!(status(b"HTTP/1.1 200 "), Ok(200));
        assert_eq!(status(b"HTTP/1.0 503 "), Ok(503));
        assert_eq!(status(b"\x15\x03\x01\x00\x02\x02\x16"), Err(HttpError::Tls));
        assert_eq!(status(b""), Err(HttpError::Late));
        for nothing in [&b"HTTP/1.1"[..], b"SSH-2.0-x", b"HTTP/1.1 xyz ", b"\xff\xff"] {
            assert_eq!(status(nothing), Err(HttpError::Nonsense), "{nothing:?}");
        }
    }

    #[test]
    fn a_body_is_there_whole_or_not_at_all() {
        let body = |reply: &[u8]| page(reply).unwrap().body;
        assert_eq!(body(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]"), Some(b"[]".to_vec()));
        assert_eq!(body(b"HTTP/1.1 200 OK\r\ncontent-length:2\r\n\r\n[]and more"), Some(b"[]".to_vec()));
        for not in [
            &b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[]"[..],
            b"HTTP/1.1 200 OK\r\nContent-Length: 101\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n[]",
            b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n[]",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n[]",
            b"HTTP/1.1 200 OK\r\n\r\n[]",
            b"HTTP/1.1 200 OK\r\nContent-Length: 2",
        ] {
            assert_eq!(body(not), None, "{}", String::from_utf8_lossy(not));
        }
    }

    /// What a server that answers with `reply`, byte by byte where `slowly`, is heard to say.
    fn heard(reply: &[u8], slowly: bool) -> (Result<Page, HttpError>, Duration, String) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let reply = reply.to_vec();
        let engine = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 512];
            let read = stream.read(&mut request).unwrap();
            for part in reply.chunks(if slowly { 1 } else { 1 << 16 }) {
                if stream.write_all(part).is_err() {
                    break;
                }
                if slowly {
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
            String::from_utf8_lossy(&request[..read]).into_owned()
        });
        let asked = Instant::now();
        let key = ApiKey("hush".to_owned());
        let server = Server::at("127.0.0.1", port).unwrap();
        let page = server.get("/slots", &own(), Some(&key), 1000, Duration::from_millis(400));
        (page, asked.elapsed(), engine.join().unwrap())
    }

    #[test]
    fn it_is_asked_with_its_key() {
        let (page, _, request) = heard(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", false);
        assert_eq!(page.unwrap().body, Some(b"[]".to_vec()));
        assert!(request.starts_with("GET /slots HTTP/1.1\r\nHost: 127.0.0.1:"), "{request}");
        assert!(request.contains("\r\nAuthorization: Bearer hush\r\n"), "{request}");
    }

    #[test]
    fn huge_and_slow_answers_end() {
        let huge =
            [&b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n"[..], &vec![b'x'; 1 << 20]].concat();
        assert_eq!(heard(&huge, false).0, Ok(Page { status: 200, body: None }));
        let endless = vec![b'x'; 1 << 20];
        assert_eq!(heard(&endless, false).0, Err(HttpError::Nonsense));
        let (page, took, _) = heard(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", true);
        assert_eq!(page, Err(HttpError::Nonsense));
        assert!(took < Duration::from_secs(5), "{took:?}");
    }

    #[test]
    fn nobody_is_no_page() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let server = Server::of("127.0.0.1", address);
        let limit = Duration::from_secs(2);
        assert_eq!(server.get("/", &own(), None, 10, limit), Err(HttpError::Unreachable));
        assert_eq!(server.accepts(&own(), limit), Err(HttpError::Unreachable));
    }

    #[test]
    fn only_addresses_are_taken_and_everywhere_is_asked_on_the_loopback() {
        let of = |host| Server::at(host, 80).map_or("None".to_owned(), |server| server.address.to_string());
        assert_eq!(of("0.0.0.0"), "127.0.0.1:80");
        assert_eq!(of("::"), "[::1]:80");
        assert_eq!(of("192.0.2.1"), "192.0.2.1:80");
        assert_eq!(of("localhost"), "127.0.0.1:80");
        assert_eq!(of("example.net"), "None");
    }

    #[test]
    fn a_key_is_the_first_line_of_a_plain_file() {
        let path = std::env::temp_dir().join(format!("plimsoll-key-{}", std::process::id()));
        std::fs::write(&path, "\nhush-1\nhush-2\n").unwrap();
        assert_eq!(ApiKey::first_of(&path), Some(ApiKey("hush-1".to_owned())));
        assert!(!format!("{:?}", ApiKey::first_of(&path)).contains("hush"));
        let link = path.with_extension("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert_eq!(ApiKey::first_of(&link), None);
        std::fs::write(&path, "hush\rX-Evil: 1\n").unwrap();
        assert_eq!(ApiKey::first_of(&path), None);
        for path in [path, link] {
            std::fs::remove_file(path).unwrap();
        }
        assert_eq!(ApiKey::first_of(Path::new("/dev/zero")), None);
    }
}

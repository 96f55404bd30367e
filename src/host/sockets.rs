//! Whose program is at the other end of a connection within this machine, from /proc/net/tcp and tcp6.
//!
//! A port is anybody's who binds it first, so that an address alone says nothing of who answers there. A connection
//! that no program has accepted yet belongs to nobody (user 0, inode 0); what tells is who listens: the kernel lets
//! several listen at one address only where they are of one user.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nix::libc;

use super::Host;

/// No more is read of a table, which is some 100,000 sockets: those that wait for their end are in it, too, of which a
/// busy proxy leaves tens of thousands.
const LONGEST_TABLE: u64 = 16 << 20;
/// The state TCP_LISTEN.
const LISTENS: u8 = 0x0A;

/// Why a connection may not be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doubt {
    /// It leads to a program of this user.
    Stranger(u32),
    /// It can't be told whose it is: it leads to another machine, or another network namespace, or the tables can't be
    /// read.
    Unknown,
}

/// Both ends of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Connection {
    ours: SocketAddr,
    theirs: SocketAddr,
}

/// A line of a table, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Socket {
    local: SocketAddr,
    remote: SocketAddr,
    state: u8,
    /// Who made it; of one that was not accepted yet it means nothing.
    uid: u32,
    /// 0 while no program has it.
    inode: u64,
}

impl Connection {
    /// Between these addresses.
    pub(super) fn new(ours: SocketAddr, theirs: SocketAddr) -> Self {
        Self { ours: plain(ours), theirs: plain(theirs) }
    }

    /// Whether `socket` is its other end, or may have been connected to.
    fn concerns(&self, socket: &Socket) -> bool {
        self.is_end(socket) || self.distance(socket).is_some()
    }

    fn is_end(&self, socket: &Socket) -> bool {
        socket.state != LISTENS && (socket.local, socket.remote) == (self.theirs, self.ours)
    }

    /// How far a listener's address is from the one that was connected to, for the kernel takes the nearest; none for
    /// one that can't be reached there.
    fn distance(&self, socket: &Socket) -> Option<u8> {
        let listens = socket.state == LISTENS && socket.local.port() == self.theirs.port();
        let (at, to) = (socket.local.ip(), self.theirs.ip());
        match (at, to) {
            _ if !listens => None,
            _ if at == to => Some(0),
            _ if !at.is_unspecified() => None,
            (IpAddr::V4(_), IpAddr::V4(_)) | (IpAddr::V6(_), IpAddr::V6(_)) => Some(1),
            // One that listens everywhere takes both.
            (IpAddr::V6(_), IpAddr::V4(_)) => Some(2),
            (IpAddr::V4(_), IpAddr::V6(_)) => None,
        }
    }

    /// That it leads to a program of `users` and nobody else's, going by all sockets that it concerns.
    fn check(&self, sockets: &[Socket], users: &BTreeSet<u32>) -> Result<(), Doubt> {
        let nearest = sockets.iter().filter_map(|socket| self.distance(socket)).min();
        let listeners = sockets.iter().filter(|s| nearest.is_some() && self.distance(s) == nearest);
        // One that has accepted it and listens no more has left its place to another.
        let accepted = sockets.iter().filter(|s| self.is_end(s) && s.inode != 0);
        if let Some(stranger) = listeners.chain(accepted).find(|socket| !users.contains(&socket.uid)) {
            return Err(Doubt::Stranger(stranger.uid));
        }
        let is_whole = nearest.is_some() && sockets.iter().any(|socket| self.is_end(socket));
        if is_whole { Ok(()) } else { Err(Doubt::Unknown) }
    }
}

impl Host {
    /// That a connection leads to a program of `users` and nobody else's. Takes as long as two tables take to read, at
    /// most some 0.1 s.
    ///
    /// # Errors
    /// It leads to a stranger's, or it can't be told.
    pub(super) fn leads_to(&self, connection: Connection, users: &BTreeSet<u32>) -> Result<(), Doubt> {
        let mut sockets = Vec::new();
        for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
            match File::open(self.path(table)) {
                Ok(file) => {
                    sockets.extend(concerned(file, connection, LONGEST_TABLE).map_err(|_| Doubt::Unknown)?)
                }
                // Without IPv6 there is no second table.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(_) => return Err(Doubt::Unknown),
            }
        }
        connection.check(&sockets, users)
    }
}

/// The sockets of a table that a connection concerns. Lines that make no sense, as the heading, are left out.
///
/// # Errors
/// It can't be read, or has `longest` bytes.
fn concerned(table: impl Read, connection: Connection, longest: u64) -> io::Result<Vec<Socket>> {
    let mut table = BufReader::new(table.take(longest));
    let mut sockets = Vec::new();
    for line in table.by_ref().lines() {
        sockets.extend(socket(&line?).filter(|socket| connection.concerns(socket)));
    }
    // What is beyond may be what matters.
    if table.get_ref().limit() == 0 { Err(io::Error::from_raw_os_error(libc::EFBIG)) } else { Ok(sockets) }
}

/// A line of a table; see proc_net_tcp.rst.
fn socket(line: &str) -> Option<Socket> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let (local, remote) = (address(words.next()?)?, address(words.next()?)?);
    let state = u8::from_str_radix(words.next()?, 16).ok()?;
    // Between them: queues, timer and time-outs.
    let uid = words.nth(3)?.parse().ok()?;
    let inode = words.nth(1)?.parse().ok()?;
    Some(Socket { local, remote, state, uid, inode })
}

/// `0100007F:1F90`: words of 32 bits as the machine has them in memory, and the port.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let word = |at: usize| Some(u32::from_str_radix(ip.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    let ip: IpAddr = match ip.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let mut octets = [0; 16];
            for (at, four) in octets.chunks_exact_mut(4).enumerate() {
                four.copy_from_slice(&word(at * 8)?);
            }
            Ipv6Addr::from(octets).into()
        }
        _ => return None,
    };
    Some(plain(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?)))
}

/// Without the scope of an address, which the tables don't have, and IPv4 as such where an IPv6 socket has it.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

// The tables of these tests were recorded on a little-endian machine.
#[cfg(test)]
#[cfg(target_endian = "little")]
mod tests {
    use super::*;

    const HEADING: &str =
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";
    /// 127.0.0.1:8001 and everywhere, by IPv4 and by IPv6.
    const EXACT: &str = "0100007F:1F41";
    const MAPPED: &str = "0000000000000000FFFF00000100007F:1F41";
    const EVERYWHERE: &str = "00000000:1F41";
    const EVERYWHERE_6: &str = "00000000000000000000000000000000:1F41";
    const LOOPBACK_6: &str = "00000000000000000000000001000000:1F41";
    const CLIENT: &str = "0100007F:B3BC";

    fn line(local: &str, remote: &str, state: &str, uid: u32, inode: u64) -> String {
        format!(
            "   0: {local} {remote} {state} 00000000:00000000 00:00000000 00000000 {uid:5}        0 {inode} 1 \
             000000004a96e282 100 0 0 10 0                      \n"
        )
    }

    fn listener(at: &str, uid: u32) -> String {
        let remote = if at.len() > 13 { "00000000000000000000000000000000:0000" } else { "00000000:0000" };
        line(at, remote, "0A", uid, 1566)
    }

    /// The other end of the connection, accepted or not.
    fn end(uid: u32, inode: u64) -> String {
        line(EXACT, CLIENT, "01", uid, inode)
    }

    fn to(theirs: &str) -> Connection {
        let ours = if theirs.starts_with('[') { "[::1]:46012" } else { "127.0.0.1:46012" };
        Connection::new(ours.parse().unwrap(), theirs.parse().unwrap())
    }

    /// What is thought of a connection to 127.0.0.1:8001, which belongs to user 990.
    fn checked(lines: &[String]) -> Result<(), Doubt> {
        let text = format!("{HEADING}{}", lines.concat());
        let connection = to("127.0.0.1:8001");
        let sockets = concerned(text.as_bytes(), connection, 1 << 20).unwrap();
        connection.check(&sockets, &BTreeSet::from([990]))
    }

    #[test]
    fn a_listener_of_the_unit_is_let_pass() {
        for at in [EXACT, MAPPED, EVERYWHERE, EVERYWHERE_6] {
            assert_eq!(checked(&[listener(at, 990), end(0, 0)]), Ok(()), "{at}");
            assert_eq!(checked(&[listener(at, 990), end(990, 77)]), Ok(()), "{at}");
            assert_eq!(checked(&[listener(at, 1000), end(0, 0)]), Err(Doubt::Stranger(1000)), "{at}");
        }
        let client = "0000000000000000FFFF00000100007F:B3BC";
        let mapped = line(MAPPED, client, "01", 0, 0);
        assert_eq!(checked(&[listener(EVERYWHERE_6, 990), mapped]), Ok(()));
    }

    #[test]
    fn the_nearest_listeners_count_and_all_of_them() {
        let both = |a, b| checked(&[a, b, end(0, 0)]);
        assert_eq!(both(listener(EXACT, 990), listener(EXACT, 990)), Ok(()));
        assert_eq!(both(listener(EXACT, 990), listener(MAPPED, 1000)), Err(Doubt::Stranger(1000)));
        // One that takes IPv6 alone can't be told from one that takes both.
        assert_eq!(both(listener(EVERYWHERE_6, 1000), listener(EVERYWHERE, 990)), Ok(()));
        assert_eq!(both(listener(EVERYWHERE, 1000), listener(EXACT, 990)), Ok(()));
        assert_eq!(both(listener(EXACT, 1000), listener(EVERYWHERE, 990)), Err(Doubt::Stranger(1000)));
        // Others' ports and addresses.
        assert_eq!(both(listener(EXACT, 990), listener("0100007F:1F42", 1000)), Ok(()));
        assert_eq!(both(listener(EXACT, 990), listener("0200007F:1F41", 1000)), Ok(()));
        assert_eq!(both(listener(EXACT, 990), listener(LOOPBACK_6, 1000)), Ok(()));
    }

    #[test]
    fn one_that_accepted_and_left_its_place_is_seen() {
        assert_eq!(checked(&[listener(EXACT, 990), end(1000, 77)]), Err(Doubt::Stranger(1000)));
    }

    #[test]
    fn what_is_not_found_is_unknown() {
        assert_eq!(checked(&[]), Err(Doubt::Unknown));
        assert_eq!(checked(&[listener(EXACT, 990)]), Err(Doubt::Unknown), "no other end");
        assert_eq!(checked(&[end(0, 0)]), Err(Doubt::Unknown), "no listener");
        assert_eq!(checked(&[end(990, 77)]), Err(Doubt::Unknown), "no listener");
    }

    #[test]
    fn ipv6_is_told_from_ipv4() {
        let connection = to("[::1]:8001");
        let client = "00000000000000000000000001000000:B3BC";
        let of = |listeners: String| {
            let text = format!("{HEADING}{listeners}{}", line(LOOPBACK_6, client, "01", 0, 0));
            let sockets = concerned(text.as_bytes(), connection, 1 << 20).unwrap();
            connection.check(&sockets, &BTreeSet::from([990]))
        };
        assert_eq!(of(listener(LOOPBACK_6, 990)), Ok(()));
        assert_eq!(of(listener(EVERYWHERE_6, 990)), Ok(()));
        assert_eq!(of(listener(EVERYWHERE_6, 1000)), Err(Doubt::Stranger(1000)));
        assert_eq!(of(listener(EVERYWHERE, 990)), Err(Doubt::Unknown));
    }

    #[test]
    fn garbled_lines_are_left_out_and_a_long_table_is_an_error() {
        let whole = listener(EXACT, 990);
        let garbled = [
            String::new(),
            "\n".to_owned(),
            "1F41 1F41 0A\n".to_owned(),
            whole.replace(EXACT, "0100007F1F41"),
            whole.replace(EXACT, "0100007\u{e9}:1F41"),
            whole.replace(EXACT, "0100007F00:1F41"),
            whole.replace(EXACT, "0100007F:11F41"),
            whole.replace(" 0A ", " 10A "),
            whole.replace("990", "-990"),
            whole.replace("1566", "x"),
        ];
        for text in &garbled {
            assert_eq!(socket(text), None, "{text}");
        }
        // As far as the inode a line is good enough.
        for end in 0..whole.find("1566").unwrap() {
            assert_eq!(socket(&whole[..end]), None, "{end}");
        }
        assert_eq!(checked(&[garbled.concat(), whole.clone(), end(0, 0)]), Ok(()));
        let connection = to("127.0.0.1:8001");
        let length = u64::try_from(whole.len()).unwrap();
        assert!(concerned(whole.as_bytes(), connection, length).is_err());
        assert!(concerned(whole.as_bytes(), connection, length + 1).is_ok());
        assert!(concerned(&b"\xff\xfe\n"[..], connection, 100).is_err());
    }

    #[test]
    fn a_machine_without_the_tables_knows_nobody() {
        let host = Host::at("/nonexistent");
        assert_eq!(host.leads_to(to("127.0.0.1:8001"), &BTreeSet::from([990])), Err(Doubt::Unknown));
    }
}

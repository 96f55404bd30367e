//! What the engines say of their requests, asked at the addresses that they are configured with.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::effects::boot_msec;
use crate::action::systemd::UnitStatus;
use crate::config::Instance;
use crate::host::{ApiKey, Heard, Host, Server, requests_in_flight};
use crate::ledger::Busy;

/// How long an engine may take to answer. An idle one takes milliseconds, one that works answers between two batches.
const LIMIT: Duration = Duration::from_secs(2);
/// How many are asked at a time.
const AT_A_TIME: usize = 16;

/// Where an engine answers, and the file with its keys.
pub type Place = (Server, Option<PathBuf>);

type Places = dyn Fn(&Instance) -> Option<Place> + Send + Sync;

/// What was heard last, of each start of a unit.
pub struct Activities {
    heard: Mutex<BTreeMap<Instance, (String, Option<Busy>)>>,
    /// Where the units' processes are found.
    host: Host,
    place: Box<Places>,
}

impl Activities {
    /// Nothing heard yet; `place` says where an instance answers.
    #[must_use]
    pub fn new(host: Host, place: impl Fn(&Instance) -> Option<Place> + Send + Sync + 'static) -> Self {
        Self { heard: Mutex::default(), host, place: Box::new(place) }
    }

    /// What an instance said last in the start that has this InvocationID.
    #[must_use]
    pub fn busy(&self, instance: &Instance, invocation: &str) -> Option<Busy> {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.get(instance).filter(|(of, _)| of == invocation).and_then(|(_, busy)| *busy)
    }

    /// Asks these instances, each with its unit as it is now. Blocks, for each [`AT_A_TIME`] of them
    /// as long as one may take, and a moment.
    pub fn ask(&self, instances: &[(Instance, UnitStatus)]) {
        for some in instances.chunks(AT_A_TIME) {
            std::thread::scope(|scope| {
                for (instance, status) in some {
                    // Without a thread nothing is known of it, as of one that does not answer.
                    let _ = std::thread::Builder::new()
                        .stack_size(256 * 1024)
                        .spawn_scoped(scope, || self.ask_one(instance, status));
                }
            });
        }
        // A name that is gone from the configuration keeps nothing behind. Looking for it takes as long as a disk does, and
        // the daemon's loop reads what was heard.
        let heard = || self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let names: Vec<Instance> = heard().keys().cloned().collect();
        let gone: Vec<Instance> = names.into_iter().filter(|name| (self.place)(name).is_none()).collect();
        heard().retain(|instance, _| !gone.contains(instance));
    }

    fn ask_one(&self, instance: &Instance, status: &UnitStatus) {
        let before = self.busy(instance, &status.invocation);
        let heard = self.hear(instance, status).unwrap_or(Heard::Silent);
        let at = boot_msec();
        let busy = match (heard, before) {
            (Heard::Requests { in_flight, mark }, _) => Some(Busy { requests: in_flight, mark, at }),
            // It has answered before, so it is at work on something that takes longer.
            (Heard::Late, Some(before)) => Some(Busy { requests: before.requests.max(1), at, ..before }),
            (Heard::Late, None) | (Heard::Silent, _) => None,
        };
        let mut all = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(instance.clone(), (status.invocation.clone(), busy));
    }

    /// What is heard of an instance. None where nobody is there to be asked: its port is then anybody's, and a key is for
    /// the unit's own processes alone.
    fn hear(&self, instance: &Instance, status: &UnitStatus) -> Option<Heard> {
        let (server, keys) = (self.place)(instance)?;
        let users = self.host.users_of_unit(&status.control_group.parse().ok()?, status.main_pid);
        if users.is_empty() {
            return None;
        }
        let key = keys.as_deref().and_then(ApiKey::first_of);
        Some(requests_in_flight(&server, &users, key.as_ref(), LIMIT))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::TcpListener;
    use std::path::Path;

    use super::*;
    use crate::ledger::UnitState;

    const GROUP: &str = "/llm.slice/llm@a.service";
    const SLOTS: &str = "HTTP/1.1 200 OK\r\nContent-Length: 24\r\n\r\n[{\"is_processing\":true}]";

    fn status() -> UnitStatus {
        UnitStatus {
            name: "llm@a.service".to_owned(),
            state: UnitState::Active,
            sub_state: "running".to_owned(),
            main_pid: 7,
            invocation: "1".to_owned(),
            control_group: GROUP.to_owned(),
            result: "success".to_owned(),
            status_text: String::new(),
        }
    }

    /// What the kernel would show of a unit with these processes, each with its user.
    fn unit(root: &Path, processes: &[(u32, u32)]) {
        let group = root.join("sys/fs/cgroup").join(GROUP.trim_start_matches('/'));
        std::fs::create_dir_all(&group).unwrap();
        let pids: String = processes.iter().map(|(pid, _)| format!("{pid}\n")).collect();
        std::fs::write(group.join("cgroup.procs"), pids).unwrap();
        for (pid, user) in processes {
            let process = root.join(format!("proc/{pid}"));
            std::fs::create_dir_all(&process).unwrap();
            std::fs::write(
                process.join("status"),
                format!("Name:\ta\nUid:\t{user}\t{user}\t{user}\t{user}\n"),
            )
            .unwrap();
        }
    }

    #[test]
    fn an_engine_is_asked_where_a_process_of_its_unit_is_of_the_listeners_user() {
        let root = std::env::temp_dir().join(format!("plimsoll-activity-{}", std::process::id()));
        let own = nix::unistd::geteuid().as_raw();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let instance: Instance = "a".parse().unwrap();
        let place = move |_: &Instance| Some((Server::at("127.0.0.1", port)?, None));
        let activities = Activities::new(Host::at(&root), place);
        let requests = || activities.busy(&instance, "1").map(|busy| busy.requests);
        let ask = || activities.ask(&[(instance.clone(), status())]);

        // A main process of another user that has a server of the right one; and the main process alone.
        for processes in [&[(7, own + 1), (8, own)][..], &[(7, own)]] {
            unit(&root, processes);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let (mut stream, _) = listener.accept().unwrap();
                    let _ = stream.read(&mut [0; 512]).unwrap();
                    stream.write_all(SLOTS.as_bytes()).unwrap();
                });
                ask();
            });
            assert_eq!(requests(), Some(1));
        }

        // Nobody of that user is in the unit: the connection ends without a word.
        unit(&root, &[(7, own + 1)]);
        ask();
        assert_eq!(requests(), None);
        assert_eq!(listener.accept().unwrap().0.read(&mut [0; 16]).unwrap(), 0);

        // Crashed: the number of its main process is somebody's, and nobody is in the unit.
        unit(&root, &[(7, own)]);
        unit(&root, &[]);
        ask();
        assert_eq!(requests(), None);
        listener.set_nonblocking(true).unwrap();
        assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn what_was_heard_can_be_read_while_the_configuration_does_not_answer() {
        let (entered, looks) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let channels = Mutex::new((entered, ended));
        let activities = Activities::new(Host::at("/nowhere"), move |_| {
            let channels = channels.lock().unwrap();
            channels.0.send(()).unwrap();
            // A disk that does not answer until the test is over.
            let _ = channels.1.recv();
            None
        });
        let (a, limit): (Instance, _) = ("a".parse().unwrap(), Duration::from_secs(10));
        let busy = Busy { requests: 1, ..Busy::default() };
        activities.heard.lock().unwrap().insert(a.clone(), ("1".to_owned(), Some(busy)));
        std::thread::scope(|scope| {
            scope.spawn(|| activities.ask(&[]));
            looks.recv_timeout(limit).unwrap();
            let (answer, answered) = std::sync::mpsc::channel();
            let (activities, a) = (&activities, &a);
            scope.spawn(move || answer.send(activities.busy(a, "1")));
            let heard = answered.recv_timeout(limit);
            drop(end);
            assert_eq!(heard, Ok(Some(busy)));
        });
        assert_eq!(activities.busy(&a, "1"), None, "it is not configured");
    }
}

//! Leases in the loop: what ends them, and what outlives a restart.

use super::*;
use crate::daemon::leases;

/// A lease of this process, once it is on the bus.
async fn leased(bench: &mut Bench, text: &str, gib: u64) -> (u64, std::os::fd::OwnedFd) {
    let holder = Peer { pid: std::process::id(), pidfd: None, uid: 1000 };
    let bytes = Bytes::gib(gib);
    let name = text.parse().unwrap();
    let wish =
        LeaseWish { holder, name, bytes, gpu_bytes: Bytes::ZERO, like: None, priority: 50, wait: false };
    let published = async {
        loop {
            if let Some(Publication::LeaseBegan(_, began)) = bench.published.recv().await {
                return began.notify_one();
            }
        }
    };
    let (held, ()) = tokio::join!(bench.handle.lease(wish), published);
    held.unwrap()
}

#[test]
fn a_lease_is_held_until_its_descriptor_is_closed() {
    bench(&[], |mut bench| async move {
        let (id, held) = leased(&mut bench, "make", 4).await;
        let status = bench.handle.status().await.unwrap();
        assert_eq!(status.pools[0].reserved_bytes, Bytes::gib(4));
        assert_eq!(
            (status.leases[0].lease.as_str(), status.leases[0].state.as_str()),
            ("lease:make", "held")
        );
        assert_eq!(status.leases[0].uid, 1000);
        assert!(status.models.iter().all(|model| model.state == "inactive"), "it is no model");
        assert!(bench.fake.log.lock().unwrap().contains(&"save lease:make".to_owned()));
        // What is written to it means nothing.
        nix::unistd::write(&held, b"hello").unwrap();
        let (_, another) = leased(&mut bench, "make", 1).await;
        assert_eq!(bench.handle.status().await.unwrap().leases.len(), 2);
        drop(held);
        loop {
            if matches!(bench.published.recv().await, Some(Publication::LeaseEnded(ended)) if ended == id) {
                break;
            }
        }
        let status = bench.handle.status().await.unwrap();
        assert_eq!(status.pools[0].reserved_bytes, Bytes::gib(1));
        assert_eq!(status.leases[0].lease, "lease:make@2");
        drop(another);
    });
}

#[test]
fn a_lease_outlives_a_restart_as_its_holder_does() {
    let host = crate::host::Host::at("/");
    let pid = std::process::id();
    let start_time = host.start_time(pid).unwrap();
    let saved =
        |id, text: &str, start_time| leases::SavedLease { id, instance: name(text), uid: 0, pid, start_time };
    let all = vec![
        saved(1, "lease:kept", start_time),
        // Its number was given to another process since.
        saved(2, "lease:other", start_time + 1),
        // Its descriptor was closed while nobody looked.
        saved(3, "lease:closed", start_time),
        // Asked for and never answered: systemd has nothing of it.
        saved(4, "lease:asked", start_time),
    ];
    let pipe = || nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC | nix::fcntl::OFlag::O_NONBLOCK).unwrap();
    let ((one, held), (two, _two), (three, closed), (five, _five)) = (pipe(), pipe(), pipe(), pipe());
    drop(closed);
    let stored = |id: u64, reader| (format!("lease-{id:016x}"), reader);
    let descriptors = vec![stored(1, one), stored(2, two), stored(3, three), stored(5, five)];
    let notifier = Notifier::from_environment();
    let kept = leases::keep(all, descriptors, &host, &notifier);
    assert_eq!(kept.len(), 2, "as far as can be told before anybody listens");

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        let mut machine = Machine::default();
        machine.memory.total = Bytes::gib(16);
        machine.memory.available = Bytes::gib(15);
        let (machine, lock) = (Arc::new(Mutex::new(machine)), Arc::default());
        let fake =
            Fake { machine, log: Log::default(), lock, engines: Arc::default(), killed: Arc::default() };
        let footprint = Footprint { private: Bytes::gib(4), ..Footprint::default() };
        let mut holders = BTreeMap::new();
        for (id, text) in [(1, "lease:kept"), (3, "lease:closed"), (4, "lease:asked")] {
            let mut reservation = crate::ledger::Reservation::for_test(footprint.clone());
            reservation.invocation = format!("{id:016x}");
            holders.insert(name(text), reservation);
        }
        let (inputs, taken) = mpsc::unbounded_channel();
        let parts = Parts {
            ports: Box::new(fake.clone()),
            catalog: Arc::new(fake.clone()),
            core: Core::new(Rules::default(), Saved { holders, ..Saved::default() }, true),
            mode: None,
            store: None,
            survey: None,
            reloaded: None,
            notifier,
            leases: kept,
        };
        let (daemon, handle, mut published) = Daemon::new(parts, inputs.clone());
        let _run = tokio::task::spawn_local(daemon.run(taken));
        let mut seen = Vec::new();
        while !seen.contains(&"ended 3".to_owned()) {
            match published.recv().await {
                Some(Publication::LeaseBegan(lease, _)) => seen.push(format!("began {}", lease.instance)),
                Some(Publication::LeaseEnded(id)) => seen.push(format!("ended {id}")),
                _ => {}
            }
        }
        assert_eq!(seen, ["began lease:kept", "began lease:closed", "ended 3"]);
        let status = handle.status().await.unwrap();
        assert_eq!(status.leases.len(), 1);
        assert_eq!(status.pools[0].reserved_bytes, Bytes::gib(4), "who is not there any more holds nothing");
        drop(held);
        while !matches!(published.recv().await, Some(Publication::LeaseEnded(1))) {}
        assert_eq!(handle.status().await.unwrap().pools[0].reserved_bytes, Bytes::ZERO);
    });
}

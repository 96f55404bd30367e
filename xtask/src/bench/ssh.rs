//! How long sshd takes to greet, as seen from outside of the guest, while something else happens there.

use std::io::Read;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::lab::Lab;

/// How often it is asked.
const EVERY: Duration = Duration::from_millis(200);
/// Who has not greeted after so long has not answered, and counts as if it took that long.
const SILENCE: Duration = Duration::from_secs(60);

/// sshd greets nobody for a while who comes and goes without logging in, which is what is done here.
const FORGIVING: &str = "/etc/ssh/sshd_config.d/asked.conf";

/// Does something while sshd is asked again and again; each time it is a new connection, for which sshd has to fork.
pub fn asked<T>(lab: &Lab, work: impl FnOnce() -> Result<T>) -> Result<(T, Vec<Duration>)> {
    forgive(lab)?;
    let (port, done) = (lab.guest.ssh_port(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut all = Vec::new();
            while !done.load(Ordering::Relaxed) {
                let began = Instant::now();
                let greeted = greet(port);
                all.push(greeted.map_or(SILENCE, |()| began.elapsed()));
                std::thread::sleep(EVERY);
            }
            all
        });
        let worked = work();
        done.store(true, Ordering::Relaxed);
        let all = asking.join().ok().context("the thread that asks sshd panicked")?;
        Ok((worked?, all))
    })
}

fn forgive(lab: &Lab) -> Result<()> {
    if lab.guest.run(&format!("test -e {FORGIVING}"))?.code == 0 {
        return Ok(());
    }
    lab.guest.write(FORGIVING, "PerSourcePenalties no\n")?;
    // It starts anew, and hears nobody for a moment.
    lab.guest.ok("systemctl restart ssh.service")?;
    let began = Instant::now();
    while greet(lab.guest.ssh_port()).is_none() {
        ensure!(began.elapsed() < SILENCE, "sshd does not answer any more\n{}", lab.guest.evidence());
        std::thread::sleep(EVERY);
    }
    Ok(())
}

fn greet(port: u16) -> Option<()> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(SILENCE)).ok()?;
    let mut word = [0; 4];
    stream.read_exact(&mut word).ok()?;
    (&word == b"SSH-").then_some(())
}

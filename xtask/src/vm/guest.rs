//! Talking to the guest: commands over ssh, files, HTTP, and waiting for things to become true.

use super::qemu::Machine;
use crate::host;
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Under emulation on a busy machine everything takes long; nothing that works takes this long.
const PATIENCE: Duration = Duration::from_secs(240);
const COMMAND_LIMIT: Duration = Duration::from_secs(120);
/// How often a condition in the guest is looked at.
const POLL: Duration = Duration::from_millis(300);

/// What a command in the guest did.
#[derive(Debug, Clone)]
pub struct Output {
    /// Its exit code; 124 when it took too long, 255 when ssh itself failed.
    pub code: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Output {
    /// Both streams, for messages and searches.
    pub fn all(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

/// A booted guest.
pub struct Guest {
    machine: Machine,
}

impl Guest {
    /// Waits until the machine answers to ssh.
    pub fn connect(machine: Machine) -> Result<Guest> {
        let mut guest = Guest { machine };
        guest.wait_for_boot(None)?;
        Ok(guest)
    }

    fn ssh(&self, limit: Duration) -> Result<Command> {
        let image = &self.machine.image;
        let mut command = Command::new(host::find("timeout").context("timeout is not installed")?);
        command.args(["--kill-after=5", &limit.as_secs().max(1).to_string()]);
        command.arg(host::find("ssh").context("ssh is not installed")?);
        command.args(["-F", "none", "-q", "-p", &self.machine.ssh_port.to_string()]);
        command.arg("-i").arg(image.client_key());
        for option in [
            format!("UserKnownHostsFile={}", image.known_hosts().display()),
            format!("ControlPath={}/ssh", self.machine.runtime.display()),
        ] {
            command.args(["-o", &option]);
        }
        for option in [
            "HostKeyAlias=plimsoll-guest",
            "StrictHostKeyChecking=yes",
            "IdentitiesOnly=yes",
            "BatchMode=yes",
            "ConnectTimeout=20",
            "ServerAliveInterval=30",
        ] {
            command.args(["-o", option]);
        }
        command.stdin(Stdio::null());
        Ok(command)
    }

    /// Waits for ssh and then for the end of all start jobs of the boot.
    fn wait_for_boot(&mut self, previous: Option<&str>) -> Result<()> {
        self.wait_for_ssh(previous)?;
        // The exit code says whether a unit failed, which is for the caller to judge.
        self.run_within("systemctl is-system-running --wait", PATIENCE)?;
        Ok(())
    }

    /// Opens the connection that all commands share, once sshd answers; with `previous`, only a
    /// boot other than that one counts.
    fn wait_for_ssh(&mut self, previous: Option<&str>) -> Result<()> {
        let started = Instant::now();
        loop {
            self.machine.check_alive()?;
            let mut master = self.ssh(Duration::from_secs(40))?;
            master.args(["-o", "ControlMaster=yes", "-f", "-N", "root@127.0.0.1"]);
            master.stdout(Stdio::null()).stderr(Stdio::null());
            if master.status()?.success() {
                let boot = self.boot_id().unwrap_or_default();
                if !boot.is_empty() && previous != Some(boot.as_str()) {
                    return Ok(());
                }
                self.disconnect();
            }
            if started.elapsed() > PATIENCE {
                bail!(
                    "the guest does not answer to ssh; its console says:\n{}",
                    self.machine.console_tail(40)
                );
            }
            std::thread::sleep(POLL);
        }
    }

    fn disconnect(&self) {
        if let Ok(mut command) = self.ssh(Duration::from_secs(10)) {
            let _ = command.args(["-O", "exit", "root@127.0.0.1"]).stderr(Stdio::null()).status();
        }
        let _ = fs::remove_file(self.machine.runtime.join("ssh"));
    }

    /// The kernel's identifier of this boot.
    pub fn boot_id(&self) -> Result<String> {
        Ok(self.run("cat /proc/sys/kernel/random/boot_id")?.stdout.trim().to_owned())
    }

    /// Runs a shell script as root in the guest, for at most two minutes. A failing script is not
    /// an error here: look at the code.
    pub fn run(&self, script: &str) -> Result<Output> {
        self.run_within(script, COMMAND_LIMIT)
    }

    /// Like [`Guest::run`] with a limit of its own.
    pub fn run_within(&self, script: &str, limit: Duration) -> Result<Output> {
        let done = self.ssh(limit)?.args(["root@127.0.0.1", "--", script]).output()?;
        Ok(Output {
            code: done.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&done.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&done.stderr).into_owned(),
        })
    }

    /// Runs a script that has to succeed; returns its standard output without the last newline.
    pub fn ok(&self, script: &str) -> Result<String> {
        self.ok_within(script, COMMAND_LIMIT)
    }

    /// Like [`Guest::ok`] with a limit of its own.
    pub fn ok_within(&self, script: &str, limit: Duration) -> Result<String> {
        let done = self.run_within(script, limit)?;
        if done.code != 0 {
            bail!("exit {} of: {script}\n{}{}", done.code, done.all(), self.evidence());
        }
        Ok(done.stdout.trim_end().to_owned())
    }

    /// Looks until `probe` gives a value; fails with what it last said and what the guest shows.
    pub fn wait_for<T>(
        &self,
        what: &str,
        deadline: Duration,
        mut probe: impl FnMut(&Guest) -> Result<Option<T>>,
    ) -> Result<T> {
        let started = Instant::now();
        loop {
            let seen = probe(self);
            if let Ok(Some(value)) = seen {
                return Ok(value);
            }
            if started.elapsed() > deadline {
                let said = seen.err().map(|error| format!(": {error:#}")).unwrap_or_default();
                bail!("after {} s still not: {what}{said}\n{}", deadline.as_secs(), self.evidence());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Looks until a shell condition holds in the guest.
    pub fn wait_until(&self, what: &str, deadline: Duration, condition: &str) -> Result<()> {
        self.wait_for(what, deadline, |guest| Ok((guest.run(condition)?.code == 0).then_some(())))
    }

    /// What helps to understand a failure: units, memory, the daemon's view, the last of the journal.
    pub fn evidence(&self) -> String {
        let script = "echo '--- units'; systemctl list-units --all --no-legend --no-pager 'llm@*' 'plimsolld*'; \
            echo '--- memory'; free -m; echo '--- status'; \
            if command -v plimsoll >/dev/null; then timeout 20 plimsoll status 2>&1; fi; \
            echo '--- journal'; journalctl -b --no-pager -o short-monotonic -n 40";
        match self.run_within(script, Duration::from_secs(60)) {
            Ok(done) if done.code != 255 => done.all(),
            _ => format!("--- the guest does not answer; its console:\n{}", self.machine.console_tail(30)),
        }
    }

    /// A place in the journal, for [`Guest::journal_since`].
    pub fn journal_cursor(&self) -> Result<String> {
        let shown =
            self.ok("journalctl --sync; journalctl -n 1 --no-pager -o cat --show-cursor | tail -n 1")?;
        Ok(shown.trim_start_matches("-- cursor: ").to_owned())
    }

    /// The journal after a cursor; `filter` is added to journalctl's arguments.
    pub fn journal_since(&self, cursor: &str, filter: &str) -> Result<String> {
        self.ok(&format!(
            "journalctl --sync; journalctl --no-pager -o short-monotonic --after-cursor='{cursor}' {filter}"
        ))
    }

    /// Copies a file of this machine into the guest.
    pub fn copy_in(&self, local: &Path, remote: &str) -> Result<()> {
        let file = fs::File::open(local).with_context(|| format!("cannot open {}", local.display()))?;
        let mut command = self.ssh(COMMAND_LIMIT)?;
        command.args(["root@127.0.0.1", "--", &format!("cat > '{remote}'")]).stdin(file);
        host::output(&mut command).map(|_| ())
    }

    /// Writes a file in the guest.
    pub fn write(&self, remote: &str, contents: &str) -> Result<()> {
        let mut command = self.ssh(COMMAND_LIMIT)?;
        let script = format!("mkdir -p \"$(dirname '{remote}')\" && cat > '{remote}'");
        let mut child = command.args(["root@127.0.0.1", "--", &script]).stdin(Stdio::piped()).spawn()?;
        child.stdin.take().context("no standard input")?.write_all(contents.as_bytes())?;
        if !child.wait()?.success() {
            bail!("cannot write {remote} in the guest");
        }
        Ok(())
    }

    /// Reboots in good order and waits for the next boot to answer.
    pub fn reboot_and_wait(&mut self) -> Result<()> {
        let before = self.boot_id()?;
        // The connection may be gone before the command returns.
        let _ = self.run("systemctl --no-block reboot")?;
        self.disconnect();
        self.wait_for_boot(Some(&before))
    }

    /// A hard reset, as if the power had failed for a moment.
    pub fn reset_and_wait(&mut self) -> Result<()> {
        let before = self.boot_id()?;
        self.run("sync")?;
        self.machine.qmp("system_reset")?;
        self.disconnect();
        self.wait_for_boot(Some(&before))
    }

    /// The port of 127.0.0.1 at which its sshd greets.
    pub fn ssh_port(&self) -> u16 {
        self.machine.ssh_port
    }

    /// An HTTP request to a forwarded port of the guest: status and body.
    pub fn http(&self, port: u16, path: &str, body: Option<&str>) -> Result<(u16, String)> {
        let here = self.machine.forwarded_port(port)?;
        let mut stream = TcpStream::connect(("127.0.0.1", here))?;
        stream.set_read_timeout(Some(COMMAND_LIMIT))?;
        let (method, body) = body.map_or(("GET", ""), |body| ("POST", body));
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: guest\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut reply = Vec::new();
        stream.read_to_end(&mut reply)?;
        let reply = String::from_utf8_lossy(&reply);
        let status = reply.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no HTTP reply")?;
        let body = reply.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default();
        Ok((status, body))
    }

    /// Asks the model on a port of the guest for a completion, from inside the guest.
    pub fn completion(&self, port: u16) -> Result<String> {
        let body = r#"{"prompt":"The mark on the hull","n_predict":4}"#;
        // One that is partly in swap, on an emulated and busy machine, takes minutes.
        let ask = format!(
            "curl -fsS --max-time 290 -H 'Content-Type: application/json' -d '{body}' http://127.0.0.1:{port}/completion"
        );
        let reply = self.ok_within(&ask, crate::lab::PATIENCE)?;
        let json: serde_json::Value =
            serde_json::from_str(&reply).with_context(|| format!("not JSON: {reply}"))?;
        match json["tokens_predicted"].as_u64() {
            Some(tokens) if tokens > 0 => Ok(json["content"].as_str().unwrap_or_default().to_owned()),
            _ => bail!("no completion: {reply}"),
        }
    }

    /// Says how a person logs in, and waits for Enter.
    pub fn offer_login(&self) {
        let Ok(command) = self.ssh(COMMAND_LIMIT) else { return };
        // Without `timeout` and its two arguments.
        let words: Vec<String> =
            command.get_args().skip(2).map(|word| word.to_string_lossy().into_owned()).collect();
        println!("log in with:\n{} root@127.0.0.1\nEnter ends the machine", words.join(" "));
        let _ = std::io::stdin().read_line(&mut String::new());
    }
}

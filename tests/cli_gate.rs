//! `plimsoll run` and `plimsoll wait-ready` as a unit starts them: with a daemon that answers at the
//! gate, a socket of the service manager, and an engine that is a shell script.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)] // a test: what is wrong has to stop it

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use plimsoll::dbus::{Error, Kind, NAME, PATH};

/// What the unit of a test has around it: a configuration, a bus, a service manager.
struct Unit {
    root: PathBuf,
    bus: Child,
    address: String,
    manager: UnixDatagram,
}

impl Unit {
    /// None where there is no dbus-daemon to make a private bus with.
    fn new(test: &str, model: &str) -> Option<Self> {
        let mut bus = Command::new("dbus-daemon")
            .args(["--session", "--nofork", "--nopidfile", "--print-address=1"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .inspect_err(|_| eprintln!("skipped: dbus-daemon is not installed"))
            .ok()?;
        let mut address = String::new();
        BufReader::new(bus.stdout.take().unwrap()).read_line(&mut address).unwrap();
        let root = std::env::temp_dir().join(format!("plimsoll-gate-{test}-{}", std::process::id()));
        let models = root.join("etc/plimsoll/models.d");
        std::fs::create_dir_all(&models).unwrap();
        std::fs::write(models.join("x.toml"), model).unwrap();
        let manager = UnixDatagram::bind(root.join("notify")).unwrap();
        manager.set_nonblocking(true).unwrap();
        Some(Self { root, bus, address: address.trim().to_owned(), manager })
    }

    fn command(&self, verb: &str) -> Command {
        self.command_of(verb, "x")
    }

    fn command_of(&self, verb: &str, instance: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_plimsoll"));
        command.args([verb, instance, "--bus", &self.address, "--root"]).arg(&self.root);
        command.env_clear().env("NOTIFY_SOCKET", self.root.join("notify")).stdin(Stdio::null());
        command
    }

    /// Runs the gate against a daemon that answers so.
    fn run(&self, answer: Answer, change: impl FnOnce(&mut Command)) -> Output {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut command = self.command("run");
        change(&mut command);
        runtime.block_on(async {
            let _daemon = zbus::connection::Builder::address(self.address.as_str())
                .serve_at(PATH, Gate(answer))
                .name(NAME)
                .build()
                .await
                .unwrap();
            tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
        })
    }

    /// Every message to the service manager so far.
    fn messages(&self) -> Vec<String> {
        let mut buffer = [0; 4096];
        let mut messages = Vec::new();
        while let Ok(read) = self.manager.recv(&mut buffer) {
            messages.push(String::from_utf8(buffer[..read].to_vec()).unwrap());
        }
        messages
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        let _ = self.bus.kill();
        let _ = self.bus.wait();
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

type Admitted = (Vec<String>, HashMap<String, String>);
type Answer = Result<Admitted, Error>;

struct Gate(Answer);

#[zbus::interface(name = "org.plimsoll1.Manager")]
impl Gate {
    fn admit(
        &self,
        instance: String,
        _files: Vec<(String, zbus::OwnedFd)>,
        environment: HashMap<String, String>,
        _engine: HashMap<String, String>,
    ) -> Result<Admitted, Error> {
        assert_eq!(instance, "x");
        let (argv, mut added) = self.0.clone()?;
        let told: Vec<String> =
            environment.into_iter().map(|(name, value)| format!("{name}={value}")).collect();
        added.insert("TOLD".to_owned(), told.join(" "));
        Ok((argv, added))
    }
}

fn admitted(script: &str) -> Answer {
    let argv = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
    Ok((argv, HashMap::from([("ADDED".to_owned(), "by the daemon".to_owned())])))
}

const ANY: &str = "command = [\"/bin/true\"]\nmemory = \"1GiB\"\nport = 18211\n";

#[test]
fn an_admitted_engine_replaces_the_gate() {
    let Some(unit) = Unit::new("admitted", ANY) else { return };
    let script =
        "echo \"$ADDED, $KEPT, told $TOLD, bus ${PLIMSOLL_BUS_ADDRESS-none}\"; ls /proc/$$/fd; exit 7";
    let output = unit.run(admitted(script), |command| {
        command.env("KEPT", "from the unit").env("PATH", "/usr/bin:/bin");
        command.env("LLAMA_ARG_UBATCH", "64").env("LLAMA_API_KEY", "hush");
        command.env("PLIMSOLL_BUS_ADDRESS", &unit.address);
    });
    let text = String::from_utf8(output.stdout).unwrap();
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("by the daemon, from the unit, told LLAMA_ARG_UBATCH=64, bus none"));
    // Neither the bus nor the model's files stay open in the engine: only what any child of this test has.
    // (A shell may read its script from a high descriptor.)
    let low = |lines: std::str::Lines<'_>| -> Vec<u32> {
        lines.filter_map(|fd| fd.parse().ok()).filter(|fd| *fd < 10).collect()
    };
    let plain = Command::new("/bin/sh").args(["-c", "ls /proc/$$/fd; exit 7"]).output().unwrap();
    assert_eq!(low(lines), low(std::str::from_utf8(&plain.stdout).unwrap().lines()));
    assert_eq!(output.status.code(), Some(7), "the engine's own exit code");
    assert!(unit.messages().contains(&"STATUS=waiting for admission".to_owned()));
}

#[test]
fn a_refusal_is_one_line_and_its_exit_code() {
    for (kind, code) in [(Kind::WontFit, 75), (Kind::Busy, 75), (Kind::NotTheUnit, 77), (Kind::Config, 78)] {
        let Some(unit) = Unit::new(&format!("refused-{code}-{kind:?}"), ANY) else { return };
        let refusal = "x was refused: it needs 90.0 GiB, 12.0 GiB is free; try: plimsoll load x -c 4096";
        let output = unit.run(Err(Error::new(kind, refusal)), |_| {});
        assert_eq!(output.status.code(), Some(code), "{kind:?}");
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "");
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(said.lines().next(), Some(format!("plimsoll: {refusal}").as_str()));
        assert!(unit.messages().contains(&format!("STATUS={refusal}")));
    }
}

#[test]
fn a_unit_named_after_an_alias_is_told_the_models_name() {
    let Some(unit) = Unit::new("alias", &format!("aliases = [\"ex\"]\n{ANY}")) else { return };
    for (alias, model) in [("ex", "x"), ("ex@2", "x@2")] {
        let output = unit.command_of("run", alias).output().unwrap();
        assert_eq!((output.status.code(), output.stdout.len()), (Some(78), 0), "{alias}");
        let said = String::from_utf8(output.stderr).unwrap();
        let sentence =
            format!("plimsoll: '{alias}' is an alias of {model}, and a unit has to be named after the model");
        assert_eq!(said.lines().next(), Some(sentence.as_str()));
        assert!(said.contains(&format!("systemctl start llm@{model}.service")), "{said}");
    }
}

/// A stand-in for the engine's process.
fn sleeper() -> Child {
    Command::new("sleep").arg("600").stdout(Stdio::null()).spawn().unwrap()
}

#[test]
fn wait_ready_ends_when_the_model_answers() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let model =
        format!("command = [\"/bin/true\"]\nmemory = \"1GiB\"\nport = {port}\nhealth-path = \"/health\"\n");
    let Some(unit) = Unit::new("ready", &model) else { return };
    let engine = std::thread::spawn(move || {
        for status in ["503 Service Unavailable", "200 OK"] {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 512];
            let read = stream.read(&mut request).unwrap();
            assert!(request[..read].starts_with(b"GET /health HTTP/1.1\r\n"));
            stream.write_all(format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n").as_bytes()).unwrap();
        }
    });
    let mut process = sleeper();
    let output = unit.command("wait-ready").env("MAINPID", process.id().to_string()).output().unwrap();
    process.kill().unwrap();
    process.wait().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    engine.join().unwrap();
    let messages = unit.messages();
    assert!(messages.contains(&format!("STATUS=ready at 127.0.0.1:{port}")), "{messages:?}");
    assert!(messages.iter().any(|message| message.starts_with("EXTEND_TIMEOUT_USEC=")), "{messages:?}");
}

#[test]
fn wait_ready_fails_with_the_engine() {
    let Some(unit) = Unit::new("gone", ANY) else { return };
    let mut process = sleeper();
    let mut waiting = unit.command("wait-ready");
    let waiting = waiting.env("MAINPID", process.id().to_string()).stderr(Stdio::piped()).spawn().unwrap();
    // It has begun to wait once it asks for time.
    unit.manager.set_nonblocking(false).unwrap();
    let mut buffer = [0; 256];
    while !buffer.starts_with(b"EXTEND_TIMEOUT_USEC=") {
        unit.manager.recv(&mut buffer).unwrap();
    }
    process.kill().unwrap();
    process.wait().unwrap();
    let output = waiting.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.starts_with("plimsoll: the engine ended before it answered\n"), "{text}");
}

#[test]
fn wait_ready_leaves_the_last_word_to_a_refusal() {
    let Some(unit) = Unit::new("refused", ANY) else { return };
    // The process is gone before the wait begins.
    let mut process = sleeper();
    let pid = process.id();
    process.kill().unwrap();
    process.wait().unwrap();
    let output = unit.command("wait-ready").env("MAINPID", pid.to_string()).output().unwrap();
    assert_eq!((output.status.code(), output.stderr.len()), (Some(1), 0));
    assert!(Path::new(&unit.root).exists());
}

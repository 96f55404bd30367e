//! A guest with the project's package in it, and what scenarios and the demonstration do with it.

use crate::install;
use crate::models::gguf::shard_path;
use crate::vm::{Guest, guest::Output};
use anyhow::{Context, Result, ensure};
use plimsoll::bytes::Bytes;
use plimsoll::daemon::report::{Decision, Model, Status};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Nothing that works takes this long, even under emulation on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// Where the models lie in the guest.
pub const MODELS: &str = "/srv/models";

/// The settings of the daemon in the guest, which is small: 2 GiB in all.
const SETTINGS: &str = "reserve = \"256MiB\"\n[swap]\nfree-space = \"256MiB\"\n";

/// A guest with Plimsoll in it.
pub struct Lab {
    /// The machine.
    pub guest: Guest,
    /// The package, as built on this machine.
    pub package: PathBuf,
    /// The profile it was built with.
    pub profile: String,
}

/// A model's configuration, for tests: the keys that they vary.
#[derive(Debug, Clone)]
pub struct Config {
    name: String,
    file: String,
    port: u16,
    priority: u8,
    context: u32,
    extra: String,
}

impl Config {
    /// `name`, served from `/srv/models/NAME.gguf` on `port` with a small context.
    pub fn new(name: &str, port: u16) -> Config {
        Config {
            name: name.into(),
            file: format!("{MODELS}/{name}.gguf"),
            port,
            priority: 50,
            context: 1024,
            extra: String::new(),
        }
    }

    /// Another file below `/srv/models`.
    pub fn file(self, path: &str) -> Config {
        self.at(&format!("{MODELS}/{path}"))
    }

    /// A file anywhere.
    pub fn at(mut self, path: &str) -> Config {
        self.file = path.into();
        self
    }

    /// The first shard of a split model below `/srv/models`.
    pub fn split(self, base: &str, count: u16) -> Config {
        let path = shard_path(Path::new(base), 1, count);
        self.file(&path.to_string_lossy())
    }

    /// Another priority than 50.
    pub fn priority(mut self, priority: u8) -> Config {
        self.priority = priority;
        self
    }

    /// Another context than 1024.
    pub fn context(mut self, tokens: u32) -> Config {
        self.context = tokens;
        self
    }

    /// A further line.
    pub fn with(mut self, line: &str) -> Config {
        self.extra.push_str(line);
        self.extra.push('\n');
        self
    }

    fn toml(&self) -> String {
        let Config { file, port, priority, context, extra, .. } = self;
        format!("model = \"{file}\"\ncontext = {context}\nport = {port}\npriority = {priority}\n{extra}")
    }
}

impl Lab {
    /// Installs the package and the settings.
    pub fn new(guest: Guest, package: PathBuf, profile: &str) -> Result<Lab> {
        let lab = Lab { guest, package, profile: profile.into() };
        lab.guest.write("/etc/plimsoll/plimsoll.toml", SETTINGS)?;
        lab.install(&lab.package)?;
        Ok(lab)
    }

    /// `dpkg -i` of a package of this machine.
    pub fn install(&self, package: &Path) -> Result<String> {
        self.guest.copy_in(package, "/root/plimsoll.deb")?;
        self.guest.ok_within("dpkg -i /root/plimsoll.deb", PATIENCE)
    }

    /// Configures exactly these models and has the daemon read it.
    pub fn configure(&self, models: &[Config]) -> Result<()> {
        self.guest.ok("rm -f /etc/plimsoll/models.d/*")?;
        for model in models {
            self.guest.write(&format!("/etc/plimsoll/models.d/{}.toml", model.name), &model.toml())?;
        }
        self.guest.ok("systemctl daemon-reload && systemctl reload plimsolld.service").map(|_| ())
    }

    /// `systemctl start` of an instance, to its end.
    pub fn start(&self, instance: &str) -> Result<Output> {
        self.guest.run_within(&format!("systemctl start llm@{instance}.service"), PATIENCE)
    }

    /// `systemctl start` that has to succeed, after which the model has to answer.
    pub fn serve(&self, instance: &str, port: u16) -> Result<()> {
        let done = self.start(instance)?;
        ensure!(
            done.code == 0,
            "systemctl start llm@{instance} failed: {}\n{}{}",
            done.all(),
            self.unit_status(instance)?,
            self.guest.evidence()
        );
        self.guest.completion(port).map(|_| ())
    }

    /// A property of an instance's unit.
    pub fn property(&self, instance: &str, name: &str) -> Result<String> {
        self.guest.ok(&format!("systemctl show --value -p {name} llm@{instance}.service"))
    }

    /// The main process of an instance that has to run.
    pub fn main_pid(&self, instance: &str) -> Result<u32> {
        let pid: u32 = self.property(instance, "MainPID")?.parse()?;
        ensure!(pid != 0, "llm@{instance} does not run\n{}", self.guest.evidence());
        Ok(pid)
    }

    /// The active state of an instance's unit.
    pub fn state(&self, instance: &str) -> Result<String> {
        self.property(instance, "ActiveState")
    }

    /// `systemctl status` of an instance, whatever its exit code.
    pub fn unit_status(&self, instance: &str) -> Result<String> {
        Ok(self.guest.run(&format!("systemctl status --no-pager --full llm@{instance}.service"))?.all())
    }

    /// `plimsoll status --json`.
    pub fn status(&self) -> Result<Status> {
        let text = self.guest.ok("plimsoll status --json")?;
        serde_json::from_str(&text).with_context(|| format!("not a status: {text}"))
    }

    /// One instance in the status.
    pub fn model(&self, instance: &str) -> Result<Model> {
        let status = self.status()?;
        let found = status.models.into_iter().find(|model| model.instance == instance);
        found.with_context(|| format!("{instance} is not in the status"))
    }

    /// `plimsoll plan --json`.
    pub fn plan(&self, instance: &str) -> Result<Decision> {
        // A plan that ends in a refusal exits with 75 and is printed all the same.
        let done = self.guest.run(&format!("plimsoll plan --json {instance}"))?;
        serde_json::from_str(&done.stdout).with_context(|| format!("not a plan: {}", done.all()))
    }

    /// The main processes of all units of the set, by instance.
    pub fn main_pids(&self, instances: &[&str]) -> Result<BTreeMap<String, u32>> {
        instances.iter().map(|name| Ok(((*name).to_owned(), self.main_pid(name)?))).collect()
    }

    /// The pool called `memory`: what models hold of it in reservations, and what they may.
    pub fn memory_pool(&self) -> Result<plimsoll::daemon::report::Pool> {
        let status = self.status()?;
        status.pools.into_iter().find(|pool| pool.name == "memory").context("the status has no pool memory")
    }

    /// The refusal of a start: fails unless it exits with the code, once, with `words` in the
    /// unit's status, and no restart follows.
    pub fn refused(&self, instance: &str, code: i32, words: &[&str]) -> Result<String> {
        let done = self.start(instance)?;
        ensure!(done.code != 0, "llm@{instance} started\n{}", self.guest.evidence());
        let (status, shown) = (self.property(instance, "ExecMainStatus")?, self.unit_status(instance)?);
        ensure!(status == code.to_string(), "llm@{instance} exited with {status}, not {code}:\n{shown}");
        for word in words {
            ensure!(shown.contains(word), "the status of llm@{instance} does not say {word:?}:\n{shown}");
        }
        ensure!(self.state(instance)? == "failed", "llm@{instance} is not failed:\n{shown}");
        ensure!(self.property(instance, "NRestarts")? == "0", "llm@{instance} was restarted:\n{shown}");
        Ok(shown)
    }

    /// Where the program is that strains memory.
    pub const STRAIN: &'static str = "/usr/local/bin/strain";

    /// Builds the program that strains memory (`src/bin/strain.rs`) and copies it into the guest, once.
    pub fn bring_strain(&self) -> Result<()> {
        if self.guest.run(&format!("test -x {}", Self::STRAIN))?.code == 0 {
            return Ok(());
        }
        let program = install::build_strain(&self.profile)?;
        self.guest.copy_in(&program, Self::STRAIN)?;
        self.guest.ok(&format!("chmod 0755 {0} && sync {0}", Self::STRAIN)).map(|_| ())
    }

    /// MemAvailable.
    pub fn available(&self) -> Result<Bytes> {
        let kib = self.guest.ok("sync; awk '/^MemAvailable:/ {print $2}' /proc/meminfo")?;
        Ok(Bytes(kib.parse::<u64>()? * 1024))
    }

    /// The daemon's main process.
    pub fn daemon_pid(&self) -> Result<u32> {
        let pid = self.guest.ok("systemctl show --value -p MainPID plimsolld.service")?;
        Ok(pid.parse()?)
    }

    /// Fails when the kernel killed anything for memory, in the machine or in a unit, since boot.
    pub fn no_oom_kill(&self) -> Result<()> {
        let killed = self.guest.ok("awk '$1 == \"oom_kill\" {print $2}' /proc/vmstat")?;
        ensure!(killed == "0", "{killed} processes were killed for memory\n{}", self.guest.evidence());
        Ok(())
    }

    /// Puts everything back for the next scenario: no model is configured or runs, the daemon is
    /// there, the cache is cold.
    pub fn clean(&self) -> Result<()> {
        // The configuration goes first: a model that is owed a return must not come back when
        // stopping the others makes room for it.
        self.guest.ok_within(
            "systemctl unmask --runtime --quiet plimsolld.service 2>/dev/null; \
             systemctl disable --quiet llm@rival-a llm@rival-b llm@rival-c llm@impossible 2>/dev/null; \
             rm -rf /etc/plimsoll/models.d/* /etc/plimsoll/plimsoll.toml.d; \
             systemctl stop foreign.service 2>/dev/null; rm -f /etc/systemd/system/foreign.service; \
             systemctl daemon-reload; systemctl is-active --quiet plimsolld || systemctl restart plimsolld; \
             systemctl reload plimsolld",
            PATIENCE,
        )?;
        self.guest.wait_until(
            "all models are stopped",
            PATIENCE,
            "systemctl stop 'llm@*.service'; systemctl reset-failed; \
             test -z \"$(systemctl list-units --no-legend --plain 'llm@*.service')\"",
        )?;
        self.guest.ok_within(
            "rm -rf /run/systemd/system.control/llm@* /srv/models/private; chmod 0755 /srv/models/*/; \
             systemctl daemon-reload; sync; echo 3 > /proc/sys/vm/drop_caches",
            PATIENCE,
        )?;
        Ok(())
    }
}

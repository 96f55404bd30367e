//! QEMU: finding or fetching it, starting a machine, and making sure that it ends with us.

use super::image::{self, Image};
use crate::host;
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The guest's ports that reach 127.0.0.1 of this machine, beside ssh: models may listen on these.
pub const MODEL_PORTS: [u16; 3] = [8001, 8002, 8003];

/// How to start a machine.
#[derive(Debug, Clone, clap::Args)]
pub struct MachineOptions {
    /// Use the processor's virtualisation (default: emulation, which works everywhere)
    #[arg(long)]
    pub kvm: bool,
    /// Memory of the guest in MiB
    #[arg(long, default_value_t = 2048, value_name = "MIB")]
    pub memory: u32,
    /// Limit the disks to this many bytes a second, together
    #[arg(long, value_name = "BYTES")]
    pub disk_rate: Option<u64>,
    /// Further disks, blank, of so many bytes each
    #[arg(skip)]
    pub blank: Vec<u64>,
}

impl Default for MachineOptions {
    fn default() -> Self {
        MachineOptions { kvm: false, memory: 2048, disk_rate: None, blank: Vec::new() }
    }
}

/// A running virtual machine. Its disks are thrown away when it ends, and it ends with this value
/// or this process, whichever is first.
pub struct Machine {
    child: Child,
    /// Short-lived sockets; removed with the machine.
    pub runtime: PathBuf,
    blank: Vec<PathBuf>,
    /// The serial console's log, which stays.
    pub console: PathBuf,
    /// Port of 127.0.0.1 that reaches the guest's ssh.
    pub ssh_port: u16,
    /// Guest port and the port of 127.0.0.1 that reaches it.
    pub forwarded: Vec<(u16, u16)>,
    /// What it was started from.
    pub image: Image,
}

impl Machine {
    /// Starts a machine from `image` with the filesystem image `models` as its second disk.
    pub fn start(image: &Image, models: &Path, options: &MachineOptions) -> Result<Machine> {
        let logs = host::source_root().join("target/vm");
        fs::create_dir_all(&logs)?;
        let id = std::process::id();
        let console = logs.join(format!("console-{id}.log"));
        let runtime = std::env::temp_dir().join(format!("plimsoll-vm-{id}"));
        let _ = fs::remove_dir_all(&runtime);
        fs::create_dir(&runtime)?;

        // All listeners live until every port is drawn, so that no port is drawn twice.
        let listeners: Vec<TcpListener> =
            (0..=MODEL_PORTS.len()).map(|_| TcpListener::bind(("127.0.0.1", 0))).collect::<Result<_, _>>()?;
        let mut ports =
            listeners.iter().map(|l| l.local_addr().map(|a| a.port())).collect::<Result<Vec<u16>, _>>()?;
        drop(listeners);
        let ssh_port = ports.pop().context("no port")?;
        let forwarded: Vec<(u16, u16)> = MODEL_PORTS.into_iter().zip(ports).collect();

        let mut network = format!("user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{ssh_port}-:22");
        for (guest, here) in &forwarded {
            network.push_str(&format!(",hostfwd=tcp:127.0.0.1:{here}-:{guest}"));
        }
        // One group: as if all of them were on one disk.
        let throttle = options
            .disk_rate
            .map(|rate| format!(",throttling.bps-total={rate},throttling.group=disk"))
            .unwrap_or_default();
        let mut drives: Vec<String> = [image.root().as_path(), models]
            .map(|path| {
                format!("file={},format=raw,if=virtio,snapshot=on,cache=unsafe{throttle}", path.display())
            })
            .into();
        let mut blank = Vec::new();
        for (n, bytes) in options.blank.iter().enumerate() {
            let path = logs.join(format!("blank-{id}-{n}.img"));
            fs::File::create(&path)?.set_len(*bytes)?;
            drives.push(format!("file={},format=raw,if=virtio,cache=unsafe", path.display()));
            blank.push(path);
        }
        let qemu = qemu()?;
        // The kernel kills QEMU when we die, however we die.
        let mut command = Command::new(host::find("setpriv").context("setpriv is not installed")?);
        command.args(["--pdeathsig", "KILL", "--"]).args(&qemu);
        command.args(["-no-user-config", "-nodefaults", "-display", "none", "-monitor", "none"]);
        command.args(if options.kvm {
            ["-accel", "kvm", "-cpu", "host"]
        } else {
            ["-accel", "tcg,thread=multi", "-cpu", "max"]
        });
        command.args(["-machine", "q35", "-smp", "2", "-m", &options.memory.to_string()]);
        command.arg("-kernel").arg(image.kernel()).arg("-initrd").arg(image.initrd());
        command.args(["-append", "root=/dev/vda rw console=ttyS0 psi=1 panic=-1 loglevel=5 mitigations=off"]);
        command.args(drives.iter().flat_map(|drive| ["-drive", drive]));
        command.args(["-netdev", &network]);
        command.args(["-device", "virtio-net-pci,netdev=net,romfile=", "-device", "virtio-rng-pci"]);
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.arg("-qmp").arg(format!("unix:{}/qmp,server=on,wait=off", runtime.display()));
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(fs::File::create(runtime.join("qemu.log"))?);
        let child = command.spawn().with_context(|| format!("cannot start {}", host::describe(&command)))?;
        Ok(Machine { child, runtime, blank, console, ssh_port, forwarded, image: image.clone() })
    }

    /// The port of 127.0.0.1 that reaches the guest's `port`.
    pub fn forwarded_port(&self, port: u16) -> Result<u16> {
        let found = self.forwarded.iter().find(|(guest, _)| *guest == port);
        found.map(|(_, here)| *here).with_context(|| format!("port {port} of the guest is not forwarded"))
    }

    /// Fails with QEMU's own words when it has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let log = fs::read_to_string(self.runtime.join("qemu.log")).unwrap_or_default();
            bail!("the virtual machine ended ({status}): {log}");
        }
        Ok(())
    }

    /// Sends one command without arguments over QMP (`system_reset`, `system_powerdown`, `quit`).
    pub fn qmp(&self, command: &str) -> Result<()> {
        let stream = UnixStream::connect(self.runtime.join("qmp"))?;
        stream.set_read_timeout(Some(std::time::Duration::from_secs(10)))?;
        let mut replies = BufReader::new(stream.try_clone()?).lines();
        let mut next = || replies.next().context("QMP closed")?.context("QMP does not answer");
        next()?;
        for word in ["qmp_capabilities", command] {
            writeln!(&stream, "{{\"execute\":\"{word}\"}}")?;
            // Events may come in between.
            loop {
                let reply = next()?;
                if reply.contains("\"error\"") {
                    bail!("QMP {word}: {reply}");
                }
                if reply.contains("\"return\"") {
                    break;
                }
            }
        }
        Ok(())
    }

    /// The last lines of the serial console.
    pub fn console_tail(&self, lines: usize) -> String {
        let bytes = fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.runtime);
        for path in &self.blank {
            let _ = fs::remove_file(path);
        }
    }
}

/// The beginning of QEMU's command line: the one of this machine when there is one or apt can
/// install it without removing anything, else one unpacked into the cache.
fn qemu() -> Result<Vec<PathBuf>> {
    const COMMAND: &str = "qemu-system-x86_64";
    if let Some(path) = host::find(COMMAND) {
        return Ok(vec![path]);
    }
    if host::cache_directory()?.join("qemu").exists() {
        return unpacked_qemu();
    }
    match host::install(&["qemu-system-x86"]) {
        Ok(()) => Ok(vec![host::find(COMMAND).context("qemu-system-x86 brought no qemu-system-x86_64")?]),
        // Without apt there is no mirror either: say what to install.
        Err(error) if host::find("mmdebstrap").is_none() => Err(error),
        Err(_) => unpacked_qemu(),
    }
}

/// QEMU of the guest's release, unpacked beside the images and run with its own libraries: for
/// machines where it can't be installed because something installed conflicts with it.
fn unpacked_qemu() -> Result<Vec<PathBuf>> {
    let cache = host::cache_directory()?;
    let directory = cache.join("qemu");
    let lock = fs::File::create(cache.join("qemu.lock"))?;
    lock.lock()?;
    if !directory.exists() {
        println!(
            "installing QEMU conflicts with what is installed: unpacking one into {}",
            directory.display()
        );
        let partial = cache.join("qemu.partial");
        host::run(host::as_root("rm")?.arg("-rf").arg(&partial))?;
        let mut command = host::as_root("mmdebstrap")?;
        command.args(["--quiet", "--mode=root", "--variant=extract", "--include=qemu-system-x86"]);
        command.arg("--aptopt=APT::Install-Recommends \"false\"");
        if image::host_ignores_valid_until() {
            command.arg("--aptopt=Acquire::Check-Valid-Until \"false\"");
        }
        command.arg("forky").arg(&partial).arg(image::host_mirror());
        host::output(&mut command)?;
        host::run(host::as_root("mv")?.arg(&partial).arg(&directory))?;
    }
    let usr = directory.join("usr");
    Ok(vec![
        usr.join("lib64/ld-linux-x86-64.so.2"),
        "--library-path".into(),
        usr.join("lib/x86_64-linux-gnu"),
        usr.join("bin/qemu-system-x86_64"),
        "-L".into(),
        usr.join("share/qemu"),
        "-L".into(),
        usr.join("share/seabios"),
    ])
}

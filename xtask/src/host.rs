//! The machine that this tool runs on: finding commands, installing what is missing, running things.

use anyhow::{Context, Result, bail};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A command of the host and the Debian or Ubuntu package that brings it.
pub struct Tool {
    /// The name looked for in `PATH`.
    pub command: &'static str,
    /// The package to install when it is missing.
    pub package: &'static str,
}

/// What building an image and booting it takes, apart from QEMU itself (see [`crate::vm::qemu`]).
pub const IMAGE_TOOLS: &[Tool] = &[
    Tool { command: "mmdebstrap", package: "mmdebstrap" },
    Tool { command: "mke2fs", package: "e2fsprogs" },
    Tool { command: "ssh", package: "openssh-client" },
    Tool { command: "ssh-keygen", package: "openssh-client" },
    Tool { command: "setpriv", package: "util-linux" },
];

/// The keyring that signs Debian; Ubuntu hosts lack it.
const KEYRING: (&str, &str) = ("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring");

/// The absolute path of `command`, looked for in `PATH` and in the system directories that an
/// ordinary user's `PATH` often lacks.
pub fn find(command: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(command))
        .find(|candidate| candidate.is_file())
}

/// True when this process is root.
pub fn is_root() -> bool {
    // The owner of our own /proc entry is our effective user.
    std::fs::metadata("/proc/self").is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0)
}

/// `program`, found on this machine, run as root: directly, or through sudo.
pub fn as_root(program: &str) -> Result<Command> {
    let path = find(program).with_context(|| format!("{program} is not installed"))?;
    if is_root() {
        return Ok(Command::new(path));
    }
    let sudo =
        find("sudo").with_context(|| format!("{program} needs root: run this as root, or install sudo"))?;
    let mut command = Command::new(sudo);
    command.arg("--").arg(path);
    Ok(command)
}

/// Runs a command to its end and fails unless it exits with 0.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {}", describe(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", describe(command));
    }
    Ok(())
}

/// Like [`run`], but silent unless it fails; returns its standard output.
pub fn output(command: &mut Command) -> Result<String> {
    let done = command.output().with_context(|| format!("cannot run {}", describe(command)))?;
    if !done.status.success() {
        bail!(
            "{} failed: {}\n{}{}",
            describe(command),
            done.status,
            String::from_utf8_lossy(&done.stdout),
            String::from_utf8_lossy(&done.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

/// A command line for people.
pub fn describe(command: &Command) -> String {
    let words: Vec<String> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word: &OsStr| word.to_string_lossy().into_owned())
        .collect();
    words.join(" ")
}

/// Makes sure that the image tools are there; installs what is missing on Debian and Ubuntu and
/// says so, names what is missing elsewhere.
pub fn ensure_image_tools() -> Result<()> {
    let mut packages: Vec<&str> =
        IMAGE_TOOLS.iter().filter(|tool| find(tool.command).is_none()).map(|tool| tool.package).collect();
    if !Path::new(KEYRING.0).exists() {
        packages.push(KEYRING.1);
    }
    packages.dedup();
    install(&packages)
}

/// Installs Debian packages without removing any other, saying what it does.
///
/// # Errors
/// Not a Debian or Ubuntu machine, or apt could not do it: the message names the packages.
pub fn install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    let names = packages.join(" ");
    if find("apt-get").is_none() {
        bail!("missing on this machine, please install them with its package manager: {names}");
    }
    println!("installing from the distribution: {names}");
    let apt = |arguments: &[&str]| -> Result<String> {
        let mut command = as_root("env")?;
        command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y", "--no-remove"]);
        command.args(["--no-install-recommends", "install"]).args(arguments);
        output(&mut command)
    };
    if apt(packages).is_ok() {
        return Ok(());
    }
    // The package lists may be missing (a container) or old.
    output(as_root("apt-get")?.args(["-q", "update"]))?;
    apt(packages).map(|_| ()).with_context(|| format!("apt could not install {names}"))
}

/// The directory for what survives a fresh clone: `$XDG_CACHE_HOME/plimsoll` or `~/.cache/plimsoll`.
pub fn cache_directory() -> Result<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .context("neither XDG_CACHE_HOME nor HOME is set")?;
    let directory = base.join("plimsoll");
    std::fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    Ok(directory)
}

/// Removes what older recipes left in the cache a week ago or earlier: everything with the prefix
/// but `keep`.
pub fn prune(cache: &Path, prefix: &str, keep: &Path) -> Result<()> {
    const WEEK: std::time::Duration = std::time::Duration::from_secs(7 * 24 * 3600);
    for entry in std::fs::read_dir(cache)? {
        let path = entry?.path();
        let age = std::fs::metadata(&path)?.modified()?.elapsed().unwrap_or_default();
        let named = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix));
        if !named || path == keep || age < WEEK {
            continue;
        }
        if path.is_dir() {
            std::fs::remove_dir_all(&path)?;
        } else {
            std::fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// The top of the source tree.
pub fn source_root() -> PathBuf {
    // Cargo sets the variable for `cargo xtask`; the compiled-in value serves a binary run by hand,
    // and one that was taken to another machine is run from the top of the tree there.
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from).or_else(|| {
        let compiled = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        compiled.is_dir().then_some(compiled)
    });
    let top = manifest.and_then(|manifest| manifest.parent().map(Path::to_path_buf));
    top.or_else(|| std::env::current_dir().ok()).unwrap_or_else(|| ".".into())
}

/// A stable hash of text (FNV-1a, 64 bits), for names of cache entries: not for security.
pub fn fingerprint(text: &str) -> String {
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

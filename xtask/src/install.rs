//! `cargo xtask install`: the files of an installation, and where each belongs.

use crate::host;
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

/// One file of the source tree and its place below the prefix.
struct Entry {
    source: &'static str,
    target: &'static str,
}

const fn entry(source: &'static str, target: &'static str) -> Entry {
    Entry { source, target }
}

/// Everything that systemd, the bus and polkit read. Paths in them are written for `/usr` and
/// rewritten for another prefix.
const SYSTEM_FILES: &[Entry] = &[
    entry("systemd/plimsolld.service", "lib/systemd/system/plimsolld.service"),
    entry("systemd/llm@.service", "lib/systemd/system/llm@.service"),
    entry("systemd/plimsoll-swap@.service", "lib/systemd/system/plimsoll-swap@.service"),
    entry("systemd/llm.slice", "lib/systemd/system/llm.slice"),
    entry("systemd/plimsoll.slice", "lib/systemd/system/plimsoll.slice"),
    entry("systemd/protect-system.conf", "lib/systemd/system/system.slice.d/50-plimsoll.conf"),
    entry("systemd/protect-system.conf", "lib/systemd/system/user.slice.d/50-plimsoll.conf"),
    entry("systemd/protect-init.conf", "lib/systemd/system/init.scope.d/50-plimsoll.conf"),
    // By either name that distributions give it.
    entry("systemd/protect-sshd.conf", "lib/systemd/system/ssh.service.d/50-plimsoll.conf"),
    entry("systemd/protect-sshd.conf", "lib/systemd/system/sshd.service.d/50-plimsoll.conf"),
    entry("systemd/plimsoll.sysusers.conf", "lib/sysusers.d/plimsoll.conf"),
    entry("systemd/plimsoll.tmpfiles.conf", "lib/tmpfiles.d/plimsoll.conf"),
    entry("systemd/org.plimsoll1.service", "share/dbus-1/system-services/org.plimsoll1.service"),
    entry("systemd/org.plimsoll1.conf", "share/dbus-1/system.d/org.plimsoll1.conf"),
    entry("systemd/org.plimsoll1.xml", "share/dbus-1/interfaces/org.plimsoll1.xml"),
    entry("systemd/org.plimsoll1.Model.xml", "share/dbus-1/interfaces/org.plimsoll1.Model.xml"),
    entry("systemd/org.plimsoll1.Lease.xml", "share/dbus-1/interfaces/org.plimsoll1.Lease.xml"),
    entry("systemd/org.plimsoll1.Job.xml", "share/dbus-1/interfaces/org.plimsoll1.Job.xml"),
    entry("systemd/plimsoll.catalog", "lib/systemd/catalog/plimsoll.catalog"),
    entry("systemd/org.plimsoll1.policy", "share/polkit-1/actions/org.plimsoll1.policy"),
    entry("systemd/plimsoll.rules", "share/polkit-1/rules.d/plimsoll.rules"),
];

/// What people read, taken when it is there.
const DOCUMENTS: &[Entry] = &[
    entry("README.md", "share/doc/plimsoll/README.md"),
    entry("ARCHITECTURE.md", "share/doc/plimsoll/ARCHITECTURE.md"),
    entry("CONTRIBUTING.md", "share/doc/plimsoll/CONTRIBUTING.md"),
    entry("docs/benchmarks.md", "share/doc/plimsoll/docs/benchmarks.md"),
    entry("docs/roadmap-tables.md", "share/doc/plimsoll/docs/roadmap-tables.md"),
    entry("CHANGELOG.md", "share/doc/plimsoll/CHANGELOG.md"),
    entry("LICENSE-MIT", "share/doc/plimsoll/LICENSE-MIT"),
    entry("LICENSE-APACHE", "share/doc/plimsoll/LICENSE-APACHE"),
    entry("packaging/deb/copyright", "share/doc/plimsoll/copyright"),
    entry("systemd/plimsolld-reload-252.conf", "share/doc/plimsoll/examples/plimsolld-reload-252.conf"),
];

/// Directories of generated files (`cargo xtask man`), taken as they are when they are there.
const GENERATED: &[Entry] = &[
    entry("target/generated/man1", "share/man/man1"),
    entry("target/generated/bash", "share/bash-completion/completions"),
    entry("target/generated/zsh", "share/zsh/vendor-completions"),
    entry("target/generated/fish", "share/fish/vendor_completions.d"),
    entry("config", "share/doc/plimsoll/examples"),
];

/// What to install and where to put it.
#[derive(Debug, Clone, clap::Args)]
pub struct InstallOptions {
    /// Put everything below this directory and leave the running system alone (for packagers)
    #[arg(long, value_name = "DIR")]
    pub destdir: Option<PathBuf>,
    /// Where programs and units go. What the programs write by themselves (units of models in containers, links of models
    /// whose disk comes late) is for /usr
    #[arg(long, default_value = "/usr", value_name = "DIR")]
    pub prefix: PathBuf,
    /// Take plimsoll and plimsolld from this directory instead of building them: built as yourself,
    /// on another machine, or by a packager's own rules
    #[arg(long, value_name = "DIR")]
    pub programs: Option<PathBuf>,
}

/// The directory that holds the two programs: one that was given, or where they are built now.
pub fn programs(given: Option<&Path>, profile: &str) -> Result<PathBuf> {
    let Some(directory) = given else { return build(profile) };
    for name in ["plimsoll", "plimsolld"] {
        if !directory.join(name).is_file() {
            bail!("there is no {name} in {}: build it with 'cargo build --release'", directory.display());
        }
    }
    crate::man::generate()?;
    Ok(directory.to_owned())
}

/// Builds the two programs; returns the directory that holds them.
///
/// A release's daemon is linked statically with musl where Rust's target for that is installed. All that the daemon
/// touches is locked in memory, and of the C library nothing else is left then. The command looks up users and hosts as
/// the machine is set up to do it (nsswitch.conf), which only the machine's own C library can.
pub fn build(profile: &str) -> Result<PathBuf> {
    crate::man::generate()?;
    let directory = cargo_build("plimsoll", &["--bins"], profile, None)?;
    if profile != "release" {
        return Ok(directory);
    }
    let Some(target) = static_target()? else { return Ok(directory) };
    println!("linking plimsolld statically, for {target}");
    let linked = cargo_build("plimsoll", &["--bin=plimsolld"], profile, Some(&target))?;
    let both = directory.join("programs");
    for (from, name) in [(&directory, "plimsoll"), (&linked, "plimsolld")] {
        put(&from.join(name), &both.join(name), 0o755)?;
    }
    Ok(both)
}

/// This machine's target with musl, where the standard library for it is installed.
fn static_target() -> Result<Option<String>> {
    let rustc = || {
        let mut command = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
        command.current_dir(host::source_root());
        command
    };
    let version = host::output(rustc().arg("-vV"))?;
    let here = version.lines().find_map(|line| line.strip_prefix("host: ")?.strip_suffix("-gnu"));
    let Some(target) = here.map(|here| format!("{here}-musl")) else { return Ok(None) };
    // A target that rustc does not know is none that is installed.
    let libraries = host::output(rustc().args(["--print=target-libdir", "--target", &target]));
    let is_installed = libraries.is_ok_and(|path| Path::new(path.trim()).is_dir());
    if !is_installed {
        println!(
            "plimsolld is linked with this machine's C library, about 2 MB of which it keeps in memory;"
        );
        println!("'rustup target add {target}' avoids that");
    }
    Ok(is_installed.then_some(target))
}

/// The program that strains memory, for the virtual machine.
pub fn build_strain(profile: &str) -> Result<PathBuf> {
    Ok(cargo_build("xtask", &["--bin=strain"], profile, None)?.join("strain"))
}

/// Where the programs are that were built, for this machine's own target if for no other.
fn cargo_build(package: &str, what: &[&str], profile: &str, target: Option<&str>) -> Result<PathBuf> {
    let root = host::source_root();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(&root).args(["build", "--quiet", "--locked", "--package", package]).args(what);
    let mut directory =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    if let Some(target) = target {
        // Libraries of the command have parts in C, which the linker leaves out: any compiler will do.
        let compiler = format!("CC_{}", target.replace('-', "_"));
        if std::env::var_os(&compiler).is_none() {
            command.env(compiler, "cc");
        }
        command.args(["--target", target]);
        directory.push(target);
    }
    host::run(command.args(["--profile", profile]))?;
    Ok(directory.join(if profile == "dev" { "debug" } else { profile }))
}

/// `cargo xtask install`.
pub fn install(options: &InstallOptions) -> Result<()> {
    if !options.prefix.is_absolute() {
        bail!("--prefix {} is not an absolute path", options.prefix.display());
    }
    let programs = programs(options.programs.as_deref(), "release")?;
    if let Some(destdir) = &options.destdir {
        stage(&programs, destdir, &options.prefix)?;
        println!("installed below {}", destdir.display());
        return Ok(());
    }
    let tree = host::source_root().join("target/install");
    let _ = fs::remove_dir_all(&tree);
    stage(&programs, &tree, &options.prefix)?;
    copy_as_root(&tree)?;
    activate(&options.prefix)
}

/// Lays out an installation below `destdir`.
pub fn stage(programs: &Path, destdir: &Path, prefix: &Path) -> Result<()> {
    let root = host::source_root();
    let relative = prefix.strip_prefix("/").unwrap_or(prefix);
    let usr = destdir.join(relative);
    put(&programs.join("plimsoll"), &usr.join("bin/plimsoll"), 0o755)?;
    put(&programs.join("plimsolld"), &usr.join("lib/plimsoll/plimsolld"), 0o755)?;
    // One program, called by another name.
    let generators = usr.join("lib/systemd/system-generators");
    make_directory(&generators)?;
    let link = generators.join("plimsoll-generator");
    let _ = fs::remove_file(&link);
    symlink("../../../bin/plimsoll", &link)?;

    for Entry { source, target } in SYSTEM_FILES {
        let text = fs::read_to_string(root.join(source)).with_context(|| format!("cannot read {source}"))?;
        let target = usr.join(target);
        make_directory(target.parent().context("no parent")?)?;
        fs::write(&target, relocate(&text, prefix))?;
        fs::set_permissions(&target, fs::Permissions::from_mode(0o644))?;
    }
    for Entry { source, target } in DOCUMENTS {
        let source = root.join(source);
        if source.exists() {
            put(&source, &usr.join(target), 0o644)?;
        }
    }
    for Entry { source, target } in GENERATED {
        let source = root.join(source);
        if source.is_dir() {
            put_tree(&source, &usr.join(target))?;
        }
    }
    make_directory(&destdir.join("etc/plimsoll/models.d"))
}

/// The programs' paths for another prefix.
fn relocate(text: &str, prefix: &Path) -> String {
    let prefix = prefix.display().to_string();
    ["bin/plimsoll", "lib/plimsoll/", "share/doc/plimsoll/"].iter().fold(text.to_owned(), |text, path| {
        text.replace(&format!("/usr/{path}"), &format!("{prefix}/{path}"))
    })
}

fn make_directory(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("cannot create {}", path.display()))?;
    // Whatever the umask of whoever builds.
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

fn put(source: &Path, target: &Path, mode: u32) -> Result<()> {
    make_directory(target.parent().context("no parent")?)?;
    let _ = fs::remove_file(target);
    fs::copy(source, target).with_context(|| format!("cannot copy {}", source.display()))?;
    Ok(fs::set_permissions(target, fs::Permissions::from_mode(mode))?)
}

fn put_tree(source: &Path, target: &Path) -> Result<()> {
    for item in fs::read_dir(source)? {
        let item = item?;
        let (from, to) = (item.path(), target.join(item.file_name()));
        if item.file_type()?.is_dir() {
            put_tree(&from, &to)?;
        } else {
            put(&from, &to, 0o644)?;
        }
    }
    Ok(())
}

/// Every file, directory and link below `directory`, parents first.
pub fn walk(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut items: Vec<PathBuf> =
        fs::read_dir(directory)?.map(|item| item.map(|i| i.path())).collect::<Result<_, _>>()?;
    items.sort();
    for item in items {
        let is_directory = fs::symlink_metadata(&item)?.is_dir();
        found.push(item.clone());
        if is_directory {
            found.extend(walk(&item)?);
        }
    }
    Ok(found)
}

/// Copies the staged tree over `/`, file by file: directories that exist keep their attributes.
fn copy_as_root(tree: &Path) -> Result<()> {
    for path in walk(tree)? {
        let target = Path::new("/").join(path.strip_prefix(tree)?);
        let meta = fs::symlink_metadata(&path)?;
        if meta.is_symlink() {
            host::run(host::as_root("ln")?.arg("-sfn").arg(fs::read_link(&path)?).arg(&target))?;
        } else if meta.is_dir() {
            if !target.is_dir() {
                host::run(host::as_root("install")?.args(["-d", "-m", "0755"]).arg(&target))?;
            }
        } else {
            let mode = format!("{:o}", meta.permissions().mode() & 0o7777);
            host::run(host::as_root("install")?.args(["-m", &mode]).arg(&path).arg(&target))?;
        }
        if host::find("restorecon").is_some() {
            host::run(host::as_root("restorecon")?.arg(&target))?;
        }
    }
    Ok(())
}

/// Makes the running system know the new files. Stops and starts nothing but plimsolld, and that
/// only where it runs already.
fn activate(prefix: &Path) -> Result<()> {
    let conf = |kind: &str| prefix.join(format!("lib/{kind}.d/plimsoll.conf"));
    host::run(host::as_root("systemd-sysusers")?.arg(conf("sysusers")))?;
    host::run(host::as_root("systemd-tmpfiles")?.arg("--create").arg(conf("tmpfiles")))?;
    if host::find("journalctl").is_some() {
        host::run(host::as_root("journalctl")?.arg("--update-catalog"))?;
    }
    if !Path::new("/run/systemd/system").exists() {
        println!("installed; systemd is not the init of this machine, so nothing was reloaded");
        return Ok(());
    }
    host::run(host::as_root("systemctl")?.arg("daemon-reload"))?;
    let bus = ["org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "ReloadConfig"];
    host::run(host::as_root("busctl")?.args(["--quiet", "call"]).args(bus))?;
    host::run(host::as_root("systemctl")?.args(["try-restart", "plimsolld.service"]))?;
    println!("installed; now: systemctl enable --now plimsolld.service");
    Ok(())
}

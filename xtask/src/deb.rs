//! `cargo xtask deb`: the Debian package.

use crate::{host, install};
use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Builds the package from a build profile; `suffix` is added to the version (`+1` makes it newer).
pub fn build(profile: &str, suffix: &str) -> Result<PathBuf> {
    pack(&install::build(profile)?, suffix)
}

/// Builds the package from the programs in a directory.
pub fn pack(programs: &Path, suffix: &str) -> Result<PathBuf> {
    if host::find("dpkg-deb").is_none() {
        host::install(&["dpkg"])?;
    }
    let root = host::source_root();
    let tree = root.join("target/deb/tree");
    let _ = fs::remove_dir_all(&tree);
    install::stage(programs, &tree, Path::new("/usr"))?;

    let version = format!("{}{suffix}", env!("CARGO_PKG_VERSION"));
    let architecture = host::output(Command::new("dpkg").arg("--print-architecture"))?.trim().to_owned();
    let paths = install::walk(&tree)?;
    let bytes: u64 =
        paths.iter().filter_map(|path| fs::symlink_metadata(path).ok()).map(|meta| meta.len()).sum();
    let control = fs::read_to_string(root.join("packaging/deb/control.in"))?
        .replace("@VERSION@", &version)
        .replace("@ARCHITECTURE@", &architecture)
        .replace("@GLIBC@", &glibc_needed(&paths)?)
        .replace("@SIZE@", &bytes.div_ceil(1024).to_string());
    let debian = tree.join("DEBIAN");
    fs::create_dir(&debian)?;
    fs::set_permissions(&debian, fs::Permissions::from_mode(0o755))?;
    fs::write(debian.join("control"), control)?;
    for script in ["postinst", "prerm", "postrm"] {
        let target = debian.join(script);
        fs::copy(root.join("packaging/deb").join(script), &target)?;
        fs::set_permissions(&target, fs::Permissions::from_mode(0o755))?;
    }
    let package = root.join(format!("target/deb/plimsoll_{version}_{architecture}.deb"));
    let mut command = Command::new("dpkg-deb");
    command.args(["--build", "--root-owner-group", "-Zxz"]).arg(&tree).arg(&package);
    host::output(&mut command)?;
    Ok(package)
}

/// The newest glibc symbol version that the programs ask for: what the package has to depend on.
fn glibc_needed(paths: &[PathBuf]) -> Result<String> {
    let mut newest = (2, 28);
    for path in
        paths.iter().filter(|path| path.ends_with("bin/plimsoll") || path.ends_with("plimsoll/plimsolld"))
    {
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        // Version names stand as plain strings in the dynamic string table.
        for word in bytes.split(|byte| *byte == 0).filter_map(|word| word.strip_prefix(b"GLIBC_2.")) {
            let minor = std::str::from_utf8(word).ok().and_then(|text| text.split('.').next()?.parse().ok());
            newest = newest.max((2, minor.unwrap_or(0)));
        }
    }
    Ok(format!("{}.{}", newest.0, newest.1))
}

//! `plimsoll-generator`: a systemd.generator(7), by the name that this program is called by.
//!
//! Writes for every model a drop-in with the mounts that its files lie on, so that a start at boot
//! waits for them; for one whose engine is a container image another with what podman needs; and for
//! every mount the enabled models on it, so that one which is mounted only later starts them. It runs
//! before anything is mounted, logged or reachable over the bus; nothing that it finds wrong may keep
//! the machine from booting.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::libc;

use super::failure::{Exit, Failure};
use super::output;
use crate::config::{self, Instance};
use crate::engine::{self, container};

/// Where links of enabled units are looked for, below the root.
const UNITS: [&str; 3] = ["etc/systemd/system", "run/systemd/system", "usr/lib/systemd/system"];
/// The names of the drop-ins.
const MOUNTS: &str = "50-plimsoll-mounts.conf";
const CONTAINER: &str = "50-plimsoll-container.conf";

/// Whether the program was called as the generator.
pub fn is_meant(name: Option<&OsString>) -> bool {
    let name = name.and_then(|name| Path::new(name).file_name());
    name.is_some_and(|name| name.to_string_lossy().ends_with("plimsoll-generator"))
}

/// What systemd runs: with the directories for units of normal, early and late precedence.
pub fn main(directories: &[OsString]) -> Result<Exit, Failure> {
    let Some(normal) = directories.first() else {
        return Err(Failure::usage("a generator is called by systemd, with three directories"));
    };
    generate(Path::new("/"), Path::new(normal))?;
    Ok(Exit::Done)
}

/// Writes the drop-ins for all instances of the models configured below `root`.
fn generate(root: &Path, directory: &Path) -> Result<(), Failure> {
    let loaded = config::load(root);
    let daemon = loaded.settings.clone().unwrap_or_default();
    let enabled = enabled(root);
    let mounts = Mounts::read(root);
    let first = loaded.models.keys().cloned().map(Instance::first);
    for instance in first.chain(enabled.iter().cloned()).collect::<BTreeSet<Instance>>() {
        let Some(model) = loaded.models.get(&instance.model) else { continue };
        let needed = engine::directories(model, &daemon);
        let unit = directory.join(format!("{}.d", instance.unit()));
        let mut written = Ok(());
        if engine::image(model, &daemon).is_some() {
            written = write(&unit.join(CONTAINER), &container::drop_in(&instance));
        }
        if let Some(text) = engine::drop_in(&needed) {
            written = written.and(write(&unit.join(MOUNTS), &text));
        }
        if enabled.contains(&instance) {
            let over = needed.iter().filter_map(|needed| mounts.over(needed)).collect::<BTreeSet<_>>();
            written =
                over.iter().fold(written, |so_far, mount| so_far.and(want(directory, mount, &instance)));
        }
        if let Err(error) = written {
            // The others still get theirs.
            output::eprint(&format!("plimsoll-generator: {}: {error}", instance.unit()));
        }
    }
    Ok(())
}

/// Has the mount unit start the instance: one whose mount failed at boot has failed with it, and
/// systemd would not try it again when the file system is mounted after all.
fn want(directory: &Path, mount: &str, instance: &Instance) -> std::io::Result<()> {
    let wants = directory.join(format!("{mount}.wants"));
    fs::create_dir_all(&wants)?;
    match symlink("/usr/lib/systemd/system/llm@.service", wants.join(instance.unit())) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// The mount units that systemd has or will have by the end of the generators.
struct Mounts {
    /// From /etc/fstab.
    points: BTreeSet<PathBuf>,
    /// Unit files.
    units: BTreeSet<OsString>,
}

impl Mounts {
    fn read(root: &Path) -> Mounts {
        let fstab = fs::read_to_string(root.join("etc/fstab")).unwrap_or_default();
        let points = fstab.lines().filter(|line| !line.trim_start().starts_with('#'));
        let points = points.filter_map(|line| line.split_whitespace().nth(1)).map(unescaped).collect();
        let units = UNITS.iter().flat_map(|units| entries(&root.join(units))).collect();
        Mounts { points, units }
    }

    /// The unit of the mount that `directory` lies on; none for the root file system, and for what
    /// nobody describes.
    fn over(&self, directory: &Path) -> Option<String> {
        directory.ancestors().filter(|point| point.parent().is_some()).find_map(|point| {
            let unit = mount_unit(point)?;
            let known = self.points.contains(point) || self.units.contains(OsStr::new(&unit));
            known.then_some(unit)
        })
    }
}

/// A mount point as fstab(5) has it, with `\040` for a space.
fn unescaped(field: &str) -> PathBuf {
    let named = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    PathBuf::from(
        named.iter().fold(field.to_owned(), |text, (code, character)| text.replace(code, character)),
    )
}

/// The name of a path's mount unit, by the rules of systemd.unit(5), "string escaping".
fn mount_unit(path: &Path) -> Option<String> {
    let mut name = String::new();
    for (position, byte) in path.to_str()?.trim_matches('/').bytes().enumerate() {
        match byte {
            b'/' => name.push('-'),
            b'.' if position == 0 => name.push_str("\\x2e"),
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b':' | b'_' | b'.' => name.push(char::from(byte)),
            other => name.push_str(&format!("\\x{other:02x}")),
        }
    }
    Some(name + ".mount")
}

fn write(file: &Path, text: &str) -> std::io::Result<()> {
    if let Some(directory) = file.parent() {
        fs::create_dir_all(directory)?;
    }
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o644)
        .custom_flags(libc::O_NOFOLLOW)
        .open(file)?;
    file.write_all(text.as_bytes())
}

/// The instances that are enabled.
fn enabled(root: &Path) -> BTreeSet<Instance> {
    let mut instances = BTreeSet::new();
    for units in UNITS {
        for entry in entries(&root.join(units)) {
            let directory = entry.to_string_lossy();
            if !(directory.ends_with(".wants")
                || directory.ends_with(".requires")
                || directory.ends_with(".upholds"))
            {
                continue;
            }
            let links = entries(&root.join(units).join(&entry));
            instances.extend(links.iter().filter_map(|link| Instance::from_unit(link.to_str()?)));
        }
    }
    instances
}

fn entries(directory: &Path) -> Vec<OsString> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.filter_map(|entry| Some(OsStr::to_owned(&entry.ok()?.file_name()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_says_what_is_meant() {
        let meant = |name: &str| is_meant(Some(&OsString::from(name)));
        assert!(meant("/usr/lib/systemd/system-generators/plimsoll-generator"));
        assert!(!meant("/usr/bin/plimsoll"));
        assert!(!is_meant(None));
    }

    #[test]
    fn the_nearest_mount_is_found_and_named_as_systemd_does() {
        let points = ["/srv", "/srv/ai-models", "/"].map(PathBuf::from).into();
        let mounts = Mounts { points, units: ["mnt-.mount", "opt.mount"].map(OsString::from).into() };
        for (directory, unit) in [
            ("/srv/ai-models/deep", Some(r"srv-ai\x2dmodels.mount")),
            ("/srv/other", Some("srv.mount")),
            ("/opt/models", Some("opt.mount")),
            ("/home/models", None),
        ] {
            assert_eq!(mounts.over(Path::new(directory)).as_deref(), unit, "{directory}");
        }
        assert_eq!(mount_unit(Path::new("/.models")).unwrap(), r"\x2emodels.mount");
    }

    #[test]
    fn every_instance_gets_its_mounts() {
        let root = std::env::temp_dir().join(format!("plimsoll-generator-{}", std::process::id()));
        let models = root.join("etc/plimsoll/models.d");
        fs::create_dir_all(&models).unwrap();
        fs::write(models.join("big.toml"), "model = \"/mnt/ai models/big.gguf\"\n").unwrap();
        fs::write(models.join("broken.toml"), "no = \"such key\"\n").unwrap();
        fs::write(root.join("etc/plimsoll/plimsoll.toml"), "[engine.rocm]\nimage = \"x\"\n").unwrap();
        fs::write(models.join("boxed.toml"), "model = \"/srv/boxed.gguf\"\nengine = \"rocm\"\n").unwrap();
        let wants = root.join("etc/systemd/system/multi-user.target.wants");
        fs::create_dir_all(&wants).unwrap();
        for unit in ["llm@big@2.service", "llm@unknown.service", "ssh.service"] {
            std::os::unix::fs::symlink("/nowhere", wants.join(unit)).unwrap();
        }
        fs::write(
            root.join("etc/fstab"),
            "# no\nLABEL=x /mnt/ai\\040models ext4 nofail 0 0\n/dev/a / ext4\n",
        )
        .unwrap();
        let out = root.join("out");
        generate(&root, &out).unwrap();
        let mut made = entries(&out);
        made.sort();
        let mount = r"mnt-ai\x20models.mount.wants";
        assert_eq!(made, ["llm@big.service.d", "llm@big@2.service.d", "llm@boxed.service.d", mount]);
        // Only where the engine is an image.
        assert_eq!(entries(&out.join("llm@big.service.d")), [MOUNTS]);
        let text = fs::read_to_string(out.join("llm@boxed.service.d").join(CONTAINER)).unwrap();
        assert!(text.contains("\nExecStart=!/usr/bin/plimsoll run --container %i\n"), "{text}");
        // Only what is enabled.
        assert_eq!(entries(&out.join(mount)), ["llm@big@2.service"]);
        let text = fs::read_to_string(out.join("llm@big@2.service.d").join(MOUNTS)).unwrap();
        assert!(text.contains("[Unit]\nRequiresMountsFor=\"/mnt/ai models\"\n"), "{text}");
        // A second run, as after daemon-reload, says the same.
        generate(&root, &out).unwrap();
        fs::remove_dir_all(&root).unwrap();
    }
}

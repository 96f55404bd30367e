//! `plimsoll-generator`: a systemd.generator(7), by the name that this program is called by.
//!
//! Writes for every model a drop-in with the mounts that its files lie on, so that a start at boot
//! waits for them. It runs before anything is mounted, logged or reachable over the bus; nothing
//! that it finds wrong may keep the machine from booting.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::libc;

use super::failure::{Exit, Failure};
use super::output;
use crate::config::{self, Instance, Loaded};
use crate::engine;

/// Where links of enabled units are looked for, below the root.
const UNITS: [&str; 3] = ["etc/systemd/system", "run/systemd/system", "usr/lib/systemd/system"];
/// The name of the drop-in.
const DROP_IN: &str = "50-plimsoll-mounts.conf";

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
    for instance in instances(root, &loaded) {
        let Some(model) = loaded.models.get(&instance.model) else { continue };
        let Some(text) = engine::drop_in(&engine::directories(model, &daemon)) else { continue };
        let unit = directory.join(format!("{}.d", instance.unit()));
        if let Err(error) = write(&unit, &text) {
            // The others still get theirs.
            output::eprint(&format!("plimsoll-generator: {}: {error}", unit.display()));
        }
    }
    Ok(())
}

fn write(directory: &Path, text: &str) -> std::io::Result<()> {
    fs::create_dir_all(directory)?;
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o644)
        .custom_flags(libc::O_NOFOLLOW)
        .open(directory.join(DROP_IN))?;
    file.write_all(text.as_bytes())
}

/// The first instance of every model, and the further ones that are enabled.
fn instances(root: &Path, loaded: &Loaded) -> BTreeSet<Instance> {
    let mut instances: BTreeSet<Instance> = loaded.models.keys().cloned().map(Instance::first).collect();
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
    fn every_instance_gets_its_mounts() {
        let root = std::env::temp_dir().join(format!("plimsoll-generator-{}", std::process::id()));
        let models = root.join("etc/plimsoll/models.d");
        fs::create_dir_all(&models).unwrap();
        fs::write(models.join("big.toml"), "model = \"/mnt/ai models/big.gguf\"\n").unwrap();
        fs::write(models.join("broken.toml"), "no = \"such key\"\n").unwrap();
        let wants = root.join("etc/systemd/system/multi-user.target.wants");
        fs::create_dir_all(&wants).unwrap();
        for unit in ["llm@big@2.service", "llm@unknown.service", "ssh.service"] {
            std::os::unix::fs::symlink("/nowhere", wants.join(unit)).unwrap();
        }
        let out = root.join("out");
        generate(&root, &out).unwrap();
        let mut made = entries(&out);
        made.sort();
        assert_eq!(made, ["llm@big.service.d", "llm@big@2.service.d"]);
        let text = fs::read_to_string(out.join("llm@big@2.service.d").join(DROP_IN)).unwrap();
        assert!(text.contains("[Unit]\nRequiresMountsFor=\"/mnt/ai models\"\n"), "{text}");
        // A second run, as after daemon-reload, says the same.
        generate(&root, &out).unwrap();
        fs::remove_dir_all(&root).unwrap();
    }
}

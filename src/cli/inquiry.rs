//! What an engine says of itself: its version, and the devices that it can offload to.
//!
//! Only the engine knows which backends it was built with, so it is asked rather than assumed, as
//! the unit's own user. It may take seconds to initialise a GPU; its answer is kept for as long
//! as the program, its environment, the device nodes and the boot are the same.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::libc;
use serde::{Deserialize, Serialize};

/// The questions, by the key under which the answer goes to the daemon.
const QUESTIONS: [(&str, &str); 2] = [("version", "--version"), ("devices", "--list-devices")];
/// How long an engine may take for an answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// How much of an answer is read; a list of devices among log lines is a few KiB.
const LONGEST: u64 = 64 << 10;
/// The file in the unit's cache directory.
const FILE: &str = "engine.json";

/// What the answers depend on.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Key {
    program: PathBuf,
    identity: (u64, u64, u64, i64, i64),
    environment: BTreeMap<String, String>,
    devices: Vec<String>,
    boot: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    key: Key,
    answers: BTreeMap<String, String>,
}

/// Asks `program`, run with `environment` on top of this process's own. `cache` is a directory to
/// remember in. An engine that does not answer leaves its key out.
pub fn ask(
    program: &Path,
    environment: &BTreeMap<String, String>,
    cache: Option<&Path>,
) -> BTreeMap<String, String> {
    let key = key(program, environment);
    let file = cache.map(|directory| directory.join(FILE));
    if let Some(kept) = file.as_deref().and_then(read).filter(|kept| Some(&kept.key) == key.as_ref()) {
        return kept.answers;
    }
    let answer = |(name, flag): (&str, &str)| Some((name.to_owned(), output(program, flag, environment)?));
    let answers: BTreeMap<String, String> = QUESTIONS.into_iter().filter_map(answer).collect();
    if let (Some(file), Some(key)) = (file, key)
        && answers.len() == QUESTIONS.len()
    {
        // Without it the engine is asked again next time.
        let _ = write(&file, &Kept { key, answers: answers.clone() });
    }
    answers
}

fn key(program: &Path, environment: &BTreeMap<String, String>) -> Option<Key> {
    let about = fs::metadata(program).ok()?;
    let mut devices: Vec<String> = ["/dev/dri", "/dev/accel"]
        .iter()
        .flat_map(|directory| fs::read_dir(directory).into_iter().flatten().flatten())
        .map(|entry| entry.path())
        .chain(["/dev/kfd", "/dev/nvidia0"].map(PathBuf::from).into_iter().filter(|node| node.exists()))
        .map(|path| path.to_string_lossy().into_owned())
        .collect();
    devices.sort();
    Some(Key {
        program: program.to_owned(),
        identity: (about.dev(), about.ino(), about.size(), about.mtime(), about.ctime_nsec()),
        environment: environment.clone(),
        devices,
        boot: fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?,
    })
}

fn read(file: &Path) -> Option<Kept> {
    let mut text = String::new();
    fs::File::open(file).ok()?.take(4 * LONGEST).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

fn write(file: &Path, kept: &Kept) -> std::io::Result<()> {
    let new = file.with_extension("new");
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    options.open(&new)?.write_all(&serde_json::to_vec(kept)?)?;
    fs::rename(new, file)
}

/// What the program prints on either stream; none if it can't be run or takes too long.
fn output(program: &Path, flag: &str, environment: &BTreeMap<String, String>) -> Option<String> {
    let mut child = Command::new(program)
        .arg(flag)
        .envs(environment)
        .env_remove("NOTIFY_SOCKET")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .ok()?;
    let (sender, received) = mpsc::channel();
    let streams: [Option<Box<dyn Read + Send>>; 2] =
        [child.stdout.take().map(|s| Box::new(s) as _), child.stderr.take().map(|s| Box::new(s) as _)];
    for stream in streams.into_iter().flatten() {
        let sender = sender.clone();
        std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = stream.take(LONGEST).read_to_end(&mut text);
            let _ = sender.send(text);
        });
    }
    drop(sender);
    let deadline = Instant::now() + PATIENCE;
    let mut text = String::new();
    let mut whole = true;
    for _ in 0..2 {
        match received.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(part) => text.push_str(&String::from_utf8_lossy(&part)),
            Err(_) => whole = false,
        }
    }
    // Both streams have ended, or its time is up: it has nothing more to say.
    let _ = child.kill();
    let _ = child.wait();
    whole.then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine(name: &str, script: &str) -> (PathBuf, PathBuf) {
        use std::os::unix::fs::PermissionsExt;
        let directory = std::env::temp_dir().join(format!("plimsoll-inquiry-{name}-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let program = directory.join("engine");
        fs::write(&program, format!("#!/bin/sh\necho x >> {}/asked\n{script}\n", directory.display()))
            .unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        (directory, program)
    }

    fn times_asked(directory: &Path) -> usize {
        fs::read_to_string(directory.join("asked")).unwrap_or_default().lines().count()
    }

    #[test]
    fn an_engine_is_asked_once_for_each_environment() {
        let (directory, program) = engine("once", "echo \"$1 $COLOUR\" >&2");
        let red = BTreeMap::from([("COLOUR".to_owned(), "red".to_owned())]);
        let answers = ask(&program, &red, Some(&directory));
        assert_eq!(answers["version"].trim(), "--version red");
        assert_eq!(answers["devices"].trim(), "--list-devices red");
        assert_eq!(ask(&program, &red, Some(&directory)), answers);
        assert_eq!(times_asked(&directory), 2);
        ask(&program, &BTreeMap::new(), Some(&directory));
        assert_eq!(times_asked(&directory), 4);
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn one_that_can_not_be_run_says_nothing() {
        assert!(ask(Path::new("/nowhere/engine"), &BTreeMap::new(), None).is_empty());
    }

    #[test]
    fn a_flood_is_cut_short() {
        let (directory, program) = engine("flood", "yes");
        let answers = ask(&program, &BTreeMap::new(), None);
        assert!(answers.values().all(|text| text.len() as u64 <= 2 * LONGEST));
        fs::remove_dir_all(directory).unwrap();
    }
}

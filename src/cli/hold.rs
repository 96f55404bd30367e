//! Keeping in memory what every token touches of a model that streams.
//!
//! A process of its own does it, started by `plimsoll run` before it becomes the engine: locked pages belong to the
//! process that locks them, and are charged to the control group that first touched them, which so is the unit's. It
//! ends with the engine.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::libc;
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid, pause};
use serde::{Deserialize, Serialize};

use super::args::Hold;
use super::failure::{Exit, Failure};
use crate::bytes::Bytes;
use crate::fit::FileRange;
use crate::os::hold_range;

/// What is read and locked at once, so that progress shows: bytes.
const PIECE: u64 = 64 << 20;
/// What the helper reads of its orders at most: a few thousand ranges are 200 KiB.
const LONGEST: u64 = 16 << 20;
/// The helper's last word.
const DONE: &str = "done";

/// A part of a file to keep.
#[derive(Debug, Serialize, Deserialize)]
struct Part {
    path: PathBuf,
    offset: u64,
    bytes: u64,
}

/// Starts a helper that keeps `ranges` of `files` in memory for as long as this process lives, whatever it executes,
/// and waits until it has read them. `say` is told how far it is.
///
/// # Errors
/// One sentence: they are not kept. The helper is gone.
pub(super) fn keep(files: &[PathBuf], ranges: &[FileRange], mut say: impl FnMut(&str)) -> Result<(), String> {
    let part = |r: &FileRange| {
        let path = files.get(r.file).ok_or_else(|| format!("the model has no file number {}", r.file))?;
        Ok(Part { path: path.clone(), offset: r.offset, bytes: r.bytes })
    };
    let parts = ranges.iter().map(part).collect::<Result<Vec<_>, String>>()?;
    let whole: u64 = parts.iter().map(|part| part.bytes).fold(0, u64::saturating_add);
    let orders = serde_json::to_vec(&parts).map_err(|error| error.to_string())?;
    let plain = |error: io::Error| error.to_string();
    let program = std::env::current_exe().map_err(plain)?;
    // Its parent is this thread, which is the one that executes the engine.
    let mut helper = Command::new(program)
        .args(["hold", &std::process::id().to_string()])
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(plain)?;
    let told = helper.stdin.take().map(|mut input| input.write_all(&orders));
    let mut last = String::new();
    for line in helper.stdout.take().map(BufReader::new).into_iter().flat_map(BufRead::lines) {
        last = line.map_err(plain)?;
        if let Ok(read) = last.parse::<u64>() {
            let percent = read.saturating_mul(100) / whole.max(1);
            say(&format!("reading {} of weights that every token touches: {percent} %", Bytes(whole)));
        }
        if last == DONE {
            return Ok(());
        }
    }
    let _ = helper.kill();
    let _ = helper.wait();
    Err(match (told, last.parse::<u64>()) {
        (Some(Err(error)), _) => format!("the helper takes no orders: {error}"),
        (_, Err(_)) if !last.is_empty() => last,
        _ => "the helper has ended".to_owned(),
    })
}

/// `plimsoll hold`: the helper itself. It never returns by itself once everything is locked.
pub(super) fn hold(args: &Hold) -> Result<Exit, Failure> {
    let failed = |error: nix::Error| Failure::failed(error.desc());
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(failed)?;
    // Whoever started this may have gone before that line.
    if getppid() != Pid::from_raw(args.parent) {
        return Err(Failure::failed(
            "'plimsoll hold' is a part of 'plimsoll run', and nothing to be started by hand",
        ));
    }
    let unread = |error: String| Failure::failed(format!("what is to be kept can't be read: {error}"));
    let mut orders = Vec::new();
    io::stdin().take(LONGEST).read_to_end(&mut orders).map_err(|error| unread(error.to_string()))?;
    let parts: Vec<Part> = serde_json::from_slice(&orders).map_err(|error| unread(error.to_string()))?;
    let mut out = io::stdout();
    // Nobody who listens is left when this process is, too.
    let mut say = |text: &str| writeln!(out, "{text}").and_then(|()| out.flush());
    let locked = lock(&parts, |bytes| {
        let _ = say(&bytes.to_string());
    });
    let _ = say(locked.as_ref().err().map_or(DONE, String::as_str));
    if locked.is_err() {
        return Ok(Exit::Failed);
    }
    loop {
        pause();
    }
}

/// Locks all of them; `progress` is told the bytes so far.
fn lock(parts: &[Part], mut progress: impl FnMut(u64)) -> Result<(), String> {
    let mut files: BTreeMap<&PathBuf, File> = BTreeMap::new();
    let mut locked: u64 = 0;
    for part in parts {
        let path = part.path.display();
        let file = match files.entry(&part.path) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                entry.insert(File::open(&part.path).map_err(|error| format!("can't open {path}: {error}"))?)
            }
        };
        let end = part.offset.saturating_add(part.bytes);
        let mut at = part.offset;
        while at < end {
            let piece = PIECE.min(end - at);
            hold_range(file, at, piece).map_err(|error| reason(&path.to_string(), &error))?;
            at += piece;
            locked += piece;
            progress(locked);
        }
    }
    Ok(())
}

fn reason(path: &str, error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::ENOMEM | libc::EAGAIN) => format!(
            "{path} can't be locked in memory: LimitMEMLOCK= of the unit, or its MemoryMax=, is too low for it ({error})"
        ),
        _ => format!("{path} can't be locked in memory: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_file_is_named() {
        let part = Part { path: "/nowhere/model.gguf".into(), offset: 0, bytes: 1 };
        let why = lock(&[part], |_| {}).unwrap_err();
        assert!(why.starts_with("can't open /nowhere/model.gguf"), "{why}");
    }

    #[test]
    fn pieces_of_a_file_are_locked_one_after_the_other() {
        let path = std::env::temp_dir().join(format!("plimsoll-hold-{}", std::process::id()));
        std::fs::write(&path, vec![1; 20_000]).unwrap();
        let part = |offset, bytes| Part { path: path.clone(), offset, bytes };
        let mut seen = Vec::new();
        lock(&[part(100, 5000), part(9000, 11_000), part(0, 0)], |bytes| seen.push(bytes)).unwrap();
        assert_eq!(seen, [5000, 16_000]);
        let locked = std::fs::read_to_string("/proc/self/status").unwrap();
        let locked = locked.lines().find(|line| line.starts_with("VmLck")).unwrap().to_owned();
        let kib: u64 = locked.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert!(kib >= 20, "{locked}");
        // Behind the file's end there is nothing to be locked.
        assert!(lock(&[part(1 << 20, 4096)], |_| {}).is_err());
        std::fs::remove_file(path).unwrap();
    }
}

//! What an engine says of itself (its version, and the devices that it can offload to), and what the tool
//! beside it says of a model.
//!
//! Only the engine knows which backends it was built with, so it is asked rather than assumed, as
//! the unit's own user and in its sandbox. It may take seconds to initialise a GPU; its answer is kept for
//! as long as the program, its environment, the device nodes and the boot are the same.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::engine::opinion::TOOL;
use crate::gguf::Identity;
use crate::os::{limit_child, pidfd_open};

/// The questions, by the key under which the answer goes to the daemon.
const QUESTIONS: [(&str, &str); 2] = [("version", "--version"), ("devices", "--list-devices")];
/// How long an engine may take for an answer; seconds.
const PATIENCE: u64 = 30;
/// How much of an answer is read; a list of devices among log lines is a few KiB.
const LONGEST: u64 = 64 << 10;
/// The files in the unit's cache directory.
const FILE: &str = "engine.json";
const OPINIONS: &str = "opinions.json";
/// What the tool may print beside its log; bytes.
const MOST_SAID: usize = 16 << 10;
/// Opinions that are kept there: one model with a few settings each.
const MOST_OPINIONS: usize = 8;
/// What the tool may take for itself while it is asked. It reads headers and touches 50 to 250 MiB, but sets
/// aside 1.6 GiB for the graph of a recurrent model's batch of 2048.
const TOOL_MEMORY: u64 = 4 << 30;

/// What the answers depend on.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
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

/// An opinion, and what it depends on.
#[derive(Debug, Serialize, Deserialize)]
struct KeptOpinion {
    key: Key,
    question: Vec<String>,
    /// The identities of the model's files, as text.
    files: Vec<String>,
    answer: String,
}

/// Asks `tool`, the fit tool beside an engine, run with `environment` on top of this process's own: what it
/// prints. `files` are the model's. `cache` is a directory to remember in.
///
/// It is another's program, so it is limited in time and memory, and what it says is cut short.
///
/// # Errors
/// It can't be run, takes too long, or fails: one sentence with its own last words.
pub fn opinion(
    tool: &Path,
    question: &[String],
    environment: &BTreeMap<String, String>,
    files: &[Identity],
    cache: Option<&Path>,
) -> Result<String, String> {
    let key = key(tool, environment);
    let files: Vec<_> = files.iter().map(|identity| format!("{identity:?}")).collect();
    let file = cache.map(|directory| directory.join(OPINIONS));
    let mut kept: Vec<KeptOpinion> = file.as_deref().and_then(read).unwrap_or_default();
    let same = |kept: &KeptOpinion| {
        Some(&kept.key) == key.as_ref() && kept.question == question && kept.files == files
    };
    if let Some(kept) = kept.iter().find(|kept| same(kept)) {
        return Ok(kept.answer.clone());
    }
    let mut command = command(tool, environment);
    // All that matters is in the question.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("LLAMA_ARG_") {
            command.env_remove(name);
        }
    }
    command.args(question);
    limit_child(&mut command, TOOL_MEMORY, PATIENCE);
    let said = run(command, PATIENCE)?;
    if !said.success {
        let last =
            said.errors.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or("it says nothing");
        let last: String = last.chars().filter(|c| !c.is_control()).take(200).collect();
        return Err(format!("{TOOL} failed: {last}"));
    }
    // Its table is a line for each device; the rest would only fill the cache and the message.
    if said.output.len() > MOST_SAID {
        return Err(format!("{TOOL} has printed far more than a table"));
    }
    if let (Some(file), Some(key)) = (file, key) {
        let question = question.to_vec();
        kept.insert(0, KeptOpinion { key, question, files, answer: said.output.clone() });
        kept.truncate(MOST_OPINIONS);
        // Without it the tool is asked again next time.
        let _ = write(&file, &kept);
    }
    Ok(said.output)
}

/// Asks `program`, run with `environment` on top of this process's own. `cache` is a directory to
/// remember in. An engine that does not answer leaves its key out.
pub fn ask(
    program: &Path,
    environment: &BTreeMap<String, String>,
    cache: Option<&Path>,
) -> BTreeMap<String, String> {
    ask_of(key(program, environment), cache, |flag| {
        let mut command = command(program, environment);
        command.arg(flag);
        run(command, PATIENCE).ok()
    })
}

/// The same of any engine: `say` is what it says to a flag, and `key` what its answers depend on.
pub fn ask_of(
    key: Option<Key>,
    cache: Option<&Path>,
    say: impl Fn(&str) -> Option<Said>,
) -> BTreeMap<String, String> {
    let file = cache.map(|directory| directory.join(FILE));
    if let Some(kept) = file.as_deref().and_then(read).filter(|kept: &Kept| Some(&kept.key) == key.as_ref()) {
        return kept.answers;
    }
    let answer = |(name, flag): (&str, &str)| {
        let said = say(flag)?;
        Some((name.to_owned(), said.output + &said.errors))
    };
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
    let identity = (about.dev(), about.ino(), about.size(), about.mtime(), about.ctime_nsec());
    key_of(program, identity, environment)
}

/// What the answers of an engine in a container depend on: `id` stands for the contents of the image, and what is run.
pub fn key_of_image(id: &str, environment: &BTreeMap<String, String>) -> Option<Key> {
    key_of(Path::new(id), Default::default(), environment)
}

fn key_of(
    program: &Path,
    identity: (u64, u64, u64, i64, i64),
    environment: &BTreeMap<String, String>,
) -> Option<Key> {
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
        identity,
        environment: environment.clone(),
        devices,
        boot: fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?,
    })
}

fn read<T: DeserializeOwned>(file: &Path) -> Option<T> {
    let mut text = String::new();
    fs::File::open(file).ok()?.take(16 * LONGEST).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

fn write(file: &Path, kept: &impl Serialize) -> std::io::Result<()> {
    let new = file.with_extension("new");
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    options.open(&new)?.write_all(&serde_json::to_vec(kept)?)?;
    fs::rename(new, file)
}

/// What a program has said.
#[derive(Debug)]
pub struct Said {
    /// On its standard output.
    pub output: String,
    /// On standard error.
    pub errors: String,
    /// Whether it ended well.
    pub success: bool,
    /// Its exit code, unless it was killed.
    pub code: Option<i32>,
}

fn command(program: &Path, environment: &BTreeMap<String, String>) -> Command {
    let mut command = Command::new(program);
    command.envs(environment).env_remove("NOTIFY_SOCKET");
    command
}

/// What the program prints, each stream up to a limit, within so many seconds.
///
/// # Errors
/// It can't be run or takes too long: one sentence.
pub fn run(mut command: Command, seconds: u64) -> Result<Said, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| format!("{program} can't be run: {error}"))?;
    let (sender, received) = mpsc::channel();
    let streams: [Option<Box<dyn Read + Send>>; 2] =
        [child.stdout.take().map(|s| Box::new(s) as _), child.stderr.take().map(|s| Box::new(s) as _)];
    for (n, stream) in streams.into_iter().enumerate() {
        let Some(stream) = stream else { continue };
        let sender = sender.clone();
        std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = stream.take(LONGEST).read_to_end(&mut text);
            let _ = sender.send((n, text));
        });
    }
    drop(sender);
    let deadline = Instant::now() + Duration::from_secs(seconds);
    let mut texts = [String::new(), String::new()];
    let mut whole = true;
    for _ in 0..2 {
        match received.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok((n, part)) => texts[n] = String::from_utf8_lossy(&part).into_owned(),
            Err(_) => whole = false,
        }
    }
    // Both streams have ended, so that it is about to, too; or it has said more than is read, or its time is
    // up: it has nothing more to say.
    let cut = texts.iter().any(|text| text.len() as u64 >= LONGEST);
    if cut || !whole || !ends(&child, deadline) {
        let _ = child.kill();
    }
    let code = child.wait().ok().and_then(|status| status.code());
    let [output, errors] = texts;
    if !whole {
        return Err(format!("{program} did not answer within {seconds} s"));
    }
    Ok(Said { output, errors, success: code == Some(0), code })
}

/// Whether a process ends by itself until then.
fn ends(child: &Child, deadline: Instant) -> bool {
    let Ok(pidfd) = pidfd_open(child.id()) else { return false };
    let left = deadline.saturating_duration_since(Instant::now()).as_millis();
    let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
    poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], left).is_ok_and(|ended| ended > 0)
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
    fn an_opinion_is_asked_for_once_for_each_question_and_file() {
        let (directory, program) = engine("opinion", "[ -z \"$LLAMA_ARG_X\" ] && echo \"Host $2 0 1\"");
        let none = BTreeMap::new();
        let file = Identity { device: 1, inode: 2, size: 3, modified_ns: 4 };
        let asked = |context: &str, file: &Identity| {
            let question = ["-c".to_owned(), context.to_owned()];
            opinion(&program, &question, &none, std::slice::from_ref(file), Some(&directory))
        };
        assert_eq!(asked("4096", &file).unwrap(), "Host 4096 0 1\n");
        assert_eq!(asked("4096", &file).unwrap(), "Host 4096 0 1\n");
        assert_eq!(times_asked(&directory), 1);
        asked("8192", &file).unwrap();
        asked("4096", &Identity { size: 4, ..file }).unwrap();
        asked("4096", &file).unwrap();
        assert_eq!(times_asked(&directory), 3);
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_tool_that_fails_says_why_and_is_asked_again() {
        let (directory, program) = engine("fails", "echo first >&2; echo 'error: no such flag' >&2; exit 1");
        let asked = || opinion(&program, &[], &BTreeMap::new(), &[], Some(&directory)).unwrap_err();
        assert_eq!(asked(), "llama-fit-params failed: error: no such flag");
        asked();
        assert_eq!(times_asked(&directory), 2);
        fs::write(&program, "#!/bin/sh\nyes | head -c 20000\n").unwrap();
        assert!(asked().contains("far more than a table"), "{}", asked());
        fs::remove_file(&program).unwrap();
        assert!(asked().contains("can't be run"));
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

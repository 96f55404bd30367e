//! The gate's side of an engine that is a container image: is it there, what does it say of itself, how is it run.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::failure::Failure;
use super::inquiry::{self, Said};
use super::output;
use super::user::EngineUser;
use crate::config::{self, Image, Instance};
use crate::engine::container::{About, Container, FORMAT, Inside, PODMAN, SEARCHED, ask_name, name};
use crate::engine::{self, check_executable};

/// How long the engine may take for an answer in its container; podman ends it then.
const PATIENCE: u64 = 60;
/// podman's exit code then: that of a process which was killed.
const TOO_LATE: i32 = 128 + 9;
/// What podman needs to know of the unit, to leave its control group alone.
const OF_THE_UNIT: [&str; 3] = ["INVOCATION_ID", "JOURNAL_STREAM", "SYSTEMD_EXEC_PID"];
/// Where distributions put the program that podman makes process 1 of a container.
const INITS: [&str; 4] = [
    "/usr/libexec/podman/catatonit",
    "/usr/lib/podman/catatonit",
    "/usr/libexec/catatonit/catatonit",
    "/usr/bin/catatonit",
];

/// The image of an engine, found to be there.
#[derive(Debug)]
pub struct Ready<'a> {
    image: Image,
    about: About,
    name: String,
    ask_name: String,
    user: &'a EngineUser,
    inside: Inside,
}

impl<'a> Ready<'a> {
    /// Looks for the image. Nothing is pulled: that is no matter of seconds, and a start has a limit.
    ///
    /// # Errors
    /// It is not there, or podman is not or does not work: exit code 78.
    pub fn find(
        instance: &Instance,
        image: &Image,
        user: &'a EngineUser,
        cache: Option<&Path>,
    ) -> Result<Self, Failure> {
        check_executable(Path::new(PODMAN)).map_err(|error| {
            Failure::config(format!("{error}, and the engine of {instance} is a container image"))
                .hint("install podman and crun")
        })?;
        let about = user.as_root(|| describe(image))?.map_err(|failure| Failure {
            message: format!("{instance} can't start: {}", failure.message),
            ..failure
        })?;
        let inside = Inside {
            user: user.ids(),
            groups: user.further_groups(),
            devices: devices(Path::new("/")),
            init: init(),
            cache: cache.map(Path::to_owned),
        };
        Ok(Self {
            image: image.clone(),
            about,
            name: name(instance),
            ask_name: ask_name(instance),
            user,
            inside,
        })
    }

    /// What its llama-server says of itself: as [`inquiry::ask`], in a container of its own in the unit. `of_model` is the
    /// environment that the model's configuration gives it.
    ///
    /// # Errors
    /// It can't be run in a container at all, so that nobody needs to go for it.
    pub fn ask(&self, of_model: &BTreeMap<String, String>) -> Result<BTreeMap<String, String>, Failure> {
        let mut environment = of_unit();
        environment.extend(of_model.clone());
        // Command lines can be read by everyone, and no secret changes these answers.
        environment.retain(|name, _| !config::sounds_secret(name));
        let asked = Container {
            name: self.ask_name.clone(),
            image: &self.image,
            about: &self.about,
            inside: &self.inside,
            files: &BTreeSet::new(),
            environment: &environment,
            secrets: &BTreeSet::new(),
            timeout: Some(PATIENCE),
        };
        let program = self.about.program(&self.image).join(" ");
        let key = inquiry::key_of_image(&format!("{} {program}", self.about.id), &environment);
        let failed = Cell::new(None);
        let answers = inquiry::ask_of(key, self.inside.cache.as_deref(), |flag| {
            let ran =
                self.user.as_root(|| run_and_clean(&asked, flag)).and_then(|said| self.ran(said, &program));
            ran.map_err(|failure| failed.set(Some(failure))).ok().flatten()
        });
        failed.into_inner().map_or(Ok(answers), Err)
    }

    /// What was said, if it was llama-server that spoke; none when it took too long, which says nothing of it. podman has
    /// exit codes of its own.
    fn ran(&self, said: Result<Said, String>, program: &str) -> Result<Option<Said>, Failure> {
        let name = &self.image.name;
        let late = |why: &str| {
            output::eprint(&format!("{name}: what its llama-server can do is not known: {why}"));
            Ok(None)
        };
        let said = match said {
            Ok(said) => said,
            Err(why) => return late(&why),
        };
        match said.code {
            Some(TOO_LATE) => late(&format!("it did not answer within {PATIENCE} s")),
            Some(126 | 127) => Err(Failure::config(format!(
                "'{program}' can't be run in the image {name}: {}",
                last_words(&said)
            ))
            .hint("name the image's llama-server in plimsoll.toml, under [engine.NAME]: program = \"/path/in/the/image\"")),
            Some(125) => Err(Failure::failed(format!("podman can't run the image {name}: {}", last_words(&said)))),
            _ => Ok(Some(said)),
        }
    }

    /// podman's command line and whole environment for the daemon's answer: `argv`, which begins with the image's name,
    /// and the variables in `added`. `files` are what the engine will read.
    ///
    /// # Errors
    /// The answer is about another engine.
    pub fn command(
        &self,
        argv: &[String],
        added: HashMap<String, String>,
        files: &BTreeSet<PathBuf>,
    ) -> Result<(Vec<String>, BTreeMap<OsString, OsString>), Failure> {
        let arguments = match argv.split_first() {
            Some((word, arguments)) if *word == self.image.name => arguments,
            _ => {
                return Err(Failure::config(format!(
                    "the daemon knows another engine than the image {}",
                    self.image.name
                ))
                .hint("'systemctl reload plimsolld.service' has it read the configuration again"));
            }
        };
        let mut all = of_unit();
        all.extend(self.inside.cache.iter().flat_map(|cache| {
            let cache = cache.to_string_lossy();
            ["HOME", "XDG_CACHE_HOME", "LLAMA_CACHE"]
                .map(|name| (name.to_owned(), cache.clone().into_owned()))
        }));
        all.extend(added);
        let (secret, open): (BTreeMap<_, _>, BTreeMap<_, _>) =
            all.into_iter().partition(|(name, _)| config::sounds_secret(name));
        let container = Container {
            name: self.name.clone(),
            image: &self.image,
            about: &self.about,
            inside: &self.inside,
            files,
            environment: &open,
            secrets: &secret.keys().cloned().collect(),
            timeout: None,
        };
        let environment =
            of_podman().chain(secret).map(|(name, value)| (name.into(), value.into())).collect();
        Ok((container.argv(arguments), environment))
    }
}

/// The unit's variables that are meant for the engine. Others may hold anything, in any encoding.
fn of_unit() -> BTreeMap<String, String> {
    let text = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    text.filter(|(name, _)| belongs_to_engine(name)).collect()
}

/// Whether a variable of the unit is meant for the engine.
fn belongs_to_engine(name: &str) -> bool {
    engine::is_relevant_variable(name) || name.starts_with("LLAMA_") || name.starts_with("HF_")
}

/// podman's own variables: none that a model's configuration has set, and not the unit's HOME=, where the engine can write
/// and podman's own settings may lie; for root runs it.
fn of_podman() -> impl Iterator<Item = (String, String)> {
    let of_unit = OF_THE_UNIT.into_iter().filter_map(|name| Some((name, std::env::var(name).ok()?)));
    let fixed = [("PATH", SEARCHED.to_owned()), ("HOME", "/root".to_owned())];
    of_unit.chain(fixed).map(|(name, value)| (name.to_owned(), value))
}

/// Runs podman with these words behind its name, for as long as an answer may take.
fn podman(words: &[String]) -> Result<Said, String> {
    let mut command = Command::new(PODMAN);
    command.args(words).env_clear().envs(of_podman());
    // podman ends what it runs after its own time.
    inquiry::run(command, PATIENCE + 5)
}

/// What llama-server says to a flag. Should podman hang, what it has started is not its child, and would stay.
fn run_and_clean(asked: &Container<'_>, flag: &str) -> Result<Said, String> {
    let argv = asked.argv(&[flag.to_owned()]);
    let said = podman(argv.get(1..).unwrap_or_default());
    if said.is_err() {
        let _ = podman(&["rm", "--force", "--ignore", &asked.name].map(str::to_owned));
    }
    said
}

/// What the image says of itself, asked as this process.
fn describe(image: &Image) -> Result<About, Failure> {
    let broken = |why: String| Failure::config(format!("podman does not work: {why}"));
    let name = image.name.as_str();
    let said = podman(&["image", "inspect", "--format", FORMAT, name].map(str::to_owned)).map_err(broken)?;
    if said.success {
        return About::parse(&said.output).map_err(broken);
    }
    let exists = podman(&["image", "exists", name].map(str::to_owned)).map_err(broken)?;
    if exists.code == Some(1) { Err(missing(image)) } else { Err(broken(last_words(&said))) }
}

/// Whether the image is there; asked by root alone, whose images they are.
///
/// # Errors
/// It is not, or podman does not work.
pub fn check(image: &Image) -> Result<(), Failure> {
    describe(image).map(|_| ())
}

/// The program that podman makes process 1 of a container, where there is one.
pub fn init() -> Option<PathBuf> {
    INITS.iter().map(PathBuf::from).find(|path| check_executable(path).is_ok())
}

fn missing(image: &Image) -> Failure {
    let name = &image.name;
    Failure::config(format!("the image {name} is not on this machine"))
        .hint(format!("'podman pull {name}' as root fetches it (images of other users don't count)"))
}

/// The name of the runtime that podman uses.
///
/// # Errors
/// podman does not work: one sentence.
pub fn runtime() -> Result<String, String> {
    let said = podman(&["info", "--format", "{{.Host.OCIRuntime.Name}}"].map(str::to_owned))?;
    if said.success { Ok(said.output.trim().to_owned()) } else { Err(last_words(&said)) }
}

fn last_words(said: &Said) -> String {
    let last = said.errors.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or("it says nothing");
    last.chars().filter(|c| !c.is_control()).take(300).collect()
}

/// The devices of the machine that an engine may use: those of AMD and Intel by their nodes, NVIDIA's by the description
/// that its own tool makes for containers.
fn devices(root: &Path) -> Vec<String> {
    let at = |path: &str| root.join(path.trim_start_matches('/'));
    let is_device = |path: &Path| fs::metadata(path).is_ok_and(|about| about.file_type().is_char_device());
    let has_some = |path: &Path| fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some());
    let mut found: Vec<String> =
        ["/dev/kfd"].into_iter().filter(|path| is_device(&at(path))).map(str::to_owned).collect();
    found
        .extend(["/dev/dri", "/dev/accel"].into_iter().filter(|path| has_some(&at(path))).map(str::to_owned));
    let described = ["/etc/cdi", "/var/run/cdi"].iter().any(|directory| {
        let entries = fs::read_dir(at(directory)).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name()).any(|name| name.to_string_lossy().starts_with("nvidia"))
    });
    if described {
        found.push("nvidia.com/gpu=all".to_owned());
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_those_that_are_there() {
        let root = std::env::temp_dir().join(format!("plimsoll-devices-{}", std::process::id()));
        fs::create_dir_all(root.join("dev/dri")).unwrap();
        fs::write(root.join("dev/kfd"), "no device").unwrap();
        assert_eq!(devices(&root), Vec::<String>::new());
        fs::write(root.join("dev/dri/renderD128"), "").unwrap();
        fs::create_dir_all(root.join("etc/cdi")).unwrap();
        fs::write(root.join("etc/cdi/nvidia.yaml"), "").unwrap();
        assert_eq!(devices(&root), ["/dev/dri", "nvidia.com/gpu=all"]);
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn podman_gets_nothing_of_what_is_meant_for_the_engine() {
        for name in ["LLAMA_ARG_MLOCK", "LLAMA_API_KEY", "HSA_OVERRIDE_GFX_VERSION", "HF_TOKEN"] {
            assert!(belongs_to_engine(name), "{name}");
        }
        for name in ["PATH", "LD_PRELOAD", "NOTIFY_SOCKET", "HOME", "CACHE_DIRECTORY"] {
            assert!(!belongs_to_engine(name), "{name}");
        }
        assert!(of_podman().all(|(name, _)| !belongs_to_engine(&name)));
    }
}

//! The settings of the daemon: the keys of `plimsoll.toml` and their defaults.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use super::instance::ModelName;
use super::model::{DEFAULT_ENGINE, DEFAULT_PRIORITY};
use super::model_file::KEYS_OF_ONE_MODEL;
use super::problem::{Place, Problem, quoted};
use super::reader::{self, Reader};
use super::table::{Entry, Item, Table, Value};
use crate::bytes::{Bytes, GIB};

/// The keys of `plimsoll.toml`.
pub(super) const KEYS: [&str; 9] =
    ["mode", "reserve", "peers", "page-cache", "pressure", "swap", "engine", "adopt", "model-defaults"];

/// Whether the daemon acts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Refuses, makes room and protects.
    #[default]
    Enforce,
    /// Admits everything, acts on nothing, and logs what it would have done.
    Observe,
}

/// Memory that is kept for the system, out of reach of all models.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reserve {
    /// By the size of the machine.
    #[default]
    Auto,
    /// This much.
    Size(Bytes),
}

/// What an explicit start may do to models of equal priority.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Peers {
    /// Nothing.
    #[default]
    Keep,
    /// Replace one that is idle and not pinned; never at boot.
    ReplaceIdle,
}

/// The daemon's own swapfiles.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Swap {
    /// Where they may be, the preferred one first.
    pub directories: Vec<PathBuf>,
    /// The most they may take together; zero: none are made.
    #[serde(rename = "max_size_bytes")]
    pub max_size: Bytes,
    /// What they leave free on a file system.
    #[serde(rename = "free_space_bytes")]
    pub free_space: Bytes,
}

impl Default for Swap {
    fn default() -> Self {
        Self {
            directories: vec![PathBuf::from("/var/lib/plimsoll/swap")],
            max_size: Bytes(64 * GIB),
            free_space: Bytes(20 * GIB),
        }
    }
}

/// The kernel's page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PageCache {
    /// Whether that of the whole machine may be dropped for a large load, when all else was not enough.
    pub drop_all: bool,
}

/// What is done when memory runs short though nobody asked for any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PressureSettings {
    /// Whether the pressure ladder acts.
    pub ladder: bool,
}

impl Default for PressureSettings {
    fn default() -> Self {
        Self { ladder: true }
    }
}

/// Where an engine comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum EngineSource {
    /// An executable file.
    Path {
        /// Where it is.
        path: PathBuf,
    },
    /// llama-server in a container image.
    Image(Image),
}

/// A container image with llama-server in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Image {
    /// Its name, as `podman pull` takes it.
    #[serde(rename = "image")]
    pub name: String,
    /// llama-server inside; none: what the image itself starts, where that is one, or else the one on its PATH.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub program: Option<String>,
}

/// A unit of somebody else that is counted and may be stopped like a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Adopted {
    /// 0 to 100, as for models.
    pub priority: u8,
    /// Never stopped.
    pub pinned: bool,
    /// The memory it takes at its largest, where measuring is not enough.
    #[serde(rename = "memory_bytes")]
    pub memory: Option<Bytes>,
}

/// What `plimsoll.toml` says: valid, with every default applied. [`Daemon::default`] is what holds
/// without such a file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Daemon {
    /// Whether the daemon acts.
    pub mode: Mode,
    /// Memory kept for the system.
    #[serde(serialize_with = "reserve")]
    pub reserve: Reserve,
    /// What an explicit start may do to models of equal priority.
    pub peers: Peers,
    /// The kernel's page cache.
    pub page_cache: PageCache,
    /// What is done when memory runs short.
    pub pressure: PressureSettings,
    /// The daemon's own swapfiles.
    pub swap: Swap,
    /// Engines by name. `llama-server` is searched for when it is not among them.
    pub engines: BTreeMap<String, EngineSource>,
    /// Adopted units by name.
    pub adopted: BTreeMap<ModelName, Adopted>,
}

fn reserve<S: serde::Serializer>(value: &Reserve, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        Reserve::Auto => serializer.serialize_str("auto"),
        Reserve::Size(size) => size.serialize(serializer),
    }
}

/// Reads `plimsoll.toml`; the second part is `[model-defaults]`, which each model reads for itself.
pub(super) fn read(table: Table, problems: &mut Vec<Problem>) -> (Daemon, Table) {
    let mut reader = Reader::new(table, problems);
    let r = &mut reader;
    let mode = r
        .read("mode", reader::word(&[("enforce", Mode::Enforce), ("observe", Mode::Observe)]))
        .unwrap_or_default();
    let reserve = r.read("reserve", read_reserve).unwrap_or_default();
    let peers = r
        .read("peers", reader::word(&[("keep", Peers::Keep), ("replace-idle", Peers::ReplaceIdle)]))
        .unwrap_or_default();
    let page_cache = r.table("page-cache");
    let pressure = r.table("pressure");
    let swap = r.table("swap");
    let engines = r.table("engine").unwrap_or_default();
    let adopted = r.table("adopt").unwrap_or_default();
    let mut defaults = r.table("model-defaults").unwrap_or_default();
    reader.finish(|key| {
        super::model_file::KEYS.contains(&key).then(|| {
            if KEYS_OF_ONE_MODEL.contains(&key) {
                format!("'{key}' belongs into models.d/NAME.toml")
            } else {
                format!("'{key}' belongs into [model-defaults], or into models.d/NAME.toml")
            }
        })
    });
    for key in KEYS_OF_ONE_MODEL {
        if let Some(Entry { place, .. }) = defaults.take(key) {
            problems.push(
                Problem::error(place, format!("'{key}' can't be the same for all models"))
                    .hint("set it in models.d/NAME.toml"),
            );
        }
    }
    let daemon = Daemon {
        mode,
        reserve,
        peers,
        page_cache: page_cache.map(|table| read_page_cache(table, problems)).unwrap_or_default(),
        pressure: pressure.map(|table| read_pressure(table, problems)).unwrap_or_default(),
        swap: swap.map(|table| read_swap(table, problems)).unwrap_or_default(),
        engines: named(engines, "engine", problems, read_engine),
        adopted: named(adopted, "adopt", problems, read_adopted).into_values().collect(),
    };
    (daemon, defaults)
}

/// The tables under `[section.NAME]`, each read by `convert`.
fn named<T>(
    section: Table,
    what: &str,
    problems: &mut Vec<Problem>,
    convert: impl Fn(&str, Table, &Place, &mut Vec<Problem>) -> Option<T>,
) -> BTreeMap<String, T> {
    let mut read = BTreeMap::new();
    for (name, Entry { place, item }) in section.0 {
        match item.value {
            Value::Table(table) => {
                if let Some(value) = convert(&name, table, &place, problems) {
                    read.insert(name, value);
                }
            }
            _ => problems.push(Problem::error(
                place,
                format!("{} must be a table: write [{what}.NAME] above its keys", quoted(&name)),
            )),
        }
    }
    read
}

fn read_reserve(item: &Item) -> Result<Reserve, reader::Wrong> {
    match &item.value {
        Value::Text(text) if text == "auto" => Ok(Reserve::Auto),
        _ => reader::size(item).map(Reserve::Size),
    }
}

fn read_page_cache(table: Table, problems: &mut Vec<Problem>) -> PageCache {
    let mut r = Reader::new(table, problems);
    let drop_all = r.read("drop-all", reader::boolean).unwrap_or_default();
    r.finish(|_| None);
    PageCache { drop_all }
}

fn read_pressure(table: Table, problems: &mut Vec<Problem>) -> PressureSettings {
    let mut r = Reader::new(table, problems);
    let ladder = r.read("ladder", reader::boolean).unwrap_or(PressureSettings::default().ladder);
    r.finish(|_| None);
    PressureSettings { ladder }
}

fn read_swap(table: Table, problems: &mut Vec<Problem>) -> Swap {
    let default = Swap::default();
    let mut r = Reader::new(table, problems);
    let swap = Swap {
        directories: r.read("directories", reader::list(reader::path)).unwrap_or(default.directories),
        max_size: r.read("max-size", reader::size).unwrap_or(default.max_size),
        free_space: r.read("free-space", reader::size).unwrap_or(default.free_space),
    };
    r.finish(|_| None);
    swap
}

fn read_engine(name: &str, table: Table, place: &Place, problems: &mut Vec<Problem>) -> Option<EngineSource> {
    let mut r = Reader::new(table, problems);
    let path = r.read("path", reader::path);
    let image = r.read("image", read_image);
    let program = r.read("program", read_program);
    let given = r.finish(|_| None);
    let wrong = match ["path", "image", "program"].map(|key| given.contains_key(key)) {
        [true, true, _] => "has both 'path' and 'image', and can be only one of them",
        [false, false, _] => "needs 'path', an executable file, or 'image', a container image",
        [true, false, true] => "has both 'path' and 'program', which is the program in an 'image'",
        _ => {
            return path
                .map(|path| EngineSource::Path { path })
                .or(image.map(|name| EngineSource::Image(Image { name, program })));
        }
    };
    problems.push(Problem::error(place.clone(), format!("engine {} {wrong}", quoted(name))));
    None
}

/// The name of an image. It becomes an argument of podman, and is none of its options.
fn read_image(item: &Item) -> Result<String, reader::Wrong> {
    const EXAMPLE: &str = "for example \"ghcr.io/ggml-org/llama.cpp:server-rocm\"";
    let name = reader::text(item)?;
    if let Some((transport, rest)) = name.split_once("://") {
        return Err(reader::Wrong::new(format!(
            "must be the name of an image, without {}",
            quoted(transport)
        ))
        .hint(format!("leave '{transport}://' out: {}", quoted(rest))));
    }
    let plain = |c: char| c.is_ascii_alphanumeric();
    let sound = name.starts_with(plain)
        && name.len() <= 512
        && name.chars().all(|c| plain(c) || matches!(c, '.' | '_' | '-' | '/' | ':' | '@' | '+'));
    if sound {
        Ok(name)
    } else {
        Err(reader::Wrong::new(format!("must be the name of a container image, not {}", quoted(&name)))
            .hint(EXAMPLE))
    }
}

/// A program in an image: by its path there, or one that is found along the image's PATH.
fn read_program(item: &Item) -> Result<String, reader::Wrong> {
    let program = reader::text(item)?;
    let absolute = program.starts_with('/') && !program.ends_with('/');
    // podman takes what is JSON for a list of words.
    let plain =
        program.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_') && !program.contains('/');
    if (absolute || plain) && !program.chars().any(char::is_control) {
        return Ok(program);
    }
    Err(reader::Wrong::new(format!("must be a program in the image, not {}", quoted(&program)))
        .hint("for example \"/app/llama-server\", or \"llama-server\" where it is on the image's PATH"))
}

/// Services without which there is no machine, or no way to it; with a `*` at the end, all that begin so.
const NEVER_ADOPTED: [&str; 22] = [
    "systemd-*",
    "plimsoll*",
    "dbus*",
    "sshd*",
    "ssh.service",
    "ssh@*",
    "user@*",
    "user-runtime-dir@*",
    "getty@*",
    "serial-getty@*",
    "console-getty.service",
    "emergency.service",
    "rescue.service",
    "initrd-*",
    "polkit.service",
    "NetworkManager*",
    "networking.service",
    "wpa_supplicant*",
    "auditd.service",
    "firewalld.service",
    "nftables.service",
    "display-manager.service",
];

/// Why a unit can't be adopted.
fn not_adoptable(name: &str) -> Option<&'static str> {
    let essential = |pattern: &&str| match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => name == *pattern,
    };
    let is_name = name.parse::<ModelName>().is_ok_and(|name| name.is_foreign());
    match name {
        _ if name.starts_with("llm@") => Some("it is a model already"),
        _ if !is_name => Some("it must be a service of somebody else"),
        _ if name.ends_with("@.service") => Some("it is a template: name one of its instances"),
        _ if NEVER_ADOPTED.iter().any(essential) => {
            Some("the machine, or the way to it, depends on it, and what is adopted may be stopped")
        }
        _ => None,
    }
}

fn read_adopted(
    name: &str,
    table: Table,
    place: &Place,
    problems: &mut Vec<Problem>,
) -> Option<(ModelName, Adopted)> {
    if let Some(why) = not_adoptable(name) {
        problems.push(
            Problem::error(place.clone(), format!("{} can't be adopted: {why}", quoted(name)))
                .hint("for example [adopt.\"ollama.service\"]"),
        );
    }
    let mut r = Reader::new(table, problems);
    let adopted = Adopted {
        priority: r.read("priority", reader::integer(0, 100)).unwrap_or(DEFAULT_PRIORITY),
        pinned: r.read("pinned", reader::boolean).unwrap_or_default(),
        memory: r.read("memory", reader::size),
    };
    r.finish(|_| None);
    Some((name.parse().ok()?, adopted))
}

impl Daemon {
    /// The names that `engine` of a model may have.
    pub fn engine_names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(DEFAULT_ENGINE)
            .chain(self.engines.keys().map(String::as_str).filter(|name| *name != DEFAULT_ENGINE))
    }
}

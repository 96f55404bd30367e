//! Swapfiles on the real machine: what is seen of them, and the orders that a unit of its own carries out.
//!
//! The daemon can't do it itself: it runs in a mount namespace, in which the kernel would remember a path that
//! means nothing outside, it lacks the capability, and a swapoff can take minutes. So each order is a start of
//! `plimsoll-swap@ORDER.service`, which runs [`carry_out`].

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::action::swapfile::{Directory, SwapfileError, found, layout, most, rooms};
use crate::action::systemd::Systemd;
use crate::bytes::Bytes;
use crate::config;
use crate::host::{ControlGroup, Host};
use crate::ledger::{SwapArea, SwapName, SwapOwner, UnitState};

/// The control group of all models.
const SLICE: &str = "/llm.slice";

/// What a swap unit is to do; as text it is the unit's instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Make swapfiles of so many bytes together and use them. The number only tells one order from another.
    Add(SwapOwner, Bytes, u64),
    /// Take one out of use and remove it.
    Remove(SwapName),
    /// Remove one that is not in use.
    Clean(SwapName),
    /// Take all of the daemon's own out of use and remove them: the package goes.
    RemoveAll,
}

impl Order {
    /// The unit that carries it out.
    #[must_use]
    pub fn unit(&self) -> String {
        format!("plimsoll-swap@{self}.service")
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Add(SwapOwner::Plan, bytes, number) => write!(f, "add-plan-{}-{number}", bytes.0),
            Self::Add(SwapOwner::Person, bytes, number) => write!(f, "add-hand-{}-{number}", bytes.0),
            Self::Remove(name) => write!(f, "remove-{name}"),
            Self::Clean(name) => write!(f, "clean-{name}"),
            Self::RemoveAll => f.write_str("remove-all"),
        }
    }
}

impl FromStr for Order {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is no order for a swapfile");
        if text == "remove-all" {
            return Ok(Self::RemoveAll);
        }
        let (verb, rest) = text.split_once('-').ok_or_else(wrong)?;
        match verb {
            "remove" => return rest.parse().map(Self::Remove),
            "clean" => return rest.parse().map(Self::Clean),
            "add" => {}
            _ => return Err(wrong()),
        }
        let mut parts = rest.split('-');
        let owner = match parts.next() {
            Some("plan") => SwapOwner::Plan,
            Some("hand") => SwapOwner::Person,
            _ => return Err(wrong()),
        };
        let mut number = || parts.next().and_then(|part| part.parse().ok()).ok_or_else(wrong);
        let order = Self::Add(owner, Bytes(number()?), number()?);
        if parts.next().is_some() { Err(wrong()) } else { Ok(order) }
    }
}

/// Why none is made without a configuration.
const UNKNOWN_PLACE: &str = "no swapfile is made, for plimsoll.toml has an error, and so does not say where one may be: \
                             run 'plimsoll validate'";

/// Carries out an order: what `plimsolld --swap ORDER` does. As root, outside of any mount namespace.
///
/// # Errors
/// Why not, in one sentence; nothing is left half done.
pub fn carry_out(root: &Path, order: &str) -> Result<String, String> {
    let order: Order = order.parse()?;
    let swap = config::load(root).settings.map(|settings| settings.swap);
    let text = |error: SwapfileError| error.to_string();
    match order {
        Order::Add(owner, bytes, _) => {
            // The defaults may be another disk than was meant, and more than was allowed.
            let swap = swap.ok_or(UNKNOWN_PLACE)?;
            let rooms = rooms(&swap.directories, swap.max_size, swap.free_space);
            let mut made: Vec<(PathBuf, SwapName)> = Vec::new();
            for (path, size) in layout(bytes, &rooms).map_err(text)? {
                match Directory::open(&path).and_then(|directory| directory.create(owner, size)) {
                    Ok(name) => made.push((path, name)),
                    Err(error) => {
                        // All or none.
                        for (path, name) in &made {
                            let _ = Directory::open(path).and_then(|directory| directory.remove(name));
                        }
                        return Err(error.to_string());
                    }
                }
            }
            let names: Vec<String> = made.iter().map(|(_, name)| name.to_string()).collect();
            Ok(format!("{bytes} of swap made: {}", names.join(", ")))
        }
        Order::Remove(name) | Order::Clean(name) => {
            let places = places(root, &swap.unwrap_or_default());
            let path = places.into_iter().find(|path| path.join(name.file_name()).exists());
            let directory =
                Directory::open(&path.ok_or(SwapfileError::Missing(name)).map_err(text)?).map_err(text)?;
            let clean = matches!(order, Order::Clean(_));
            if clean { directory.clean(&name) } else { directory.remove(&name) }.map_err(text)?;
            Ok(format!("swapfile {name} removed"))
        }
        Order::RemoveAll => {
            let (host, mut failed) = (Host::at(root), Vec::new());
            for path in places(root, &swap.unwrap_or_default()) {
                for file in found(&path) {
                    if let Some(unit) = needed_by(&host, file.name) {
                        failed.push(stays(&file.path, &unit));
                        continue;
                    }
                    let removed = Directory::open(&path).and_then(|directory| directory.remove(&file.name));
                    failed.extend(removed.err().map(|error| error.to_string()));
                }
            }
            if failed.is_empty() { Ok("all swapfiles removed".to_owned()) } else { Err(failed.join("; ")) }
        }
    }
}

/// How long an order may take to end when it is called off: a swapoff(2) returns on a signal.
const CALLED_OFF: Duration = Duration::from_secs(10);

/// Calls off what the daemon before this one wanted removed: it would go from under whoever is about to count on it.
/// What nobody needs is removed again.
pub async fn call_off_removals(systemd: &Systemd) {
    let pattern = "plimsoll-swap@remove-*.service";
    let under_way = systemd.units(pattern).await.unwrap_or_default();
    for unit in under_way.iter().filter(|unit| unit.state == UnitState::Activating) {
        match systemd.stop(&unit.name, None, CALLED_OFF).await {
            Ok(_) => tracing::info!("{} is called off: it was ordered before this start", unit.name),
            Err(error) => tracing::warn!("{} can't be called off: {error}", unit.name),
        }
    }
}

/// The unit of a model with memory in swap, where the swapfile is in use and was made for models. What is read back is
/// charged to the model's control group, for whose limit it may be too much: then the kernel kills the model.
fn needed_by(host: &Host, name: SwapName) -> Option<String> {
    let active = host.swaps().map_or(true, |areas| areas.iter().any(|area| area.own() == Some(name)));
    if name.owner != SwapOwner::Plan || !active {
        return None;
    }
    // The kernel's count for a group holds that of all groups below it.
    let swaps = |group: &ControlGroup| match host.measured(group, &[]) {
        Ok(measured) => !measured.swapped.is_zero(),
        // One that is there and can't be read may hold anything.
        Err(error) => !error.is_gone(),
    };
    let group = host.groups_in(SLICE).into_iter().find(swaps)?;
    Some(group.to_string().rsplit('/').next().unwrap_or_default().to_owned())
}

/// That a swapfile is left in use, and what to do about it.
fn stays(path: &Path, unit: &str) -> String {
    let path = path.display();
    format!(
        "{path} stays in use: {unit} has memory in swap, and might be killed if that were read back; once the unit \
         has stopped, run 'swapoff {path}' and remove the file"
    )
}

/// Where swapfiles of the daemon's own are looked for: where they are to be, and in the default directory, where an
/// earlier configuration may have left some.
fn searched(swap: &config::Swap) -> Vec<PathBuf> {
    let default = config::Swap::default();
    let mut places: Vec<PathBuf> = Vec::new();
    for path in swap.directories.iter().chain(&default.directories) {
        if !places.contains(path) {
            places.push(path.clone());
        }
    }
    places
}

/// Where swapfiles of the daemon's own may be: where they are looked for, and where some are in use.
fn places(root: &Path, swap: &config::Swap) -> Vec<PathBuf> {
    let mut places = searched(swap);
    let in_use = Host::at(root).swaps().unwrap_or_default();
    for path in in_use.iter().filter(|area| area.own().is_some()).filter_map(|area| area.path.parent()) {
        if !places.iter().any(|place| place == path) {
            places.push(path.to_owned());
        }
    }
    places
}

/// What was last seen of the daemon's own swapfiles.
#[derive(Debug, Default)]
pub struct SwapFiles {
    seen: Mutex<(Vec<SwapArea>, Bytes)>,
}

impl SwapFiles {
    /// Looks at the directories. Blocks; for a thread that may.
    pub fn look(&self, swap: &config::Swap) {
        let files = searched(swap).into_iter().flat_map(|directory| found(&directory));
        let areas = files.map(|file| SwapArea {
            path: file.path,
            size: file.size,
            used: Bytes::ZERO,
            priority: 0,
            active: false,
        });
        let areas = areas.collect();
        let room = most(&rooms(&swap.directories, swap.max_size, swap.free_space));
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = (areas, room);
    }

    /// The areas in use, the files that are not, and the room for more.
    #[must_use]
    pub fn with(&self, mut active: Vec<SwapArea>) -> (Vec<SwapArea>, Bytes) {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let known: Vec<Option<SwapName>> = active.iter().map(SwapArea::own).collect();
        active.extend(seen.0.iter().filter(|area| !known.contains(&area.own())).cloned());
        (active, seen.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read_as_they_are_written() {
        let name = SwapName { owner: SwapOwner::Plan, id: 9 };
        for order in [
            Order::Add(SwapOwner::Person, Bytes::gib(4), 77),
            Order::Add(SwapOwner::Plan, Bytes(1), 0),
            Order::Remove(name),
            Order::Clean(name),
            Order::RemoveAll,
        ] {
            assert_eq!(order.to_string().parse(), Ok(order));
        }
        for text in
            ["", "add", "add-plan", "add-plan-1", "add-plan-1-2-3", "add-x-1-2", "remove-x", "clean-../etc"]
        {
            assert!(text.parse::<Order>().is_err(), "{text}");
        }
    }

    /// A directory to stand for the root, with these files in it.
    fn root(name: &str, files: &[(&str, &str)]) -> PathBuf {
        let root = std::env::temp_dir().join(format!("plimsoll-swap-{name}-{}", std::process::id()));
        for (path, text) in files {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn none_is_made_while_the_configuration_has_an_error() {
        let root = root("error", &[("etc/plimsoll/plimsoll.toml", "[swap]\nmax-size = 0\ntypo = 1\n")]);
        let why = carry_out(&root, "add-plan-1073741824-1").unwrap_err();
        assert!(why.contains("plimsoll.toml") && why.contains("plimsoll validate"), "{why}");
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn the_default_directory_is_always_looked_at() {
        let default = PathBuf::from("/var/lib/plimsoll/swap");
        let of = |directories: &[&str]| {
            let directories = directories.iter().map(PathBuf::from).collect();
            searched(&config::Swap { directories, ..config::Swap::default() })
        };
        assert_eq!(of(&["/srv/swap"]), [PathBuf::from("/srv/swap"), default.clone()]);
        assert_eq!(of(&["/var/lib/plimsoll/swap/", "/var/lib/plimsoll/swap"]), [default]);
    }

    #[test]
    fn what_a_model_has_swapped_out_keeps_the_file_of_a_plan() {
        let name = |owner, id| SwapName { owner, id };
        let (plan, hand) = (name(SwapOwner::Plan, 1), name(SwapOwner::Person, 2));
        let line = |name: SwapName| format!("/s/{} file 1024 512 -2\n", name.file_name());
        let swaps = format!("Filename Type Size Used Priority\n{}{}", line(plan), line(hand));
        let unit = "sys/fs/cgroup/llm.slice/llm@big.service";
        let (stat, swapped) = (format!("{unit}/memory.stat"), format!("{unit}/memory.swap.current"));
        let files = [
            ("proc/swaps", swaps.as_str()),
            ("sys/fs/cgroup/llm.slice/memory.swap.current", "4096\n"),
            (stat.as_str(), "anon 4096\nfile 0\n"),
            (swapped.as_str(), "4096\n"),
        ];
        let root = root("needed", &files);
        let host = Host::at(&root);
        assert_eq!(needed_by(&host, plan).as_deref(), Some("llm@big.service"));
        assert_eq!(needed_by(&host, hand), None);
        assert_eq!(needed_by(&host, name(SwapOwner::Plan, 3)), None, "not in use");
        std::fs::write(root.join(&swapped), "0\n").unwrap();
        assert_eq!(needed_by(&host, plan), None);
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn files_in_use_are_counted_once() {
        let area = |id, active| SwapArea {
            path: PathBuf::from("/s").join(SwapName { owner: SwapOwner::Plan, id }.file_name()),
            size: Bytes::gib(1),
            used: Bytes::ZERO,
            priority: -2,
            active,
        };
        let files = SwapFiles { seen: Mutex::new((vec![area(1, false), area(2, false)], Bytes::gib(3))) };
        let other = SwapArea { path: "/dev/sda2".into(), ..area(1, true) };
        let (areas, room) = files.with(vec![other, area(2, true)]);
        let active: Vec<bool> = areas.iter().map(|area| area.active).collect();
        assert_eq!((active, room), (vec![true, true, false], Bytes::gib(3)));
    }
}

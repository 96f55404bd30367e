//! Holds `systemd/org.plimsoll1*.xml` to what the daemon serves, and shows its models as other programs see them.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)] // a test: what is wrong has to stop it

#[allow(dead_code)] // nothing here runs the command
mod common;

use std::collections::HashMap;
use std::future::poll_fn;
use std::num::NonZero;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use common::Simulated;
use futures_core::Stream;
use zbus::fdo::{ManagedObjects, ObjectManagerProxy};
use zbus::{Connection, MatchRule, MessageStream, OwnedObjectPath, OwnedVariant, Variant, message};

/// The members of an interface, in the order of their names: methods and signals with their arguments,
/// properties with their access. Names of results are documentation only.
fn members(xml: &str, interface: &str) -> Vec<String> {
    let begin = format!("<interface name=\"{interface}\">");
    let lines = xml.lines().map(str::trim).skip_while(|line| **line != begin).skip(1);
    let mut members: Vec<String> = Vec::new();
    for line in lines.take_while(|line| *line != "</interface>") {
        let value = |name: &str| {
            let value = line.split_once(&format!(" {name}=\"")).and_then(|(_, rest)| rest.split_once('"'));
            value.map_or("", |(value, _)| value).to_owned()
        };
        let element = line.split([' ', '>', '/']).next().unwrap_or_default();
        match element {
            "<method" | "<signal" => members.push(format!("{element} {}", value("name"))),
            "<property" => {
                members.push(format!("{element} {} {} {}", value("name"), value("type"), value("access")))
            }
            "<arg" => {
                let name = if value("direction") == "out" { String::new() } else { value("name") };
                let arg = format!(" ({} {name} {})", value("direction"), value("type"));
                members.last_mut().unwrap().push_str(&arg);
            }
            _ => {}
        }
    }
    members.sort();
    members
}

/// A daemon on a simulated server, and its bus.
async fn serve() -> Option<(Simulated, Connection)> {
    let machine = Simulated::start(include_str!("../config/simulate/small-server.toml"))?;
    let bus = zbus::connection::Builder::address(machine.bus.as_str()).build().await.unwrap();
    Some((machine, bus))
}

/// All objects, once one of `path` is there, or has gone.
async fn objects(bus: &Connection, signals: &mut MessageStream, path: &str, there: bool) -> ManagedObjects {
    let manager = ObjectManagerProxy::builder(bus).destination(NAME).path(MANAGER).build();
    let manager = manager.await.unwrap();
    loop {
        let objects = manager.get_managed_objects().await.unwrap();
        if objects.keys().any(|object| object.as_str() == path) == there {
            return objects;
        }
        next(signals).await;
    }
}

/// The next signal. Nothing here takes long: the bound ends a test that has failed.
async fn next(signals: &mut MessageStream) -> zbus::Message {
    let signal = poll_fn(|context| Pin::new(&mut *signals).poll_next(context));
    tokio::time::timeout(Duration::from_secs(60), signal).await.unwrap().unwrap().unwrap()
}

const NAME: &str = "org.plimsoll1";
const MANAGER: &str = "/org/plimsoll1";
const MODEL: &str = "org.plimsoll1.Model";

#[tokio::test(flavor = "current_thread")]
async fn the_interfaces_shipped_are_those_served() {
    let Some((_daemon, bus)) = serve().await else { return };
    let mut signals = signals(&bus).await;
    objects(&bus, &mut signals, "/org/plimsoll1/model/chat", true).await;
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let served = [
        (MANAGER, "org.plimsoll1.Manager", "org.plimsoll1.xml", 10),
        (MANAGER, "org.freedesktop.DBus.ObjectManager", "org.plimsoll1.xml", 3),
        ("/org/plimsoll1/model/chat", MODEL, "org.plimsoll1.Model.xml", 7),
    ];
    for (path, interface, file, least) in served {
        let introspectable = Some("org.freedesktop.DBus.Introspectable");
        let reply = bus.call_method(Some(NAME), path, introspectable, "Introspect", &()).await.unwrap();
        let served: String = reply.body().deserialize().unwrap();
        let shipped = std::fs::read_to_string(root.join("systemd").join(file)).unwrap();
        let members = |xml: &str| self::members(xml, interface);
        assert!(members(&served).len() >= least, "{served}");
        assert_eq!(members(&shipped), members(&served), "{interface}");
    }
}

async fn signals(bus: &Connection) -> MessageStream {
    let rule = MatchRule::builder().msg_type(message::Type::Signal).sender(NAME).build();
    MessageStream::for_match_rule(rule.unwrap(), bus, NonZero::new(1000)).await.unwrap()
}

/// Calls `Load` or `Unload`.
async fn ask(bus: &Connection, method: &str, instance: &str) -> OwnedObjectPath {
    let interface = Some("org.plimsoll1.Manager");
    let reply = if method == "Load" {
        let options: HashMap<&str, Variant<'_>> = HashMap::new();
        bus.call_method(Some(NAME), MANAGER, interface, method, &(instance, options)).await
    } else {
        bus.call_method(Some(NAME), MANAGER, interface, method, &(instance,)).await
    };
    reply.unwrap().body().deserialize().unwrap()
}

#[tokio::test(flavor = "current_thread")]
async fn models_are_objects_that_tell_of_their_changes() {
    let Some((_daemon, bus)) = serve().await else { return };
    let mut signals = signals(&bus).await;
    for model in ["chat", "draft", "coder"] {
        let path = format!("/org/plimsoll1/model/{model}");
        let all = objects(&bus, &mut signals, &path, true).await;
        let properties = &all[&OwnedObjectPath::try_from(path).unwrap()][MODEL];
        assert_eq!(text(&properties["State"]), "inactive");
        assert_eq!(text(&properties["Instance"]), model);
    }

    // What follows changes state by state, each of which is told.
    ask(&bus, "Load", "draft").await;
    let mut told: Vec<String> = Vec::new();
    let mut bytes: u64 = 0;
    while !told.iter().any(|state| state == "running") {
        let changed = changes(&next(&mut signals).await, "/org/plimsoll1/model/draft");
        told.extend(changed.get("State").map(text));
        bytes = changed.get("PredictedBytes").map_or(bytes, |bytes| u64::try_from(bytes).unwrap());
    }
    assert!(told.contains(&"loading".to_owned()), "{told:?}");
    assert!(bytes > 4 << 30, "{bytes}");

    // A second instance has an object while it is there.
    let second = "/org/plimsoll1/model/draft_402";
    ask(&bus, "Load", "draft@2").await;
    objects(&bus, &mut signals, second, true).await;
    ask(&bus, "Unload", "draft@2").await;
    let all = objects(&bus, &mut signals, second, false).await;
    let path = OwnedObjectPath::try_from("/org/plimsoll1/model/draft").unwrap();
    assert_eq!(text(&all[&path][MODEL]["State"]), "running");
}

fn text(value: &OwnedVariant) -> String {
    <&str>::try_from(value).unwrap().to_owned()
}

/// What `signal` tells of the model at `path`.
fn changes(signal: &zbus::Message, path: &str) -> HashMap<String, OwnedVariant> {
    let header = signal.header();
    if header.path().is_none_or(|of| of.as_str() != path)
        || header.member().is_none_or(|member| member.as_str() != "PropertiesChanged")
    {
        return HashMap::new();
    }
    let (_, changed, _): (String, HashMap<String, OwnedVariant>, Vec<String>) =
        signal.body().deserialize().unwrap();
    changed
}

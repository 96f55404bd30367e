//! The bus: names, wire types, client proxies and error names of `org.plimsoll1`.

pub mod authorize;
pub mod client;
pub mod error;
mod models;
mod peer;
pub mod proxy;
pub mod server;
pub mod service;
pub mod simulated;

pub use crate::daemon::report;
pub use client::Client;
pub use error::{CallError, Error, Kind};

/// The daemon's well-known name.
pub const NAME: &str = "org.plimsoll1";
/// The manager's object path.
pub const PATH: &str = "/org/plimsoll1";
/// The environment variable that names another bus than the system's: the private bus of
/// `plimsolld --simulate`.
pub const BUS_ADDRESS_VARIABLE: &str = "PLIMSOLL_BUS_ADDRESS";

//! Plimsoll: admission control, reservations and memory protection for Linux machines that serve
//! large language models.
//!
//! The library holds everything; the binaries in `src/bin` only wire its parts together. The
//! modules form floors that import downwards only: ARCHITECTURE.md draws the house and
//! `tests/floors.rs` holds the code to it. Four of them are a crate of their own for the sake of speed, see
//! `src/estimate.rs`.

pub mod action;
pub mod catalogue;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod dbus;
pub mod engine;
pub mod host;
pub mod ledger;
pub mod os;
pub mod policy;
pub mod ports;
pub mod sim;

pub use plimsoll_estimate::{bytes, fit, gguf, text};

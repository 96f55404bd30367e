//! The decisions: admission, eviction order, restoration, limits.
//!
//! Ordinary functions over ordinary values. Nothing here does I/O, reads a clock, logs or waits:
//! [`Core::step`] takes what happened and a reading of the machine and returns what to do, so the
//! real daemon and the simulated machine run the same decisions.

pub mod core;
pub mod decision;
pub mod evict;
pub mod last_resort;
pub mod limits;
mod oversized;
pub mod peaks;
pub mod plan;
pub mod pressure;
pub mod refusal;
pub mod request;
mod tidy;
pub mod verdict;

pub use self::core::{Action, ActionId, Core, Event, Outcome, Saved};
pub use decision::{Decision, Level, Relief, Rescue, Verdict};
pub use last_resort::{LastResort, last_resort};
pub use limits::{Limits, limits, read_ahead};
pub use peaks::Peaks;
pub use plan::{Plan, Planned, Step, StopReason, Wait, plan};
pub use refusal::{Refusal, RefusalKind};
pub use request::{Mode, Peers, Request, Rules, Rung};

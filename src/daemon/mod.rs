//! The daemon: the one owner of state, fed by one queue.
//!
//! Everything that happens (calls on the bus, changes of units, outcomes of effects, time) is an
//! [`Input`] of one queue. [`Daemon`] takes them one by one, asks [`crate::policy::Core`] what to
//! do, and carries that out in order: what has to survive is saved before what needs it is begun,
//! and nothing is published that is not committed. Whatever may block runs on another thread and
//! comes back as an input. [`Handle`] is what the bus talks to.

mod alarm;
mod calls;
pub mod catalog;
mod digest;
pub mod handle;
mod input;
mod jobs;
pub mod journal;
pub mod leases;
pub mod real;
pub mod report;
mod rules;
mod run;
pub mod signals;
mod state;
pub mod survey;
#[cfg(test)]
mod tests;
mod turns;
mod view;

pub use handle::{Asker, Asking, Fault, Handle, LeaseWish, LoadOptions, Peer, Proof};
pub use input::{Input, Publication};
pub use jobs::{Job, JobKind, JobResult};
pub use leases::LeaseInfo;
pub use run::{Daemon, Parts};
pub use state::{Durable, Store};

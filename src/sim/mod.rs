//! A simulated machine: the same decisions over numbers instead of processes.
//!
//! [`World`] is the machine, driven by a clock that it is told. [`Simulation`] runs it with a
//! [`crate::policy::Core`] in virtual time, for tests that try a thousand cases; [`SimPorts`] runs
//! it in real time under the daemon's own loop, for `plimsolld --simulate`.

mod ports;
mod scenario;
mod simulation;
mod world;

pub use ports::{SimCatalog, SimPorts};
pub use scenario::{Eater, Placement, Requests, Scenario, ScenarioError, Scripted, SimModel};
pub use simulation::{Evidence, Simulation};
pub use world::{Emitted, World};

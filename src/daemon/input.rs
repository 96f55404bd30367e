//! What comes into the daemon's loop, and what it publishes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::{Notify, oneshot};

use super::handle::{Asker, Fault, LoadOptions};
use super::jobs::{Job, JobResult};
use super::leases::{LeaseAsk, LeaseInfo};
use super::report::{Model, Status};
use crate::bytes::Bytes;
use crate::config::Instance;
use crate::ledger::SwapName;
use crate::policy::core::Effect;
use crate::policy::{Decision, Event, Level, Mode, Request};
use crate::ports::{CatalogError, Launch, Rulebook, Wish};

/// One thing that happened.
#[derive(Debug)]
pub enum Input {
    /// Something for the decisions.
    Event(Event),
    /// A unit or a job of systemd changed.
    Changed,
    /// The last rung has killed somebody.
    Killed,
    /// What a starting unit says of itself.
    Said(Instance, String),
    /// A running instance is to be taken into the ledger: who, and its InvocationID.
    Adopt(Instance, String),
    /// A call on the bus.
    Command(Box<Command>),
    /// A request was worked out off the loop.
    Weighed(Box<Weighed>),
    /// The configuration was looked at off the loop.
    Rules(Box<Rulebook>),
    /// A lease has ended, or whoever waited for it is gone: its number.
    LeaseEnded(u64),
    /// Read the configuration again (SIGHUP).
    Reload,
    /// It was read again.
    Reloaded(Option<Box<Rulebook>>),
    /// systemd or the bus is gone: end, to be started anew.
    Lost,
    /// End (SIGTERM); all models go on running.
    Terminate,
}

/// A call that the loop answers.
#[derive(Debug)]
pub enum Command {
    /// The gate.
    Admit {
        /// Who asks.
        asker: Asker,
        /// The model's files as the asker could open them.
        files: Vec<(PathBuf, File)>,
        /// Variables that change what the engine takes.
        environment: BTreeMap<String, String>,
        /// What the engine says of itself.
        engine: BTreeMap<String, String>,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<Launch, Fault>>,
    },
    /// Start a unit for a person.
    Load(Job, LoadOptions),
    /// Stop a unit for a person.
    Unload(Job),
    /// Pin or unpin a model.
    Pin(Instance, bool, oneshot::Sender<()>),
    /// Hold memory for something that is no model.
    Lease(LeaseAsk),
    /// Make or remove a swapfile for a person.
    Swap(Effect, oneshot::Sender<Result<(), Fault>>),
    /// Enforce or observe.
    SetMode(Mode, oneshot::Sender<()>),
    /// What a request would lead to.
    Plan(Box<Request>, oneshot::Sender<Decision>),
    /// Everything that is shown of the daemon.
    Status(oneshot::Sender<Status>),
    /// The last decision on an instance.
    Explain(Instance, oneshot::Sender<Option<Decision>>),
}

/// A request that was worked out for somebody who waits.
#[derive(Debug)]
pub struct Weighed {
    /// Why it was.
    pub purpose: Purpose,
    /// The request, or what is wrong.
    pub request: Result<Request, CatalogError>,
    /// The rules at that time.
    pub rules: Option<Rulebook>,
}

/// What a request is worked out for.
#[derive(Debug)]
pub enum Purpose {
    /// The call with this ticket.
    Admit(u64),
    /// An instance that runs without a reservation.
    Adopt(Instance),
}

/// A call that waits at the gate.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) wish: Arc<Wish>,
    pub(super) asked: bool,
    /// None for the simulated gate, which is answered through its ports.
    pub(super) reply: Option<oneshot::Sender<Result<Launch, Fault>>>,
}

/// Calls for the status that wait for what the engines say.
#[derive(Debug)]
pub(super) struct Looking {
    /// Who was asked.
    pub(super) of: BTreeSet<Instance>,
    pub(super) replies: Vec<oneshot::Sender<Status>>,
}

/// A call that waits for a swapfile to be made or removed.
#[derive(Debug)]
pub(super) struct Swapping {
    /// What is removed.
    pub(super) going: Option<SwapName>,
    pub(super) reply: oneshot::Sender<Result<(), Fault>>,
}

/// What the daemon tells the world.
#[derive(Clone, Debug)]
pub enum Publication {
    /// A decision was taken.
    Decision(Box<Decision>),
    /// What an instance waits for.
    Progress(Instance, String),
    /// An instance is about to be stopped for another (or for none, to keep the machine afloat), at a time in
    /// microseconds of CLOCK_MONOTONIC or before it.
    AboutToEvict(Instance, Option<Instance>, u64),
    /// Memory has become short, or is no longer: how short, and what is left of it.
    Pressure(Level, Bytes),
    /// Where a job is.
    JobProgress(u32, String),
    /// A job has ended.
    JobEnded(Job, JobResult, String),
    /// A lease is held; whoever waits for its object on the bus is told.
    LeaseBegan(LeaseInfo, Arc<Notify>),
    /// A lease has ended: its number.
    LeaseEnded(u64),
    /// Enforcing or observing from now on.
    Mode(Mode),
    /// All models, one of which has changed in what is told of it.
    Models(Vec<Model>),
}

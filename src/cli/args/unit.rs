//! The verbs that units run.

use clap::Args;

use super::Root;

/// Pass the gate and become the engine (what llm@.service runs)
///
/// Checks what could never work, asks the daemon for admission, waits for its answer, and
/// replaces itself with the engine.
#[derive(Args, Debug)]
#[command(after_help = "Example, in a unit of your own:\n  ExecStart=/usr/bin/plimsoll run %i")]
pub struct Run {
    /// The instance, as after 'llm@'
    #[arg(value_name = "INSTANCE")]
    pub instance: String,
    /// Started by root, for an engine that is a container image (what plimsoll's generator writes for it)
    #[arg(long, hide = true)]
    pub container: bool,
    #[command(flatten)]
    pub root: Root,
}

/// Keep parts of a model's files in memory (a helper of 'plimsoll run', which starts it)
#[derive(Args, Debug)]
pub struct Hold {
    /// The process that has started it, and with which it ends
    #[arg(value_name = "PID")]
    pub parent: i32,
}

/// Wait until the model answers (what llm@.service runs after its start)
///
/// Asks the engine's health endpoint until it says yes. There is no time limit while bytes move;
/// it fails when the process is gone or nothing has moved for the model's stall-timeout.
#[derive(Args, Debug)]
#[command(after_help = "Example, in a unit of your own:\n  ExecStartPost=/usr/bin/plimsoll wait-ready %i")]
pub struct WaitReady {
    /// The instance, as after 'llm@'
    #[arg(value_name = "INSTANCE")]
    pub instance: String,
    #[command(flatten)]
    pub root: Root,
}

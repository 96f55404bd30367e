//! The command for people: arguments, tables, and the gate that units pass through.
//!
//! Nothing is decided here. What the daemon knows or does is asked for over the bus; `fit`, `validate`, `log` and
//! what only looks at this machine work without it.

mod agent;
mod args;
mod catalogue;
mod completions;
mod container;
mod doctor;
mod explain;
mod failure;
mod files;
mod fit;
mod gate;
mod generator;
mod hold;
mod inquiry;
mod lease;
mod load;
mod log;
mod opinion;
mod output;
mod process;
mod read_behind;
mod remote;
mod run;
mod status;
mod swap;
mod top;
mod user;
mod validate;
mod verbs;
mod wait_ready;

use std::ffi::OsString;
use std::future::Future;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, FromArgMatches};

pub use args::Shell;
use args::{Cli, Common, Verb};
pub use completions::script as completion_script;
pub use failure::{Exit, Failure};
pub use fit::Local as LocalQuotes;

use crate::dbus::{BUS_ADDRESS_VARIABLE, CallError, Client};
use crate::text::harmless;

/// How long a call that only reads may take: as long as D-Bus calls usually may.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(25);

/// The whole command line as clap sees it: for completions, manual pages and tests.
#[must_use]
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the command line and says how it ended.
#[must_use]
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    if generator::is_meant(args.first()) {
        return ExitCode::from(end(generator::main(&args[1..]).map(|exit| exit as u8)));
    }
    let parsed = command().try_get_matches_from(args).and_then(|m| Cli::from_arg_matches(&m));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version go to standard output and are no failure.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(Exit::Usage as u8));
        }
    };
    ExitCode::from(end(dispatch(cli)))
}

/// Says what went wrong, if something did.
fn end(result: Result<u8, Failure>) -> u8 {
    let failure = match result {
        Ok(exit) => return exit,
        Err(failure) => failure,
    };
    output::eprint(&format!("plimsoll: {}", harmless(&failure.message)));
    if let Some(hint) = &failure.hint {
        output::eprint(&format!("hint: {}", harmless(hint)));
    }
    failure.exit as u8
}

fn dispatch(cli: Cli) -> Result<u8, Failure> {
    let common = &cli.common;
    let done = match cli.verb {
        Verb::Lease(args) => return lease::lease(common, &args),
        Verb::Plan(args) => verbs::plan(common, &args),
        Verb::Load(args) => load::load(common, &args),
        Verb::Unload(args) => load::unload(common, &args),
        Verb::Status(args) => status::status(common, &args),
        Verb::Top(args) => top::top(common, &args),
        Verb::List(args) => status::list(common, &args),
        Verb::Explain(args) => explain::explain(common, &args),
        Verb::Log(args) => log::log(&args),
        Verb::Pin(args) => verbs::pin(common, &args.names, true),
        Verb::Unpin(args) => verbs::pin(common, &args.names, false),
        Verb::Mode(args) => verbs::mode(common, &args),
        Verb::Swap(args) => swap::swap(common, &args),
        Verb::Reload(_) => verbs::reload(common),
        Verb::Doctor(args) => return Ok(doctor::doctor(common, &args)? as u8),
        Verb::Validate(args) => return Ok(validate::validate(&args)? as u8),
        Verb::WaitReady(args) => return Ok(wait_ready::wait_ready(&args)? as u8),
        Verb::Run(args) => return Ok(run::run(common, &args)? as u8),
        Verb::Hold(args) => return Ok(hold::hold(&args)? as u8),
        Verb::Fit(args) => fit::fit(&args),
        Verb::Catalogue(args) => catalogue::catalogue(&args),
        Verb::Completions(args) => completions::print(args.shell),
    };
    done.map(|()| Exit::Done as u8)
}

/// Runs `future` on a runtime of this thread.
fn block_on<T>(future: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::failed(format!("no event loop: {error}")))?
        .block_on(future)
}

/// The bus to talk to, when it is not the system's.
fn bus_address(common: &Common) -> Option<String> {
    let from_environment = || std::env::var(BUS_ADDRESS_VARIABLE).ok().filter(|address| !address.is_empty());
    common.bus.clone().or_else(from_environment)
}

/// The answer to a call that only reads, which a daemon that is well gives at once.
async fn answer<T>(call: impl Future<Output = zbus::Result<T>>) -> Result<T, Failure> {
    match tokio::time::timeout(ANSWER_TIMEOUT, call).await {
        Ok(answer) => Ok(answer.map_err(CallError::from)?),
        Err(_) => {
            let seconds = ANSWER_TIMEOUT.as_secs();
            Err(CallError::Unreachable(format!("it has not answered within {seconds} s")).into())
        }
    }
}

/// A connection to the daemon's bus.
async fn connect(common: &Common) -> Result<Client, Failure> {
    Ok(Client::connect(bus_address(common).as_deref(), !common.no_ask_password).await?)
}

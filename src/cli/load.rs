//! `plimsoll load` and `unload`: a job of the daemon, followed to its end.

use std::time::{Duration, Instant};

use zbus::OwnedObjectPath;

use super::agent::Agent;
use super::args::{Common, Load, Restore, Unload};
use super::failure::{Exit, Failure};
use super::output::{self, Progress};
use crate::dbus::client::{LoadOptions, next};
use crate::dbus::proxy::JobRemovedStream;
use crate::dbus::report::{Decision, Status, Step};
use crate::dbus::{CallError, Client};

/// Between two looks at a model whose job was lost with the daemon.
const LOOK: Duration = Duration::from_secs(1);
/// How long a daemon that went away may take to come back.
const ABSENT: Duration = Duration::from_secs(60);

pub(super) fn load(common: &Common, args: &Load) -> Result<(), Failure> {
    let _agent = Agent::start(common);
    let options = LoadOptions {
        context: args.context,
        instead_of: args.instead_of.clone(),
        force: args.force,
        no_restore: args.restore == Restore::No,
    };
    super::block_on(async {
        let client = super::connect(common).await?;
        // Subscribed before the call: a job may end before its path arrives.
        let mut removed = client.manager().receive_job_removed().await.map_err(CallError::from)?;
        let before = explain(&client, &args.name).await.map(|decision| decision.at_msec);
        let started = Instant::now();
        let job = client.load(&args.name, &options).await?;
        if args.no_wait {
            return output::print(&format!("loading {} as {}", args.name, job.as_str()));
        }
        let followed = follow(&client, &job, &mut removed, &args.name, "running").await;
        let took = started.elapsed();
        // What was decided now, not what was decided when it was started long ago.
        let decision = explain(&client, &args.name).await;
        let decision = decision.filter(|decision| Some(decision.at_msec) != before);
        if let Err(failure) = followed {
            // A unit that failed because it was refused: then that is what there is to say.
            let refused =
                decision.filter(|decision| decision.kind == "refuse" && failure.exit == Exit::Failed);
            return Err(refused.map_or(failure, |decision| Failure::new(Exit::Refused, decision.text)));
        }
        let mut text = format!("{} is ready after {}", args.name, duration(took));
        if let Some(decision) = decision {
            for line in consequences(&decision) {
                text.push('\n');
                text.push_str(&line);
            }
        }
        output::print(&text)
    })
}

pub(super) fn unload(common: &Common, args: &Unload) -> Result<(), Failure> {
    let _agent = Agent::start(common);
    super::block_on(async {
        let client = super::connect(common).await?;
        let mut removed = client.manager().receive_job_removed().await.map_err(CallError::from)?;
        let job = client.unload(&args.name).await?;
        if args.no_wait {
            return output::print(&format!("unloading {} as {}", args.name, job.as_str()));
        }
        follow(&client, &job, &mut removed, &args.name, "inactive").await?;
        output::print(&format!("{} is stopped", args.name))
    })
}

/// Waits for the end of `job`, showing its progress. Should the daemon go away, the unit's job
/// goes on in systemd: then the model's state is watched instead, until it is `goal`. `asked` may be an alias.
async fn follow(
    client: &Client,
    job: &OwnedObjectPath,
    removed: &mut JobRemovedStream,
    asked: &str,
    goal: &str,
) -> Result<(), Failure> {
    let mut shown = Progress::new();
    let mut instance = asked.to_owned();
    let mut owners = client.manager().inner().receive_owner_changed().await.map_err(CallError::from)?;
    // A job that is over already has no object any more; its end is in the stream of signals.
    let proxy = client.job(job).await.ok();
    let mut changes = match &proxy {
        Some(proxy) => {
            // The status and the unit know the model by its own name only.
            if let Ok(name) = proxy.instance().await {
                instance = name;
            }
            if let Ok(text) = proxy.progress().await {
                shown.show(&text);
            }
            Some(proxy.receive_progress_changed().await)
        }
        None => None,
    };
    let mut known_owner = false;
    loop {
        let change = async {
            match &mut changes {
                Some(changes) => next(changes).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            signal = next(removed) => {
                let Some(signal) = signal else { break };
                let args = signal.args().map_err(CallError::from)?;
                if args.job == *job {
                    shown.clear();
                    return ended(&args.instance, &args.result, &args.message);
                }
            }
            change = change => match change {
                Some(change) => if let Ok(text) = change.get().await { shown.show(&text) },
                None => changes = None,
            },
            owner = next(&mut owners) => match owner {
                // The daemon that was started for this very call.
                Some(Some(_)) if !known_owner => known_owner = true,
                _ => break,
            },
        }
    }
    shown.show("the daemon went away; the job goes on in systemd");
    watch(client, &instance, goal, &mut shown).await
}

fn ended(name: &str, result: &str, message: &str) -> Result<(), Failure> {
    let message = |otherwise: &str| {
        if message.is_empty() { format!("{name} {otherwise}") } else { message.to_owned() }
    };
    let (exit, otherwise) = match result {
        "done" => return Ok(()),
        "refused" => (Exit::Refused, "was refused"),
        _ => (Exit::Failed, "failed to load"),
    };
    let text = message(otherwise);
    let mut lines = text.splitn(2, '\n');
    let failure = Failure::new(exit, lines.next().unwrap_or_default());
    Err(match lines.next() {
        Some(hint) => failure.hint(hint.trim_start_matches("hint: ")),
        None if exit == Exit::Failed => failure.hint(format!("see 'journalctl -u llm@{name} -n 30'")),
        None => failure,
    })
}

/// Watches a model until it is in state `goal`, or ended.
async fn watch(client: &Client, name: &str, goal: &str, shown: &mut Progress) -> Result<(), Failure> {
    let mut seen = Instant::now();
    loop {
        tokio::time::sleep(LOOK).await;
        let state = match state(client, name).await {
            Ok(state) => {
                seen = Instant::now();
                state
            }
            Err(CallError::Unreachable(_)) if seen.elapsed() < ABSENT => continue,
            Err(error) => return Err(error.into()),
        };
        match state.as_str() {
            state if state == goal => return Ok(()),
            "failed" | "inactive" => {
                return Err(Failure::failed(format!("{name} is {state} now"))
                    .hint(format!("see 'systemctl status llm@{name}'")));
            }
            _ => shown.show(&format!("{name} is {state}")),
        }
    }
}

async fn state(client: &Client, name: &str) -> Result<String, CallError> {
    let text = client.manager().status().await?;
    let status: Status =
        serde_json::from_str(&text).map_err(|error| CallError::Protocol(error.to_string()))?;
    Ok(state_in(status, name))
}

/// A model that is not listed does not run: of further instances only those are that live or have failed.
fn state_in(status: Status, instance: &str) -> String {
    let model = status.models.into_iter().find(|model| model.instance == instance);
    model.map_or_else(|| "inactive".to_owned(), |model| model.state)
}

async fn explain(client: &Client, name: &str) -> Option<Decision> {
    let text = client.manager().explain(name).await.ok()?;
    serde_json::from_str(&text).ok()
}

/// What had to be done for it, in the past tense.
fn consequences(decision: &Decision) -> Vec<String> {
    let step = |step: &Step| match step.step.as_str() {
        "stop" => Some(format!("stopped for it: {} ({} freed)", step.instance, step.frees_bytes)),
        "reduce-context" => Some(format!("its context was reduced from {} to {}", step.from, step.to)),
        "drop-cache" => Some(format!("dropped from the page cache: {}", step.frees_bytes)),
        "drop-all-cache" => Some(format!("dropped of all page cache: {}", step.frees_bytes)),
        _ => None,
    };
    decision.steps.iter().filter_map(step).collect()
}

/// `4 s`, `3 min 20 s`.
fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    if seconds < 60 { format!("{seconds} s") } else { format!("{} min {} s", seconds / 60, seconds % 60) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::Bytes;
    use crate::dbus::report::Model;

    #[test]
    fn results_of_jobs_become_exit_codes() {
        assert_eq!(ended("a", "done", ""), Ok(()));
        let refused = ended("a", "refused", "a needs 90.0 GiB\nhint: plimsoll load a -c 4096").unwrap_err();
        assert_eq!((refused.exit, refused.message.as_str()), (Exit::Refused, "a needs 90.0 GiB"));
        assert_eq!(refused.hint.as_deref(), Some("plimsoll load a -c 4096"));
        let failed = ended("a", "failed", "").unwrap_err();
        assert_eq!((failed.exit, failed.message.as_str()), (Exit::Failed, "a failed to load"));
        assert!(failed.hint.is_some_and(|hint| hint.contains("journalctl")));
    }

    #[test]
    fn what_is_not_listed_does_not_run() {
        let model = Model { instance: "x".into(), state: "running".into(), ..Model::default() };
        let status = || Status { models: vec![model.clone()], ..Status::default() };
        assert_eq!(state_in(status(), "x"), "running");
        assert_eq!(state_in(status(), "x@2"), "inactive");
    }

    #[test]
    fn what_was_stopped_is_named() {
        let step = Step {
            step: "stop".into(),
            instance: "b".into(),
            frees_bytes: Bytes::gib(20),
            ..Step::default()
        };
        let decision = Decision { steps: vec![step], ..Decision::default() };
        assert_eq!(consequences(&decision), ["stopped for it: b (20.0 GiB freed)"]);
    }

    #[test]
    fn durations_are_short() {
        assert_eq!(duration(Duration::from_millis(4900)), "4 s");
        assert_eq!(duration(Duration::from_secs(200)), "3 min 20 s");
    }
}

//! Jobs: loads and unloads that somebody on the bus asked for and may follow.

use std::collections::BTreeMap;

use crate::config::Instance;
use crate::policy::{ActionId, Outcome};

/// Effects of jobs are numbered from here, far from those of the decisions.
const FIRST_EFFECT: ActionId = 1 << 62;

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobKind {
    /// Starts a unit.
    Load,
    /// Stops one.
    Unload,
}

impl JobKind {
    /// As on the bus.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Load => "load",
            Self::Unload => "unload",
        }
    }
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobResult {
    /// As wanted.
    Done,
    /// The gate refused the model.
    Refused,
    /// Anything else.
    Failed,
}

impl JobResult {
    /// As on the bus.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

/// A job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// Its number, also in its path on the bus.
    pub number: u32,
    /// Whom it is about.
    pub instance: Instance,
    /// What it does.
    pub kind: JobKind,
}

/// The jobs under way.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    running: BTreeMap<u32, (Job, Option<String>)>,
}

impl Jobs {
    /// Takes a job in; returns the id of its effect.
    pub(super) fn begin(&mut self, job: Job) -> ActionId {
        let id = FIRST_EFFECT + u64::from(job.number);
        self.running.insert(job.number, (job, None));
        id
    }

    /// The loads of an instance that are under way.
    pub(super) fn loads_of(&self, instance: &Instance) -> Vec<u32> {
        let of = |(job, _): &&(Job, Option<String>)| job.instance == *instance && job.kind == JobKind::Load;
        self.running.values().filter(of).map(|(job, _)| job.number).collect()
    }

    /// Remembers that the gate refused the instance, and why.
    pub(super) fn refused(&mut self, instance: &Instance, why: &str) {
        for (job, refusal) in self.running.values_mut() {
            if job.instance == *instance && job.kind == JobKind::Load {
                *refusal = Some(why.to_owned());
            }
        }
    }

    /// The job whose effect has ended, its result and a sentence; none when `id` is no job's.
    pub(super) fn end(&mut self, id: ActionId, outcome: &Outcome) -> Option<(Job, JobResult, String)> {
        let number = u32::try_from(id.checked_sub(FIRST_EFFECT)?).ok()?;
        let (job, refusal) = self.running.remove(&number)?;
        Some(match (outcome, refusal) {
            (Outcome::Done, _) => (job, JobResult::Done, String::new()),
            (Outcome::Failed(_), Some(why)) => (job, JobResult::Refused, why),
            (Outcome::Failed(why), None) => (job, JobResult::Failed, why.clone()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(number: u32, kind: JobKind) -> Job {
        Job { number, instance: "a".parse().unwrap(), kind }
    }

    #[test]
    fn a_refused_load_ends_with_the_reason() {
        let mut jobs = Jobs::default();
        let load = jobs.begin(job(1, JobKind::Load));
        let unload = jobs.begin(job(2, JobKind::Unload));
        assert_eq!(jobs.loads_of(&"a".parse().unwrap()), [1]);
        jobs.refused(&"a".parse().unwrap(), "too large");
        let failed = Outcome::Failed("exit code 75".into());
        assert_eq!(jobs.end(load, &failed).unwrap().1, JobResult::Refused);
        let (_, result, message) = jobs.end(unload, &failed).unwrap();
        assert_eq!((result, message.as_str()), (JobResult::Failed, "exit code 75"));
        assert_eq!(jobs.end(load, &failed), None);
        assert_eq!(jobs.end(7, &Outcome::Done), None, "an effect of the decisions");
    }
}

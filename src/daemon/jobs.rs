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

/// A job under way.
#[derive(Debug)]
struct Running {
    job: Job,
    /// What was told of it last.
    told: String,
    /// What the gate refused it with.
    refusal: Option<String>,
}

/// The jobs under way.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    running: BTreeMap<u32, Running>,
}

impl Jobs {
    /// Takes a job in; returns the id of its effect.
    pub(super) fn begin(&mut self, job: Job) -> ActionId {
        let id = FIRST_EFFECT + u64::from(job.number);
        self.running.insert(job.number, Running { job, told: String::new(), refusal: None });
        id
    }

    fn loads_of<'a>(&'a mut self, instance: &'a Instance) -> impl Iterator<Item = &'a mut Running> {
        let of = move |r: &&mut Running| r.job.instance == *instance && r.job.kind == JobKind::Load;
        self.running.values_mut().filter(of)
    }

    /// The loads of an instance that have not been told this last.
    pub(super) fn news_for_loads(&mut self, instance: &Instance, text: &str) -> Vec<u32> {
        let new = self.loads_of(instance).filter(|running| running.told != text);
        let told = new.map(|running| {
            text.clone_into(&mut running.told);
            running.job.number
        });
        told.collect()
    }

    /// Remembers that the gate refused the instance, and why.
    pub(super) fn refused(&mut self, instance: &Instance, why: &str) {
        for running in self.loads_of(instance) {
            running.refusal = Some(why.to_owned());
        }
    }

    /// The job whose effect has ended, its result and a sentence; none when `id` is no job's.
    pub(super) fn end(&mut self, id: ActionId, outcome: &Outcome) -> Option<(Job, JobResult, String)> {
        let number = u32::try_from(id.checked_sub(FIRST_EFFECT)?).ok()?;
        let Running { job, refusal, .. } = self.running.remove(&number)?;
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
        let a = "a".parse().unwrap();
        assert_eq!(jobs.news_for_loads(&a, "loading"), [1]);
        assert!(jobs.news_for_loads(&a, "loading").is_empty(), "told already");
        jobs.refused(&a, "too large");
        let failed = Outcome::Failed("exit code 75".into());
        assert_eq!(jobs.end(load, &failed).unwrap().1, JobResult::Refused);
        let (_, result, message) = jobs.end(unload, &failed).unwrap();
        assert_eq!((result, message.as_str()), (JobResult::Failed, "exit code 75"));
        assert_eq!(jobs.end(load, &failed), None);
        assert_eq!(jobs.end(7, &Outcome::Done), None, "an effect of the decisions");
    }
}

//! What the daemon's `Fit` and `FitFiles` answer with: the object of `plimsoll fit --json`.

use std::fs::File;
use std::path::PathBuf;

use super::machine::Target;
use super::subject::Subject;
use super::{Pricer, contexts, report};
use crate::cli::failure::{Exit, Failure};
use crate::dbus::service::Quotes;
use crate::dbus::{Error, Kind};

/// The quotes for this machine, of the models configured below a root directory.
#[derive(Clone, Debug)]
pub struct Local {
    /// `/` for this machine's own configuration.
    pub root: PathBuf,
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        let kind = if failure.exit == Exit::Config { Kind::Config } else { Kind::Failed };
        let hint = failure.hint.map(|hint| format!("\nhint: {hint}")).unwrap_or_default();
        Self::new(kind, failure.message + &hint)
    }
}

fn quote(subject: &Subject, asked: &[u64]) -> Result<String, Failure> {
    let target = Target::here(subject.reserve)?;
    let pricer = Pricer::new(subject, &target)?;
    let contexts = contexts(asked, subject, pricer.facts.context_train);
    let lines = contexts.into_iter().map(|context| pricer.price(context)).collect::<Result<Vec<_>, _>>()?;
    Ok(report::json(subject, &target, &lines).to_string())
}

impl Quotes for Local {
    fn configured(&self, name: &str, contexts: &[u64]) -> Result<String, Error> {
        Ok(quote(&Subject::configured(&self.root, name)?, contexts)?)
    }

    fn files(
        &self,
        files: Vec<(PathBuf, File)>,
        arguments: &[String],
        contexts: &[u64],
    ) -> Result<String, Error> {
        Ok(quote(&Subject::opened(files, arguments)?, contexts)?)
    }
}

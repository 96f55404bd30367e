//! The rules that hold, from the configuration and from what was set by hand.

use std::sync::Arc;

use super::input::{Input, Publication};
use super::run::Daemon;
use crate::policy::request::auto_reserve;
use crate::policy::{Action, Mode, Rules};
use crate::ports::Rulebook;

impl Daemon {
    pub(super) fn configure(&mut self, rulebook: Rulebook, first: bool) {
        // What was read before what is in use has been overtaken on its way here.
        let overtaken = rulebook.reading < self.rulebook.reading;
        let rulebook = if overtaken { self.rulebook.clone() } else { rulebook };
        if !first && rulebook == self.rulebook && self.mode_as(&rulebook) == self.core.rules().mode {
            return;
        }
        for problem in rulebook.problems.iter().filter(|problem| !self.rulebook.problems.contains(problem)) {
            tracing::warn!("configuration: {problem}");
        }
        self.apply(&rulebook);
        self.rulebook = rulebook;
    }

    /// Has the configuration read again, on another thread.
    pub(super) fn reload(&self) {
        let _ = self.parts.notifier.reloading();
        let catalog = Arc::clone(&self.parts.catalog);
        let (sender, reloaded) = (self.sender.clone(), self.parts.reloaded.clone());
        tokio::task::spawn_blocking(move || {
            catalog.reload();
            if let Some(reloaded) = reloaded {
                reloaded();
            }
            let _ = sender.send(Input::Reloaded(catalog.rulebook().map(Box::new)));
        });
    }

    pub(super) fn mode_as(&self, rulebook: &Rulebook) -> Mode {
        self.mode.unwrap_or(rulebook.mode)
    }

    pub(super) fn apply(&mut self, rulebook: &Rulebook) {
        let mode = self.mode_as(rulebook);
        let reserve = rulebook.reserve.unwrap_or_else(|| auto_reserve(&self.machine.memory));
        let (peers, drop_all_cache, ladder) = (rulebook.peers, rulebook.drop_all_cache, rulebook.ladder);
        let rules = Rules { reserve, mode, peers, drop_all_cache, ladder };
        if mode != self.core.rules().mode {
            tracing::info!("mode {mode:?}");
            self.tell(Publication::Mode(mode));
        }
        let priorities =
            rulebook.models.iter().filter_map(|model| Some((model.name.clone()?, model.priority)));
        self.core.configure(rules, priorities.collect());
        // What is configured is told with the next step.
        self.digest = 0;
        let _ = self.sender.send(Input::Changed);
    }

    pub(super) fn save_now(&mut self) {
        // The decisions hand out what they need saved; the mode rides along with the next of them,
        // or goes alone.
        let saved = self.core.saved();
        self.outbox.push_back(Action::Save(Box::new(saved)));
    }
}

//! One model with one engine on one machine, ready to be priced at any context.

use std::path::Path;

use super::files::Known;
use super::opinions::{corrected, digest};
use super::price::{self, Priced};
use crate::engine::opinion::{self, Excess};
use crate::engine::{Effective, Version};
use crate::fit::{self, Beside, Facts, FileRange, FitError, Settings};
use crate::ledger::{FileId, Gpu};
use crate::policy::Rung;
use crate::ports::Wish;

/// See the module's text.
#[derive(Clone, Debug)]
pub(super) struct Pricing<'a> {
    facts: &'a Facts,
    effective: &'a Effective,
    gpus: &'a [Gpu],
    files: Vec<FileId>,
    /// Stands for the files as they are, the program, and what it is given beyond its settings.
    identity: String,
    /// The program's version, where it is known.
    version: String,
    /// By how much the engine's own fit tool is above the estimate, at every context.
    pub excess: Excess,
}

impl<'a> Pricing<'a> {
    /// `engine` is the program and its version; `gpus` are those that it sees.
    pub fn new(
        facts: &'a Facts,
        effective: &'a Effective,
        known: &Known,
        engine: (&Path, Option<&Version>),
        environment: impl Iterator<Item = (&'a String, &'a String)>,
        gpus: &'a [Gpu],
    ) -> Self {
        // What llama.cpp's own variables set is in the settings.
        let environment: Vec<_> = environment.filter(|(name, _)| !name.starts_with("LLAMA_ARG_")).collect();
        let (program, version) = engine;
        let version = version.map(ToString::to_string).unwrap_or_default();
        let identity =
            format!("{:?} {program:?} {:?} {environment:?}", known.identities(), effective.passed_on);
        Self { facts, effective, gpus, files: known.files(), identity, version, excess: Excess::default() }
    }

    /// The settings to run with at `context`; see [`price::needed`].
    pub fn needed(&self, context: u64) -> Result<Priced, FitError> {
        price::needed(self.facts, self.effective, context, self.gpus)
    }

    /// The same with what is nice to have; see [`price::spacious`].
    pub fn spacious(&self, needed: &Priced) -> Result<Option<Priced>, FitError> {
        price::spacious(self.facts, self.effective, needed, self.gpus)
    }

    /// Which parts of the model's files every token touches; see [`fit::always_touched`].
    pub fn always_touched(&self, settings: &Settings) -> Result<Vec<FileRange>, FitError> {
        fit::always_touched(self.facts, settings, &price::devices(self.gpus))
    }

    /// What it is charged at `context`.
    pub fn rung(&self, context: u64, (settings, estimate): &Priced) -> Rung {
        let footprint = price::charge(self.facts, estimate, &self.files, settings, self.gpus);
        let mut rung = Rung { context, footprint, ..Rung::default() };
        rung.basis.key = self.key(settings);
        rung.basis.engine.clone_from(&self.version);
        corrected(rung, &self.excess, &price::touched(self.facts, settings, self.gpus))
    }

    /// The same for the same files, settings and program.
    pub fn key(&self, settings: &Settings) -> String {
        digest(&format!("{} {settings:?}", self.identity))
    }

    /// What an opinion on `question` is remembered by: everything but the context, which is the other.
    pub fn asked_about(&self, question: &[String]) -> Option<(String, u64)> {
        let (context, rest) = opinion::context_apart(question)?;
        Some((digest(&format!("{} {} {rest:?}", self.identity, self.version)), context))
    }

    /// The opinion that comes with a wish: about which context it is, and by how much it is above the
    /// estimate. It comes from the unit's own user, who could as well take the memory.
    ///
    /// # Errors
    /// It is about other settings than `settings`, of which `question` was made, or makes no sense: one
    /// sentence.
    pub fn second(
        &self,
        wish: &Wish,
        question: &[String],
        settings: &Settings,
    ) -> Result<Option<(u64, Excess)>, String> {
        let said = |name: &str| wish.engine.get(name);
        let (Some(asked), Some(answer)) = (said(opinion::QUESTION), said(opinion::ANSWER)) else {
            return Ok(None);
        };
        let asked: Vec<String> = serde_json::from_str(asked).map_err(|error| error.to_string())?;
        let rest = opinion::context_apart(question).map(|(_, rest)| rest);
        let (context, _) = opinion::context_apart(&asked)
            .filter(|(_, theirs)| Some(theirs) == rest.as_ref())
            .ok_or_else(|| format!("{} was asked about other settings", opinion::TOOL))?;
        let said = opinion::parse(answer).ok_or_else(|| format!("{} has printed no table", opinion::TOOL))?;
        let mut alone = self.facts.clone();
        alone.beside = Beside::default();
        let settings = Settings { context, ..opinion::in_its_terms(settings) };
        let ours = fit::estimate(&alone, &settings, &price::devices(self.gpus))
            .map_err(|error| error.to_string())?;
        Ok(Some((context, opinion::compare(&said, &ours)?.excess)))
    }
}

//! The configured models: what each would take, and what to execute for it.

mod engines;
mod files;
mod ladder;
mod opinions;
mod price;
mod pricing;
mod sources;

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use engines::{Engines, Seen};
use files::{Headers, Known};
use ladder::{Asked, contexts};
use opinions::Opinions;
use price::Priced;
use pricing::Pricing;
use sources::{Reading, Sources};

use crate::bytes::Bytes;
use crate::config::{self, Instance, Loaded, Model, ModelName, NotFound, Reserve, Workload};
use crate::engine::opinion::{self, Excess};
use crate::engine::{self, Effective};
use crate::fit::{Facts, FitError, Settings};
use crate::gguf::Identity;
use crate::host::Server;
use crate::ledger::{Footprint, Gpu, GpuKind};
use crate::policy::{Mode, Peers, Request, Rung};
use crate::ports::{Catalog, CatalogError, Launch, ModelInfo, Rulebook, Wish};

/// [`Catalog`] over the configuration below a root directory.
pub struct RealCatalog {
    sources: Sources,
    headers: Mutex<Headers>,
    engines: Mutex<Engines>,
    opinions: Mutex<Opinions>,
}

/// What a fit tool is to be asked.
#[derive(Clone, Debug)]
pub struct Question {
    /// Its arguments.
    pub arguments: Vec<String>,
    /// The files that the answer depends on.
    pub files: Vec<Identity>,
}

/// A model on its way to a request.
struct Subject {
    instance: Instance,
    loaded: Arc<Loaded>,
    settings: Arc<config::Daemon>,
    name: ModelName,
}

impl Subject {
    fn model(&self) -> Result<&Model, CatalogError> {
        let gone = || CatalogError::NotFound(format!("there is no model '{}'", self.name));
        self.loaded.models.get(&self.name).ok_or_else(gone)
    }
}

impl From<NotFound> for CatalogError {
    fn from(error: NotFound) -> Self {
        match error {
            NotFound::Broken { .. } => Self::Config(error.to_string()),
            NotFound::Name(_) | NotFound::Lease(_) | NotFound::Unknown { .. } => {
                Self::NotFound(error.to_string())
            }
        }
    }
}

fn config_error(error: impl ToString) -> CatalogError {
    CatalogError::Config(error.to_string())
}

impl RealCatalog {
    /// The models configured below `root`, `/` for this machine.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self {
            sources: Sources::new(root),
            headers: Mutex::default(),
            engines: Mutex::default(),
            opinions: Mutex::default(),
        }
    }

    /// The files of all models that are configured, as far as they are known by name.
    #[must_use]
    pub fn model_files(&self) -> Vec<PathBuf> {
        let (loaded, _) = self.current();
        let paths = loaded.models.values().filter_map(|model| model.model.as_deref());
        paths.flat_map(|path| crate::gguf::shard_paths(path).unwrap_or_default()).collect()
    }

    /// What is configured of the daemon's own swapfiles.
    #[must_use]
    pub fn swap(&self) -> config::Swap {
        self.current().1.swap.clone()
    }

    /// The instance that a systemd unit is: a model, or what was adopted when the configuration was read last. No file
    /// is looked at, so it may be asked on the daemon's loop.
    #[must_use]
    pub fn instance_of_unit(&self, unit: &str) -> Option<Instance> {
        let adopted = || {
            let instance: Instance = unit.parse().ok()?;
            self.sources.last().settings.adopted.contains_key(&instance.model).then_some(instance)
        };
        Instance::from_unit(unit).or_else(adopted)
    }

    /// The units of others that are adopted. Looks at the configuration's files, as everything else here does.
    #[must_use]
    pub fn adopted(&self) -> Vec<Instance> {
        self.current().1.adopted.keys().cloned().map(Instance::first).collect()
    }

    /// What a unit of somebody else takes: as declared, and beyond that as measured.
    fn adoption(&self, instance: &Instance, wish: &Wish) -> Result<Request, CatalogError> {
        let (_, settings) = self.current();
        let not =
            || CatalogError::NotFound(format!("{instance} is not adopted: plimsoll.toml names what is"));
        let adopted = settings.adopted.get(&instance.model).ok_or_else(not)?;
        let memory = adopted.memory.unwrap_or_default();
        let footprint = Footprint { private: memory, ..Footprint::default() };
        Ok(Request {
            invocation: wish.invocation.clone(),
            priority: adopted.priority,
            pinned: adopted.pinned,
            ladder: vec![Rung { footprint, ..Rung::default() }],
            reload: memory,
            ..Request::of(instance.clone())
        })
    }

    /// Where an instance answers, and the file with its keys; none where that is not known.
    #[must_use]
    pub fn place(&self, instance: &Instance) -> Option<(Server, Option<PathBuf>)> {
        let (loaded, _) = self.current();
        let model = loaded.models.get(&instance.model)?;
        Some((Server::at(&model.host, instance.port(model.port)?)?, model.api_key_file.clone()))
    }

    fn current(&self) -> (Arc<Loaded>, Arc<config::Daemon>) {
        let Reading { loaded, settings, .. } = self.sources.current();
        (loaded, settings)
    }

    fn subject(&self, wish: &Wish) -> Result<Subject, CatalogError> {
        let none = || CatalogError::NotFound("no model was named".to_owned());
        let instance = wish.instance.clone().ok_or_else(none)?;
        let (loaded, settings) = self.current();
        let name = loaded.instance(&instance.to_string())?.1.name.clone();
        Ok(Subject { instance, loaded, settings, name })
    }

    /// The settings of a llama-server, and the facts of its model and of what is loaded beside it.
    fn opened(&self, model: &Model, wish: &Wish) -> Result<(Effective, Arc<Known>), CatalogError> {
        let effective = engine::effective(model, &wish.environment).map_err(config_error)?;
        let needed = engine::files(model, Some(&effective)).map_err(config_error)?;
        let known = files::known(&self.headers, files::opened(&needed, &wish.files)?)?;
        Ok((effective, known))
    }
}

impl RealCatalog {
    /// The machine's GPUs as the subject's engine sees them, and its version.
    fn seen_by_engine(&self, subject: &Subject, wish: &Wish, gpus: &[Gpu]) -> Result<Seen, CatalogError> {
        let program = engine::locate(subject.model()?, &subject.settings).map_err(config_error)?.word();
        let mut engines = self.engines.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(engines.seen(program, &wish.engine, gpus))
    }

    /// What the fit tool beside the model's engine is to be asked before `wish` is uttered; none where it
    /// has no say.
    ///
    /// # Errors
    /// What is wrong with the model or its files.
    pub fn question(&self, wish: &Wish, gpus: &[Gpu]) -> Result<Option<Question>, CatalogError> {
        let subject = self.subject(wish)?;
        let model = subject.model()?;
        let (None, None, Some(file)) = (&model.command, model.memory, &model.model) else { return Ok(None) };
        let (effective, known) = self.opened(model, wish)?;
        let Ok(facts) = facts(&known)? else { return Ok(None) };
        let seen = self.seen_by_engine(&subject, wish, gpus)?;
        let pricing = seen.pricing(facts, &effective, &known, model, wish);
        let wanted =
            contexts(asked(model, &effective, wish, facts)).allowed.first().copied().unwrap_or_default();
        let (settings, _) = pricing.needed(wanted).map_err(config_error)?;
        let arguments = opinion::question(file, &settings);
        Ok(Some(Question { arguments, files: known.identities().to_vec() }))
    }

    /// By how much the engine's own fit tool is above the estimate for `settings`: as it says now, or as it
    /// was remembered; nothing where nobody asked it.
    fn second_opinion(
        &self,
        pricing: &Pricing<'_>,
        model: &Model,
        wish: &Wish,
        settings: &Settings,
    ) -> Excess {
        let Some(file) = &model.model else { return Excess::default() };
        let question = opinion::question(file, settings);
        let Some((key, context)) = pricing.asked_about(&question) else { return Excess::default() };
        let mut opinions = self.opinions.lock().unwrap_or_else(PoisonError::into_inner);
        match pricing.second(wish, &question, settings) {
            Ok(Some((context, excess))) => {
                let more = Bytes(excess.total());
                if !more.is_zero() {
                    tracing::info!(
                        "{}: {} says {more} more than the estimate, which counts",
                        model.name,
                        opinion::TOOL
                    );
                }
                opinions.keep(&key, context, excess);
            }
            Ok(None) => {}
            Err(why) => tracing::info!("{}: the estimate counts alone: {why}", model.name),
        }
        opinions.find(&key, context).unwrap_or_default()
    }
}

impl Seen {
    /// A model with this engine, which sees what is left of the machine's GPUs.
    fn pricing<'a>(
        &'a self,
        facts: &'a Facts,
        effective: &'a Effective,
        known: &Known,
        model: &'a Model,
        wish: &'a Wish,
    ) -> Pricing<'a> {
        let environment = model.environment.0.iter().chain(&wish.environment);
        let engine = (&*self.program, self.version.as_ref());
        Pricing::new(facts, effective, known, engine, environment, &self.gpus)
    }
}

/// The facts, or why the size is unknown; an error where the file is no model at all.
fn facts(known: &Known) -> Result<Result<&Facts, String>, CatalogError> {
    match &known.facts {
        Ok(facts) => {
            let all = [Some(facts), facts.beside.draft.as_deref()];
            Ok(match all.into_iter().flatten().find(|facts| !facts.known) {
                Some(unknown) => Err(format!("the architecture {} is unknown", unknown.architecture)),
                None => Ok(facts),
            })
        }
        Err(FitError::Unknown(why)) => Ok(Err(why.clone())),
        Err(error) => Err(config_error(error)),
    }
}

/// What is declared instead of estimated.
fn declared(model: &Model, memory: Bytes, gpus: &[Gpu]) -> Footprint {
    let gpu = model.gpu_memory.unwrap_or_default();
    let unified = gpus.first().is_none_or(|gpu| gpu.kind == GpuKind::Unified);
    Footprint {
        // GPU memory of an APU is part of what was declared.
        private: if unified { memory - gpu } else { memory },
        swapped: Bytes::ZERO,
        mapped: Vec::new(),
        gpus: if gpu.is_zero() { Vec::new() } else { vec![gpu] },
    }
}

fn asked(model: &Model, effective: &Effective, wish: &Wish, facts: &Facts) -> Asked {
    let context = effective.settings.context;
    Asked {
        once: wish.context,
        configured: (context > 0).then_some(context),
        least: model.context_min,
        trained: facts.context_train,
        slots: effective.settings.parallel.map_or(1, u64::from),
    }
}

impl Catalog for RealCatalog {
    fn models(&self) -> Vec<ModelInfo> {
        let (loaded, settings) = self.current();
        infos(&loaded, &settings)
    }

    fn resolve(&self, text: &str) -> Result<Instance, CatalogError> {
        let (loaded, settings) = self.current();
        if let Ok(instance) = text.parse::<Instance>()
            && !instance.lease
            && settings.adopted.contains_key(&instance.model)
        {
            return Ok(instance);
        }
        Ok(loaded.instance(text)?.0)
    }

    fn rulebook(&self) -> Option<Rulebook> {
        let Reading { loaded, settings, number } = self.sources.current();
        Some(Rulebook {
            reading: number,
            mode: match settings.mode {
                config::Mode::Enforce => Mode::Enforce,
                config::Mode::Observe => Mode::Observe,
            },
            reserve: match settings.reserve {
                Reserve::Auto => None,
                Reserve::Size(size) => Some(size),
            },
            peers: match settings.peers {
                config::Peers::Keep => Peers::Keep,
                config::Peers::ReplaceIdle => Peers::ReplaceIdle,
            },
            drop_all_cache: settings.page_cache.drop_all,
            ladder: settings.pressure.ladder,
            models: infos(&loaded, &settings),
            problems: loaded.problems.iter().map(ToString::to_string).collect(),
        })
    }

    fn reload(&self) -> Vec<String> {
        let Reading { loaded, .. } = self.sources.read();
        loaded.problems.iter().filter(|problem| problem.is_error()).map(ToString::to_string).collect()
    }

    fn request(&self, wish: &Wish, gpus: &[Gpu]) -> Result<Request, CatalogError> {
        if let Some(instance) = wish.instance.as_ref().filter(|instance| instance.is_foreign()) {
            return self.adoption(instance, wish);
        }
        let subject = self.subject(wish)?;
        let model = subject.model()?;
        let mut request = Request {
            invocation: wish.invocation.clone(),
            priority: model.priority,
            pinned: model.pinned,
            ladder: Vec::new(),
            ttl: model.ttl.map(|ttl| u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX)),
            drain: u64::try_from(model.drain.as_millis()).unwrap_or(u64::MAX),
            may_swap: model.workload == Workload::Batch,
            instead_of: wish.instead_of.clone(),
            force: wish.force,
            no_restore: wish.no_restore,
            explicit: wish.explicit,
            ..Request::of(subject.instance.clone())
        };
        let declared = model.memory.map(|memory| {
            let context = wish.context.or(model.context).unwrap_or_default();
            Rung { context, footprint: declared(model, memory, gpus), ..Rung::default() }
        });
        if model.command.is_some() {
            request.reload = declared.as_ref().map(|rung| rung.footprint.total()).unwrap_or_default();
            request.ladder.extend(declared);
            return Ok(request);
        }
        let (effective, known) = self.opened(model, wish)?;
        request.reload = Bytes(known.file_bytes);
        if let Some(declared) = declared {
            request.ladder.push(declared);
            return Ok(request);
        }
        let facts = match facts(&known)? {
            Ok(facts) => facts,
            Err(why) => {
                request.unknown = Some(why);
                return Ok(request);
            }
        };
        let seen = self.seen_by_engine(&subject, wish, gpus)?;
        let mut pricing = seen.pricing(facts, &effective, &known, model, wish);
        let contexts = contexts(asked(model, &effective, wish, facts));
        // The wanted context comes twice: with what is nice to have, and without.
        let wanted = contexts.allowed.first().copied().unwrap_or_default();
        let first = pricing.needed(wanted);
        if let Ok((settings, _)) = &first {
            pricing.excess = self.second_opinion(&pricing, model, wish, settings);
        }
        let (always, may_swap) = (Cell::new(Bytes::ZERO), Cell::new(Bytes::MAX));
        let rung = |context: u64, priced: &Priced| {
            let (_, estimate) = priced;
            always.set(always.get().max(Bytes(estimate.mapped_always_bytes)));
            may_swap.set(may_swap.get().min(Bytes(estimate.anonymous_experts_bytes)));
            pricing.rung(context, priced)
        };
        let price = |context: u64| Ok(rung(context, &pricing.needed(context)?));
        let ladder = || {
            let spacious = pricing.spacious(&first?)?;
            let ladder = spacious.map(|spacious| Ok(rung(wanted, &spacious)));
            ladder.into_iter().chain(contexts.allowed.iter().copied().map(price)).collect()
        };
        let ladder: Result<Vec<Rung>, FitError> = ladder();
        match ladder {
            Ok(ladder) => request.ladder = ladder,
            Err(FitError::Unknown(why)) => {
                request.unknown = Some(why);
                return Ok(request);
            }
            Err(error) => return Err(config_error(error)),
        }
        request.stream = effective.streams.then_some(always.get());
        request.expert = Bytes(facts.expert_bytes());
        request.swap = effective.swaps.then_some(may_swap.get());
        request.advice = contexts.advised.into_iter().filter_map(|context| price(context).ok()).collect();
        Ok(request)
    }

    fn launch(&self, wish: &Wish, rung: &Rung, gpus: &[Gpu]) -> Result<Launch, CatalogError> {
        let subject = self.subject(wish)?;
        let model = subject.model()?;
        let launch = if model.command.is_some() {
            engine::Launch::command(model, &subject.instance).map_err(config_error)?
        } else {
            let (effective, known) = self.opened(model, wish)?;
            let seen = self.seen_by_engine(&subject, wish, gpus)?;
            let (settings, kept) = match facts(&known)? {
                Ok(facts) if rung.context > 0 => {
                    let pricing = seen.pricing(facts, &effective, &known, model, wish);
                    let needed = pricing.needed(rung.context).map_err(config_error)?;
                    let spacious = pricing.spacious(&needed).map_err(config_error)?;
                    // What was admitted is told by its key.
                    let admitted = |(settings, _): &Priced| pricing.key(settings) == rung.basis.key;
                    let (settings, estimate) = spacious.filter(admitted).unwrap_or(needed);
                    let streams = rung.footprint.mapped_bytes() < Bytes(estimate.mapped_bytes);
                    let kept = streams.then(|| pricing.always_touched(&settings)).transpose();
                    (settings, kept.map_err(config_error)?)
                }
                // Its size is unknown or declared: the engine gets what is configured, but for the context that was
                // asked for.
                _ => {
                    let context = wish.context.unwrap_or(effective.settings.context);
                    (Settings { context, ..effective.settings.clone() }, None)
                }
            };
            // Of an image `plimsoll run` makes podman's command line, for which one has to look at the machine as root.
            let executable = engine::locate(model, &subject.settings).map_err(config_error)?.word();
            let version = seen.version.as_ref();
            let instance = &subject.instance;
            let mut launch =
                engine::Launch::llama_server(model, instance, &executable, &effective, &settings, version)
                    .map_err(config_error)?;
            launch.environment.extend(kept.as_deref().and_then(engine::kept::variable));
            launch
        };
        // Those stay off the bus: `plimsoll run` reads them from the configuration itself.
        let environment =
            launch.environment.into_iter().filter(|(name, _)| !config::sounds_secret(name)).collect();
        Ok(Launch { argv: launch.argv, environment })
    }
}

/// Everything that is configured and shown.
fn infos(loaded: &Loaded, settings: &config::Daemon) -> Vec<ModelInfo> {
    let good = loaded.models.values().map(info);
    // One whose file is broken just now is still owed its return.
    let broken = loaded.broken.iter().map(|(name, problems)| ModelInfo {
        name: Some(name.clone()),
        priority: config::DEFAULT_PRIORITY,
        broken: problems.iter().find(|problem| problem.is_error()).map(ToString::to_string),
        ..ModelInfo::default()
    });
    let adopted = settings.adopted.iter().map(|(name, adopted)| ModelInfo {
        name: Some(name.clone()),
        priority: adopted.priority,
        pinned: adopted.pinned,
        ..ModelInfo::default()
    });
    good.chain(broken).chain(adopted).collect()
}

fn info(model: &Model) -> ModelInfo {
    ModelInfo {
        name: Some(model.name.clone()),
        priority: model.priority,
        pinned: model.pinned,
        context: model.context.unwrap_or_default(),
        parallel: u64::from(model.parallel),
        address: format!("{}:{}", model.host, model.port),
        aliases: model.aliases.iter().map(ToString::to_string).collect(),
        modes: model.modes.clone(),
        broken: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_a_unit_is_is_known_without_a_look_at_files() {
        let root = std::env::temp_dir().join(format!("plimsoll-whose-{}", std::process::id()));
        let etc = root.join("etc/plimsoll");
        std::fs::create_dir_all(&etc).unwrap();
        let adopt = |unit: &str| {
            std::fs::write(etc.join("plimsoll.toml"), format!("[adopt.\"{unit}\"]\npriority = 40\n"))
                .unwrap();
        };
        adopt("ollama.service");
        let catalog = RealCatalog::new(&root);
        let whose = |unit: &str| catalog.instance_of_unit(unit).map(|instance| instance.to_string());
        assert_eq!(whose("llm@a.service"), Some("a".to_owned()));
        assert_eq!(whose("ollama.service"), Some("ollama.service".to_owned()));
        adopt("comfyui.service");
        assert_eq!(whose("comfyui.service"), None, "as it was read last");
        // Whoever may block looks at the files, and from then on it is known.
        assert_eq!(catalog.adopted(), ["comfyui.service".parse().unwrap()]);
        assert_eq!(whose("comfyui.service"), Some("comfyui.service".to_owned()));
        assert_eq!(whose("ollama.service"), None);
        std::fs::remove_dir_all(root).unwrap();
    }
}

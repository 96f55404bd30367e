//! Calls: from the bus through the decisions and back.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::handle::{Asker, Fault, LoadOptions};
use super::input::{Command, Input, Looking, Publication, Purpose, Swapping, Waiting, Weighed};
use super::jobs::{Job, JobKind};
use super::report::Status;
use super::run::{Daemon, FIRST_TICKET};
use super::view;
use crate::config::Instance;
use crate::ledger::{Machine, UnitState};
use crate::policy::core::Effect;
use crate::policy::{Action, ActionId, Event, Outcome, Refusal, Request, Rung};
use crate::ports::{CatalogError, Wish};

/// Effects for people's swapfiles and looks are numbered from here, apart from those of decisions and jobs.
const FIRST_SWAP: ActionId = 1 << 61;
/// How long a unit that the daemon itself has started may take to ask; milliseconds.
const TO_ASK: u64 = 60_000;

impl Daemon {
    pub(super) fn command(&mut self, command: Command) {
        let now = self.parts.ports.now();
        match command {
            Command::Admit { asker, files, environment, engine, reply } => {
                let wish = self.wish(&asker, now);
                let wish = Arc::new(Wish { files, environment, engine, ..wish });
                self.next_ticket += 1;
                let ticket = self.next_ticket;
                self.forget(&asker.instance, "the unit has asked again");
                self.waiting
                    .insert(ticket, Waiting { wish: Arc::clone(&wish), asked: false, reply: Some(reply) });
                self.weigh(Purpose::Admit(ticket), wish);
            }
            Command::Load(job, options) => {
                if options == LoadOptions::default() {
                    self.one_shot.remove(&job.instance);
                } else {
                    self.one_shot.insert(job.instance.clone(), options);
                }
                self.restoring.remove(&job.instance);
                let effect = Effect::Start(job.instance.clone());
                self.begin_job(job, effect);
            }
            Command::Unload(job) => {
                self.step(Event::Unwanted(job.instance.clone()));
                let effect = Effect::Stop(job.instance.clone());
                self.begin_job(job, effect);
            }
            Command::Pin(instance, pinned, reply) => {
                self.step(Event::Pin(instance.model, pinned));
                let _ = reply.send(());
            }
            Command::Lease(ask) => self.lease(ask),
            Command::Swap(effect, reply) => self.swap(effect, reply),
            Command::SetMode(mode, reply) => {
                self.mode = Some(mode);
                let rulebook = self.rulebook.clone();
                self.apply(&rulebook);
                self.save_now();
                let _ = reply.send(());
            }
            Command::Plan(request, reply) => {
                let machine = self.observe();
                let request = self.completed(*request);
                let planned = self.core.preview(&request, &machine, now);
                let pools = self.core.accounts(&request, &planned, &machine, now);
                let _ = reply.send(view::planned(&request, planned, pools, now));
            }
            Command::Status(reply) => {
                let of = self.core.unheard(now);
                if of.is_empty() {
                    self.show(vec![reply]);
                    return;
                }
                // Who asks while engines are asked waits for the same answers.
                if let Some(looking) = self.looking.values_mut().find(|looking| looking.of.is_superset(&of)) {
                    looking.replies.push(reply);
                    return;
                }
                self.next_ticket += 1;
                let id = FIRST_SWAP + self.next_ticket - FIRST_TICKET;
                self.looking.insert(id, Looking { of: of.clone(), replies: vec![reply] });
                self.perform(id, Effect::AskActivity(of));
            }
            Command::Explain(instance, reply) => {
                let last = self
                    .core
                    .decisions()
                    .rev()
                    .find(|decision| decision.instance.as_ref() == Some(&instance));
                let _ = reply.send(last.cloned());
            }
        }
    }

    fn show(&mut self, replies: Vec<oneshot::Sender<Status>>) {
        // People see what is being removed as well.
        let (machine, now) = (self.read(), self.parts.ports.now());
        for reply in replies {
            let mut status = view::status(&self.core, &machine, &self.leases, &self.rulebook, now);
            status.unseen = self.parts.ports.unseen();
            status.turns = self.turns.report();
            let _ = reply.send(status);
        }
    }

    /// Makes or removes a swapfile for a person, unless a model needs it.
    fn swap(&mut self, effect: Effect, reply: oneshot::Sender<Result<(), Fault>>) {
        let machine = self.observe();
        if let Effect::RemoveSwap(name) = &effect {
            let known = self.is_going(*name) || machine.swaps.iter().any(|area| area.own() == Some(*name));
            let by = self.core.need_swapfile(*name, &machine);
            let fault = match by.first() {
                _ if !known => {
                    let hint = "'plimsoll swap list' shows those that there are";
                    Some(Fault::Failed(format!("there is no swapfile {name}: {hint}")))
                }
                Some(instance) => Some(Fault::Busy(format!(
                    "{instance} needs the swapfile {name}: 'plimsoll unload {instance}' first"
                ))),
                None => None,
            };
            if let Some(fault) = fault {
                let _ = reply.send(Err(fault));
                return;
            }
        }
        let going = if let Effect::RemoveSwap(name) = &effect { Some(*name) } else { None };
        self.next_ticket += 1;
        let id = FIRST_SWAP + self.next_ticket - FIRST_TICKET;
        self.swapping.insert(id, Swapping { going, reply });
        self.perform(id, effect);
    }

    /// What an asker wishes, with the options of the load that started it.
    pub(super) fn wish(&mut self, asker: &Asker, now: u64) -> Wish {
        let options = self.one_shot.get(&asker.instance).cloned().unwrap_or_default();
        let returning = self.restoring.remove(&asker.instance).is_some_and(|at| now < at + TO_ASK);
        Wish {
            instance: Some(asker.instance.clone()),
            invocation: asker.invocation.clone(),
            context: options.context,
            instead_of: options.instead_of,
            force: options.force,
            no_restore: options.no_restore,
            explicit: asker.explicit && !returning,
            ..Wish::default()
        }
    }

    /// The simulated gate asks by itself; options of a load hold for it as well.
    pub(super) fn simulated_ask(&mut self, ticket: u64, request: Box<Request>) {
        let now = self.parts.ports.now();
        let asker = Asker {
            instance: request.instance.clone(),
            invocation: request.invocation.clone(),
            explicit: request.explicit,
        };
        if !self.one_shot.contains_key(&asker.instance) {
            let request = Box::new(self.completed(*request));
            self.step(Event::Ask { ticket, request });
            return;
        }
        let wish = Arc::new(self.wish(&asker, now));
        self.waiting.insert(ticket, Waiting { wish: Arc::clone(&wish), asked: false, reply: None });
        self.weigh(Purpose::Admit(ticket), wish);
    }

    pub(super) fn begin_job(&mut self, job: Job, effect: Effect) {
        let text = match job.kind {
            JobKind::Load => "starting",
            JobKind::Unload => "stopping",
        };
        self.tell(Publication::JobProgress(job.number, text.to_owned()));
        let id = self.jobs.begin(job);
        self.perform(id, effect);
    }

    pub(super) fn done(&mut self, id: ActionId, outcome: Outcome) {
        match self.jobs.end(id, &outcome) {
            // First the ledger, then the word that it is done.
            Some((job, result, message)) => {
                self.one_shot.remove(&job.instance);
                self.step(Event::Tick);
                self.tell(Publication::JobEnded(job, result, message));
            }
            None => {
                if let Some(looking) = self.looking.remove(&id) {
                    self.step(Event::Heard(looking.of.clone()));
                    self.show(looking.replies);
                    return;
                }
                if let Some(swapping) = self.swapping.remove(&id) {
                    self.step(Event::Tick);
                    let _ = swapping.reply.send(match outcome {
                        Outcome::Done => Ok(()),
                        Outcome::Failed(why) => Err(Fault::Failed(why)),
                    });
                    return;
                }
                if let Outcome::Failed(why) = &outcome {
                    tracing::warn!("{why}");
                }
                self.step(Event::Done { id, outcome });
            }
        }
    }

    /// Works out a request on another thread.
    pub(super) fn weigh(&self, purpose: Purpose, wish: Arc<Wish>) {
        let catalog = Arc::clone(&self.parts.catalog);
        let survey = self.parts.survey.clone();
        let gpus = self.machine.gpus.clone();
        let sender = self.sender.clone();
        let weighers = Arc::clone(&self.weighers);
        tokio::spawn(async move {
            // It is never closed.
            let turn = weighers.acquire().await;
            let work = move || (catalog.request(&wish, &gpus), catalog.rulebook());
            let done = tokio::task::spawn_blocking(work).await;
            // Another one is worked out while this one waits.
            drop(turn);
            if let Some(survey) = survey {
                survey.look().await;
            }
            let (request, rules) = match done {
                Ok(done) => done,
                Err(error) => {
                    (Err(CatalogError::Config(format!("the daemon failed to read the model: {error}"))), None)
                }
            };
            let _ = sender.send(Input::Weighed(Box::new(Weighed { purpose, request, rules })));
        });
    }

    pub(super) fn weighed(&mut self, weighed: Weighed) {
        if let Some(rules) = weighed.rules {
            self.configure(rules, false);
        }
        match weighed.purpose {
            Purpose::Adopt(instance) => {
                let Some(invocation) = self.adopted.get(&instance).cloned() else { return };
                let request = match weighed.request {
                    Ok(request) if !request.ladder.is_empty() => request,
                    // Not adopted any more.
                    Err(_) if instance.is_foreign() => return,
                    Ok(request) => unknown(&instance, &invocation, request.unknown.as_deref()),
                    Err(error) => unknown(&instance, &invocation, Some(&error.to_string())),
                };
                tracing::info!("{instance} runs already and is taken into the ledger");
                let request = self.completed(request);
                self.step(Event::Adopt { request: Box::new(request) });
            }
            Purpose::Admit(ticket) => {
                // The asker may be gone, or have asked again.
                let Some(waiting) = self.waiting.get_mut(&ticket) else { return };
                waiting.asked = true;
                match weighed.request {
                    Ok(request) => {
                        let request = Box::new(self.completed(request));
                        self.step(Event::Ask { ticket, request });
                    }
                    Err(error) => self.fail(ticket, Fault::Catalog(error)),
                }
            }
        }
    }

    /// A request with what only the state and the machine can tell: pins, and the administrator's
    /// limit on the unit.
    pub(super) fn completed(&self, mut request: Request) -> Request {
        if let Some(pinned) =
            self.core.pins().get(&request.instance.model).filter(|_| !request.instance.lease)
        {
            request.pinned = *pinned;
        }
        let unit = self.machine.units.get(&request.instance);
        request.unit_limit = request.unit_limit.or(unit.and_then(|unit| unit.admin_limit));
        request
    }

    /// A running instance without a reservation is taken into the ledger.
    pub(super) fn weigh_adoption(&mut self, instance: Instance, invocation: String) {
        // Once for each start of the unit: an adoption that the decisions don't take won't be
        // taken the next time either.
        if self.adopted.get(&instance) == Some(&invocation) || self.core.holders().contains_key(&instance) {
            return;
        }
        let wish =
            Wish { instance: Some(instance.clone()), invocation: invocation.clone(), ..Wish::default() };
        self.adopted.insert(instance.clone(), invocation);
        self.weigh(Purpose::Adopt(instance), Arc::new(wish));
    }

    /// Ends the calls of an instance that will never be answered.
    pub(super) fn forget(&mut self, instance: &Instance, why: &str) {
        let of: Vec<u64> = self
            .waiting
            .iter()
            .filter(|(_, waiting)| waiting.wish.instance.as_ref() == Some(instance))
            .map(|(ticket, _)| *ticket)
            .collect();
        for ticket in of {
            self.fail(ticket, Fault::Busy(why.to_owned()));
        }
    }

    pub(super) fn fail(&mut self, ticket: u64, fault: Fault) {
        let Some(waiting) = self.waiting.remove(&ticket) else { return };
        if let Some(reply) = waiting.reply {
            let _ = reply.send(Err(fault));
        }
    }

    /// Calls whose unit is gone have nobody left in the decisions that would answer them.
    pub(super) fn drop_the_gone(&mut self) {
        let answered: Vec<u64> = self
            .outbox
            .iter()
            .filter_map(|action| match action {
                Action::Answer { ticket, .. } => Some(*ticket),
                _ => None,
            })
            .collect();
        let core = &self.core;
        let gone: Vec<u64> = self
            .waiting
            .iter()
            .filter(|(ticket, waiting)| {
                let waits =
                    core.waiting().any(|(instance, _)| Some(instance) == waiting.wish.instance.as_ref());
                waiting.asked && !waits && !answered.contains(ticket)
            })
            .map(|(ticket, _)| *ticket)
            .collect();
        for ticket in gone {
            self.fail(ticket, Fault::Busy("the unit's start has ended meanwhile".to_owned()));
        }
    }

    /// What runs has a reservation, whoever started it.
    pub(super) fn adopt_the_unknown(&mut self, machine: &Machine) {
        let unknown: Vec<(Instance, String)> = machine
            .units
            .iter()
            .filter(|(instance, unit)| {
                unit.state == UnitState::Active
                    && !instance.lease
                    && !self.core.holders().contains_key(*instance)
            })
            .map(|(instance, unit)| (instance.clone(), unit.invocation.clone()))
            .collect();
        for (instance, invocation) in unknown {
            self.weigh_adoption(instance, invocation);
        }
    }

    pub(super) fn answer(&mut self, ticket: u64, answer: Result<u64, Box<Refusal>>) {
        if self.answer_lease(ticket, &answer) {
            return;
        }
        if let Err(refusal) = &answer {
            self.jobs.refused(&refusal.instance, &refusal.to_string());
        }
        let waiting = self.waiting.remove(&ticket);
        let on_the_bus = waiting.and_then(|waiting| Some((waiting.reply?, waiting.wish)));
        let Some((reply, wish)) = on_the_bus else {
            if ticket < FIRST_TICKET {
                self.parts.ports.answered(ticket, answer);
            }
            return;
        };
        let (context, instance) = match (answer, &wish.instance) {
            (Ok(context), Some(instance)) => (context, instance.clone()),
            (Ok(_), None) => return,
            (Err(refusal), _) => {
                let _ = reply.send(Err(Fault::Refused(refusal)));
                return;
            }
        };
        self.tell_loads(&instance, &format!("loading at context {context}"));
        let catalog = Arc::clone(&self.parts.catalog);
        let gpus = self.machine.gpus.clone();
        let holder = self.core.holders().get(&instance);
        let (footprint, basis) =
            holder.map(|holder| (holder.predicted.clone(), holder.basis.clone())).unwrap_or_default();
        let rung = Rung { context, footprint, basis };
        let weighers = Arc::clone(&self.weighers);
        tokio::spawn(async move {
            let _turn = weighers.acquire().await;
            let launch = tokio::task::spawn_blocking(move || catalog.launch(&wish, &rung, &gpus)).await;
            let _ = reply.send(match launch {
                Ok(launch) => launch.map_err(Fault::Catalog),
                Err(error) => Err(Fault::Failed(format!("the daemon has a fault: {error}"))),
            });
        });
    }
}

/// A request for what runs and is not understood: it is charged for as it is measured.
fn unknown(instance: &Instance, invocation: &str, why: Option<&str>) -> Request {
    tracing::warn!("{instance} runs, but its size is unknown: {}", why.unwrap_or("there is no estimate"));
    Request {
        invocation: invocation.to_owned(),
        ladder: vec![Rung::default()],
        ..Request::of(instance.clone())
    }
}

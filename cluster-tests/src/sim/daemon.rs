//! A daemon: the real lease holder, the real plan and the real state, around the modelled log.
//! What it does as a leader is in `lead`.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use node::cluster::lease::{Granted, Holder, LeaseTimes, Limits, Listed, Liveness, Renewal};
use node::cluster::liveness::{Report, Table};
use node::reconcile::plan::{Circumstances, Step, plan};
use node::sandbox::End;
use proto::epoch::Epoch;
use proto::ids::{NodeId, SandboxId, SnapshotId};
use proto::units::Stamp;
use raft::command::{Answer, Command, Proposal};
use raft::state::{HostLoss, Needs, Sealed, State};

use super::Ms;
use super::bugs::Bug;
use super::host::{Body, Guest, GuestState};
use super::lead::Led;
use super::log::{self, Disk, Entry, Message, Replica};
use super::oracle::Oracle;
use super::rng::Rng;

/// How often a daemon looks at its sandboxes, its announcement and (as a mirror) at its peers.
const LOOK_EVERY: Ms = 300;
/// How long a step that did not help is not tried again.
const STEP_AGAIN: Ms = 1000;
/// How long an announcement may be under way before it is made again.
const ANNOUNCE_AGAIN: Ms = 3000;
const REPORT_EVERY: Ms = 1000;

/// What daemons send each other.
#[derive(Clone, Debug)]
pub(crate) enum Mail {
    Log(Message),
    Propose {
        request: u64,
        command: Box<Command>,
    },
    Answer {
        request: u64,
        index: u64,
        answer: Answer,
    },
    Renew(Renewal),
    Grant(Renewal),
    Load(Vec<u8>),
    Pull {
        after: u64,
    },
    Pulled {
        after: u64,
        entries: Vec<Rc<Entry>>,
        leader: Option<NodeId>,
    },
}

impl Mail {
    /// The same, without the part of the log it brings: what a node hears whose peers are there
    /// while the log itself is stuck behind something larger.
    pub(crate) fn without_entries(self) -> Self {
        match self {
            Self::Log(Message::Append {
                term, prev, probe, ..
            }) => Self::Log(Message::Append {
                term,
                prev,
                entries: Vec::new(),
                commit: 0,
                probe,
            }),
            Self::Pulled { after, leader, .. } => Self::Pulled {
                after,
                entries: Vec::new(),
                leader,
            },
            other => other,
        }
    }
}

/// What a daemon may touch while it handles one event.
pub(crate) struct Context<'a> {
    pub(crate) now: Ms,
    pub(crate) bug: Option<Bug>,
    pub(crate) times: LeaseTimes,
    pub(crate) max_learners: usize,
    pub(crate) rng: &'a mut Rng,
    pub(crate) oracle: &'a mut Oracle,
    pub(crate) body: &'a mut Body,
    pub(crate) out: Vec<(NodeId, Mail)>,
    /// Requests that are answered, for the clients.
    pub(crate) done: Vec<(u64, Answer)>,
    pub(crate) notes: Vec<String>,
}

impl Context<'_> {
    pub(crate) fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    pub(crate) fn propose(&self, command: Command) -> log::Body {
        let at = Stamp(self.now);
        log::Body::Command(Box::new(Proposal { at, command }))
    }
}

/// One run of one daemon.
#[derive(Debug)]
pub(crate) struct Daemon {
    pub(crate) id: NodeId,
    pub(crate) replica: Replica,
    pub(crate) applied: u64,
    pub(crate) holder: Holder,
    pub(crate) table: Table,
    pub(crate) led: Option<Led>,
    /// Answers that wait until this node has applied what they speak of.
    answered: BTreeMap<u64, (u64, Answer)>,
    seen_epochs: BTreeMap<SandboxId, Epoch>,
    step_at: BTreeMap<SandboxId, Ms>,
    /// This node's incarnation when it began to announce itself; it has until the state shows a
    /// newer one.
    announced_over: Option<u64>,
    /// Whether it announces itself to begin anew, all bound guests being dead.
    begins_anew: bool,
    announce_at: Ms,
    seq: u64,
    renew_at: Ms,
    report_at: Ms,
    look_at: Ms,
}

impl Daemon {
    pub(crate) fn start(id: NodeId, disk: Disk, context: &mut Context<'_>) -> Self {
        context.body.forget_seals();
        let only_new = context.has(Bug::DemotesBelowQuorum);
        let replica = Replica::new(id, disk, context.now, context.rng, only_new);
        let mut holder = Holder::new(context.times, 0);
        // Guests of an earlier daemon run under what it wrote down.
        if let Some(limits) = context.body.lease.filter(|limits| *limits != Limits::NONE) {
            holder = holder.resume(limits.kill_at.less(context.times.grace()));
        }
        let seen_epochs = context
            .body
            .guests
            .iter()
            .map(|(id, guest)| (*id, guest.epoch))
            .collect();
        let now = context.now;
        Self {
            id,
            applied: 0,
            replica,
            holder,
            table: Table::default(),
            led: None,
            answered: BTreeMap::new(),
            seen_epochs,
            step_at: BTreeMap::new(),
            announced_over: None,
            begins_anew: false,
            announce_at: now,
            seq: 0,
            renew_at: now,
            report_at: now,
            look_at: now,
        }
    }

    pub(crate) fn state(&self, context: &Context<'_>) -> State {
        context.oracle.state(self.applied)
    }

    /// Everything that is due.
    pub(crate) fn tick(&mut self, context: &mut Context<'_>) {
        let mut out = Vec::new();
        self.replica.tick(context.now, context.rng, &mut out);
        context.out.extend(
            out.into_iter()
                .map(|(to, message)| (to, Mail::Log(message))),
        );
        self.apply(context);
        self.lead(context);
        self.keep_lease(context);
        if context.now >= self.report_at {
            self.report_at = context.now + REPORT_EVERY;
            self.report_load(context);
        }
        if context.now >= self.look_at {
            self.look_at = context.now + LOOK_EVERY;
            self.announce(context);
            self.pull(context);
            self.reconcile(context);
        }
    }

    pub(crate) fn receive(&mut self, from: NodeId, mail: Mail, context: &mut Context<'_>) {
        match mail {
            Mail::Log(message) => {
                let mut out = Vec::new();
                self.replica
                    .receive(context.now, context.rng, from, message, &mut out);
                context.out.extend(
                    out.into_iter()
                        .map(|(to, message)| (to, Mail::Log(message))),
                );
                self.apply(context);
                self.answer_renewals(context);
            }
            Mail::Propose { request, command } => self.proposed(from, request, *command, context),
            Mail::Answer {
                request,
                index,
                answer,
            } => {
                self.answered.insert(request, (index, answer));
            }
            Mail::Renew(renewal) => self.renewal(from, renewal, context),
            Mail::Grant(renewal) => self.granted(renewal, context),
            Mail::Load(bytes) => {
                let report = Report::decode(&bytes)
                    .ok()
                    .filter(|report| report.is_from(from));
                if let Some(report) = report {
                    self.table.heard(report, context.body.tick(context.now));
                }
            }
            Mail::Pull { after } => {
                let entries = self.replica.committed_after(after);
                let leader = self.replica.leader;
                context.out.push((
                    from,
                    Mail::Pulled {
                        after,
                        entries,
                        leader,
                    },
                ));
            }
            Mail::Pulled {
                after,
                entries,
                leader,
            } => {
                if !self.replica.is_leader() {
                    self.replica
                        .absorb(context.now, context.rng, after, entries);
                    if !self.replica.members().1.all().contains(&self.id) {
                        self.replica.leader = leader;
                    }
                }
                self.apply(context);
            }
        }
    }

    /// A client's request that came to this node.
    pub(crate) fn ask(&mut self, request: u64, command: Command, context: &mut Context<'_>) {
        self.send_to_leader(request, command, context);
    }

    fn send_to_leader(&self, request: u64, command: Command, context: &mut Context<'_>) {
        if let Some(leader) = self.replica.leader {
            let command = Box::new(command);
            context
                .out
                .push((leader, Mail::Propose { request, command }));
        }
    }

    /// Takes what is committed into the state, and answers who waited for it here.
    pub(crate) fn apply(&mut self, context: &mut Context<'_>) {
        while self.applied < self.replica.disk.commit {
            let at = usize::try_from(self.applied).unwrap_or(usize::MAX);
            let Some(entry) = self.replica.disk.entries.get(at) else {
                return;
            };
            context.oracle.commit(self.id, self.applied + 1, entry);
            self.applied += 1;
        }
        let applied = self.applied;
        self.answered.retain(|request, (index, answer)| {
            let waits = *index > applied;
            if !waits {
                context.done.push((*request, answer.clone()));
            }
            waits
        });
    }

    /// Renews in time, writes down what is held, and starts over once everything bound is dead.
    fn keep_lease(&mut self, context: &mut Context<'_>) {
        let tick = context.body.tick(context.now);
        if self.replica.is_sole_voter() {
            self.holder.set_sole_voter(true);
        } else if !context.has(Bug::SoleVoterStaysUnlimited) {
            self.holder.set_sole_voter(false);
        }
        let own = self.own_row(context);
        let is_lost = own.is_some_and(|own| own.liveness == Liveness::Lost);
        let own = own.map(|own| own.incarnation);
        if is_lost || self.begins_anew || self.holder.has_lapsed(tick) {
            self.begin_anew(own, context);
        } else if let Some(own) = own {
            self.holder.bring_up_to(context.times, own);
            self.write_lease(context);
        }
        if context.now >= self.renew_at {
            let every = u64::try_from(context.times.renew_every().as_millis()).unwrap_or(u64::MAX);
            self.renew_at = context.now + every;
            let renewal = self.holder.renew(tick);
            if let Some(leader) = self.replica.leader {
                context.out.push((leader, Mail::Renew(renewal)));
            }
        }
    }

    /// What the table says of this node, as far as it has applied it.
    fn own_row(&self, context: &Context<'_>) -> Option<Listed> {
        let state = if context.has(Bug::GrantCountsBeforeCaughtUp) {
            context.oracle.newest()
        } else {
            self.state(context)
        };
        state.node(self.id).map(Listed::from)
    }

    /// Announces this node once everything bound is dead, and takes over the incarnation it gets.
    fn begin_anew(&mut self, own: Option<u64>, context: &mut Context<'_>) {
        if !context.body.bound_are_dead() {
            return;
        }
        if !self.begins_anew {
            self.begins_anew = true;
            self.announced_over = own;
        } else if self.announced_over < own && self.holder.start_over(own.unwrap_or(0)) {
            self.begins_anew = false;
            context.notes.push(format!("{} starts over", self.id));
        }
    }

    pub(crate) fn write_lease(&self, context: &mut Context<'_>) {
        if let Some(limits) = self.holder.limits() {
            context.body.lease = Some(limits);
        }
    }

    fn granted(&mut self, renewal: Renewal, context: &mut Context<'_>) {
        let tick = context.body.tick(context.now);
        let own = self.own_row(context);
        let renewal = if context.has(Bug::LeaseCountedFromReceipt)
            && renewal.incarnation == self.holder.incarnation()
        {
            self.holder.renew(tick)
        } else {
            renewal
        };
        if let Granted::Until(_) = self.holder.granted(tick, renewal, own) {
            self.write_lease(context);
        }
    }

    fn report_load(&mut self, context: &mut Context<'_>) {
        self.seq += 1;
        let report = Report {
            node: self.id,
            incarnation: self.holder.incarnation(),
            seq: self.seq,
            applied: self.applied,
            ..Report::default()
        };
        let bytes = report.encode();
        for voter in self.replica.members().1.voters {
            if voter != self.id {
                context.out.push((voter, Mail::Load(bytes.clone())));
            }
        }
    }

    /// Tells the cluster about this node, at its start and to begin anew.
    fn announce(&mut self, context: &mut Context<'_>) {
        let state = self.state(context);
        let Some(own) = state.node(self.id).map(|own| own.incarnation) else {
            return;
        };
        let waits = context.now < self.announce_at;
        if *self.announced_over.get_or_insert(own) == own && !waits {
            self.announce_at = context.now + ANNOUNCE_AGAIN;
            let record = context.body.record.clone();
            self.send_to_leader(0, Command::AdmitNode(record), context);
        }
    }

    /// Asks somebody for what is committed, if nobody sends it.
    fn pull(&self, context: &mut Context<'_>) {
        let members = self.replica.members().1.all();
        if members.contains(&self.id) && self.replica.leader.is_some() {
            return;
        }
        let others: Vec<NodeId> = members.into_iter().filter(|id| *id != self.id).collect();
        if !others.is_empty() {
            let to = *context.rng.pick(&others);
            context.out.push((
                to,
                Mail::Pull {
                    after: self.applied,
                },
            ));
        }
    }

    fn reconcile(&mut self, context: &mut Context<'_>) {
        let at = Circumstances {
            here: self.id,
            now: Stamp(context.now),
            ended_retention: Duration::from_secs(100_000),
            prunes: false,
        };
        let state = self.state(context);
        let steps = plan(at, &state, &context.body.observed()).steps;
        for step in steps {
            let Some(id) = step.sandbox() else {
                continue;
            };
            if self.step_at.get(&id).is_some_and(|at| context.now < *at) {
                continue;
            }
            self.carry_out(step, &state, context);
        }
    }

    fn carry_out(&mut self, step: Step, state: &State, context: &mut Context<'_>) {
        let now = context.now;
        match step {
            Step::Start(id) => self.start_guest(id, state, context),
            Step::Begin(id) => {
                if let Some(guest) = context.body.guests.get_mut(&id)
                    && let GuestState::Waiting(takes) = guest.state
                {
                    guest.state = GuestState::Booting(now + takes);
                }
            }
            Step::Stop(id) => {
                let gone_at = now + context.rng.within(20, 400);
                if let Some(guest) = context.body.guests.get_mut(&id) {
                    let end = End::Stopped {
                        reason: String::new(),
                    };
                    guest.state = GuestState::Releasing(gone_at, end);
                    guest.frozen = false;
                }
            }
            Step::Forget(id) => {
                context.body.guests.remove(&id);
            }
            Step::Seal { id, pause, .. } => self.seal(id, pause, context),
            Step::Thaw(id) => {
                if let Some(guest) = context.body.guests.get_mut(&id) {
                    guest.state = GuestState::Ready;
                }
            }
            Step::Report { id, epoch, report } => {
                let is_seal = matches!(report, raft::command::Report::Sealed(_));
                if is_seal
                    && context.has(Bug::ThawsBeforeTheClusterKnows)
                    && context.rng.chance(300)
                {
                    self.carry_out(Step::Thaw(id), state, context);
                }
                self.step_at.insert(id, now + STEP_AGAIN);
                let node = self.id;
                let command = Command::ReportSandbox {
                    id,
                    epoch,
                    node,
                    report,
                };
                self.send_to_leader(0, command, context);
            }
            Step::Reclaim(_) | Step::PutAway(_) | Step::TellWarm(_) | Step::Prune { .. } => {}
        }
    }

    fn seal(&mut self, id: SandboxId, pause: u64, context: &mut Context<'_>) {
        let sealed = context.rng.chance(800).then(|| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&context.rng.next().to_be_bytes());
            Sealed {
                id: SnapshotId(bytes),
                pause,
                needs: Needs {
                    base: super::world::template().digest,
                    ..Needs::default()
                },
                ..Sealed::default()
            }
        });
        let at = context.now + context.rng.within(50, 2000);
        if let Some(guest) = context.body.guests.get_mut(&id) {
            guest.state = GuestState::Sealing(at, sealed);
        }
    }

    /// Starts a guest, unless it is bound to a lease that is not held, or its epoch is overtaken.
    fn start_guest(&mut self, id: SandboxId, state: &State, context: &mut Context<'_>) {
        let Some(record) = state.sandbox(id) else {
            return;
        };
        let unbound = context.has(Bug::RestartableRunsUnbound);
        let bound = record.spec.on_host_loss == HostLoss::Restart && !unbound;
        let overtaken = self
            .seen_epochs
            .get(&id)
            .is_some_and(|seen| *seen > record.epoch);
        let tick = context.body.tick(context.now);
        if overtaken || (bound && !self.holder.may_run(tick)) {
            return;
        }
        self.seen_epochs.insert(id, record.epoch);
        let takes = context.rng.within(200, 6000);
        let asks = record.not_begun && !context.has(Bug::BeginsUnasked);
        let begun = match asks {
            true => GuestState::Waiting(takes),
            false => GuestState::Booting(context.now + takes),
        };
        let origin = record.origin.and_then(|from| state.snapshot(from));
        let keeps = context.has(Bug::ForkKeepsItsOriginsName) && record.snapshot.is_none();
        let is = origin.filter(|_| keeps).map_or(id, |it| it.sandbox);
        let guest = Guest {
            epoch: record.epoch,
            bound,
            state: begun,
            frozen: false,
            is,
        };
        context.body.guests.insert(id, guest);
    }
}

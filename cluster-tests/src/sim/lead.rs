//! What a daemon does while it leads: the real book, the real autopilot, and answers to proposers.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use node::cluster::autopilot::{self, Action, Contact, Picture, Settings, Steadiness, decide};
use node::cluster::lease::{Book, Listed, Liveness, Renewal, Tick, Verdict};
use proto::ids::NodeId;
use raft::command::{Command, Receipt};

use super::Ms;
use super::bugs::Bug;
use super::daemon::{Context, Daemon, Mail};
use super::log::{Body, Members, Message};

/// How often the leader looks at leases and members.
const LEAD_EVERY: Ms = 200;

/// The memory of one term of leadership.
#[derive(Debug)]
pub(crate) struct Led {
    term: u64,
    since: Ms,
    /// The first entry of the term; until it is committed the state may lack what was promised.
    first: u64,
    book: Option<Book>,
    /// Renewals that wait for a quorum to confirm the leadership, with the round they wait for.
    renewals: Vec<(u64, NodeId, Renewal)>,
    steadiness: Steadiness,
    changed_at: Option<Ms>,
    /// Verdicts under way: at most one per node.
    judged: BTreeMap<NodeId, u64>,
    waiting: BTreeMap<u64, (NodeId, u64)>,
    look_at: Ms,
}

impl Daemon {
    /// Everything that is due of a leader.
    pub(crate) fn lead(&mut self, context: &mut Context<'_>) {
        if !self.replica.is_leader() {
            self.led = None;
            return;
        }
        let term = self.replica.disk.term;
        if self.led.as_ref().is_none_or(|led| led.term != term) {
            context.notes.push(format!("{} leads term {term}", self.id));
            self.led = Some(Led {
                term,
                since: context.now,
                first: self.replica.last(),
                book: None,
                renewals: Vec::new(),
                steadiness: Steadiness::default(),
                changed_at: None,
                judged: BTreeMap::new(),
                waiting: BTreeMap::new(),
                look_at: 0,
            });
        }
        self.open_book(context);
        self.answer_proposers(context);
        self.answer_renewals(context);
        let due = self
            .led
            .as_ref()
            .is_some_and(|led| context.now >= led.look_at && led.book.is_some());
        if due {
            self.judge_nodes(context);
            self.steer(context);
            if let Some(led) = &mut self.led {
                led.look_at = context.now + LEAD_EVERY;
            }
        }
    }

    /// A leader knows the leases from when its first own entry is applied.
    fn open_book(&mut self, context: &mut Context<'_>) {
        let tick = context.body.tick(context.now);
        let rows = self.rows(context);
        let Some(led) = &mut self.led else {
            return;
        };
        if led.book.is_some() || self.applied < led.first {
            return;
        }
        let mut started_at = tick;
        if context.has(Bug::NewLeaderDoesNotWait) {
            started_at = Tick::default();
        }
        let mut book = Book::new(context.times, started_at);
        book.verdicts(started_at, rows);
        led.book = Some(book);
    }

    fn rows(&self, context: &Context<'_>) -> Vec<(NodeId, Listed)> {
        let state = self.state(context);
        state
            .nodes()
            .map(|node| (node.id, Listed::from(node)))
            .collect()
    }

    pub(crate) fn proposed(
        &mut self,
        from: NodeId,
        request: u64,
        command: Command,
        context: &mut Context<'_>,
    ) {
        let body = context.propose(command);
        let Some(index) = self.replica.propose(body) else {
            return;
        };
        if context.has(Bug::AcknowledgedBeforeCommit) {
            let answer = Ok(Receipt::Done(1));
            context.out.push((
                from,
                Mail::Answer {
                    request,
                    index: 0,
                    answer,
                },
            ));
        } else if let Some(led) = self.led.as_mut().filter(|_| request != 0) {
            led.waiting.insert(index, (from, request));
        }
    }

    fn answer_proposers(&mut self, context: &mut Context<'_>) {
        let (applied, term) = (self.applied, self.replica.disk.term);
        let Some(led) = &mut self.led else {
            return;
        };
        let later = led.waiting.split_off(&(applied + 1));
        let ready = std::mem::replace(&mut led.waiting, later);
        for (index, (to, request)) in ready {
            let answer = context
                .oracle
                .answer(index)
                .filter(|_| self.replica.term_at(index) == term);
            if let Some(answer) = answer {
                context.out.push((
                    to,
                    Mail::Answer {
                        request,
                        index,
                        answer,
                    },
                ));
            }
        }
    }

    pub(crate) fn renewal(&mut self, from: NodeId, renewal: Renewal, context: &mut Context<'_>) {
        let tick = context.body.tick(context.now);
        let state = self.state(context);
        let mut listed = state.node(from).map(Listed::from);
        if context.has(Bug::GrantsToTheMissing)
            && let Some(listed) = &mut listed
        {
            listed.liveness = Liveness::Alive;
        }
        let Some(led) = self.led.as_mut().filter(|_| self.replica.is_leader()) else {
            return;
        };
        let Some(book) = &mut led.book else {
            return;
        };
        if book
            .renewed(from, renewal.incarnation, tick, listed)
            .is_ok()
        {
            let round = self.replica.confirm();
            led.renewals.push((round, from, renewal));
        }
    }

    /// Grants the renewals for which a quorum has confirmed since that this node leads.
    pub(crate) fn answer_renewals(&mut self, context: &mut Context<'_>) {
        let unchecked = context.has(Bug::GrantsWithoutQuorum);
        let Some(led) = self.led.as_mut().filter(|_| self.replica.is_leader()) else {
            return;
        };
        if led.renewals.is_empty() {
            return;
        }
        let confirmed = self.replica.confirmed();
        let ready = led
            .renewals
            .extract_if(.., |(round, ..)| *round <= confirmed || unchecked);
        let grants = ready.map(|(_, to, renewal)| (to, Mail::Grant(renewal)));
        context.out.extend(grants);
    }

    fn judge_nodes(&mut self, context: &mut Context<'_>) {
        let mut tick = context.body.tick(context.now);
        if context.has(Bug::NoMargins) {
            let margin = context
                .times
                .missing_after()
                .saturating_sub(context.times.ttl());
            tick = tick.plus(margin);
        }
        let rows = self.rows(context);
        let applied = self.applied;
        let Some(led) = &mut self.led else {
            return;
        };
        led.judged.retain(|_, index| *index > applied);
        let verdicts = led.book.as_mut().map(|book| book.verdicts(tick, rows));
        for verdict in verdicts.unwrap_or_default() {
            let (Verdict::Missing(node, _) | Verdict::Lost(node, _) | Verdict::Back(node, _)) =
                verdict;
            if led.judged.contains_key(&node) {
                continue;
            }
            let body = context.propose(verdict.command());
            if let Some(index) = self.replica.propose(body) {
                context
                    .notes
                    .push(format!("{} judges {verdict:?}", self.id));
                led.judged.insert(node, index);
            }
        }
    }

    /// What the autopilot sees.
    pub(crate) fn picture(&self, context: &Context<'_>) -> Picture {
        let tick = context.body.tick(context.now);
        let (index, members) = self.replica.members();
        let state = self.state(context);
        let since = |at: Ms| Duration::from_millis(context.now.saturating_sub(at));
        let contact = |id: &NodeId| {
            let progress = self.replica.progress.get(id);
            let answered = progress.and_then(|progress| progress.heard_at).map(since);
            let contact = Contact {
                heard: answered.into_iter().chain(self.table.age(*id, tick)).min(),
                matched: progress.map(|progress| progress.matched),
                steady_for: Duration::ZERO,
            };
            (*id, contact)
        };
        let listed =
            |node: &raft::state::Node| Some((node.id, autopilot::Listed::of(node, false)?));
        let nodes: BTreeMap<_, _> = state.nodes().filter_map(listed).collect();
        Picture {
            here: self.id,
            contacts: nodes
                .keys()
                .filter(|id| **id != self.id)
                .map(contact)
                .collect(),
            nodes,
            voters: members.voters,
            learners: members.learners,
            joint: members.leaving.is_some(),
            change_under_way: index > self.replica.disk.commit,
            last_log: self.replica.last(),
            leader_for: self
                .led
                .as_ref()
                .map_or(Duration::ZERO, |led| since(led.since)),
            since_change: self.led.as_ref().and_then(|led| led.changed_at).map(since),
            settings: Settings {
                max_learners: context.max_learners,
                ..Settings::default()
            },
        }
    }

    fn steer(&mut self, context: &mut Context<'_>) {
        let mut picture = self.picture(context);
        let tick = context.body.tick(context.now);
        if let Some(led) = &mut self.led {
            led.steadiness.fill_in(tick, &mut picture);
        }
        let action = if context.has(Bug::DemotesBelowQuorum) {
            demote_the_silent(&picture).or_else(|| decide(&picture))
        } else {
            decide(&picture)
        };
        if let Some(action) = action {
            self.act(action, context);
        }
    }

    fn act(&mut self, action: Action, context: &mut Context<'_>) {
        context
            .notes
            .push(format!("{} decides {action:?}", self.id));
        let (_, mut members) = self.replica.members();
        match action {
            Action::TransferLeader(to) => {
                let term = self.replica.disk.term;
                context
                    .out
                    .push((to, Mail::Log(Message::HandOver { term })));
                return;
            }
            Action::FinishJoint => members.leaving = None,
            Action::AddLearner(id) => {
                members.learners.insert(id);
            }
            Action::Remove(gone) => members.learners.retain(|id| !gone.contains(id)),
            Action::SetVoters(voters) => {
                if !self.leave_sole(context) {
                    return;
                }
                let learners = members.learners.union(&members.voters);
                members = Members {
                    learners: learners
                        .filter(|id| !voters.contains(id))
                        .copied()
                        .collect(),
                    leaving: Some(members.voters),
                    voters,
                };
                if let Some(led) = &mut self.led {
                    led.changed_at = Some(context.now);
                }
            }
        }
        self.replica.propose(Body::Members(members));
    }

    /// The limits are where the shims read them before somebody else can have a say. `false` while
    /// there is no lease to fall back to.
    fn leave_sole(&mut self, context: &mut Context<'_>) -> bool {
        if context.has(Bug::SoleVoterStaysUnlimited) {
            return true;
        }
        self.holder.set_sole_voter(false);
        let limited = self.holder.limits().is_some();
        self.write_lease(context);
        limited
    }
}

/// A planted mistake: whoever is silent loses its vote, whoever is left.
fn demote_the_silent(picture: &Picture) -> Option<Action> {
    let heard = |id: &&NodeId| {
        let contact = picture.contacts.get(id).and_then(|contact| contact.heard);
        **id == picture.here || contact.is_some_and(|heard| heard < Duration::from_secs(3))
    };
    let left: BTreeSet<NodeId> = picture.voters.iter().filter(heard).copied().collect();
    let fewer = left.len() < picture.voters.len() && picture.leader_for > Duration::from_secs(4);
    (fewer && !picture.change_under_way).then_some(Action::SetVoters(left))
}

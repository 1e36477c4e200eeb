//! A replicated log for the simulation: elections, appends, joint membership. It stands in for
//! openraft, which is tested elsewhere, and is kept as small as the rules allow: no snapshots, no
//! pre-vote, everything durable at once.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use proto::ids::NodeId;
use raft::command::Proposal;

use super::Ms;
use super::rng::Rng;

/// How often a leader is heard.
const HEARTBEAT: Ms = 200;
/// The shortest wait before a voter that hears no leader stands for election; the longest is
/// twice as long.
const ELECTION: Ms = 1000;
/// Entries in one message.
const BATCH: usize = 128;

/// One entry; the same one on every node that has it.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) term: u64,
    pub(crate) body: Body,
}

#[derive(Debug)]
pub(crate) enum Body {
    Blank,
    Members(Members),
    Command(Box<Proposal>),
}

/// Who votes and who learns; while joint, who voted before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Members {
    pub(crate) voters: BTreeSet<NodeId>,
    pub(crate) leaving: Option<BTreeSet<NodeId>>,
    pub(crate) learners: BTreeSet<NodeId>,
}

impl Members {
    /// Whether those for whom `yes` holds decide. `only_new` is a planted bug.
    fn decide(&self, only_new: bool, yes: impl Fn(&NodeId) -> bool) -> bool {
        let majority =
            |set: &BTreeSet<NodeId>| set.iter().filter(|id| yes(id)).count() * 2 > set.len();
        majority(&self.voters) && (only_new || self.leaving.as_ref().is_none_or(majority))
    }

    pub(crate) fn votes(&self, id: NodeId) -> bool {
        self.voters.contains(&id) || self.leaving.as_ref().is_some_and(|old| old.contains(&id))
    }

    pub(crate) fn all(&self) -> BTreeSet<NodeId> {
        let old = self.leaving.iter().flatten();
        self.voters
            .iter()
            .chain(&self.learners)
            .chain(old)
            .copied()
            .collect()
    }
}

/// What survives a crash.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk {
    pub(crate) term: u64,
    pub(crate) voted_for: Option<NodeId>,
    pub(crate) entries: Vec<Rc<Entry>>,
    pub(crate) commit: u64,
}

#[derive(Clone, Debug)]
pub(crate) enum Message {
    Vote {
        term: u64,
        last: (u64, u64),
        handed_over: bool,
    },
    Voted {
        term: u64,
        yes: bool,
    },
    Append {
        term: u64,
        prev: (u64, u64),
        entries: Vec<Rc<Entry>>,
        commit: u64,
        probe: u64,
    },
    Appended {
        term: u64,
        ok: bool,
        matched: u64,
        probe: u64,
    },
    /// Stand for election now.
    HandOver {
        term: u64,
    },
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Progress {
    next: u64,
    pub(crate) matched: u64,
    probe: u64,
    pub(crate) heard_at: Option<Ms>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Follower,
    Candidate(BTreeSet<NodeId>),
    Leader,
}

/// One node's part in the log.
#[derive(Debug)]
pub(crate) struct Replica {
    pub(crate) id: NodeId,
    pub(crate) disk: Disk,
    pub(crate) role: Role,
    pub(crate) leader: Option<NodeId>,
    pub(crate) progress: BTreeMap<NodeId, Progress>,
    /// The membership entries of the log with their indexes.
    members: Vec<(u64, Members)>,
    heard_leader_at: Ms,
    deadline: Ms,
    beat_at: Ms,
    probe: u64,
    only_new: bool,
}

pub(crate) type Out = Vec<(NodeId, Message)>;

impl Replica {
    pub(crate) fn new(id: NodeId, disk: Disk, now: Ms, rng: &mut Rng, only_new: bool) -> Self {
        let mut members = Vec::new();
        for (index, entry) in (1..).zip(&disk.entries) {
            if let Body::Members(set) = &entry.body {
                members.push((index, set.clone()));
            }
        }
        Self {
            id,
            disk,
            role: Role::Follower,
            leader: None,
            progress: BTreeMap::new(),
            members,
            heard_leader_at: 0,
            deadline: now + rng.within(ELECTION, 2 * ELECTION),
            beat_at: 0,
            probe: 0,
            only_new,
        }
    }

    pub(crate) fn is_leader(&self) -> bool {
        self.role == Role::Leader
    }

    pub(crate) fn last(&self) -> u64 {
        self.disk.entries.len() as u64
    }

    pub(crate) fn term_at(&self, index: u64) -> u64 {
        index
            .checked_sub(1)
            .and_then(|at| self.entry(at))
            .map_or(0, |entry| entry.term)
    }

    fn entry(&self, at: u64) -> Option<&Rc<Entry>> {
        self.disk.entries.get(usize::try_from(at).ok()?)
    }

    /// The newest membership in the log, committed or not, and its index.
    pub(crate) fn members(&self) -> (u64, Members) {
        self.members.last().cloned().unwrap_or_default()
    }

    /// Whether the log's newest membership says that nobody else votes, for good.
    pub(crate) fn is_sole_voter(&self) -> bool {
        let Some((index, members)) = self.members.last() else {
            return false;
        };
        let alone = members.voters.len() == 1 && members.voters.contains(&self.id);
        alone && members.leaving.is_none() && *index <= self.disk.commit
    }

    /// Appends as leader; the entry's index.
    pub(crate) fn propose(&mut self, body: Body) -> Option<u64> {
        if !self.is_leader() {
            return None;
        }
        let term = self.disk.term;
        self.push(Rc::new(Entry { term, body }));
        self.beat_at = 0;
        Some(self.last())
    }

    /// Starts a round of confirmation; it is through once [`Self::confirmed`] has reached the answer.
    pub(crate) fn confirm(&mut self) -> u64 {
        self.beat_at = 0;
        self.probe + 1
    }

    /// The last round that a quorum has answered.
    pub(crate) fn confirmed(&self) -> u64 {
        let (_, members) = self.members();
        let answered = |id: &NodeId| match self.progress.get(id) {
            _ if *id == self.id => self.probe,
            Some(progress) => progress.probe,
            None => 0,
        };
        let mut rounds: Vec<u64> = members.all().iter().map(answered).collect();
        rounds.sort_unstable();
        let through = |round: &&u64| members.decide(self.only_new, |id| answered(id) >= **round);
        rounds.iter().rev().find(through).copied().unwrap_or(0)
    }

    pub(crate) fn tick(&mut self, now: Ms, rng: &mut Rng, out: &mut Out) {
        if self.is_leader() {
            self.advance();
            if now >= self.beat_at {
                self.beat(now, out);
            }
        } else if now >= self.deadline && self.members().1.votes(self.id) {
            self.campaign(now, rng, false, out);
        }
    }

    pub(crate) fn receive(
        &mut self,
        now: Ms,
        rng: &mut Rng,
        from: NodeId,
        message: Message,
        out: &mut Out,
    ) {
        match message {
            Message::Vote {
                term,
                last,
                handed_over,
            } => {
                let led = self.leader.is_some() && now < self.heard_leader_at + ELECTION;
                if (led || self.is_leader()) && !handed_over {
                    return;
                }
                self.see(term, now, rng);
                let free = self.disk.voted_for.is_none_or(|other| other == from);
                let mine = (self.term_at(self.last()), self.last());
                let yes = term == self.disk.term && free && last >= mine;
                if yes {
                    self.disk.voted_for = Some(from);
                    self.rest(now, rng);
                }
                let term = self.disk.term;
                out.push((from, Message::Voted { term, yes }));
            }
            Message::Voted { term, yes } => {
                self.see(term, now, rng);
                if let Role::Candidate(votes) = &mut self.role
                    && yes
                    && term == self.disk.term
                {
                    votes.insert(from);
                    self.lead_if_elected();
                }
            }
            Message::Append { .. } => self.take(now, rng, from, message, out),
            Message::Appended {
                term,
                ok,
                matched,
                probe,
            } => {
                self.see(term, now, rng);
                if self.is_leader() && term == self.disk.term {
                    self.note(now, from, ok, matched, probe);
                }
            }
            Message::HandOver { term } => {
                if term == self.disk.term && self.members().1.votes(self.id) {
                    self.campaign(now, rng, true, out);
                }
            }
        }
    }

    /// Takes committed entries that another node vouches for, as a mirror does. The product keeps
    /// those beside its log; here they go into it, so an older leader must be refused from then on.
    pub(crate) fn absorb(&mut self, now: Ms, rng: &mut Rng, after: u64, entries: Vec<Rc<Entry>>) {
        if after <= self.last() {
            if let Some(last) = entries.last() {
                self.see(last.term, now, rng);
            }
            let through = after + entries.len() as u64;
            self.splice(after, entries);
            self.disk.commit = self.disk.commit.max(through);
        }
    }

    /// Committed entries after `index`.
    pub(crate) fn committed_after(&self, index: u64) -> Vec<Rc<Entry>> {
        let from = usize::try_from(index).unwrap_or(usize::MAX);
        let to = usize::try_from(self.disk.commit).unwrap_or(0);
        let all = self.disk.entries.get(from..to).unwrap_or_default();
        all.iter().take(BATCH).cloned().collect()
    }

    fn take(&mut self, now: Ms, rng: &mut Rng, from: NodeId, message: Message, out: &mut Out) {
        let Message::Append {
            term,
            prev,
            entries,
            commit,
            probe,
        } = message
        else {
            return;
        };
        self.see(term, now, rng);
        let mut answer = (false, 0, 0);
        if term == self.disk.term && !self.is_leader() {
            self.role = Role::Follower;
            self.leader = Some(from);
            self.heard_leader_at = now;
            self.rest(now, rng);
            if prev.0 <= self.last() && self.term_at(prev.0) == prev.1 {
                let through = prev.0 + entries.len() as u64;
                self.splice(prev.0, entries);
                self.disk.commit = self.disk.commit.max(commit.min(through));
                answer = (true, through, probe);
            } else {
                answer = (false, self.last().min(prev.0.saturating_sub(1)), probe);
            }
        }
        let (ok, matched, probe) = answer;
        let term = self.disk.term;
        out.push((
            from,
            Message::Appended {
                term,
                ok,
                matched,
                probe,
            },
        ));
    }

    fn splice(&mut self, after: u64, entries: Vec<Rc<Entry>>) {
        for (index, entry) in (after + 1..).zip(entries) {
            if index <= self.last() && self.term_at(index) != entry.term {
                self.disk
                    .entries
                    .truncate(usize::try_from(index - 1).unwrap_or(0));
                self.members.retain(|(at, _)| *at < index);
            }
            if index > self.last() {
                self.push(entry);
            }
        }
    }

    fn note(&mut self, now: Ms, from: NodeId, ok: bool, matched: u64, probe: u64) {
        let last = self.last();
        let progress = self.progress.entry(from).or_default();
        progress.heard_at = Some(now);
        progress.probe = progress.probe.max(probe);
        if ok {
            progress.matched = progress.matched.max(matched.min(last));
            progress.next = progress.matched + 1;
        } else {
            let back = progress.next.saturating_sub(1).min(matched + 1);
            progress.next = back.max(1);
        }
        if progress.next <= last {
            self.beat_at = 0;
        }
        self.advance();
    }

    fn advance(&mut self) {
        let (_, members) = self.members();
        let has = |id: &NodeId, index: u64| match self.progress.get(id) {
            _ if *id == self.id => true,
            Some(progress) => progress.matched >= index,
            None => false,
        };
        let newest = (self.disk.commit + 1..=self.last()).rev().find(|index| {
            self.term_at(*index) == self.disk.term
                && members.decide(self.only_new, |id| has(id, *index))
        });
        self.disk.commit = newest.unwrap_or(self.disk.commit);
        let (index, members) = self.members();
        if index <= self.disk.commit && !members.votes(self.id) {
            self.role = Role::Follower;
            self.leader = None;
        }
    }

    fn beat(&mut self, now: Ms, out: &mut Out) {
        self.beat_at = now + HEARTBEAT;
        self.probe += 1;
        let (last, term) = (self.last(), self.disk.term);
        for id in self.members().1.all() {
            if id == self.id {
                continue;
            }
            let progress = self.progress.entry(id).or_default();
            if progress.next == 0 {
                progress.next = last + 1;
            }
            let after = progress.next - 1;
            let from = usize::try_from(after).unwrap_or(usize::MAX);
            let rest = self.disk.entries.get(from..).unwrap_or_default();
            let entries = rest.iter().take(BATCH).cloned().collect();
            let prev = (after, self.term_at(after));
            let (commit, probe) = (self.disk.commit, self.probe);
            out.push((
                id,
                Message::Append {
                    term,
                    prev,
                    entries,
                    commit,
                    probe,
                },
            ));
        }
    }

    fn campaign(&mut self, now: Ms, rng: &mut Rng, handed_over: bool, out: &mut Out) {
        self.disk.term += 1;
        self.disk.voted_for = Some(self.id);
        self.role = Role::Candidate(BTreeSet::from([self.id]));
        self.leader = None;
        self.rest(now, rng);
        let term = self.disk.term;
        let last = (self.term_at(self.last()), self.last());
        let (_, members) = self.members();
        for id in members.all().into_iter().filter(|id| members.votes(*id)) {
            if id != self.id {
                out.push((
                    id,
                    Message::Vote {
                        term,
                        last,
                        handed_over,
                    },
                ));
            }
        }
        self.lead_if_elected();
    }

    fn lead_if_elected(&mut self) {
        let Role::Candidate(votes) = &self.role else {
            return;
        };
        if !self
            .members()
            .1
            .decide(self.only_new, |id| votes.contains(id))
        {
            return;
        }
        self.role = Role::Leader;
        self.leader = Some(self.id);
        self.progress.clear();
        self.probe = 0;
        self.propose(Body::Blank);
    }

    fn see(&mut self, term: u64, now: Ms, rng: &mut Rng) {
        if term > self.disk.term {
            self.disk.term = term;
            self.disk.voted_for = None;
            self.role = Role::Follower;
            self.leader = None;
            self.rest(now, rng);
        }
    }

    fn rest(&mut self, now: Ms, rng: &mut Rng) {
        self.deadline = now + rng.within(ELECTION, 2 * ELECTION);
    }

    fn push(&mut self, entry: Rc<Entry>) {
        self.disk.entries.push(entry);
        let index = self.last();
        if let Some(Body::Members(set)) = self.disk.entries.last().map(|entry| &entry.body) {
            self.members.push((index, set.clone()));
        }
    }
}

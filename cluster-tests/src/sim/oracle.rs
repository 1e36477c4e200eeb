//! What was promised, and what may never be: the judge of a simulation. It sees everything at once,
//! as nobody in the cluster does.

use std::collections::BTreeMap;
use std::rc::Rc;

use prost::Message as _;
use proto::epoch::Epoch;
use proto::ids::{NodeId, SandboxId};
use proto::wire::raft as pb;
use raft::command::{Command, Proposal, Receipt, Report};
use raft::state::{Desired, Phase, Resources, RowKey, Sandbox, State};

use super::bugs::Bug;
use super::log::{Body, Entry};

/// What a client asked for when it asked for a sandbox.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    pub(crate) request: u64,
    pub(crate) resources: Resources,
}

/// What a client was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Promise {
    Created(SandboxId),
    Stopped(SandboxId),
    /// Nothing that lasts.
    Nothing,
}

/// The whole truth.
#[derive(Debug, Default)]
pub(crate) struct Oracle {
    bug: Option<Bug>,
    entries: Vec<Rc<Entry>>,
    states: Vec<State>,
    pub(crate) wishes: BTreeMap<SandboxId, Wish>,
    by_request: BTreeMap<u64, SandboxId>,
    pub(crate) capacity: BTreeMap<NodeId, Resources>,
    pub(crate) promises: Vec<Promise>,
    /// Ends that were committed and whose guests must be dead.
    pub(crate) ended: Vec<(SandboxId, Epoch)>,
    /// Answers of what was applied, by index.
    answers: Vec<raft::command::Answer>,
    pub(crate) violation: Option<String>,
}

impl Oracle {
    pub(crate) fn new(bug: Option<Bug>) -> Self {
        Self {
            bug,
            ..Self::default()
        }
    }

    /// The newest committed state.
    pub(crate) fn newest(&self) -> State {
        self.states.last().cloned().unwrap_or_default()
    }

    pub(crate) fn committed(&self) -> u64 {
        self.entries.len() as u64
    }

    /// The state after the committed entry `index`.
    pub(crate) fn state(&self, index: u64) -> State {
        let at = index.checked_sub(1).and_then(|at| usize::try_from(at).ok());
        at.and_then(|at| self.states.get(at))
            .cloned()
            .unwrap_or_default()
    }

    pub(crate) fn answer(&self, index: u64) -> Option<raft::command::Answer> {
        let at = usize::try_from(index.checked_sub(1)?).ok()?;
        self.answers.get(at).cloned()
    }

    pub(crate) fn accuse(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    /// A node says that `entry` is committed at `index`.
    pub(crate) fn commit(&mut self, node: NodeId, index: u64, entry: &Rc<Entry>) {
        let known = usize::try_from(index - 1)
            .ok()
            .and_then(|at| self.entries.get(at));
        match known {
            Some(known) if Rc::ptr_eq(known, entry) => {}
            Some(_) => self.accuse(format!(
                "{node} committed another entry {index}: a write is lost"
            )),
            None => self.apply(index, entry),
        }
    }

    fn apply(&mut self, index: u64, entry: &Rc<Entry>) {
        let before = self.newest();
        let mut state = before.clone();
        let mut answer = Ok(Receipt::Done(0));
        if let Body::Command(proposal) = &entry.body {
            let proposal = self.planted(&state, Proposal::clone(proposal));
            self.plant_before(&mut state, &proposal.command);
            let command = proposal.command.clone();
            answer = state.apply(index, proposal).answer;
            self.plant(&before, &mut state);
            self.check_snapshots(&state);
            if answer.is_ok() {
                self.check_new(index, &before, &state);
                self.judge(&before, &state, &command);
            }
        }
        self.entries.push(Rc::clone(entry));
        self.states.push(state);
        self.answers.push(answer);
    }

    /// The command as a broken state machine would read it.
    fn planted(&self, state: &State, mut proposal: Proposal) -> Proposal {
        if self.bug == Some(Bug::StaleReportCounts)
            && let Command::ReportSandbox {
                id, epoch, node, ..
            } = &mut proposal.command
            && let Some(known) = state.sandbox(*id)
        {
            (*epoch, *node) = (known.epoch, known.owner);
        }
        proposal
    }

    /// The state as a broken state machine would take it for.
    fn plant_before(&self, state: &mut State, command: &Command) {
        if self.bug != Some(Bug::BegunIsGivenOut) || !matches!(command, Command::JudgeNode { .. }) {
            return;
        }
        let starts = |it: &&Sandbox| matches!(it.phase, Phase::Starting | Phase::Resuming);
        let ids: Vec<SandboxId> = state.sandboxes().filter(starts).map(|it| it.id).collect();
        let mut changes = Vec::new();
        for id in ids {
            let key = RowKey::Sandbox(id);
            let row = state.row(&key);
            let row = row.and_then(|row| pb::SandboxRow::decode(&row[..]).ok());
            if let Some(mut row) = row {
                row.not_begun = true;
                changes.push((key.encode(), Some(row.encode_to_vec())));
            }
        }
        if let Err(err) = state.follow(changes) {
            unreachable!("own rows are readable: {err}");
        }
    }

    /// What a broken state machine would have made of it.
    fn plant(&self, before: &State, state: &mut State) {
        let mut changes = Vec::new();
        if self.bug == Some(Bug::SnapshotGoesWithItsSandbox) {
            let rested = before
                .sandboxes()
                .filter_map(|it| Some((it.id, it.snapshot?)));
            let over = rested.filter(|(id, was)| {
                let rests = state.sandbox(*id).and_then(|it| it.snapshot);
                rests != Some(*was)
            });
            changes.extend(over.map(|(_, was)| (RowKey::Snapshot(was).encode(), None)));
        }
        if self.bug == Some(Bug::ForkTakesItsOriginsEpoch) {
            let new = state
                .sandboxes()
                .filter(|it| before.sandbox(it.id).is_none());
            for fork in new {
                let from = fork.origin.and_then(|id| state.snapshot(id));
                let key = RowKey::Sandbox(fork.id);
                let row = state.row(&key);
                let row = row.and_then(|row| pb::SandboxRow::decode(&row[..]).ok());
                if let (Some(from), Some(mut row)) = (from, row) {
                    row.epoch = from.epoch.0;
                    changes.push((key.encode(), Some(row.encode_to_vec())));
                }
            }
        }
        if let Err(err) = state.follow(changes) {
            unreachable!("own rows are readable: {err}");
        }
    }

    /// Whatever needs a snapshot finds it.
    fn check_snapshots(&mut self, state: &State) {
        for named in state.all_named() {
            if state.snapshot(named.snapshot).is_none() {
                let name = &named.name;
                self.accuse(format!("the snapshot that {name:?} stands for is gone"));
            }
        }
        for sandbox in state.sandboxes() {
            if sandbox.snapshots().any(|id| state.snapshot(id).is_none()) {
                self.accuse(format!("the snapshot that {} needs is gone", sandbox.id));
            }
        }
    }

    /// Every sandbox begins under an ownership of its own.
    fn check_new(&mut self, index: u64, before: &State, after: &State) {
        for sandbox in after.sandboxes() {
            if before.sandbox(sandbox.id).is_none() && sandbox.epoch != Epoch(index) {
                let (id, epoch) = (sandbox.id, sandbox.epoch);
                self.accuse(format!("{id} begins under the old epoch {epoch}"));
            }
        }
    }

    /// What may never come of one command.
    fn judge(&mut self, before: &State, after: &State, command: &Command) {
        match command {
            Command::CreateSandbox { id, .. } => {
                let request = self.wishes.get(id).map_or(0, |wish| wish.request);
                if *self.by_request.entry(request).or_insert(*id) != *id {
                    self.accuse(format!("request {request} made a second sandbox"));
                }
                self.check_room(after);
            }
            Command::JudgeNode { .. } => {
                self.check_epochs(before, after);
                self.check_room(after);
            }
            Command::ReportSandbox { id, report, .. } => {
                let over = matches!(report, Report::Stopped { .. } | Report::Failed { .. });
                let rests = after
                    .sandbox(*id)
                    .is_some_and(|it| it.phase == Phase::Paused);
                if let Some(sandbox) = after.sandbox(*id).filter(|_| over || rests) {
                    self.ended.push((*id, sandbox.epoch));
                }
            }
            _ => {}
        }
    }

    /// Epochs only grow, and an owner changes only with its epoch.
    fn check_epochs(&mut self, before: &State, after: &State) {
        for old in before.sandboxes() {
            let Some(new) = after.sandbox(old.id) else {
                continue;
            };
            if new.epoch < old.epoch || (new.owner != old.owner && new.epoch == old.epoch) {
                self.accuse(format!(
                    "{} went from epoch {} to {}",
                    old.id, old.epoch, new.epoch
                ));
            }
        }
    }

    /// What clients asked for fits where it was placed.
    fn check_room(&mut self, state: &State) {
        let mut held: BTreeMap<NodeId, Resources> = BTreeMap::new();
        for sandbox in state.sandboxes().filter(|it| it.phase.holds_resources()) {
            let wanted = self.wishes.get(&sandbox.id).map(|wish| wish.resources);
            let sum = held.entry(sandbox.owner).or_default();
            *sum = sum.plus(wanted.unwrap_or_default());
        }
        for (node, sum) in held {
            let all = self.capacity.get(&node).copied().unwrap_or_default();
            if sum.memory > all.memory || sum.vcpus > all.vcpus || sum.sandboxes > all.sandboxes {
                self.accuse(format!("{node} is over-committed: {sum:?} of {all:?}"));
            }
        }
    }

    /// Every promise to a client still holds in the newest state.
    pub(crate) fn check_promises(&mut self) {
        let state = self.newest();
        for promise in self.promises.clone() {
            let (id, stopped) = match promise {
                Promise::Created(id) => (id, false),
                Promise::Stopped(id) => (id, true),
                Promise::Nothing => continue,
            };
            match state.sandbox(id) {
                None => self.accuse(format!("the acknowledged create of {id} is lost")),
                Some(sandbox) if stopped && sandbox.desired != Desired::Stopped => {
                    self.accuse(format!("the acknowledged stop of {id} is lost"));
                }
                Some(_) => {}
            }
        }
    }
}

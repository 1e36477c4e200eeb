//! What holds of nodes, tokens, sandboxes and snapshots after any command, seen from both sides of
//! it. What holds of people and builds is in [`crate::world::promises`].

use std::collections::{BTreeMap, BTreeSet};

use proto::epoch::Epoch;
use proto::ids::{NodeId, NodeKey, SandboxId, TokenId};
use proto::units::Stamp;
use wrenn_raft::apply::Applied;
use wrenn_raft::command::{Command, Receipt, Report, Verdict};
use wrenn_raft::state::{
    Day, Happening, HostLoss, Liveness, Node, Phase, Resources, RowKey, Sandbox, State, Usage,
};

use crate::world::history::{TEAMS, team, token_of};

/// What cannot be seen from two states in a row.
#[derive(Default)]
pub(crate) struct Memory {
    epochs: BTreeMap<SandboxId, Epoch>,
    pub(crate) keys: BTreeMap<NodeId, NodeKey>,
    removed: BTreeSet<NodeKey>,
    pub(crate) redeemed: BTreeMap<TokenId, BTreeSet<NodeId>>,
    /// The runs that were let begin: a guest of them may have executed something.
    begun: BTreeSet<(SandboxId, Epoch)>,
}

/// One command and both sides of it.
pub(crate) struct Step<'a> {
    pub(crate) index: u64,
    pub(crate) at: Stamp,
    /// What is to be done, whoever asked for it.
    pub(crate) command: &'a Command,
    pub(crate) applied: &'a Applied,
    pub(crate) before: &'a State,
    pub(crate) after: &'a State,
}

fn sum_of(state: &State, node: NodeId) -> Resources {
    let held = state.sandboxes().filter(|it| it.owner == node);
    held.filter(|it| it.phase.holds_resources())
        .fold(Resources::default(), |sum, it| {
            sum.plus(it.spec.resources())
        })
}

/// Everything a node must be to be given a sandbox, spelled out once more.
fn may_take(state: &State, node: &Node, sandbox: &Sandbox) -> bool {
    let spec = &sandbox.spec;
    let boots = || {
        let template = state.template(&spec.template).expect("it is known");
        node.templates.get(&spec.template) == Some(&template.digest)
    };
    let fits = match sandbox.snapshot.or(sandbox.origin) {
        None => boots(),
        Some(id) => {
            let snapshot = state.snapshot(id).expect("it needs it");
            let needs = &snapshot.sealed.needs;
            let warm = snapshot.warm.as_ref();
            (&needs.vmm, &needs.machine) == (&node.vmm, &node.machine)
                && needs.cpu == node.cpu
                && node.templates.values().any(|digest| *digest == needs.base)
                && warm.is_none_or(|warm| {
                    boots() && warm.fits(spec) && warm.version == node.version && !warm.retired
                })
        }
    };
    node.liveness == Liveness::Alive
        && !node.cordoned
        && !node.draining
        && (node.team.is_none() || node.team == Some(sandbox.team))
        // It says where a sandbox begins.
        && (sandbox.snapshot.is_some() || spec.on_node.is_none_or(|only| only == node.id))
        && spec
            .node_tags
            .iter()
            .all(|(k, v)| node.tags.get(k) == Some(v))
        && fits
}

impl Step<'_> {
    pub(crate) fn check(&self, memory: &mut Memory) {
        self.check_rows();
        self.check_reservations();
        if self.before.keeps_audit() {
            self.check_usage();
            self.check_events();
        }
        if let Command::ReportSandbox {
            id,
            epoch,
            report: Report::Begins | Report::Running(_),
            ..
        } = self.command
            && self.applied.answer.is_ok()
        {
            memory.begun.insert((*id, *epoch));
        }
        for sandbox in self.after.sandboxes() {
            self.check_sandbox(sandbox, memory);
            let newest = memory.epochs.entry(sandbox.id).or_default();
            assert!(sandbox.epoch >= *newest, "the epoch of {} fell", sandbox.id);
            *newest = sandbox.epoch;
        }
        self.check_snapshots();
        self.check_names();
        self.check_nodes(memory);
        self.check_tokens(memory);
    }

    /// What rests on a snapshot finds it, and none is kept that nothing rests on.
    fn check_snapshots(&self) {
        for sandbox in self.after.sandboxes() {
            if matches!(sandbox.phase, Phase::Paused | Phase::Resuming) {
                assert!(sandbox.snapshot.is_some(), "{sandbox:?} rests on nothing");
            }
            if sandbox.phase.is_ended() {
                assert_eq!(sandbox.snapshot, None, "{} has ended", sandbox.id);
            }
            let is_sealed = sandbox.phase == Phase::Snapshotting;
            assert!(sandbox.checkpoint.is_none() || is_sealed, "{sandbox:?}");
            if let Some(id) = sandbox.origin {
                let snapshot = self
                    .after
                    .snapshot(id)
                    .expect("what it is made from is there");
                assert_ne!(snapshot.sandbox, sandbox.id, "it is made from itself");
                assert!(snapshot.warm.is_some() || snapshot.team == sandbox.team);
            }
            if let Some(id) = sandbox.snapshot {
                let snapshot = self.after.snapshot(id).expect("what it rests on is there");
                assert_eq!(snapshot.sandbox, sandbox.id);
                assert!(snapshot.epoch <= sandbox.epoch);
            }
        }
        for snapshot in self.after.snapshots() {
            let id = snapshot.sealed.id;
            let by_sandbox = self
                .after
                .sandboxes()
                .any(|it| it.snapshots().any(|of| of == id));
            let by_name = self.after.all_named().any(|it| it.snapshot == id);
            let warm = snapshot.warm.as_ref().is_some_and(|it| !it.retired);
            assert!(by_sandbox || by_name || warm, "nobody needs {snapshot:?}");
            assert!(self.after.is_needed(id));
            if warm {
                let base = snapshot.sealed.needs.base;
                assert!(self.after.templates().any(|it| it.digest == base));
            }
            for holder in &snapshot.holders {
                assert!(self.after.node(*holder).is_some(), "{holder} is gone");
            }
        }
    }

    /// A name stands for a snapshot of its own team, of its shape.
    fn check_names(&self) {
        for named in self.after.all_named() {
            let snapshot = self
                .after
                .snapshot(named.snapshot)
                .expect("it stands for one");
            assert_eq!(snapshot.team, named.team);
            let found = self.after.named(named.team, &named.name);
            assert_eq!(found, Some(named));
            assert!(self.after.named_by(named.team).any(|it| it == named));
        }
    }

    /// What the derived copy relies on.
    fn check_rows(&self) {
        let changes = self.applied.touched.iter();
        let changes = changes.map(|key| (key.encode(), self.after.row(key)));
        let mut copy = self.before.clone();
        copy.follow(changes).expect("own rows are readable");
        assert!(
            copy == *self.after,
            "the touched rows are not all that changed"
        );
        let read = State::from_rows(self.after.rows()).expect("own rows are readable");
        assert!(read == *self.after, "the state does not survive as rows");
        if self.applied.answer.is_err() {
            // Only that somebody asked, and was refused.
            let is_record = |key: &RowKey| matches!(key, RowKey::Audit(..));
            assert!(
                self.applied.touched.iter().all(is_record),
                "a refused command changed something"
            );
        }
        let changed = self.after.changes_since(self.before);
        assert_eq!(changed.is_empty(), self.before == self.after);
        for (key, _) in changed {
            let told = self.applied.touched.iter().any(|it| it.encode() == key);
            assert!(told, "a row changed and was not told");
        }
    }

    fn check_reservations(&self) {
        for node in self.after.nodes() {
            assert_eq!(self.after.reserved(node.id), sum_of(self.after, node.id));
            let held: Vec<_> = self.after.sandboxes_on(node.id).map(|it| it.id).collect();
            let all = self.after.sandboxes().filter(|it| it.owner == node.id);
            let all = all.filter(|it| it.phase.holds_resources());
            assert_eq!(held, all.map(|it| it.id).collect::<Vec<_>>());
        }
        let ended = self.after.sandboxes().filter(|it| it.phase.is_ended());
        let mut ended: Vec<_> = ended.map(|it| (it.updated_at, it.id)).collect();
        ended.sort_unstable();
        assert_eq!(self.after.ended_sandboxes().collect::<Vec<_>>(), ended);
    }

    /// What runs is the sum over what runs, and at the instant of a change exactly as much has been
    /// taken by what is written and what runs still as before it.
    fn check_usage(&self) {
        for team in (0..TEAMS).map(team) {
            let of_team = self
                .after
                .sandboxes_of(team)
                .filter(|it| it.phase.runs_guest());
            let runs = of_team.fold((0, 0, 0), |(count, vcpus, memory), it| {
                let memory = memory + u64::from(it.spec.memory.0);
                (count + 1, vcpus + it.spec.vcpus, memory)
            });
            let load = self.after.load_of(team);
            assert_eq!((load.sandboxes, load.vcpus, load.memory_mib), runs);
            let taken = |state: &State| {
                let days = state.usage_until(team, Day(0)..=Day(u32::MAX), self.at);
                let all = days
                    .iter()
                    .fold(Usage::default(), |sum, it| sum.plus(it.total()));
                (all.sandbox_ms, all.vcpu_ms, all.mib_ms)
            };
            let about_node = matches!(
                self.command,
                Command::JudgeNode { .. } | Command::AdmitNode(_) | Command::RemoveNode { .. }
            );
            // Whether a missing node's guests run is known once it is back.
            if !about_node {
                assert_eq!(taken(self.before), taken(self.after), "{:?}", self.command);
            }
        }
    }

    /// There is an event of every change of a phase, and of nothing else of a sandbox.
    fn check_events(&self) {
        let news = self
            .after
            .all_events()
            .filter(|it| it.id.index == self.index);
        let mut told: Vec<_> = news
            .filter_map(|event| match event.what {
                Happening::Sandbox { id, from, to, .. } => Some((id, from, to)),
                _ => None,
            })
            .collect();
        told.sort_unstable();
        let phase = |id| self.before.sandbox(id).map(|it: &Sandbox| it.phase);
        let moved = self
            .after
            .sandboxes()
            .map(|it| (it.id, phase(it.id), it.phase));
        let mut moved: Vec<_> = moved.filter(|(_, from, to)| *from != Some(*to)).collect();
        moved.sort_unstable();
        assert_eq!(told, moved);
    }

    fn check_sandbox(&self, sandbox: &Sandbox, memory: &Memory) {
        if sandbox.not_begun {
            let starts = matches!(sandbox.phase, Phase::Starting | Phase::Resuming);
            assert!(starts, "{sandbox:?} was not begun");
            let begun = memory.begun.contains(&(sandbox.id, sandbox.epoch));
            assert!(!begun, "{} was let begin", sandbox.id);
        }
        if sandbox.phase.holds_resources() {
            assert!(
                self.after.node(sandbox.owner).is_some(),
                "nobody is left who could end {}",
                sandbox.id
            );
        }
        let known = self.before.sandbox(sandbox.id);
        if known.is_some_and(|known| known.epoch == sandbox.epoch) {
            let owner = known.map(|known| known.owner);
            assert_eq!(owner, Some(sandbox.owner), "another owner under one epoch");
            return;
        }
        // Its ownership was given out by this command.
        assert_eq!(sandbox.epoch, Epoch(self.index));
        if known.is_none() && sandbox.phase == Phase::Error {
            assert!(
                !sandbox.reason.is_empty(),
                "a fork that found no room says so"
            );
            return;
        }
        let owner = self.after.node(sandbox.owner).expect("given to a node");
        assert!(
            may_take(self.after, owner, sandbox),
            "{owner:?} got {sandbox:?}"
        );
        let reserved = self.after.reserved(owner.id);
        assert!(
            owner.capacity.covers(reserved),
            "{} is over-committed",
            owner.id
        );
        if let Some(known) = known {
            self.check_given_out_again(known, memory);
        }
    }

    /// Only what is bound to a lease, once that is certainly over; and what its owner, which cannot be
    /// reached, was never let begin.
    fn check_given_out_again(&self, known: &Sandbox, memory: &Memory) {
        if known.phase == Phase::Paused {
            let meant = |id, snapshot| id == known.id && known.snapshot == Some(snapshot);
            let asked = matches!(self.command,
                Command::ResumeSandbox { id, snapshot, .. } if meant(*id, *snapshot));
            assert!(asked, "{:?} resumed {}", self.command, known.id);
            return;
        }
        if let Command::ReportSandbox { report, .. } = self.command {
            if matches!(report, Report::Failed { .. }) {
                self.check_resumed_elsewhere(known);
                return;
            }
            // Its owner sealed it, and so it goes on where it is bound for.
            assert!(matches!(report, Report::Sealed(_)), "{report:?}");
            assert_eq!(known.phase, Phase::Pausing, "{:?}: {known:?}", self.command);
            assert!(
                known.bound_for.is_some(),
                "nobody wanted {} to move",
                known.id
            );
            return;
        }
        let begun = memory.begun.contains(&(known.id, known.epoch));
        if self.gives_up_owner(known) && !begun && known.not_begun {
            return;
        }
        assert_eq!(known.spec.on_host_loss, HostLoss::Restart);
        assert!(known.phase.holds_resources(), "what ended stays ended");
        let owner = self.before.node(known.owner).expect("it had one");
        let lost_now = matches!(
            (self.command, owner.liveness),
            (
                Command::JudgeNode { node, incarnation, verdict: Verdict::Lost },
                Liveness::Missing { .. }
            ) if *node == owner.id && *incarnation == owner.incarnation
        );
        assert!(lost_now, "{:?} gave {} out again", self.command, known.id);
    }

    /// Its owner has ended it; the other host is one that it has not failed on.
    fn check_resumed_elsewhere(&self, known: &Sandbox) {
        let next = self
            .after
            .sandbox(known.id)
            .expect("it rests on a snapshot");
        assert_eq!(
            (known.phase, next.phase),
            (Phase::Resuming, Phase::Resuming)
        );
        assert!(!known.host_named, "{known:?}");
        assert!(next.failed_on.contains(&known.owner) && !next.failed_on.contains(&next.owner));
        assert_eq!(next.snapshot, known.snapshot);
    }

    /// Whether the command says that the owner cannot be reached.
    fn gives_up_owner(&self, known: &Sandbox) -> bool {
        let away = self.after.node(known.owner);
        let away = away.is_none_or(|node| !node.liveness.is_alive());
        let about = match self.command {
            Command::JudgeNode { node, .. } | Command::RemoveNode { node, .. } => Some(*node),
            _ => None,
        };
        away && about == Some(known.owner)
    }

    fn check_nodes(&self, memory: &mut Memory) {
        for node in self.before.nodes() {
            if self.after.node(node.id).is_none() {
                memory.removed.insert(node.key);
                let again = self.after.removed_node(&node.key);
                assert_eq!(again.map(|it| it.node), Some(node.id));
            }
        }
        let mut names = BTreeSet::new();
        for node in self.after.nodes() {
            let first = *memory.keys.entry(node.id).or_insert(node.key);
            assert_eq!(first, node.key, "{} changed hands", node.id);
            assert!(!memory.removed.contains(&node.key), "a removed key is back");
            assert!(
                names.insert(&node.name),
                "two nodes are called {}",
                node.name
            );
            assert!(node.cordoned || !node.draining);
            self.check_incarnation(node);
            let found = self.after.node_by_key(&node.key).map(|it| it.id);
            assert_eq!(found, Some(node.id), "two nodes have one key");
        }
        let full = |state: &State| state.nodes().any(|node| node.team.is_none());
        assert!(full(self.after) || !full(self.before), "no member is left");
    }

    /// It is the newest announcement's entry, so a verdict about an earlier one is told apart.
    fn check_incarnation(&self, node: &Node) {
        let announced = matches!(&self.command, Command::AdmitNode(it) if it.id == node.id)
            && self.applied.answer.is_ok();
        match self.before.node(node.id) {
            Some(known) if !announced => assert_eq!(node.incarnation, known.incarnation),
            _ => assert_eq!(node.incarnation, self.index),
        }
    }

    fn check_tokens(&self, memory: &mut Memory) {
        let Command::RedeemToken { token, .. } = self.command else {
            return;
        };
        if let Ok(Receipt::Admitted(id)) = self.applied.answer {
            let joined = memory.redeemed.entry(*token).or_default();
            joined.insert(id);
            let uses = (0..u8::MAX).map(token_of).find(|it| it.id == *token);
            let uses = uses.expect("all tokens are known").uses_left;
            assert!(joined.len() <= usize::try_from(uses).expect("small"));
            assert!(self.after.node(id).is_some(), "let in as nobody");
        }
    }
}

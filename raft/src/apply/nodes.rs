//! The commands about nodes, join tokens and the cluster itself.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::epoch::Epoch;
use proto::ids::{ClusterId, NodeId, SandboxId, SnapshotId, TokenId};
use proto::units::Stamp;

use super::Applied;
use crate::command::{Receipt, Refusal, Verdict};
use crate::state::{
    Cluster, Former, Liveness, Node, Outlived, Removed, RowKey, Sandbox, Settings, Snapshot, State,
    Token,
};

/// How long a token is remembered after its end, so that a late joiner is told what was wrong
/// with it.
const TOKEN_MEMORY: Duration = Duration::from_secs(24 * 3600);
/// Removed nodes that are remembered by name. Older ones are refused as strangers are.
const REMOVED_KEPT: usize = 1000;
/// Former ids of the cluster that are remembered: nobody loses a quorum for good as often.
const FORMER_KEPT: usize = 16;

impl State {
    pub(super) fn found_cluster(
        &mut self,
        at: Stamp,
        id: ClusterId,
        settings: Settings,
    ) -> Applied {
        if let Some(known) = self.cluster() {
            let same = known.id == id;
            let refusal = Refusal::IdTaken(known.id.to_string());
            return Applied::untouched(if same {
                Ok(Receipt::Done(0))
            } else {
                Err(refusal)
            });
        }
        if let Err(why) = settings.check() {
            return Applied::untouched(Err(Refusal::Unfit(why)));
        }
        self.put_cluster(Cluster {
            id,
            founded_at: at,
            settings,
            former: Vec::new(),
            outlived: None,
        });
        Applied::touched(Receipt::Done(1), RowKey::Cluster)
    }

    pub(super) fn recover_cluster(
        &mut self,
        at: Stamp,
        id: ClusterId,
        last: u64,
        lost: &[NodeId],
    ) -> Applied {
        let known = self.cluster().cloned();
        let is_done = |known: &Cluster| {
            let mut former = known.former.iter();
            known.id == id || former.any(|former| former.id == id)
        };
        if known.as_ref().is_some_and(is_done) {
            return Applied::untouched(Ok(Receipt::Done(0)));
        }
        let mut former = Vec::new();
        if let Some(known) = &known {
            former.clone_from(&known.former);
            former.push(Former { id: known.id, last });
            former.drain(..former.len().saturating_sub(FORMER_KEPT));
        }
        self.put_cluster(Cluster {
            id,
            founded_at: known.as_ref().map_or(at, |known| known.founded_at),
            outlived: known.as_ref().and_then(|known| known.outlived),
            settings: known.map_or_else(Settings::default, |known| known.settings),
            former,
        });
        let mut touched = vec![RowKey::Cluster];
        for node in lost {
            touched.extend(self.shut_out(at, *node));
        }
        touched.extend(self.forget_who_has_not_begun());
        Applied {
            answer: Ok(Receipt::Done(1)),
            touched,
        }
    }

    /// Takes everything for begun: the word that let it may be among what was lost of the log.
    fn forget_who_has_not_begun(&mut self) -> Vec<RowKey> {
        let waits = self.sandboxes().filter(|it| it.not_begun);
        let waits: Vec<Sandbox> = waits.cloned().collect();
        let mut touched = Vec::new();
        for sandbox in waits {
            touched.push(RowKey::Sandbox(sandbox.id));
            self.put_sandbox(Sandbox {
                not_begun: false,
                ..sandbox
            });
        }
        touched
    }

    /// Refuses a node's key from now on. What it had is settled when it is removed, which has to
    /// wait for its lease.
    fn shut_out(&mut self, at: Stamp, id: NodeId) -> Vec<RowKey> {
        let Some(known) = self.node(id).cloned() else {
            return Vec::new();
        };
        let mut touched = self.remember_removed(Removed {
            key: known.key,
            node: id,
            name: known.name.clone(),
            at,
        });
        self.put_node(Node {
            cordoned: true,
            ..known
        });
        touched.push(RowKey::Node(id));
        touched
    }

    pub(super) fn put_settings(&mut self, at: Stamp, settings: Settings) -> Applied {
        if let Err(why) = settings.check() {
            return Applied::untouched(Err(Refusal::Unfit(why)));
        }
        let Some(known) = self.cluster().cloned() else {
            let why = "the cluster is not founded yet".into();
            return Applied::untouched(Err(Refusal::Unfit(why)));
        };
        if settings == known.settings {
            return Applied::untouched(Ok(Receipt::Done(1)));
        }
        let times = |of: Settings| (of.lease_ttl, of.lease_grace);
        let outlived = if times(settings) == times(known.settings) {
            known.outlived
        } else {
            Some(Outlived::by(known.outlived, known.settings, at))
        };
        self.put_cluster(Cluster {
            settings,
            outlived,
            ..known
        });
        Applied::touched(Receipt::Done(1), RowKey::Cluster)
    }

    pub(super) fn add_token(&mut self, at: Stamp, mut token: Token) -> Applied {
        if let Some(known) = self.token(token.id) {
            let same = known.public_key == token.public_key;
            let refusal = Refusal::IdTaken(token.id.to_string());
            return Applied::untouched(if same {
                Ok(Receipt::Done(1))
            } else {
                Err(refusal)
            });
        }
        if token.uses_left == 0 {
            let why = "a join token has at least one use".into();
            return Applied::untouched(Err(Refusal::Unfit(why)));
        }
        token.created_at = at;
        // A new token is open and unused, whatever the proposer wrote.
        token.revoked = false;
        token.redeemed.clear();
        let mut touched = self.forget_tokens(at);
        touched.push(RowKey::Token(token.id));
        self.put_token(token);
        Applied {
            answer: Ok(Receipt::Done(1)),
            touched,
        }
    }

    /// Drops tokens that ended long ago: whenever one is made, so that no timer is needed.
    fn forget_tokens(&mut self, at: Stamp) -> Vec<RowKey> {
        let old: Vec<TokenId> = self
            .tokens()
            .filter(|token| at.since(token.expires_at) > TOKEN_MEMORY)
            .map(|token| token.id)
            .collect();
        for id in &old {
            self.drop_token(*id);
        }
        old.into_iter().map(RowKey::Token).collect()
    }

    pub(super) fn revoke_token(&mut self, id: TokenId) -> Applied {
        let Some(known) = self.token(id).cloned() else {
            return Applied::untouched(Err(Refusal::NoSuchToken(id.to_string())));
        };
        if known.revoked {
            return Applied::untouched(Ok(Receipt::Done(1)));
        }
        self.put_token(Token {
            revoked: true,
            ..known
        });
        Applied::touched(Receipt::Done(1), RowKey::Token(id))
    }

    pub(super) fn redeem_token(
        &mut self,
        at: Stamp,
        id: NodeId,
        token: TokenId,
        mut node: Node,
    ) -> Applied {
        let mut known = match self.redeemable(at, token, &node) {
            Ok(Ok(token)) => token,
            Ok(Err(admitted)) => return Applied::untouched(Ok(Receipt::Admitted(admitted))),
            Err(refusal) => return Applied::untouched(Err(refusal)),
        };
        known.uses_left -= 1;
        known.redeemed.push((node.key, id));
        node.name = self.free_name(node.name, id);
        node.id = id;
        node.team = known.team;
        node.admitted_at = at;
        node.cordoned = false;
        node.draining = false;
        node.liveness = Liveness::Alive;
        node.incarnation = id.0;
        self.put_token(known);
        self.put_node(node);
        Applied {
            answer: Ok(Receipt::Admitted(id)),
            touched: vec![RowKey::Token(token), RowKey::Node(id)],
        }
    }

    /// The token, if `node` may join by it; or the id it has joined under already.
    fn redeemable(
        &self,
        at: Stamp,
        id: TokenId,
        node: &Node,
    ) -> Result<Result<Token, NodeId>, Refusal> {
        if let Some(removed) = self.removed_node(&node.key) {
            return Err(was_removed(removed.node));
        }
        let known = self
            .token(id)
            .ok_or_else(|| Refusal::NoSuchToken(id.to_string()))?;
        let joined = known.redeemed.iter().find(|(key, _)| *key == node.key);
        if let Some((_, admitted)) = joined {
            // Its removal may be so long ago that only the token remembers it.
            let member = self.node(*admitted).map(|node| Err(node.id));
            return member.ok_or_else(|| was_removed(*admitted));
        }
        if let Some(member) = self.node_by_key(&node.key) {
            let why = format!("this node is a member already, as {}", member.id);
            return Err(Refusal::Unfit(why));
        }
        if known.revoked {
            return Err(Refusal::NoSuchToken(id.to_string()));
        }
        if at > known.expires_at {
            return Err(Refusal::TokenExpired(id.to_string()));
        }
        if known.uses_left == 0 {
            return Err(Refusal::TokenUsed(id.to_string()));
        }
        Ok(Ok(known.clone()))
    }

    /// The name, or one made of it that no other node has.
    fn free_name(&self, name: String, id: NodeId) -> String {
        let taken = |name: &str| self.nodes().any(|other| other.name == name);
        let mut free = name;
        while taken(&free) {
            free = format!("{free}-{}", id.0);
        }
        free
    }

    pub(super) fn admit_node(&mut self, at: Stamp, index: u64, mut node: Node) -> Applied {
        let known = self.node(node.id).cloned();
        let other_key = known.as_ref().is_some_and(|known| known.key != node.key);
        let other_id = self
            .nodes()
            .any(|known| known.key == node.key && known.id != node.id);
        if other_key || other_id {
            return Applied::untouched(Err(Refusal::IdTaken(node.id.to_string())));
        }
        match known {
            Some(known) => {
                // Its own facts are new; what was decided about it stays.
                node.name = known.name;
                node.admitted_at = known.admitted_at;
                node.cordoned = known.cordoned;
                node.draining = known.draining;
                node.team = known.team;
                node.tags = known.tags;
                // What it had was given out again: it starts over, and is back once it renews.
                node.liveness = match known.liveness {
                    Liveness::Lost { since } => Liveness::Missing { since },
                    other => other,
                };
            }
            None if self.nodes().next().is_none() => {
                // Joiners get the index of a later entry: none may ever meet the founder's id.
                if node.id.0 == 0 || node.id.0 > index {
                    let why = format!("the first node cannot be {}", node.id);
                    return Applied::untouched(Err(Refusal::Unfit(why)));
                }
                node.admitted_at = at;
            }
            // Only a token lets further nodes in; this one was removed.
            None => return Applied::untouched(Err(Refusal::NoSuchNode(node.id.to_string()))),
        }
        node.incarnation = index;
        let mut touched = vec![RowKey::Node(node.id)];
        self.put_node(node);
        touched.extend(self.retire_warm());
        Applied {
            answer: Ok(Receipt::Done(1)),
            touched,
        }
    }

    pub(super) fn change_node(
        &mut self,
        id: NodeId,
        cordoned: Option<bool>,
        draining: Option<bool>,
        tags: Option<BTreeMap<String, String>>,
    ) -> Applied {
        let Some(known) = self.node(id).cloned() else {
            return Applied::untouched(Err(Refusal::NoSuchNode(id.to_string())));
        };
        let draining = draining.unwrap_or(known.draining);
        let cordoned = cordoned.unwrap_or(known.cordoned);
        let next = Node {
            // What is being emptied takes nothing new.
            cordoned: cordoned || draining,
            draining,
            tags: tags.unwrap_or_else(|| known.tags.clone()),
            ..known.clone()
        };
        if next == known {
            return Applied::untouched(Ok(Receipt::Done(1)));
        }
        self.put_node(next);
        Applied::touched(Receipt::Done(1), RowKey::Node(id))
    }

    pub(super) fn judge_node(
        &mut self,
        at: Stamp,
        epoch: Epoch,
        id: NodeId,
        incarnation: u64,
        verdict: Verdict,
    ) -> Applied {
        let Some(known) = self.node(id).cloned() else {
            return Applied::untouched(Err(Refusal::NoSuchNode(id.to_string())));
        };
        let liveness = verdict.applied_to(known.liveness, at);
        let skips = match known.liveness {
            Liveness::Alive => verdict == Verdict::Lost,
            Liveness::Missing { .. } => false,
            // What it had is given out. It comes back under another incarnation, or the node could
            // take an old row of its own, from before, for its return.
            Liveness::Lost { .. } => true,
        };
        // A verdict on an earlier start says nothing of this one; from alive to lost is no step,
        // nor is there one back from lost to missing.
        if known.incarnation != incarnation || liveness == known.liveness || skips {
            return Applied::untouched(Ok(Receipt::Done(0)));
        }
        let name = known.name.clone();
        self.put_node(Node { liveness, ..known });
        let mut touched = vec![RowKey::Node(id)];
        if !liveness.is_alive() {
            touched.extend(self.place_those_not_begun(at, epoch, id));
        }
        if verdict == Verdict::Lost {
            let why = format!("its host {name} was lost");
            touched.extend(self.settle_sandboxes(at, epoch, id, false, &why));
        }
        Applied {
            answer: Ok(Receipt::Done(1)),
            touched,
        }
    }

    pub(super) fn remove_node(
        &mut self,
        at: Stamp,
        epoch: Epoch,
        id: NodeId,
        declared_dead: bool,
    ) -> Applied {
        let Some(known) = self.node(id).cloned() else {
            let gone = self.removed().any(|removed| removed.node == id);
            let refusal = Refusal::NoSuchNode(id.to_string());
            return Applied::untouched(if gone {
                Ok(Receipt::Done(0))
            } else {
                Err(refusal)
            });
        };
        if let Err(why) = self.may_remove(&known, declared_dead) {
            return Applied::untouched(Err(Refusal::Unfit(why)));
        }
        let why = format!("its host {} was declared dead", known.name);
        // First of all: nothing may be resumed from what is gone with it.
        let mut touched = self.forget_holder(id);
        touched.extend(self.settle_sandboxes(at, epoch, id, true, &why));
        self.drop_node(id);
        touched.extend(self.retire_warm());
        touched.extend(self.remember_removed(Removed {
            key: known.key,
            node: id,
            name: known.name,
            at,
        }));
        touched.push(RowKey::Node(id));
        Applied {
            answer: Ok(Receipt::Done(1)),
            touched,
        }
    }

    fn may_remove(&self, node: &Node, declared_dead: bool) -> Result<(), String> {
        let mut others = self.nodes().filter(|other| other.id != node.id);
        // Hosts of one team hold a part of the state and cannot carry the cluster on.
        if node.team.is_none() && !others.any(|other| other.team.is_none()) {
            return Err("it is the last node of the cluster".into());
        }
        let (at_rest, names) = self.only_held_by(node.id);
        let at_rest = u32::try_from(at_rest.len()).unwrap_or(u32::MAX);
        let held = self.reserved(node.id).sandboxes.saturating_add(at_rest);
        let mut has = Vec::new();
        for (count, one, many) in [
            (held, "capsule", "capsules"),
            (
                names,
                "snapshot that no other host holds",
                "snapshots that no other host holds",
            ),
        ] {
            match count {
                0 => {}
                1 => has.push(format!("1 {one}")),
                count => has.push(format!("{count} {many}")),
            }
        }
        if has.is_empty() {
            return Ok(());
        }
        let (name, has) = (&node.name, has.join(" and "));
        match (declared_dead, node.liveness) {
            (false, _) => Err(format!(
                "{name} has {has}: drain it first, or, if the host is dead for good, \
                 declare it dead with --force"
            )),
            (true, Liveness::Alive) => Err(format!(
                "{name} is alive and has {has}: drain it, or stop it first"
            )),
            (true, Liveness::Missing { .. } | Liveness::Lost { .. }) => Ok(()),
        }
    }

    /// The sandboxes that end with a node if it goes now: those it runs, and those that need what
    /// nobody else has.
    #[must_use]
    pub fn lost_with(&self, id: NodeId) -> Vec<SandboxId> {
        let here = self.sandboxes().filter(|it| it.owner == id);
        let here = here.filter(|it| it.phase.holds_resources()).map(|it| it.id);
        here.chain(self.only_held_by(id).0).collect()
    }

    /// The sandboxes that rest, could fall back, or live on what nobody but this node has, and how
    /// many names stand for such. Sandboxes that it runs are counted as such.
    fn only_held_by(&self, id: NodeId) -> (Vec<SandboxId>, u32) {
        let elsewhere = |holder: &NodeId| {
            let node = self.node(*holder).filter(|node| node.liveness.is_alive());
            *holder != id && node.is_some()
        };
        let only = |snapshot: &&Snapshot| {
            snapshot.holders.contains(&id) && !snapshot.holders.iter().any(elsewhere)
        };
        let only = self.snapshots().filter(only).map(|it| it.sealed.id);
        let only: BTreeSet<SnapshotId> = only.collect();
        let away = |it: &&Sandbox| it.owner != id || !it.phase.holds_resources();
        let needs = |it: &&Sandbox| it.snapshots().any(|id| only.contains(&id));
        let sandboxes = self.sandboxes().filter(away).filter(needs);
        let names = self.all_named().filter(|it| only.contains(&it.snapshot));
        let names = u32::try_from(names.count()).unwrap_or(u32::MAX);
        (sandboxes.map(|it| it.id).collect(), names)
    }

    fn remember_removed(&mut self, removed: Removed) -> Vec<RowKey> {
        let newest = removed.key;
        let mut touched = vec![RowKey::Removed(newest)];
        self.put_removed(removed);
        if self.removed().count() > REMOVED_KEPT {
            // A proposer's clock may be behind: what was just removed stays all the same.
            let older = self.removed().filter(|it| it.key != newest);
            let oldest = older.min_by_key(|it| (it.at, it.node));
            if let Some(key) = oldest.map(|it| it.key) {
                self.drop_removed(&key);
                touched.push(RowKey::Removed(key));
            }
        }
        touched
    }
}

fn was_removed(node: NodeId) -> Refusal {
    Refusal::Unfit(format!(
        "this node was removed from the cluster as {node} and its key is not taken again; remove \
         its data directory so that it gets a new one"
    ))
}

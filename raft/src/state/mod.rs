//! What the log has led to.
//!
//! All tables are persistent maps: a clone is cheap and stands still, so readers and snapshots
//! never block apply. A table's row is what snapshots and the state database store, under a key
//! of one table byte and the object's id. What `tally` keeps is derived from the sandboxes and never
//! stored. `slice` is the part of a state that a host of one team may see.

mod audit;
mod builds;
mod channels;
mod cluster;
mod events;
mod keys;
mod named;
mod nodes;
mod rows;
mod sandboxes;
mod slice;
mod snapshots;
mod tally;
mod teams;
mod templates;
mod tokens;
mod usage;

use proto::ids::{
    BuildId, ChannelId, KeyId, NodeId, NodeKey, SandboxId, SnapshotId, TeamId, TokenId, UserId,
};
use proto::units::Stamp;
use rpds::{HashTrieMapSync, RedBlackTreeMapSync, RedBlackTreeSetSync};

pub use audit::{ALL_RECORDS, Action, Actor, AuditRecord, NoSuchAction, TEAM_RECORDS};
pub use builds::{Build, BuildLog, BuildSpec, BuildStatus, STEP_PREFIX};
pub use channels::Channel;
pub use cluster::{Cluster, Former, Outlived, Settings};
pub use events::{BadEventId, Event, EventId, EventsSince, Happening};
pub use keys::{Key, Scope};
pub use named::{Checkpoint, Named, Purpose};
pub use nodes::{Liveness, Node, Removed, Resources};
pub use rows::{BadRow, Change, Row, RowKey};
pub use sandboxes::{Desired, GuestVersions, HostLoss, IdleAction, Phase, Sandbox, SandboxSpec};
pub use snapshots::{Needs, SealTimes, Sealed, Snapshot, SnapshotKind, Warm};
pub use teams::{Member, Role, Team};
pub use templates::Template;
pub use tokens::Token;
pub use usage::{Day, TeamLoad, Usage, UsageBook, UsageDay};

use audit::Rings;
use events::Events;
pub(crate) use events::short;
use tally::Tally;

/// The replicated state after some log index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    cluster: Option<Cluster>,
    nodes: RedBlackTreeMapSync<NodeId, Node>,
    keys: RedBlackTreeMapSync<KeyId, Key>,
    /// Looking a key up by its hash happens on every request.
    keys_by_hash: HashTrieMapSync<[u8; 32], KeyId>,
    templates: RedBlackTreeMapSync<String, Template>,
    sandboxes: RedBlackTreeMapSync<SandboxId, Sandbox>,
    tally: Tally,
    snapshots: RedBlackTreeMapSync<SnapshotId, Snapshot>,
    /// Those of `snapshots` that creates look through.
    warm: RedBlackTreeSetSync<SnapshotId>,
    named: RedBlackTreeMapSync<(TeamId, String), Named>,
    tokens: RedBlackTreeMapSync<TokenId, Token>,
    removed: RedBlackTreeMapSync<NodeKey, Removed>,
    usage: RedBlackTreeMapSync<(TeamId, Day), UsageDay>,
    events: Events,
    channels: RedBlackTreeMapSync<ChannelId, Channel>,
    teams: RedBlackTreeMapSync<TeamId, Team>,
    members: RedBlackTreeMapSync<(TeamId, UserId), Member>,
    audit: Rings,
    builds: RedBlackTreeMapSync<BuildId, Build>,
    build_logs: RedBlackTreeMapSync<(BuildId, u32), Vec<u8>>,
}

impl State {
    /// The cluster, once it is founded.
    #[must_use]
    pub const fn cluster(&self) -> Option<&Cluster> {
        self.cluster.as_ref()
    }

    /// What operators set, or the defaults.
    #[must_use]
    pub fn settings(&self) -> Settings {
        self.cluster
            .as_ref()
            .map_or_else(Settings::default, |cluster| cluster.settings)
    }

    /// Every join token that is still remembered, by id.
    pub fn tokens(&self) -> impl Iterator<Item = &Token> {
        self.tokens.values()
    }

    /// One join token.
    #[must_use]
    pub fn token(&self, id: TokenId) -> Option<&Token> {
        self.tokens.get(&id)
    }

    /// Every node that was removed, by key.
    pub fn removed(&self) -> impl Iterator<Item = &Removed> {
        self.removed.values()
    }

    /// What is remembered of a removed node.
    #[must_use]
    pub fn removed_node(&self, key: &NodeKey) -> Option<&Removed> {
        self.removed.get(key)
    }

    /// The node with this key.
    #[must_use]
    pub fn node_by_key(&self, key: &NodeKey) -> Option<&Node> {
        self.nodes.values().find(|node| node.key == *key)
    }

    /// Every node, in the order of their ids.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// One node.
    #[must_use]
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(&id)
    }

    /// What sandboxes hold of a node's capacity.
    #[must_use]
    pub fn reserved(&self, id: NodeId) -> Resources {
        self.tally.reserved(id)
    }

    /// Every template, by name.
    pub fn templates(&self) -> impl Iterator<Item = &Template> {
        self.templates.values()
    }

    /// One template.
    #[must_use]
    pub fn template(&self, name: &str) -> Option<&Template> {
        self.templates.get(name)
    }

    /// Every sandbox, ended ones included, by id.
    pub fn sandboxes(&self) -> impl Iterator<Item = &Sandbox> {
        self.sandboxes.values()
    }

    /// The sandboxes that hold resources of a node, by id. A node looks for its own on every
    /// change, so this never walks through those of others.
    pub fn sandboxes_on(&self, node: NodeId) -> impl Iterator<Item = &Sandbox> {
        let ids = self.tally.held_by(node);
        ids.filter_map(|id| self.sandboxes.get(&id))
    }

    /// The sandboxes of one team, ended ones included, by id.
    pub fn sandboxes_of(&self, team: TeamId) -> impl Iterator<Item = &Sandbox> {
        let ids = self.tally.of_team(team);
        ids.filter_map(|id| self.sandboxes.get(&id))
    }

    /// The sandboxes that have ended and when they last changed, the earliest first.
    pub fn ended_sandboxes(&self) -> impl Iterator<Item = (Stamp, SandboxId)> {
        self.tally.ended()
    }

    /// One sandbox.
    #[must_use]
    pub fn sandbox(&self, id: SandboxId) -> Option<&Sandbox> {
        self.sandboxes.get(&id)
    }

    /// Every snapshot, by id.
    pub fn snapshots(&self) -> impl Iterator<Item = &Snapshot> {
        self.snapshots.values()
    }

    /// One snapshot.
    #[must_use]
    pub fn snapshot(&self, id: SnapshotId) -> Option<&Snapshot> {
        self.snapshots.get(&id)
    }

    /// The snapshots of guests that had just booted, by id.
    pub fn warm(&self) -> impl Iterator<Item = &Snapshot> {
        self.warm.iter().filter_map(|id| self.snapshots.get(id))
    }

    /// Whether anything needs this snapshot: a sandbox that rests on it or was made from it, a name,
    /// or the next create.
    #[must_use]
    pub fn is_needed(&self, id: SnapshotId) -> bool {
        self.warm.contains(&id) || self.tally.is_used(id)
    }

    /// Every snapshot with a name, by team and name.
    pub fn all_named(&self) -> impl Iterator<Item = &Named> {
        self.named.values()
    }

    /// The snapshots that one team has given a name, by name.
    pub fn named_by(&self, team: TeamId) -> impl Iterator<Item = &Named> {
        let from = self.named.range((team, String::new())..);
        from.take_while(move |((whose, _), _)| *whose == team)
            .map(|(_, named)| named)
    }

    /// The snapshot to which a team has given this name.
    #[must_use]
    pub fn named(&self, team: TeamId, name: &str) -> Option<&Named> {
        self.named.get(&(team, name.to_owned()))
    }

    /// Every API key, by id.
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.keys.values()
    }

    /// The key with this SHA-256 hash, unless it was revoked.
    #[must_use]
    pub fn key_by_hash(&self, hash: &[u8; 32]) -> Option<&Key> {
        self.keys_by_hash
            .get(hash)
            .and_then(|id| self.keys.get(id))
            .filter(|key| !key.revoked)
    }

    /// One API key, revoked or not.
    #[must_use]
    pub fn key(&self, id: KeyId) -> Option<&Key> {
        self.keys.get(&id)
    }

    /// Every team that has a record, by id.
    pub fn teams(&self) -> impl Iterator<Item = &Team> {
        self.teams.values()
    }

    /// One team's record.
    #[must_use]
    pub fn team(&self, id: TeamId) -> Option<&Team> {
        self.teams.get(&id)
    }

    /// Every member of every team, by team and user.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.members.values()
    }

    /// The members of one team, by user.
    pub fn members_of(&self, team: TeamId) -> impl Iterator<Item = &Member> {
        let from = self.members.range((team, UserId::default())..);
        from.take_while(move |((whose, _), _)| *whose == team)
            .map(|(_, member)| member)
    }

    /// One member of a team.
    #[must_use]
    pub fn member(&self, team: TeamId, user: UserId) -> Option<&Member> {
        self.members.get(&(team, user))
    }

    /// The audit log of one team, the oldest record first.
    pub fn audit_of(&self, team: TeamId) -> impl DoubleEndedIterator<Item = &AuditRecord> {
        self.audit.of_team(team)
    }

    /// The records of all teams that were made after the log's entry `entry`, the oldest first.
    pub fn audit_after(&self, entry: u64) -> impl DoubleEndedIterator<Item = &AuditRecord> {
        self.audit.after(entry)
    }

    /// One record of a team's audit log.
    #[must_use]
    pub fn audit_record(&self, team: TeamId, entry: u64) -> Option<&AuditRecord> {
        self.audit.get(team, entry)
    }

    /// Whether records are kept: from the first change on that named who asked for it.
    #[must_use]
    pub fn keeps_audit(&self) -> bool {
        !self.audit.is_empty()
    }

    pub(crate) fn put_team(&mut self, team: Team) {
        self.teams.insert_mut(team.id, team);
    }

    pub(crate) fn drop_team(&mut self, id: TeamId) {
        self.teams.remove_mut(&id);
    }

    pub(crate) fn put_member(&mut self, member: Member) {
        let key = (member.team, member.user);
        self.members.insert_mut(key, member);
    }

    pub(crate) fn drop_member(&mut self, team: TeamId, user: UserId) {
        self.members.remove_mut(&(team, user));
    }

    pub(crate) fn put_audit(&mut self, record: AuditRecord) {
        self.audit.put(record);
    }

    pub(crate) fn drop_audit(&mut self, team: TeamId, entry: u64) {
        self.audit.drop(team, entry);
    }

    /// Which record has to go once `team` has one more than fits.
    pub(crate) fn surplus_audit(&self, team: TeamId) -> Option<(TeamId, u64)> {
        self.audit.surplus(team)
    }

    pub(crate) fn put_node(&mut self, node: Node) {
        self.nodes.insert_mut(node.id, node);
    }

    pub(crate) fn put_cluster(&mut self, cluster: Cluster) {
        self.cluster = Some(cluster);
    }

    pub(crate) fn drop_cluster(&mut self) {
        self.cluster = None;
    }

    pub(crate) fn put_token(&mut self, token: Token) {
        self.tokens.insert_mut(token.id, token);
    }

    pub(crate) fn drop_token(&mut self, id: TokenId) {
        self.tokens.remove_mut(&id);
    }

    pub(crate) fn put_removed(&mut self, removed: Removed) {
        self.removed.insert_mut(removed.key, removed);
    }

    pub(crate) fn drop_removed(&mut self, key: &NodeKey) {
        self.removed.remove_mut(key);
    }

    pub(crate) fn drop_node(&mut self, id: NodeId) {
        self.nodes.remove_mut(&id);
    }

    pub(crate) fn put_template(&mut self, template: Template) {
        self.templates.insert_mut(template.name.clone(), template);
    }

    pub(crate) fn drop_template(&mut self, name: &str) {
        self.templates.remove_mut(name);
    }

    /// Whether a key has this hash, revoked or not.
    pub(crate) fn has_key_hash(&self, hash: &[u8; 32]) -> bool {
        self.keys_by_hash.contains_key(hash)
    }

    pub(crate) fn put_key(&mut self, key: Key) {
        self.drop_key(key.id);
        self.keys_by_hash.insert_mut(key.hash, key.id);
        self.keys.insert_mut(key.id, key);
    }

    pub(crate) fn drop_key(&mut self, id: KeyId) {
        if let Some(old) = self.keys.get(&id) {
            self.keys_by_hash.remove_mut(&old.hash);
            self.keys.remove_mut(&id);
        }
    }

    pub(crate) fn put_snapshot(&mut self, snapshot: Snapshot) {
        let id = snapshot.sealed.id;
        if snapshot.warm.as_ref().is_some_and(|it| !it.retired) {
            self.warm.insert_mut(id);
        } else {
            self.warm.remove_mut(&id);
        }
        self.snapshots.insert_mut(id, snapshot);
    }

    pub(crate) fn drop_snapshot(&mut self, id: SnapshotId) {
        self.warm.remove_mut(&id);
        self.snapshots.remove_mut(&id);
    }

    pub(crate) fn put_named(&mut self, named: Named) {
        self.drop_named(named.team, &named.name);
        self.tally.use_snapshot(named.snapshot);
        let key = (named.team, named.name.clone());
        self.named.insert_mut(key, named);
    }

    pub(crate) fn drop_named(&mut self, team: TeamId, name: &str) {
        let key = (team, name.to_owned());
        if let Some(old) = self.named.get(&key) {
            self.tally.let_go_of_snapshot(old.snapshot);
            self.named.remove_mut(&key);
        }
    }

    /// Inserts or replaces a sandbox and moves its reservation along.
    pub(crate) fn put_sandbox(&mut self, sandbox: Sandbox) {
        if let Some(old) = self.sandboxes.get(&sandbox.id) {
            self.tally.remove(old);
        }
        self.tally.add(&sandbox);
        self.sandboxes.insert_mut(sandbox.id, sandbox);
    }

    pub(crate) fn drop_sandbox(&mut self, id: SandboxId) {
        if let Some(old) = self.sandboxes.get(&id) {
            self.tally.remove(old);
            self.sandboxes.remove_mut(&id);
        }
    }
}

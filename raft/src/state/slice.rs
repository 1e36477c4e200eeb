//! The part of a state that a host of one team may see, and how such a host follows it.
//!
//! A host of one team runs on somebody else's machine: whatever is sent there is given away. So it
//! is never sent the log. Members cut a slice, which is a [`State`] of its own, and send what
//! changed between the slice that the host has and the newest one:
//!
//! ```text
//! member   state at 90 -> sliced -> older -.
//!          state at 97 -> sliced -> newer --> newer.changes_since(&older) -> rows -.
//! host     slice at 90 ------------------------------------------------> follow -> slice at 97
//! ```
//!
//! A slice is made of what is listed here and of nothing else; a table that is added to the state
//! later is not in it until somebody says so.
//!
//! | in the slice | how much of it |
//! |---|---|
//! | the cluster | its id and settings |
//! | the host's own node | all |
//! | voters | id, key and addresses: what dialling them takes; their load, tags and names stay out |
//! | templates | all: they belong to the platform |
//! | its team's keys | all, revoked ones too, so that a revocation arrives |
//! | its team and its members | all; a member's role limits the keys held |
//! | its team's sandboxes | all, on whichever node they are |
//! | its team's snapshots | those that its sandboxes need or that have a name, whoever holds them |
//! | its team's names of snapshots | all |
//! | who holds or sealed those | as voters, and the team; of a sealer that was removed its key and id |
//! | the audit log | nothing: it grows with every change, and members answer for it |
//! | other nodes, join tokens, other removed nodes, builds, other teams' keys, sandboxes and snapshots | nothing |
//! | usage, events, channels | nothing: members answer for them |

use std::collections::BTreeSet;

use proto::ids::{NodeId, SnapshotId, TeamId};

use super::{BadRow, Change, Node, Removed, RowKey, Snapshot, State};

impl State {
    /// What the host of one team `host` may see, or `None` where there is no such host (any more):
    /// a member sees everything, a stranger nothing.
    ///
    /// The team is that of the host's own record, so no caller can mix two up. `voters` are those
    /// it may dial.
    #[must_use]
    pub fn sliced(&self, host: NodeId, voters: &BTreeSet<NodeId>) -> Option<Self> {
        let own = self.node(host)?;
        let team = own.team?;
        let mut slice = Self::default();
        if let Some(cluster) = self.cluster() {
            slice.put_cluster(cluster.clone());
        }
        let dialled = voters.iter().filter_map(|id| self.node(*id));
        // A host of a team is never a voter, whatever the caller believes.
        for voter in dialled.filter(|node| node.team.is_none()) {
            slice.put_node(for_dialling(voter));
        }
        slice.put_node(own.clone());
        for template in self.templates() {
            slice.put_template(template.clone());
        }
        for key in self.keys().filter(|key| key.team == team) {
            slice.put_key(key.clone());
        }
        if let Some(record) = self.team(team) {
            slice.put_team(record.clone());
        }
        for member in self.members_of(team) {
            slice.put_member(member.clone());
        }
        for sandbox in self.sandboxes_of(team) {
            slice.put_sandbox(sandbox.clone());
            for id in sandbox.snapshots() {
                self.show_snapshot(id, team, &mut slice);
            }
        }
        for named in self.named_by(team) {
            slice.put_named(named.clone());
            self.show_snapshot(named.snapshot, team, &mut slice);
        }
        Some(slice)
    }

    /// Adds a snapshot of a team's. One that is kept warm is nobody's.
    fn show_snapshot(&self, id: SnapshotId, team: TeamId, slice: &mut Self) {
        let is_its = |it: &&Snapshot| it.team == team && it.warm.is_none();
        if let Some(snapshot) = self.snapshot(id).filter(is_its) {
            slice.put_snapshot(snapshot.clone());
            self.show_sources(snapshot, slice);
        }
    }

    /// Adds what fetching a snapshot takes: the way to those who have it, and the key of the one who
    /// signed it.
    fn show_sources(&self, snapshot: &Snapshot, slice: &mut Self) {
        let sealer = snapshot.sealed_by;
        for id in snapshot.holders.iter().copied().chain([sealer]) {
            if let Some(node) = self.node(id).filter(|_| slice.node(id).is_none()) {
                slice.put_node(Node {
                    team: node.team,
                    ..for_dialling(node)
                });
            }
        }
        let mut removed = self.removed();
        if let Some(removed) = removed.find(|removed| removed.node == sealer) {
            slice.put_removed(Removed {
                name: String::new(),
                ..removed.clone()
            });
        }
    }

    /// The rows by which this state differs from `older`, each with its value here or `None` where
    /// it is gone. Meant for slices; it compares all records of both.
    #[must_use]
    pub fn changes_since(&self, older: &Self) -> Vec<Change> {
        let keys = self.row_keys().filter(|key| !self.same_row(older, key));
        let gone = older.row_keys().filter(|key| !self.has_row(key));
        keys.chain(gone)
            .map(|key| (key.encode(), self.row(&key)))
            .collect()
    }

    /// Takes over what a member says has changed.
    ///
    /// # Errors
    /// [`BadRow`] for the first row that this version cannot read. Nothing was changed then.
    pub fn follow(&mut self, changes: impl IntoIterator<Item = Change>) -> Result<(), BadRow> {
        let mut next = self.clone();
        for (key, value) in changes {
            match value {
                Some(value) => next.put_row(&key, &value)?,
                None => next.drop_row(&RowKey::decode(&key)?),
            }
        }
        *self = next;
        Ok(())
    }

    /// Whether both have the same record at `key`, or both have none.
    fn same_row(&self, other: &Self, key: &RowKey) -> bool {
        match key {
            RowKey::Cluster => self.cluster() == other.cluster(),
            RowKey::Token(id) => self.token(*id) == other.token(*id),
            RowKey::Removed(key) => self.removed_node(key) == other.removed_node(key),
            RowKey::Node(id) => self.node(*id) == other.node(*id),
            RowKey::Key(id) => self.key(*id) == other.key(*id),
            RowKey::Template(name) => self.template(name) == other.template(name),
            RowKey::Sandbox(id) => self.sandbox(*id) == other.sandbox(*id),
            RowKey::Snapshot(id) => self.snapshot(*id) == other.snapshot(*id),
            RowKey::Named(team, name) => self.named(*team, name) == other.named(*team, name),
            RowKey::Usage(team, day) => self.usage_of(*team, *day) == other.usage_of(*team, *day),
            RowKey::Event(id) => self.event(*id) == other.event(*id),
            RowKey::Channel(id) => self.channel(*id) == other.channel(*id),
            RowKey::Team(id) => self.team(*id) == other.team(*id),
            RowKey::Member(team, user) => self.member(*team, *user) == other.member(*team, *user),
            RowKey::Audit(team, entry) => {
                self.audit_record(*team, *entry) == other.audit_record(*team, *entry)
            }
            RowKey::Build(id) => self.build(*id) == other.build(*id),
            RowKey::BuildLog(id, piece) => {
                self.build_log(*id, *piece) == other.build_log(*id, *piece)
            }
        }
    }

    fn has_row(&self, key: &RowKey) -> bool {
        match key {
            RowKey::Cluster => self.cluster().is_some(),
            RowKey::Token(id) => self.token(*id).is_some(),
            RowKey::Removed(key) => self.removed_node(key).is_some(),
            RowKey::Node(id) => self.node(*id).is_some(),
            RowKey::Key(id) => self.key(*id).is_some(),
            RowKey::Template(name) => self.template(name).is_some(),
            RowKey::Sandbox(id) => self.sandbox(*id).is_some(),
            RowKey::Snapshot(id) => self.snapshot(*id).is_some(),
            RowKey::Named(team, name) => self.named(*team, name).is_some(),
            RowKey::Usage(team, day) => self.usage_of(*team, *day).is_some(),
            RowKey::Event(id) => self.event(*id).is_some(),
            RowKey::Channel(id) => self.channel(*id).is_some(),
            RowKey::Team(id) => self.team(*id).is_some(),
            RowKey::Member(team, user) => self.member(*team, *user).is_some(),
            RowKey::Audit(team, entry) => self.audit_record(*team, *entry).is_some(),
            RowKey::Build(id) => self.build(*id).is_some(),
            RowKey::BuildLog(id, piece) => self.build_log(*id, *piece).is_some(),
        }
    }

    fn drop_row(&mut self, key: &RowKey) {
        match key {
            RowKey::Cluster => self.drop_cluster(),
            RowKey::Token(id) => self.drop_token(*id),
            RowKey::Removed(key) => self.drop_removed(key),
            RowKey::Node(id) => self.drop_node(*id),
            RowKey::Key(id) => self.drop_key(*id),
            RowKey::Template(name) => self.drop_template(name),
            RowKey::Sandbox(id) => self.drop_sandbox(*id),
            RowKey::Snapshot(id) => self.drop_snapshot(*id),
            RowKey::Named(team, name) => self.drop_named(*team, name),
            RowKey::Usage(team, day) => self.drop_usage(*team, *day),
            RowKey::Event(id) => self.drop_event(*id),
            RowKey::Channel(id) => self.drop_channel(*id),
            RowKey::Team(id) => self.drop_team(*id),
            RowKey::Member(team, user) => self.drop_member(*team, *user),
            RowKey::Audit(team, entry) => self.drop_audit(*team, *entry),
            RowKey::Build(id) => self.drop_build(*id),
            RowKey::BuildLog(id, piece) => self.drop_build_log(*id, *piece),
        }
    }
}

/// As much of a voter as dialling it takes.
fn for_dialling(voter: &Node) -> Node {
    Node {
        id: voter.id,
        name: voter.id.to_string(),
        key: voter.key,
        cluster_address: voter.cluster_address.clone(),
        bulk_address: voter.bulk_address.clone(),
        ..Node::default()
    }
}

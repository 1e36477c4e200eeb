//! The audit log: what was changed, by whom, when and from where.
//!
//! A record is made by the very entry that makes the change, so the log has neither a change without
//! a record nor a record without a change, and all members have the same ones. Its id is the index of
//! that entry. Each team has a ring of its own: whoever fills it pushes out its own team's past alone.
//!
//! Members keep records from the first entry on that names who asked for it. Releases that cannot
//! read those stop at it, so there is nobody who skipped a record that others have.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use proto::ids::{AuditId, KeyId, TeamId, UserId};
use proto::units::Stamp;
use proto::wire::raft as pb;
use rpds::RedBlackTreeMapSync;

use super::rows::BadRow;
use crate::wire::{array, optional, some};

/// Records kept of one team, the newest ones: weeks of what people do, some hours of a busy robot.
/// With [`ALL_RECORDS`] it bounds what the log costs each member.
pub const TEAM_RECORDS: usize = 1000;
/// Records kept of all teams. At some 500 bytes each that is 10 MB of every member's memory.
pub const ALL_RECORDS: usize = 20_000;

/// Who asked for a change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Actor {
    /// Nobody: the cluster itself, by a rule.
    #[default]
    System,
    /// Whoever had an API key.
    Key {
        /// Which key.
        id: KeyId,
        /// The key's name at that time.
        name: String,
        /// The member who holds the key, if one does.
        holder: Option<UserId>,
        /// Where the request came from; empty where that is not known.
        address: String,
    },
}

/// One change of something that people care about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditRecord {
    /// The log's entry that made it; no two records have the same.
    pub entry: u64,
    /// When it was asked for, by the clock of the node that was asked.
    pub at: Stamp,
    /// Whose log it is in: the team of what was changed, or the platform.
    pub team: TeamId,
    /// Who asked.
    pub actor: Actor,
    /// What was asked for.
    pub action: Action,
    /// The public id, or the name, of what was changed.
    pub object: String,
    /// What people call it, where that is something else.
    pub object_name: String,
    /// Why it was refused; `None` where it was done.
    pub error: Option<String>,
    /// What else there is to say, such as a `reason`.
    pub metadata: BTreeMap<String, String>,
}

impl AuditRecord {
    /// Its public id.
    #[must_use]
    pub fn id(&self) -> AuditId {
        AuditId::of_entry(self.entry)
    }
}

macro_rules! actions {
    ($($(#[$doc:meta])* $name:ident = $word:literal,)*) => {
        /// What may be asked for. In records it is a word: kind of object, dot, verb.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Action {
            $($(#[$doc])* $name,)*
        }

        impl Action {
            /// All there are.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Its word.
            #[must_use]
            pub const fn word(self) -> &'static str {
                match self {
                    $(Self::$name => $word,)*
                }
            }
        }
    };
}

actions! {
    /// A sandbox was asked for.
    CapsuleCreate = "capsule.create",
    /// Its ports were opened or closed, or what a visit does.
    CapsuleUpdate = "capsule.update",
    /// A link to one of its `port`s was given out, good until `expires_at_unix_ms`.
    CapsuleLink = "capsule.link",
    /// It is to be paused; `reason` says `ttl_expired` where nobody asked.
    CapsulePause = "capsule.pause",
    /// It is to go on.
    CapsuleResume = "capsule.resume",
    /// It is to be paused and go on elsewhere.
    CapsuleMigrate = "capsule.migrate",
    /// Further ones are to start from it.
    CapsuleFork = "capsule.fork",
    /// It is to end; `reason` says `ttl_expired` where nobody asked.
    CapsuleDestroy = "capsule.destroy",
    /// It is to be sealed under a name.
    SnapshotCreate = "snapshot.create",
    /// A name was taken off a snapshot.
    SnapshotDelete = "snapshot.delete",
    /// A template of the platform was made or replaced.
    TemplatePublish = "template.publish",
    /// A template of a team's is to be built.
    TemplateBuild = "template.build",
    /// The building of a template was called off.
    TemplateCancel = "template.cancel",
    /// An API key was made.
    KeyCreate = "api_key.create",
    /// An API key was revoked.
    KeyRevoke = "api_key.revoke",
    /// A team was made.
    TeamCreate = "team.create",
    /// A team was renamed.
    TeamUpdate = "team.update",
    /// A team and its keys were removed.
    TeamDelete = "team.delete",
    /// Somebody became a member of a team.
    MemberAdd = "member.add",
    /// A member's role or name was changed.
    MemberUpdate = "member.update",
    /// A member left or was removed, with the keys held.
    MemberRemove = "member.remove",
    /// A team is told of its events somewhere.
    ChannelCreate = "channel.create",
    /// Where or of what it is told was changed.
    ChannelUpdate = "channel.update",
    /// It is told there no more.
    ChannelDelete = "channel.delete",
    /// A join token was made.
    TokenCreate = "join_token.create",
    /// A join token was withdrawn.
    TokenRevoke = "join_token.revoke",
    /// A node was let in.
    HostJoin = "host.join",
    /// A node was cordoned, drained or tagged, or the opposite.
    HostUpdate = "host.update",
    /// A node was taken out.
    HostRemove = "host.remove",
    /// A node that was away is back.
    HostUp = "host.up",
    /// A node's lease has run out.
    HostDown = "host.down",
    /// A node's lease is over for so long that what it ran is given up.
    HostLost = "host.lost",
    /// The settings of the cluster were changed.
    ClusterUpdate = "cluster.update",
}

impl Action {
    /// The kind of what is changed: the word before the dot.
    #[must_use]
    pub fn kind(self) -> &'static str {
        self.word().split_once('.').map_or("", |(kind, _)| kind)
    }

    /// What is done to it: the word behind the dot.
    #[must_use]
    pub fn verb(self) -> &'static str {
        self.word().split_once('.').map_or("", |(_, verb)| verb)
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A word that stands for no action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no such action")]
pub struct NoSuchAction;

impl FromStr for Action {
    type Err = NoSuchAction;

    fn from_str(word: &str) -> Result<Self, NoSuchAction> {
        let mut all = Self::ALL.iter().copied();
        all.find(|action| action.word() == word).ok_or(NoSuchAction)
    }
}

/// The rings of all teams.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Rings {
    records: RedBlackTreeMapSync<(TeamId, u64), AuditRecord>,
    /// Whose each record is, in the order of the log; follows from `records`.
    order: RedBlackTreeMapSync<u64, TeamId>,
    /// How many each team has; follows from `records`.
    counts: RedBlackTreeMapSync<TeamId, usize>,
}

impl Rings {
    pub(super) fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    pub(super) fn get(&self, team: TeamId, entry: u64) -> Option<&AuditRecord> {
        self.records.get(&(team, entry))
    }

    pub(super) fn of_team(&self, team: TeamId) -> impl DoubleEndedIterator<Item = &AuditRecord> {
        let all = (team, 0)..=(team, u64::MAX);
        self.records.range(all).map(|(_, record)| record)
    }

    /// The records of all teams that were made after `entry`, in the log's order.
    pub(super) fn after(&self, entry: u64) -> impl DoubleEndedIterator<Item = &AuditRecord> {
        let later = self.order.range(entry.saturating_add(1)..);
        later.filter_map(|(entry, team)| self.get(*team, *entry))
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = (TeamId, u64)> {
        self.order.iter().map(|(entry, team)| (*team, *entry))
    }

    pub(super) fn put(&mut self, record: AuditRecord) {
        let (team, entry) = (record.team, record.entry);
        self.drop(team, entry);
        self.records.insert_mut((team, entry), record);
        self.order.insert_mut(entry, team);
        self.counts.insert_mut(team, self.count(team) + 1);
    }

    pub(super) fn drop(&mut self, team: TeamId, entry: u64) {
        if !self.records.remove_mut(&(team, entry)) {
            return;
        }
        self.order.remove_mut(&entry);
        match self.count(team) {
            0 | 1 => {
                self.counts.remove_mut(&team);
            }
            count => self.counts.insert_mut(team, count - 1),
        }
    }

    /// Which record has to go once `team` has one more than fits.
    pub(super) fn surplus(&self, team: TeamId) -> Option<(TeamId, u64)> {
        if self.count(team) > TEAM_RECORDS {
            return self.of_team(team).next().map(|it| (team, it.entry));
        }
        let is_full = self.order.size() > ALL_RECORDS;
        self.keys().next().filter(|_| is_full)
    }

    fn count(&self, team: TeamId) -> usize {
        self.counts.get(&team).copied().unwrap_or(0)
    }
}

impl From<&Actor> for pb::Actor {
    fn from(actor: &Actor) -> Self {
        match actor {
            Actor::System => Self {
                kind: pb::ActorKind::System.into(),
                ..Self::default()
            },
            Actor::Key {
                id,
                name,
                holder,
                address,
            } => Self {
                kind: pb::ActorKind::Key.into(),
                key: id.0.to_vec(),
                name: name.clone(),
                address: address.clone(),
                user: holder.map(|user| user.0.to_vec()).unwrap_or_default(),
            },
        }
    }
}

impl TryFrom<pb::Actor> for Actor {
    type Error = BadRow;

    fn try_from(wire: pb::Actor) -> Result<Self, BadRow> {
        match wire.kind() {
            pb::ActorKind::System => Ok(Self::System),
            pb::ActorKind::Key => Ok(Self::Key {
                id: KeyId(array("key id", &wire.key)?),
                holder: optional("user id", &wire.user)?.map(UserId),
                name: wire.name,
                address: wire.address,
            }),
            pb::ActorKind::Unspecified => Err(BadRow::Unknown("kind of actor")),
        }
    }
}

impl From<&AuditRecord> for pb::AuditRow {
    fn from(record: &AuditRecord) -> Self {
        Self {
            team: record.team.0.to_vec(),
            entry: record.entry,
            at_ms: record.at.0,
            actor: Some((&record.actor).into()),
            action: record.action.word().to_owned(),
            object: record.object.clone(),
            object_name: record.object_name.clone(),
            error: record.error.clone().unwrap_or_default(),
            metadata: record.metadata.clone(),
        }
    }
}

impl TryFrom<pb::AuditRow> for AuditRecord {
    type Error = BadRow;

    fn try_from(row: pb::AuditRow) -> Result<Self, BadRow> {
        let action = row.action.parse();
        Ok(Self {
            team: TeamId(array("team id", &row.team)?),
            entry: row.entry,
            at: Stamp(row.at_ms),
            actor: some("actor", row.actor)?.try_into()?,
            action: action.map_err(|_| BadRow::Unknown("action"))?,
            object: row.object,
            object_name: row.object_name,
            error: Some(row.error).filter(|error| !error.is_empty()),
            metadata: row.metadata,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(team: u8, entry: u64) -> AuditRecord {
        AuditRecord {
            entry,
            at: Stamp(entry),
            team: TeamId([team; 16]),
            actor: Actor::System,
            action: Action::CapsuleCreate,
            object: "cl-1".into(),
            object_name: String::new(),
            error: None,
            metadata: BTreeMap::new(),
        }
    }

    #[test]
    fn every_action_is_found_by_its_word_which_has_two_parts() {
        for action in Action::ALL {
            assert_eq!(action.word().parse(), Ok(*action));
            assert_eq!(
                format!("{}.{}", action.kind(), action.verb()),
                action.word()
            );
        }
        assert_eq!("capsule.explode".parse::<Action>(), Err(NoSuchAction));
    }

    #[test]
    fn a_team_that_fills_its_ring_loses_its_own_oldest_record() {
        let mut rings = Rings::default();
        rings.put(record(1, 1));
        for entry in 2..TEAM_RECORDS as u64 + 2 {
            rings.put(record(2, entry));
        }
        let (quiet, busy) = (TeamId([1; 16]), TeamId([2; 16]));
        assert_eq!(rings.surplus(busy), None);
        let next = TEAM_RECORDS as u64 + 2;
        rings.put(record(2, next));
        assert_eq!(rings.surplus(busy), Some((busy, 2)));
        rings.drop(busy, 2);
        assert_eq!(rings.surplus(busy), None);
        assert_eq!(rings.of_team(quiet).count(), 1);
        assert_eq!(
            rings.of_team(busy).next_back().map(|it| it.entry),
            Some(next)
        );
        assert_eq!(rings.after(next - 1).count(), 1);
    }
}

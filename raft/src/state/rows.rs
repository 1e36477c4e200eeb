//! The state as rows: what snapshots and the state database store.

use prost::Message;
use proto::ids::{
    BuildId, ChannelId, KeyId, NodeId, NodeKey, SandboxId, SnapshotId, TeamId, TokenId, UserId,
};
use proto::wire::raft as pb;

use super::{
    AuditRecord, Build, BuildLog, Channel, Day, Event, EventId, Key, Member, Named, Node, Removed,
    Sandbox, Snapshot, State, Team, Template, Token, UsageDay,
};
use crate::wire::array;

/// Where a row lies: a table and the object's id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RowKey {
    /// The cluster itself.
    Cluster,
    /// A join token.
    Token(TokenId),
    /// A node that was removed.
    Removed(NodeKey),
    /// A node.
    Node(NodeId),
    /// An API key.
    Key(KeyId),
    /// A template.
    Template(String),
    /// A sandbox.
    Sandbox(SandboxId),
    /// A snapshot.
    Snapshot(SnapshotId),
    /// A team's name for a snapshot.
    Named(TeamId, String),
    /// A team's day.
    Usage(TeamId, Day),
    /// Something that happened.
    Event(EventId),
    /// A receiver of events.
    Channel(ChannelId),
    /// A team.
    Team(TeamId),
    /// A member of a team.
    Member(TeamId, UserId),
    /// A record of a team's audit log, by the entry that made it.
    Audit(TeamId, u64),
    /// The building of a template.
    Build(BuildId),
    /// A piece of the log of one.
    BuildLog(BuildId, u32),
}

/// Bytes of a team's id, which come first in the key of what belongs to a team.
const TEAM_BYTES: usize = 16;
/// Bytes of an entry's index, which come first in the key of an event.
const INDEX_BYTES: usize = 8;
/// Bytes of a build's id, which come first in the key of a piece of its log.
const BUILD_BYTES: usize = 16;

/// An encoded key and value.
pub type Row = (Vec<u8>, Vec<u8>);

/// A row's key and its new value, `None` where the row is gone.
pub type Change = (Vec<u8>, Option<Vec<u8>>);

/// Why a stored row or command cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadRow {
    /// A field has another length than its kind has.
    #[error("{0} has a wrong length")]
    Length(&'static str),
    /// A field that is always there is not.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A value that a newer version may have written.
    #[error("{0} is unknown to this version")]
    Unknown(&'static str),
    /// A record under a key that is not its own.
    #[error("a row lies under the key of another")]
    Misplaced,
    /// Not a message at all.
    #[error("bytes are not a message")]
    Garbled,
}

impl RowKey {
    /// The key's bytes: one for the table, then the id.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (table, id): (u8, Vec<u8>) = match self {
            Self::Cluster => (b'c', Vec::new()),
            Self::Token(id) => (b'j', id.0.to_vec()),
            Self::Removed(key) => (b'r', key.0.to_vec()),
            Self::Node(id) => (b'n', id.0.to_be_bytes().to_vec()),
            Self::Key(id) => (b'k', id.0.to_vec()),
            Self::Template(name) => (b't', name.as_bytes().to_vec()),
            Self::Sandbox(id) => (b's', id.0.to_vec()),
            Self::Snapshot(id) => (b'p', id.0.to_vec()),
            Self::Named(team, name) => (b'm', [&team.0, name.as_bytes()].concat()),
            Self::Usage(team, day) => (b'd', [&team.0, day.0.to_be_bytes().as_slice()].concat()),
            Self::Event(id) => (b'h', event_key(*id)),
            Self::Channel(id) => (b'w', id.0.to_vec()),
            Self::Team(id) => (b'e', id.0.to_vec()),
            Self::Member(team, user) => (b'u', [team.0, user.0].concat()),
            Self::Audit(team, entry) => (b'a', [&team.0[..], &entry.to_be_bytes()].concat()),
            Self::Build(id) => (b'b', id.0.to_vec()),
            Self::BuildLog(id, piece) => (b'l', [&id.0[..], &piece.to_be_bytes()].concat()),
        };
        [vec![table], id].concat()
    }

    /// Reads a key's bytes.
    ///
    /// # Errors
    /// [`BadRow`] where they are no key of this version.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadRow> {
        let (table, id) = bytes.split_first().ok_or(BadRow::Missing("table"))?;
        Ok(match table {
            b'c' if id.is_empty() => Self::Cluster,
            b'j' => Self::Token(TokenId(array("token id", id)?)),
            b'r' => Self::Removed(NodeKey(array("node key", id)?)),
            b'n' => Self::Node(NodeId(u64::from_be_bytes(array("node id", id)?))),
            b'k' => Self::Key(KeyId(array("key id", id)?)),
            b't' => {
                let name = std::str::from_utf8(id).map_err(|_| BadRow::Garbled)?;
                Self::Template(name.to_owned())
            }
            b's' => Self::Sandbox(SandboxId(array("sandbox id", id)?)),
            b'p' => Self::Snapshot(SnapshotId(array("snapshot id", id)?)),
            b'm' => {
                let (team, name) = id.split_at_checked(TEAM_BYTES).ok_or(BadRow::Garbled)?;
                let name = std::str::from_utf8(name).map_err(|_| BadRow::Garbled)?;
                Self::Named(TeamId(array("team id", team)?), name.to_owned())
            }
            b'd' => {
                let (team, day) = id.split_at_checked(TEAM_BYTES).ok_or(BadRow::Garbled)?;
                let day = u32::from_be_bytes(array("day", day)?);
                Self::Usage(TeamId(array("team id", team)?), Day(day))
            }
            b'w' => Self::Channel(ChannelId(array("channel id", id)?)),
            b'h' => {
                let (index, part) = id.split_at_checked(INDEX_BYTES).ok_or(BadRow::Garbled)?;
                Self::Event(EventId {
                    index: u64::from_be_bytes(array("index", index)?),
                    part: u32::from_be_bytes(array("part", part)?),
                })
            }
            b'e' => Self::Team(TeamId(array("team id", id)?)),
            b'u' => {
                let (team, user) = id.split_at_checked(TEAM_BYTES).ok_or(BadRow::Garbled)?;
                let user = UserId(array("user id", user)?);
                Self::Member(TeamId(array("team id", team)?), user)
            }
            b'a' => {
                let (team, entry) = id.split_at_checked(TEAM_BYTES).ok_or(BadRow::Garbled)?;
                let entry = u64::from_be_bytes(array("entry", entry)?);
                Self::Audit(TeamId(array("team id", team)?), entry)
            }
            b'b' => Self::Build(BuildId(array("build id", id)?)),
            b'l' => {
                let (id, piece) = id.split_at_checked(BUILD_BYTES).ok_or(BadRow::Garbled)?;
                let piece = u32::from_be_bytes(array("piece of a log", piece)?);
                Self::BuildLog(BuildId(array("build id", id)?), piece)
            }
            _ => return Err(BadRow::Unknown("table")),
        })
    }
}

fn event_key(id: EventId) -> Vec<u8> {
    [id.index.to_be_bytes().as_slice(), &id.part.to_be_bytes()].concat()
}

impl State {
    /// The row at `key`, or `None` where the object is gone.
    #[must_use]
    pub fn row(&self, key: &RowKey) -> Option<Vec<u8>> {
        match key {
            RowKey::Cluster => self
                .cluster()
                .map(|cluster| pb::ClusterRow::from(cluster).encode_to_vec()),
            RowKey::Token(id) => self
                .token(*id)
                .map(|token| pb::TokenRow::from(token).encode_to_vec()),
            RowKey::Removed(key) => self
                .removed_node(key)
                .map(|removed| pb::RemovedRow::from(removed).encode_to_vec()),
            RowKey::Node(id) => self
                .node(*id)
                .map(|node| pb::NodeRow::from(node).encode_to_vec()),
            RowKey::Key(id) => self
                .key(*id)
                .map(|key| pb::KeyRow::from(key).encode_to_vec()),
            RowKey::Template(name) => self
                .template(name)
                .map(|template| pb::TemplateRow::from(template).encode_to_vec()),
            RowKey::Sandbox(id) => self
                .sandbox(*id)
                .map(|sandbox| pb::SandboxRow::from(sandbox).encode_to_vec()),
            RowKey::Snapshot(id) => self
                .snapshot(*id)
                .map(|snapshot| pb::SnapshotRow::from(snapshot).encode_to_vec()),
            RowKey::Named(team, name) => self
                .named(*team, name)
                .map(|named| pb::NamedRow::from(named).encode_to_vec()),
            RowKey::Usage(team, day) => self
                .usage_of(*team, *day)
                .map(|day| pb::UsageRow::from(day).encode_to_vec()),
            RowKey::Event(id) => self
                .event(*id)
                .map(|event| pb::EventRow::from(event).encode_to_vec()),
            RowKey::Channel(id) => self
                .channel(*id)
                .map(|channel| pb::ChannelRow::from(channel).encode_to_vec()),
            RowKey::Team(id) => self
                .team(*id)
                .map(|team| pb::TeamRow::from(team).encode_to_vec()),
            RowKey::Member(team, user) => self
                .member(*team, *user)
                .map(|member| pb::MemberRow::from(member).encode_to_vec()),
            RowKey::Audit(team, entry) => self
                .audit_record(*team, *entry)
                .map(|record| pb::AuditRow::from(record).encode_to_vec()),
            RowKey::Build(id) => self
                .build(*id)
                .map(|build| pb::BuildRow::from(build).encode_to_vec()),
            RowKey::BuildLog(id, piece) => self
                .build_log(*id, *piece)
                .map(|text| BuildLog::encode(*id, *piece, text)),
        }
    }

    /// Where every row lies.
    pub(super) fn row_keys(&self) -> impl Iterator<Item = RowKey> {
        let cluster = self.cluster().map(|_| RowKey::Cluster);
        let nodes = self.nodes().map(|node| RowKey::Node(node.id));
        let tokens = self.tokens().map(|token| RowKey::Token(token.id));
        let removed = self.removed().map(|node| RowKey::Removed(node.key));
        let keys = self.keys().map(|key| RowKey::Key(key.id));
        let templates = self
            .templates()
            .map(|template| RowKey::Template(template.name.clone()));
        let sandboxes = self.sandboxes().map(|sandbox| RowKey::Sandbox(sandbox.id));
        let snapshots = self.snapshots().map(|it| RowKey::Snapshot(it.sealed.id));
        let named = self.all_named();
        let named = named.map(|it| RowKey::Named(it.team, it.name.clone()));
        let usage = self.all_usage().map(|it| RowKey::Usage(it.team, it.day));
        let events = self.all_events().map(|it| RowKey::Event(it.id));
        let channels = self.channels().map(|it| RowKey::Channel(it.id));
        let teams = self.teams().map(|team| RowKey::Team(team.id));
        let members = self.members().map(|it| RowKey::Member(it.team, it.user));
        let audit = self.audit.keys();
        let audit = audit.map(|(team, entry)| RowKey::Audit(team, entry));
        let builds = self.builds().map(|it| RowKey::Build(it.id));
        let logs = self.build_logs();
        let logs = logs.map(|(id, piece)| RowKey::BuildLog(id, piece));
        cluster
            .into_iter()
            .chain(nodes)
            .chain(tokens)
            .chain(removed)
            .chain(keys)
            .chain(templates)
            .chain(sandboxes)
            .chain(snapshots)
            .chain(named)
            .chain(usage)
            .chain(events)
            .chain(channels)
            .chain(teams)
            .chain(members)
            .chain(audit)
            .chain(builds)
            .chain(logs)
    }

    /// Every row there is.
    pub fn rows(&self) -> impl Iterator<Item = Row> {
        self.row_keys()
            .filter_map(|key| self.row(&key).map(|value| (key.encode(), value)))
    }

    /// The state that `rows` describe, in whatever order they come.
    ///
    /// # Errors
    /// [`BadRow`] for the first row that this version cannot read.
    pub fn from_rows(rows: impl IntoIterator<Item = Row>) -> Result<Self, BadRow> {
        let mut state = Self::default();
        for (key, value) in rows {
            state.put_row(&key, &value)?;
        }
        Ok(state)
    }

    /// Inserts or replaces the record of one row. A record under another one's key is refused:
    /// it could not be found again to be replaced.
    #[allow(clippy::too_many_lines)] // an arm for each table, and nothing else
    pub(super) fn put_row(&mut self, key: &[u8], value: &[u8]) -> Result<(), BadRow> {
        let at = RowKey::decode(key)?;
        match at {
            RowKey::Cluster => self.put_cluster(decode::<pb::ClusterRow, _>(value)?),
            RowKey::Token(id) => {
                let token: Token = decode::<pb::TokenRow, _>(value)?;
                self.put_token(in_place(token.id == id, token)?);
            }
            RowKey::Removed(key) => {
                let removed: Removed = decode::<pb::RemovedRow, _>(value)?;
                self.put_removed(in_place(removed.key == key, removed)?);
            }
            RowKey::Node(id) => {
                let node: Node = decode::<pb::NodeRow, _>(value)?;
                self.put_node(in_place(node.id == id, node)?);
            }
            RowKey::Key(id) => {
                let key: Key = decode::<pb::KeyRow, _>(value)?;
                self.put_key(in_place(key.id == id, key)?);
            }
            RowKey::Template(name) => {
                let template: Template = decode::<pb::TemplateRow, _>(value)?;
                self.put_template(in_place(template.name == name, template)?);
            }
            RowKey::Sandbox(id) => {
                let sandbox: Sandbox = decode::<pb::SandboxRow, _>(value)?;
                self.put_sandbox(in_place(sandbox.id == id, sandbox)?);
            }
            RowKey::Snapshot(id) => {
                let snapshot: Snapshot = decode::<pb::SnapshotRow, _>(value)?;
                self.put_snapshot(in_place(snapshot.sealed.id == id, snapshot)?);
            }
            RowKey::Named(team, name) => {
                let named: Named = decode::<pb::NamedRow, _>(value)?;
                let same = named.team == team && named.name == name;
                self.put_named(in_place(same, named)?);
            }
            RowKey::Usage(team, day) => {
                let usage: UsageDay = decode::<pb::UsageRow, _>(value)?;
                let same = (usage.team, usage.day) == (team, day);
                self.put_usage(in_place(same, usage)?);
            }
            RowKey::Event(id) => {
                let event: Event = decode::<pb::EventRow, _>(value)?;
                self.put_event(in_place(event.id == id, event)?);
            }
            RowKey::Channel(id) => {
                let channel: Channel = decode::<pb::ChannelRow, _>(value)?;
                self.put_channel(in_place(channel.id == id, channel)?);
            }
            RowKey::Team(id) => {
                let team: Team = decode::<pb::TeamRow, _>(value)?;
                self.put_team(in_place(team.id == id, team)?);
            }
            RowKey::Member(team, user) => {
                let member: Member = decode::<pb::MemberRow, _>(value)?;
                let same = member.team == team && member.user == user;
                self.put_member(in_place(same, member)?);
            }
            RowKey::Audit(team, entry) => {
                let record: AuditRecord = decode::<pb::AuditRow, _>(value)?;
                let same = record.team == team && record.entry == entry;
                self.put_audit(in_place(same, record)?);
            }
            RowKey::Build(id) => {
                let build: Build = decode::<pb::BuildRow, _>(value)?;
                self.put_build(in_place(build.id == id, build)?);
            }
            RowKey::BuildLog(id, piece) => {
                let log: BuildLog = decode::<pb::BuildLogRow, _>(value)?;
                let same = log.build == id && log.piece == piece;
                self.put_build_log(in_place(same, log)?);
            }
        }
        Ok(())
    }
}

fn decode<M, T>(bytes: &[u8]) -> Result<T, BadRow>
where
    M: Message + Default,
    T: TryFrom<M, Error = BadRow>,
{
    M::decode(bytes).map_err(|_| BadRow::Garbled)?.try_into()
}

fn in_place<T>(is: bool, record: T) -> Result<T, BadRow> {
    if is {
        Ok(record)
    } else {
        Err(BadRow::Misplaced)
    }
}

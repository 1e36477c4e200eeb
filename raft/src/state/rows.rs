//! The state as rows: what snapshots and the state database store.

use prost::Message;
use proto::ids::{KeyId, NodeId, NodeKey, SandboxId, SnapshotId, TeamId, TokenId};
use proto::wire::raft as pb;

use super::{Key, Named, Node, Removed, Sandbox, Snapshot, State, Template, Token};
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
}

/// Bytes of a team's id, which come first in the key of a name.
const TEAM_BYTES: usize = 16;

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
            _ => return Err(BadRow::Unknown("table")),
        })
    }
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

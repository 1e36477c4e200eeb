//! The state as rows: what snapshots and the state database store.

use prost::Message;
use proto::ids::{KeyId, NodeId, NodeKey, SandboxId, TokenId};
use proto::wire::raft as pb;

use super::State;

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
}

/// An encoded key and value.
pub type Row = (Vec<u8>, Vec<u8>);

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
        };
        [vec![table], id].concat()
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
        }
    }

    /// Every row there is.
    pub fn rows(&self) -> impl Iterator<Item = Row> {
        let nodes = self.nodes().map(|node| RowKey::Node(node.id));
        let keys = self.keys().map(|key| RowKey::Key(key.id));
        let templates = self
            .templates()
            .map(|template| RowKey::Template(template.name.clone()));
        let sandboxes = self.sandboxes().map(|sandbox| RowKey::Sandbox(sandbox.id));
        let cluster = self.cluster().map(|_| RowKey::Cluster);
        let tokens = self.tokens().map(|token| RowKey::Token(token.id));
        let removed = self.removed().map(|node| RowKey::Removed(node.key));
        cluster
            .into_iter()
            .chain(nodes)
            .chain(tokens)
            .chain(removed)
            .chain(keys)
            .chain(templates)
            .chain(sandboxes)
            .filter_map(|key| self.row(&key).map(|value| (key.encode(), value)))
    }

    /// The state that `rows` describe.
    ///
    /// # Errors
    /// [`BadRow`] for the first row that this version cannot read.
    pub fn from_rows(rows: impl IntoIterator<Item = Row>) -> Result<Self, BadRow> {
        let mut state = Self::default();
        for (key, value) in rows {
            match key.first() {
                Some(b'c') => state.put_cluster(decode::<pb::ClusterRow>(&value)?.try_into()?),
                Some(b'j') => state.put_token(decode::<pb::TokenRow>(&value)?.try_into()?),
                Some(b'r') => state.put_removed(decode::<pb::RemovedRow>(&value)?.try_into()?),
                Some(b'n') => state.put_node(decode::<pb::NodeRow>(&value)?.try_into()?),
                Some(b'k') => state.put_key(decode::<pb::KeyRow>(&value)?.try_into()?),
                Some(b't') => state.put_template(decode::<pb::TemplateRow>(&value)?.try_into()?),
                Some(b's') => state.put_sandbox(decode::<pb::SandboxRow>(&value)?.try_into()?),
                _ => return Err(BadRow::Unknown("table")),
            }
        }
        Ok(state)
    }
}

fn decode<M: Message + Default>(bytes: &[u8]) -> Result<M, BadRow> {
    M::decode(bytes).map_err(|_| BadRow::Garbled)
}

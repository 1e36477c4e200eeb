//! API keys. Only a hash of the secret is ever replicated or stored.

use proto::ids::{KeyId, TeamId};
use proto::units::Stamp;
use proto::wire::raft as pb;

use super::rows::BadRow;
use crate::wire::array;

/// An API key without its secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Its name in lists and for revoking it.
    pub id: KeyId,
    /// Whose objects it opens.
    pub team: TeamId,
    /// What people call it.
    pub name: String,
    /// SHA-256 of the whole key.
    pub hash: [u8; 32],
    /// The first characters of the key, enough for a person to recognise it.
    pub shown: String,
    /// When it was made.
    pub created_at: Stamp,
    /// Kept after revocation so that the id stays taken.
    pub revoked: bool,
}

impl From<&Key> for pb::KeyRow {
    fn from(key: &Key) -> Self {
        Self {
            id: key.id.0.to_vec(),
            team: key.team.0.to_vec(),
            name: key.name.clone(),
            hash: key.hash.to_vec(),
            shown: key.shown.clone(),
            created_at_ms: key.created_at.0,
            revoked: key.revoked,
        }
    }
}

impl TryFrom<pb::KeyRow> for Key {
    type Error = BadRow;

    fn try_from(row: pb::KeyRow) -> Result<Self, BadRow> {
        Ok(Self {
            id: KeyId(array("key id", &row.id)?),
            team: TeamId(array("team id", &row.team)?),
            name: row.name,
            hash: array("key hash", &row.hash)?,
            shown: row.shown,
            created_at: Stamp(row.created_at_ms),
            revoked: row.revoked,
        })
    }
}

//! API keys. Only a hash of the secret is ever replicated or stored.

use proto::ids::{KeyId, TeamId, UserId};
use proto::units::Stamp;
use proto::wire::raft as pb;

use super::rows::BadRow;
use crate::wire::{array, optional};

/// An API key without its secret.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
    /// What it may do.
    pub scope: Scope,
    /// From when on it opens nothing any more, if it ends by itself.
    pub expires_at: Option<Stamp>,
    /// When it was used last, some minutes late; `None` before its first use.
    pub last_used: Option<Stamp>,
    /// Who made it: a key, or nobody for the first one.
    pub created_by: String,
    /// The member who holds it, whose role limits it.
    pub holder: Option<UserId>,
}

impl Key {
    /// Whether it has ended by itself at `now`.
    #[must_use]
    pub fn has_expired(&self, now: Stamp) -> bool {
        self.expires_at.is_some_and(|end| now >= end)
    }

    /// Whether releases without scopes read it as it is meant.
    pub(crate) fn is_plain(&self) -> bool {
        let Self {
            scope,
            expires_at,
            last_used,
            created_by,
            holder,
            ..
        } = self;
        *scope == Scope::Admin
            && expires_at.is_none()
            && last_used.is_none()
            && created_by.is_empty()
            && holder.is_none()
    }
}

/// What a key may do. Each includes what is above it here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// Look at what there is.
    Read,
    /// Make, use and end capsules and what belongs to them.
    Run,
    /// Look after the team: its keys, its members and its audit log.
    #[default]
    Admin,
}

impl Scope {
    /// Its word in the interface.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Run => "run",
            Self::Admin => "admin",
        }
    }
}

impl From<Scope> for pb::Scope {
    fn from(scope: Scope) -> Self {
        match scope {
            Scope::Read => Self::Read,
            Scope::Run => Self::Run,
            Scope::Admin => Self::Admin,
        }
    }
}

/// Of a number, since a newer version's scope must not be read as the one that may do everything.
fn scope_from_wire(number: i32) -> Result<Scope, BadRow> {
    match pb::Scope::try_from(number) {
        Ok(pb::Scope::Read) => Ok(Scope::Read),
        Ok(pb::Scope::Run) => Ok(Scope::Run),
        Ok(pb::Scope::Admin | pb::Scope::Unspecified) => Ok(Scope::Admin),
        Err(_) => Err(BadRow::Unknown("scope")),
    }
}

impl From<&Key> for pb::KeyRow {
    fn from(key: &Key) -> Self {
        let plain = key.scope == Scope::Admin;
        Self {
            id: key.id.0.to_vec(),
            team: key.team.0.to_vec(),
            name: key.name.clone(),
            hash: key.hash.to_vec(),
            shown: key.shown.clone(),
            created_at_ms: key.created_at.0,
            revoked: key.revoked,
            // As releases without scopes wrote it: one key has one encoding.
            scope: if plain {
                0
            } else {
                pb::Scope::from(key.scope).into()
            },
            expires_at_ms: key.expires_at.map_or(0, |at| at.0),
            last_used_at_ms: key.last_used.map_or(0, |at| at.0),
            created_by: key.created_by.clone(),
            holder: key.holder.map(|user| user.0.to_vec()).unwrap_or_default(),
        }
    }
}

impl TryFrom<pb::KeyRow> for Key {
    type Error = BadRow;

    fn try_from(row: pb::KeyRow) -> Result<Self, BadRow> {
        let stamp = |ms: u64| Some(Stamp(ms)).filter(|at| at.0 != 0);
        Ok(Self {
            id: KeyId(array("key id", &row.id)?),
            team: TeamId(array("team id", &row.team)?),
            name: row.name,
            hash: array("key hash", &row.hash)?,
            shown: row.shown,
            created_at: Stamp(row.created_at_ms),
            revoked: row.revoked,
            scope: scope_from_wire(row.scope)?,
            expires_at: stamp(row.expires_at_ms),
            last_used: stamp(row.last_used_at_ms),
            created_by: row.created_by,
            holder: optional("user id", &row.holder)?.map(UserId),
        })
    }
}

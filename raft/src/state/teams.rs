//! Teams and their members.
//!
//! A cluster knows nobody's password: a member is the name of a person who holds keys, and whoever
//! removes the member takes those keys away. A team may have keys without members, and objects without
//! a record of its own: those of releases without teams have none.

use proto::ids::{TeamId, UserId};
use proto::units::Stamp;
use proto::wire::raft as pb;

use super::Scope;
use super::rows::BadRow;
use crate::wire::array;

/// A team's record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Team {
    /// Its name for programs.
    pub id: TeamId,
    /// What people call it.
    pub name: String,
    /// Two times six hexadecimal digits: a name that never changes.
    pub slug: String,
    /// When it was made.
    pub created_at: Stamp,
}

/// A person who holds keys of a team.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// In which team.
    pub team: TeamId,
    /// The same person in every team.
    pub user: UserId,
    /// By which a person is told from another.
    pub email: String,
    /// What people call them.
    pub name: String,
    /// What their keys may do at most.
    pub role: Role,
    /// Since when.
    pub joined_at: Stamp,
}

/// What a member is in a team.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Like an admin; a team keeps its last one.
    Owner,
    /// May look after keys and members.
    Admin,
    /// May use the team's capsules.
    Member,
}

impl Role {
    /// Its word in the interface.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Owner => "owner",
            Self::Admin => "admin",
            Self::Member => "member",
        }
    }

    /// What the keys of such a member may do at most.
    #[must_use]
    pub const fn most(self) -> Scope {
        match self {
            Self::Owner | Self::Admin => Scope::Admin,
            Self::Member => Scope::Run,
        }
    }
}

impl From<Role> for pb::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::Owner => Self::Owner,
            Role::Admin => Self::Admin,
            Role::Member => Self::Member,
        }
    }
}

impl TryFrom<pb::Role> for Role {
    type Error = BadRow;

    fn try_from(role: pb::Role) -> Result<Self, BadRow> {
        match role {
            pb::Role::Owner => Ok(Self::Owner),
            pb::Role::Admin => Ok(Self::Admin),
            pb::Role::Member => Ok(Self::Member),
            pb::Role::Unspecified => Err(BadRow::Unknown("role")),
        }
    }
}

impl From<&Team> for pb::TeamRow {
    fn from(team: &Team) -> Self {
        Self {
            id: team.id.0.to_vec(),
            name: team.name.clone(),
            slug: team.slug.clone(),
            created_at_ms: team.created_at.0,
        }
    }
}

impl TryFrom<pb::TeamRow> for Team {
    type Error = BadRow;

    fn try_from(row: pb::TeamRow) -> Result<Self, BadRow> {
        Ok(Self {
            id: TeamId(array("team id", &row.id)?),
            name: row.name,
            slug: row.slug,
            created_at: Stamp(row.created_at_ms),
        })
    }
}

impl From<&Member> for pb::MemberRow {
    fn from(member: &Member) -> Self {
        Self {
            team: member.team.0.to_vec(),
            user: member.user.0.to_vec(),
            email: member.email.clone(),
            name: member.name.clone(),
            role: pb::Role::from(member.role).into(),
            joined_at_ms: member.joined_at.0,
        }
    }
}

impl TryFrom<pb::MemberRow> for Member {
    type Error = BadRow;

    fn try_from(row: pb::MemberRow) -> Result<Self, BadRow> {
        let role = row.role().try_into()?;
        Ok(Self {
            team: TeamId(array("team id", &row.team)?),
            user: UserId(array("user id", &row.user)?),
            email: row.email,
            name: row.name,
            role,
            joined_at: Stamp(row.joined_at_ms),
        })
    }
}

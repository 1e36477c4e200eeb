//! The commands about keys, teams and members, and changes that name who asked, as bytes.

use proto::ids::{KeyId, TeamId, UserId};
use proto::units::Stamp;
use proto::wire::raft as pb;

use super::{array, command_from_wire, command_to_wire, some};
use crate::command::{Attributed, Command};
use crate::state::{BadRow, Key, Member, Team};

type Wire = pb::proposal::Command;

/// A key that releases without scopes read as it is meant goes as they know it.
pub(super) fn key_to_wire(key: &Key) -> Wire {
    let row = Some(key.into());
    if key.is_plain() {
        Wire::PutKey(pb::PutKey { key: row })
    } else {
        Wire::PutScopedKey(pb::PutScopedKey { key: row })
    }
}

pub(super) fn uses_to_wire(uses: &[(KeyId, Stamp)]) -> Wire {
    let uses = uses.iter().map(|(key, at)| pb::KeyUse {
        key: key.0.to_vec(),
        at_ms: at.0,
    });
    Wire::NoteKeyUses(pb::NoteKeyUses {
        uses: uses.collect(),
    })
}

pub(super) fn uses_from_wire(wire: &pb::NoteKeyUses) -> Result<Command, BadRow> {
    let uses = wire.uses.iter().map(|it| {
        let key = KeyId(array("key id", &it.key)?);
        Ok((key, Stamp(it.at_ms)))
    });
    Ok(Command::NoteKeyUses(uses.collect::<Result<_, BadRow>>()?))
}

pub(super) fn team_to_wire(team: &Team) -> Wire {
    Wire::PutTeam(pb::PutTeam {
        team: Some(team.into()),
    })
}

pub(super) fn member_to_wire(member: &Member) -> Wire {
    Wire::PutMember(pb::PutMember {
        member: Some(member.into()),
    })
}

pub(super) fn no_member_to_wire(team: TeamId, user: UserId) -> Wire {
    Wire::DropMember(pb::DropMember {
        team: team.0.to_vec(),
        user: user.0.to_vec(),
    })
}

pub(super) fn no_member_from_wire(wire: &pb::DropMember) -> Result<Command, BadRow> {
    Ok(Command::DropMember {
        team: TeamId(array("team id", &wire.team)?),
        user: UserId(array("user id", &wire.user)?),
    })
}

/// The change inside is written as a proposal without a time: it has that of the one around it.
pub(super) fn attributed_to_wire(attributed: &Attributed) -> Wire {
    Wire::Attributed(Box::new(pb::Attributed {
        actor: Some((&attributed.actor).into()),
        change: Some(Box::new(pb::Proposal {
            at_ms: 0,
            command: Some(command_to_wire(&attributed.change)),
        })),
    }))
}

pub(super) fn attributed_from_wire(wire: pb::Attributed) -> Result<Attributed, BadRow> {
    let change = some("change", wire.change)?;
    let change = match some("command", change.command)? {
        // Whoever nests them wants to be two people.
        Wire::Attributed(_) => return Err(BadRow::Unknown("change of a change")),
        change => command_from_wire(change)?,
    };
    Ok(Attributed {
        actor: some("actor", wire.actor)?.try_into()?,
        change: Box::new(change),
    })
}

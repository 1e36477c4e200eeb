//! The commands about channels as bytes.

use proto::ids::{ChannelId, TeamId};
use proto::wire::raft as pb;

use super::{array, some};
use crate::command::{Command, TellChannel};
use crate::state::{BadRow, Channel};

pub(super) fn put_to_wire(channel: &Channel) -> pb::proposal::Command {
    pb::proposal::Command::PutChannel(pb::PutChannel {
        channel: Some(channel.into()),
    })
}

pub(super) fn put_from_wire(wire: pb::PutChannel) -> Result<Command, BadRow> {
    let channel = some("channel", wire.channel)?.try_into()?;
    Ok(Command::PutChannel(channel))
}

pub(super) fn drop_to_wire(team: TeamId, id: ChannelId) -> pb::proposal::Command {
    pb::proposal::Command::DropChannel(pb::DropChannel {
        team: team.0.to_vec(),
        id: id.0.to_vec(),
    })
}

pub(super) fn drop_from_wire(wire: &pb::DropChannel) -> Result<Command, BadRow> {
    Ok(Command::DropChannel {
        team: TeamId(array("team id", &wire.team)?),
        id: ChannelId(array("channel id", &wire.id)?),
    })
}

pub(super) fn told_to_wire(told: &TellChannel) -> pb::proposal::Command {
    pb::proposal::Command::TellChannel(pb::TellChannel {
        id: told.id.0.to_vec(),
        from: Some(told.from.into()),
        upto: Some(told.upto.into()),
        delivered: told.delivered,
        given_up: told.given_up,
        failure: told.failure.clone(),
    })
}

pub(super) fn told_from_wire(wire: pb::TellChannel) -> Result<Command, BadRow> {
    Ok(Command::TellChannel(TellChannel {
        id: ChannelId(array("channel id", &wire.id)?),
        from: wire.from.unwrap_or_default().into(),
        upto: wire.upto.unwrap_or_default().into(),
        delivered: wire.delivered,
        given_up: wire.given_up,
        failure: wire.failure,
    }))
}

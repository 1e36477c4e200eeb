//! Where a team wants to be told of its events, and how far it has been.

use std::collections::BTreeSet;

use proto::ids::{ChannelId, TeamId};
use proto::units::Stamp;
use proto::wire::raft as pb;

use super::State;
use super::events::EventId;
use super::rows::BadRow;
use crate::wire::array;

/// A receiver of events over HTTP.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Channel {
    /// For its whole life.
    pub id: ChannelId,
    /// Whose.
    pub team: TeamId,
    /// What people call it.
    pub name: String,
    /// Where events are sent.
    pub url: String,
    /// What they are signed with. Kept as it is: whoever delivers needs it.
    pub secret: String,
    /// The kinds of events that are sent; all where it is empty.
    pub kinds: BTreeSet<String>,
    /// Whether anything is sent. What happens meanwhile is not sent later.
    pub enabled: bool,
    /// When it was made.
    pub created_at: Stamp,
    /// When its team last changed it.
    pub updated_at: Stamp,
    /// The last event that was delivered, given up, or not meant for it.
    pub cursor: EventId,
    /// Events that were delivered.
    pub delivered: u64,
    /// Events that were given up.
    pub given_up: u64,
    /// Why the last try failed; empty where it did not.
    pub failure: String,
}

impl State {
    /// Every channel, by id.
    pub fn channels(&self) -> impl Iterator<Item = &Channel> {
        self.channels.values()
    }

    /// One channel.
    #[must_use]
    pub fn channel(&self, id: ChannelId) -> Option<&Channel> {
        self.channels.get(&id)
    }

    pub(crate) fn put_channel(&mut self, channel: Channel) {
        self.channels.insert_mut(channel.id, channel);
    }

    pub(crate) fn drop_channel(&mut self, id: ChannelId) {
        self.channels.remove_mut(&id);
    }
}

impl From<EventId> for pb::EventPlace {
    fn from(id: EventId) -> Self {
        Self {
            index: id.index,
            part: id.part,
        }
    }
}

impl From<pb::EventPlace> for EventId {
    fn from(row: pb::EventPlace) -> Self {
        Self {
            index: row.index,
            part: row.part,
        }
    }
}

impl From<&Channel> for pb::ChannelRow {
    fn from(channel: &Channel) -> Self {
        Self {
            id: channel.id.0.to_vec(),
            team: channel.team.0.to_vec(),
            name: channel.name.clone(),
            url: channel.url.clone(),
            secret: channel.secret.clone(),
            kinds: channel.kinds.iter().cloned().collect(),
            enabled: channel.enabled,
            created_at_ms: channel.created_at.0,
            updated_at_ms: channel.updated_at.0,
            cursor: Some(channel.cursor.into()),
            delivered: channel.delivered,
            given_up: channel.given_up,
            failure: channel.failure.clone(),
        }
    }
}

impl TryFrom<pb::ChannelRow> for Channel {
    type Error = BadRow;

    fn try_from(row: pb::ChannelRow) -> Result<Self, BadRow> {
        Ok(Self {
            id: ChannelId(array("channel id", &row.id)?),
            team: TeamId(array("team id", &row.team)?),
            name: row.name,
            url: row.url,
            secret: row.secret,
            kinds: row.kinds.into_iter().collect(),
            enabled: row.enabled,
            created_at: Stamp(row.created_at_ms),
            updated_at: Stamp(row.updated_at_ms),
            cursor: row.cursor.unwrap_or_default().into(),
            delivered: row.delivered,
            given_up: row.given_up,
            failure: row.failure,
        })
    }
}

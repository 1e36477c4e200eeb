//! The commands about channels.

use proto::ids::{ChannelId, TeamId};
use proto::units::Stamp;

use super::Applied;
use crate::command::{Receipt, Refusal, TellChannel};
use crate::state::{Channel, RowKey, State, short};

/// Most channels of one team: each is a request for every event.
const MOST_OF_TEAM: usize = 16;

impl State {
    /// Adds a channel, or replaces what its team says of it. It is told of what comes from now on.
    pub(super) fn set_channel(&mut self, at: Stamp, asked: Channel) -> Applied {
        let known = self.channel(asked.id).cloned();
        if known.as_ref().is_some_and(|it| it.team != asked.team) {
            return Applied::untouched(Err(Refusal::IdTaken(asked.id.to_string())));
        }
        let count = self.channels().filter(|it| it.team == asked.team).count();
        if known.is_none() && count >= MOST_OF_TEAM {
            let why = format!("a team has {MOST_OF_TEAM} channels at most");
            return Applied::untouched(Err(Refusal::Unfit(why)));
        }
        let newest = self.newest_event(asked.team);
        let next = match known {
            Some(known) => Channel {
                created_at: known.created_at,
                updated_at: known.updated_at,
                // What happened while it was off is not sent once it is on.
                cursor: if asked.enabled && !known.enabled {
                    newest
                } else {
                    known.cursor
                },
                delivered: known.delivered,
                given_up: known.given_up,
                failure: known.failure.clone(),
                ..asked
            },
            None => Channel {
                created_at: at,
                updated_at: at,
                cursor: newest,
                delivered: 0,
                given_up: 0,
                failure: String::new(),
                ..asked
            },
        };
        if self.channel(next.id) == Some(&next) {
            return Applied::untouched(Ok(Receipt::Done(0)));
        }
        let id = next.id;
        self.put_channel(Channel {
            updated_at: at,
            ..next
        });
        Applied::touched(Receipt::Done(1), RowKey::Channel(id))
    }

    pub(super) fn remove_channel(&mut self, team: TeamId, id: ChannelId) -> Applied {
        match self.channel(id) {
            Some(known) if known.team == team => {
                self.drop_channel(id);
                Applied::touched(Receipt::Done(1), RowKey::Channel(id))
            }
            _ => Applied::untouched(Ok(Receipt::Done(0))),
        }
    }

    /// Notes how far a channel has been told. Told of the same again, nothing happens.
    pub(super) fn tell_channel(&mut self, told: TellChannel) -> Applied {
        let Some(known) = self.channel(told.id) else {
            return Applied::untouched(Ok(Receipt::Done(0)));
        };
        if known.cursor != told.from || told.upto < told.from {
            return Applied::untouched(Ok(Receipt::Done(0)));
        }
        let next = Channel {
            cursor: told.upto,
            delivered: known.delivered.saturating_add(told.delivered.into()),
            given_up: known.given_up.saturating_add(told.given_up.into()),
            failure: short(&told.failure),
            ..known.clone()
        };
        if *known == next {
            return Applied::untouched(Ok(Receipt::Done(0)));
        }
        self.put_channel(next);
        Applied::touched(Receipt::Done(1), RowKey::Channel(told.id))
    }
}

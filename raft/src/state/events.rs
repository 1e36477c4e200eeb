//! What happened, as clients are told: derived from the changes themselves as they are applied, so
//! every node has the same events under the same ids, and a restart loses none.
//!
//! Only the newest are kept, of each team and in all: a client or a receiver that falls further
//! behind has missed some, and sees it by [`State::events_after`].

use std::ops::Bound;

use proto::ids::{NodeId, SandboxId, TeamId};
use proto::units::Stamp;
use proto::wire::raft as pb;
use rpds::{RedBlackTreeMapSync, RedBlackTreeSetSync};

use super::rows::BadRow;
use super::usage::TeamLoad;
use super::{Actor, Phase, State};
use crate::wire::{array, some};

/// Events of one team that are kept: a thousand capsules that come and go once make four thousand.
pub(super) const KEPT_OF_TEAM: usize = 4096;
/// Events of all teams that are kept: about 8 MiB in memory.
pub(super) const KEPT_IN_ALL: usize = 32_768;
/// Characters of a reason that an event keeps.
const REASON_CHARS: usize = 256;

/// Which event: the entry that did it, and which of what that entry did. Later ones are greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventId {
    /// The entry's index in the log.
    pub index: u64,
    /// 0 for the first.
    pub part: u32,
}

impl EventId {
    /// Before any event.
    pub const FIRST: Self = Self { index: 0, part: 0 };
    const LAST: Self = Self {
        index: u64::MAX,
        part: u32::MAX,
    };
}

impl std::fmt::Display for EventId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.index, self.part)
    }
}

/// Text that names no event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event's id is two numbers with a dash between them")]
pub struct BadEventId;

impl std::str::FromStr for EventId {
    type Err = BadEventId;

    fn from_str(text: &str) -> Result<Self, BadEventId> {
        let (index, part) = text.split_once('-').ok_or(BadEventId)?;
        Ok(Self {
            index: index.parse().map_err(|_| BadEventId)?,
            part: part.parse().map_err(|_| BadEventId)?,
        })
    }
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Its place among all.
    pub id: EventId,
    /// When, by the clock of whoever proposed it.
    pub at: Stamp,
    /// Whose it is; of a node of no team, the platform's.
    pub team: TeamId,
    /// What of the team's ran after it.
    pub load: TeamLoad,
    /// Who asked for the change; the system where nobody did.
    pub actor: Actor,
    /// What.
    pub what: Happening,
}

/// What can happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happening {
    /// A sandbox came from one phase to another.
    Sandbox {
        /// Which one.
        id: SandboxId,
        /// `None` for one that is new.
        from: Option<Phase>,
        /// Where it stands now.
        to: Phase,
        /// Why, where its record says so; cut to a line or two.
        reason: String,
        /// Its owner.
        node: NodeId,
    },
    /// A team's name of a snapshot came, also in the place of another, or went.
    Named {
        /// Which name.
        name: String,
        /// Whether it went.
        gone: bool,
    },
    /// A node was let in or is heard again, or is missed or was taken out.
    Node {
        /// Which one.
        id: NodeId,
        /// What people call it.
        name: String,
        /// Whether it is missed or was taken out.
        down: bool,
    },
}

/// A reason, cut to what an event keeps.
pub(crate) fn short(reason: &str) -> String {
    reason.chars().take(REASON_CHARS).collect()
}

/// Events since a given one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventsSince {
    /// The earliest first.
    pub events: Vec<Event>,
    /// Whether there may have been more before them, which are not kept any more.
    pub missed: bool,
}

/// All events that are kept, in their order, and shorter ways to those of one team.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Events {
    all: RedBlackTreeMapSync<EventId, Event>,
    teams: RedBlackTreeSetSync<(TeamId, EventId)>,
    counts: RedBlackTreeMapSync<TeamId, usize>,
}

impl Events {
    fn count(&self, team: TeamId) -> usize {
        self.counts.get(&team).copied().unwrap_or_default()
    }

    fn put(&mut self, event: Event) {
        self.drop(event.id);
        let team = event.team;
        self.counts.insert_mut(team, self.count(team) + 1);
        self.teams.insert_mut((team, event.id));
        self.all.insert_mut(event.id, event);
    }

    fn drop(&mut self, id: EventId) {
        let Some(team) = self.all.get(&id).map(|it| it.team) else {
            return;
        };
        self.all.remove_mut(&id);
        self.teams.remove_mut(&(team, id));
        match self.count(team) {
            count @ 2.. => self.counts.insert_mut(team, count - 1),
            _ => {
                self.counts.remove_mut(&team);
            }
        }
    }

    fn ids_of(
        &self,
        team: TeamId,
        after: Bound<EventId>,
    ) -> impl DoubleEndedIterator<Item = EventId> {
        let from = after.map(|id| (team, id));
        let range = self
            .teams
            .range((from, Bound::Included((team, EventId::LAST))));
        range.map(|(_, id)| *id)
    }

    /// What must go now that one of `team` has come.
    fn outdated(&self, team: TeamId) -> Option<EventId> {
        let of_team = || self.ids_of(team, Bound::Included(EventId::FIRST)).next();
        let of_all = || self.all.first().map(|(id, _)| *id);
        if self.count(team) > KEPT_OF_TEAM {
            of_team()
        } else if self.all.size() > KEPT_IN_ALL {
            of_all()
        } else {
            None
        }
    }
}

impl State {
    /// One event.
    #[must_use]
    pub fn event(&self, id: EventId) -> Option<&Event> {
        self.events.all.get(&id)
    }

    /// Every event that is kept, the earliest first.
    pub fn all_events(&self) -> impl Iterator<Item = &Event> {
        self.events.all.values()
    }

    /// The events of one team that are kept, the latest first.
    pub fn events_of(&self, team: TeamId) -> impl Iterator<Item = &Event> {
        let ids = self.events.ids_of(team, Bound::Included(EventId::FIRST));
        ids.rev().filter_map(|id| self.event(id))
    }

    /// At most `most` events of one team behind `after`.
    #[must_use]
    pub fn events_after(&self, team: TeamId, after: EventId, most: usize) -> EventsSince {
        let ids = self.events.ids_of(team, Bound::Excluded(after));
        let events = ids.filter_map(|id| self.event(id));
        let mut kept = self.events.ids_of(team, Bound::Included(EventId::FIRST));
        let is_full =
            self.events.count(team) >= KEPT_OF_TEAM || self.events.all.size() >= KEPT_IN_ALL;
        EventsSince {
            events: events.take(most).cloned().collect(),
            missed: is_full && kept.next().is_none_or(|oldest| after < oldest),
        }
    }

    /// The newest event of one team.
    #[must_use]
    pub fn newest_event(&self, team: TeamId) -> EventId {
        let newest = self.events_of(team).next();
        newest.map_or(EventId::FIRST, |event| event.id)
    }

    pub(super) fn put_event(&mut self, event: Event) {
        self.events.put(event);
    }

    pub(super) fn drop_event(&mut self, id: EventId) {
        self.events.drop(id);
    }

    /// Adds an event, and drops those that are not kept any more. Answers which rows changed.
    pub(crate) fn add_event(&mut self, event: Event) -> Vec<EventId> {
        let (id, team) = (event.id, event.team);
        self.put_event(event);
        let mut touched = vec![id];
        while let Some(gone) = self.events.outdated(team) {
            self.drop_event(gone);
            touched.push(gone);
        }
        touched
    }
}

impl From<&Event> for pb::EventRow {
    fn from(event: &Event) -> Self {
        use pb::event_row::What as Wire;
        let what = match &event.what {
            Happening::Sandbox {
                id,
                from,
                to,
                reason,
                node,
            } => Wire::Sandbox(pb::SandboxMoved {
                id: id.0.to_vec(),
                from: from.map_or(pb::Phase::Unspecified, pb::Phase::from).into(),
                to: pb::Phase::from(*to).into(),
                reason: reason.clone(),
                node: node.0,
            }),
            Happening::Named { name, gone } => Wire::Name(pb::NameChanged {
                name: name.clone(),
                gone: *gone,
            }),
            Happening::Node { id, name, down } => Wire::Node(pb::NodeMoved {
                id: id.0,
                name: name.clone(),
                down: *down,
            }),
        };
        Self {
            index: event.id.index,
            part: event.id.part,
            at_ms: event.at.0,
            team: event.team.0.to_vec(),
            load: Some(event.load.into()),
            actor: Some((&event.actor).into()),
            what: Some(what),
        }
    }
}

impl TryFrom<pb::EventRow> for Event {
    type Error = BadRow;

    fn try_from(row: pb::EventRow) -> Result<Self, BadRow> {
        use pb::event_row::What as Wire;
        let what = match some("what an event is of", row.what)? {
            Wire::Sandbox(it) => Happening::Sandbox {
                id: SandboxId(array("sandbox id", &it.id)?),
                from: match it.from() {
                    pb::Phase::Unspecified => None,
                    known => Some(known.try_into()?),
                },
                to: it.to().try_into()?,
                node: NodeId(it.node),
                reason: it.reason,
            },
            Wire::Name(it) => Happening::Named {
                name: it.name,
                gone: it.gone,
            },
            Wire::Node(it) => Happening::Node {
                id: NodeId(it.id),
                name: it.name,
                down: it.down,
            },
        };
        Ok(Self {
            id: EventId {
                index: row.index,
                part: row.part,
            },
            at: Stamp(row.at_ms),
            team: TeamId(array("team id", &row.team)?),
            load: row.load.unwrap_or_default().into(),
            actor: some("actor", row.actor)?.try_into()?,
            what,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEAM: TeamId = TeamId([1; 16]);
    const OTHER: TeamId = TeamId([2; 16]);

    fn event(index: u64, team: TeamId) -> Event {
        Event {
            id: EventId { index, part: 0 },
            at: Stamp(index),
            team,
            load: TeamLoad::default(),
            actor: Actor::System,
            what: Happening::Named {
                name: "n".into(),
                gone: false,
            },
        }
    }

    fn since(state: &State, team: TeamId, index: u64) -> EventsSince {
        state.events_after(team, EventId { index, part: 0 }, usize::MAX)
    }

    #[test]
    fn the_oldest_of_a_team_goes_first_and_others_keep_theirs() {
        let mut state = State::default();
        state.add_event(event(1, OTHER));
        for index in 2..=KEPT_OF_TEAM as u64 + 1 {
            assert_eq!(state.add_event(event(index, TEAM)).len(), 1);
        }
        let full = KEPT_OF_TEAM as u64 + 2;
        let gone: Vec<u64> = state
            .add_event(event(full, TEAM))
            .iter()
            .map(|it| it.index)
            .collect();
        assert_eq!(gone, [full, 2]);
        assert!(since(&state, TEAM, 1).missed, "event 2 is gone");
        assert!(!since(&state, TEAM, 3).missed);
        assert_eq!(since(&state, TEAM, full - 1).events.len(), 1);
        assert_eq!(since(&state, OTHER, 0).events.len(), 1);
        assert!(!since(&state, OTHER, 0).missed);
    }

    #[test]
    fn an_id_reads_as_it_is_written_and_nothing_else_does() {
        let id = EventId { index: 70, part: 1 };
        assert_eq!(id.to_string().parse(), Ok(id));
        for bad in [
            "",
            "-",
            "7",
            "7-",
            "-1",
            "7-x",
            "7-1-2",
            "99999999999999999999999-0",
        ] {
            assert_eq!(bad.parse::<EventId>(), Err(BadEventId), "{bad}");
        }
    }
}

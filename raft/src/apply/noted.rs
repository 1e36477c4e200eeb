//! What follows from any change: usage, counted where a run ends, and events.
//!
//! It looks at the rows that a command touched, before and after, and not at the command: so nothing
//! that changes a sandbox can be forgotten here. A sandbox's `updated_at` is its last change; what
//! ran since is counted at the next one.

use std::collections::{BTreeMap, BTreeSet};

use proto::ids::{NodeId, SandboxId, TeamId};
use proto::units::Stamp;

use crate::state::{
    Actor, Event, EventId, Happening, Node, RowKey, Sandbox, State, TeamLoad, UsageBook, short,
};

impl State {
    /// Counts what the rows in `touched` have changed since `before`, adds the events, and adds the
    /// rows of both.
    pub(super) fn note(
        &mut self,
        before: &Self,
        (index, at, actor): (u64, Stamp, Actor),
        touched: &mut Vec<RowKey>,
    ) {
        if touched.is_empty() {
            return;
        }
        let changed: BTreeSet<RowKey> = touched.iter().cloned().collect();
        let sandboxes = changed.iter().filter_map(|key| match key {
            RowKey::Sandbox(id) => Some(*id),
            _ => None,
        });
        let sandboxes: Vec<SandboxId> = sandboxes.collect();
        self.count_usage(before, at, &sandboxes, touched);
        let happened = changed.iter().filter_map(|key| self.happening(before, key));
        let happened: Vec<(TeamId, Happening)> = happened.collect();
        for (part, (team, what)) in (0..).zip(happened) {
            let event = Event {
                id: EventId { index, part },
                at,
                team,
                load: self.load_of(team),
                actor: actor.clone(),
                what,
            };
            touched.extend(self.add_event(event).into_iter().map(RowKey::Event));
        }
    }

    /// Adds what has run, or was asked for, to the days of its team.
    fn count_usage(
        &mut self,
        before: &Self,
        at: Stamp,
        sandboxes: &[SandboxId],
        touched: &mut Vec<RowKey>,
    ) {
        let mut books: BTreeMap<TeamId, UsageBook> = BTreeMap::new();
        for id in sandboxes {
            let (known, now) = (before.sandbox(*id), self.sandbox(*id));
            let Some(team) = known.or(now).map(|it| it.team) else {
                continue;
            };
            let mut book = books.remove(&team).unwrap_or_else(|| UsageBook::new(team));
            if known.is_none() {
                book.create(self, at);
            }
            if let Some(known) = known.filter(|it| it.phase.runs_guest()) {
                let until = before.counted_until(known, at);
                book.run(self, TeamLoad::of(known), known.updated_at, until);
            }
            books.insert(team, book);
        }
        for (team, mut book) in books {
            let (was, is) = (before.load_of(team), self.load_of(team));
            if was != is {
                book.peak(self, was.max(is), at);
            }
            touched.extend(self.keep_usage(book));
        }
    }

    fn keep_usage(&mut self, book: UsageBook) -> Vec<RowKey> {
        let team = book.team();
        let mut touched = Vec::new();
        for (day, usage) in book.into_days() {
            self.put_usage(usage);
            touched.push(RowKey::Usage(team, day));
        }
        for day in self.outdated_usage(team) {
            self.drop_usage(team, day);
            touched.push(RowKey::Usage(team, day));
        }
        touched
    }

    /// What the change of one row means to clients, and to which team.
    fn happening(&self, before: &Self, key: &RowKey) -> Option<(TeamId, Happening)> {
        match key {
            RowKey::Sandbox(id) => moved(before.sandbox(*id), self.sandbox(*id)?),
            RowKey::Named(team, name) => {
                let (known, now) = (before.named(*team, name), self.named(*team, name));
                let what = Happening::Named {
                    name: name.clone(),
                    gone: now.is_none(),
                };
                (known != now).then_some((*team, what))
            }
            RowKey::Node(id) => shown(*id, before.node(*id), self.node(*id)),
            _ => None,
        }
    }
}

fn moved(known: Option<&Sandbox>, now: &Sandbox) -> Option<(TeamId, Happening)> {
    let from = known.map(|it| it.phase);
    let what = Happening::Sandbox {
        id: now.id,
        from,
        to: now.phase,
        reason: short(&now.reason),
        node: now.owner,
    };
    (from != Some(now.phase)).then_some((now.team, what))
}

fn shown(id: NodeId, known: Option<&Node>, now: Option<&Node>) -> Option<(TeamId, Happening)> {
    let is_up = |node: Option<&Node>| node.is_some_and(|it| it.liveness.is_alive());
    let node = now.or(known)?;
    let what = Happening::Node {
        id,
        name: node.name.clone(),
        down: !is_up(now),
    };
    (is_up(known) != is_up(now)).then(|| (node.team.unwrap_or_default(), what))
}

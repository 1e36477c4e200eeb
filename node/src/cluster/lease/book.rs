//! The leader's half of the lease: who renewed when, and who is to be called missing, lost or back.
//!
//! The book is one leader's memory for one term and is never handed on. A verdict is a proposal the
//! caller makes; the node table, as applied, says what came of it, and the book goes by that alone:
//!
//! ```text
//! Alive --no renewal for ttl + margin--> Missing --for grace more--> Lost
//!   ^--------- sign of life -------------'  ^                         |
//!                                           '-- announces itself anew -'
//! ```
//!
//! An incarnation ends with its loss: the node that announces itself gets another one. A node whose
//! own copy of the table lags could otherwise take what that says of the time before for its return,
//! and start what others run by now.
//!
//! Renewals of a node that the table does not call alive are refused, since grants beside a verdict
//! on its way through the log would count for nothing. They are remembered as signs of life. What
//! keeps a lost node from thawing what it had is its own [`Holder`](super::Holder), which has
//! lapsed and takes no grant under the incarnation that was lost.

use std::collections::BTreeMap;
use std::time::Duration;

use proto::ids::NodeId;
use raft::command::{self, Command};
use raft::state;

use super::Tick;
use super::times::LeaseTimes;

/// What the replicated node table says of a node's lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Listed {
    /// Which start of its daemon the table knows.
    pub incarnation: u64,
    /// Where the node stands.
    pub liveness: Liveness,
}

impl From<&state::Node> for Listed {
    fn from(node: &state::Node) -> Self {
        let liveness = match node.liveness {
            state::Liveness::Alive => Liveness::Alive,
            state::Liveness::Missing { .. } => Liveness::Missing,
            state::Liveness::Lost { .. } => Liveness::Lost,
        };
        Self {
            incarnation: node.incarnation,
            liveness,
        }
    }
}

/// Where a node stands in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Liveness {
    /// It may run what it owns.
    Alive,
    /// It has not renewed for so long that its guests are frozen.
    Missing,
    /// It has not renewed for so long that its lease-bound guests are dead.
    Lost,
}

/// What the log should be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// The node's lease is over; nothing new is placed there.
    Missing(NodeId, u64),
    /// The node's lease-bound guests are dead; their epochs may be given out again.
    Lost(NodeId, u64),
    /// The node is there again.
    Back(NodeId, u64),
}

impl Verdict {
    /// The command that tells the log.
    #[must_use]
    pub const fn command(self) -> Command {
        let (node, incarnation, verdict) = match self {
            Self::Missing(node, incarnation) => (node, incarnation, command::Verdict::Missing),
            Self::Lost(node, incarnation) => (node, incarnation, command::Verdict::Lost),
            Self::Back(node, incarnation) => (node, incarnation, command::Verdict::Back),
        };
        Command::JudgeNode {
            node,
            incarnation,
            verdict,
        }
    }
}

/// Why a renewal is not granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// The node is not in the table.
    #[error("the node is not a member")]
    NotListed,
    /// The table knows another incarnation of the node: this one is over or not announced yet.
    #[error("the node is known under another incarnation")]
    OtherIncarnation,
    /// The node counts as missing until its return is committed.
    #[error("the node counts as missing; its return is on its way")]
    Missing,
    /// The node counts as lost until its return is committed.
    #[error("the node counts as lost; its return is on its way")]
    Lost,
}

/// Renewals as the leader received them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Book {
    times: LeaseTimes,
    started_at: Tick,
    entries: BTreeMap<NodeId, Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Entry {
    /// The last grant, or when the node was first seen in its present state.
    counted_from: Tick,
    /// The table's word at the last look.
    listed: Listed,
    /// The last refused renewal that asks for the node's return.
    sign_of_life: Option<Tick>,
}

impl Book {
    /// The book of a new leader, which knows no renewals: everybody counts from `started_at`.
    ///
    /// That instant must not be earlier than the commit of the leader's first own entry: until then
    /// an earlier leader may have granted renewals that this one has never heard of.
    #[must_use]
    pub const fn new(times: LeaseTimes, started_at: Tick) -> Self {
        Self {
            times,
            started_at,
            entries: BTreeMap::new(),
        }
    }

    /// Decides on a renewal received at `received_at`; `listed` is the node's row as applied.
    ///
    /// On `Ok` the caller may answer yes, but only once a read-index confirmation that *started*
    /// after `received_at` has shown that this node still leads.
    ///
    /// # Errors
    /// [`Refused`] names what stands against it. The node asks again in its own time.
    pub fn renewed(
        &mut self,
        node: NodeId,
        incarnation: u64,
        received_at: Tick,
        listed: Option<Listed>,
    ) -> Result<(), Refused> {
        let listed = listed.ok_or(Refused::NotListed)?;
        if incarnation != listed.incarnation {
            return Err(Refused::OtherIncarnation);
        }
        let entry = self.entry(node, received_at, listed);
        match listed.liveness {
            Liveness::Alive => {
                entry.counted_from = entry.counted_from.max(received_at);
                Ok(())
            }
            Liveness::Missing => {
                entry.sign_of_life = Some(received_at);
                Err(Refused::Missing)
            }
            Liveness::Lost => Err(Refused::Lost),
        }
    }

    /// What the log should be told at `now`, given the whole node table as applied.
    ///
    /// A verdict is repeated at every call until the table shows it, so the caller keeps at most
    /// one proposal per node under way. Nodes that are not in `table` are forgotten.
    pub fn verdicts(
        &mut self,
        now: Tick,
        table: impl IntoIterator<Item = (NodeId, Listed)>,
    ) -> Vec<Verdict> {
        let before = std::mem::take(&mut self.entries);
        let mut verdicts = Vec::new();
        for (node, listed) in table {
            if let Some(entry) = before.get(&node) {
                self.entries.insert(node, entry.clone());
            }
            let times = self.times;
            let entry = self.entry(node, now, listed);
            verdicts.extend(entry.verdict(node, now, &times));
        }
        verdicts
    }

    /// How long ago a node's last granted renewal arrived, or it was first looked at.
    #[must_use]
    pub fn age(&self, node: NodeId, now: Tick) -> Option<Duration> {
        let entry = self.entries.get(&node)?;
        Some(now.since(entry.counted_from))
    }

    /// The entry of a node, brought up to what the table says now.
    fn entry(&mut self, node: NodeId, now: Tick, listed: Listed) -> &mut Entry {
        let first_seen = now.max(self.started_at);
        let entry = self.entries.entry(node).or_insert(Entry {
            counted_from: first_seen,
            listed,
            sign_of_life: None,
        });
        let admitted = listed.incarnation != entry.listed.incarnation;
        let returned =
            listed.liveness == Liveness::Alive && entry.listed.liveness != Liveness::Alive;
        // It has had no time to renew yet. Counting from later is always safe.
        if admitted || returned {
            entry.counted_from = entry.counted_from.max(first_seen);
        }
        if admitted || listed.liveness == Liveness::Alive {
            entry.sign_of_life = None;
        }
        entry.listed = listed;
        entry
    }
}

impl Entry {
    fn verdict(&self, node: NodeId, now: Tick, times: &LeaseTimes) -> Option<Verdict> {
        let Listed {
            incarnation,
            liveness,
        } = self.listed;
        let age = now.since(self.counted_from);
        let back = self
            .sign_of_life
            .filter(|at| now.since(*at) < times.ttl)
            .map(|_| Verdict::Back(node, incarnation));
        match liveness {
            Liveness::Alive => {
                (age >= times.missing_after()).then_some(Verdict::Missing(node, incarnation))
            }
            Liveness::Missing => {
                back.or((age >= times.lost_after()).then_some(Verdict::Lost(node, incarnation)))
            }
            Liveness::Lost => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NodeId = NodeId(7);

    fn at(secs: u64) -> Tick {
        Tick(Duration::from_secs(secs))
    }

    fn listed(incarnation: u64, liveness: Liveness) -> Listed {
        Listed {
            incarnation,
            liveness,
        }
    }

    fn alive() -> Listed {
        listed(1, Liveness::Alive)
    }

    fn missing() -> Listed {
        listed(1, Liveness::Missing)
    }

    fn book() -> Book {
        let mut book = Book::new(LeaseTimes::default(), at(100));
        assert_eq!(look(&mut book, 100, alive()), []);
        book
    }

    fn look(book: &mut Book, secs: u64, row: Listed) -> Vec<Verdict> {
        book.verdicts(at(secs), [(NODE, row)])
    }

    #[test]
    fn a_new_leader_gives_everybody_a_whole_lease_and_the_margin() {
        let mut book = book();
        assert_eq!(look(&mut book, 111, alive()), []);
        assert_eq!(look(&mut book, 112, alive()), [Verdict::Missing(NODE, 1)]);
    }

    #[test]
    fn a_new_leader_waits_for_the_lost_as_long_as_for_the_missing() {
        let mut book = Book::new(LeaseTimes::default(), at(100));
        assert_eq!(look(&mut book, 50, missing()), []);
        assert_eq!(look(&mut book, 171, missing()), []);
        assert_eq!(look(&mut book, 172, missing()), [Verdict::Lost(NODE, 1)]);
    }

    #[test]
    fn a_verdict_is_repeated_until_the_table_shows_it() {
        let mut book = book();
        assert_eq!(look(&mut book, 112, alive()), [Verdict::Missing(NODE, 1)]);
        assert_eq!(look(&mut book, 113, alive()), [Verdict::Missing(NODE, 1)]);
        assert_eq!(look(&mut book, 114, missing()), []);
    }

    #[test]
    fn a_renewal_counts_from_its_receipt() {
        let mut book = book();
        assert_eq!(book.renewed(NODE, 1, at(108), Some(alive())), Ok(()));
        assert_eq!(look(&mut book, 119, alive()), []);
        assert_eq!(look(&mut book, 120, alive()), [Verdict::Missing(NODE, 1)]);
        assert_eq!(look(&mut book, 121, missing()), []);
        assert_eq!(look(&mut book, 180, missing()), [Verdict::Lost(NODE, 1)]);
    }

    #[test]
    fn a_missing_node_is_granted_nothing_until_its_return_is_committed() {
        let mut book = book();
        let refused = book.renewed(NODE, 1, at(120), Some(missing()));
        assert_eq!(refused, Err(Refused::Missing));
        assert_eq!(look(&mut book, 120, missing()), [Verdict::Back(NODE, 1)]);
        assert_eq!(look(&mut book, 121, alive()), []);
        assert_eq!(book.renewed(NODE, 1, at(121), Some(alive())), Ok(()));
    }

    #[test]
    fn a_node_that_just_returned_has_a_whole_lease_to_renew_in() {
        let mut book = book();
        let _ = book.renewed(NODE, 1, at(150), Some(missing()));
        assert_eq!(look(&mut book, 151, alive()), []);
        assert_eq!(look(&mut book, 162, alive()), []);
        assert_eq!(look(&mut book, 163, alive()), [Verdict::Missing(NODE, 1)]);
    }

    #[test]
    fn an_old_sign_of_life_brings_nobody_back() {
        let mut book = book();
        let _ = book.renewed(NODE, 1, at(120), Some(missing()));
        assert_eq!(look(&mut book, 129, missing()), [Verdict::Back(NODE, 1)]);
        assert_eq!(look(&mut book, 130, missing()), []);
    }

    #[test]
    fn a_lost_node_comes_back_under_another_incarnation_only() {
        let mut book = book();
        let lost = listed(1, Liveness::Lost);
        assert_eq!(look(&mut book, 200, lost), []);
        let refused = book.renewed(NODE, 1, at(201), Some(lost));
        assert_eq!(refused, Err(Refused::Lost));
        assert_eq!(look(&mut book, 201, lost), []);
        let announced = listed(2, Liveness::Missing);
        assert_eq!(look(&mut book, 202, announced), []);
        let refused = book.renewed(NODE, 2, at(203), Some(announced));
        assert_eq!(refused, Err(Refused::Missing));
        assert_eq!(look(&mut book, 203, announced), [Verdict::Back(NODE, 2)]);
    }

    #[test]
    fn a_sign_of_life_of_an_earlier_start_brings_nobody_back() {
        let mut book = book();
        let _ = book.renewed(NODE, 1, at(120), Some(missing()));
        assert_eq!(look(&mut book, 121, listed(2, Liveness::Missing)), []);
    }

    #[test]
    fn renewals_of_strangers_and_of_other_incarnations_are_refused_by_name() {
        let mut book = book();
        let stranger = book.renewed(NODE, 1, at(101), None);
        assert_eq!(stranger, Err(Refused::NotListed));
        let row = Some(listed(5, Liveness::Alive));
        for other in [4, 6] {
            let refused = book.renewed(NODE, other, at(101), row);
            assert_eq!(refused, Err(Refused::OtherIncarnation));
        }
    }

    #[test]
    fn a_node_that_joins_an_old_leader_is_not_missing_at_once() {
        let mut book = Book::new(LeaseTimes::default(), at(100));
        assert_eq!(look(&mut book, 5000, alive()), []);
        assert_eq!(look(&mut book, 5012, alive()), [Verdict::Missing(NODE, 1)]);
    }

    #[test]
    fn the_book_forgets_who_left_the_table() {
        let mut book = book();
        assert_eq!(book.verdicts(at(101), []), []);
        assert_eq!(book.age(NODE, at(101)), None);
    }
}

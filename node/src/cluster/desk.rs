//! The leader's desk: renewals come in, verdicts about leases go out.
//!
//! ```text
//! renewal > note the instant > read-index confirmation that starts after it > book > consent
//! ```
//!
//! A leader that was deposed and does not know it gets no confirmation, so it consents to nothing:
//! without that, its side would keep running what the other side gives out again. One confirmation
//! serves every renewal that came in before it started.
//!
//! A new leader knows no renewals. It opens a book that counts from its own first committed entry,
//! and closes it when it no longer leads.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto::ids::NodeId;
use raft::group::{Group, Role};
use raft::state::{Outlived, Settings, State};
use tokio::sync::watch;
use tokio::time::{self, Instant};

use super::lease::{Book, LeaseTimes, Listed, Refused, Renewal, Tick, Verdict};
use super::replica::Replica;
use crate::base::clock::BootInstant;

/// Why a renewal is not granted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NotGranted {
    /// Ask the leader.
    #[error("not the leader")]
    NotLeader,
    /// No quorum confirmed in time that this node leads.
    #[error("no quorum confirms that this node leads")]
    NoQuorum,
    /// The book says no.
    #[error(transparent)]
    Refused(#[from] Refused),
}

/// Where the leader keeps its book; on other nodes it is closed.
pub(super) struct Desk {
    group: Group<State>,
    replica: Replica,
    open: Mutex<Option<OpenBook>>,
    confirmations: Confirmations,
    /// The lease times that the present ones replaced, and when this node learned so.
    outlived: Mutex<Option<(Outlived, Tick)>>,
}

#[derive(Debug)]
struct OpenBook {
    term: u64,
    times: LeaseTimes,
    book: Book,
}

/// The lease times that `settings` mean. They were checked when they were set.
pub(super) fn times(settings: Settings) -> LeaseTimes {
    LeaseTimes::new(settings.lease_ttl, settings.lease_grace).unwrap_or_default()
}

/// From when a book by the `wanted` times counts: not before the leases that were granted by earlier,
/// longer ones would be over too.
fn counts_from(outlived: Option<(Outlived, Tick)>, wanted: LeaseTimes, now: Tick) -> Tick {
    let Some((former, learned_at)) = outlived else {
        return now;
    };
    let former = LeaseTimes::new(former.lease_ttl, former.lease_grace);
    let longest = former.map_or(Duration::ZERO, |former| former.lost_after());
    now.max(learned_at.plus(longest.saturating_sub(wanted.lost_after())))
}

/// This machine's time since boot, sleep included, as leases count it.
pub(super) fn now() -> Tick {
    BootInstant::now().into()
}

impl Desk {
    pub(super) fn new(group: Group<State>, replica: Replica) -> Self {
        Self {
            confirmations: Confirmations::new(),
            group,
            replica,
            open: Mutex::new(None),
            outlived: Mutex::new(None),
        }
    }

    /// Decides on a renewal by `node` that has just come in; returns the times it is good for.
    pub(super) async fn renew(
        &self,
        node: NodeId,
        renewal: Renewal,
        deadline: Instant,
    ) -> Result<LeaseTimes, NotGranted> {
        let received_at = now();
        if self.group.role() != Role::Leader {
            return Err(NotGranted::NotLeader);
        }
        let confirmed = time::timeout_at(deadline, self.confirmations.next(&self.group)).await;
        if confirmed != Ok(true) {
            return Err(NotGranted::NoQuorum);
        }
        let listed = self.replica.state().node(node).map(Listed::from);
        let mut open = self.lock();
        let open = open.as_mut().ok_or(NotGranted::NotLeader)?;
        open.book
            .renewed(node, renewal.incarnation, received_at, listed)?;
        Ok(open.times)
    }

    /// What the log should be told now; opens the book for a term that has just begun, for which
    /// the caller knows that its first entry is committed.
    pub(super) fn verdicts(&self, term: u64) -> Vec<Verdict> {
        let state = self.replica.state();
        let wanted = times(state.settings());
        let now = now();
        self.note_times(&state);
        let outlived = *self.outlived.lock().unwrap_or_else(PoisonError::into_inner);
        let mut open = self.lock();
        let known = open.take().filter(|open| open.term == term);
        let current = known.filter(|open| open.times == wanted);
        let mut current = current.unwrap_or_else(|| OpenBook {
            term,
            times: wanted,
            book: Book::new(wanted, counts_from(outlived, wanted, now)),
        });
        let table = state.nodes().map(|node| (node.id, Listed::from(node)));
        let verdicts = current.book.verdicts(now, table);
        *open = Some(current);
        verdicts
    }

    /// Remembers when this node learned of changed lease times: whatever was granted by the old
    /// ones was granted before. On every node, since any may lead next.
    pub(super) fn note_times(&self, state: &State) {
        let told = state.cluster().and_then(|cluster| cluster.outlived);
        let mut known = self.outlived.lock().unwrap_or_else(PoisonError::into_inner);
        if known.map(|(outlived, _)| outlived) != told {
            *known = told.map(|outlived| (outlived, now()));
        }
    }

    /// Closes the book: this node no longer leads.
    pub(super) fn close(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<OpenBook>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Read-index confirmations, shared: whoever comes while one is under way waits for the next, since
/// only one that started after the question answers it.
#[derive(Debug)]
struct Confirmations {
    /// The number of the last one that ended, and whether it confirmed.
    ended: watch::Sender<(u64, bool)>,
    /// The number of the last one that started.
    started: Mutex<u64>,
    turn: tokio::sync::Mutex<()>,
}

impl Confirmations {
    fn new() -> Self {
        Self {
            ended: watch::Sender::new((0, false)),
            started: Mutex::new(0),
            turn: tokio::sync::Mutex::new(()),
        }
    }

    /// Whether a confirmation that starts after this call succeeds.
    async fn next(&self, group: &Group<State>) -> bool {
        let wanted = *self.started.lock().unwrap_or_else(PoisonError::into_inner) + 1;
        // Whoever gets the turn first carries it out for all who wait for the same one.
        let _turn = self.turn.lock().await;
        let (ended, confirmed) = *self.ended.borrow();
        if ended >= wanted {
            return confirmed;
        }
        let number = {
            let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
            *started += 1;
            *started
        };
        let confirmed = group.read_index().await.is_ok();
        self.ended.send_replace((number, confirmed));
        confirmed
    }
}

#[cfg(test)]
mod tests {
    use proto::units::Stamp;

    use super::*;

    #[test]
    fn a_book_waits_for_leases_that_were_granted_by_longer_times() {
        let secs = Duration::from_secs;
        let times = |ttl, grace| LeaseTimes::new(secs(ttl), secs(grace)).expect("they are fine");
        let (long, short) = (times(60, 60), times(5, 5));
        let former = Outlived {
            lease_ttl: secs(60),
            lease_grace: secs(60),
            changed_at: Stamp(1),
        };
        let learned_at = Tick(secs(1000));
        let outlived = Some((former, learned_at));
        let start = counts_from(outlived, short, Tick(secs(1010)));
        let lost_at = start.plus(short.lost_after());
        assert_eq!(lost_at, learned_at.plus(long.lost_after()));
        // Once those are over there is nothing left to wait for.
        let later = Tick(secs(2000));
        assert_eq!(counts_from(outlived, short, later), later);
        assert_eq!(counts_from(None, short, later), later);
    }
}

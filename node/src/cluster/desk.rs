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

use proto::ids::NodeId;
use raft::group::{Group, Role};
use raft::state::{Settings, State};
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
        let mut open = self.lock();
        let known = open.take().filter(|open| open.term == term);
        let mut current = match known {
            Some(open) if open.times == wanted => open,
            // Under the old times consent may have been given for longer than under the new.
            Some(old) => {
                let longer = old.times.lost_after().saturating_sub(wanted.lost_after());
                OpenBook {
                    term,
                    times: wanted,
                    book: Book::new(wanted, now.plus(longer)),
                }
            }
            None => OpenBook {
                term,
                times: wanted,
                book: Book::new(wanted, now),
            },
        };
        let table = state.nodes().map(|node| (node.id, Listed::from(node)));
        let verdicts = current.book.verdicts(now, table);
        *open = Some(current);
        verdicts
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

//! The snapshot that a guest goes on from, until all of it is here.
//!
//! ```text
//! resume    all but the memory is here > the guest runs, what it touches is brought first
//!           > it is ready > the rest follows, until the snapshot is whole
//! restart   the same, for a guest that is retaken: its record names the snapshot
//! pause     waits until it is whole, while the guest runs on: the next snapshot is of its chunks too
//! ```
//!
//! The rest goes into this node's store and not into the guest, which takes what it needs. A guest
//! that needs a chunk stands still while those that have it cannot be reached, for some minutes
//! (`waits.rs`). Once nobody is left who has it, its pager is told so, and the guest is ended.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::OnceCell;
use tokio::task::JoinSet;
use tokio::time::{self, Instant};
use tracing::{Instrument as _, debug, info_span, warn};

use super::paging::{Bringer, NotBrought};
use super::spec::Keeping;
use super::waits::NotNow;
use crate::base::chain::chain;
use crate::store::fetch::{BringError, FetchError, Incoming};
use crate::store::{Carried, ChunkId, Kept, Pin, SnapshotDigest};

/// Pause before the rest is asked for again, after it could not be had: a holder may be back by then.
const AGAIN: Duration = Duration::from_secs(10);
/// Longest that nothing of the rest may come before a pause gives up waiting for it.
const STALLED: Duration = Duration::from_secs(60);
/// Longest that a pause may wait in all, like any copy: 100 GiB on a network of 1 Gbit/s.
const WHOLE_TIMEOUT: Duration = Duration::from_secs(20 * 60);

/// Why a snapshot is not whole.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub(super) enum NotWholeError {
    /// It cannot be had, or not be stored.
    #[error("fetch it")]
    Fetch(#[from] FetchError),
    /// Nobody gives anything.
    #[error("nothing of it has come for {STALLED:?}")]
    Stalled,
    /// There is too much of it.
    #[error("it has not all come within {WHOLE_TIMEOUT:?}")]
    TimedOut,
}

/// A snapshot of which some may still be elsewhere. Clones are the same.
#[derive(Clone)]
pub(super) struct Coming(Arc<Inner>);

struct Inner {
    snapshot: SnapshotDigest,
    keeping: Keeping,
    incoming: OnceCell<Incoming>,
    /// What is here of it stays.
    _kept: Kept,
}

impl fmt::Debug for Coming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Coming")
            .field("snapshot", &self.0.snapshot)
            .finish_non_exhaustive()
    }
}

impl Coming {
    /// The snapshot, of which nothing has been looked at.
    pub(super) fn new(keeping: &Keeping, snapshot: SnapshotDigest) -> Self {
        let kept = keeping.store.keep([Pin::Snapshot(snapshot)]);
        Self(Arc::new(Inner {
            snapshot,
            keeping: keeping.clone(),
            incoming: OnceCell::new(),
            _kept: kept,
        }))
    }

    /// Sees to it that all but its memory is here.
    pub(super) async fn open(&self) -> Result<(), FetchError> {
        self.incoming().await.map(drop)
    }

    async fn incoming(&self) -> Result<&Incoming, FetchError> {
        let Keeping { store, holders, .. } = &self.0.keeping;
        let open = || store.fetch_lazily(self.0.snapshot, Arc::clone(holders));
        self.0.incoming.get_or_try_init(open).await
    }

    /// Brings all of it here, however long that takes.
    async fn complete(&self) -> Result<(), FetchError> {
        self.incoming().await?.complete().await.map(drop)
    }

    /// Waits until all of it is here, as long as some of it comes.
    pub(super) async fn whole(&self) -> Result<(), NotWholeError> {
        let deadline = Instant::now() + WHOLE_TIMEOUT;
        let opened = time::timeout(STALLED, self.incoming()).await;
        let incoming = opened.map_err(|_| NotWholeError::Stalled)??;
        let mut progress = incoming.progress();
        let complete = incoming.complete();
        tokio::pin!(complete);
        loop {
            let had = progress.borrow_and_update().bytes_done;
            let more = progress.wait_for(|it| it.bytes_done != had);
            tokio::select! {
                whole = &mut complete => return Ok(whole.map(drop)?),
                more = time::timeout(STALLED, more) => {
                    if more.is_err() {
                        return Err(NotWholeError::Stalled);
                    }
                }
                () = time::sleep_until(deadline) => return Err(NotWholeError::TimedOut),
            }
        }
    }

    async fn to_bring(&self) -> Result<&Incoming, NotBrought> {
        let incoming = self.incoming().await;
        incoming.map_err(|err| not_now(&err))
    }

    fn not_brought(&self, err: BringError) -> NotBrought {
        match err {
            // Whoever asks names the chunk.
            BringError::Gone { tried, .. } => {
                NotBrought::Gone(format!("no host has a sound copy: {tried}"))
            }
            BringError::NotNow { tried, away, .. } => {
                let holders = &self.0.keeping.holders;
                let away = away.iter().map(|node| holders.name(*node)).collect();
                NotBrought::NotNow(NotNow { why: tried, away })
            }
            err => not_now(&err),
        }
    }
}

impl Bringer for Coming {
    fn bring(&self, chunk: ChunkId) -> BoxFuture<'_, Result<(), NotBrought>> {
        Box::pin(async move {
            let brought = self.to_bring().await?.bring(chunk).await;
            brought.map(drop).map_err(|err| self.not_brought(err))
        })
    }

    fn rush(&self, chunk: ChunkId) -> BoxFuture<'_, Result<Option<Carried>, NotBrought>> {
        Box::pin(async move {
            let came = self.to_bring().await?.rush(chunk).await;
            let came = came.map_err(|err| self.not_brought(err))?;
            Ok(Some(came.carried().clone()))
        })
    }
}

fn not_now(why: &dyn std::error::Error) -> NotBrought {
    let (why, away) = (chain(why), Vec::new());
    NotBrought::NotNow(NotNow { why, away })
}

/// What a guest goes on from.
#[derive(Debug)]
pub(super) enum Source {
    /// All of it was here before the guest ran.
    Whole(#[expect(dead_code, reason = "held, never used")] Kept),
    /// It may still be coming.
    Coming {
        /// What.
        coming: Coming,
        /// The rest follows as long as this lives.
        following: JoinSet<()>,
    },
}

impl Source {
    /// One that may still be coming. Nothing follows yet.
    pub(super) fn coming(coming: Coming) -> Self {
        let following = JoinSet::new();
        Self::Coming { coming, following }
    }

    /// Has the rest follow, until the snapshot is whole or the guest is gone.
    pub(super) fn follow(&mut self) {
        if let Self::Coming { coming, following } = self
            && following.is_empty()
        {
            let span = info_span!("follow", snapshot = %coming.0.snapshot);
            following.spawn(follow(coming.clone()).instrument(span));
        }
    }

    /// Waits until all of it is here.
    pub(super) async fn whole(&self) -> Result<(), NotWholeError> {
        match self {
            Self::Whole(_) => Ok(()),
            Self::Coming { coming, .. } => coming.whole().await,
        }
    }
}

async fn follow(coming: Coming) {
    let began = Instant::now();
    while let Err(err) = coming.complete().await {
        warn!(err = chain(&err), "the rest does not come; will try again");
        time::sleep(AGAIN).await;
    }
    debug!(took = ?began.elapsed(), "all of it is here");
}

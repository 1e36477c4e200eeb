//! Who uses a guest, and since when nobody does.
//!
//! ```text
//! used ── nobody for nearly its timeout ──> gives memory back ── all of it ──> withheld ──> paused or stopped
//!   ^─────────────── a use ──────────────────────┘    ^────── the cluster says no ──┘
//! ```

use std::time::Duration;

use proto::ids::SandboxId;
use tokio::time::Instant;
use tracing::debug;

use super::{Registry, Shared, Told};
use crate::guest::Guest;
use crate::sandbox::phase::Phase;

/// Longest a guest may take to write down and drop its page cache: half of what there is until it is
/// paused. It goes on with it if it takes longer.
const RECLAIM_TIMEOUT: Duration = Duration::from_secs(3);

impl Told {
    /// Whether the guest gave memory back, and nobody has used it since.
    pub(super) fn is_reclaimed(&self) -> bool {
        self.reclaimed.is_some_and(|at| at >= self.last_used)
    }
}

impl Shared {
    /// The guest, which counts as used from now on.
    pub(super) fn begin_use(&self) -> Option<Guest> {
        let mut told = self.told();
        let ready = matches!(told.phase, Phase::Ready);
        let may_use = ready && !told.withheld && !told.frozen;
        let guest = told.guest.clone().filter(|_| may_use)?;
        told.last_used = Instant::now();
        Some(guest)
    }

    /// Withholds the guest if nobody has used it for `timeout`.
    pub(super) fn withhold_idle(&self, timeout: Duration) -> bool {
        let mut told = self.told();
        told.withheld |= told.last_used.elapsed() >= timeout;
        told.withheld
    }

    /// The guest, for something that is no use of it and is done once until it is used again.
    fn begin_reclaim(&self) -> Option<Guest> {
        let mut told = self.told();
        told.reclaimed = Some(Instant::now());
        let ready = matches!(told.phase, Phase::Ready) && !told.frozen;
        told.guest.clone().filter(|_| ready)
    }
}

impl Registry {
    /// Before a pause or a stop for idleness: withholds the guest, so that nobody begins to use what
    /// is about to go. `false` where somebody has used it within `timeout`.
    #[must_use]
    pub fn withhold_idle(&self, id: SandboxId, timeout: Duration) -> bool {
        self.shared(id)
            .is_some_and(|shared| shared.withhold_idle(timeout))
    }

    /// Has a guest that will soon be paused give memory back which only caches its disk. Done once
    /// until it is used again, well or not: the snapshot is larger without, and no worse.
    pub async fn reclaim(&self, id: SandboxId) {
        let guest = self.shared(id).and_then(|shared| shared.begin_reclaim());
        let Some(guest) = guest else { return };
        match guest.reclaim(RECLAIM_TIMEOUT).await {
            Ok(reclaimed) => debug!(%id, reclaimed, "asked the guest for memory it can spare"),
            Err(err) => debug!(%id, %err, "could not have the guest give memory back"),
        }
    }

    /// After a pause or a stop for idleness that did not come about.
    pub fn give_out_again(&self, id: SandboxId) {
        if let Some(shared) = self.shared(id) {
            shared.told().withheld = false;
        }
    }

    /// Notes that somebody used a sandbox.
    pub fn touch(&self, id: SandboxId) {
        if let Some(shared) = self.shared(id) {
            shared.told().last_used = Instant::now();
        }
    }

    /// How long nobody has used a sandbox.
    #[must_use]
    pub fn idle_for(&self, id: SandboxId) -> Option<Duration> {
        Some(self.shared(id)?.told().last_used.elapsed())
    }
}

//! Keeping a guest as it is when it has just booted, for others to start from.
//!
//! ```text
//! VMM started > agent answers > quiesce > save > into the store > goes on > set up > ready
//! ```
//!
//! It is sealed before it is told who it is: the snapshot holds no token and no id, and the guest gets
//! its random numbers afterwards, so that it shares none with those that start from it. It is made
//! once for each kind of guest. Whatever fails costs the guest nothing but time, unless it does not go
//! on again.
//!
//! A start from one that fails by the snapshot is told to the cluster, which gives it up; meanwhile this
//! node leaves it alone ([`super::spoilt`]).

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use raft::state::{Sealed, Snapshot, SnapshotKind, Warm};
use tokio::time::Instant;
use tracing::{info, warn};

use super::driver::{Driver, start_failed};
use super::error::AcquireError;
use super::phase::{Event, SealFor};
use super::resources::Held;
use super::sealing::{Done, SealGuestError};
use super::spec::{StartSpec, StartTimings};
use super::spoilt::Spoilt;
use crate::base::chain::chain;
use crate::base::fault;
use crate::store::{ImageDigest, Kept, SnapshotDigest};

/// What an agent that was told nothing demands of callers: nothing.
const NO_TOKEN: &str = "";
/// A seal that no pause asked for: entries of the log begin at 1.
const FOR_OTHERS: SealFor = SealFor {
    pause: 0,
    kind: SnapshotKind::Snapshot,
};

/// Which guests start from one that had just booted.
#[derive(Clone, Debug, Default)]
pub struct WarmStarts {
    /// Kernel and agent of this node's guests; `None` where every guest here shall boot.
    pub guest: Option<String>,
    /// Kinds that are being made here.
    making: Arc<Mutex<BTreeSet<Kind>>>,
    /// What could not be started from.
    spoilt: Arc<Mutex<Spoilt>>,
}

/// What guests must have in common: image, processors, memory and disk.
pub(super) type Kind = (ImageDigest, u8, u32, u32);

/// The kind of guest that `spec` asks for on `base`.
const fn kind(base: ImageDigest, spec: &StartSpec) -> Kind {
    (base, spec.vcpus, spec.memory.0, spec.disk.0)
}

impl WarmStarts {
    /// New capsules start warm where `guest` names this node's kernel and agent.
    #[must_use]
    pub fn new(guest: Option<String>) -> Self {
        Self {
            guest,
            ..Self::default()
        }
    }

    /// Whether a guest here would have become just that if it had booted.
    pub(super) fn takes(&self, warm: &Warm) -> bool {
        self.guest.as_ref() == Some(&warm.guest)
    }

    /// Whether nothing is started from it here for a while: it, or too many of its kind, failed.
    pub(super) fn is_left_alone(&self, snapshot: &Snapshot) -> bool {
        let digest = SnapshotDigest(snapshot.sealed.digest);
        let base = ImageDigest(snapshot.sealed.needs.base);
        snapshot.warm.as_ref().is_some_and(|warm| {
            // As many as a guest can have.
            let vcpus = u8::try_from(warm.vcpus).unwrap_or(u8::MAX);
            let kind = (base, vcpus, warm.memory.0, warm.disk.0);
            self.spoilt().is_left_alone(&digest, &kind, Instant::now())
        })
    }

    fn spoilt(&self) -> MutexGuard<'_, Spoilt> {
        // Inserts and removals are single calls: a panic leaves the tables whole.
        self.spoilt.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn making(&self) -> MutexGuard<'_, BTreeSet<Kind>> {
        // Inserts and removals are single calls: a panic leaves the set whole.
        self.making.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The right to make one of this kind; `None` where somebody here does, or too many were in vain.
    fn claim(&self, kind: Kind) -> Option<Claim<'_>> {
        if !self.spoilt().may_be_made(&kind, Instant::now()) {
            return None;
        }
        let is_first = self.making().insert(kind);
        is_first.then_some(Claim { of: self, kind })
    }
}

/// The right to make a warm snapshot of one kind.
struct Claim<'a> {
    of: &'a WarmStarts,
    kind: Kind,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.of.making().remove(&self.kind);
    }
}

/// What a guest was sealed as when it had just booted.
#[derive(Clone, Debug)]
pub struct KeptWarm {
    /// As for a pause.
    pub sealed: Sealed,
    /// Its kernel and agent.
    pub guest: String,
    /// Keeps it in the store until the cluster knows of it.
    _kept: Arc<Kept>,
}

/// What the cluster is to be told about a warm snapshot.
#[derive(Clone, Debug)]
pub enum WarmNews {
    /// There is one.
    Made(KeptWarm),
    /// Nothing could be started from this one.
    Spoilt(SnapshotDigest),
}

impl Driver {
    /// Notes that a start from `from` was not to be. `by_snapshot` says that everything else it takes was
    /// there.
    pub(super) fn not_warm(
        &self,
        spec: &StartSpec,
        (base, from): (ImageDigest, SnapshotDigest),
        by_snapshot: bool,
    ) {
        let mut spoilt = self.host.warm.spoilt();
        spoilt.leave_alone(from, Instant::now());
        if by_snapshot {
            spoilt.failed(kind(base, spec), Instant::now());
            self.shared.set_warm(WarmNews::Spoilt(from));
        }
    }

    /// Notes that a start of this kind went well.
    pub(super) fn was_warm(&self, spec: &StartSpec, base: ImageDigest) {
        self.host.warm.spoilt().went_well(&kind(base, spec));
    }

    /// Seals a guest that has just booted, where nobody here does so already, and lets it go on. Some
    /// event only where the start is over.
    pub(super) async fn keep_warm(
        &self,
        spec: &StartSpec,
        base: ImageDigest,
        held: &mut Held,
        timings: &mut StartTimings,
    ) -> Option<Option<Event>> {
        let guest = self.host.warm.guest.clone()?;
        let _claim = self.host.warm.claim(kind(base, spec))?;
        let shim = held.shim.clone();
        let began = Instant::now();
        let sealed = self.seal_booted(held, timings);
        match self.unless_over(shim.as_ref(), sealed).await {
            Ok(Ok(Done { sealed, kept, .. })) => {
                info!(bytes = sealed.new_bytes, "kept as it has booted");
                let _kept = Arc::new(kept);
                self.shared.set_warm(WarmNews::Made(KeptWarm {
                    sealed,
                    guest,
                    _kept,
                }));
            }
            Ok(Err(err)) => warn!(err = chain(&err), "could not be kept as it has booted"),
            Err(over) => return Some(over),
        }
        let gone_on = self.go_on(held).await;
        timings.kept = began.elapsed().saturating_sub(timings.guest);
        gone_on.err().map(|err| Some(start_failed(&err)))
    }

    async fn seal_booted(
        &self,
        held: &Held,
        timings: &mut StartTimings,
    ) -> Result<Done, SealGuestError> {
        let began = Instant::now();
        let guest = held.guest_by(NO_TOKEN).ok().flatten();
        let guest = guest.ok_or(SealGuestError::Unfit("it has no network"))?;
        let health = guest.wait_ready(began + self.host.boot_timeout).await?;
        timings.guest = began.elapsed();
        let facts = held.facts(&self.host, &health.version, NO_TOKEN)?;
        self.seal_as(held, &guest, facts, FOR_OTHERS).await
    }

    /// Lets a guest go on that may stand still.
    async fn go_on(&self, held: &Held) -> Result<(), AcquireError> {
        let Some(shim) = &held.shim else {
            return Ok(());
        };
        shim.thaw(false).await?;
        fault::point("warm.thawed");
        let guest = held.guest_by(NO_TOKEN)?.ok_or(AcquireError::NoNetwork)?;
        self.undo_quiesce(held, &guest).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_each_kind_one_is_made_at_a_time() {
        let starts = WarmStarts::new(Some("6.1 0.6.7".into()));
        let kind = |vcpus| (ImageDigest([1; 32]), vcpus, 512, 5120);
        let first = starts.claim(kind(1));
        assert!(first.is_some() && starts.clone().claim(kind(1)).is_none());
        assert!(starts.claim(kind(2)).is_some());
        drop(first);
        assert!(starts.claim(kind(1)).is_some());
    }

    #[test]
    fn a_node_whose_guests_boot_takes_nothing() {
        assert!(!WarmStarts::default().takes(&Warm::default()));
        let named = |guest: &str| Warm {
            guest: guest.into(),
            ..Warm::default()
        };
        let starts = WarmStarts::new(Some("6.1 0.6.7".into()));
        assert!(starts.takes(&named("6.1 0.6.7")) && !starts.takes(&named("6.2 0.6.7")));
    }
}

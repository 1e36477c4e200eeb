//! Starting a sandbox as another one of what was sealed.
//!
//! It is brought back as a guest of its own would be, but as somebody else: before its workload runs
//! it has another token, host name, machine id and ssh host keys, and its kernel other random numbers.
//! A guest that does not confirm that is ended. Where the fork is only the quicker start, whatever
//! fails before it runs is undone, and the guest boots instead.

use tokio::time::Instant;
use tracing::warn;

use super::driver::{Driver, start_failed};
use super::phase::Event;
use super::resources::Held;
use super::sealed_disk::RootDisk;
use super::spec::{Origin, StartSpec};
use crate::base::chain::chain;
use crate::base::fault;
use crate::guest::Fork;
use crate::store::{ImageDigest, SnapshotDigest};

/// Who a guest is to be from now on, if it is not who it was.
pub(super) fn identity(spec: &StartSpec) -> Option<Fork> {
    match spec.origin {
        // Ids are lower-case letters, digits and a dash, and shorter than a host name may be.
        Origin::Fork { .. } => Some(Fork::named(spec.id.to_string())),
        Origin::Image(_) | Origin::Snapshot(_) | Origin::Disk { .. } => None,
    }
}

impl Driver {
    /// Every step of a start as another one. `None` when the daemon is stopping.
    pub(super) async fn start_fork(
        &self,
        spec: &StartSpec,
        from: SnapshotDigest,
        or_boots: Option<ImageDigest>,
        held: &mut Held,
        asked: Instant,
    ) -> Option<Event> {
        let event = self.bring_back(spec, from, held, asked).await?;
        let Some(base) = or_boots else {
            return Some(event);
        };
        let Event::StartFailed { reason } = &event else {
            if matches!(event, Event::GuestReady) {
                self.was_warm(spec, base);
            }
            return Some(event);
        };
        // Its bytes were to be had, and so was all that has nothing to do with them.
        let by_snapshot = held.source.is_some() && held.record.slot.is_some();
        // First of all, so that those who start now do not try it as well.
        self.not_warm(spec, (base, from), by_snapshot);
        warn!(reason, by_snapshot, "could not start warm; boots instead");
        if by_snapshot {
            self.look_for_damage(from).await;
        }
        match held.begin_again(&self.host, spec).await {
            Ok(()) => {
                let disk = RootDisk::New(base);
                self.bring_up(spec, disk, held, Instant::now()).await
            }
            Err(err) => {
                warn!(err = chain(&err), "could not undo the warm start");
                Some(start_failed(&err))
            }
        }
    }
}

impl Held {
    /// Gives everything back and holds what a new sandbox holds.
    async fn begin_again(
        &mut self,
        host: &super::spec::Host,
        spec: &StartSpec,
    ) -> Result<(), super::error::AcquireError> {
        self.release(host).await?;
        fault::point("warm.undone");
        *self = Self::create(host, spec).await?;
        Ok(())
    }
}

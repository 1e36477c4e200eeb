//! Joins the relay to the sandboxes of this node, and to what is measured of them; none knows the
//! others.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use proto::epoch::Epoch;
use proto::ids::SandboxId;
use proto::units::Stamp;
use tracing::info_span;

use super::Running;
use crate::base::clock::{Clock, SystemClock};
use crate::base::sample::Sample;
use crate::cluster::View;
use crate::guest::Guest;
use crate::metering::{Metering, SAMPLES};
use crate::relay::{LocalFacts, LocalGuests, MemoryFacts, Transfer, Waiting};
use crate::sandbox::{Registry, StartTimings};
use crate::store::{SnapshotDigest, Store};

impl Running {
    /// Has the guests here measured from now on.
    pub(super) fn meter(&self, registry: &Arc<Registry>, clock: &Arc<dyn Clock>) -> Arc<Metering> {
        let (here, view) = (self.cluster.mesh().here(), self.cluster.proposer().view());
        let dir = self.data.paths().cache().join(SAMPLES);
        let metering = Metering::new(here, Arc::clone(registry), view, Arc::clone(clock), dir);
        let metering = Arc::new(metering);
        let stop = self.tasks.token();
        let host = Arc::clone(&metering).watch_host(stop.clone());
        self.tasks.spawn(info_span!("metering"), host);
        let inside = Arc::clone(&metering).watch_inside(stop.clone());
        self.tasks.spawn(info_span!("metering inside"), inside);
        metering
    }
}

/// The registry as the relay sees it, and what is on its way to it.
#[derive(Debug)]
pub(super) struct RegistryGuests {
    pub(super) registry: Arc<Registry>,
    pub(super) store: Store,
    pub(super) view: View,
    pub(super) metering: Arc<Metering>,
}

impl RegistryGuests {
    /// How far what the sandbox rests on has come here.
    fn transfer(&self, id: SandboxId) -> Option<Transfer> {
        let state = self.view.state();
        let rests_on = state.snapshot(state.sandbox(id)?.snapshot?)?;
        let progress = self
            .store
            .transfer(SnapshotDigest(rests_on.sealed.digest))?;
        Some(Transfer {
            bytes_done: progress.bytes_done,
            bytes_total: progress.bytes_total,
            sources: progress.sources,
        })
    }

    /// What the sandbox's guest stands still for, by the wall clock.
    fn waiting(&self, id: SandboxId) -> Option<Waiting> {
        let waiting = self.registry.waiting(id)?;
        let now = SystemClock.now().0;
        let millis = |it: Duration| u64::try_from(it.as_millis()).unwrap_or(u64::MAX);
        Some(Waiting {
            nodes: waiting.reason.away,
            why: waiting.reason.why,
            since: Stamp(now.saturating_sub(millis(waiting.waited))),
            until: Stamp(now.saturating_add(millis(waiting.left))),
        })
    }
}

impl LocalGuests for RegistryGuests {
    fn guest(&self, id: SandboxId, epoch: Epoch) -> Option<Guest> {
        self.registry.guest(id, epoch)
    }

    fn is_frozen(&self, id: SandboxId) -> bool {
        self.registry.frozen(id)
    }

    fn touch(&self, id: SandboxId) {
        self.registry.touch(id);
    }

    fn last_active(&self, id: SandboxId) -> Option<Stamp> {
        let idle = self.registry.idle_for(id)?;
        let idle_ms = u64::try_from(idle.as_millis()).unwrap_or(u64::MAX);
        Some(Stamp(SystemClock.now().0.saturating_sub(idle_ms)))
    }

    fn facts(&self, id: SandboxId) -> Option<LocalFacts> {
        let timings = self.registry.timings(id);
        let (last_active, transfer) = (self.last_active(id), self.transfer(id));
        (last_active.is_some() || transfer.is_some()).then(|| LocalFacts {
            last_active,
            disk_used_bytes: self.registry.disk_used_bytes(id),
            start: timings.map(|it| it.way.word().to_owned()),
            start_stages: timings.map(stages).unwrap_or_default(),
            memory: None,
            transfer,
            waiting: self.waiting(id),
        })
    }

    fn memory(&self, id: SandboxId) -> BoxFuture<'_, Option<MemoryFacts>> {
        Box::pin(async move {
            let paging = self.registry.paging(id).await?;
            let told = paging.counters.unwrap_or_default();
            Some(MemoryFacts {
                resident_bytes: paging.resident_bytes,
                local_bytes: told.local_bytes,
                peer_bytes: told.peer_bytes,
                faults: told.faults,
                peer_faults: told.peer_faults,
                fault_p50: Duration::from_nanos(told.p50_ns),
                fault_p99: Duration::from_nanos(told.p99_ns),
                takeovers: told.takeovers,
            })
        })
    }

    fn samples(&self, id: SandboxId, range: Duration) -> Vec<Sample> {
        self.metering.samples(id, range)
    }

    fn console_tail(&self, id: SandboxId, bytes: usize) -> Option<Vec<u8>> {
        self.registry.console_tail(id, bytes)
    }
}

fn stages(timings: StartTimings) -> Vec<(String, Duration)> {
    let StartTimings {
        record,
        slot,
        disk,
        word,
        shim,
        vmm,
        guest,
        setup,
        kept,
        way: _,
    } = timings;
    let named = [
        ("record", record),
        ("slot", slot),
        ("disk", disk),
        ("word", word),
        ("shim", shim),
        ("vmm", vmm),
        ("guest", guest),
        ("setup", setup),
        ("kept", kept),
    ];
    named.map(|(name, took)| (name.to_owned(), took)).into()
}

//! Joins the relay to the sandboxes of this node; neither knows the other.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use proto::epoch::Epoch;
use proto::ids::SandboxId;
use proto::units::Stamp;

use crate::base::clock::{Clock as _, SystemClock};
use crate::guest::Guest;
use crate::relay::{LocalFacts, LocalGuests, MemoryFacts};
use crate::sandbox::{Registry, StartTimings};

/// The registry as the relay sees it.
#[derive(Debug)]
pub(super) struct RegistryGuests(pub(super) Arc<Registry>);

impl LocalGuests for RegistryGuests {
    fn guest(&self, id: SandboxId, epoch: Epoch) -> Option<Guest> {
        self.0.guest(id, epoch)
    }

    fn is_frozen(&self, id: SandboxId) -> bool {
        self.0.frozen(id)
    }

    fn touch(&self, id: SandboxId) {
        self.0.touch(id);
    }

    fn last_active(&self, id: SandboxId) -> Option<Stamp> {
        let idle = self.0.idle_for(id)?;
        let idle_ms = u64::try_from(idle.as_millis()).unwrap_or(u64::MAX);
        Some(Stamp(SystemClock.now().0.saturating_sub(idle_ms)))
    }

    fn facts(&self, id: SandboxId) -> Option<LocalFacts> {
        let timings = self.0.timings(id);
        Some(LocalFacts {
            last_active: Some(self.last_active(id)?),
            disk_used_bytes: self.0.disk_used_bytes(id),
            start: timings.map(|it| it.way.word().to_owned()),
            start_stages: timings.map(stages).unwrap_or_default(),
            memory: None,
        })
    }

    fn memory(&self, id: SandboxId) -> BoxFuture<'_, Option<MemoryFacts>> {
        Box::pin(async move {
            let paging = self.0.paging(id).await?;
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

    fn console_tail(&self, id: SandboxId, bytes: usize) -> Option<Vec<u8>> {
        self.0.console_tail(id, bytes)
    }
}

fn stages(timings: StartTimings) -> Vec<(String, Duration)> {
    let StartTimings {
        record,
        slot,
        disk,
        shim,
        vmm,
        guest,
        setup,
        way: _,
    } = timings;
    let named = [
        ("record", record),
        ("slot", slot),
        ("disk", disk),
        ("shim", shim),
        ("vmm", vmm),
        ("guest", guest),
        ("setup", setup),
    ];
    named.map(|(name, took)| (name.to_owned(), took)).into()
}

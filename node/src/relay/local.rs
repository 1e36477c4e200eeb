//! Guests on this node.

use std::fmt;
use std::future::ready;
use std::time::Duration;

use futures::future::BoxFuture;
use proto::epoch::Epoch;
use proto::ids::SandboxId;
use proto::units::Stamp;
use tokio::time;

use crate::base::sample::Sample;
use crate::guest::Guest;

/// The sandboxes that run here, as far as a relay needs to know them. Joined in wiring.
pub trait LocalGuests: fmt::Debug + Send + Sync + 'static {
    /// The guest of a sandbox that is ready here under `epoch`. Counts as use.
    fn guest(&self, id: SandboxId, epoch: Epoch) -> Option<Guest>;

    /// Whether the guest stands still because this node's lease ran out.
    fn is_frozen(&self, _id: SandboxId) -> bool {
        false
    }

    /// Notes that somebody used the sandbox.
    fn touch(&self, id: SandboxId);

    /// When somebody last used it.
    fn last_active(&self, id: SandboxId) -> Option<Stamp> {
        self.facts(id)?.last_active
    }

    /// What only the node that runs the sandbox knows of it.
    fn facts(&self, id: SandboxId) -> Option<LocalFacts>;

    /// How its memory has come so far, of one whose memory comes as it touches it.
    fn memory(&self, _: SandboxId) -> BoxFuture<'_, Option<MemoryFacts>> {
        Box::pin(ready(None))
    }

    /// How busy its guest was in the last `range`, the earliest sample first.
    fn samples(&self, _id: SandboxId, _range: Duration) -> Vec<Sample> {
        Vec::new()
    }

    /// The last `bytes` of what the guest's console showed; `None` where no log is kept. Reads a
    /// file, so call it where blocking is allowed.
    fn console_tail(&self, id: SandboxId, bytes: usize) -> Option<Vec<u8>>;
}

/// What only the node that runs a sandbox knows of it; none of it is replicated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalFacts {
    /// When somebody last used it; `None` where nobody has yet.
    pub last_active: Option<Stamp>,
    /// Bytes that its disk occupies.
    pub disk_used_bytes: Option<u64>,
    /// How long each stage of its start took, where this daemon started it.
    pub start_stages: Vec<(String, Duration)>,
    /// What its guest came from, in the word that clients know, where this daemon started it.
    pub start: Option<String>,
    /// Of a guest whose memory comes as it touches it: how it has come so far.
    pub memory: Option<MemoryFacts>,
    /// How far what it rests on has come here, while it does.
    pub transfer: Option<Transfer>,
    /// What its guest stands still for, where it does.
    pub waiting: Option<Waiting>,
}

/// What a guest stands still for: memory that cannot be had now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// What people call the nodes that would have it and cannot be reached.
    pub nodes: Vec<String>,
    /// Why it cannot be had.
    pub why: String,
    /// Since when.
    pub since: Stamp,
    /// When it is given up.
    pub until: Stamp,
}

/// How far a snapshot has come to the node that resumes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transfer {
    /// Bytes that are there.
    pub bytes_done: u64,
    /// Bytes in all.
    pub bytes_total: u64,
    /// Nodes that give some at the moment.
    pub sources: u32,
}

/// How the memory of a resumed guest has come so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryFacts {
    /// Bytes of it that the host holds.
    pub resident_bytes: u64,
    /// Bytes that came from the host's own store.
    pub local_bytes: u64,
    /// Bytes that came from other nodes.
    pub peer_bytes: u64,
    /// Page faults that were served.
    pub faults: u64,
    /// Of them, for what was not on the host.
    pub peer_faults: u64,
    /// Half of the faults took this long at most.
    pub fault_p50: Duration,
    /// 99 of 100 took this long at most.
    pub fault_p99: Duration,
    /// How often its pager was replaced.
    pub takeovers: u64,
}

/// Longest a shim may take to say how its guest's memory comes: it is less than anybody waits who
/// wants to see a capsule.
const MEMORY_TIMEOUT: Duration = Duration::from_millis(250);

/// All that this node knows of a sandbox of its own.
pub(super) async fn facts_of(local: &dyn LocalGuests, id: SandboxId) -> Option<LocalFacts> {
    let facts = local.facts(id)?;
    // A shim that does not answer in time has nothing to tell.
    let memory = time::timeout(MEMORY_TIMEOUT, local.memory(id)).await;
    Some(LocalFacts {
        memory: memory.ok().flatten(),
        ..facts
    })
}

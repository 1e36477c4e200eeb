//! Guests on this node.

use std::fmt;
use std::time::Duration;

use proto::epoch::Epoch;
use proto::ids::SandboxId;
use proto::units::Stamp;

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
}

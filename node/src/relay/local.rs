//! Guests on this node.

use std::fmt;

use proto::epoch::Epoch;
use proto::ids::SandboxId;
use proto::units::Stamp;

use crate::guest::Guest;

/// The sandboxes that run here, as far as a relay needs to know them. Joined in wiring.
pub trait LocalGuests: fmt::Debug + Send + Sync + 'static {
    /// The guest of a sandbox that is ready here under `epoch`.
    fn guest(&self, id: SandboxId, epoch: Epoch) -> Option<Guest>;

    /// Notes that somebody used the sandbox.
    fn touch(&self, id: SandboxId);

    /// When somebody last used the sandbox, as far as this node remembers.
    fn last_active(&self, id: SandboxId) -> Option<Stamp>;

    /// Bytes that the sandbox's disk occupies on this node.
    fn disk_used_bytes(&self, id: SandboxId) -> Option<u64>;

    /// The last `bytes` of what the guest's console showed; `None` where no log is kept. Reads a
    /// file, so call it where blocking is allowed.
    fn console_tail(&self, id: SandboxId, bytes: usize) -> Option<Vec<u8>>;
}

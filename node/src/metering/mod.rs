//! How busy the guests of this node are: measured twice a second, kept for a day, in bounded memory.
//!
//! ```text
//! host     /proc of the VMM           0.5 s --.
//!          its traffic, its disk        1 s --+--> rings: 10 min by 0.5 s, 2 h by 30 s, 24 h by 5 min
//! inside   GET /metrics of the agent    5 s --'       '--> shelf: the same, in a file a guest
//! ```
//!
//! Nothing here is replicated, and nothing is counted from it: what guests *took* is counted in the
//! log, where it outlives this node. The shelf is there for a daemon that comes back; it is not
//! flushed. Samples of a guest that was paused here stay until they are a day old; those of one
//! that has gone elsewhere or ended are dropped within a minute or so.

mod book;
mod host;
mod ring;
mod sampler;
mod shelf;

pub use sampler::Metering;

/// The directory of the shelf, in the one of what can be done without.
pub const SAMPLES: &str = "samples";

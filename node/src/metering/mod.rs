//! How busy the guests of this node are: measured each second, kept for a day, in bounded memory.
//!
//! ```text
//! host     /proc of the VMM, its disk    1 s --.
//! inside   GET /metrics of the agent     5 s --+--> rings: 10 min by 1 s, 2 h by 30 s, 24 h by 5 min
//! ```
//!
//! Nothing here is replicated, and nothing is counted from it: what guests *took* is counted in the
//! log, where it outlives this node. Samples of a capsule that was paused here stay as long as this
//! daemon runs; those of one that has gone elsewhere or ended are dropped.

mod host;
mod ring;
mod sampler;

pub use sampler::Metering;

//! Tests of what commands do to the replicated state, without a log. One program, since each would
//! build the same state again.

#[path = "../world/mod.rs"]
mod world;

mod audit;
mod begins;
mod channels;
mod first_version;
mod histories;
mod named;
mod nodes;
mod placement;
mod sandboxes;
mod slices;
mod snapshots;
mod usage;

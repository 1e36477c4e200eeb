//! The replicated state as this node sees it, and the way to change it.
//!
//! [`View`] reads, [`Proposer`] writes; both stand on a [`Log`], which is the raft group in a
//! running node and an in-memory log in tests of logic. Above this room nobody knows raft.

pub mod autopilot;
mod fake;
mod group;
pub mod lease;
pub mod liveness;
mod propose;
mod view;

pub use fake::MemoryLog;
pub use group::GroupLog;
pub use propose::{Log, LogError, LogFuture, ProposeError, Proposer};
pub use view::{Seen, View};

//! The replicated state as this node sees it, the way to change it, and this node's part in it.
//!
//! [`View`] reads, [`Proposer`] writes; both stand on a [`Log`], which is the cluster's in a running
//! node and an in-memory one in tests of logic. Above this room nobody knows raft.
//!
//! ```text
//! Proposer > log (here or at the leader) > raft > link > mesh (members by id) > transport
//! View < replica < raft, or < mirror < a member
//! leader: desk (renewals > verdicts), autopilot (who votes)     every node: keeper (its lease), load
//! ```
//!
//! Pure, and tested as such: `autopilot`, `lease`, `lineage`, `liveness`, `recovery`, `roster`,
//! `speaker`, `token`. The others carry
//! out what those decide. [`Cluster`] is the whole, as wiring builds it; [`join`] is how a node
//! gets in.

pub mod autopilot;
mod calls;
mod desk;
mod fake;
mod feed;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod hearsay;
pub mod join;
mod keeper;
mod leader;
pub mod lease;
mod lineage;
mod link;
pub mod liveness;
mod load;
mod log;
mod mesh;
mod mirror;
mod propose;
pub mod recovery;
mod replica;
mod roster;
mod running;
mod seldom;
mod serve;
mod slices;
mod speaker;
pub mod token;
mod view;

pub use fake::MemoryLog;
pub use keeper::LeaseSink;
pub use link::MeshLink;
pub use load::{LoadSample, LoadSource};
pub use log::ClusterLog;
pub use mesh::{Mesh, MeshError};
pub use propose::{Log, LogError, LogFuture, ProposeError, Proposer, ReadFuture};
pub use roster::{Contact, Roster};
pub use running::{Cluster, Part, Standing};
pub use view::{Seen, View};

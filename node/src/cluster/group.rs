//! The raft group of this node as a [`Log`](super::Log).

/// The raft group of this node.
#[derive(Debug)]
pub struct GroupLog;

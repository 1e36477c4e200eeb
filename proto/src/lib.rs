//! The words all Wrenn crates share.
//!
//! Ids and their public spelling ([`ids`]), the fencing token ([`epoch`]), sizes and instants
//! with their unit in the type ([`units`]), versions of what is written down or sent
//! ([`version`]), and the wire messages generated from `wire/*.proto` ([`wire`], and [`envd`]
//! with the feature of that name). Nothing here does any I/O.

#![forbid(unsafe_code)]

pub mod epoch;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod ids;
pub mod units;
pub mod version;

/// Messages of our own protocols, generated from `wire/*.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod wire {
    /// What nodes tell each other beside the log.
    pub mod cluster {
        include!(concat!(env!("OUT_DIR"), "/wrenn.cluster.rs"));
    }
    /// Calls between nodes of a cluster, beside raft's own.
    pub mod mesh {
        include!(concat!(env!("OUT_DIR"), "/wrenn.mesh.rs"));
    }
    /// The raft log and snapshots.
    pub mod raft {
        include!(concat!(env!("OUT_DIR"), "/wrenn.raft.rs"));
    }
    /// The frame around the commands: log records, snapshot files, messages between members.
    pub mod raftlog {
        include!(concat!(env!("OUT_DIR"), "/wrenn.raftlog.rs"));
    }
    /// Relaying byte streams to guests of other nodes, and questions to their owners.
    pub mod relay {
        include!(concat!(env!("OUT_DIR"), "/wrenn.relay.rs"));
    }
    /// Daemon and shim.
    pub mod shim {
        include!(concat!(env!("OUT_DIR"), "/wrenn.shim.rs"));
    }
}

/// Connect services of the guest agent, generated from `wire/envd/*.proto`.
#[cfg(feature = "envd")]
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used,
    clippy::use_self,
    clippy::wildcard_imports
)]
pub mod envd {
    include!(concat!(env!("OUT_DIR"), "/envd.rs"));
}

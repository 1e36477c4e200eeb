//! Tests of a group of nodes with real logs on real disks: elections, members, mirrors, and what is
//! left after a crash. One program, since each would build the same group again.

#![allow(missing_docs, clippy::unwrap_used)] // a failed test may panic

#[path = "../common/mod.rs"]
mod common;

mod cluster;
mod disk;
mod leader_dies;
mod lost_disk;
mod membership;
mod mirror;
mod recovery;
mod replicated_state;
mod restart;

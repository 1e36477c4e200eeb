//! The replicated state of a Wrenn cluster.
//!
//! [`command`] lists every change there is, [`state`] what the changes act on, [`apply`] is the
//! pure function between them, and [`placement`] the part of it that chooses a node. None of
//! these reads a clock, a file or a random number: the same log gives the same state on every
//! member.

//!
//! The rest makes that log durable and replicated. [`group`] is the handle others use; below it
//! `adapter` is the only file that implements openraft's traits, over `log` (segment files),
//! `snapshot` (files) and `store` (the state in memory, with a derived copy in sled). [`link`] is
//! what the network has to provide, [`machine`] what the log drives.

#![forbid(unsafe_code)]

#[cfg(test)]
extern crate self as wrenn_raft;

mod adapter;
pub mod apply;
mod codec;
pub mod command;
mod derived;
pub mod disk;
pub mod fault;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod group;
mod identity;
pub mod link;
pub mod log;
pub mod machine;
mod peer;
pub mod placement;
pub mod snapshot;
pub mod state;
pub mod store;
pub mod types;
pub mod wire;

#[cfg(test)]
#[allow(unreachable_pub, reason = "shared with the tests of the group")]
#[path = "../tests/common/toy.rs"]
mod toy;

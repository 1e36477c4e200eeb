//! The replicated state of a Wrenn cluster.
//!
//! [`command`] lists every change there is, [`state`] what the changes act on, [`apply`] is the
//! pure function between them, and [`placement`] the part of it that chooses a node. None of
//! these reads a clock, a file or a random number: the same log gives the same state on every
//! member.

#![forbid(unsafe_code)]

pub mod apply;
pub mod command;
pub mod placement;
pub mod state;
pub mod wire;

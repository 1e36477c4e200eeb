//! A whole cluster's logic in virtual time: one event queue, one seed, no thread and no clock.
//!
//! Every node has the real replicated [`State`](raft::state::State), applied through a small
//! modelled log (`log`), the real autopilot, lease holder, lease book and load table, the real
//! placement (inside apply) and the real reconcile plan, over a fake VMM that records which guest
//! runs where at which instant. Faults fall on it: daemons crash and stall, hosts are lost and come
//! back, links break one way or both, delay, lose; clocks drift apart within what the lease allows.
//! Then the faults stop, and everything has to come to rest.
//!
//! Judged after every event (`oracle` and `world/judge`):
//! - at most one guest of a sandbox runs anywhere (I1), and none whose end was reported;
//! - no two nodes commit different entries, no acknowledged write is lost (I2);
//! - no node is over-committed; epochs only grow; a request makes one sandbox;
//! - after the faults: every node counts as alive, every sandbox is where it is wanted or has ended
//!   with a reason, no guest is left over, the voters are as many as they should be, and the
//!   autopilot has nothing left to do.
//!
//! Each [`Bug`] breaks one rule; the tests show that the judge notices.

mod bugs;
mod daemon;
mod faults;
mod host;
mod lead;
mod log;
mod oracle;
mod rng;
mod world;

pub use bugs::Bug;
pub use world::{Setup, Summary, Violation, run};

/// True time in milliseconds since the simulation began. Nobody inside it knows it.
type Ms = u64;

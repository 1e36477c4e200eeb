//! Network slots with real packets through the real rules of this machine's kernel.
//!
//! Every test gets a host of its own ([`world`]): a network and a mount namespace in which the
//! code under test believes to be on a machine with one uplink. So nothing here touches the
//! real host, tests run side by side, and whatever one forgets goes with its threads. Guests
//! ([`guest`]) are namespaces joined to a slot's tap frame by frame. Needs root.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod crash;
mod egress;
mod figures;
mod guest;
mod ingress;
mod pool;
mod world;

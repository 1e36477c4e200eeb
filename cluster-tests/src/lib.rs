//! What tests of a whole Wrenn share: a world with a real daemon in it, and the check that it
//! leaves nothing behind.
//!
//! The daemon is the real binary in a process of its own, its guests are real, its disk is a
//! directory that goes with the world. A [`World`](world::World) that is dropped, by a failing
//! test too, ends everything it started. [`client`] talks to the daemon, and [`history`] judges
//! what clients were told. A [`ClusterWorld`](cluster::ClusterWorld) is several such worlds that
//! form one cluster, and can lose each other.

pub mod client;
pub mod clients;
pub mod cluster;
pub mod contents;
pub mod history;
pub mod leaks;
pub mod outside;
mod places;
pub mod sim;
pub mod world;

//! The Wrenn node: table of contents.
//!
//! A room may use the rooms its row in `docs/internals/rooms.md` names, and [`base`]; never one
//! above it. Read [`wiring`] first: it builds every room, starts them and stops them in reverse.

pub mod api;
pub mod base;
pub mod build;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod dashboard;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod guest;
pub mod metering;
pub mod net;
pub mod pager;
pub mod reconcile;
pub mod relay;
pub mod sandbox;
pub mod shim;
pub mod store;
pub mod template;
pub mod vmm;
pub mod wiring;

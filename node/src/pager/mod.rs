//! Guest memory: owned here, handed to the VMM, and paged in from a snapshot.
//!
//! The memory of a guest is a memfd ([`memory`]) that its shim makes and the VMM maps; it lives as
//! long as either holds it. A guest that was resumed starts with none of its pages: a process of
//! its own, `wrenn pager` ([`main`]), brings each when it is touched. The shim keeps a [`handle`]
//! on it. Where none may watch over a VMM's page faults ([`probe`]) it answers a VMM that asks by
//! itself ([`post_copy`]); for one that does not, the shim copies the memory whole before the guest
//! runs.
//!
//! ```text
//! shim    handle ──────── control ────────> main           pager process
//!           │                                │
//!           │ dirty (written pages)          │ target, inject, uffd   (the VMM's page faults)
//!           v                                v
//!         states  <── claim, settle ──── serve, prefetch ──> source ──> pack files
//!         (memfd)                            │                 └──ask──> daemon ──> peers
//!                                            └─> working_set, stats
//! ```
//!
//! Pure: [`region`], [`layout`], [`pages`], [`page_map`], [`working_set`], [`stats`].
//! `docs/internals/pager.md` tells the whole story.

pub mod ask;
mod control;
pub mod dirty;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
pub mod handle;
pub mod inject;
pub mod layout;
pub mod main;
pub mod memory;
pub mod page_map;
pub mod pages;
pub mod post_copy;
pub mod prefetch;
pub mod probe;
pub mod region;
pub mod serve;
pub mod source;
pub mod states;
pub mod stats;
pub mod target;
pub mod uffd;
pub mod working_set;

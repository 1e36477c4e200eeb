//! The small process that owns one VMM and outlives the daemon.
//!
//! ```text
//! daemon ── client ──> wrenn shim (starter) ── fork, setsid ──> shim ── jail, exec ──> VMM
//!                       exits when the shim is up                 │  memory (memfd), console, QMP
//!                                                                 └─ shim.sock, exit.json
//! ```
//!
//! Two halves that share only words: the shim itself ([`main`], [`serve`], [`console`]) is
//! synchronous and small, because there is one for every sandbox; the daemon's half ([`client`],
//! [`discover`], [`sweep`]) is asynchronous and keeps no state that a restart would miss. Between
//! them lie the files of a sandbox's directory ([`files`], [`spec`], [`exit`]) and the frames on
//! its socket ([`protocol`]).
//!
//! A guest can be saved ([`save`]) and brought back elsewhere ([`restore`]): its device state is a
//! file ([`state`]), the pages to be read of its memory are listed in another ([`dirty`]), and its
//! memory comes back from a [`source`]: all of it before it runs, or page by page ([`paged`]).
//!
//! What a crash leaves: a killed daemon leaves shims running, to be found again by
//! [`discover`]. A killed shim takes its VMM with it and leaves a directory without `exit.json`.

pub mod client;
pub mod console;
pub mod dirty;
pub mod discover;
pub mod error;
pub mod exit;
pub mod files;
pub mod freeze;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
pub mod lease;
pub mod main;
pub mod paged;
pub mod protocol;
pub mod restore;
pub mod save;
pub mod saved;
pub mod serve;
pub mod source;
pub mod spec;
pub mod state;
pub mod sweep;
pub mod watchdog;

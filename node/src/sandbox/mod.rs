//! The sandboxes this node runs: one driver task each.
//!
//! The [`Registry`] owns the drivers. A driver owns everything its sandbox holds on this host and
//! is the only one to change it; [`phase`] decides, [`resources`] acquires in order and undoes in
//! reverse, [`adopt`] finds after a restart what an earlier daemon left. Nobody here knows the
//! cluster: a sandbox is handed its epoch and never asks for one.

pub mod adopt;
mod coming;
mod damage;
mod driver;
mod error;
mod fork;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
pub mod paging;
mod phase;
mod record;
mod registry;
mod resources;
mod sealed_disk;
mod sealing;
mod seen;
mod snapshot;
mod spec;
mod spoilt;
mod waits;
mod warm;

pub use error::AcquireError;
pub use phase::{End, Phase};
pub use registry::{Metered, Observed, ObservedState, Registry};
pub use spec::{Host, Keeping, Origin, StartSpec, StartTimings, StartWay};
pub use waits::{NotNow, Waiting};
pub use warm::{KeptWarm, WarmNews, WarmStarts};

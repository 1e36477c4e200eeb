//! Building templates: a recipe, carried out in a capsule, which then becomes a template.
//!
//! ```text
//! api      POST /v1/builds > checks, keeps the archive, proposes Start      (any node: it becomes the owner)
//! here     Builder (builder.rs) sees a build that is its to do > Claim      (a new attempt)
//!          Attempt (attempt.rs): capsule > archive > steps > ready? > name  (progress and log by proposals)
//! record   Pending > Running > Success | Failed | Cancelled
//! ```
//!
//! Everything goes through the front door: the capsule is created, sealed and stopped by proposals, and
//! reached through the relay, so it runs wherever placement puts it. This node may die at any moment:
//! another one claims the build once the cluster misses its owner, and begins at the last step whose
//! outcome was kept. Outcomes are kept as snapshots under names that no client can choose, by the key of
//! the step ([`crate::template::plan`]); so a build that does the same to the same finds them too.
//!
//! | file | what it does |
//! |---|---|
//! | `builder` | which builds are this node's to do; claims, ends |
//! | `attempt` | one attempt, from a capsule to a name |
//! | `start` | where an attempt begins (pure) |
//! | `kind` | a running guest or a disk alone, and what that lacks (pure) |
//! | `capsule` | the capsule of an attempt: made, reached, sealed |
//! | `steps` | what a directive does to a guest |
//! | `around` | user, directory and environment between steps |
//! | `journal` | what is told of it |

mod around;
mod attempt;
mod builder;
mod capsule;
mod journal;
mod kind;
mod start;
mod steps;

use std::path::{Path, PathBuf};

use proto::ids::BuildId;

pub use builder::Builder;

/// The directory of archives, below a node's cache.
pub const ARCHIVES: &str = "builds";

/// Where the archive of a build lies in a node's directory of archives.
#[must_use]
pub fn archive_path(dir: &Path, id: BuildId) -> PathBuf {
    dir.join(format!("{id}.tar"))
}

/// Why an attempt is over without a template.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Stop {
    /// The build has failed, and would fail again.
    Failed(String),
    /// Something broke that the recipe cannot help: another attempt may fare better.
    Broke(String),
    /// It is no longer this attempt's to do.
    Deposed,
}

//! Processes of the workload: starting, feeding, watching and ending them.
//!
//! ```text
//! service ── launch ──> reap::Reaper (fork under its lock) ──> live::Process in registry::Registry
//!                                                                 ^ pumps: pipe or terminal -> output
//! reader  <── output::Subscription <── output::Fanout <───────────┘ supervise: exit, deadline, end
//! ```
//!
//! What must hold, and where: a reader is attached before the fork ([`launch`]); a dead process is
//! reaped and out of every list at once ([`reap`], [`registry`]); both pipes are drained before the
//! end event, without waiting for ever on a descendant that kept them ([`pump`]); a closed stream
//! kills nobody, a deadline does ([`live`]), and so does a node whose client has left.

pub mod exit;
pub mod input;
pub mod launch;
pub mod live;
pub mod output;
pub mod pump;
pub mod reap;
pub mod registry;
pub mod service;

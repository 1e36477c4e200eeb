//! From what is desired and observed to steps.
//!
//! [`plan`] compares, purely; [`Reconciler`] carries the steps out, each in a task of its own, at
//! most one per sandbox, and looks again after every change of either side. Nothing here runs on
//! a timer but the wait for the next inactivity timeout.

mod backoff;
pub mod copies;
pub mod plan;
mod run;

pub use run::Reconciler;

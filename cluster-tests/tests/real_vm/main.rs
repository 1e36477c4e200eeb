//! One node, real guests: what a person does with a capsule, and everything that goes wrong.
//!
//! Needs root, QEMU and the guest images; `deploy/test real-vm` sees to all of it. Every world
//! checks at its end that it left nothing on the host.

mod adopt;
mod bad_input;
mod crash;
mod cut_off;
mod death;
mod egress;
mod fork_crash;
mod life;
mod limits;
mod pause_crash;
mod restart;
mod seals;
mod warm_spoilt;

use std::time::Duration;

/// Longest that something soon to come may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

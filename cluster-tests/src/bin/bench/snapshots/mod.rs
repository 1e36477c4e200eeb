//! What pausing, resuming and paging cost.
//!
//! | benchmark | what is beside what, in turns |
//! |---|---|
//! | `pause` | pauses after 1, 5 and 25 % of the memory was written, beside a full pause |
//! | `resume` | memory that comes as it is touched, beside memory copied whole before |
//! | `anywhere` | resumes through three daemons: where it was paused, where a copy is, where nothing is |
//! | `at-once` | many capsules resumed at the same instant |
//! | `dedup` | several capsules of one template in one store |
//! | `qemu` | QEMU's own saving and loading of the same guest, memory included |
//! | `transfer` | a snapshot from one node to another, beside scp and rsync of the same image |
//! | `faults` | a page from this node's packs and from a peer, beside a mapped file |
//!
//! `snapshots` on the command line means all eight. Guests have [`Run::memory_mib`] of memory, of
//! which a file in a tmpfs of the guest fills [`FILLED`]: bytes that no two pages share, so that
//! nothing is won by compressing or by chance.

pub(crate) mod anywhere;
pub(crate) mod at_once;
mod capsule;
pub(crate) mod dedup;
pub(crate) mod faults;
mod floor;
pub(crate) mod pause;
pub(crate) mod peer;
pub(crate) mod qemu;
pub(crate) mod resume;
pub(crate) mod transfer;

use crate::Run;

/// The share of a guest's memory that is filled, as a divisor and a factor.
const FILLED: (u32, u32) = (5, 3);

/// Memory of a guest that is filled, in MiB.
fn filled_mib(run: &Run) -> u32 {
    run.memory_mib / FILLED.0 * FILLED.1
}

/// Rounds of a benchmark whose rounds take half a minute.
pub(crate) fn rounds(run: &Run) -> usize {
    run.runs.div_ceil(2)
}

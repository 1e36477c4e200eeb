//! After a restart: retake what an earlier daemon left running, and release the rest.
//!
//! The data directory is read before any slot is swept, so that the slots of sandboxes that live
//! on are kept. A sandbox lives on when its shim answers and its slot is whole; what any other
//! left is released like that of a sandbox that has just ended, except its slot: nobody keeps it,
//! so the sweep has taken it, however much of it a crash or a reboot left. A directory without a
//! record holds nothing but itself: the record is written before anything is acquired.

use std::collections::BTreeSet;
use std::io;

use tokio::task;
use tracing::{info, warn};

use super::driver::end_of;
use super::error::AcquireError;
use super::phase::End;
use super::record::Record;
use super::registry::Registry;
use super::resources::Held;
use crate::base::chain::chain;
use crate::net::Serial;
use crate::shim::discover::{Found, FoundState, discover};
use crate::shim::sweep::kill_leftovers;
use crate::store::{DataPaths, SandboxPaths};

/// What an earlier daemon left of one sandbox.
#[derive(Debug)]
pub struct Leftover {
    found: Found,
    record: Option<Record>,
}

/// Looks at every sandbox directory.
///
/// # Errors
/// The directory of sandboxes, or a record in it, cannot be read.
pub async fn scan(data: &DataPaths) -> io::Result<Vec<Leftover>> {
    let mut leftovers = Vec::new();
    for found in discover(&data.sandboxes()).await? {
        let record = match Record::load(&found.dir, found.sandbox) {
            Ok(record) => Some(record),
            Err(err) if err.kind() == io::ErrorKind::NotFound => None,
            Err(err) if err.kind() == io::ErrorKind::InvalidData => {
                let id = found.sandbox;
                warn!(%id, %err, "unreadable record; what the directory names is released");
                None
            }
            // The disk, or a lack of descriptors: no reason to end a sandbox.
            Err(err) => return Err(err),
        };
        leftovers.push(Leftover { found, record });
    }
    Ok(leftovers)
}

/// The network slots that must not be swept: those of sandboxes that live on.
#[must_use]
pub fn slots_in_use(leftovers: &[Leftover]) -> BTreeSet<Serial> {
    let living = leftovers
        .iter()
        .filter(|leftover| matches!(leftover.found.state, FoundState::Alive(_)));
    living
        .filter_map(|leftover| leftover.record.as_ref())
        .filter_map(|record| record.slot.as_ref())
        .map(|slot| slot.serial)
        .collect()
}

/// The names of all: their control groups go with their directories.
#[must_use]
pub fn names(leftovers: &[Leftover]) -> BTreeSet<String> {
    let sandboxes = leftovers.iter().map(|leftover| leftover.found.sandbox);
    sandboxes.map(|sandbox| sandbox.to_string()).collect()
}

/// Gives each leftover to a driver of its own: the living to be driven on, the dead to be buried.
/// Call it after every slot but [`slots_in_use`] was swept.
pub async fn take_over(registry: &Registry, leftovers: Vec<Leftover>) {
    for leftover in leftovers {
        let id = leftover.found.sandbox;
        if let Err(err) = take_over_one(registry, leftover).await {
            warn!(%id, err = chain(&err), "could not take over");
        }
    }
}

async fn take_over_one(registry: &Registry, leftover: Leftover) -> Result<(), AcquireError> {
    let Leftover { found, record } = leftover;
    let id = found.sandbox;
    let paths = SandboxPaths::new(found.dir);
    let Some(record) = record else {
        return remove(paths).await;
    };
    let mut held = Held::found(paths, record);
    match found.state {
        FoundState::Alive(shim) => {
            let vmm = shim.known_status().vmm_pid;
            held.shim = Some(shim);
            match held.adopt_slot(registry.host()).await {
                Ok(()) => {
                    info!(%id, vmm, "retaken with its VMM running");
                    registry.adopt(id, held);
                }
                // Without its network nobody reaches it: it ends, and what is left is released.
                Err(err) => {
                    let reason = chain(&err);
                    registry.bury(id, held, End::Failed { reason });
                }
            }
        }
        FoundState::Exited(exit) => registry.bury(id, held.swept(), end_of(&exit)),
        FoundState::Dead { why } => {
            info!(%id, %why, "its VMM is gone");
            let reason = "its VMM ended while the host's daemon was down".into();
            registry.bury(id, held.swept(), End::Failed { reason });
        }
        // Not even begun: as if it had never been here, so that a wanted one is started anew.
        FoundState::NeverStarted => held.swept().release(registry.host()).await?,
    }
    Ok(())
}

/// Removes a directory that nothing but itself belongs to.
async fn remove(paths: SandboxPaths) -> Result<(), AcquireError> {
    let removed = task::spawn_blocking(move || {
        kill_leftovers(paths.dir())?;
        paths
            .remove()
            .map_err(|source| AcquireError::Record { source })
    });
    removed.await.map_err(|err| AcquireError::Record {
        source: io::Error::other(err),
    })?
}

#[cfg(test)]
mod tests {
    use proto::epoch::Epoch;
    use proto::ids::SandboxId;

    use super::*;
    use crate::net::{Slot, SlotIndex};

    const ID: SandboxId = SandboxId([7; 16]);

    fn record_with_slot() -> Record {
        let tag = "t".parse().expect("a tag");
        let mut record = Record::new(ID, Epoch(3), "minimal");
        record.slot = Some(Slot::new(&tag, Serial(5), SlotIndex(1)));
        record
    }

    #[tokio::test]
    async fn the_slot_of_a_sandbox_that_ended_is_swept_and_not_asked_for_again() {
        let root = tempfile::tempdir().expect("a directory");
        let data = DataPaths::new(root.path());
        let dir = data.sandbox(ID).dir().to_owned();
        std::fs::create_dir_all(&dir).expect("made");
        record_with_slot().save(&dir).expect("saved");
        let leftovers = scan(&data).await.expect("scanned");
        assert_eq!(leftovers.len(), 1);
        assert!(leftovers[0].record.is_some());
        assert_eq!(slots_in_use(&leftovers), BTreeSet::new());
        let held = Held::found(data.sandbox(ID), record_with_slot());
        assert_eq!(held.swept().record.slot, None);
    }

    #[tokio::test]
    async fn a_record_that_is_no_record_is_one_less_and_a_broken_disk_is_an_error() {
        let root = tempfile::tempdir().expect("a directory");
        let data = DataPaths::new(root.path());
        let dir = data.sandbox(ID).dir().to_owned();
        std::fs::create_dir_all(&dir).expect("made");
        std::fs::write(dir.join("sandbox.json"), b"{").expect("written");
        let leftovers = scan(&data).await.expect("scanned");
        assert!(leftovers[0].record.is_none());
        std::fs::remove_file(dir.join("sandbox.json")).expect("removed");
        // What cannot be read for a reason of the disk's: here, since it is a directory.
        std::fs::create_dir(dir.join("sandbox.json")).expect("made");
        assert!(scan(&data).await.is_err());
    }
}

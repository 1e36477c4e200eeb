//! After a restart: retake what an earlier daemon left running, and release the rest.
//!
//! The data directory is read before any slot is swept, so that the slots of sandboxes that may
//! live on are kept. A sandbox lives on when its shim answers; of any other, what the record and
//! the directory name is released like that of a sandbox that has just ended. A directory without
//! a readable record holds nothing but itself: the record is written before anything is acquired.

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
use crate::net::{NetError, Serial};
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
/// The directory of sandboxes itself cannot be read.
pub async fn scan(data: &DataPaths) -> io::Result<Vec<Leftover>> {
    let mut leftovers = Vec::new();
    for found in discover(&data.sandboxes()).await? {
        let record = match Record::load(&found.dir, found.sandbox) {
            Ok(record) => Some(record),
            Err(err) if err.kind() == io::ErrorKind::NotFound => None,
            Err(err) => {
                let id = found.sandbox;
                warn!(%id, %err, "unreadable record; what the directory names is released");
                None
            }
        };
        leftovers.push(Leftover { found, record });
    }
    Ok(leftovers)
}

/// The network slots that must not be swept.
#[must_use]
pub fn slots_in_use(leftovers: &[Leftover]) -> BTreeSet<Serial> {
    let records = leftovers
        .iter()
        .filter_map(|leftover| leftover.record.as_ref());
    records
        .filter_map(|record| record.slot.as_ref())
        .map(|slot| slot.serial)
        .collect()
}

/// Gives each leftover to a driver of its own: the living to be driven on, the dead to be buried.
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
    let Some(mut record) = record else {
        return remove(paths).await;
    };
    if let Some(slot) = &record.slot {
        match registry.host().slots.adopt(slot.serial, slot.index).await {
            Ok(_) => {}
            // Given back already, by a release that was cut off or by the host's own restart.
            Err(NetError::Gone { .. }) => record.slot = None,
            Err(err) => return Err(err.into()),
        }
    }
    let mut held = Held {
        paths,
        record,
        shim: None,
    };
    match found.state {
        FoundState::Alive(shim) => {
            info!(%id, vmm = shim.known_status().vmm_pid, "retaken with its VMM running");
            held.shim = Some(shim);
            registry.adopt(id, held);
        }
        FoundState::Exited(exit) => registry.bury(id, held, end_of(&exit)),
        FoundState::Dead { why } => {
            info!(%id, %why, "its VMM is gone");
            let reason = "its VMM ended while the host's daemon was down".into();
            registry.bury(id, held, End::Failed { reason });
        }
        // Not even begun: as if it had never been here, so that a wanted one is started anew.
        FoundState::NeverStarted => held.release(registry.host()).await?,
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

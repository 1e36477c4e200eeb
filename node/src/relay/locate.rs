//! Who runs a sandbox, under which epoch, and how to reach it from here.

use std::sync::Arc;

use proto::ids::{NodeId, SandboxId};
use raft::state::{Phase, Sandbox};

use super::error::RelayError;
use super::local::{LocalFacts, LocalGuests};
use crate::cluster::View;
use crate::guest::Guest;

/// The way to every guest of the cluster. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Relay {
    here: NodeId,
    view: View,
    local: Arc<dyn LocalGuests>,
}

impl Relay {
    /// A relay on node `here`.
    #[must_use]
    pub fn new(here: NodeId, view: View, local: Arc<dyn LocalGuests>) -> Self {
        Self { here, view, local }
    }

    /// The guest of a running sandbox. Counts as activity.
    ///
    /// # Errors
    /// [`RelayError`] names what stands in the way.
    pub fn guest(&self, id: SandboxId) -> Result<Guest, RelayError> {
        let sandbox = self.running(id)?;
        let unreachable = RelayError::OwnerUnreachable {
            id,
            node: sandbox.owner,
        };
        if sandbox.owner != self.here {
            return Err(unreachable);
        }
        let guest = self.local.guest(id, sandbox.epoch).ok_or(unreachable)?;
        self.local.touch(id);
        Ok(guest)
    }

    /// Moves a running sandbox's inactivity timer back to its start.
    ///
    /// # Errors
    /// [`RelayError`] names what stands in the way.
    pub fn touch(&self, id: SandboxId) -> Result<(), RelayError> {
        self.running(id)?;
        self.local.touch(id);
        Ok(())
    }

    /// What is known here of a sandbox beyond its record.
    #[must_use]
    pub fn facts(&self, id: SandboxId) -> Option<LocalFacts> {
        self.local.facts(id)
    }

    /// The last `bytes` of a guest's console, also of one that does not run (any more), as long
    /// as its host keeps the log. Blocks on a file.
    ///
    /// # Errors
    /// [`RelayError`] names what stands in the way.
    pub fn console_tail(&self, id: SandboxId, bytes: usize) -> Result<Option<Vec<u8>>, RelayError> {
        let state = self.view.state();
        let sandbox = state.sandbox(id).ok_or(RelayError::NoSuchSandbox(id))?;
        let node = sandbox.owner;
        if node != self.here {
            return Err(RelayError::OwnerUnreachable { id, node });
        }
        Ok(self.local.console_tail(id, bytes))
    }

    fn running(&self, id: SandboxId) -> Result<Sandbox, RelayError> {
        let state = self.view.state();
        let sandbox = state.sandbox(id).ok_or(RelayError::NoSuchSandbox(id))?;
        match sandbox.phase {
            Phase::Running => Ok(sandbox.clone()),
            phase => Err(RelayError::NotRunning { id, phase }),
        }
    }
}

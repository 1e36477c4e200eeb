//! The guest of one run of a capsule, and what is told of a request that the end of the run cut off.
//!
//! A guest that is paused, moved or ended closes no connection: its host breaks them all. What a
//! client then needs to know is not that a body could not be read, but what became of its capsule. The
//! record says so, here a moment later than on the capsule's host.

use std::ops::Deref;
use std::time::Duration;

use proto::epoch::Epoch;
use proto::ids::{SandboxId, SnapshotId};
use raft::state::{Phase, Sandbox, State};
use tokio::time::Instant;

use super::error::{ApiError, Code};
use crate::cluster::View;
use crate::guest::{Guest, GuestError};
use crate::relay::RelayError;

/// Longest the record may lag behind a connection that broke. A guest that breaks by itself is told of
/// once everything of it is released, which takes this long on a busy host.
const RECORD_LAG: Duration = Duration::from_secs(3);
/// The detail of an answer that came because the capsule was paused.
const PAUSED: &str = "capsule_paused";
/// The detail of an answer that came because the capsule has ended.
const ENDED: &str = "capsule_ended";
/// The detail of an answer that came because the capsule goes on elsewhere, or under another epoch.
const MOVED: &str = "capsule_moved";

/// The guest of a run of a capsule.
pub(super) struct Run {
    guest: Guest,
    began: Began,
    view: View,
}

/// The run, as it was when the request came.
#[derive(Clone, Copy)]
struct Began {
    id: SandboxId,
    epoch: Epoch,
    /// What its guest goes back to if it is lost.
    snapshot: Option<SnapshotId>,
}

impl Deref for Run {
    type Target = Guest;

    fn deref(&self) -> &Guest {
        &self.guest
    }
}

impl Run {
    /// The guest of a sandbox's present run.
    pub(super) const fn new(guest: Guest, of: &Sandbox, view: View) -> Self {
        let began = Began {
            id: of.id,
            epoch: of.epoch,
            snapshot: of.snapshot,
        };
        Self { guest, began, view }
    }

    /// What came of a call to the guest, in words that say what became of the capsule.
    pub(super) async fn told<T>(&self, came: Result<T, GuestError>) -> Result<T, ApiError> {
        match came {
            Ok(came) => Ok(came),
            Err(err) => Err(self.explained(err).await),
        }
    }

    async fn explained(&self, err: GuestError) -> ApiError {
        if !is_cut(&err) {
            return err.into();
        }
        // Where the way is known to have broken, nothing more will be heard of it.
        let patience = match RelayError::among_causes(&err) {
            Some(_) => Duration::ZERO,
            None => RECORD_LAG,
        };
        let seen = self.view.wait_for(Instant::now() + patience, |state| {
            what_became(state, self.began)
        });
        seen.await.unwrap_or_else(|| err.into())
    }
}

/// Whether a call may have failed because the run was over.
const fn is_cut(err: &GuestError) -> bool {
    match err {
        // Some bodies have no end of their own, and seem whole.
        GuestError::Unreachable { .. } | GuestError::Nonsense(_) => true,
        GuestError::Refused { .. } | GuestError::TimedOut { .. } => false,
    }
}

/// What ended a run; `None` while it goes on.
fn what_became(state: &State, began: Began) -> Option<ApiError> {
    let Began { id, epoch, .. } = began;
    let Some(known) = state.sandbox(id) else {
        return Some(ApiError::new(Code::NotFound, format!("no capsule {id}")));
    };
    let goes_on = "a command that it runs goes on";
    let (code, detail, what, then) = match known.phase {
        // Its guest is lost, and it rests as it did before.
        Phase::Paused if known.epoch == epoch && known.snapshot == began.snapshot => {
            (Code::AgentError, ENDED, "broke", because(known))
        }
        Phase::Paused if known.epoch == epoch => {
            let then = format!("; {goes_on} once it is resumed");
            (Code::InvalidState, PAUSED, "was paused", then)
        }
        Phase::Stopping | Phase::Stopped => (Code::InvalidState, ENDED, "ended", because(known)),
        Phase::Error => (Code::AgentError, ENDED, "broke", because(known)),
        _ if known.epoch == epoch => return None,
        _ => {
            let host = state.node(known.owner).map(|host| host.name.clone());
            let host = host.unwrap_or_else(|| known.owner.to_string());
            let then = format!("; {goes_on} on {host}");
            (Code::HostUnavailable, MOVED, "moved", then)
        }
    };
    let message = format!("capsule {id} {what} while the request was under way{then}");
    Some(ApiError {
        detail: Some(detail),
        ..ApiError::new(code, message)
    })
}

/// The reason in the record, if there is one.
fn because(known: &Sandbox) -> String {
    match known.reason.as_str() {
        "" => String::new(),
        reason => format!(": {reason}"),
    }
}

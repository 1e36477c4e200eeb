//! The capsule of one attempt: made, reached and sealed as any client would.

use std::collections::BTreeMap;
use std::time::Duration;

use proto::ids::{BuildId, SandboxId, SnapshotId};
use raft::command::{CheckpointSandbox, Command, Refusal};
use raft::state::{
    Build, Checkpoint, IdleAction, Named, Phase, Purpose, Sandbox, SandboxSpec, SnapshotKind, State,
};
use tokio::time::{self, Instant};

use super::Stop;
use crate::cluster::{ProposeError, Proposer, View};
use crate::guest::Guest;
use crate::relay::Relay;

/// Longest a capsule may take until it runs: an emulated guest on a busy host boots in one minute.
const START_TIMEOUT: Duration = Duration::from_secs(180);
/// Longest a seal may take. Its memory is written, and the disk may be slow.
const SEAL_TIMEOUT: Duration = Duration::from_secs(300);
/// How long room for a capsule is waited for.
const ROOM_TIMEOUT: Duration = Duration::from_secs(120);
/// Pause between two tries to get room, or an answer.
const AGAIN: Duration = Duration::from_secs(2);
/// A capsule that nobody sees to any more ends after this long. Whoever builds in it keeps it up.
const IDLE_TIMEOUT: Duration = Duration::from_secs(3600);
/// The label of a capsule that a template is built in.
const LABEL: &str = "wrenn-build";
/// Keeps these ids apart from all others.
const CONTEXT: &str = "wrenn 2026-11-22 ids of a template build";

/// Why no capsule was made.
pub(super) enum NoCapsule {
    /// Nobody can start from what it was to start from.
    NoRoom(String),
    /// Anything else.
    Stop(Stop),
}

/// The capsule of an attempt.
pub(super) struct Capsule {
    pub(super) id: SandboxId,
    build: BuildId,
    proposer: Proposer,
    view: View,
    relay: Relay,
}

impl Capsule {
    /// The capsule that attempt `attempt` will have.
    pub(super) fn of(build: &Build, proposer: Proposer, relay: Relay) -> Self {
        let attempt = build.attempt.to_string();
        Self {
            id: SandboxId(id(build.id, "capsule", &attempt)),
            build: build.id,
            view: proposer.view(),
            proposer,
            relay,
        }
    }

    /// Has it made, of `from` or of the template that was asked for, and waits until it runs.
    pub(super) async fn start(&self, build: &Build, from: Option<&Named>) -> Result<(), NoCapsule> {
        let spec = spec_of(build, from);
        // A kept outcome may have no holder that is there: then there is another way.
        let patience = if from.is_some() {
            Duration::ZERO
        } else {
            ROOM_TIMEOUT
        };
        let deadline = Instant::now() + patience;
        loop {
            let command = Command::CreateSandbox {
                id: self.id,
                team: build.team,
                spec: spec.clone(),
                hints: Vec::new(),
            };
            let stop = match self.proposer.propose(command).await {
                Ok(_) => break,
                Err(ProposeError::Log(_)) => None,
                Err(ProposeError::Refused(Refusal::NoRoom(lack))) => {
                    let why = format!("no host can take the capsule to build in: {}", lack.0);
                    Some(NoCapsule::NoRoom(why))
                }
                Err(ProposeError::Refused(refusal)) if from.is_some() => {
                    return Err(NoCapsule::NoRoom(refusal.to_string()));
                }
                Err(ProposeError::Refused(refusal)) => {
                    return Err(NoCapsule::Stop(Stop::Failed(refusal.to_string())));
                }
            };
            if let Some(stop) = stop
                && Instant::now() >= deadline
            {
                return Err(stop);
            }
            time::sleep(AGAIN).await;
        }
        self.until_running(START_TIMEOUT)
            .await
            .map_err(NoCapsule::Stop)
    }

    /// Waits until it runs.
    async fn until_running(&self, patience: Duration) -> Result<(), Stop> {
        let came = self.view.wait_for(Instant::now() + patience, |state| {
            match state.sandbox(self.id) {
                Some(it) if it.phase == Phase::Running => Some(Ok(())),
                Some(it) if it.phase.is_ended() => Some(Err(ended(it))),
                _ => None,
            }
        });
        let late = || {
            Err(Stop::Broke(format!(
                "the capsule did not run within {patience:?}"
            )))
        };
        came.await.unwrap_or_else(late)
    }

    /// Its guest.
    pub(super) async fn guest(&self) -> Result<Guest, Stop> {
        let guest = self.relay.guest(self.id).await;
        guest.map_err(|err| Stop::Broke(crate::base::chain::chain(&err)))
    }

    /// Keeps it up while a silent command runs in it.
    pub(super) fn touch(&self) {
        // One that has ended is found out otherwise.
        drop(self.relay.touch(self.id));
    }

    /// Seals it, or its disk alone, under a name; it goes on. `Err` of the inner result where it was
    /// not sealed, or may not have the name.
    pub(super) async fn seal(
        &self,
        (kind, name): (SnapshotKind, &str),
        overwrite: bool,
        metadata: BTreeMap<String, String>,
    ) -> Result<Result<(), String>, Stop> {
        let state = self.view.state();
        let known = state.sandbox(self.id).cloned();
        let Some(known) = known else {
            return Err(Stop::Broke("the capsule is gone".into()));
        };
        let (ask, team) = (result_ask(self.build, name), known.team);
        let before = known.pause;
        let command = Command::CheckpointSandbox(CheckpointSandbox {
            id: self.id,
            epoch: known.epoch,
            checkpoint: Checkpoint {
                ask,
                purpose: Purpose::Name {
                    name: name.to_owned(),
                    kind,
                    overwrite,
                    metadata,
                },
            },
            hints: Vec::new(),
        });
        match self.proposer.propose(command).await {
            Ok(_) => {}
            Err(ProposeError::Refused(refusal @ Refusal::NameTaken(_))) => {
                return Ok(Err(refusal.to_string()));
            }
            Err(err) => return Err(Stop::Broke(err.to_string())),
        }
        let is_made = |state: &State| state.named(team, name).is_some_and(|it| it.ask == ask);
        let outcome = |state: &State| {
            let known = state.sandbox(self.id)?;
            match known.phase {
                Phase::Running if is_made(state) => Some(Ok(Ok(()))),
                // This node may not have heard of the ask yet.
                Phase::Running if known.pause > before => Some(Ok(Err(known.reason.clone()))),
                phase if phase.is_ended() && is_made(state) => Some(Ok(Ok(()))),
                phase if phase.is_ended() => Some(Err(ended(known))),
                _ => None,
            }
        };
        let sealed = self.view.wait_for(Instant::now() + SEAL_TIMEOUT, outcome);
        let late = || Err(Stop::Broke(format!("no seal within {SEAL_TIMEOUT:?}")));
        sealed.await.unwrap_or_else(late)
    }
}

/// The ask by which a build seals under `name`: it is known when it is made again.
pub(super) fn result_ask(build: BuildId, name: &str) -> SnapshotId {
    SnapshotId(id(build, "ask", name))
}

fn spec_of(build: &Build, from: Option<&Named>) -> SandboxSpec {
    let asked = build.spec.sandbox.clone();
    let label = (LABEL.to_owned(), build.id.to_string());
    let spec = SandboxSpec {
        idle_timeout: Some(IDLE_TIMEOUT),
        on_idle: IdleAction::Destroy,
        metadata: BTreeMap::from([label]),
        ..asked
    };
    match from {
        None => spec,
        Some(named) => SandboxSpec {
            template: named.name.clone(),
            vcpus: named.vcpus,
            memory: named.memory,
            disk: named.disk,
            ..spec
        },
    }
}

fn ended(known: &Sandbox) -> Stop {
    let reason = match known.reason.as_str() {
        "" => "it was stopped",
        reason => reason,
    };
    Stop::Broke(format!("the capsule to build in ended: {reason}"))
}

/// An id that everybody makes of the same build.
fn id(build: BuildId, of: &str, which: &str) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    hasher.update(&build.0);
    for part in [of, which] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    let mut id = [0; 16];
    hasher.finalize_xof().fill(&mut id);
    id
}

//! The receiving end: what other members ask of this one.
//!
//! Before anything else the envelope's disk is compared with our own. Raft's promise is that a
//! member remembers what it voted for; one whose disk was wiped does not, and it is addressed by
//! a disk it no longer has. It then answers nothing but that, for ever, and says so here.

use std::path::PathBuf;

use openraft::raft::VoteRequest;
use tokio::task::spawn_blocking;

use super::Group;
use crate::machine::Machine;
use crate::peer::{self, Request};
use crate::snapshot::{self, SnapshotFile};
use crate::types::{SnapshotMeta, Types, Vote};

impl<M: Machine> Group<M> {
    /// Answers another member's request. The link has made sure that it comes from the member
    /// that [`sender`](crate::link::sender) names.
    pub async fn serve(&self, request: &[u8]) -> Vec<u8> {
        if let Some(refusal) = self.refusal(request) {
            return refusal;
        }
        let request = match peer::read_request(request) {
            Ok(request) => request,
            Err(bad) => return peer::answer_stopped(bad.to_string()),
        };
        let raft = &self.inner.raft;
        let answered = match request {
            Request::Append(rpc) => {
                let answer = raft.append_entries(rpc).await;
                answer
                    .map(|answer| peer::answer_append(&answer))
                    .map_err(|err| err.to_string())
            }
            Request::Vote(rpc) => self.vote(rpc, false).await,
            Request::PreVote(rpc) => self.vote(rpc, true).await,
            Request::Transfer(rpc) => {
                let answer = raft.handle_transfer_leader(rpc).await;
                answer
                    .map(|answer| peer::answer_transfer(&answer))
                    .map_err(|err| err.to_string())
            }
            Request::Snapshot(..) => Err("a snapshot without its bytes".into()),
        };
        answered.unwrap_or_else(peer::answer_stopped)
    }

    async fn vote(&self, rpc: VoteRequest<Types>, pre: bool) -> Result<Vec<u8>, String> {
        let raft = &self.inner.raft;
        let answer = if pre {
            raft.pre_vote(rpc).await
        } else {
            raft.vote(rpc).await
        };
        answer
            .map(|answer| peer::answer_vote(&answer))
            .map_err(|err| err.to_string())
    }

    /// The answer to give without reading a snapshot's bytes: `Some` where `request` is not meant
    /// for this member, which the link should find out before it takes gigabytes.
    #[must_use]
    pub fn refuse_snapshot(&self, request: &[u8]) -> Option<Vec<u8>> {
        self.refusal(request)
    }

    /// Answers the leader's snapshot, whose bytes the link has put into `file`. The file is only
    /// read; removing it afterwards is the link's part.
    pub async fn serve_snapshot(&self, request: &[u8], file: PathBuf) -> Vec<u8> {
        if let Some(refusal) = self.refusal(request) {
            return refusal;
        }
        match peer::read_request(request) {
            Ok(Request::Snapshot(vote, meta)) => self.install(vote, meta, file).await,
            Ok(_) => peer::answer_stopped("bytes that no snapshot was announced for".into()),
            Err(bad) => peer::answer_stopped(bad.to_string()),
        }
    }

    async fn install(&self, vote: Vote, meta: SnapshotMeta, path: PathBuf) -> Vec<u8> {
        // Checked before openraft gets it: a transfer gone wrong must not stop this member.
        let file = path.clone();
        let read = spawn_blocking(move || snapshot::read(&file)).await;
        match read {
            Ok(Ok(loaded)) if loaded.meta == meta => {}
            Ok(Ok(_)) => return peer::answer_stopped("another snapshot than announced".into()),
            Ok(Err(err)) => return peer::answer_stopped(err.to_string()),
            Err(died) => return peer::answer_stopped(died.to_string()),
        }
        let snapshot = openraft::Snapshot {
            meta,
            snapshot: SnapshotFile { path },
        };
        let installed = self.inner.raft.install_full_snapshot(vote, snapshot).await;
        installed.map_or_else(
            |fatal| peer::answer_stopped(fatal.to_string()),
            |answer| peer::answer_snapshot(&answer.vote),
        )
    }

    /// The answer to a request that is meant for another disk than this member's.
    fn refusal(&self, request: &[u8]) -> Option<Vec<u8>> {
        let envelope = match peer::read_envelope(request) {
            Ok(envelope) => envelope,
            Err(bad) => return Some(peer::answer_stopped(bad.to_string())),
        };
        let (here, known) = (self.inner.node.disk, envelope.target_disk);
        if known == here {
            return None;
        }
        let is_first = self.inner.standing.send_if_modified(|standing| {
            let is_first = standing.known_by.is_none();
            standing.known_by = Some(known);
            is_first
        });
        if is_first {
            tracing::error!(
                node = %self.inner.node_id, %here, %known, asked_by = envelope.sender,
                "the cluster knows this node by another disk: remove it, it must join anew under a new id"
            );
        }
        Some(peer::answer_other_disk(here))
    }
}

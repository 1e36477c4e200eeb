//! Following the cluster from outside raft's configuration.
//!
//! A node that raft does not feed asks any member for the entries it lacks and applies them with
//! the same code; where the member's log no longer reaches back that far, it fetches a snapshot
//! first. It has no vote and acknowledges nothing, so nothing of this needs to be durable: after a
//! restart it begins with whatever its raft folder still has, and pulls the rest.
//!
//! A host of one team asks in the same way and is answered with a slice of the state instead
//! ([`super::slices`]); it stays with one member, which knows what it has.
//!
//! The question is held open at the other end while there is nothing new, so a change arrives as
//! soon as it is applied there.

use std::path::PathBuf;
use std::time::Duration;

use proto::ids::NodeId;
use proto::wire::mesh as wire;
use raft::command::Proposal;
use raft::group::Group;
use raft::state::State;
use tokio::fs::File;
use tokio::io::{self, AsyncReadExt, AsyncWriteExt};
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use transport::streams::{Inbound, StreamHandler};
use transport::{Lane, Service};

use super::calls;
use super::hearsay::Hearsay;
use super::mesh::Mesh;
use super::replica::Replica;
use super::seldom::Seldom;
use super::slices::ReceivedSlice;
use super::view::Seen;

/// Longest one question: it is held open for five seconds at the other end.
const PULL_TIMEOUT: Duration = Duration::from_secs(8);
/// Pause after a question that brought nothing, and between two looks whether raft feeds this node.
const PAUSE: Duration = Duration::from_millis(500);
/// Longest transfer of a snapshot.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(600);
/// Largest snapshot that is taken in.
const MAX_SNAPSHOT_BYTES: u64 = 8 << 30;

/// Why a pull brought nothing. Only ever logged: the next one may go elsewhere.
type Reason = Box<dyn std::error::Error + Send + Sync>;

/// Keeps this node's replica up to date while raft does not.
pub(super) struct Mirror {
    pub(super) group: Group<State>,
    pub(super) mesh: Mesh,
    pub(super) replica: Replica,
    /// Where a snapshot lies while it is read; its file is removed then.
    pub(super) spool: PathBuf,
    /// What the members that are asked say of raft.
    pub(super) hearsay: Hearsay,
}

/// What is kept between two pulls.
#[derive(Debug, Default)]
struct Pulled {
    /// Who was asked last and answered.
    from: Option<NodeId>,
    /// On a host of one team: what it has.
    slice: ReceivedSlice,
}

impl Mirror {
    pub(super) async fn run(self, stop: CancellationToken) {
        let mut pulled = Pulled::default();
        loop {
            let turn = async {
                if self.is_fed_by_raft() {
                    time::sleep(PAUSE).await;
                    return;
                }
                if let Err(why) = self.pull(&mut pulled).await {
                    pulled.from = None;
                    debug!(%why, "could not pull the cluster's log");
                    time::sleep(PAUSE).await;
                }
            };
            if stop.run_until_cancelled(turn).await.is_none() {
                return;
            }
        }
    }

    /// Whether this node belongs to raft's configuration and somebody leads it.
    fn is_fed_by_raft(&self) -> bool {
        let metrics = self.group.metrics();
        let feed = self.replica.feed();
        feed.belongs(self.mesh.here(), &metrics.members)
            && (metrics.leader.is_some() || self.mesh.roster().nodes.len() <= 1)
    }

    async fn pull(&self, pulled: &mut Pulled) -> Result<(), Reason> {
        let stays_with = pulled.from.filter(|_| pulled.slice.mark > 0);
        let peer = stays_with.or_else(|| self.anybody());
        let peer = peer.ok_or("nobody else is known")?;
        let next = self.replica.applied() + 1;
        let request = wire::PullRequest {
            // What is half there is not waited for.
            from: if pulled.slice.is_partial { 0 } else { next },
            cluster: self.mesh.roster().cluster.0.to_vec(),
            slice_mark: pulled.slice.mark,
        };
        let deadline = Instant::now() + PULL_TIMEOUT;
        let called = self
            .mesh
            .call(peer, calls::PULL, calls::body(&request), deadline);
        let answer: wire::PullAnswer = calls::answer(called.await?)?;
        pulled.from = Some(peer);
        self.hearsay.heard(&answer);
        if let Some(part) = answer.slice {
            if let Some(state) = pulled.slice.take(part)? {
                let applied = Some(answer.applied);
                self.replica.publish(&Seen { state, applied });
            }
            return Ok(());
        }
        if answer.snapshot_needed {
            return self.fetch_snapshot(peer, &request).await;
        }
        let seen = self.replica.now();
        if let Some(next) = apply(seen, answer.entries)? {
            self.replica.publish(&next);
        }
        Ok(())
    }

    /// Whom to ask: mostly members of raft's configuration, which know most; now and then anybody,
    /// since all that is known of those may be out of date.
    fn anybody(&self) -> Option<NodeId> {
        let mut others = self.mesh.roster().peers(self.mesh.here());
        let told = self.hearsay.newest();
        if let Some(told) = told.filter(|_| rand::random_ratio(3, 4)) {
            let is_member = |id: &NodeId| told.voters.contains(id) || told.learners.contains(id);
            others.retain(is_member);
        }
        let at = rand::random_range(0..others.len().max(1));
        others.get(at).copied()
    }

    async fn fetch_snapshot(
        &self,
        peer: NodeId,
        request: &wire::PullRequest,
    ) -> Result<(), Reason> {
        let fetched = time::timeout(SNAPSHOT_TIMEOUT, self.receive(peer, request));
        let (state, index) = fetched.await??;
        info!(%peer, index, "took over a snapshot of the cluster's state");
        self.replica.publish(&Seen {
            state,
            applied: Some(index),
        });
        Ok(())
    }

    async fn receive(
        &self,
        peer: NodeId,
        request: &wire::PullRequest,
    ) -> Result<(State, u64), Reason> {
        let deadline = Instant::now() + PULL_TIMEOUT;
        let header = calls::body(request);
        let opened = self
            .mesh
            .open(peer, Lane::Bulk, Service::PULL, header, deadline);
        let mut stream = opened.await?;
        stream.shutdown().await?;
        let length = stream.read_u64().await?;
        if length > MAX_SNAPSHOT_BYTES {
            return Err(format!("a snapshot of {length} bytes").into());
        }
        let spool = self.spool.clone();
        let made = tokio::task::spawn_blocking(move || tempfile::NamedTempFile::new_in(spool));
        let (file, path) = made.await??.into_parts();
        let mut file = File::from_std(file);
        let copied = io::copy(&mut stream.take(length), &mut file).await?;
        if copied != length {
            return Err("the snapshot was cut off".into());
        }
        file.flush().await?;
        let loaded = tokio::task::spawn_blocking(move || raft::snapshot::load::<State>(&path));
        Ok(loaded.await??)
    }
}

/// The state after `entries`, which must follow what was `seen` without a gap; `None` where there
/// are none.
fn apply(seen: Seen, entries: Vec<wire::PulledEntry>) -> Result<Option<Seen>, Reason> {
    let mut next = seen;
    let mut any = false;
    for entry in entries {
        let expected = next.applied.map_or(0, |applied| applied + 1);
        if entry.index != expected && next.applied.is_some() {
            return Err(format!("entry {} where {expected} follows", entry.index).into());
        }
        if let Some(bytes) = entry.proposal {
            let proposal = Proposal::decode(&bytes)?;
            next.state.apply(entry.index, proposal);
        }
        next.applied = Some(entry.index);
        any = true;
    }
    Ok(any.then_some(next))
}

/// Gives snapshots to mirrors.
pub(super) struct PullStreams {
    pub(super) group: Group<State>,
    pub(super) mesh: Mesh,
    pub(super) replica: Replica,
    /// How often what became of these is mentioned: a peer can ask, and not read, without end.
    pub(super) failures: Seldom,
}

impl StreamHandler for PullStreams {
    async fn open(&self, inbound: Inbound) {
        let state = self.replica.state();
        let asker = self.mesh.node_of(&inbound.peer);
        let asker = asker.and_then(|id| state.node(id));
        if asker.is_none_or(|node| node.team.is_some()) {
            return inbound.refuse("snapshots are for full members").await;
        }
        let sent = time::timeout(SNAPSHOT_TIMEOUT, self.send(inbound)).await;
        match sent {
            Ok(Ok(())) => {}
            Ok(Err(why)) => self.complain(&why),
            Err(_) => self.complain(&"it took too long to read it".into()),
        }
    }
}

impl PullStreams {
    fn complain(&self, why: &Reason) {
        if let Some(left_out) = self.failures.is_due() {
            warn!(%why, left_out, "could not give a mirror a snapshot");
        }
    }

    async fn send(&self, inbound: Inbound) -> Result<(), Reason> {
        let offered = self.group.snapshot_file().await?;
        let mut stream = inbound.accept().await?;
        stream.write_u64(offered.bytes).await?;
        let file = File::from_std(offered.file);
        io::copy(&mut file.take(offered.bytes), &mut stream).await?;
        stream.shutdown().await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u64) -> wire::PulledEntry {
        wire::PulledEntry {
            index,
            proposal: None,
        }
    }

    fn at(applied: u64) -> Seen {
        Seen {
            state: State::default(),
            applied: Some(applied),
        }
    }

    #[test]
    fn entries_are_applied_in_their_order_and_a_gap_is_refused() {
        let next = apply(at(4), vec![entry(5), entry(6)]).expect("fits");
        assert_eq!(next.and_then(|seen| seen.applied), Some(6));
        assert!(apply(at(4), vec![entry(6)]).is_err());
        assert!(apply(at(4), vec![entry(4)]).is_err());
        assert!(apply(at(4), vec![]).expect("fits").is_none());
    }

    #[test]
    fn a_proposal_that_cannot_be_read_stops_the_mirror_from_going_on() {
        let bad = wire::PulledEntry {
            index: 5,
            proposal: Some(vec![0xff; 3]),
        };
        assert!(apply(at(4), vec![bad]).is_err());
    }
}

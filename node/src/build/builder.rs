//! Which builds are this node's to do, and what becomes of their attempts.
//!
//! A build is its owner's, and where the owner is away, that of one other node, on which all agree
//! without asking. Whoever does it claims it first, which begins a new attempt: also after a restart of
//! this daemon, since what went on in the attempt before is not known. A stop of the daemon drops what is
//! under way; the capsule is stopped by the next claim.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use proto::ids::{BuildId, NodeId};
use raft::command::{BuildChange, BuildEnd, Command};
use raft::state::{Build, BuildStatus, State};
use tokio::task::{self, JoinSet};
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, debug, info, info_span, warn};

use super::attempt::{Attempt, Made, Means, is_made};
use super::journal::persist;
use super::{Stop, archive_path};
use crate::base::stop::Tasks;
use crate::cluster::{LogError, ProposeError, Proposer};
use crate::relay::Relay;
use crate::template::log::{Entry, Kind};

/// Attempts at one build. What broke that often will break again.
const MAX_ATTEMPTS: u32 = 8;
/// Pause before an attempt that follows one that broke, and before a claim that got no answer.
const AGAIN: Duration = Duration::from_secs(2);
/// How often builds are looked at without a change: an owner may have gone missing meanwhile.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// An archive that nobody wants is removed at this age: before, it may be arriving.
const LEFT_BEHIND: Duration = Duration::from_secs(3600);
/// A day: nobody waits for a cancelled future that long, and every change wakes it.
const FOREVER: Duration = Duration::from_secs(24 * 3600);

/// Does the builds that are this node's to do.
#[derive(Debug)]
pub struct Builder {
    /// This node.
    pub here: NodeId,
    /// How everything is asked for.
    pub proposer: Proposer,
    /// The way to the capsules.
    pub relay: Relay,
    /// Where archives lie.
    pub archives: PathBuf,
}

impl Builder {
    /// Starts doing them, until `tasks` are stopped.
    pub fn spawn(self, tasks: &Tasks) {
        let stop = tasks.token().clone();
        let span = info_span!("builder", node = %self.here);
        tasks.spawn(span, Arc::new(self).run(stop));
    }

    async fn run(self: Arc<Self>, stop: CancellationToken) {
        if stop
            .run_until_cancelled(self.await_newest())
            .await
            .is_none()
        {
            return;
        }
        self.sweep().await;
        let mut view = self.proposer.view();
        let mut doing: JoinSet<BuildId> = JoinSet::new();
        let mut known: BTreeSet<BuildId> = BTreeSet::new();
        loop {
            let state = view.state();
            let due = state.builds().filter(|it| self.is_due(&state, it));
            for id in due.map(|it| it.id) {
                if known.insert(id) {
                    let span = info_span!("build", %id);
                    doing.spawn(Arc::clone(&self).see_to(id).instrument(span));
                }
            }
            tokio::select! {
                () = stop.cancelled() => break,
                alive = view.changed() => if !alive { break },
                Some(done) = doing.join_next() => match done {
                    Ok(id) => drop(known.remove(&id)),
                    Err(err) if err.is_panic() => std::panic::resume_unwind(err.into_panic()),
                    Err(_) => {}
                },
                () = time::sleep(LOOK_INTERVAL) => {}
            }
        }
        doing.shutdown().await;
    }

    /// Waits until the view holds everything that was acknowledged before this daemon started.
    async fn await_newest(&self) {
        while let Err(err) = self.proposer.linearize().await {
            debug!(%err, "no build goes on before the cluster's newest state is known");
            time::sleep(AGAIN).await;
        }
    }

    /// Removes the archives that a crash has left: those of no build that goes on, and not new either.
    async fn sweep(&self) {
        let state = self.proposer.view().state();
        let open = state.builds().filter(|it| !it.status.is_ended());
        let wanted: BTreeSet<PathBuf> =
            open.map(|it| archive_path(&self.archives, it.id)).collect();
        let dir = self.archives.clone();
        let swept = task::spawn_blocking(move || remove_old(&dir, &wanted)).await;
        if let Ok(Err(err)) = swept
            && err.kind() != io::ErrorKind::NotFound
        {
            warn!(%err, "archives of old builds could not be removed");
        }
    }

    fn is_due(&self, state: &State, build: &Build) -> bool {
        !build.status.is_ended() && doer(state, build) == Some(self.here)
    }

    /// Attempts until the build has ended or is another's.
    async fn see_to(self: Arc<Self>, id: BuildId) -> BuildId {
        while let Some(build) = self.claim(id).await {
            let attempt = build.attempt;
            let ours = self.until_deposed(id, attempt);
            let ended = tokio::select! {
                ended = self.attempt(build) => ended,
                () = ours => break,
            };
            if ended {
                break;
            }
            time::sleep(AGAIN).await;
        }
        self.drop_archive(id).await;
        id
    }

    /// Begins the next attempt; `None` where the build is over or not ours.
    async fn claim(&self, id: BuildId) -> Option<Build> {
        let view = self.proposer.view();
        loop {
            let state = view.state();
            let known = state.build(id).filter(|it| self.is_due(&state, it))?;
            let attempt = known.attempt;
            let claim = BuildChange::Claim {
                id,
                attempt,
                node: self.here,
            };
            match self.proposer.propose(Command::Build(claim)).await {
                Ok(_) => {}
                Err(ProposeError::Log(LogError::Stopped(_))) => return None,
                Err(err) => {
                    debug!(%err, "could not claim a build");
                    time::sleep(AGAIN).await;
                    continue;
                }
            }
            let claimed = view.wait_for(Instant::now() + FOREVER, |state| {
                let build = state.build(id);
                let is_over = build.is_none_or(|it| it.attempt > attempt);
                is_over.then(|| build.cloned())
            });
            let claimed = claimed.await.flatten()?;
            let is_ours = claimed.attempt == attempt + 1 && claimed.owner == self.here;
            return is_ours.then_some(claimed);
        }
    }

    /// Waits until the attempt is over or another's.
    async fn until_deposed(&self, id: BuildId, attempt: u32) {
        let over = |state: &State| {
            let build = state.build(id);
            let goes_on = |it: &Build| it.attempt == attempt && !it.status.is_ended();
            (!build.is_some_and(goes_on)).then_some(())
        };
        let view = self.proposer.view();
        while view
            .wait_for(Instant::now() + FOREVER, over)
            .await
            .is_none()
        {
            time::sleep(AGAIN).await;
        }
    }

    /// One attempt; whether the build is over by it.
    async fn attempt(&self, build: Build) -> bool {
        let (id, number) = (build.id, build.attempt);
        info!(attempt = number, "a build is taken up");
        let (came, log) = self.try_once(build).await;
        let stop = match came {
            Ok(made) => {
                let end = BuildEnd {
                    status: BuildStatus::Success,
                    default_user: made.default_user,
                    default_env: made.default_env,
                    ..failed(id, number, String::new(), made.log)
                };
                return self.end(end).await;
            }
            Err(stop) => stop,
        };
        match stop {
            Stop::Deposed => true,
            Stop::Failed(why) => self.end(failed(id, number, why, log)).await,
            Stop::Broke(why) if number >= MAX_ATTEMPTS => {
                let why = format!("{why}; this was the last of {MAX_ATTEMPTS} attempts");
                self.end(failed(id, number, why, log)).await
            }
            Stop::Broke(why) => {
                warn!(why, attempt = number, "an attempt of a build broke");
                self.tell_broken(id, number, &why, log).await
            }
        }
    }

    /// Goes through an attempt; what came of it, and what was not told yet.
    async fn try_once(&self, build: Build) -> (Result<Made, Stop>, Vec<u8>) {
        if is_made(&self.proposer.view().state(), &build) {
            let made = Made {
                default_user: build.default_user,
                default_env: build.default_env,
                log: Vec::new(),
            };
            return (Ok(made), Vec::new());
        }
        let archive = archive_path(&self.archives, build.id);
        let is_here = tokio::fs::try_exists(&archive).await.unwrap_or(false);
        let means = Means {
            proposer: self.proposer.clone(),
            relay: self.relay.clone(),
            archive: is_here.then_some(archive),
        };
        let mut attempt = match Attempt::new(build, means) {
            Ok(attempt) => attempt,
            Err(stop) => return (Err(stop), Vec::new()),
        };
        let came = attempt.run().await;
        (came, attempt.take_lines())
    }

    async fn end(&self, end: BuildEnd) -> bool {
        info!(status = ?end.status, error = end.error, "a build has ended");
        let end = Command::Build(BuildChange::End(end));
        // One that is refused was ended by somebody else.
        let _deposed = persist(&self.proposer, end).await;
        true
    }

    /// Tells why another attempt follows; whether the build is over.
    async fn tell_broken(&self, id: BuildId, attempt: u32, why: &str, mut log: Vec<u8>) -> bool {
        let text = format!("attempt {attempt} broke: {why}; another one follows");
        log.extend(Entry::new(Kind::Note, 0, "", text).encode());
        let state = self.proposer.view().state();
        let known = state.build(id);
        let told = BuildChange::Progress {
            id,
            attempt,
            phase: "starting".into(),
            step: 0,
            sandbox: known.and_then(|it| it.sandbox),
            log,
        };
        persist(&self.proposer, Command::Build(told)).await.is_err()
    }

    /// Removes the archive of a build that is over. Another node's build leaves it here: it may come back.
    async fn drop_archive(&self, id: BuildId) {
        let state = self.proposer.view().state();
        if state.build(id).is_none_or(|it| it.status.is_ended()) {
            // There may be none.
            let _ = tokio::fs::remove_file(archive_path(&self.archives, id)).await;
        }
    }
}

fn remove_old(dir: &Path, wanted: &BTreeSet<PathBuf>) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let modified = entry.metadata()?.modified()?;
        let is_old = modified.elapsed().is_ok_and(|age| age > LEFT_BEHIND);
        if is_old && !wanted.contains(&entry.path()) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// The node that is to do a build: its owner, or while that is away, one of the others.
fn doer(state: &State, build: &Build) -> Option<NodeId> {
    let owner = state.node(build.owner);
    if owner.is_some_and(|it| it.liveness.is_alive()) {
        return Some(build.owner);
    }
    let others = state.nodes().filter(|it| {
        it.liveness.is_alive() && !it.draining && it.team.is_none() && it.id != build.owner
    });
    let rank = |id: NodeId| {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&build.id.0).update(&id.0.to_le_bytes());
        *hasher.finalize().as_bytes()
    };
    others.map(|it| it.id).min_by_key(|id| rank(*id))
}

const fn failed(id: BuildId, attempt: u32, error: String, log: Vec<u8>) -> BuildEnd {
    BuildEnd {
        id,
        attempt,
        status: BuildStatus::Failed,
        error,
        default_user: String::new(),
        default_env: std::collections::BTreeMap::new(),
        log,
    }
}

#[cfg(test)]
mod tests {
    use proto::ids::{NodeKey, TokenId};
    use proto::units::Stamp;
    use raft::command::{Proposal, Verdict};
    use raft::state::{Node, Token};

    use super::*;

    /// A cluster of three nodes; the first is the founder.
    fn state() -> State {
        let token = Token {
            id: TokenId([1; 16]),
            public_key: [1; 32],
            team: None,
            expires_at: Stamp(1000),
            uses_left: 9,
            created_at: Stamp(1),
            created_by: String::new(),
            revoked: false,
            redeemed: Vec::new(),
        };
        let node = |number: u8| Node {
            id: NodeId(u64::from(number)),
            key: NodeKey([number; 32]),
            name: format!("n{number}"),
            ..Node::default()
        };
        let token_id = token.id;
        let redeem = |number| Command::RedeemToken {
            token: token_id,
            node: node(number),
        };
        let mut state = State::default();
        let first = Command::AdmitNode(node(1));
        for (command, index) in [first, Command::PutToken(token), redeem(3), redeem(4)]
            .into_iter()
            .zip(1..)
        {
            apply(&mut state, index, command);
        }
        state
    }

    fn apply(state: &mut State, index: u64, command: Command) {
        let at = Stamp(index);
        let applied = state.apply(index, Proposal { at, command });
        applied.answer.expect("applied");
    }

    #[test]
    fn everybody_agrees_who_takes_a_build_up_whose_owner_is_away() {
        let mut state = state();
        let ids: Vec<NodeId> = state.nodes().map(|it| it.id).collect();
        assert_eq!(ids.len(), 3);
        let build = |number: u8| Build {
            id: BuildId([number; 16]),
            owner: ids[0],
            ..Build::default()
        };
        assert_eq!(doer(&state, &build(1)), Some(ids[0]));
        let judged = Command::JudgeNode {
            node: ids[0],
            incarnation: state.node(ids[0]).expect("a node").incarnation,
            verdict: Verdict::Missing,
        };
        apply(&mut state, 9, judged);
        let doers: BTreeSet<NodeId> = (0..32)
            .filter_map(|number| doer(&state, &build(number)))
            .collect();
        assert_eq!(doers, BTreeSet::from([ids[1], ids[2]]), "both get some");
        let drained = Command::ChangeNode {
            node: ids[1],
            cordoned: None,
            draining: Some(true),
            tags: None,
        };
        apply(&mut state, 10, drained);
        assert!((0..32).all(|number| doer(&state, &build(number)) == Some(ids[2])));
    }
}

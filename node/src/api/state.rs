//! What every handler may use.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{env, fmt};

use proto::ids::{KeyId, NodeId, SandboxId};
use proto::units::Stamp;
use raft::command::{Command, Receipt};
use raft::state::{Phase, Sandbox, State};
use tokio::sync::Semaphore;
use tokio::time::{self, MissedTickBehavior};

use super::auth::Caller;
use super::catching_up::Rounds;
use super::cluster_info::{Alone, ClusterInfo};
use super::error::{ApiError, Code};
use super::grants::Grants;
use super::metrics::Counters;
use super::preview::Previews;
use super::rates::{Limit, Rates};
use super::run::Run;
use super::streams::Sessions;
use super::uses::Uses;
use crate::base::clock::{BootClock, Clock, SystemBootClock};
use crate::cluster::{ProposeError, Proposer, View};
use crate::net::Cidr;
use crate::relay::{Relay, RelayError};

/// Longest a create waits for its guest. Client libraries give up on a request after 30 s; a
/// guest that needs longer (emulated, on a busy host) is answered `starting` and polled for.
const CREATE_WAIT: Duration = Duration::from_secs(20);
/// Longest a destroy waits for the host to let go. An orderly guest is gone in two seconds.
const DESTROY_WAIT: Duration = Duration::from_secs(10);
/// Longest a pause or a resume waits: as for a create, what takes longer is polled for.
const PAUSE_WAIT: Duration = Duration::from_secs(20);
/// Longest the taking of a snapshot, and a fork, wait. Client libraries give up on it after 60 s.
const CHECKPOINT_WAIT: Duration = Duration::from_secs(50);
/// How often a call under way counts as activity: well inside the shortest inactivity timeout.
const BUSY_INTERVAL: Duration = Duration::from_secs(20);
/// Uploads that may lie in spool files at once. Each may take 100 MiB of disk.
const SPOOLS: usize = 16;

/// What this node says of itself.
#[derive(Clone, Debug)]
pub struct NodeFacts {
    /// Its id in the cluster.
    pub id: NodeId,
    /// What people call it.
    pub name: String,
    /// Where its API answers.
    pub url: String,
    /// The version of Wrenn it runs.
    pub version: String,
}

/// Everything that handlers share. Cheap to clone.
#[derive(Clone)]
pub struct ApiState {
    pub(super) proposer: Proposer,
    pub(super) view: View,
    pub(super) relay: Relay,
    pub(super) cluster: Arc<dyn ClusterInfo>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) boot_clock: Arc<dyn BootClock>,
    pub(super) facts: Arc<NodeFacts>,
    pub(super) counters: Arc<Counters>,
    pub(super) spool_dir: Arc<PathBuf>,
    pub(super) spools: Arc<Semaphore>,
    pub(super) sessions: Sessions,
    pub(super) previews: Previews,
    pub(super) webhook_allow: Arc<[Cidr]>,
    pub(super) grants: Grants,
    pub(super) rates: Rates<KeyId>,
    pub(super) uses: Uses,
    pub(super) rounds: Rounds,
    watching: Arc<AtomicBool>,
    pub(super) started_at: Stamp,
    pub(super) create_wait: Duration,
    pub(super) destroy_wait: Duration,
    pub(super) pause_wait: Duration,
    pub(super) checkpoint_wait: Duration,
}

impl fmt::Debug for ApiState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiState")
            .field("facts", &self.facts)
            .finish_non_exhaustive()
    }
}

impl ApiState {
    /// The state of a node that starts serving now.
    #[must_use]
    pub fn new(proposer: Proposer, relay: Relay, clock: Arc<dyn Clock>, facts: NodeFacts) -> Self {
        let (here, view) = (facts.id, proposer.view());
        Self {
            cluster: Arc::new(Alone {
                here,
                view: view.clone(),
            }),
            view,
            proposer,
            relay,
            sessions: Sessions::default(),
            previews: Previews::default(),
            webhook_allow: Arc::default(),
            grants: Grants::default(),
            rates: Rates::default(),
            uses: Uses::default(),
            rounds: Rounds::default(),
            watching: Arc::default(),
            started_at: clock.now(),
            clock,
            boot_clock: Arc::new(SystemBootClock),
            facts: Arc::new(facts),
            counters: Arc::default(),
            spool_dir: Arc::new(env::temp_dir()),
            spools: Arc::new(Semaphore::new(SPOOLS)),
            create_wait: CREATE_WAIT,
            destroy_wait: DESTROY_WAIT,
            pause_wait: PAUSE_WAIT,
            checkpoint_wait: CHECKPOINT_WAIT,
        }
    }

    /// Asks `cluster` instead of taking this node for a cluster of one.
    #[must_use]
    pub fn with_cluster(mut self, cluster: Arc<dyn ClusterInfo>) -> Self {
        self.cluster = cluster;
        self
    }

    /// Spools uploads in `dir` instead of the system's temporary directory. Spool files have no
    /// name, so a crash leaves none behind.
    #[must_use]
    pub fn with_spool_dir(mut self, dir: PathBuf) -> Self {
        self.spool_dir = Arc::new(dir);
        self
    }

    /// Lets webhooks go to these networks although they are not public.
    #[must_use]
    pub fn with_webhook_allow(mut self, allowed: Vec<Cidr>) -> Self {
        self.webhook_allow = allowed.into();
        self
    }

    /// Counts rates by `clock` instead of the host's.
    #[must_use]
    pub fn with_boot_clock(mut self, clock: Arc<dyn BootClock>) -> Self {
        self.boot_clock = clock;
        self
    }

    /// Lets each capsule be visited so many times a second, and so many times at once.
    #[must_use]
    pub fn with_visits(mut self, rate: u32, burst: u32) -> Self {
        self.previews = self.previews.limited_to(Limit::new(rate, burst));
        self
    }

    /// Waits this long in a create or a checkpoint, and in a destroy, a pause or a resume, before answering that
    /// work goes on.
    #[must_use]
    pub const fn with_waits(mut self, create: Duration, destroy: Duration) -> Self {
        self.create_wait = create;
        self.destroy_wait = destroy;
        self.pause_wait = destroy;
        self.checkpoint_wait = create;
        self
    }

    /// Ends what outlives the request it began as. Call it when no more requests are accepted.
    pub async fn end_sessions(&self) {
        self.sessions.end().await;
    }

    /// Makes a change that `caller` asked for, which the audit log keeps.
    pub(super) async fn propose(
        &self,
        caller: &Caller,
        change: Command,
    ) -> Result<Receipt, ProposeError> {
        let actor = caller.actor(&self.view.state());
        self.proposer.propose_by(actor, change).await
    }

    /// Looks after keys from the first request on: ends what goes on under those that end, and tells when
    /// they were used. Both end with the sessions.
    pub(super) fn keep_watch(&self) {
        if self.watching.swap(true, Ordering::Relaxed) {
            return;
        }
        let grants = self.grants.clone();
        let watch = grants.watch(self.view.clone(), self.clock.clone());
        self.sessions.spawn(watch);
        let uses = self.uses.clone();
        self.sessions.spawn(uses.tell(self.proposer.clone()));
    }

    /// The caller's sandbox `id`, as this node knows it, which may be behind: before somebody is told that there is none,
    /// use [`Self::found`]. Another team's sandbox does not exist for the
    /// caller.
    pub(super) fn sandbox(&self, caller: &Caller, id: SandboxId) -> Result<Sandbox, ApiError> {
        let state = self.view.state();
        owned(&state, caller, id).cloned()
    }

    /// The caller's sandbox `id`, for a change that needs it to be in a phase that `fits`. Whoever asks
    /// may have heard from another node a moment ago that it is: before anybody is refused for it, this
    /// node catches up with the cluster.
    ///
    /// It may still be in another phase; the caller says which he needs.
    pub(super) async fn sandbox_to_change(
        &self,
        caller: &Caller,
        id: SandboxId,
        fits: impl Fn(Phase) -> bool,
    ) -> Result<Sandbox, ApiError> {
        match self.sandbox(caller, id) {
            Ok(known) if fits(known.phase) => Ok(known),
            _ => {
                self.cluster.linearize().await?;
                self.sandbox(caller, id)
            }
        }
    }

    /// The guest of the caller's running sandbox.
    pub(super) async fn guest(&self, caller: &Caller, id: SandboxId) -> Result<Run, ApiError> {
        // Before the guest is asked for: a run that begins meanwhile is told as a move, and not as none.
        let known = match self.sandbox(caller, id) {
            Ok(known) if known.phase == Phase::Running => known,
            _ => {
                // As for a change; but a guest goes on without a quorum, and this node's word counts then.
                self.catch_up().await;
                self.sandbox(caller, id)?
            }
        };
        let guest = self.relay.guest(id).await?;
        Ok(Run::new(guest, &known, self.view.clone()))
    }

    /// Runs `work` in a sandbox, which counts as active until the work is done.
    pub(super) async fn busy<T>(&self, id: SandboxId, work: impl Future<Output = T>) -> T {
        let mut ticks = time::interval(BUSY_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => {
                    self.touch(id);
                    return done;
                }
                _ = ticks.tick() => self.touch(id),
            }
        }
    }

    /// Notes activity. A sandbox that ended meanwhile has no timer to move.
    pub(super) fn touch(&self, id: SandboxId) {
        let _ended: Result<(), RelayError> = self.relay.touch(id);
    }
}

/// The sandbox `id` in `state`, if it belongs to the caller's team.
pub(super) fn owned<'a>(
    state: &'a State,
    caller: &Caller,
    id: SandboxId,
) -> Result<&'a Sandbox, ApiError> {
    state
        .sandbox(id)
        .filter(|sandbox| sandbox.team == caller.team)
        .ok_or_else(|| ApiError::new(Code::NotFound, format!("no capsule {id}")))
}

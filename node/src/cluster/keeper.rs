//! Keeping this node's lease.
//!
//! One task renews it with the leader, every fifth of its time to live, and writes what is left of
//! it where the shims read it. Nothing here stops a guest: if this task hangs, or the whole daemon,
//! the shims find the lease over by themselves.
//!
//! A renewal that cannot reach the leader directly goes through any other member, so that one bad
//! link costs nobody its lease: what counts is when it was sent.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto::ids::NodeId;
use proto::wire::mesh as wire;
use raft::command::Command;
use raft::group::{Group, Role};
use raft::state::{Liveness, State};
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::calls;
use super::desk::{self, Desk};
use super::lease::{Granted, Holder, LeaseTimes, Limits, Listed, Renewal};
use super::mesh::Mesh;
use super::propose::Proposer;
use super::replica::Replica;
use crate::base::chain::chain;

/// How long most peers must have refused this node's key before it takes itself for removed, and
/// ends its guests for good. A list of members that lags is asked about within this time.
const REFUSED_LONG_ENOUGH: Duration = Duration::from_secs(10);
/// Members asked to send a renewal on, beside the leader.
const DETOURS: usize = 2;

/// Where guests find the lease, and which of them live by it.
pub trait LeaseSink: fmt::Debug + Send + Sync + 'static {
    /// The limits that an earlier daemon wrote, if they are of this boot of the machine.
    fn written(&self) -> Option<Limits>;

    /// Tells the guests.
    ///
    /// # Errors
    /// The disk refuses; the guests go by what they were told last.
    fn write(&self, limits: Limits) -> std::io::Result<()>;

    /// Whether a guest that lives by the lease still exists.
    fn has_bound_guests(&self) -> bool;
}

/// This node's hand on its lease. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct LeaseHand {
    inner: Arc<Mutex<Hand>>,
    sink: Arc<dyn LeaseSink>,
}

#[derive(Debug)]
struct Hand {
    holder: Holder,
    times: LeaseTimes,
    /// Set by the leader before it adds a voter to itself.
    growing: bool,
}

impl LeaseHand {
    pub(super) fn new(sink: Arc<dyn LeaseSink>, times: LeaseTimes, incarnation: u64) -> Self {
        let mut holder = Holder::new(times, incarnation);
        if let Some(limits) = sink.written().filter(|limits| *limits != Limits::NONE) {
            holder = holder.resume(limits.kill_at.less(times.grace()));
        }
        Self {
            inner: Arc::new(Mutex::new(Hand {
                holder,
                times,
                growing: false,
            })),
            sink,
        }
    }

    /// Gives up the sole voter's freedom from limits, before another voter is added. Returns
    /// whether the guests of this node go by a lease now; until then nobody may be added.
    pub(super) fn share_power(&self) -> bool {
        let mut hand = self.lock();
        hand.growing = true;
        hand.holder.set_sole_voter(false);
        self.write(&hand)
    }

    fn set_sole(&self, sole: bool) {
        let mut hand = self.lock();
        if !sole {
            hand.growing = false;
        }
        let free = sole && !hand.growing;
        let before = hand.holder.limits();
        hand.holder.set_sole_voter(free);
        if hand.holder.limits() != before {
            self.write(&hand);
        }
    }

    /// Takes over newer times or a newer incarnation; what is held stays held.
    fn bring_up_to(&self, times: LeaseTimes, incarnation: u64) {
        let mut hand = self.lock();
        hand.holder.bring_up_to(times, incarnation);
        hand.times = times;
    }

    fn renew(&self) -> Renewal {
        self.lock().holder.renew(desk::now())
    }

    fn granted(&self, renewal: Renewal, times: LeaseTimes, own: Option<Listed>) {
        let mut hand = self.lock();
        if times != hand.times {
            // The leader counts by other times than this node: one of both has not applied the
            // change yet. Nothing is taken from such a grant.
            return;
        }
        match hand.holder.granted(desk::now(), renewal, own) {
            Granted::Until(_) => {
                self.write(&hand);
            }
            Granted::NotCaughtUp => debug!("a renewal was granted that is not applied here yet"),
            Granted::Stale => debug!("a renewal was granted too late"),
            Granted::Lapsed => warn!("the lease had lapsed before it was granted again"),
        }
    }

    fn has_lapsed(&self) -> bool {
        self.lock().holder.has_lapsed(desk::now())
    }

    /// Begins anew, once nothing lives by the old lease any more.
    fn start_over(&self, incarnation: u64) {
        if !self.sink.has_bound_guests() {
            self.lock().holder.start_over(incarnation);
        }
    }

    /// Writes the limits where the shims read them; returns whether there they are.
    fn write(&self, hand: &Hand) -> bool {
        let Some(limits) = hand.holder.limits() else {
            return false;
        };
        let written = self.sink.write(limits);
        if let Err(err) = &written {
            warn!(%err, "could not write the lease; guests go by the last one");
        }
        written.is_ok()
    }

    fn lock(&self) -> MutexGuard<'_, Hand> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Renews the lease until it is asked to stop.
pub(super) struct Keeper {
    pub(super) group: Group<State>,
    pub(super) mesh: Mesh,
    pub(super) replica: Replica,
    pub(super) desk: Arc<Desk>,
    pub(super) proposer: Proposer,
    pub(super) hand: LeaseHand,
    /// Cancelled once it is certain that this node was removed.
    pub(super) removed: CancellationToken,
}

impl Keeper {
    pub(super) async fn run(self, stop: CancellationToken) {
        loop {
            let begun = Instant::now();
            let every = desk::times(self.replica.state().settings()).renew_every();
            if stop.run_until_cancelled(self.turn(every)).await.is_none() {
                return;
            }
            let next = time::sleep_until(begun + every);
            if stop.run_until_cancelled(next).await.is_none() {
                return;
            }
        }
    }

    async fn turn(&self, within: Duration) {
        self.hand.set_sole(self.is_sole_voter());
        let state = self.replica.state();
        self.desk.note_times(&state);
        let here = self.mesh.here();
        let Some(own) = state.node(here) else {
            // The roster of the join knew this node; a state that is newer and does not is final.
            let caught_up = self.replica.applied() >= self.mesh.roster().index;
            if caught_up && state.nodes().next().is_some() {
                info!("this node was removed from the cluster");
                self.removed.cancel();
            } else {
                // Where peers refuse it, it will never catch up.
                self.note("this node's record has not arrived yet");
            }
            return;
        };
        let times = desk::times(state.settings());
        // A lost incarnation is over, whether or not there ever was a lease under it.
        let is_lost = matches!(own.liveness, Liveness::Lost { .. });
        if is_lost || self.hand.has_lapsed() {
            return self.start_over(own.clone()).await;
        }
        self.hand.bring_up_to(times, own.incarnation);
        let renewal = self.hand.renew();
        let deadline = Instant::now() + within;
        match self.ask(renewal, deadline).await {
            Ok(times) => {
                let state = self.replica.state();
                let own = state.node(here).map(Listed::from);
                self.hand.granted(renewal, times, own);
            }
            Err(why) => self.note(&why),
        }
    }

    /// Announces this node anew, which gives it a fresh incarnation to hold a lease under.
    async fn start_over(&self, own: raft::state::Node) {
        let old = own.incarnation;
        if self.hand.sink.has_bound_guests() {
            debug!("waiting for the guests of the lapsed lease to end");
            return;
        }
        if let Err(err) = self.proposer.propose(Command::AdmitNode(own)).await {
            warn!(err = chain(&err), "could not announce this node anew");
            return self.note("nobody took the announcement");
        }
        let state = self.replica.state();
        if let Some(now) = state
            .node(self.mesh.here())
            .filter(|it| it.incarnation > old)
        {
            info!("the lease had lapsed; this node begins anew");
            self.hand.start_over(now.incarnation);
        }
    }

    fn is_sole_voter(&self) -> bool {
        let metrics = self.group.metrics();
        let mut voters = metrics.members.iter().filter(|(_, member)| member.voter);
        let alone = voters.next().is_some_and(|(id, _)| *id == self.mesh.here());
        alone && voters.next().is_none() && metrics.is_settled && !metrics.is_joint
    }

    async fn ask(&self, renewal: Renewal, deadline: Instant) -> Result<LeaseTimes, String> {
        let here = self.mesh.here();
        if self.group.role() == Role::Leader {
            let granted = self.desk.renew(here, renewal, deadline).await;
            return granted.map_err(|why| why.to_string());
        }
        let members = self.group.metrics().members;
        let belongs = self.replica.feed().belongs(here, &members);
        let leader = self.group.watch_metrics().borrow().leader;
        let leader = leader.filter(|_| belongs);
        let mut why = "no leader is known".to_owned();
        for (node, last_hop) in self.ways(leader) {
            // The first way gets most of the time; a detour is the exception.
            let left = deadline.saturating_duration_since(Instant::now());
            let request = wire::RenewRequest {
                incarnation: renewal.incarnation,
                seq: renewal.seq,
                node: here.0,
                last_hop,
            };
            let body = calls::body(&request);
            let called = self
                .mesh
                .call(node, calls::RENEW, body, Instant::now() + left / 2);
            match called.await {
                Ok(answer) => match calls::answer::<wire::RenewAnswer>(answer) {
                    Ok(answer) => return times_of(&answer).ok_or_else(|| "bad times".into()),
                    Err(err) => why = err.to_string(),
                },
                Err(err) => why = chain(&err),
            }
        }
        Err(why)
    }

    /// Whom to ask: the leader, then others who may send it on.
    fn ways(&self, leader: Option<NodeId>) -> Vec<(NodeId, bool)> {
        let here = self.mesh.here();
        let direct = leader.filter(|leader| *leader != here);
        let roster = self.mesh.roster();
        // Never a host: its word for a grant would be worth nothing.
        let mut others = roster.peers(here);
        others.retain(|id| Some(*id) != direct);
        let count = others.len();
        let turn = rand::random_range(0..count.max(1));
        others.rotate_left(turn.min(count));
        let detours = others.into_iter().take(DETOURS).map(|node| (node, false));
        direct
            .map(|node| (node, true))
            .into_iter()
            .chain(detours)
            .collect()
    }

    fn note(&self, why: &str) {
        debug!(why, "the lease was not renewed");
        if self.mesh.refused_for() >= REFUSED_LONG_ENOUGH {
            info!("most peers refuse this node: it was removed from the cluster");
            self.removed.cancel();
        }
    }
}

fn times_of(answer: &wire::RenewAnswer) -> Option<LeaseTimes> {
    let millis = |millis: u32| Duration::from_millis(millis.into());
    LeaseTimes::new(millis(answer.ttl_ms), millis(answer.grace_ms)).ok()
}

//! Carrying out the plan.
//!
//! One task looks whenever the replicated state or a sandbox changes, and starts each step as a
//! task of its own. While a step of a sandbox is under way the plan for it waits; a step that did
//! not help waits out its backoff. Stopping ends the looking and joins the steps: a report under
//! way is finished, and sandboxes keep running.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use proto::ids::{NodeId, SandboxId, TeamId};
use proto::units::Stamp;
use raft::command::{Command, Report, StopCause};
use raft::state::{HostLoss, IdleAction, Sandbox, Snapshot, SnapshotKind, State, Warm};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, debug, error, info, info_span, warn};

use super::backoff::{Attempts, Subject, Verdict};
use super::plan::{Circumstances, Step, plan};
use crate::base::clock::Clock;
use crate::base::fault;
use crate::base::stop::Tasks;
use crate::cluster::{ProposeError, Proposer, View};
use crate::sandbox::{KeptWarm, Origin, Registry, StartSpec, WarmNews};
use crate::store::SnapshotDigest;
use crate::template::Catalog;

/// How long to look away when nothing is due. Every change wakes the loop anyway.
const NOTHING_DUE: Duration = Duration::from_secs(3600);

/// Pause before the newest state is asked for again, where the answer was no at once.
const NEWEST_AGAIN: Duration = Duration::from_millis(500);

/// The loop from desired and observed to steps, for one node.
pub struct Reconciler {
    /// This node.
    pub here: NodeId,
    /// What the cluster wants.
    pub view: View,
    /// How reports get to it.
    pub proposer: Proposer,
    /// What runs here.
    pub registry: Arc<Registry>,
    /// Where root disks come from.
    pub catalog: Arc<Catalog>,
    /// For pruning.
    pub clock: Arc<dyn Clock>,
    /// How long records of ended sandboxes are kept.
    pub ended_retention: Duration,
    /// Whether this node leads the cluster.
    pub leads: watch::Receiver<bool>,
}

impl Reconciler {
    /// Starts the loop; it ends when `tasks` are stopped.
    pub fn spawn(self, tasks: &Tasks) {
        let stop = tasks.token().clone();
        let span = info_span!("reconciler", node = %self.here);
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
        let mut view = self.view.clone();
        let mut changes = self.registry.changes();
        let mut under_way = JoinSet::new();
        let mut attempts = Attempts::default();
        loop {
            let wait = self.look(&mut under_way, &mut attempts);
            tokio::select! {
                () = stop.cancelled() => break,
                alive = view.changed() => if !alive { break },
                _ = changes.changed() => {}
                Some(done) = under_way.join_next() => note(done, &mut attempts),
                () = time::sleep(wait) => {}
            }
        }
        while let Some(done) = under_way.join_next().await {
            note(done, &mut attempts);
        }
    }

    /// Waits until the view holds everything that was acknowledged before this daemon started. By an
    /// older one it would end guests whose records it does not have yet, and let others go on that
    /// were given out again since. What was taken over runs meanwhile.
    async fn await_newest(&self) {
        while let Err(err) = self.proposer.linearize().await {
            debug!(%err, "nothing is started or ended before the cluster's newest state is known");
            time::sleep(NEWEST_AGAIN).await;
        }
    }

    /// Starts every step that may start; returns how long to wait at most.
    fn look(
        self: &Arc<Self>,
        under_way: &mut JoinSet<Subject>,
        attempts: &mut Attempts,
    ) -> Duration {
        let at = Circumstances {
            here: self.here,
            now: self.clock.now(),
            ended_retention: self.ended_retention,
            prunes: *self.leads.borrow(),
        };
        let plan = plan(at, &self.view.state(), &self.registry.observed());
        attempts.keep_only(
            &plan
                .steps
                .iter()
                .map(Step::sandbox)
                .collect::<BTreeSet<_>>(),
        );
        let mut wait = plan.look_again_in.unwrap_or(NOTHING_DUE);
        for step in plan.steps {
            match attempts.judge(&step, Instant::now()) {
                Verdict::Busy => {}
                Verdict::Wait(left) => wait = wait.min(left),
                Verdict::Start => {
                    debug!(?step, "reconcile");
                    let this = Arc::clone(self);
                    let span = info_span!("step", sandbox = step.sandbox().map(display));
                    under_way.spawn(async move { this.carry_out(step).await }.instrument(span));
                }
            }
        }
        wait
    }

    async fn carry_out(&self, step: Step) -> Subject {
        let subject = step.sandbox();
        match step {
            Step::Start(id) => self.start(id).await,
            Step::Begin(id) => self.registry.begin(id),
            Step::Stop(id) => self.registry.stop(id),
            Step::Seal { id, pause, kind } => self.registry.seal(id, pause, kind),
            Step::Thaw(id) => self.registry.thaw(id),
            Step::Forget(id) => self.registry.forget(id),
            Step::Report { id, epoch, report } => {
                let node = self.here;
                self.propose(Command::ReportSandbox {
                    id,
                    epoch,
                    node,
                    report,
                })
                .await;
            }
            Step::Reclaim(id) => self.registry.reclaim(id).await,
            Step::PutAway(id) => self.put_away(id).await,
            Step::TellWarm(id) => self.tell_warm(id).await,
            Step::Prune { ended_before } => {
                self.propose(Command::PruneSandboxes { ended_before }).await;
            }
        }
        subject
    }

    /// Starts a sandbox, or reports at once that this node cannot. One that is bound to the lease
    /// waits for it: its guest would be killed at once, and end for that.
    async fn start(&self, id: SandboxId) {
        let state = self.view.state();
        let Some(record) = state.sandbox(id) else {
            return;
        };
        let lease_bound = record.spec.on_host_loss == HostLoss::Restart;
        if lease_bound && !self.registry.holds_lease() {
            return debug!(%id, "not started: this node holds no lease");
        }
        let Some(origin) = self.origin(&state, record) else {
            let wanted = &record.spec.template;
            let reason = format!("this host does not hold the template {wanted:?}");
            let (epoch, node, report) = (record.epoch, self.here, Report::Failed { reason });
            self.propose(Command::ReportSandbox {
                id,
                epoch,
                node,
                report,
            })
            .await;
            return;
        };
        let keep_warm = self.keeps_warm(&state, record, origin);
        self.registry.start(StartSpec {
            keep_warm,
            id,
            epoch: record.epoch,
            let_begin: !record.not_begun,
            template: record.spec.template.clone(),
            origin,
            // The API bounds what may be asked for far below.
            vcpus: u8::try_from(record.spec.vcpus).unwrap_or(u8::MAX),
            memory: record.spec.memory,
            disk: record.spec.disk,
            lease_bound,
        });
    }

    /// What a sandbox starts from here: what it rests as, what it is made from, or its template's image.
    fn origin(&self, state: &State, record: &Sandbox) -> Option<Origin> {
        // What goes on from a snapshot has its image from there, whatever the name means now.
        if let Some(own) = record.snapshot.and_then(|id| state.snapshot(id)) {
            return Some(Origin::Snapshot(SnapshotDigest(own.sealed.digest)));
        }
        let wanted = record.spec.template.parse().ok();
        let held = wanted.and_then(|name| self.catalog.get(&name));
        let image = held.map(|template| template.digest);
        let origin = record.origin.and_then(|id| state.snapshot(id));
        let disk = origin.filter(|it| it.sealed.kind == SnapshotKind::Base);
        if let Some(disk) = disk {
            return Some(Origin::Disk {
                from: SnapshotDigest(disk.sealed.digest),
                of: disk.sandbox,
            });
        }
        let usable = origin.filter(|it| {
            let may = |warm| self.registry.takes(warm) && !self.registry.leaves_alone(it);
            it.warm.as_ref().is_none_or(may)
        });
        match usable {
            Some(origin) => Some(Origin::Fork {
                from: SnapshotDigest(origin.sealed.digest),
                of: origin.sandbox,
                or_boots: image.filter(|_| origin.warm.is_some()),
            }),
            None => image.map(Origin::Image),
        }
    }

    /// Whether its guest, which boots, should be kept as it is then, for others to start from: nobody
    /// has one like it, and this is not a host of one team, whose guests others would not trust.
    fn keeps_warm(&self, state: &State, record: &Sandbox, origin: Origin) -> bool {
        let Origin::Image(base) = origin else {
            return false;
        };
        let Some(node) = state.node(self.here).filter(|node| node.team.is_none()) else {
            return false;
        };
        let is_same = |it: &Snapshot| {
            let warm = it.warm.as_ref();
            let fits =
                warm.is_some_and(|warm| warm.fits(&record.spec) && self.registry.takes(warm));
            fits && it.is_warm_for(node) && it.sealed.needs.base == base.0
        };
        self.registry.starts_warm() && !state.warm().any(is_same)
    }

    /// Tells the cluster what became of a warm snapshot here. Whatever the answer, it is told once:
    /// another host may have been first.
    async fn tell_warm(&self, id: SandboxId) {
        let told = match self.registry.warm_news(id) {
            Some(WarmNews::Made(made)) => self.tell_made(id, made).await,
            Some(WarmNews::Spoilt(digest)) => self.tell_spoilt(digest).await,
            None => return,
        };
        if let Err(ProposeError::Log(err)) = told {
            return warn!(%err, "could not tell the cluster");
        }
        fault::point("warm.told");
        self.registry.forget_warm(id);
    }

    /// Gives a snapshot up that nothing could be started from: another is made in its place.
    async fn tell_spoilt(&self, digest: SnapshotDigest) -> Result<(), ProposeError> {
        let state = self.view.state();
        let spoilt = state.warm().find(|it| it.sealed.digest == digest.0);
        // Its holders may have found out and said so.
        let Some(spoilt) = spoilt else {
            return Ok(());
        };
        let id = spoilt.sealed.id;
        self.proposer.propose(Command::RetireWarm(id)).await?;
        info!(snapshot = %id, "nothing is started from it any more; the next that boots is kept");
        Ok(())
    }

    async fn tell_made(&self, id: SandboxId, made: KeptWarm) -> Result<(), ProposeError> {
        let state = self.view.state();
        let Some(known) = state.sandbox(id) else {
            return Ok(());
        };
        let version = state.node(self.here).map(|node| node.version.clone());
        let snapshot = Snapshot {
            warm: Some(Warm {
                vcpus: known.spec.vcpus,
                memory: known.spec.memory,
                disk: known.spec.disk,
                version: version.unwrap_or_default(),
                guest: made.guest,
                retired: false,
            }),
            sealed: made.sealed,
            team: TeamId::default(),
            sandbox: id,
            epoch: known.epoch,
            sealed_by: self.here,
            sealed_at: Stamp::default(),
            holders: [self.here].into(),
        };
        let told = self.proposer.propose(Command::PutWarm(snapshot)).await;
        match &told {
            Ok(_) => info!(sandbox = %id, "the next capsules of its kind start warm"),
            Err(ProposeError::Refused(why)) => info!(%why, "a warm snapshot is not needed"),
            Err(ProposeError::Log(_)) => {}
        }
        told.map(drop)
    }

    /// Pauses or stops a sandbox for idleness unless somebody has begun to use it since the plan was
    /// made. A pause that fails gives it out again, and counts as use.
    async fn put_away(&self, id: SandboxId) {
        let state = self.view.state();
        let Some(known) = state.sandbox(id) else {
            return;
        };
        let timeout = known.spec.idle_timeout;
        if !timeout.is_some_and(|timeout| self.registry.withhold_idle(id, timeout)) {
            return;
        }
        let (epoch, cause) = (known.epoch, StopCause::Idle);
        let told = self.propose(match known.spec.on_idle {
            IdleAction::Pause => Command::PauseSandbox {
                id,
                epoch,
                cause,
                then_on: None,
            },
            IdleAction::Destroy => Command::StopSandbox { id, cause },
        });
        let told = told.await;
        if !told {
            self.registry.give_out_again(id);
        }
    }

    /// Proposes, and says whether it came about; a failure is told here and tried again by the
    /// next look.
    async fn propose(&self, command: Command) -> bool {
        let proposed = self.proposer.propose(command).await;
        proposed
            .inspect_err(|err| warn!(%err, "could not tell the cluster"))
            .is_ok()
    }
}

fn note(done: Result<Subject, tokio::task::JoinError>, attempts: &mut Attempts) {
    match done {
        Ok(subject) => attempts.done(subject, Instant::now()),
        // Its sandbox would count as busy for ever: half a reconciler is worse than a restart.
        Err(err) if err.is_panic() => std::panic::resume_unwind(err.into_panic()),
        Err(err) => error!(%err, "a reconcile step broke"),
    }
}

//! Takes the samples: two loops over the guests that run here, until they are told to stop.
//!
//! The host's loop waits for files, and for the shim of a VMM that it has not seen before. It looks in the middle of each period, so that
//! a look that comes a little early or late is still the one of its period. The other asks the
//! agents, a few at a time, and one that does not answer leaves what it said last. Neither counts as
//! use of a guest.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use proto::ids::{NodeId, SandboxId};
use proto::units::Stamp;
use tokio::task;
use tokio::time::{self, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::book::{Book, Target};
use super::host::HostFiles;
use super::ring::FINEST;
use crate::base::clock::Clock;
use crate::base::sample::Sample;
use crate::cluster::View;
use crate::sandbox::{Metered, Registry};
use crate::shim::client;

/// How often the registry is asked for guests while there are none.
const IDLE_INTERVAL: Duration = Duration::from_secs(1);
/// How often agents are asked. An agent wakes each second anyway; the question costs the daemon a
/// fraction of a millisecond.
const INSIDE_INTERVAL: Duration = Duration::from_secs(5);
/// Longest an agent may take: it has its answer ready.
const INSIDE_TIMEOUT: Duration = Duration::from_secs(1);
/// Agents asked at once.
const INSIDE_AT_ONCE: usize = 16;
/// How often what has ended or gone is dropped.
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);

/// The samples of this node's guests.
pub struct Metering {
    here: NodeId,
    registry: Arc<Registry>,
    view: View,
    clock: Arc<dyn Clock>,
    book: Book,
}

impl fmt::Debug for Metering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metering").finish_non_exhaustive()
    }
}

impl Metering {
    /// Of the guests of `registry`. What an earlier daemon left in `dir` is recalled once
    /// [`Self::watch_host`] runs.
    #[must_use]
    pub fn new(
        here: NodeId,
        registry: Arc<Registry>,
        view: View,
        clock: Arc<dyn Clock>,
        dir: PathBuf,
    ) -> Self {
        Self {
            here,
            registry,
            view,
            clock,
            book: Book::new(dir),
        }
    }

    /// The samples of the last `range` of a guest here, the earliest first.
    #[must_use]
    pub fn samples(&self, id: SandboxId, range: Duration) -> Vec<Sample> {
        self.book.samples(id, range, self.clock.now())
    }

    /// Looks at the host until `stop`.
    pub async fn watch_host(self: Arc<Self>, stop: CancellationToken) {
        self.on_files(|this| this.book.recall(this.clock.now()))
            .await;
        let mut swept = self.clock.now();
        // Not the idle one: an earlier daemon's guests may run.
        let mut interval = FINEST;
        loop {
            let rest = time::sleep(until_next(self.clock.now(), interval));
            if stop.run_until_cancelled(rest).await.is_none() {
                return;
            }
            let targets = self.targets().await;
            interval = if targets.is_empty() {
                IDLE_INTERVAL
            } else {
                self.on_files(move |this| {
                    this.book.look(&targets, &HostFiles, this.clock.as_ref());
                })
                .await;
                FINEST
            };
            let now = self.clock.now();
            let is_due = Duration::from_millis(now.0.abs_diff(swept.0)) >= SWEEP_INTERVAL;
            if is_due && self.book.len() > 0 {
                swept = now;
                self.on_files(move |this| this.sweep(now)).await;
            }
        }
    }

    /// Does work that reads files, one at a time. What panicked is missing, and the next is done.
    async fn on_files(self: &Arc<Self>, work: impl FnOnce(&Self) + Send + 'static) {
        let this = Arc::clone(self);
        let _done = task::spawn_blocking(move || work(&this)).await;
    }

    /// Asks the agents until `stop`.
    pub async fn watch_inside(self: Arc<Self>, stop: CancellationToken) {
        let mut ticks = time::interval(INSIDE_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            let guests = self.registry.metered().into_iter();
            let asked = guests.filter_map(|it| Some((it.id, it.guest?)));
            let asked = futures::stream::iter(asked).map(|(id, guest)| async move {
                let said = guest.load(INSIDE_TIMEOUT).await;
                (id, said)
            });
            let mut asked = asked.buffer_unordered(INSIDE_AT_ONCE);
            let work = async {
                while let Some((id, said)) = asked.next().await {
                    if let Ok(inside) = said {
                        self.book.heard(id, inside);
                    }
                }
            };
            stop.run_until_cancelled(work).await;
        }
    }

    /// Everything that is to be looked at. A VMM that was not seen before is asked for at its shim.
    async fn targets(&self) -> Vec<Target> {
        let mut targets = Vec::new();
        for metered in self.registry.metered() {
            let known = self.book.vmm(metered.id, metered.epoch);
            let pid = match known {
                Some(pid) => Some(pid),
                None => self.find_vmm(&metered).await,
            };
            targets.extend(pid.map(|pid| Target {
                id: metered.id,
                pid,
                overlay: metered.paths.overlay(),
            }));
        }
        targets
    }

    async fn find_vmm(&self, metered: &Metered) -> Option<u32> {
        let shim = client::connect(metered.paths.dir()).await.ok()?;
        let pid = shim.known_status().vmm_pid;
        let has_room = self.book.found(metered.id, metered.epoch, pid);
        has_room.then_some(pid)
    }

    /// Drops what has ended or gone elsewhere.
    fn sweep(&self, now: Stamp) {
        let state = self.view.state();
        if state.node(self.here).is_none() {
            // A state that is still being filled says nothing of what is here.
            return;
        }
        self.book.sweep(now, |id| {
            let sandbox = state.sandbox(id);
            sandbox.is_some_and(|it| it.owner == self.here && !it.phase.is_ended())
        });
    }
}

/// From `now` to the middle of the next period: whenever within a period a look is over, the next
/// period gets its own, and one that is skipped was too short for the look before.
fn until_next(now: Stamp, period: Duration) -> Duration {
    let period_ms = u64::try_from(period.as_millis()).unwrap_or(u64::MAX);
    let passed = Duration::from_millis(now.0 % period_ms.max(1));
    (period + period / 2).saturating_sub(passed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_period_has_one_look_in_its_middle_however_late_the_one_before_was() {
        for late_ms in 0..500 {
            let now = Stamp(7000 + late_ms);
            let next = now.0 + u64::try_from(until_next(now, FINEST).as_millis()).unwrap();
            assert_eq!(next, 7750);
        }
        assert_eq!(
            until_next(Stamp(7600), IDLE_INTERVAL),
            Duration::from_millis(900)
        );
    }
}

//! Takes the samples: two loops over the guests that run here, until they are told to stop.
//!
//! The host's loop reads files and waits for nobody. The other asks the agents, a few at a time, and
//! one that does not answer leaves what it said last. Neither counts as use of a capsule.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use proto::epoch::Epoch;
use proto::ids::{NodeId, SandboxId};
use proto::units::Stamp;
use tokio::task;
use tokio::time::{self, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::host::{self, Reading};
use super::ring::Rings;
use crate::base::clock::Clock;
use crate::base::sample::{Inside, Sample};
use crate::cluster::View;
use crate::sandbox::{Metered, Registry};
use crate::shim::client;

/// How often the host is looked at: what clients see has seconds.
const HOST_INTERVAL: Duration = Duration::from_secs(1);
/// How often agents are asked. An agent wakes each second anyway; the question costs the daemon a
/// fraction of a millisecond.
const INSIDE_INTERVAL: Duration = Duration::from_secs(5);
/// Longest an agent may take: it has its answer ready.
const INSIDE_TIMEOUT: Duration = Duration::from_secs(1);
/// Agents asked at once.
const INSIDE_AT_ONCE: usize = 16;
/// Guests whose samples are kept, also of those that rest: 256 MiB when all of them are full.
const MOST_GUESTS: usize = 4096;
/// How often what has ended or gone is dropped, in looks at the host.
const SWEEP_EVERY: u32 = 60;

/// The samples of this node's guests.
pub struct Metering {
    here: NodeId,
    registry: Arc<Registry>,
    view: View,
    clock: Arc<dyn Clock>,
    kept: Mutex<HashMap<SandboxId, Kept>>,
}

impl fmt::Debug for Metering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metering").finish_non_exhaustive()
    }
}

/// What is kept of one guest.
#[derive(Debug, Default)]
struct Kept {
    epoch: Epoch,
    rings: Rings,
    inside: Inside,
    /// The VMM, once its shim has named it, and the last look at it.
    vmm: Option<u32>,
    last: Option<(Stamp, Reading)>,
}

impl Kept {
    /// Takes a look at the host as a sample, which needs the one before.
    fn look(&mut self, at: Stamp, reading: Reading) {
        let before = self.last.replace((at, reading));
        let Some((then, before)) = before else {
            return;
        };
        let passed_ms = at.0.saturating_sub(then.0);
        if passed_ms == 0 {
            return;
        }
        let busy_ms = reading.busy_ms.saturating_sub(before.busy_ms);
        self.rings.push(Sample {
            at,
            busy_cores: ratio(busy_ms, passed_ms),
            resident_kib: reading.resident_kib,
            disk_kib: reading.disk_kib,
            sent_bytes: reading.sent_bytes,
            received_bytes: reading.received_bytes,
            inside: self.inside,
        });
    }
}

#[allow(clippy::cast_precision_loss)] // milliseconds of a second or so
fn ratio(part: u64, whole: u64) -> f32 {
    part as f32 / whole as f32
}

/// One guest to look at.
struct Target {
    id: SandboxId,
    pid: u32,
    overlay: PathBuf,
}

impl Metering {
    /// No samples yet, of the guests of `registry`.
    #[must_use]
    pub fn new(here: NodeId, registry: Arc<Registry>, view: View, clock: Arc<dyn Clock>) -> Self {
        Self {
            here,
            registry,
            view,
            clock,
            kept: Mutex::default(),
        }
    }

    /// The samples of the last `range` of a guest here, the earliest first.
    #[must_use]
    pub fn samples(&self, id: SandboxId, range: Duration) -> Vec<Sample> {
        let kept = self.kept();
        let rings = kept.get(&id).map(|kept| &kept.rings);
        rings.map_or_else(Vec::new, |rings| rings.last(range, self.clock.now()))
    }

    /// Looks at the host until `stop`.
    pub async fn watch_host(self: Arc<Self>, stop: CancellationToken) {
        let mut ticks = ticks(HOST_INTERVAL);
        for round in 1_u32.. {
            if stop.run_until_cancelled(ticks.tick()).await.is_none() {
                return;
            }
            let targets = self.targets().await;
            let this = Arc::clone(&self);
            // A look that panicked is one that is missing.
            let _looked = task::spawn_blocking(move || this.look(&targets)).await;
            if round % SWEEP_EVERY == 0 {
                self.sweep();
            }
        }
    }

    /// Asks the agents until `stop`.
    pub async fn watch_inside(self: Arc<Self>, stop: CancellationToken) {
        let mut ticks = ticks(INSIDE_INTERVAL);
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
                    if let (Ok(inside), Some(kept)) = (said, self.kept().get_mut(&id)) {
                        kept.inside = inside;
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
            let known = self.known_vmm(&metered);
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

    fn known_vmm(&self, metered: &Metered) -> Option<u32> {
        let kept = self.kept();
        let kept = kept.get(&metered.id)?;
        kept.vmm.filter(|_| kept.epoch == metered.epoch)
    }

    async fn find_vmm(&self, metered: &Metered) -> Option<u32> {
        let shim = client::connect(metered.paths.dir()).await.ok()?;
        let pid = shim.known_status().vmm_pid;
        let mut all = self.kept();
        if !all.contains_key(&metered.id) && all.len() >= MOST_GUESTS {
            return None;
        }
        let kept = all.entry(metered.id).or_default();
        kept.epoch = metered.epoch;
        (kept.vmm, kept.last) = (Some(pid), None);
        Some(pid)
    }

    fn look(&self, targets: &[Target]) {
        for target in targets {
            let reading = host::read(target.pid, &target.overlay);
            let at = self.clock.now();
            if let Some(kept) = self.kept().get_mut(&target.id) {
                match reading {
                    Some(reading) => kept.look(at, reading),
                    // Its shim names another, if there is one.
                    None => kept.vmm = None,
                }
            }
        }
    }

    /// Drops what has ended or gone elsewhere; where there is no room, what has rested longest.
    fn sweep(&self) {
        let state = self.view.state();
        let is_ours = |id: &SandboxId| {
            let sandbox = state.sandbox(*id);
            sandbox.is_some_and(|it| it.owner == self.here && !it.phase.is_ended())
        };
        let mut kept = self.kept();
        kept.retain(|id, _| is_ours(id));
        if kept.len() >= MOST_GUESTS {
            let oldest = kept.iter().min_by_key(|(_, it)| it.rings.newest());
            oldest.map(|(id, _)| *id).and_then(|id| kept.remove(&id));
        }
    }

    fn kept(&self) -> MutexGuard<'_, HashMap<SandboxId, Kept>> {
        // Every change leaves the table whole; a sample may be missing.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn ticks(interval: Duration) -> time::Interval {
    let mut ticks = time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    ticks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_what_was_used_between_two_looks() {
        let mut kept = Kept::default();
        let reading = |busy_ms| Reading {
            busy_ms,
            resident_kib: 7,
            ..Reading::default()
        };
        kept.look(Stamp(10_000), reading(500));
        let all = |kept: &Kept| kept.rings.last(Duration::from_secs(60), Stamp(12_000));
        assert!(all(&kept).is_empty(), "there is nothing to compare with");
        kept.look(Stamp(11_000), reading(2000));
        kept.look(Stamp(11_000), reading(3000));
        let samples = all(&kept);
        assert_eq!(samples.len(), 1, "no time has passed at the last look");
        assert!((samples[0].busy_cores - 1.5).abs() < 1e-3);
        assert_eq!(samples[0].resident_kib, 7);
    }
}

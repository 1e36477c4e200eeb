//! How busy a guest was: asked of the node that owns its sandbox.

use std::time::Duration;

use proto::ids::SandboxId;
use proto::units::Stamp;
use proto::wire::relay as pb;
use proto::wire::relay::answer::Answer;
use proto::wire::relay::question::Ask;

use super::error::RelayError;
use super::local::LocalGuests;
use super::locate::{ASK_TIMEOUT, Relay, off_topic, reachable};
use crate::base::sample::{Inside, Sample};

/// Samples in one answer: the finest tier has 600, and 1,024 of them take about 64 KiB.
const MOST_SAMPLES: usize = 1024;

impl Relay {
    /// The samples of the last `range` of a sandbox, the earliest first. Its owner has them, also of
    /// one that is paused, as long as its daemon runs.
    ///
    /// # Errors
    /// [`RelayError`] names what stands in the way.
    pub async fn samples(&self, id: SandboxId, range: Duration) -> Result<Vec<Sample>, RelayError> {
        let state = self.view().state();
        let sandbox = state.sandbox(id).ok_or(RelayError::NoSuchSandbox(id))?;
        if sandbox.owner == self.here() {
            return Ok(self.local().samples(id, range));
        }
        let target = reachable(&state, sandbox)?;
        let question = Ask::Samples(pb::Samples {
            sandbox: id.0.to_vec(),
            range_s: u32::try_from(range.as_secs()).unwrap_or(u32::MAX),
        });
        match self.ask(&target, question, ASK_TIMEOUT).await? {
            Answer::Samples(known) => Ok(told(known)),
            _ => Err(off_topic(&target)),
        }
    }
}

/// The owner's answer.
pub(super) fn known(local: &dyn LocalGuests, id: SandboxId, range_s: u32) -> pb::SamplesKnown {
    let samples = local.samples(id, Duration::from_secs(range_s.into()));
    let newest = samples.len().saturating_sub(MOST_SAMPLES);
    pb::SamplesKnown {
        samples: samples[newest..].iter().map(Into::into).collect(),
    }
}

/// What another node answered: no more than it may.
fn told(known: pb::SamplesKnown) -> Vec<Sample> {
    let samples = known.samples.into_iter().take(MOST_SAMPLES);
    samples.map(Into::into).collect()
}

impl From<&Sample> for pb::Sample {
    fn from(sample: &Sample) -> Self {
        Self {
            at_ms: sample.at.0,
            busy_cores: sample.busy_cores,
            resident_kib: sample.resident_kib,
            disk_kib: sample.disk_kib,
            sent_bytes: sample.sent_bytes,
            received_bytes: sample.received_bytes,
            mem_used_kib: sample.inside.mem_used_kib,
            mem_total_kib: sample.inside.mem_total_kib,
            mem_cache_kib: sample.inside.mem_cache_kib,
            disk_used_kib: sample.inside.disk_used_kib,
            disk_total_kib: sample.inside.disk_total_kib,
        }
    }
}

impl From<pb::Sample> for Sample {
    fn from(sample: pb::Sample) -> Self {
        Self {
            at: Stamp(sample.at_ms),
            // Another node may say anything; a client is told numbers.
            busy_cores: if sample.busy_cores.is_finite() {
                sample.busy_cores
            } else {
                0.0
            },
            resident_kib: sample.resident_kib,
            disk_kib: sample.disk_kib,
            sent_bytes: sample.sent_bytes,
            received_bytes: sample.received_bytes,
            inside: Inside {
                mem_used_kib: sample.mem_used_kib,
                mem_total_kib: sample.mem_total_kib,
                mem_cache_kib: sample.mem_cache_kib,
                disk_used_kib: sample.disk_used_kib,
                disk_total_kib: sample.disk_total_kib,
            },
        }
    }
}

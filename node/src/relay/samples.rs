//! How busy a guest was: asked of the node that owns its sandbox.

use std::time::Duration;

use proto::ids::SandboxId;
use proto::units::Stamp;
use proto::wire::relay as pb;
use proto::wire::relay::answer::Answer;
use proto::wire::relay::question::Ask;
use transport::limits::FRAME_BYTES;

use super::error::RelayError;
use super::local::LocalGuests;
use super::locate::{ASK_TIMEOUT, Relay, off_topic, reachable};
use crate::base::sample::{Inside, MOST_SAMPLES, Sample};

/// Most bytes of a sample on the wire: its fields, each with a tag, and its own tag and length. An
/// answer of [`MOST_SAMPLES`] takes 192 KiB at most.
const SAMPLE_BYTES: usize = 96;
/// Samples that an earlier release takes, which does not say so: of more, it takes the earliest.
const MOST_UNSAID: usize = 1024;

const _: () = assert!(MOST_SAMPLES * SAMPLE_BYTES < FRAME_BYTES / 8);

impl Relay {
    /// The samples of the last `range` of a sandbox, the earliest first. Its owner has them, also of
    /// one that is paused.
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
            most: u32::try_from(MOST_SAMPLES).unwrap_or(u32::MAX),
        });
        match self.ask(&target, question, ASK_TIMEOUT).await? {
            Answer::Samples(known) => Ok(told(known)),
            _ => Err(off_topic(&target)),
        }
    }
}

/// The owner's answer: of more samples than the other takes, the newest.
pub(super) fn known(
    local: &dyn LocalGuests,
    id: SandboxId,
    asked: &pb::Samples,
) -> pb::SamplesKnown {
    let samples = local.samples(id, Duration::from_secs(asked.range_s.into()));
    let most = match asked.most {
        0 => MOST_UNSAID,
        most => usize::try_from(most).map_or(MOST_SAMPLES, |most| most.min(MOST_SAMPLES)),
    };
    let newest = samples.len().saturating_sub(most);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Guest;
    use crate::relay::LocalFacts;
    use proto::epoch::Epoch;

    const ID: SandboxId = SandboxId([7; 16]);

    /// A node that keeps so many samples of whomever; each has its number.
    #[derive(Debug)]
    struct Keeps(u64);

    impl LocalGuests for Keeps {
        fn guest(&self, _: SandboxId, _: Epoch) -> Option<Guest> {
            None
        }

        fn touch(&self, _: SandboxId) {}

        fn facts(&self, _: SandboxId) -> Option<LocalFacts> {
            None
        }

        fn samples(&self, _: SandboxId, _: Duration) -> Vec<Sample> {
            let sample = |number| Sample {
                at: Stamp(number),
                ..Sample::default()
            };
            (0..self.0).map(sample).collect()
        }

        fn console_tail(&self, _: SandboxId, _: usize) -> Option<Vec<u8>> {
            None
        }
    }

    fn first_and_count(kept: u64, most: u32) -> (u64, usize) {
        let asked = pb::Samples {
            most,
            ..pb::Samples::default()
        };
        let known = known(&Keeps(kept), ID, &asked);
        let told = told(known);
        (told[0].at.0, told.len())
    }

    #[test]
    fn who_takes_fewer_samples_is_told_the_newest() {
        assert_eq!(first_and_count(1201, 2048), (0, 1201));
        assert_eq!(first_and_count(1201, 0), (177, 1024), "an earlier release");
        assert_eq!(first_and_count(1201, 100), (1101, 100));
        assert_eq!(first_and_count(5000, u32::MAX), (2952, 2048));
    }

    #[test]
    fn no_sample_takes_more_of_an_answer_than_is_reckoned_with() {
        let most = Sample {
            at: Stamp(u64::MAX),
            busy_cores: f32::MAX,
            resident_kib: u32::MAX,
            disk_kib: u32::MAX,
            sent_bytes: u64::MAX,
            received_bytes: u64::MAX,
            inside: Inside {
                mem_used_kib: u32::MAX,
                mem_total_kib: u32::MAX,
                mem_cache_kib: u32::MAX,
                disk_used_kib: u32::MAX,
                disk_total_kib: u32::MAX,
            },
        };
        let known = pb::SamplesKnown {
            samples: vec![(&most).into()],
        };
        assert!(prost::Message::encoded_len(&known) <= SAMPLE_BYTES);
    }
}

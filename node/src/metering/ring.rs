//! The samples of one guest, finer ones for a shorter time. Pure.

use std::collections::VecDeque;
use std::time::Duration;

use proto::units::Stamp;

use crate::base::sample::Sample;

/// Period and count of each tier: 10 minutes, 2 hours, a day. Some 60 KiB a guest when all are full.
const TIERS: [(u64, usize); 3] = [(1_000, 600), (30_000, 240), (300_000, 288)];

/// The samples of one guest.
#[derive(Debug)]
pub(super) struct Rings([Tier; TIERS.len()]);

impl Default for Rings {
    fn default() -> Self {
        Self(TIERS.map(|(period_ms, most)| Tier {
            period_ms,
            most,
            kept: VecDeque::new(),
            open: None,
        }))
    }
}

#[derive(Debug)]
struct Tier {
    period_ms: u64,
    most: usize,
    kept: VecDeque<Sample>,
    /// The period that has not ended yet.
    open: Option<Open>,
}

/// Samples of one period: processors are averaged, of everything else the last counts.
#[derive(Clone, Copy, Debug)]
struct Open {
    cores: f32,
    count: u16,
    last: Sample,
}

impl Open {
    fn mean(self) -> Sample {
        Sample {
            busy_cores: self.cores / f32::from(self.count.max(1)),
            ..self.last
        }
    }
}

impl Tier {
    fn push(&mut self, sample: Sample) {
        let period = |it: &Sample| it.at.0 / self.period_ms;
        match &mut self.open {
            Some(open) if period(&open.last) == period(&sample) => {
                open.cores += sample.busy_cores;
                open.count = open.count.saturating_add(1);
                open.last = sample;
            }
            open => {
                let ended = open.replace(Open {
                    cores: sample.busy_cores,
                    count: 1,
                    last: sample,
                });
                self.kept.extend(ended.map(Open::mean));
            }
        }
        if self.kept.len() > self.most {
            self.kept.pop_front();
        }
    }

    fn reach(&self) -> Duration {
        Duration::from_millis(self.period_ms) * u32::try_from(self.most).unwrap_or(u32::MAX)
    }

    fn since(&self, from: Stamp) -> Vec<Sample> {
        let open = self.open.map(Open::mean);
        let all = self.kept.iter().copied().chain(open);
        all.filter(|it| it.at >= from).collect()
    }
}

impl Rings {
    /// Adds a sample. One of the same second as another is taken together with it.
    pub(super) fn push(&mut self, sample: Sample) {
        for tier in &mut self.0 {
            tier.push(sample);
        }
    }

    /// The samples of the last `range` before `now`, the earliest first, as fine as they reach.
    pub(super) fn last(&self, range: Duration, now: Stamp) -> Vec<Sample> {
        let range_ms = u64::try_from(range.as_millis()).unwrap_or(u64::MAX);
        let from = Stamp(now.0.saturating_sub(range_ms));
        let [.., coarse] = &self.0;
        let fit = self.0.iter().find(|tier| tier.reach() >= range);
        fit.unwrap_or(coarse).since(from)
    }

    /// When the last sample was taken.
    pub(super) fn newest(&self) -> Stamp {
        let open = self.0[0].open.as_ref();
        open.map_or(Stamp::default(), |open| open.last.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    /// A guest that was busy with as many cores as minutes have passed, for so many seconds.
    fn rings(seconds: u64) -> Rings {
        let mut rings = Rings::default();
        for second in 0..seconds {
            rings.push(Sample {
                at: Stamp(second * 1000),
                busy_cores: f32::from(u16::try_from(second / 60).unwrap_or(u16::MAX)),
                resident_kib: u32::try_from(second).unwrap_or(u32::MAX),
                ..Sample::default()
            });
        }
        rings
    }

    #[test]
    fn ten_minutes_are_kept_by_the_second_and_a_day_by_five_minutes() {
        let seconds = 26 * 3600;
        let (rings, now) = (rings(seconds), Stamp(seconds * 1000));
        assert_eq!(rings.last(10 * MINUTE, now).len(), 600);
        assert_eq!(rings.last(5 * MINUTE, now).len(), 300);
        assert_eq!(rings.last(120 * MINUTE, now).len(), 240);
        assert_eq!(rings.last(24 * 60 * MINUTE, now).len(), 288);
        assert!(rings.last(7 * 24 * 60 * MINUTE, now).len() <= 289);
    }

    #[test]
    fn a_coarse_sample_is_the_mean_of_its_processors_and_the_last_of_the_rest() {
        let (rings, now) = (rings(600), Stamp(600_000));
        let coarse = rings.last(12 * 60 * MINUTE, now);
        let cores: Vec<f32> = coarse.iter().map(|it| it.busy_cores).collect();
        assert_eq!(
            cores,
            [2.0, 7.0],
            "minutes 0 to 4, and 5 to 9 although they have not ended"
        );
        assert_eq!(coarse[0].resident_kib, 299);
    }

    #[test]
    fn what_is_older_than_asked_for_is_left_out() {
        let rings = rings(60);
        assert_eq!(rings.last(MINUTE, Stamp(90_000)).len(), 30);
        assert!(rings.last(MINUTE, Stamp(900_000)).is_empty());
        assert_eq!(rings.newest(), Stamp(59_000));
    }
}

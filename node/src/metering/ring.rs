//! The samples of one guest, finer ones for a shorter time. Pure.
//!
//! Each period of each tier has a place of its own among [`PLACES`], which a later period takes
//! over when the tier is full: whoever keeps the samples elsewhere overwrites places, and needs
//! nothing more to stay in bounds.

use std::collections::VecDeque;
use std::mem;
use std::ops::Range;
use std::time::Duration;

use proto::units::Stamp;

use crate::base::sample::{MOST_SAMPLES, Sample};

/// Period of the finest tier.
pub(super) const FINEST: Duration = Duration::from_millis(500);
/// Period and count of each tier: 10 minutes, 2 hours, a day.
const TIERS: [(u64, usize); 3] = [(500, 1200), (30_000, 240), (300_000, 288)];
/// Places of all tiers.
pub(super) const PLACES: usize = TIERS[0].1 + TIERS[1].1 + TIERS[2].1;

const _: () = assert!(FINEST.as_millis() == TIERS[0].0 as u128);
// A tier and the period of it that goes on.
const _: () = assert!(TIERS[0].1 < MOST_SAMPLES);
const _: () = assert!(TIERS[1].1 < MOST_SAMPLES && TIERS[2].1 < MOST_SAMPLES);
// 95 KiB a guest when all tiers are full.
const _: () = assert!(mem::size_of::<Sample>() * PLACES <= 95 * 1024);

/// A sample and the place where it is kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Placed {
    pub(super) place: usize,
    pub(super) sample: Sample,
}

/// The samples of one guest.
#[derive(Debug)]
pub(super) struct Rings([Tier; TIERS.len()]);

impl Default for Rings {
    fn default() -> Self {
        let mut first = 0;
        Self(TIERS.map(|(period_ms, most)| {
            let places = first..first + most;
            first += most;
            Tier {
                period_ms,
                places,
                kept: VecDeque::new(),
                open: None,
            }
        }))
    }
}

#[derive(Debug)]
struct Tier {
    period_ms: u64,
    /// As many as samples are kept.
    places: Range<usize>,
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
    /// Adds a sample; tells the one of the period that it has ended, if it has.
    fn push(&mut self, sample: Sample) -> Option<Placed> {
        match &mut self.open {
            Some(open) if open.last.at.0 / self.period_ms == sample.at.0 / self.period_ms => {
                open.cores += sample.busy_cores;
                open.count = open.count.saturating_add(1);
                open.last = sample;
                None
            }
            open => {
                let ended = open.replace(Open {
                    cores: sample.busy_cores,
                    count: 1,
                    last: sample,
                });
                let ended = ended.map(Open::mean)?;
                self.keep(ended);
                Some(self.placed(ended))
            }
        }
    }

    fn keep(&mut self, sample: Sample) {
        let most = self.places.len();
        if self.kept.len() == most {
            self.kept.pop_front();
        }
        if self.kept.len() == self.kept.capacity() {
            // Never beyond what is kept at most, which doubling as it likes would.
            let more = self.kept.len().max(16).min(most - self.kept.len());
            self.kept.reserve_exact(more);
        }
        self.kept.push_back(sample);
    }

    fn placed(&self, sample: Sample) -> Placed {
        let period = sample.at.0 / self.period_ms;
        let within = usize::try_from(period % self.places.len() as u64).unwrap_or_default();
        Placed {
            place: self.places.start + within,
            sample,
        }
    }

    /// The earliest first.
    fn placed_here(&self, all: &[Placed]) -> Vec<Sample> {
        let here = all.iter().filter(|it| self.places.contains(&it.place));
        let mut here: Vec<_> = here.map(|it| it.sample).collect();
        here.sort_by_key(|it| it.at);
        here
    }

    fn open_now(&self) -> Option<Placed> {
        self.open.map(|open| self.placed(open.mean()))
    }

    fn latest(&self) -> Option<Sample> {
        let open = self.open.map(Open::mean);
        open.or_else(|| self.kept.back().copied())
    }

    fn newest(&self) -> Option<Stamp> {
        self.latest().map(|it| it.at)
    }

    fn reach(&self) -> Duration {
        let count = u32::try_from(self.places.len()).unwrap_or(u32::MAX);
        Duration::from_millis(self.period_ms) * count
    }

    fn since(&self, from: Stamp) -> Vec<Sample> {
        let open = self.open.map(Open::mean);
        let all = self.kept.iter().copied().chain(open);
        all.filter(|it| it.at >= from).collect()
    }

    fn forget(&mut self, now: Stamp) {
        let from = before(now, self.reach());
        while self.kept.front().is_some_and(|it| it.at < from) {
            self.kept.pop_front();
        }
        if self.kept.len() < self.kept.capacity() / 2 {
            self.kept.shrink_to_fit();
        }
        self.open = self.open.filter(|it| it.last.at >= from);
        self.drop_later(now);
    }

    /// Drops what a clock that was set back has made later than `now`: it would hide what comes.
    fn drop_later(&mut self, now: Stamp) {
        while self.kept.back().is_some_and(|it| it.at > now) {
            self.kept.pop_back();
        }
        self.open = self.open.filter(|it| it.last.at <= now);
    }
}

impl Rings {
    /// The rings that left `found` in its places, as of `now`.
    pub(super) fn recalled(mut found: Vec<Placed>, now: Stamp) -> Self {
        // As `Tier::drop_later`.
        found.retain(|it| it.sample.at <= now);
        let mut rings = Self::default();
        let [finest, coarse @ ..] = &mut rings.0;
        let fine = finest.placed_here(&found);
        for tier in coarse {
            tier.placed_here(&found)
                .into_iter()
                .for_each(|it| tier.keep(it));
            // Its open period was in no place yet, but what it is made of is in finer ones.
            let period_ms = tier.period_ms;
            let ended = tier.newest().map(|it| it.0 / period_ms);
            let open = fine.iter().filter(|it| ended < Some(it.at.0 / period_ms));
            for sample in open {
                tier.push(*sample);
            }
        }
        for sample in fine {
            finest.push(sample);
        }
        rings.forget(now);
        rings
    }

    /// Adds a sample; one of the same period as another is taken together with it. Tells what is
    /// in its place now: the finest sample, and of coarser ones those that have ended by it.
    pub(super) fn push(&mut self, sample: Sample) -> impl Iterator<Item = Placed> + use<> {
        if self.newest() > Some(sample.at) {
            self.0.iter_mut().for_each(|it| it.drop_later(sample.at));
        }
        let [finest, coarse @ ..] = &mut self.0;
        finest.push(sample);
        let [hours, day] = coarse.each_mut().map(|tier| tier.push(sample));
        [finest.open_now(), hours, day].into_iter().flatten()
    }

    /// Drops what has grown too old for anybody to ask for.
    pub(super) fn forget(&mut self, now: Stamp) {
        for tier in &mut self.0 {
            tier.forget(now);
        }
    }

    /// The samples of the last `range` before `now`, the earliest first, as fine as they reach.
    pub(super) fn last(&self, range: Duration, now: Stamp) -> Vec<Sample> {
        let [.., coarse] = &self.0;
        let fit = self.0.iter().find(|tier| tier.reach() >= range);
        fit.unwrap_or(coarse).since(before(now, range))
    }

    /// When the last sample was taken; `None` where there is none.
    pub(super) fn newest(&self) -> Option<Stamp> {
        self.latest().map(|it| it.at)
    }

    /// The last sample; `None` where there is none.
    pub(super) fn latest(&self) -> Option<Sample> {
        let latest = self.0.iter().filter_map(Tier::latest);
        latest.max_by_key(|it| it.at)
    }
}

fn before(now: Stamp, by: Duration) -> Stamp {
    let by_ms = u64::try_from(by.as_millis()).unwrap_or(u64::MAX);
    Stamp(now.0.saturating_sub(by_ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);
    const DAY: Duration = Duration::from_secs(24 * 3600);

    /// A sample every half second: of a guest that keeps as many cores busy as minutes have passed.
    fn samples(halves: Range<u64>) -> impl Iterator<Item = Sample> {
        halves.map(|half| Sample {
            at: Stamp(half * 500),
            busy_cores: f32::from(u16::try_from(half / 120).unwrap_or(u16::MAX)),
            resident_kib: u32::try_from(half).unwrap_or(u32::MAX),
            ..Sample::default()
        })
    }

    fn rings(halves: u64) -> Rings {
        let mut rings = Rings::default();
        for sample in samples(0..halves) {
            drop(rings.push(sample));
        }
        rings
    }

    #[test]
    fn ten_minutes_are_kept_by_half_seconds_and_a_day_by_five_minutes() {
        let halves = 26 * 7200;
        let (rings, now) = (rings(halves), Stamp(halves * 500));
        assert_eq!(rings.last(10 * MINUTE, now).len(), 1200);
        assert_eq!(rings.last(5 * MINUTE, now).len(), 600);
        assert_eq!(rings.last(120 * MINUTE, now).len(), 240);
        assert_eq!(rings.last(DAY, now).len(), 288);
        assert!(rings.last(7 * DAY, now).len() <= 289);
    }

    #[test]
    fn full_rings_hold_no_more_memory_than_their_places_need() {
        let rings = rings(26 * 7200);
        let places: usize = rings.0.iter().map(|tier| tier.kept.capacity()).sum();
        assert_eq!(places, PLACES);
    }

    #[test]
    fn a_guest_that_rests_gives_its_finer_samples_back() {
        let mut rings = rings(26 * 7200);
        let now = Stamp(27 * 3_600_000);
        rings.forget(now);
        assert_eq!(rings.0[0].kept.capacity(), 0);
        assert_eq!(rings.last(DAY, now).len(), 276);
        rings.forget(Stamp(51 * 3_600_000));
        assert_eq!(rings.newest(), None);
    }

    #[test]
    fn a_coarse_sample_is_the_mean_of_its_processors_and_the_last_of_the_rest() {
        let (rings, now) = (rings(1200), Stamp(600_000));
        let coarse = rings.last(12 * 60 * MINUTE, now);
        let cores: Vec<f32> = coarse.iter().map(|it| it.busy_cores).collect();
        assert_eq!(
            cores,
            [2.0, 7.0],
            "minutes 0 to 4, and 5 to 9 although they have not ended"
        );
        assert_eq!(coarse[0].resident_kib, 599);
    }

    #[test]
    fn what_is_older_than_asked_for_is_left_out() {
        let rings = rings(120);
        assert_eq!(rings.last(MINUTE, Stamp(90_000)).len(), 60);
        assert!(rings.last(MINUTE, Stamp(900_000)).is_empty());
        assert_eq!(rings.newest(), Some(Stamp(59_500)));
    }

    #[test]
    fn what_lies_in_the_places_makes_the_same_rings_again() {
        // Whatever periods are open at that moment, and however often places were taken over.
        for halves in [1, 59, 60, 61, 1200, 7 * 7200 + 77, 26 * 7200 + 599] {
            let mut rings = Rings::default();
            let mut places = vec![None; PLACES];
            for sample in samples(0..halves) {
                for placed in rings.push(sample) {
                    places[placed.place] = Some(placed);
                }
            }
            let now = Stamp(halves * 500);
            let found = places.into_iter().flatten().collect();
            let again = Rings::recalled(found, now);
            for minutes in [5, 10, 60, 120, 360, 1440] {
                let range = minutes * MINUTE;
                assert_eq!(again.last(range, now), rings.last(range, now), "{halves}");
            }
        }
    }

    #[test]
    fn what_a_clock_that_was_ahead_has_left_is_not_recalled() {
        let mut rings = Rings::default();
        let placed = samples(0..10).flat_map(|it| rings.push(it)).collect();
        let now = Stamp(2000);
        let again = Rings::recalled(placed, now);
        assert_eq!(again.newest(), Some(now));
        assert_eq!(again.last(MINUTE, now).len(), 5);
    }
}

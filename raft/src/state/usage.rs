//! What each team's guests have taken: counted when a sandbox changes, never sampled.
//!
//! A row is one team's day, by Coordinated Universal Time, in hours. Whoever reads it adds what runs
//! still: [`State::usage_until`]. Rows are kept for [`KEPT_DAYS`] days on which anything ran.
//!
//! ```text
//! change   Running --------- Running (labels) ------- Paused ...... Running ---------> now
//! counted          '- then -'                '- then -'                    '- on read -'
//! ```

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use proto::ids::TeamId;
use proto::units::Stamp;
use proto::wire::raft as pb;

use super::rows::BadRow;
use super::{Sandbox, State};
use crate::wire::array;

/// Days of one team's that are kept: longer than the 92 that may be asked for at once.
const KEPT_DAYS: u32 = 100;

const HOUR_MS: u64 = 3_600_000;
const HOURS: u32 = 24;

/// A day, counted from the Unix epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Day(pub u32);

/// An hour, counted from the Unix epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Hour(u64);

impl Hour {
    const fn of(at: Stamp) -> Self {
        Self(at.0 / HOUR_MS)
    }

    const fn start(self) -> Stamp {
        Stamp(self.0.saturating_mul(HOUR_MS))
    }

    fn day(self) -> Day {
        Day(u32::try_from(self.0 / u64::from(HOURS)).unwrap_or(u32::MAX))
    }

    fn of_day(self) -> u32 {
        // Less than 24.
        u32::try_from(self.0 % u64::from(HOURS)).unwrap_or_default()
    }
}

impl Day {
    /// The day of an instant.
    #[must_use]
    pub fn of(at: Stamp) -> Self {
        Hour::of(at).day()
    }

    /// Its first instant.
    #[must_use]
    pub const fn start(self) -> Stamp {
        // Widening: a u32 always fits.
        Hour(self.0 as u64 * HOURS as u64).start()
    }
}

/// What of a team's runs at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TeamLoad {
    /// Sandboxes whose guests run.
    pub sandboxes: u32,
    /// Their processors.
    pub vcpus: u32,
    /// Their memory, in MiB.
    pub memory_mib: u64,
}

impl TeamLoad {
    /// What one sandbox adds while its guest runs.
    pub(crate) fn of(sandbox: &Sandbox) -> Self {
        Self {
            sandboxes: 1,
            vcpus: sandbox.spec.vcpus,
            memory_mib: sandbox.spec.memory.0.into(),
        }
    }

    pub(super) const fn plus(self, other: Self) -> Self {
        Self {
            sandboxes: self.sandboxes.saturating_add(other.sandboxes),
            vcpus: self.vcpus.saturating_add(other.vcpus),
            memory_mib: self.memory_mib.saturating_add(other.memory_mib),
        }
    }

    pub(super) const fn less(self, other: Self) -> Self {
        Self {
            sandboxes: self.sandboxes.saturating_sub(other.sandboxes),
            vcpus: self.vcpus.saturating_sub(other.vcpus),
            memory_mib: self.memory_mib.saturating_sub(other.memory_mib),
        }
    }

    /// The larger of each.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            sandboxes: self.sandboxes.max(other.sandboxes),
            vcpus: self.vcpus.max(other.vcpus),
            memory_mib: self.memory_mib.max(other.memory_mib),
        }
    }
}

/// What a team's guests took in some time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processors times milliseconds.
    pub vcpu_ms: u64,
    /// MiB of memory times milliseconds.
    pub mib_ms: u64,
    /// Sandboxes times milliseconds.
    pub sandbox_ms: u64,
    /// Sandboxes that were asked for.
    pub created: u32,
    /// The most of each that ran at once, as far as anything began or ended then.
    pub peak: TeamLoad,
}

impl Usage {
    fn run(&mut self, load: TeamLoad, ms: u64) {
        let add = |sum: &mut u64, of: u64| *sum = sum.saturating_add(of.saturating_mul(ms));
        add(&mut self.vcpu_ms, load.vcpus.into());
        add(&mut self.mib_ms, load.memory_mib);
        add(&mut self.sandbox_ms, load.sandboxes.into());
    }

    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            vcpu_ms: self.vcpu_ms.saturating_add(other.vcpu_ms),
            mib_ms: self.mib_ms.saturating_add(other.mib_ms),
            sandbox_ms: self.sandbox_ms.saturating_add(other.sandbox_ms),
            created: self.created.saturating_add(other.created),
            peak: self.peak.max(other.peak),
        }
    }
}

/// One team's day, by the hour.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UsageDay {
    /// Whose.
    pub team: TeamId,
    /// Which day.
    pub day: Day,
    /// What was taken in each hour in which anything was, 0 to 23.
    pub hours: BTreeMap<u32, Usage>,
}

impl UsageDay {
    /// All of the day.
    #[must_use]
    pub fn total(&self) -> Usage {
        let hours = self.hours.values();
        hours.fold(Usage::default(), |sum, hour| sum.plus(*hour))
    }
}

/// Days of one team, as they are added to.
#[derive(Clone, Debug, Default)]
pub struct UsageBook {
    team: TeamId,
    days: BTreeMap<Day, UsageDay>,
}

impl UsageBook {
    /// What is written of `team`, before anything is added.
    pub(crate) const fn new(team: TeamId) -> Self {
        Self {
            team,
            days: BTreeMap::new(),
        }
    }

    /// Whose it is.
    pub(crate) const fn team(&self) -> TeamId {
        self.team
    }

    /// The days that were added to.
    #[must_use]
    pub const fn days(&self) -> &BTreeMap<Day, UsageDay> {
        &self.days
    }

    /// The same, to be kept.
    pub(crate) fn into_days(self) -> BTreeMap<Day, UsageDay> {
        self.days
    }

    /// Adds what `load` takes by running for a while. Of a very long while the last days count.
    pub(crate) fn run(&mut self, state: &State, load: TeamLoad, from: Stamp, until: Stamp) {
        let until = until.min(Day(u32::MAX).start());
        let first_kept = Day::of(until).0.saturating_sub(KEPT_DAYS - 1);
        let mut at = from.max(Day(first_kept).start());
        while at < until {
            let hour = Hour::of(at);
            let end = Hour(hour.0 + 1).start().min(until);
            self.slot(state, hour).run(load, end.0 - at.0);
            at = end;
        }
    }

    /// Counts a sandbox that was asked for.
    pub(crate) fn create(&mut self, state: &State, at: Stamp) {
        let slot = self.slot(state, Hour::of(at));
        slot.created = slot.created.saturating_add(1);
    }

    /// Notes how much ran at an instant.
    pub(crate) fn peak(&mut self, state: &State, load: TeamLoad, at: Stamp) {
        let slot = self.slot(state, Hour::of(at));
        slot.peak = slot.peak.max(load);
    }

    fn slot(&mut self, state: &State, hour: Hour) -> &mut Usage {
        let (team, day) = (self.team, hour.day());
        let known = self.days.entry(day).or_insert_with(|| {
            let known = state.usage_of(team, day).cloned();
            known.unwrap_or_else(|| UsageDay {
                team,
                day,
                hours: BTreeMap::new(),
            })
        });
        known.hours.entry(hour.of_day()).or_default()
    }
}

impl State {
    /// What one team took on one day, without what runs still.
    #[must_use]
    pub fn usage_of(&self, team: TeamId, day: Day) -> Option<&UsageDay> {
        self.usage.get(&(team, day))
    }

    /// What of a team's runs now.
    #[must_use]
    pub fn load_of(&self, team: TeamId) -> TeamLoad {
        self.tally.load_of(team)
    }

    /// What a team took on these days, with what has run up to `now` of what runs still. Days on
    /// which nothing ran are left out.
    #[must_use]
    pub fn usage_until(
        &self,
        team: TeamId,
        days: RangeInclusive<Day>,
        now: Stamp,
    ) -> Vec<UsageDay> {
        let mut book = UsageBook::new(team);
        for known in self.sandboxes_of(team).filter(|it| it.phase.runs_guest()) {
            let until = self.counted_until(known, now);
            book.run(self, TeamLoad::of(known), known.updated_at, until);
        }
        let (first, last) = days.into_inner();
        if first > last {
            return Vec::new();
        }
        let mut all: BTreeMap<Day, UsageDay> = self
            .usage
            .range((team, first)..=(team, last))
            .map(|((_, day), known)| (*day, known.clone()))
            .collect();
        all.extend(
            book.days
                .into_iter()
                .filter(|(day, _)| (first..=last).contains(day)),
        );
        all.into_values().collect()
    }

    /// Until when a guest that runs counts, if that ends `at`. Of a node that is missing nobody can
    /// say: it counts once the node is back, and else up to when the node was last heard of.
    pub(crate) fn counted_until(&self, sandbox: &Sandbox, at: Stamp) -> Stamp {
        let owner = self.node(sandbox.owner);
        let since = owner.and_then(|node| node.liveness.since());
        since.map_or(at, |since| since.min(at))
    }

    /// Every day of every team's, by team and day.
    pub fn all_usage(&self) -> impl Iterator<Item = &UsageDay> {
        self.usage.values()
    }

    pub(crate) fn put_usage(&mut self, day: UsageDay) {
        self.usage.insert_mut((day.team, day.day), day);
    }

    pub(crate) fn drop_usage(&mut self, team: TeamId, day: Day) {
        self.usage.remove_mut(&(team, day));
    }

    /// The days of a team's that are more than are kept, the earliest first.
    pub(crate) fn outdated_usage(&self, team: TeamId) -> Vec<Day> {
        let days = self.usage.range((team, Day(0))..=(team, Day(u32::MAX)));
        let days: Vec<Day> = days.map(|((_, day), _)| *day).collect();
        let gone = days.len().saturating_sub(KEPT_DAYS as usize);
        days[..gone].to_vec()
    }
}

impl From<TeamLoad> for pb::TeamLoad {
    fn from(load: TeamLoad) -> Self {
        Self {
            sandboxes: load.sandboxes,
            vcpus: load.vcpus,
            memory_mib: load.memory_mib,
        }
    }
}

impl From<pb::TeamLoad> for TeamLoad {
    fn from(row: pb::TeamLoad) -> Self {
        Self {
            sandboxes: row.sandboxes,
            vcpus: row.vcpus,
            memory_mib: row.memory_mib,
        }
    }
}

impl From<&UsageDay> for pb::UsageRow {
    fn from(day: &UsageDay) -> Self {
        let hours = day.hours.iter().map(|(hour, usage)| pb::UsageHour {
            hour: *hour,
            vcpu_ms: usage.vcpu_ms,
            mib_ms: usage.mib_ms,
            sandbox_ms: usage.sandbox_ms,
            created: usage.created,
            peak: Some(usage.peak.into()),
        });
        Self {
            team: day.team.0.to_vec(),
            day: day.day.0,
            hours: hours.collect(),
        }
    }
}

impl TryFrom<pb::UsageRow> for UsageDay {
    type Error = BadRow;

    fn try_from(row: pb::UsageRow) -> Result<Self, BadRow> {
        let hour = |it: pb::UsageHour| {
            let usage = Usage {
                vcpu_ms: it.vcpu_ms,
                mib_ms: it.mib_ms,
                sandbox_ms: it.sandbox_ms,
                created: it.created,
                peak: it.peak.unwrap_or_default().into(),
            };
            (it.hour < HOURS)
                .then_some((it.hour, usage))
                .ok_or(BadRow::Unknown("hour of a day"))
        };
        Ok(Self {
            team: TeamId(array("team id", &row.team)?),
            day: Day(row.day),
            hours: row.hours.into_iter().map(hour).collect::<Result<_, _>>()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_over_midnight_counts_on_both_days() {
        let state = State::default();
        let mut book = UsageBook::new(TeamId::default());
        let midnight = Day(20_000).start();
        let load = TeamLoad {
            sandboxes: 1,
            vcpus: 2,
            memory_mib: 512,
        };
        let (from, until) = (Stamp(midnight.0 - 60_000), Stamp(midnight.0 + 30_000));
        book.run(&state, load, from, until);
        let vcpu_ms: Vec<_> = book.days().values().map(|it| it.total().vcpu_ms).collect();
        assert_eq!(vcpu_ms, [120_000, 60_000]);
        let last = &book.days()[&Day(19_999)];
        assert_eq!(last.hours.keys().copied().collect::<Vec<_>>(), [23]);
    }

    #[test]
    fn a_clock_that_is_far_ahead_costs_as_many_days_as_are_kept() {
        let mut book = UsageBook::new(TeamId::default());
        let load = TeamLoad::default();
        book.run(&State::default(), load, Stamp(1), Stamp(u64::MAX));
        assert!(book.days().len() <= KEPT_DAYS as usize);
        let mut book = UsageBook::new(TeamId::default());
        book.run(&State::default(), load, Stamp(9), Stamp(3));
        assert!(book.days().is_empty(), "nothing runs backwards");
    }
}

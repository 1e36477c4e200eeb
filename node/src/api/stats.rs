//! How much of a team's runs at once: now, at most, and over time.
//!
//! Nothing is sampled. Each event says what ran after it, so the newest ones give what ran at any
//! instant; what is older than those is read from the hours of the usage.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use jiff::Timestamp;
use proto::ids::TeamId;
use proto::units::Stamp;
use raft::state::{self, Day, EventId, TeamLoad, Usage, UsageDay};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::auth::Caller;
use super::error::ApiError;
use super::extract::QueryOf;
use super::reading::{Answered, ReadQuery, Reading};
use super::state::ApiState;
use super::wire::timestamp;

const HOUR_MS: u64 = 3_600_000;
/// Days over which peaks are told.
const PEAK_DAYS: u32 = 30;

/// Which time.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct StatsQuery {
    /// `5m`, `1h` (where absent), `6h`, `24h` or `30d`.
    range: Option<String>,
}

/// How much of a team's runs.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct CapsuleStats {
    /// What was asked for.
    range: String,
    current: CurrentStats,
    peaks: PeakStats,
    series: StatsSeries,
}

/// What runs now.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct CurrentStats {
    running_count: u32,
    vcpus_reserved: u32,
    memory_mb_reserved: u64,
}

/// The most that ran at once in the last 30 days.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PeakStats {
    running_count: u32,
    vcpus: u32,
    memory_mb: u64,
}

/// What ran when: four lists of the same length.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(super) struct StatsSeries {
    /// The instants, the earliest first.
    #[schema(value_type = Vec<String>, format = DateTime)]
    labels: Vec<Timestamp>,
    running: Vec<u32>,
    vcpus: Vec<u32>,
    memory_mb: Vec<u64>,
}

/// How a range is told: so many points, so far apart.
#[derive(Clone, Copy, Debug)]
struct Shape {
    step: Duration,
    points: u32,
}

/// How much of the team's runs, and ran.
#[utoipa::path(
    get, path = "/v1/capsules/stats", tag = "capsules", params(StatsQuery, ReadQuery),
    responses((status = 200, body = CapsuleStats))
)]
pub(super) async fn stats(
    State(api): State<ApiState>,
    caller: Caller,
    QueryOf(query): QueryOf<StatsQuery>,
    reading: Reading,
) -> Result<Answered<Json<CapsuleStats>>, ApiError> {
    let range = query.range.unwrap_or_else(|| "1h".into());
    let shape = shape_of(&range)?;
    let (state, now) = (api.view.state(), api.clock.now());
    let past = Past::new(&state, caller.team, now);
    let (current, peaks) = (past.current, past.peak());
    let body = CapsuleStats {
        range,
        current: CurrentStats {
            running_count: current.sandboxes,
            vcpus_reserved: current.vcpus,
            memory_mb_reserved: current.memory_mib,
        },
        peaks: PeakStats {
            running_count: peaks.sandboxes,
            vcpus: peaks.vcpus,
            memory_mb: peaks.memory_mib,
        },
        series: past.series(shape),
    };
    Ok(reading.answer(Json(body)))
}

fn shape_of(range: &str) -> Result<Shape, ApiError> {
    let (step_s, points) = match range {
        "5m" => (10, 30),
        "1h" => (60, 60),
        "6h" => (300, 72),
        "24h" => (900, 96),
        "30d" => (6 * 3600, 120),
        _ => return Err(ApiError::invalid("range must be 5m, 1h, 6h, 24h or 30d")),
    };
    let step = Duration::from_secs(step_s);
    Ok(Shape { step, points })
}

/// What ran of one team, as far back as it is known.
struct Past {
    now: Stamp,
    current: TeamLoad,
    /// What ran from an instant on, the earliest first; complete from the first one on.
    steps: Vec<(Stamp, TeamLoad)>,
    /// By the hour, the earliest first.
    hours: Vec<(Stamp, TeamLoad)>,
}

impl Past {
    fn new(state: &state::State, team: TeamId, now: Stamp) -> Self {
        let mut steps: Vec<_> = state.events_of(team).map(|it| (it.at, it.load)).collect();
        if !state.events_after(team, EventId::FIRST, 0).missed {
            // They go back to the team's beginning.
            steps.push((Stamp::default(), TeamLoad::default()));
        }
        steps.reverse();
        let today = Day::of(now);
        let first = Day(today.0.saturating_sub(PEAK_DAYS));
        let days = state.usage_until(team, first..=today, now);
        Self {
            now,
            current: state.load_of(team),
            steps,
            hours: days.iter().flat_map(hours_of).collect(),
        }
    }

    fn peak(&self) -> TeamLoad {
        let hours = self.hours.iter().map(|(_, load)| *load);
        hours.fold(self.current, TeamLoad::max)
    }

    fn series(&self, shape: Shape) -> StatsSeries {
        let step_ms = u64::try_from(shape.step.as_millis()).unwrap_or(u64::MAX);
        let mut series = StatsSeries::default();
        for back in (0..u64::from(shape.points)).rev() {
            let at = Stamp(self.now.0.saturating_sub(back * step_ms));
            let load = match back {
                0 => self.current,
                _ => self.during(Stamp(at.0.saturating_sub(step_ms)), at),
            };
            let Some(label) = timestamp(at) else {
                continue;
            };
            series.labels.push(label);
            series.running.push(load.sandboxes);
            series.vcpus.push(load.vcpus);
            series.memory_mb.push(load.memory_mib);
        }
        series
    }

    /// The most that ran at once behind `from` and up to `until`.
    fn during(&self, from: Stamp, until: Stamp) -> TeamLoad {
        let is_known = self.steps.first().is_some_and(|(first, _)| *first <= from);
        if !is_known {
            let hours = self.hours.iter();
            let within = hours.filter(|(start, _)| start.0 + HOUR_MS > from.0 && *start <= until);
            let most = within.fold(TeamLoad::default(), |most, (_, load)| most.max(*load));
            let steps = self
                .steps
                .iter()
                .filter(|(at, _)| *at > from && *at <= until);
            return steps.fold(most, |most, (_, load)| most.max(*load));
        }
        let before = self.steps.iter().rev().find(|(at, _)| *at <= from);
        let before = before.map_or(TeamLoad::default(), |(_, load)| *load);
        let steps = self
            .steps
            .iter()
            .filter(|(at, _)| *at > from && *at <= until);
        steps.fold(before, |most, (_, load)| most.max(*load))
    }
}

/// What ran at most in each hour of a day.
fn hours_of(day: &UsageDay) -> impl Iterator<Item = (Stamp, TeamLoad)> + '_ {
    let start = day.day.start().0;
    day.hours.iter().map(move |(hour, usage)| {
        let at = Stamp(start + u64::from(*hour) * HOUR_MS);
        (at, usage.peak.max(mean(*usage)))
    })
}

/// What ran on average in an hour, rounded up: in an hour in which nothing began or ended, what ran.
fn mean(usage: Usage) -> TeamLoad {
    let narrow = |ms: u64| u32::try_from(ms.div_ceil(HOUR_MS)).unwrap_or(u32::MAX);
    TeamLoad {
        sandboxes: narrow(usage.sandbox_ms),
        vcpus: narrow(usage.vcpu_ms),
        memory_mib: usage.mib_ms.div_ceil(HOUR_MS),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = HOUR_MS;

    fn load(vcpus: u32) -> TeamLoad {
        TeamLoad {
            sandboxes: vcpus,
            vcpus,
            memory_mib: u64::from(vcpus) * 512,
        }
    }

    #[test]
    fn a_series_shows_the_most_of_each_step_and_ends_with_what_runs_now() {
        let past = Past {
            now: Stamp(100 * HOUR),
            current: load(1),
            steps: vec![
                (Stamp(98 * HOUR), load(2)),
                (Stamp(99 * HOUR + HOUR / 2 - 1), load(5)),
                (Stamp(99 * HOUR + HOUR / 2), load(1)),
            ],
            hours: vec![(Stamp(90 * HOUR), load(9)), (Stamp(99 * HOUR), load(5))],
        };
        let shape = shape_of("1h").expect("a range");
        let series = past.series(shape);
        assert_eq!(series.labels.len(), 60);
        assert_eq!(series.vcpus[..29], [2; 29], "before the middle of the hour");
        assert_eq!(series.vcpus[29], 5);
        assert_eq!(series.vcpus[30..], [1; 30]);
        assert_eq!(past.peak(), load(9));
        let long = past.series(shape_of("30d").expect("a range"));
        assert_eq!(long.running.iter().max(), Some(&9), "older than the events");
        assert!(shape_of("2h").is_err());
    }
}

//! What a team's capsules have taken, by the day. Counted in the replicated state from changes, so
//! any node answers the same and the end of a node loses nothing.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use jiff::ToSpan as _;
use jiff::civil::Date;
use proto::units::Stamp;
use raft::state::{Day, Usage, UsageDay};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::auth::Caller;
use super::error::ApiError;
use super::extract::QueryOf;
use super::reading::{Answered, ReadQuery, Reading};
use super::state::ApiState;

/// Days in an answer where nobody says.
const DEFAULT_DAYS: i32 = 30;
/// Most days in an answer; fewer than are kept.
const MAX_DAYS: i32 = 92;
/// The first of all days.
const EPOCH: Date = Date::constant(1970, 1, 1);
const MINUTE_MS: f64 = 60_000.0;

/// Which days, both included, by Coordinated Universal Time.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct UsageQuery {
    /// `YYYY-MM-DD`; 30 days up to `to` where absent.
    from: Option<String>,
    /// `YYYY-MM-DD`; today where absent.
    to: Option<String>,
}

/// What was taken on some days.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct UsageResponse {
    #[schema(value_type = String, format = Date)]
    from: Date,
    #[schema(value_type = String, format = Date)]
    to: Date,
    /// One for each day.
    points: Vec<UsagePoint>,
}

/// What was taken on one day, up to now. A capsule counts with all that is reserved for it, while
/// its guest runs.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct UsagePoint {
    #[schema(value_type = String, format = Date)]
    date: Date,
    /// Processors times minutes.
    cpu_minutes: f64,
    /// MiB of memory times minutes.
    ram_mb_minutes: f64,
    /// Capsules times minutes.
    capsule_minutes: f64,
    /// Capsules that were asked for.
    created: u32,
}

/// What the team's capsules have taken, by the day.
#[utoipa::path(
    get, path = "/v1/capsules/usage", tag = "capsules", params(UsageQuery, ReadQuery),
    responses((status = 200, body = UsageResponse))
)]
pub(super) async fn usage(
    State(api): State<ApiState>,
    caller: Caller,
    QueryOf(query): QueryOf<UsageQuery>,
    reading: Reading,
) -> Result<Answered<Json<UsageResponse>>, ApiError> {
    let now = api.clock.now();
    let (from, to) = query.days(now)?;
    let state = api.view.state();
    let known = state.usage_until(caller.team, day(from)..=day(to), now);
    let known: BTreeMap<Day, &UsageDay> = known.iter().map(|it| (it.day, it)).collect();
    let points = from.series(1.day()).take_while(|date| *date <= to);
    let points = points.map(|date| {
        let usage = known.get(&day(date)).map(|it| it.total());
        UsagePoint::of(date, usage.unwrap_or_default())
    });
    let points = points.collect();
    Ok(reading.answer(Json(UsageResponse { from, to, points })))
}

impl UsageQuery {
    /// The first and the last day.
    fn days(&self, now: Stamp) -> Result<(Date, Date), ApiError> {
        let to = match &self.to {
            Some(text) => date("to", text)?,
            None => date_of(Day::of(now)),
        };
        let from = match &self.from {
            Some(text) => date("from", text)?,
            None => to.saturating_sub((DEFAULT_DAYS - 1).days()),
        };
        if from > to {
            return Err(ApiError::invalid("from is later than to"));
        }
        if from.until(to).map_or(i32::MAX, |span| span.get_days()) >= MAX_DAYS {
            let why = format!("{MAX_DAYS} days can be asked for at once");
            return Err(ApiError::invalid(why));
        }
        Ok((from, to))
    }
}

fn date(name: &str, text: &str) -> Result<Date, ApiError> {
    let is_plain = text.len() == "2026-01-31".len();
    let read = text.parse().ok().filter(|_| is_plain);
    read.ok_or_else(|| ApiError::invalid(format!("{name} must be a date like 2026-01-31")))
}

/// The day of a date; days before 1970 are the first.
fn day(date: Date) -> Day {
    let days = EPOCH.until(date).map_or(0, |span| span.get_days());
    Day(u32::try_from(days).unwrap_or_default())
}

fn date_of(day: Day) -> Date {
    let days = i64::from(day.0);
    let span = jiff::Span::new().try_days(days);
    span.map_or(Date::MAX, |span| EPOCH.saturating_add(span))
}

impl UsagePoint {
    #[allow(clippy::cast_precision_loss)] // a minute in 10^11 is lost
    fn of(date: Date, usage: Usage) -> Self {
        let minutes = |ms: u64| (ms as f64 / MINUTE_MS * 1000.0).round() / 1000.0;
        Self {
            date,
            cpu_minutes: minutes(usage.vcpu_ms),
            ram_mb_minutes: minutes(usage.mib_ms),
            capsule_minutes: minutes(usage.sandbox_ms),
            created: usage.created,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(from: Option<&str>, to: Option<&str>) -> Result<(String, String), ApiError> {
        let query = UsageQuery {
            from: from.map(Into::into),
            to: to.map(Into::into),
        };
        // 2023-11-14.
        let days = query.days(Stamp(1_700_000_000_000))?;
        Ok((days.0.to_string(), days.1.to_string()))
    }

    #[test]
    fn the_last_thirty_days_are_shown_where_nobody_says() {
        let days = asked(None, None).expect("fine");
        assert_eq!(days, ("2023-10-16".into(), "2023-11-14".into()));
        let days = asked(None, Some("2024-03-01")).expect("fine");
        assert_eq!(days, ("2024-02-01".into(), "2024-03-01".into()));
    }

    #[test]
    fn ninety_two_days_are_the_most_and_they_go_forward() {
        assert!(asked(Some("2023-01-01"), Some("2023-04-02")).is_ok());
        assert!(asked(Some("2023-01-01"), Some("2023-04-03")).is_err());
        assert!(asked(Some("2023-04-02"), Some("2023-04-01")).is_err());
        assert!(asked(Some("-009999-01-01"), None).is_err());
        for bad in [
            "",
            "2023-1-1",
            "2023-02-30",
            "yesterday",
            "2023-01-01T00:00:00",
        ] {
            assert!(asked(Some(bad), None).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_day_and_its_date_are_one() {
        for number in [0, 1, 19_675, 2_932_896] {
            assert_eq!(day(date_of(Day(number))), Day(number));
        }
        assert_eq!(date_of(Day(u32::MAX)), Date::MAX);
        assert_eq!(day(Date::MIN), Day(0));
    }
}

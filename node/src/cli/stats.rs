//! `wrenn capsule stats` and `usage`: how busy capsules are, and what all of them have taken.

use std::io::{self, IsTerminal as _};
use std::time::Duration;

use clap::Args;
use futures::StreamExt as _;
use http::Method;
use serde_json::{Value, json};
use tokio::time::{self, MissedTickBehavior};

use super::capsule::path;
use super::client::Client;
use super::error::CliError;
use super::{Global, print};

/// How often the table is drawn anew: a bit more than a new sample each time.
const DRAW_INTERVAL: Duration = Duration::from_secs(2);
/// Capsules asked about at once.
const AT_ONCE: usize = 8;
/// Back to the top left corner, and everything below is cleared.
const REDRAW: &[u8] = b"\x1b[H\x1b[J";

/// Whose load to show.
#[derive(Debug, Args)]
pub(super) struct Stats {
    /// The capsules; all that run where absent.
    ids: Vec<String>,
    /// Show it once instead of again and again.
    #[arg(long)]
    no_stream: bool,
}

/// Of which days.
#[derive(Debug, Args)]
pub(super) struct Usage {
    /// The first day; 30 days up to the last where absent.
    #[arg(long, value_name = "YYYY-MM-DD")]
    from: Option<String>,
    /// The last day; today where absent.
    #[arg(long, value_name = "YYYY-MM-DD")]
    to: Option<String>,
}

/// Shows how busy capsules are, until it is interrupted.
pub(super) async fn stats(
    global: &Global,
    client: &Client,
    request: Stats,
) -> Result<(), CliError> {
    for id in &request.ids {
        path(id)?;
    }
    let redraws = !request.no_stream && !global.json && io::stdout().is_terminal();
    let mut ticks = time::interval(DRAW_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let shown = look(client, &request.ids).await?;
        if redraws {
            print::out(REDRAW)?;
        }
        match (global.json, request.no_stream) {
            (true, true) => print::json(&shown.into())?,
            (true, false) => print::line(&Value::from(shown).to_string())?,
            (false, _) => draw(&shown)?,
        }
        if request.no_stream {
            return Ok(());
        }
    }
}

/// The latest sample of each of `ids`, or of each that runs.
async fn look(client: &Client, ids: &[String]) -> Result<Vec<Value>, CliError> {
    let capsules = client.call(Method::GET, "/v1/capsules", None).await?;
    let all = capsules.as_array().into_iter().flatten();
    let is_meant = |capsule: &&Value| {
        let id = capsule["id"].as_str().unwrap_or_default();
        match ids {
            [] => capsule["status"] == "running",
            ids => ids.iter().any(|it| it == id),
        }
    };
    let meant: Vec<&Value> = all.filter(is_meant).collect();
    if let Some(missing) = ids
        .iter()
        .find(|id| meant.iter().all(|capsule| capsule["id"] != id.as_str()))
    {
        return Err(CliError::new(format!("no capsule {missing}")));
    }
    let latest = meant.into_iter().map(|capsule| latest(client, capsule));
    Ok(futures::stream::iter(latest)
        .buffered(AT_ONCE)
        .collect()
        .await)
}

/// A capsule with its latest sample, or with why there is none.
async fn latest(client: &Client, capsule: &Value) -> Value {
    let id = print::text(capsule, "id");
    let route = format!("/v1/capsules/{id}/metrics?range=5m");
    let answer = client.call(Method::GET, &route, None).await;
    let (sample, error) = match answer {
        Ok(known) => {
            let points = known["points"].as_array();
            (points.and_then(|all| all.last()).cloned(), None)
        }
        // It may have ended just now.
        Err(err) => (None, Some(err.message)),
    };
    json!({
        "id": id,
        "status": capsule["status"],
        "node": capsule["node"],
        "vcpus": capsule["vcpus"],
        "memory_mb": capsule["memory_mb"],
        "sample": sample,
        "error": error,
    })
}

fn draw(shown: &[Value]) -> Result<(), CliError> {
    let row = |it: &Value| {
        let sample = &it["sample"];
        let memory = sample["guest"]["mem_used_bytes"].as_u64();
        let memory = memory.or(sample["mem_bytes"].as_u64());
        let cpu = sample["cpu_pct"].as_f64().map(|it| format!("{it:.1} %"));
        let limit = it["memory_mb"].as_u64().unwrap_or_default() << 20;
        let dash = || "-".to_owned();
        let size = |bytes: Option<u64>| bytes.map_or_else(dash, size);
        vec![
            print::text(it, "id"),
            print::text(it, "status"),
            cpu.unwrap_or_else(dash),
            format!("{} / {}", size(memory), size(Some(limit))),
            size(sample["mem_bytes"].as_u64()),
            size(sample["disk_bytes"].as_u64()),
            size(sample["net_rx_bytes"].as_u64()),
            size(sample["net_tx_bytes"].as_u64()),
            print::text(it, "node"),
        ]
    };
    let rows: Vec<_> = shown.iter().map(row).collect();
    let headings = [
        "ID", "STATUS", "CPU", "MEMORY", "ON HOST", "DISK", "NET IN", "NET OUT", "NODE",
    ];
    print::table(&headings, &rows)
}

/// Shows what the team's capsules have taken, by the day.
pub(super) async fn usage(
    global: &Global,
    client: &Client,
    request: Usage,
) -> Result<(), CliError> {
    let mut query = Vec::new();
    for (name, date) in [("from", &request.from), ("to", &request.to)] {
        if let Some(date) = date {
            let is_plain = date.bytes().all(|it| it.is_ascii_digit() || it == b'-');
            if !is_plain {
                return Err(CliError::usage(format!(
                    "{date:?} is no date like 2026-01-31"
                )));
            }
            query.push(format!("{name}={date}"));
        }
    }
    let route = format!("/v1/capsules/usage?{}", query.join("&"));
    let known = client.call(Method::GET, &route, None).await?;
    if global.json {
        return print::json(&known);
    }
    let hours = |point: &Value, key: &str, unit: f64| {
        format!("{:.2}", point[key].as_f64().unwrap_or_default() / unit)
    };
    let row = |point: &Value| {
        vec![
            print::text(point, "date"),
            hours(point, "cpu_minutes", 60.0),
            hours(point, "ram_mb_minutes", 60.0 * 1024.0),
            hours(point, "capsule_minutes", 60.0),
            print::text(point, "created"),
        ]
    };
    let rows: Vec<_> = known["points"]
        .as_array()
        .into_iter()
        .flatten()
        .map(row)
        .collect();
    let headings = ["DATE", "CPU HOURS", "GIB HOURS", "CAPSULE HOURS", "CREATED"];
    print::table(&headings, &rows)
}

/// Bytes for people.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    #[allow(clippy::cast_precision_loss)] // one decimal is shown
    let mut size = bytes as f64 / 1024.0;
    let mut units = UNITS.iter();
    let mut unit = units.next();
    while size >= 1024.0
        && let Some(next) = units.next()
    {
        size /= 1024.0;
        unit = Some(next);
    }
    format!("{size:.1} {}", unit.copied().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_are_shown_with_the_unit_that_fits() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(512 << 20), "512.0 MiB");
        assert_eq!(size(u64::MAX), "16777216.0 TiB");
    }
}

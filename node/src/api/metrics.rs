//! What this node counts, in the text format that Prometheus reads.

use std::fmt::Write as _;
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use raft::state::Phase;

use super::state::ApiState;
use super::wire::status;
use crate::base::telemetry::{REQUESTS, SANDBOXES};

/// Every phase, in the order of a life.
const PHASES: [Phase; 9] = [
    Phase::Starting,
    Phase::Running,
    Phase::Snapshotting,
    Phase::Pausing,
    Phase::Paused,
    Phase::Resuming,
    Phase::Stopping,
    Phase::Stopped,
    Phase::Error,
];

/// Requests answered so far, by class of status.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// 1xx to 5xx, at index class - 1.
    classes: [AtomicU64; 5],
}

impl Counters {
    /// Counts one answer.
    pub(super) fn count(&self, status: StatusCode) {
        let class = usize::from(status.as_u16() / 100);
        if let Some(counter) = class.checked_sub(1).and_then(|at| self.classes.get(at)) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The metrics of this node.
#[utoipa::path(
    get, path = "/metrics", tag = "service",
    responses((status = 200, body = String, content_type = "text/plain"))
)]
pub(super) async fn metrics(State(api): State<ApiState>) -> impl IntoResponse {
    let uptime = api.clock.now().since(api.started_at);
    let text = render(&api, uptime, resident_bytes());
    let content_type = "text/plain; version=0.0.4; charset=utf-8";
    ([(CONTENT_TYPE, content_type)], text)
}

fn render(api: &ApiState, uptime: Duration, resident: Option<u64>) -> String {
    let mut text = Text::default();
    text.family(SANDBOXES, "gauge", "Sandboxes of this node by phase.");
    let state = api.view.state();
    for phase in PHASES {
        let here = state.sandboxes().filter(|it| it.owner == api.facts.id);
        let count = here.filter(|it| it.phase == phase).count();
        text.sample(SANDBOXES, Some(("phase", status(phase))), count as u64);
    }
    text.family(
        REQUESTS,
        "counter",
        "API requests answered, by status class.",
    );
    for (class, counter) in (1..).zip(&api.counters.classes) {
        let label = format!("{class}xx");
        let count = counter.load(Ordering::Relaxed);
        text.sample(REQUESTS, Some(("class", &label)), count);
    }
    let mut single = |name: &str, kind: &str, help: &str, value: u64| {
        text.family(name, kind, help);
        text.sample(name, None, value);
    };
    let applied = "wrenn_applied_index";
    single(
        applied,
        "gauge",
        "Last applied log index.",
        api.view.applied(),
    );
    let uptime_name = "wrenn_uptime_seconds";
    single(
        uptime_name,
        "gauge",
        "Time since the start.",
        uptime.as_secs(),
    );
    if let Some(resident) = resident {
        let name = "process_resident_memory_bytes";
        single(name, "gauge", "Resident memory of the daemon.", resident);
    }
    text.0
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, label: Option<(&str, &str)>, value: u64) {
        let _ = match label {
            Some((key, label)) => writeln!(self.0, "{name}{{{key}=\"{label}\"}} {value}"),
            None => writeln!(self.0, "{name} {value}"),
        };
    }
}

/// Resident memory of this process, where the kernel tells.
fn resident_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

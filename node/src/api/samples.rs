//! How busy one capsule was of late. Its owner has the samples; any node answers for it.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use raft::state::{Sandbox, State as Replicated};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::auth::Caller;
use super::error::{ApiError, Code};
use super::extract::{CapsuleId, QueryOf};
use super::state::{ApiState, owned};
use crate::base::sample::Sample;

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

/// Which samples.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct MetricsQuery {
    /// `5m`, `10m` (where absent), `1h`, `2h`, `6h`, `12h` or `24h`.
    range: Option<String>,
}

/// How busy a capsule was.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct CapsuleMetrics {
    /// Its id.
    sandbox_id: String,
    /// What was asked for.
    range: String,
    /// The earliest first: up to 10 minutes by half seconds, up to 2 hours by 30 s, beyond by 5 minutes.
    points: Vec<MetricsPoint>,
}

/// How busy a capsule was up to an instant.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct MetricsPoint {
    /// The instant, in seconds since the Unix epoch.
    timestamp_unix: u64,
    /// The same in milliseconds: two points have the same second.
    timestamp_unix_ms: u64,
    /// Part of its processors that it kept busy since the point before, in percent.
    cpu_pct: f64,
    /// Memory of its host that it takes.
    mem_bytes: u64,
    /// Disk of its host that it takes.
    disk_bytes: u64,
    /// Bytes that it has sent since it began on its host.
    net_tx_bytes: u64,
    /// Bytes that it has received.
    net_rx_bytes: u64,
    /// What it says of itself; left out until it has said something.
    #[serde(skip_serializing_if = "Option::is_none")]
    guest: Option<GuestPoint>,
}

/// What a guest says of itself.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct GuestPoint {
    mem_used_bytes: u64,
    mem_total_bytes: u64,
    mem_cache_bytes: u64,
    disk_used_bytes: u64,
    disk_total_bytes: u64,
}

/// How busy a capsule was of late; of a paused one, before it was paused.
#[utoipa::path(
    get, path = "/v1/capsules/{id}/metrics", tag = "capsules",
    params(("id" = String, Path), MetricsQuery), responses((status = 200, body = CapsuleMetrics))
)]
pub(super) async fn metrics(
    State(api): State<ApiState>,
    caller: Caller,
    CapsuleId(id): CapsuleId,
    QueryOf(query): QueryOf<MetricsQuery>,
) -> Result<Json<CapsuleMetrics>, ApiError> {
    let range = query.range.unwrap_or_else(|| "10m".into());
    let length = length_of(&range)?;
    let look = |state: Replicated| {
        let sandbox = owned(&state, &caller, id)?;
        if sandbox.phase.is_ended() {
            let why = format!("capsule {id} has ended; nothing is kept of how busy it was");
            return Err(ApiError::new(Code::NotFound, why));
        }
        Ok(sandbox.clone())
    };
    let sandbox = api.found(look).await?;
    let samples = api.relay.samples(id, length).await?;
    let points = samples.iter().map(|it| MetricsPoint::of(it, &sandbox));
    Ok(Json(CapsuleMetrics {
        sandbox_id: id.to_string(),
        range,
        points: points.collect(),
    }))
}

fn length_of(range: &str) -> Result<Duration, ApiError> {
    Ok(match range {
        "5m" => 5 * MINUTE,
        "10m" => 10 * MINUTE,
        "1h" => HOUR,
        "2h" => 2 * HOUR,
        "6h" => 6 * HOUR,
        "12h" => 12 * HOUR,
        "24h" => 24 * HOUR,
        _ => {
            let why = "range must be 5m, 10m, 1h, 2h, 6h, 12h or 24h";
            return Err(ApiError::invalid(why));
        }
    })
}

impl MetricsPoint {
    fn of(sample: &Sample, sandbox: &Sandbox) -> Self {
        let bytes = |kib: u32| u64::from(kib) * 1024;
        let inside = sample.inside;
        Self {
            timestamp_unix: sample.at.0 / 1000,
            timestamp_unix_ms: sample.at.0,
            cpu_pct: percent(sample.busy_cores, sandbox.spec.vcpus),
            mem_bytes: bytes(sample.resident_kib),
            disk_bytes: bytes(sample.disk_kib),
            net_tx_bytes: sample.sent_bytes,
            net_rx_bytes: sample.received_bytes,
            guest: (inside.mem_total_kib > 0).then(|| GuestPoint {
                mem_used_bytes: bytes(inside.mem_used_kib),
                mem_total_bytes: bytes(inside.mem_total_kib),
                mem_cache_bytes: bytes(inside.mem_cache_kib),
                disk_used_bytes: bytes(inside.disk_used_kib),
                disk_total_bytes: bytes(inside.disk_total_kib),
            }),
        }
    }
}

/// Cores in use as part of `vcpus`, in percent with two decimals. The hypervisor's own work may be
/// more than the guest's; all of the guest is what there is.
fn percent(busy_cores: f32, vcpus: u32) -> f64 {
    let share = f64::from(busy_cores) / f64::from(vcpus.max(1));
    if !share.is_finite() {
        return 0.0;
    }
    (share.clamp(0.0, 1.0) * 10_000.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::percent;

    #[test]
    fn a_guest_is_never_busier_than_it_can_be() {
        let shown = |cores, vcpus| format!("{:.2}", percent(cores, vcpus));
        assert_eq!(shown(0.5, 2), "25.00");
        assert_eq!(shown(2.7, 2), "100.00");
        assert_eq!(shown(-1.0, 0), "0.00");
    }
}

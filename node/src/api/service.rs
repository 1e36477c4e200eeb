//! Signs of life, for load balancers and people.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use super::state::ApiState;

/// A sign of life.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Health {
    #[schema(value_type = String)]
    status: &'static str,
    version: String,
    node: String,
}

/// Says that this node serves.
#[utoipa::path(get, path = "/healthz", tag = "service", responses((status = 200, body = Health)))]
pub(super) async fn healthz(State(api): State<ApiState>) -> Json<Health> {
    Json(Health {
        status: "ok",
        version: api.facts.version.clone(),
        node: api.facts.id.to_string(),
    })
}

/// The same under the name that the first servers had.
#[utoipa::path(get, path = "/health", tag = "service", responses((status = 200, body = Health)))]
pub(super) async fn health(api: State<ApiState>) -> Json<Health> {
    healthz(api).await
}

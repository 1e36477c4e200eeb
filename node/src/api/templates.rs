//! The templates that capsules start from: the platform's, and what the team has sealed. Their route
//! carries the name that clients know.

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use utoipa::IntoParams;

use super::auth::Caller;
use super::error::ApiError;
use super::extract::QueryOf;
use super::reading::{Answered, ReadQuery, Reading};
use super::state::ApiState;
use super::wire::TemplateShape;

/// Which templates.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct TemplateQuery {
    /// `base` or `snapshot`; both where absent.
    #[serde(rename = "type")]
    kind: Option<String>,
}

/// Lists the platform's templates and the team's snapshots, by name.
#[utoipa::path(
    get, path = "/v1/snapshots", tag = "templates", params(TemplateQuery, ReadQuery),
    responses((status = 200, body = Vec<TemplateShape>))
)]
pub(super) async fn list(
    State(api): State<ApiState>,
    caller: Caller,
    QueryOf(query): QueryOf<TemplateQuery>,
    reading: Reading,
) -> Result<Answered<Json<Vec<TemplateShape>>>, ApiError> {
    let kind = query.kind.filter(|kind| !kind.is_empty());
    if let Some(kind) = &kind
        && !matches!(kind.as_str(), "base" | "snapshot")
    {
        return Err(ApiError::invalid("type must be base or snapshot"));
    }
    let all = api.view.state();
    // What builds keep for each other has names that no client can choose.
    let own = all
        .named_by(caller.team)
        .filter(|it| !it.name.starts_with('_'));
    let own = own.map(TemplateShape::from);
    let shapes = all.templates().map(TemplateShape::from).chain(own);
    let wanted = shapes.filter(|shape| kind.as_deref().is_none_or(|kind| kind == shape.kind));
    let mut wanted: Vec<TemplateShape> = wanted.collect();
    wanted.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(reading.answer(Json(wanted)))
}

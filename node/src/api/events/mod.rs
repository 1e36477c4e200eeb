//! What happens, as it happens: server-sent events, and the same as a list.
//!
//! Events are part of the replicated state ([`raft::state::Event`]): every node has the same ones
//! under the same ids, so a client that lost its stream goes on at any node, from the last id that it
//! saw (`Last-Event-ID`). Only the newest are kept; whoever comes back later than that is told so in
//! the first message.
//!
//! ```text
//! stream   connected, then 1 or 2 messages an event: its id is on the last of them
//! silence  a comment every 15 s
//! ```

mod story;
mod stream;

use std::convert::Infallible;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::StreamExt as _;
use http_body::Frame;
use http_body_util::StreamBody;
use raft::state::EventId;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::auth::Caller;
use super::error::ApiError;
use super::extract::QueryOf;
use super::reading::{Answered, ReadQuery, Reading};
use super::state::ApiState;
pub(super) use story::{KINDS, Message, tell};

/// Where a client goes on that lost its stream.
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// Events in one list where nobody says.
const DEFAULT_LIMIT: usize = 100;
/// Most events in one list.
const MAX_LIMIT: usize = 1000;

/// Which events.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct EventsQuery {
    /// The id of the last event that is known; the oldest that is kept where absent.
    after: Option<String>,
    /// How many at most: 100 where absent, 1000 at most.
    limit: Option<usize>,
}

/// Events, the earliest first.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct EventList {
    events: Vec<Message>,
    /// Where to go on: the id of the last event that was looked at.
    last_event_id: String,
    /// Whether there may have been others behind `after`, which are not kept any more.
    missed: bool,
}

/// Lists what happened to the team's capsules and templates.
#[utoipa::path(
    get, path = "/v1/events", tag = "events", params(EventsQuery, ReadQuery),
    responses((status = 200, body = EventList))
)]
pub(super) async fn list(
    State(api): State<ApiState>,
    caller: Caller,
    QueryOf(query): QueryOf<EventsQuery>,
    reading: Reading,
) -> Result<Answered<Json<EventList>>, ApiError> {
    let after = query.after.as_deref().map(id_of).transpose()?;
    let limit = query.limit.unwrap_or(DEFAULT_LIMIT);
    if !(1..=MAX_LIMIT).contains(&limit) {
        return Err(ApiError::invalid(format!("limit must be 1 to {MAX_LIMIT}")));
    }
    let state = api.view.state();
    let from = after.unwrap_or(EventId::FIRST);
    let since = state.events_after(caller.team, from, limit);
    let last = since.events.last().map_or(from, |event| event.id);
    let told = since
        .events
        .iter()
        .flat_map(|event| story::tell(&state, event));
    let body = EventList {
        events: told.collect(),
        last_event_id: last.to_string(),
        // Whoever asks for what there is misses nothing.
        missed: after.is_some() && since.missed,
    };
    Ok(reading.answer(Json(body)))
}

/// Tells what happens to the team's capsules and templates, as it happens.
#[utoipa::path(
    get, path = "/v1/events/stream", tag = "events",
    params(("Last-Event-ID" = Option<String>, Header)),
    responses((status = 200, description = "Messages, without an end.", body = String,
        content_type = "text/event-stream"))
)]
pub(super) async fn stream(
    State(api): State<ApiState>,
    caller: Caller,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let last = headers
        .get(LAST_EVENT_ID)
        .map(|it| it.to_str().unwrap_or_default());
    // A browser that has seen no id yet sends an empty one.
    let last = last.filter(|it| !it.is_empty()).map(id_of).transpose()?;
    let messages = stream::messages(&api, caller, last);
    let frames = messages.map(|bytes| Ok::<_, Infallible>(Frame::data(Bytes::from(bytes))));
    let head = [
        (CONTENT_TYPE, "text/event-stream"),
        (CACHE_CONTROL, "no-store"),
    ];
    Ok((head, Body::new(StreamBody::new(frames))).into_response())
}

fn id_of(text: &str) -> Result<EventId, ApiError> {
    text.parse()
        .map_err(|err: raft::state::BadEventId| ApiError::invalid(err.to_string()))
}

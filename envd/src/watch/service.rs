//! The calls of `filesystem.Filesystem` that watch.

use std::sync::Arc;
use std::time::Duration;

use buffa::MessageField;
use connectrpc::{ConnectError, RequestContext};
use futures::{Stream, StreamExt, stream};
use proto::envd::filesystem as wire;
use tokio::time::{Instant, sleep, sleep_until};
use wire::__buffa::oneof::watch_dir_response::Event as Told;
use wire::watch_dir_response::{KeepAlive, StartEvent};

use super::event::{Event, Kind};
use super::polled::UnknownWatcher;
use super::watcher::{OpenWatcherError, WatchBrokenError, Wish};
use super::watching::{Permit, Watching};
use crate::agent::Agent;
use crate::files::service::{text, to_info};
use crate::log::chain;
use crate::process::service::{keepalive_interval, rpc_user};

impl From<OpenWatcherError> for ConnectError {
    fn from(err: OpenWatcherError) -> Self {
        let words = chain(&err);
        match err {
            OpenWatcherError::Missing(_) => Self::not_found(words),
            OpenWatcherError::NotDirectory(_) | OpenWatcherError::Network(_) => {
                Self::invalid_argument(words)
            }
            OpenWatcherError::Loop(_) => Self::failed_precondition(words),
            OpenWatcherError::TooMany(_) => Self::resource_exhausted(words),
            OpenWatcherError::Io { .. } => Self::internal(words),
        }
    }
}

impl From<WatchBrokenError> for ConnectError {
    fn from(err: WatchBrokenError) -> Self {
        Self::internal(chain(&err))
    }
}

impl From<UnknownWatcher> for ConnectError {
    fn from(err: UnknownWatcher) -> Self {
        Self::not_found(chain(&err))
    }
}

/// The wishes of a request for the directory at `path`.
fn wish(
    agent: &Agent,
    ctx: &RequestContext,
    path: &str,
    [recursive, entries, network]: [bool; 3],
) -> Result<Wish, ConnectError> {
    let user = rpc_user(agent, ctx)?;
    let root = agent.resolve(&user, path);
    let root = root.map_err(|err| ConnectError::invalid_argument(chain(&err)))?;
    Ok(Wish {
        root,
        recursive,
        entries,
        network,
    })
}

/// `CreateWatcher`.
///
/// # Errors
/// As [`OpenWatcherError`] is told.
pub async fn create(
    agent: &Agent,
    ctx: &RequestContext,
    request: wire::CreateWatcherRequest,
) -> Result<wire::CreateWatcherResponse, ConnectError> {
    let how = [
        request.recursive,
        request.include_entry,
        request.allow_network_mounts,
    ];
    let wish = wish(agent, ctx, &request.path, how)?;
    Ok(wire::CreateWatcherResponse {
        watcher_id: agent.watchers.create(wish).await?,
        ..Default::default()
    })
}

/// `GetWatcherEvents`.
///
/// # Errors
/// `not_found`, or `internal` for a watcher that can tell no more.
pub async fn events(
    agent: &Agent,
    request: wire::GetWatcherEventsRequest,
) -> Result<wire::GetWatcherEventsResponse, ConnectError> {
    let events = agent.watchers.events(&request.watcher_id).await??;
    Ok(wire::GetWatcherEventsResponse {
        events: events.into_iter().map(to_event).collect(),
        ..Default::default()
    })
}

/// `RemoveWatcher`.
///
/// # Errors
/// `not_found`.
pub fn remove(
    agent: &Agent,
    request: &wire::RemoveWatcherRequest,
) -> Result<wire::RemoveWatcherResponse, ConnectError> {
    agent.watchers.remove(&request.watcher_id)?;
    Ok(wire::RemoveWatcherResponse::default())
}

/// `WatchDir`: a start event, then what happens until the client leaves.
///
/// # Errors
/// As [`OpenWatcherError`] is told.
pub async fn stream(
    agent: &Arc<Agent>,
    ctx: &RequestContext,
    request: wire::WatchDirRequest,
) -> Result<
    impl Stream<Item = Result<wire::WatchDirResponse, ConnectError>> + Send + use<>,
    ConnectError,
> {
    let how = [
        request.recursive,
        request.include_entry,
        request.allow_network_mounts,
    ];
    let wish = wish(agent, ctx, &request.path, how)?;
    let permit = agent.watchers.permit()?;
    let streaming = Streaming {
        watching: Watching::open(wish).await?,
        _permit: permit,
        keepalive: keepalive_interval(ctx),
        deadline: ctx.deadline().map(Instant::from_std),
        ended: false,
    };
    let rest = stream::unfold(streaming, async |mut streaming| {
        let next = streaming.next().await?;
        Some((stream::iter(next), streaming))
    });
    let start = to_response(StartEvent::default());
    Ok(stream::iter([Ok(start)]).chain(rest.flatten()))
}

/// One client's stream.
struct Streaming {
    watching: Watching,
    _permit: Permit,
    keepalive: Duration,
    /// When this stream ends, whatever happens.
    deadline: Option<Instant>,
    ended: bool,
}

type Responses = Vec<Result<wire::WatchDirResponse, ConnectError>>;

impl Streaming {
    /// The next responses, at least one; `None` at the end.
    async fn next(&mut self) -> Option<Responses> {
        if self.ended {
            return None;
        }
        let silence = sleep(self.keepalive);
        tokio::pin!(silence);
        loop {
            tokio::select! {
                biased;
                () = until(self.deadline) => {
                    self.ended = true;
                    return Some(vec![Err(ConnectError::deadline_exceeded("stream timed out"))]);
                }
                () = self.watching.happened() => {}
                () = &mut silence => return Some(vec![Ok(to_response(KeepAlive::default()))]),
            }
            match self.watching.take().await {
                Ok(events) if events.is_empty() => {}
                Ok(events) => return Some(events.into_iter().map(|it| Ok(told(it))).collect()),
                Err(broken) => {
                    self.ended = true;
                    return Some(vec![Err(broken.into())]);
                }
            }
        }
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

fn told(event: Event) -> wire::WatchDirResponse {
    to_response(to_event(event))
}

fn to_response(event: impl Into<Told>) -> wire::WatchDirResponse {
    wire::WatchDirResponse {
        event: Some(event.into()),
        ..Default::default()
    }
}

fn to_event(event: Event) -> wire::FilesystemEvent {
    let kind = match event.kind {
        Kind::Create => wire::EventType::EVENT_TYPE_CREATE,
        Kind::Rename => wire::EventType::EVENT_TYPE_RENAME,
        Kind::Chmod => wire::EventType::EVENT_TYPE_CHMOD,
        Kind::Write => wire::EventType::EVENT_TYPE_WRITE,
        Kind::Remove => wire::EventType::EVENT_TYPE_REMOVE,
    };
    let entry = event.entry.map(to_info);
    wire::FilesystemEvent {
        name: text(&event.name),
        r#type: kind.into(),
        entry: entry.map_or_else(MessageField::none, MessageField::some),
        ..Default::default()
    }
}

//! The Connect service `filesystem.Filesystem`: messages in, calls on [`super::tree`], entries out.
//! Watching is carried out by [`crate::watch`].

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use buffa::MessageField;
use connectrpc::{
    ConnectError, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use proto::envd::filesystem as wire;
use tokio::task::spawn_blocking;

use super::entry::{Entry, Kind};
use super::tree::{self, TreeError};
use crate::agent::Agent;
use crate::log::chain;
use crate::process::service::rpc_user;
use crate::users::{Accounts, User};
use crate::watch::service as watch;

/// The service.
pub struct FilesystemService {
    agent: Arc<Agent>,
}

impl FilesystemService {
    /// Serves the files of `agent`'s guest.
    #[must_use]
    pub fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }

    fn resolve(&self, user: &User, path: &str) -> Result<PathBuf, ConnectError> {
        let resolved = self.agent.resolve(user, path);
        resolved.map_err(|err| ConnectError::invalid_argument(chain(&err)))
    }
}

/// Runs disk work where it may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TreeError> + Send + 'static,
) -> Result<T, ConnectError> {
    let done = spawn_blocking(work).await;
    Ok(done.map_err(|err| ConnectError::internal(chain(&err)))??)
}

impl From<TreeError> for ConnectError {
    fn from(err: TreeError) -> Self {
        let words = chain(&err);
        match err {
            TreeError::Missing(_) => Self::not_found(words),
            TreeError::Exists(_) => Self::already_exists(words),
            TreeError::NotDirectory(_) | TreeError::Refused { .. } => Self::invalid_argument(words),
            TreeError::Loop(_) => Self::failed_precondition(words),
            TreeError::TooMany(_) | TreeError::NoSpace(_) => Self::resource_exhausted(words),
            TreeError::Io { .. } => Self::internal(words),
        }
    }
}

/// A path as clients see it; what is no text in it becomes a mark of replacement.
pub(crate) fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// An entry as clients see it.
pub(crate) fn to_info(entry: Entry) -> wire::EntryInfo {
    let kind = match entry.kind {
        Kind::File => wire::FileType::FILE_TYPE_FILE,
        Kind::Directory => wire::FileType::FILE_TYPE_DIRECTORY,
        Kind::Other => wire::FileType::FILE_TYPE_UNSPECIFIED,
    };
    let mut info = wire::EntryInfo {
        name: entry.name,
        r#type: kind.into(),
        path: text(&entry.path),
        size: i64::try_from(entry.size_bytes).unwrap_or(i64::MAX),
        mode: entry.mode,
        permissions: entry.permissions,
        owner: entry.owner,
        group: entry.group,
        symlink_target: entry.symlink_target.as_deref().map(text),
        metadata: entry.metadata.into_iter().collect(),
        ..Default::default()
    };
    let (seconds, nanos) = unix_time(entry.modified);
    let modified = info.modified_time.get_or_insert_default();
    (modified.seconds, modified.nanos) = (seconds, nanos);
    info
}

/// Seconds and nanoseconds since the epoch, the latter never negative.
fn unix_time(time: SystemTime) -> (i64, i32) {
    let whole = |seconds: u64| i64::try_from(seconds).unwrap_or(i64::MAX);
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => (whole(after.as_secs()), after.subsec_nanos().cast_signed()),
        Err(before) => (-whole(before.duration().as_secs()), 0),
    }
}

fn entry_field<P>(entry: Entry) -> MessageField<wire::EntryInfo, P>
where
    P: buffa::ProtoBox<wire::EntryInfo>,
{
    MessageField::some(to_info(entry))
}

#[allow(refining_impl_trait)] // the concrete types say more than the trait requires
impl wire::Filesystem for FilesystemService {
    async fn stat(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::StatRequest>,
    ) -> ServiceResult<wire::StatResponse> {
        let user = rpc_user(&self.agent, &ctx)?;
        let path = self.resolve(&user, &request.to_owned_message().path)?;
        let entry = blocking(move || tree::stat(&path, &Accounts::read())).await?;
        Response::ok(wire::StatResponse {
            entry: entry_field(entry),
            ..Default::default()
        })
    }

    async fn make_dir(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::MakeDirRequest>,
    ) -> ServiceResult<wire::MakeDirResponse> {
        let user = rpc_user(&self.agent, &ctx)?;
        let path = self.resolve(&user, &request.to_owned_message().path)?;
        let made = move || {
            tree::make(&path, &user)?;
            tree::stat(&path, &Accounts::read())
        };
        let entry = entry_field(blocking(made).await?);
        Response::ok(wire::MakeDirResponse {
            entry,
            ..Default::default()
        })
    }

    async fn r#move(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::MoveRequest>,
    ) -> ServiceResult<wire::MoveResponse> {
        let user = rpc_user(&self.agent, &ctx)?;
        let request = request.to_owned_message();
        let source = self.resolve(&user, &request.source)?;
        let destination = self.resolve(&user, &request.destination)?;
        let moved = move || {
            tree::rename(&source, &destination, &user)?;
            tree::stat(&destination, &Accounts::read())
        };
        let entry = entry_field(blocking(moved).await?);
        Response::ok(wire::MoveResponse {
            entry,
            ..Default::default()
        })
    }

    async fn list_dir(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::ListDirRequest>,
    ) -> ServiceResult<wire::ListDirResponse> {
        let user = rpc_user(&self.agent, &ctx)?;
        let request = request.to_owned_message();
        let path = self.resolve(&user, &request.path)?;
        let listed = move || tree::list(&path, request.depth, &Accounts::read());
        let entries = blocking(listed).await?.into_iter().map(to_info).collect();
        Response::ok(wire::ListDirResponse {
            entries,
            ..Default::default()
        })
    }

    async fn remove(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::RemoveRequest>,
    ) -> ServiceResult<wire::RemoveResponse> {
        let user = rpc_user(&self.agent, &ctx)?;
        let path = self.resolve(&user, &request.to_owned_message().path)?;
        if path.parent().is_none() {
            return Err(ConnectError::invalid_argument(
                "the root directory cannot be removed",
            ));
        }
        blocking(move || tree::remove(&path)).await?;
        Response::ok(wire::RemoveResponse::default())
    }

    async fn watch_dir(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::WatchDirRequest>,
    ) -> ServiceResult<ServiceStream<wire::WatchDirResponse>> {
        let events = watch::stream(&self.agent, &ctx, request.to_owned_message()).await?;
        Response::stream_ok(events)
    }

    async fn create_watcher(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::CreateWatcherRequest>,
    ) -> ServiceResult<wire::CreateWatcherResponse> {
        Response::ok(watch::create(&self.agent, &ctx, request.to_owned_message()).await?)
    }

    async fn get_watcher_events(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::GetWatcherEventsRequest>,
    ) -> ServiceResult<wire::GetWatcherEventsResponse> {
        Response::ok(watch::events(&self.agent, request.to_owned_message()).await?)
    }

    async fn remove_watcher(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::RemoveWatcherRequest>,
    ) -> ServiceResult<wire::RemoveWatcherResponse> {
        Response::ok(watch::remove(&self.agent, &request.to_owned_message())?)
    }
}

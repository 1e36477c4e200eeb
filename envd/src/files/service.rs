//! The Connect service `filesystem.Filesystem`.
use std::sync::Arc;
use connectrpc::{ConnectError, RequestContext, ServiceRequest, ServiceResult, ServiceStream};
use proto::envd::filesystem as wire;
use crate::agent::Agent;

/// The service.
pub struct FilesystemService { agent: Arc<Agent> }
impl FilesystemService {
    /// Serves.
    pub fn new(agent: Arc<Agent>) -> Self { Self { agent } }
}
macro_rules! no { () => { Err(ConnectError::unimplemented("not yet")) } }
#[allow(refining_impl_trait)] // the concrete types say more than the trait requires
impl wire::Filesystem for FilesystemService {
    async fn stat(&self, _c: RequestContext, _r: ServiceRequest<'_, wire::StatRequest>) -> ServiceResult<wire::StatResponse> { let _ = &self.agent; no!() }
    async fn make_dir(&self, _c: RequestContext, _r: ServiceRequest<'_, wire::MakeDirRequest>) -> ServiceResult<wire::MakeDirResponse> { no!() }
    async fn r#move(&self, _c: RequestContext, _r: ServiceRequest<'_, wire::MoveRequest>) -> ServiceResult<wire::MoveResponse> { no!() }
    async fn list_dir(&self, _c: RequestContext, _r: ServiceRequest<'_, wire::ListDirRequest>) -> ServiceResult<wire::ListDirResponse> { no!() }
    async fn remove(&self, _c: RequestContext, _r: ServiceRequest<'_, wire::RemoveRequest>) -> ServiceResult<wire::RemoveResponse> { no!() }
    async fn watch_dir(&self, _c: RequestContext, _r: ServiceRequest<'_, wire::WatchDirRequest>) -> ServiceResult<ServiceStream<wire::WatchDirResponse>> { no!() }
    async fn create_watcher(&self, _c: RequestContext, _r: ServiceRequest<'_, wire::CreateWatcherRequest>) -> ServiceResult<wire::CreateWatcherResponse> { no!() }
    async fn get_watcher_events(&self, _c: RequestContext, _r: ServiceRequest<'_, wire::GetWatcherEventsRequest>) -> ServiceResult<wire::GetWatcherEventsResponse> { no!() }
    async fn remove_watcher(&self, _c: RequestContext, _r: ServiceRequest<'_, wire::RemoveWatcherRequest>) -> ServiceResult<wire::RemoveWatcherResponse> { no!() }
}

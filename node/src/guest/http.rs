//! Plain HTTP to the agent, and the transport its RPC clients share.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use connectrpc::client::{ClientConfig, ServiceTransport};
use futures::TryStreamExt as _;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::{Builder, Client};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use proto::envd::filesystem::FilesystemClient;
use proto::envd::process::ProcessClient;
use tokio::time::{self, Instant};

use super::dial::{Connector, Dial};
use super::error::GuestError;

/// How long an idle connection is kept. The agent closes its side after 640 s.
const POOL_IDLE: Duration = Duration::from_secs(60);
/// Idle connections kept per guest: enough for a burst of calls, few enough for a small guest.
const POOL_SIZE: usize = 8;
/// Largest head of an answer of HTTP/2.
const HEAD_LIST_BYTES: u32 = 64 << 10;
/// Largest error or JSON answer read into memory.
const SMALL_BODY_BYTES: usize = 1 << 20;
/// Longest a call may take that does not stream.
pub(super) const UNARY_TIMEOUT: Duration = Duration::from_secs(120);
/// The authority in requests; the dialler decides where they really go.
const AUTHORITY: &str = "http://guest:49983";
/// The agent's header for its access token.
const TOKEN_HEADER: &str = "x-access-token";

/// A request body of any origin.
pub type GuestBody = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

type HttpClient = Client<Connector, GuestBody>;
type RpcTransport = ServiceTransport<Client<Connector, connectrpc::client::ClientBody>>;

/// A guest agent that can be called. Cheap to clone; clones share the connection pool.
#[derive(Clone, Debug)]
pub struct Guest {
    shared: Arc<Shared>,
}

struct Shared {
    dial: Arc<dyn Dial>,
    http: HttpClient,
    process: ProcessClient<RpcTransport>,
    filesystem: FilesystemClient<RpcTransport>,
    token: HeaderValue,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("dial", &self.dial)
            .finish_non_exhaustive()
    }
}

impl Guest {
    /// A client of the agent that `dial` reaches, speaking with `token` (letters and digits).
    ///
    /// # Errors
    /// [`GuestError::Nonsense`] for a token that cannot stand in a header.
    pub fn new(dial: Arc<dyn Dial>, token: &str) -> Result<Self, GuestError> {
        let nonsense = |what: &str| GuestError::Nonsense(format!("{what} is unusable"));
        let mut token = HeaderValue::from_str(token).map_err(|_| nonsense("access token"))?;
        token.set_sensitive(true);
        let base = AUTHORITY.parse().map_err(|_| nonsense("authority"))?;
        let config = ClientConfig::new(base)
            .proto()
            .with_default_header(TOKEN_HEADER, token.clone());
        let transport = ServiceTransport::new(pool(&dial));
        let shared = Shared {
            http: pool(&dial),
            process: ProcessClient::new(transport.clone(), config.clone()),
            filesystem: FilesystemClient::new(transport, config),
            dial,
            token,
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// How this guest is dialled, for streams that are relayed as they are.
    #[must_use]
    pub fn dial(&self) -> &Arc<dyn Dial> {
        &self.shared.dial
    }

    /// What the agent demands of every caller: a secret of this sandbox, for the nodes of the
    /// cluster alone.
    #[must_use]
    pub fn access_token(&self) -> &str {
        // It was made from a string.
        self.shared.token.to_str().unwrap_or_default()
    }

    pub(super) fn process(&self) -> &ProcessClient<RpcTransport> {
        &self.shared.process
    }

    pub(super) fn filesystem(&self) -> &FilesystemClient<RpcTransport> {
        &self.shared.filesystem
    }

    /// Sends a request whose answer streams; an answer of status 400 or more becomes an error.
    pub(super) async fn send(
        &self,
        method: Method,
        path_and_query: &str,
        content_type: Option<&str>,
        body: GuestBody,
    ) -> Result<Response<Incoming>, GuestError> {
        let response = self
            .request(method, path_and_query, content_type, body)
            .await?;
        if response.status().as_u16() < StatusCode::BAD_REQUEST.as_u16() {
            return Ok(response);
        }
        let status = response.status();
        let body = small(response).await.unwrap_or_default();
        Err(GuestError::from_http(status, &body))
    }

    /// Sends a small JSON request whose body is made when it is sent, and reads the whole small
    /// answer, whatever its status, before `deadline`.
    pub(super) async fn exchange(
        &self,
        path: &str,
        json: impl FnOnce() -> Vec<u8> + Send + 'static,
        deadline: Instant,
    ) -> Result<(StatusCode, Bytes), GuestError> {
        let late = futures::stream::once(async move { Ok::<_, Infallible>(json().into()) });
        let exchange = async {
            let json_type = Some("application/json");
            let asked = self.request(Method::POST, path, json_type, streamed(late));
            let response = asked.await?;
            Ok((response.status(), small(response).await?))
        };
        let waited = deadline.saturating_duration_since(Instant::now());
        time::timeout_at(deadline, exchange)
            .await
            .map_err(|_| GuestError::TimedOut { waited })?
    }

    async fn request(
        &self,
        method: Method,
        path_and_query: &str,
        content_type: Option<&str>,
        body: GuestBody,
    ) -> Result<Response<Incoming>, GuestError> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{AUTHORITY}{path_and_query}"))
            .header(TOKEN_HEADER, self.shared.token.clone());
        if let Some(content_type) = content_type {
            request = request.header(CONTENT_TYPE, content_type);
        }
        let request = request.body(body).map_err(GuestError::unreachable)?;
        let answered = self.shared.http.request(request).await;
        answered.map_err(GuestError::unreachable)
    }

    /// Sends a small JSON request and reads the whole small answer, within `timeout`.
    pub(super) async fn call(
        &self,
        method: Method,
        path: &str,
        json: Option<Vec<u8>>,
        timeout: Duration,
    ) -> Result<Bytes, GuestError> {
        let content_type = json.is_some().then_some("application/json");
        let body = full(json.unwrap_or_default());
        let exchange = async { small(self.send(method, path, content_type, body).await?).await };
        time::timeout(timeout, exchange)
            .await
            .map_err(|_| GuestError::TimedOut { waited: timeout })?
    }
}

/// A body that is already in memory.
pub(super) fn full(bytes: Vec<u8>) -> GuestBody {
    Full::new(Bytes::from(bytes))
        .map_err(|never| match never {})
        .boxed_unsync()
}

/// A body that streams from elsewhere.
pub(super) fn streamed<S, E>(stream: S) -> GuestBody
where
    S: futures::Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
{
    let frames = stream.map_ok(hyper::body::Frame::data).map_err(Into::into);
    http_body_util::StreamBody::new(frames).boxed_unsync()
}

pub(super) fn pool<B>(dial: &Arc<dyn Dial>) -> Client<Connector, B>
where
    B: hyper::body::Body + Send,
    B::Data: Send,
{
    builder().build(Connector(Arc::clone(dial)))
}

/// The same for a server that is known to speak HTTP/2: one connection for all.
pub(super) fn http2_pool<B>(dial: &Arc<dyn Dial>) -> Client<Connector, B>
where
    B: hyper::body::Body + Send,
    B::Data: Send,
{
    let mut builder = builder();
    builder
        .http2_only(true)
        .http2_max_header_list_size(HEAD_LIST_BYTES);
    builder.build(Connector(Arc::clone(dial)))
}

fn builder() -> Builder {
    let mut builder = Client::builder(TokioExecutor::new());
    builder
        .pool_idle_timeout(POOL_IDLE)
        .pool_max_idle_per_host(POOL_SIZE)
        .pool_timer(TokioTimer::new());
    builder
}

/// The whole of an answer that is small by its nature.
async fn small(response: Response<Incoming>) -> Result<Bytes, GuestError> {
    let limited = Limited::new(response.into_body(), SMALL_BODY_BYTES);
    let body = limited.collect().await.map_err(GuestError::unreachable)?;
    Ok(body.to_bytes())
}

/// A unary call with this side's own time limit.
pub(super) async fn bounded<T>(
    call: impl Future<Output = Result<T, connectrpc::ConnectError>>,
) -> Result<T, GuestError> {
    time::timeout(UNARY_TIMEOUT, call)
        .await
        .map_err(|_| GuestError::TimedOut {
            waited: UNARY_TIMEOUT,
        })?
        .map_err(Into::into)
}

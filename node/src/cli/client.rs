//! A client of the public interface.

use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, TryStreamExt as _};
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response, request};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use tokio::time;

use super::error::{CliError, chain};

/// Longest a connection may take.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest a call may take that waits for nothing but the node; a create waits 20 s in there.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// The detail of an answer that came because a deadline passed, as the interface spells it.
pub(super) const DEADLINE_EXCEEDED: &str = "deadline_exceeded";

type Failure = Box<dyn std::error::Error + Send + Sync>;
type RequestBody = UnsyncBoxBody<Bytes, Failure>;

/// A client of one node.
#[derive(Clone, Debug)]
pub(super) struct Client {
    base: String,
    key: HeaderValue,
    http: HttpClient<HttpConnector, RequestBody>,
}

impl Client {
    /// A client of the node at `url`, speaking with `key`.
    pub(super) fn new(url: &str, key: &str) -> Result<Self, CliError> {
        let base = url.trim_end_matches('/').to_owned();
        if !base.starts_with("http://") {
            let err = CliError::usage(format!("{base:?} is not an address this command can use"));
            return Err(err.hint("give --url http://HOST:PORT; https comes later"));
        }
        let mut key = HeaderValue::from_str(key)
            .map_err(|_| CliError::usage("the API key holds characters that no key has"))?;
        key.set_sensitive(true);
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        connector.set_nodelay(true);
        let http = HttpClient::builder(TokioExecutor::new()).build(connector);
        Ok(Self { base, key, http })
    }

    /// Where the node answers, without a slash at the end.
    pub(super) fn base(&self) -> &str {
        &self.base
    }

    pub(super) fn key(&self) -> &HeaderValue {
        &self.key
    }

    /// Calls a route that answers JSON or nothing.
    pub(super) async fn call(
        &self,
        method: Method,
        path: &str,
        json: Option<Value>,
    ) -> Result<Value, CliError> {
        self.call_within(method, path, json, CALL_TIMEOUT).await
    }

    /// The same with a time limit of its own.
    pub(super) async fn call_within(
        &self,
        method: Method,
        path: &str,
        json: Option<Value>,
        timeout: Duration,
    ) -> Result<Value, CliError> {
        let body = json.map(|json| json.to_string()).unwrap_or_default();
        let exchange = async {
            let response = self
                .send(method, path, "application/json", full(body))
                .await?;
            self.whole(response).await
        };
        let bytes = time::timeout(timeout, exchange).await.map_err(|_| {
            CliError::new(format!("{} did not answer within {timeout:?}", self.base))
        })??;
        if bytes.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&bytes)
            .map_err(|_| CliError::new(format!("{} answered something else than JSON", self.base)))
    }

    /// Uploads a body of any size.
    pub(super) async fn upload<S>(
        &self,
        path: &str,
        content_type: &str,
        contents: S,
    ) -> Result<(), CliError>
    where
        S: Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    {
        let frames = contents.map_ok(Frame::data).map_err(Into::into);
        let body = StreamBody::new(frames).boxed_unsync();
        let response = self.send(Method::POST, path, content_type, body).await?;
        self.whole(response).await?;
        Ok(())
    }

    /// Sends a request that is known by `retry_key` when it comes again; its answer is JSON.
    pub(super) async fn post_again(
        &self,
        path: &str,
        content_type: &str,
        body: Bytes,
        retry_key: &str,
    ) -> Result<Value, CliError> {
        let body = Full::new(body)
            .map_err(|never| match never {})
            .boxed_unsync();
        self.post_body(path, content_type, body, retry_key).await
    }

    /// The same with a body of any size.
    pub(super) async fn post_stream<S>(
        &self,
        path: &str,
        content_type: &str,
        contents: S,
        retry_key: &str,
    ) -> Result<Value, CliError>
    where
        S: Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    {
        let frames = contents.map_ok(Frame::data).map_err(Into::into);
        let body = StreamBody::new(frames).boxed_unsync();
        self.post_body(path, content_type, body, retry_key).await
    }

    async fn post_body(
        &self,
        path: &str,
        content_type: &str,
        body: RequestBody,
        retry_key: &str,
    ) -> Result<Value, CliError> {
        let request = self
            .request(Method::POST, path, content_type)
            .header("idempotency-key", retry_key);
        let response = self.exchange(path, request, body).await?;
        let bytes = self.whole(response).await?;
        serde_json::from_slice(&bytes)
            .map_err(|_| CliError::new(format!("{} answered something else than JSON", self.base)))
    }

    /// Opens an answer of any size. An answer of status 400 or more becomes an error.
    pub(super) async fn open(
        &self,
        method: Method,
        path: &str,
        json: Option<Value>,
    ) -> Result<Response<Incoming>, CliError> {
        let body = json.map(|json| json.to_string()).unwrap_or_default();
        self.send(method, path, "application/json", full(body))
            .await
    }

    /// Reads all of an answer.
    pub(super) async fn whole(&self, response: Response<Incoming>) -> Result<Bytes, CliError> {
        let collected = response.into_body().collect().await;
        let whole = collected.map_err(|err| self.broken(&err))?;
        Ok(whole.to_bytes())
    }

    /// What a broken connection is called.
    pub(super) fn broken(&self, err: &(dyn std::error::Error + 'static)) -> CliError {
        CliError::new(format!(
            "the answer of {} broke off: {}",
            self.base,
            chain(err)
        ))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        content_type: &str,
        body: RequestBody,
    ) -> Result<Response<Incoming>, CliError> {
        let request = self.request(method, path, content_type);
        self.exchange(path, request, body).await
    }

    fn request(&self, method: Method, path: &str, content_type: &str) -> request::Builder {
        Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header("x-api-key", self.key.clone())
            .header(CONTENT_TYPE, content_type)
    }

    async fn exchange(
        &self,
        path: &str,
        request: request::Builder,
        body: RequestBody,
    ) -> Result<Response<Incoming>, CliError> {
        let request = request
            .body(body)
            .map_err(|err| CliError::usage(format!("{}: {err}", self.base)))?;
        let answered = self.http.request(request).await;
        let response = answered.map_err(|err| {
            CliError::new(format!("cannot reach {}: {}", self.base, chain(&err)))
                .hint("is the node up? `wrenn dev status` or `wrenn doctor` tell")
        })?;
        if response.status().as_u16() < 400 {
            return Ok(response);
        }
        let status = response.status();
        let body = self.whole(response).await.unwrap_or_default();
        Err(refusal(path, status, &body))
    }
}

fn full(text: String) -> RequestBody {
    Full::new(Bytes::from(text))
        .map_err(|never| match never {})
        .boxed_unsync()
}

/// The error envelope as an error with advice.
pub(super) fn refusal(path: &str, status: http::StatusCode, body: &[u8]) -> CliError {
    let envelope: Value = serde_json::from_slice(body).unwrap_or_default();
    let error = &envelope["error"];
    let code = error["code"].as_str().unwrap_or_default();
    let Some(message) = error["message"].as_str() else {
        return CliError {
            status: Some(status.as_u16()),
            ..CliError::new(format!("the node answered {status}"))
        }
        .hint("does --url point to a Wrenn API?");
    };
    let mut err = CliError::new(message);
    err.status = Some(status.as_u16());
    err.detail = error["detail"].as_str().map(str::to_owned);
    match advice(path, code) {
        Some(hint) => err.hint(hint),
        None => err,
    }
}

fn advice(path: &str, code: &str) -> Option<&'static str> {
    let about_nodes = path.starts_with("/v1/nodes");
    match code {
        "unauthorized" => Some("give --api-key or WRENN_API_KEY; `wrenn dev env` prints them"),
        "not_found" if path.starts_with("/v1/api-keys") => Some("`wrenn key ls` shows the keys"),
        "not_found" if path.starts_with("/v1/teams") => Some("`wrenn team ls` shows the teams"),
        "rate_limited" => Some("`wrenn cluster get` shows key_rate and key_burst"),
        "not_found" if about_nodes => Some("`wrenn node ls` shows the nodes"),
        "not_found" if path.starts_with("/v1/tokens") => Some("`wrenn token ls` shows the tokens"),
        "conflict" if path.starts_with("/v1/snapshots") => Some("--overwrite replaces it"),
        "not_found" => Some("`wrenn capsule ls`, `template ls` and `node ls` show what there is"),
        "invalid_state" if about_nodes => Some("`wrenn node ls` shows how the nodes are"),
        "invalid_state" if is_about_people(path) => None,
        "invalid_state" => Some("`wrenn capsule get ID` shows where it stands"),
        "no_hosts_available" => Some("`wrenn node ls` shows what is taken and who takes nothing"),
        "no_quorum" => Some("`wrenn cluster get` shows who votes; most of them must be up"),
        "host_unavailable" => Some("`wrenn node ls` shows which nodes are away"),
        "forbidden" => Some("a key of another scope or team may: `wrenn key create --scope`"),
        "agent_error" => Some("`wrenn capsule logs ID` shows the guest's console"),
        _ => None,
    }
}

fn is_about_people(path: &str) -> bool {
    path.starts_with("/v1/teams") || path.starts_with("/v1/api-keys")
}

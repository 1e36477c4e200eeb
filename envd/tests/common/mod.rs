//! The real agent on a port of its own, and a small Connect client that sees every byte.

#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)] // each test file uses its part

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Buf, Bytes, BytesMut};
use futures::{Stream, StreamExt, stream};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proto::envd::process as wire;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use wire::__buffa::oneof::process_event::{Event, data_event::Output};

/// No test waits longer than this for anything.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for `future`, and fails the test rather than hang.
pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .expect("within the test's patience")
}

pub type Body = BoxBody<Bytes, std::io::Error>;

pub fn full(body: impl Into<Bytes>) -> Body {
    Full::new(body.into())
        .map_err(|never| match never {})
        .boxed()
}

pub fn streamed(pieces: impl Stream<Item = Bytes> + Send + Sync + 'static) -> Body {
    BodyExt::boxed(StreamBody::new(pieces.map(|piece| Ok(Frame::data(piece)))))
}

/// Which encoding of messages a test speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    Json,
    Proto,
}

pub const BOTH: [Codec; 2] = [Codec::Json, Codec::Proto];

impl Codec {
    fn name(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::Proto => "proto",
        }
    }

    pub fn encode<M: buffa::Message + Serialize>(self, message: &M) -> Bytes {
        match self {
            Self::Json => serde_json::to_vec(message).unwrap().into(),
            Self::Proto => message.encode_to_bytes(),
        }
    }

    pub fn decode<M: buffa::Message + DeserializeOwned>(self, text: &[u8]) -> M {
        match self {
            Self::Json => serde_json::from_slice(text).expect("JSON of the message"),
            Self::Proto => M::decode_from_slice(text).expect("the message"),
        }
    }
}

/// An error as Connect sends it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RpcError {
    pub status: u16,
    pub code: String,
    pub message: String,
}

impl RpcError {
    fn new(status: StatusCode, error: &Value) -> Self {
        let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
        Self {
            status: status.as_u16(),
            code: text("code"),
            message: text("message"),
        }
    }
}

/// One running agent. Dropping it ends it and all that it started.
pub struct Envd {
    child: Child,
    pub address: String,
    said: Arc<Mutex<String>>,
    client: Client<HttpConnector, Body>,
}

impl Envd {
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    pub fn start_with(args: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_envd"))
            .args(["--port", "0", "--isnotfc"])
            .args(args)
            .env("ENVD_SECRET", "must not be inherited")
            .stderr(Stdio::piped())
            .spawn()
            .expect("the agent starts");
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = lines
            .find_map(|line| Some(line.ok()?.split_once("listening on ")?.1.to_owned()))
            .expect("the agent says where it listens");
        let said = Arc::<Mutex<String>>::default();
        let heard = said.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                eprintln!("{line}");
                heard.lock().unwrap().push_str(&format!("{line}\n"));
            }
        });
        Self {
            child,
            address,
            said,
            client: Client::builder(TokioExecutor::new()).build_http(),
        }
    }

    /// Fails where the agent has panicked, answers no more, or has grown past `mib`.
    pub async fn is_well(&self, mib: u64) {
        let began = std::time::Instant::now();
        assert_eq!(self.get("/health").await.status, 200);
        assert!(began.elapsed() < Duration::from_secs(5), "it was slow");
        let said = self.said.lock().unwrap().clone();
        assert!(!said.contains("panicked"), "{said}");
        let resident = self.resident_kib();
        assert!(resident < mib * 1024, "{resident} KiB");
    }

    pub fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.unwrap().trim().trim_end_matches(" kB");
        kib.parse().unwrap()
    }

    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    pub async fn send(&self, mut request: Request<Body>) -> Response<Incoming> {
        let path = request.uri().to_string();
        *request.uri_mut() = format!("http://{}{path}", self.address)
            .parse()
            .expect("a URI");
        soon(self.client.request(request)).await.expect("an answer")
    }

    /// Sends and reads the whole answer.
    pub async fn fetch(&self, request: Request<Body>) -> Answer {
        let (parts, body) = self.send(request).await.into_parts();
        let body = soon(body.collect()).await.expect("a whole body").to_bytes();
        Answer {
            status: parts.status.as_u16(),
            headers: parts.headers,
            body,
        }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.fetch(Request::get(path).body(full("")).unwrap()).await
    }

    pub async fn post(&self, path: &str, body: impl Into<Bytes>) -> Answer {
        self.fetch(Request::post(path).body(full(body)).unwrap())
            .await
    }

    fn rpc_request(
        method: &str,
        content_type: String,
        headers: &[(&str, &str)],
    ) -> http::request::Builder {
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("/{method}"))
            .header("content-type", content_type)
            .header("connect-protocol-version", "1");
        headers.iter().fold(request, |request, (name, value)| {
            request.header(*name, *value)
        })
    }

    /// A unary call, as the Python client sends it.
    pub async fn call_with<Q, A>(
        &self,
        codec: Codec,
        method: &str,
        message: &Q,
        headers: &[(&str, &str)],
    ) -> Result<A, RpcError>
    where
        Q: buffa::Message + Serialize,
        A: buffa::Message + DeserializeOwned,
    {
        let request = Self::rpc_request(method, format!("application/{}", codec.name()), headers)
            .header("content-encoding", "identity")
            .header("accept-encoding", "identity")
            .body(full(codec.encode(message)))
            .unwrap();
        let answer = self.fetch(request).await;
        if answer.status == 200 {
            return Ok(codec.decode(&answer.body));
        }
        assert_eq!(answer.header("content-type"), Some("application/json"));
        let status = StatusCode::from_u16(answer.status).unwrap();
        Err(RpcError::new(status, &answer.json()))
    }

    pub async fn call<Q, A>(&self, codec: Codec, method: &str, message: &Q) -> Result<A, RpcError>
    where
        Q: buffa::Message + Serialize,
        A: buffa::Message + DeserializeOwned,
    {
        self.call_with(codec, method, message, &[]).await
    }

    /// A streaming call with the header quirks of the Python client: a chunked body, and an HTTP
    /// encoding header that must not be acted on.
    pub async fn stream_with<Q: buffa::Message + Serialize>(
        &self,
        codec: Codec,
        method: &str,
        messages: impl Stream<Item = Q> + Send + Sync + 'static,
        headers: &[(&str, &str)],
    ) -> Messages {
        let body = streamed(messages.map(move |message| envelope(&codec.encode(&message))));
        let content_type = format!("application/connect+{}", codec.name());
        let request = Self::rpc_request(method, content_type.clone(), headers)
            .header("connect-content-encoding", "identity")
            .header("connect-accept-encoding", "identity")
            .header("accept-encoding", "zstd,gzip,br")
            .body(body)
            .unwrap();
        let answer = self.send(request).await;
        assert_eq!(answer.status(), 200, "streams always answer 200");
        assert_eq!(answer.headers()["content-type"], content_type);
        assert_eq!(answer.headers().get("content-encoding"), None);
        Messages {
            codec,
            body: answer.into_body(),
            received: BytesMut::new(),
        }
    }

    pub async fn start_process(
        &self,
        codec: Codec,
        request: wire::StartRequest,
        headers: &[(&str, &str)],
    ) -> Messages {
        let one = stream::iter([request]);
        self.stream_with(codec, "process.Process/Start", one, headers)
            .await
    }

    pub async fn connect(&self, codec: Codec, process: wire::ProcessSelector) -> Messages {
        let process = process.into();
        let one = stream::iter([wire::ConnectRequest {
            process,
            ..Default::default()
        }]);
        self.stream_with(codec, "process.Process/Connect", one, &[])
            .await
    }

    /// Runs a shell line to its end.
    pub async fn shell(&self, line: &str) -> Ran {
        let stream = self.start_process(Codec::Json, shell(line), &[]).await;
        stream.run().await.expect("the process ran")
    }

    pub async fn list(&self, codec: Codec) -> Vec<wire::ProcessInfo> {
        let request = wire::ListRequest::default();
        let answer = self.call(codec, "process.Process/List", &request).await;
        let answer: wire::ListResponse = answer.expect("listed");
        answer.processes
    }

    pub async fn signal(&self, pid: u32, signal: wire::Signal) -> Result<(), RpcError> {
        let process = by_pid(pid).into();
        let request = wire::SendSignalRequest {
            process,
            signal: signal.into(),
            ..Default::default()
        };
        let answer = self
            .call(Codec::Proto, "process.Process/SendSignal", &request)
            .await;
        answer.map(|_: wire::SendSignalResponse| ())
    }
}

impl Drop for Envd {
    fn drop(&mut self) {
        for child in children_of(self.pid()) {
            let _ = kill(Pid::from_raw(-child), Signal::SIGKILL);
            let _ = kill(Pid::from_raw(child), Signal::SIGKILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn children_of(parent: i32) -> Vec<i32> {
    let pids = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let parent_of = |pid: &i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(") ")?
            .1
            .split(' ')
            .nth(1)?
            .parse::<i32>()
            .ok()
    };
    pids.filter(|pid| parent_of(pid) == Some(parent)).collect()
}

pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {:?}", self.body))
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("text")
    }
}

fn envelope(message: &[u8]) -> Bytes {
    let length = u32::try_from(message.len()).unwrap();
    [&[0][..], &length.to_be_bytes(), message].concat().into()
}

/// The answers of one stream.
pub struct Messages {
    codec: Codec,
    body: Incoming,
    received: BytesMut,
}

impl Messages {
    /// The next envelope: its flags and content.
    async fn envelope(&mut self) -> Option<(u8, Bytes)> {
        loop {
            if let Some(header) = self.received.first_chunk::<5>() {
                let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]);
                let length = usize::try_from(length).unwrap();
                if self.received.len() >= 5 + length {
                    let flags = header[0];
                    self.received.advance(5);
                    return Some((flags, self.received.split_to(length).freeze()));
                }
            }
            let frame = soon(self.body.frame())
                .await?
                .expect("the stream is not cut");
            self.received
                .extend_from_slice(frame.data_ref().expect("no trailers"));
        }
    }

    /// The next message, the stream's error, or `None` at its good end.
    pub async fn next<A: buffa::Message + DeserializeOwned>(
        &mut self,
    ) -> Option<Result<A, RpcError>> {
        let (flags, content) = self.envelope().await.expect("an end-of-stream envelope");
        if flags & 2 == 0 {
            assert_eq!(flags, 0, "nothing is compressed");
            return Some(Ok(self.codec.decode(&content)));
        }
        let end: Value = serde_json::from_slice(&content).unwrap();
        let error = end.get("error")?;
        Some(Err(RpcError::new(StatusCode::OK, error)))
    }

    /// The next event of a process stream.
    pub async fn event(&mut self) -> Option<Result<Event, RpcError>> {
        // Both streams have the same messages.
        let response = self.next::<wire::StartResponse>().await?;
        Some(response.map(|response| {
            let event = response.event.into_option().expect("an event");
            event.event.expect("a known event")
        }))
    }

    /// Reads the start event, which must come first.
    pub async fn pid(&mut self) -> u32 {
        match self.event().await {
            Some(Ok(Event::Start(start))) => start.pid,
            other => panic!("start event expected, got {other:?}"),
        }
    }

    /// Reads output until `wanted` has appeared in it.
    pub async fn until(&mut self, wanted: &str) -> Vec<u8> {
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains(wanted) {
            match self.event().await {
                Some(Ok(Event::Data(data))) => match data.output.expect("output") {
                    Output::Stdout(d) | Output::Stderr(d) | Output::Pty(d) => seen.extend(d),
                },
                other => panic!("{wanted:?} expected after {seen:?}, got {other:?}"),
            }
        }
        seen
    }

    /// Reads a process stream to its end and checks its order.
    pub async fn run(mut self) -> Result<Ran, RpcError> {
        let pid = match self.event().await.expect("a first event")? {
            Event::Start(start) => start.pid,
            other => panic!("start event expected, got {other:?}"),
        };
        let mut ran = Ran {
            pid,
            ..Ran::default()
        };
        while let Some(event) = self.event().await {
            assert!(ran.end.is_none(), "nothing follows the end event");
            match event? {
                Event::Start(_) => panic!("a second start event"),
                Event::Keepalive(_) => ran.keepalives += 1,
                Event::Data(data) => match data.output.expect("output") {
                    Output::Stdout(data) => ran.stdout.extend(data),
                    Output::Stderr(data) => ran.stderr.extend(data),
                    Output::Pty(data) => ran.pty.extend(data),
                },
                Event::End(end) => ran.end = Some(*end),
            }
        }
        assert!(ran.end.is_some(), "exactly one end event");
        Ok(ran)
    }
}

/// What a process did.
#[derive(Clone, Debug, Default)]
pub struct Ran {
    pub pid: u32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub pty: Vec<u8>,
    pub keepalives: u32,
    pub end: Option<wire::process_event::EndEvent>,
}

impl Ran {
    pub fn end(&self) -> &wire::process_event::EndEvent {
        self.end.as_ref().expect("ended")
    }

    pub fn out(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("text")
    }

    pub fn err(&self) -> &str {
        std::str::from_utf8(&self.stderr).expect("text")
    }
}

pub fn command(cmd: &str, args: &[&str]) -> wire::StartRequest {
    let config = wire::ProcessConfig {
        cmd: cmd.to_owned(),
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        ..Default::default()
    };
    wire::StartRequest {
        process: config.into(),
        stdin: Some(false),
        ..Default::default()
    }
}

pub fn shell(line: &str) -> wire::StartRequest {
    command("/bin/sh", &["-c", line])
}

pub fn by_pid(pid: u32) -> wire::ProcessSelector {
    let selector = Some(wire::__buffa::oneof::process_selector::Selector::Pid(pid));
    wire::ProcessSelector {
        selector,
        ..Default::default()
    }
}

pub fn by_tag(tag: &str) -> wire::ProcessSelector {
    let selector = Some(wire::__buffa::oneof::process_selector::Selector::Tag(
        tag.to_owned(),
    ));
    wire::ProcessSelector {
        selector,
        ..Default::default()
    }
}

pub fn basic(user: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:")))
}

/// Whether a process exists, zombies included.
pub fn exists(pid: u32) -> bool {
    kill(Pid::from_raw(pid.cast_signed()), None).is_ok()
}

//! A world for tests of the interface: the real router on a real port over a log in memory, and
//! the real guest agent in this process. Only the reconciler is played: it does to each sandbox
//! what the test tells it to.

#![allow(dead_code, missing_docs, unreachable_pub)] // each test file uses its part

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use envd::agent::{Agent, Surroundings};
use futures::future::BoxFuture;
use futures::{Stream, StreamExt as _};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use proto::epoch::Epoch;
use proto::ids::{ClusterId, KeyId, NodeId, NodeKey, SandboxId, SnapshotId, TeamId};
use proto::units::{Mib, Stamp};
use raft::command::{Command, Receipt, Report};
use raft::state::{
    GuestVersions, Key, Needs, Node, Phase, Resources, Sealed, Settings, SnapshotKind, Template,
};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};
use wrenn_node::api::{
    self, ApiState, ClusterInfo, LinearizeFuture, Minted, NoQuorum, NodeFacts, Standing, TokenTerms,
};
use wrenn_node::base::clock::{HandBootClock, HandClock};
use wrenn_node::base::sample::Sample;
use wrenn_node::cluster::liveness::Hint;
use wrenn_node::cluster::{Log, MemoryLog, Proposer};
use wrenn_node::guest::{CutDial, Guest, TcpDial};
use wrenn_node::relay::{InProcessPeers, LocalFacts, LocalGuests, Relay, Transfer, Waiting};

/// The key of team 1, and the one of team 2.
pub const KEY: &str = "wrn_00000000000000000000000000000001";
pub const OTHER_KEY: &str = "wrn_00000000000000000000000000000002";
/// An administrator's key.
pub const ADMIN_KEY: &str = "wrn_00000000000000000000000000000009";
/// No test waits longer than this for anything.
pub const PATIENCE: Duration = Duration::from_secs(60);
pub const HERE: NodeId = NodeId(1);
const ELSEWHERE: NodeId = NodeId(99);

/// What becomes of a sandbox that is started, paused or stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// What was asked for.
    Obey,
    /// Nothing, ever.
    Hang,
    /// It breaks, and this is why.
    Break(&'static str),
}

/// The guests of the played node.
#[derive(Debug, Default)]
pub struct Guests {
    running: Mutex<HashMap<SandboxId, Guest>>,
    pub touched: Mutex<Vec<SandboxId>>,
    pub active: Mutex<HashMap<SandboxId, Stamp>>,
    pub console: Mutex<Option<Vec<u8>>>,
    pub transfer: Mutex<Option<Transfer>>,
    pub waiting: Mutex<Option<Waiting>>,
    pub samples: Mutex<HashMap<SandboxId, Vec<Sample>>>,
    /// Cancelled when the guests die.
    pub gone: CancellationToken,
    pub start: Mutex<Option<Fate>>,
    pub stop: Mutex<Option<Fate>>,
    pub pause: Mutex<Option<Fate>>,
}

impl LocalGuests for Guests {
    fn guest(&self, id: SandboxId, _: Epoch) -> Option<Guest> {
        self.running.lock().unwrap().get(&id).cloned()
    }

    fn touch(&self, id: SandboxId) {
        self.touched.lock().unwrap().push(id);
    }

    fn facts(&self, id: SandboxId) -> Option<LocalFacts> {
        Some(LocalFacts {
            last_active: self.active.lock().unwrap().get(&id).copied(),
            disk_used_bytes: Some((3 << 20) + 1),
            start_stages: Vec::new(),
            start: None,
            memory: None,
            transfer: *self.transfer.lock().unwrap(),
            waiting: self.waiting.lock().unwrap().clone(),
        })
    }

    fn samples(&self, id: SandboxId, _: Duration) -> Vec<Sample> {
        let samples = self.samples.lock().unwrap();
        samples.get(&id).cloned().unwrap_or_default()
    }

    fn console_tail(&self, _: SandboxId, bytes: usize) -> Option<Vec<u8>> {
        let console = self.console.lock().unwrap().clone()?;
        Some(console[console.len().saturating_sub(bytes)..].to_vec())
    }
}

/// What the cluster looks like beside the replicated state: as the test says.
pub struct Surmised {
    pub standing: Mutex<Standing>,
    pub loads: Mutex<Vec<Hint>>,
    pub quorum: AtomicBool,
    /// What has happened and this node hears of when it catches up with the cluster.
    pub unheard: Mutex<Option<BoxFuture<'static, ()>>>,
}

impl fmt::Debug for Surmised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Surmised").finish_non_exhaustive()
    }
}

impl Default for Surmised {
    fn default() -> Self {
        let standing = Standing {
            leader: Some(HERE),
            term: 7,
            voters: [HERE].into(),
            has_quorum: true,
            ..Standing::default()
        };
        Self {
            standing: Mutex::new(standing),
            loads: Mutex::default(),
            quorum: AtomicBool::new(true),
            unheard: Mutex::default(),
        }
    }
}

impl ClusterInfo for Surmised {
    fn standing(&self) -> Standing {
        self.standing.lock().unwrap().clone()
    }

    fn loads(&self) -> Vec<Hint> {
        self.loads.lock().unwrap().clone()
    }

    fn linearize(&self) -> LinearizeFuture {
        let has_quorum = self.quorum.load(Ordering::Relaxed);
        let lost = || NoQuorum("the test says so".into());
        let unheard = self.unheard.lock().unwrap().take();
        Box::pin(async move {
            if let Some(unheard) = unheard {
                unheard.await;
            }
            has_quorum.then_some(()).ok_or_else(lost)
        })
    }

    fn mint(&self, terms: &TokenTerms) -> Result<Minted, String> {
        Ok(Minted {
            public_key: [4; 32],
            text: format!("secret-of-{}", terms.id),
        })
    }
}

/// A running interface.
pub struct World {
    pub address: SocketAddr,
    pub guests: Arc<Guests>,
    pub proposer: Proposer,
    pub clock: HandClock,
    pub boot_clock: HandBootClock,
    pub cluster: Arc<Surmised>,
    pub agent: SocketAddr,
    http: Client<HttpConnector, Body>,
    state: ApiState,
    _stop: DropGuard,
}

pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// An answer that was read to its end.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|err| panic!("no JSON ({err}): {:?}", self.body))
    }

    pub fn code(&self) -> String {
        self.json()["error"]["code"]
            .as_str()
            .expect("a code")
            .into()
    }

    /// Asserts an error of this status and code, with a message.
    #[track_caller]
    pub fn refused(&self, status: u16, code: &str) {
        let shown = String::from_utf8_lossy(&self.body);
        assert_eq!(
            (self.status, self.code().as_str()),
            (status, code),
            "{shown}"
        );
        assert!(
            self.json()["error"]["message"]
                .as_str()
                .is_some_and(|it| !it.is_empty())
        );
    }

    #[track_caller]
    pub fn is(&self, status: u16) -> &Self {
        assert_eq!(
            self.status,
            status,
            "{}",
            String::from_utf8_lossy(&self.body)
        );
        self
    }
}

impl World {
    pub async fn new() -> Self {
        Self::with_waits(Duration::from_secs(20), Duration::from_secs(10)).await
    }

    pub async fn with_waits(create: Duration, destroy: Duration) -> Self {
        Self::build(create, destroy, |relay| relay).await
    }

    /// One whose webhooks may go to loopback.
    pub async fn allowing_loopback() -> Self {
        let loopback = vec!["127.0.0.0/8".parse().expect("a network")];
        Self::served(|state| state.with_webhook_allow(loopback)).await
    }

    /// One whose handlers share something else than by default.
    pub async fn served(change: impl FnOnce(ApiState) -> ApiState) -> Self {
        let mut world = Self::new().await;
        let state = change(world.state.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        world.address = listener.local_addr().expect("an address");
        let stop = CancellationToken::new();
        tokio::spawn(api::serve(listener, api::router(state.clone()), stop));
        world.state = state;
        world
    }

    /// What its handlers share.
    pub fn api_state(&self) -> ApiState {
        self.state.clone()
    }

    /// An interface on another node than the one that owns every sandbox.
    pub async fn elsewhere() -> (Self, InProcessPeers) {
        let peers = InProcessPeers::default().seen_from(ELSEWHERE);
        let others = peers.clone();
        let (create, destroy) = (Duration::from_secs(20), Duration::from_secs(10));
        let world = Self::build(create, destroy, |owner| {
            others.add(HERE, owner.server());
            let nobody = Arc::new(Guests::default());
            Relay::new(ELSEWHERE, owner.view().clone(), nobody).with_peers(Arc::new(others))
        });
        (world.await, peers)
    }

    async fn build(
        create: Duration,
        destroy: Duration,
        asked: impl FnOnce(Relay) -> Relay,
    ) -> Self {
        let stop = CancellationToken::new();
        let log: Arc<dyn Log> = Arc::new(MemoryLog::default());
        let clock = HandClock::at(Stamp(1_700_000_000_000));
        let boot_clock = HandBootClock::default();
        let proposer = Proposer::new(log, Arc::new(clock.clone()));
        populate(&proposer).await;
        let agent = start_agent(&stop).await;
        let guests = Arc::new(Guests::default());
        tokio::spawn(play_reconciler(proposer.clone(), guests.clone(), agent));

        let relay = asked(Relay::new(HERE, proposer.view(), guests.clone()));
        tokio::spawn(relay.clone().follow(stop.clone()));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let facts = NodeFacts {
            id: HERE,
            name: "here".into(),
            url: format!("http://{address}"),
            version: "1.2.3".into(),
        };
        let cluster = Arc::new(Surmised::default());
        let state = ApiState::new(proposer.clone(), relay, Arc::new(clock.clone()), facts)
            .with_cluster(cluster.clone())
            .with_boot_clock(Arc::new(boot_clock.clone()))
            .with_waits(create, destroy);
        tokio::spawn(api::serve(
            listener,
            api::router(state.clone()),
            stop.clone(),
        ));
        Self {
            address,
            guests,
            proposer,
            clock,
            boot_clock,
            cluster,
            agent,
            http: Client::builder(TokioExecutor::new()).build_http(),
            state,
            _stop: stop.drop_guard(),
        }
    }

    /// The interface of another node of the same cluster, which runs nothing.
    pub async fn another_node(&self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let facts = NodeFacts {
            id: ELSEWHERE,
            name: "there".into(),
            url: format!("http://{address}"),
            version: "1.2.3".into(),
        };
        let nobody = Arc::new(Guests::default());
        let relay = Relay::new(ELSEWHERE, self.proposer.view(), nobody);
        let clock = Arc::new(self.clock.clone());
        let state = ApiState::new(self.proposer.clone(), relay, clock, facts);
        tokio::spawn(api::serve(
            listener,
            api::router(state),
            CancellationToken::new(),
        ));
        address
    }

    /// Posts to the interface at `address` a request that may come again.
    pub async fn post_again(
        &self,
        address: SocketAddr,
        path: &str,
        (retry_key, key): (&str, &str),
        json: Value,
    ) -> Answer {
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("http://{address}{path}"))
            .header("x-api-key", key)
            .header("idempotency-key", retry_key);
        self.send(request.body(full(json.to_string())).unwrap())
            .await
    }

    /// Ends the sessions as a stopping node does.
    pub async fn stop_sessions(&self) {
        self.state.end_sessions().await;
    }

    /// Sends a request as it is.
    pub async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.open(request).await;
        let (parts, body) = response.into_parts();
        let collected = tokio::time::timeout(PATIENCE, body.collect());
        let body = collected.await.expect("in time").expect("a whole answer");
        Answer {
            status: parts.status.as_u16(),
            headers: parts.headers,
            body: body.to_bytes(),
        }
    }

    /// Sends a request and leaves the answer's body to the caller.
    pub async fn open(&self, request: Request<Body>) -> Response<Incoming> {
        let answered = tokio::time::timeout(PATIENCE, self.http.request(request));
        answered.await.expect("in time").expect("an answer")
    }

    pub fn request(&self, method: Method, path: &str) -> http::request::Builder {
        Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.address))
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.ask(Method::GET, path, KEY, "").await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        self.ask(Method::DELETE, path, KEY, "").await
    }

    pub async fn post(&self, path: &str, json: Value) -> Answer {
        self.ask(Method::POST, path, KEY, &json.to_string()).await
    }

    pub async fn ask(&self, method: Method, path: &str, key: &str, body: &str) -> Answer {
        let request = self.request(method, path).header("x-api-key", key);
        self.send(request.body(full(body.to_owned())).unwrap())
            .await
    }

    /// Asks as an administrator; an empty body is none.
    pub async fn admin(&self, method: Method, path: &str, body: Value) -> Answer {
        let body = match body {
            Value::Null => String::new(),
            json => json.to_string(),
        };
        self.ask(method, path, ADMIN_KEY, &body).await
    }

    /// Lets another node in, which has no room for anything.
    pub async fn join(&self, name: &str, key: u8) -> NodeId {
        let made = self.admin(Method::POST, "/v1/tokens", json!({})).await;
        let token = made.is(201).json()["id"].as_str().unwrap().parse().unwrap();
        let node = Node {
            name: name.into(),
            key: NodeKey([key; 32]),
            cluster_address: format!("10.0.0.{key}:7321"),
            ..Node::default()
        };
        let redeemed = self.proposer.propose(Command::RedeemToken { token, node });
        match redeemed.await.expect("let in") {
            Receipt::Admitted(id) => id,
            other => panic!("{other:?}"),
        }
    }

    /// Creates a running capsule.
    pub async fn capsule(&self) -> String {
        let made = self.post("/v1/capsules", json!({})).await;
        assert_eq!(made.status, 201, "{:?}", made.body);
        made.json()["id"].as_str().expect("an id").to_owned()
    }

    pub async fn exec(&self, id: &str, script: &str) -> Value {
        let body = json!({"cmd": "/bin/sh", "args": ["-c", script], "background": false});
        let path = format!("/v1/capsules/{id}/exec");
        self.post(&path, body).await.is(200).json()
    }

    /// Posts a form made of these fields, in this order.
    pub async fn form(&self, path: &str, fields: &[(&str, &[u8])]) -> Answer {
        let request = self
            .request(Method::POST, path)
            .header("x-api-key", KEY)
            .header("content-type", "multipart/form-data; boundary=xyz");
        self.send(request.body(full(encode_form(fields))).unwrap())
            .await
    }

    /// Makes the guest of `id` one that nobody answers for.
    pub fn cut_off(&self, id: &str) {
        let id: SandboxId = id.parse().unwrap();
        // Port 1 of loopback: nothing listens there.
        let nowhere = Arc::new(TcpDial("127.0.0.1:1".parse().unwrap()));
        let guest = Guest::new(nowhere, "token").unwrap();
        self.guests.running.lock().unwrap().insert(id, guest);
    }
}

pub fn encode_form(fields: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, data) in fields {
        let head = format!("--xyz\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n");
        bytes.extend_from_slice(head.as_bytes());
        bytes.extend_from_slice(data);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"--xyz--\r\n");
    bytes
}

pub fn full(body: impl Into<Bytes>) -> Body {
    Full::new(body.into())
        .map_err(|never| match never {})
        .boxed_unsync()
}

pub fn streamed(pieces: impl Stream<Item = Bytes> + Send + 'static) -> Body {
    streamed_results(pieces.map(Ok))
}

pub fn streamed_results(
    pieces: impl Stream<Item = std::io::Result<Bytes>> + Send + 'static,
) -> Body {
    StreamBody::new(pieces.map(|piece| piece.map(Frame::data))).boxed_unsync()
}

/// Waits until `look` finds something.
pub async fn eventually<T>(mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let search = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, search)
        .await
        .expect("in time")
}

/// Whether a status is one of the success class.
pub fn is_success(status: u16) -> bool {
    StatusCode::from_u16(status).is_ok_and(|status| status.is_success())
}

async fn populate(proposer: &Proposer) {
    let node = Node {
        id: HERE,
        name: "here".into(),
        key: NodeKey([7; 32]),
        api_url: "http://here".into(),
        cluster_address: "127.0.0.1:1".into(),
        capacity: Resources {
            vcpus: 64,
            memory: Mib(16_384),
            disk: Mib(100_000),
            sandboxes: 32,
        },
        vmm: "fake".into(),
        vmm_version: "1".into(),
        accelerator: "none".into(),
        version: "1.2.3".into(),
        templates: [("minimal".into(), [1; 32])].into(),
        reads_actors: true,
        boots_disks: true,
        ..Node::default()
    };
    let template = Template {
        name: "minimal".into(),
        digest: [1; 32],
        disk: Mib(5120),
        size_bytes: 300 << 20,
        created_at: Stamp(0),
    };
    propose(proposer, Command::AdmitNode(node)).await;
    propose(proposer, Command::PutTemplate(template)).await;
    let (id, settings) = (ClusterId([5; 16]), Settings::default());
    propose(proposer, Command::FoundCluster { id, settings }).await;
    for (number, secret) in [(1, KEY), (2, OTHER_KEY), (0, ADMIN_KEY)] {
        let key = Key {
            id: KeyId([number; 16]),
            team: TeamId([number; 16]),
            name: "test".into(),
            hash: Sha256::digest(secret).into(),
            shown: secret[..10].into(),
            ..Key::default()
        };
        propose(proposer, Command::PutKey(key)).await;
    }
}

pub async fn propose(proposer: &Proposer, command: Command) {
    proposer.propose(command).await.expect("a change");
}

/// The real guest agent, serving in this process.
async fn start_agent(stop: &CancellationToken) -> SocketAddr {
    let agent = Arc::new(Agent::new(Surroundings::default()));
    let reaper = agent.processes.reaper().clone();
    tokio::spawn(reaper.listen().expect("a signal handler"));
    let any = "127.0.0.1:0".parse().unwrap();
    let listener = envd::serve::listen(any).await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let router = envd::http::router(agent);
    tokio::spawn(envd::serve::run(listener, router, stop.clone()));
    address
}

/// What the one pause under an ownership made.
fn sealed(epoch: Epoch, pause: u64) -> Sealed {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&epoch.0.to_be_bytes());
    Sealed {
        id: SnapshotId(id),
        pause,
        needs: Needs {
            vmm: "fake".into(),
            base: [1; 32],
            ..Needs::default()
        },
        ..Sealed::default()
    }
}

/// What one checkpoint made.
fn checkpoint(pause: u64, kind: SnapshotKind) -> Sealed {
    let mut id = [0xc; 16];
    id[..8].copy_from_slice(&pause.to_be_bytes());
    Sealed {
        id: SnapshotId(id),
        kind,
        memory_bytes: match kind {
            SnapshotKind::Snapshot => 64 << 20,
            SnapshotKind::Base => 0,
        },
        ..sealed(Epoch(0), pause)
    }
}

/// Does to every sandbox what the test says, as a reconciler and its reports would.
async fn play_reconciler(proposer: Proposer, guests: Arc<Guests>, agent: SocketAddr) {
    let mut view = proposer.view();
    loop {
        let state = view.state();
        let todo: Vec<_> = state
            .sandboxes()
            .filter(|it| {
                !it.phase.is_ended() && !matches!(it.phase, Phase::Running | Phase::Paused)
            })
            .cloned()
            .collect();
        for sandbox in todo {
            let fate = match sandbox.phase {
                Phase::Starting | Phase::Resuming => &guests.start,
                Phase::Pausing | Phase::Snapshotting => &guests.pause,
                _ => &guests.stop,
            };
            let fate = fate.lock().unwrap().clone().unwrap_or(Fate::Obey);
            let asked = sandbox.checkpoint.as_ref().map(|it| it.purpose.kind());
            let report = match (fate, sandbox.phase) {
                (Fate::Hang, _) => continue,
                (Fate::Break(reason), Phase::Pausing | Phase::Snapshotting) => Report::Thawed {
                    reason: reason.into(),
                },
                (Fate::Break(reason), _) => Report::Failed {
                    reason: reason.into(),
                },
                (Fate::Obey, Phase::Snapshotting) if sandbox.checkpoint.is_some() => {
                    Report::Sealed(checkpoint(sandbox.pause, asked.unwrap_or_default()))
                }
                (Fate::Obey, Phase::Snapshotting) => Report::Running(sandbox.versions.clone()),
                (Fate::Obey, Phase::Pausing) => {
                    guests.running.lock().unwrap().remove(&sandbox.id);
                    Report::Sealed(sealed(sandbox.epoch, sandbox.pause))
                }
                (Fate::Obey, Phase::Starting | Phase::Resuming) => {
                    let dial = CutDial::new(TcpDial(agent), guests.gone.clone());
                    let guest = Guest::new(Arc::new(dial), "token").unwrap();
                    guests.running.lock().unwrap().insert(sandbox.id, guest);
                    Report::Running(GuestVersions {
                        kernel: "6.1".into(),
                        vmm: "fake 1".into(),
                        agent: "0.6.7".into(),
                    })
                }
                (Fate::Obey, _) => {
                    guests.running.lock().unwrap().remove(&sandbox.id);
                    Report::Stopped {
                        reason: String::new(),
                    }
                }
            };
            let (id, epoch, node) = (sandbox.id, sandbox.epoch, sandbox.owner);
            propose(
                &proposer,
                Command::ReportSandbox {
                    id,
                    epoch,
                    node,
                    report,
                },
            )
            .await;
        }
        if !view.changed().await {
            return;
        }
    }
}

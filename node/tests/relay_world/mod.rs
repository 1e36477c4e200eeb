//! Two nodes of one cluster, sharing one log: one that owns a sandbox and one that is asked for
//! it. Between them are pipes in memory, or two real transports on loopback. What listens in the
//! guest is up to the test.

#![allow(dead_code, missing_docs, unreachable_pub)] // each test file uses its part

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use proto::epoch::Epoch;
use proto::ids::{NodeId, NodeKey, SandboxId, TeamId, TokenId};
use proto::units::{Mib, Stamp};
use raft::command::{Command, Report, Verdict};
use raft::state::{GuestVersions, HostLoss, Node, Resources, SandboxSpec, Template, Token};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use transport::{Config, Identity, Lane, Membership, Transport};
use wrenn_node::base::clock::HandClock;
use wrenn_node::cluster::{Log, MemoryLog, Proposer};
use wrenn_node::guest::{CutDial, Guest, GuestStream, TcpDial};
use wrenn_node::relay::{
    InProcessPeers, LocalFacts, LocalGuests, PeerError, Peers, QuicPeers, QuicRelay, Relay, Server,
    Transfer, Waiting, Ways,
};

/// No test waits longer than this for anything.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Who owns the sandbox, who is asked for it, and who could own it next.
pub const OWNER: NodeId = NodeId(1);
/// A node's id is the place of its joining in the log, and the token comes before.
pub const ASKED: NodeId = NodeId(3);
pub const SPARE: NodeId = NodeId(4);
/// What the sandbox's agent demands.
pub const TOKEN: &str = "token";

/// What lies between the nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Between {
    Pipes,
    Quic,
}

pub const BOTH: [Between; 2] = [Between::Pipes, Between::Quic];

/// The guests of the owner.
#[derive(Debug, Default)]
pub struct Guests {
    running: Mutex<HashMap<(SandboxId, Epoch), Guest>>,
    pub uses: Mutex<Vec<SandboxId>>,
    pub frozen: AtomicBool,
    pub console: Mutex<Option<Vec<u8>>>,
}

impl LocalGuests for Guests {
    fn guest(&self, id: SandboxId, epoch: Epoch) -> Option<Guest> {
        let guest = self.running.lock().unwrap().get(&(id, epoch)).cloned();
        guest.inspect(|_| self.touch(id))
    }

    fn is_frozen(&self, _: SandboxId) -> bool {
        self.frozen.load(Ordering::Relaxed)
    }

    fn touch(&self, id: SandboxId) {
        self.uses.lock().unwrap().push(id);
    }

    fn facts(&self, _: SandboxId) -> Option<LocalFacts> {
        Some(LocalFacts {
            last_active: Some(Stamp(7)),
            disk_used_bytes: Some(3 << 20),
            start_stages: vec![("vmm".into(), Duration::from_millis(5))],
            start: None,
            memory: None,
            transfer: Some(Transfer {
                bytes_done: 5,
                bytes_total: 9,
                sources: 2,
            }),
            waiting: Some(Waiting {
                nodes: vec!["b".into()],
                why: "it is away".into(),
                since: Stamp(11),
                until: Stamp(13),
            }),
        })
    }

    fn console_tail(&self, _: SandboxId, bytes: usize) -> Option<Vec<u8>> {
        let console = self.console.lock().unwrap().clone()?;
        Some(console[console.len().saturating_sub(bytes)..].to_vec())
    }
}

/// The two nodes.
pub struct Pair {
    pub proposer: Proposer,
    pub guests: Arc<Guests>,
    pub owner: Relay,
    pub server: Server,
    pub asked: Relay,
    /// The asked node's way to the others.
    pub peers: Arc<dyn Peers>,
    /// The same, where it is made of pipes.
    pub pipes: Option<InProcessPeers>,
    /// The owner's transport and the asked node's, where there are any.
    pub transports: Option<[Arc<Transport>; 2]>,
    pub id: SandboxId,
    pub epoch: Epoch,
    /// Cancelled when the guest dies.
    pub gone: CancellationToken,
    _stop: DropGuard,
}

impl Pair {
    /// Two nodes and a running sandbox whose agent listens at `agent`.
    pub async fn new(between: Between, agent: SocketAddr) -> Self {
        let log: Arc<dyn Log> = Arc::new(MemoryLog::default());
        let proposer = Proposer::new(log, Arc::new(HandClock::at(Stamp(1_700_000_000_000))));
        populate(&proposer).await;
        let (guests, gone) = (Arc::new(Guests::default()), CancellationToken::new());
        let (id, epoch) = (SandboxId([9; 16]), run_sandbox(&proposer).await);
        let dial = CutDial::new(TcpDial(agent), gone.clone());
        let guest = Guest::new(Arc::new(dial), TOKEN).expect("a guest");
        guests.running.lock().unwrap().insert((id, epoch), guest);

        let owner = Relay::new(OWNER, proposer.view(), guests.clone());
        let server = owner.server();
        let (mut pipes, mut transports) = (None, None);
        let peers: Arc<dyn Peers> = match between {
            Between::Pipes => {
                let all = InProcessPeers::default().seen_from(ASKED);
                all.add(OWNER, server.clone());
                pipes = Some(all.clone());
                Arc::new(all)
            }
            Between::Quic => {
                let (pair, peers) = connect(&server);
                transports = Some(pair);
                Arc::new(peers)
            }
        };
        let nobody = Arc::new(Guests::default());
        let asked = Relay::new(ASKED, proposer.view(), nobody).with_peers(Arc::clone(&peers));
        let stop = CancellationToken::new();
        tokio::spawn(asked.clone().follow(stop.clone()));
        Self {
            proposer,
            guests,
            owner,
            server,
            asked,
            peers,
            pipes,
            transports,
            id,
            epoch,
            gone,
            _stop: stop.drop_guard(),
        }
    }

    /// Two nodes and a sandbox in which `listener` listens, which the test plays.
    pub async fn raw(between: Between) -> (Self, Listener) {
        let listener = Listener::new().await;
        (Self::new(between, listener.address).await, listener)
    }

    /// A raw stream to the port of `listener` in the guest, and its other end.
    pub async fn stream(&self, listener: &Listener) -> (GuestStream, TcpStream) {
        let guest = self.asked.guest(self.id).await.expect("a guest");
        let dial = guest.dial().at_port(listener.address.port());
        let (near, far) = tokio::join!(soon(dial.dial()), listener.accept());
        (near.expect("dialled"), far)
    }

    /// The owner's lease runs out for good, and the sandbox is given out anew.
    pub async fn lose_owner(&self) {
        for verdict in [Verdict::Missing, Verdict::Lost] {
            self.judge(verdict).await;
        }
        let state = self.proposer.view().state();
        let sandbox = state.sandbox(self.id).expect("its record");
        assert!(sandbox.epoch > self.epoch, "it was not placed anew");
    }

    /// The cluster's opinion of the owner.
    pub async fn judge(&self, verdict: Verdict) {
        let state = self.proposer.view().state();
        let judge = Command::JudgeNode {
            node: OWNER,
            incarnation: state.node(OWNER).expect("a node").incarnation,
            verdict,
        };
        self.proposer.propose(judge).await.expect("judged");
    }
}

/// What listens in the guest.
pub struct Listener {
    pub address: SocketAddr,
    listener: TcpListener,
}

impl Listener {
    pub async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        Self { address, listener }
    }

    pub async fn accept(&self) -> TcpStream {
        soon(self.listener.accept()).await.expect("accepted").0
    }
}

/// Waits for `event`, and fails the test if it does not come.
pub async fn soon<T>(event: impl Future<Output = T>) -> T {
    let happened = tokio::time::timeout(PATIENCE, event).await;
    happened.expect("happens in time")
}

/// Waits until `look` says yes.
pub async fn eventually(mut look: impl FnMut() -> bool) {
    soon(async {
        while !look() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

async fn populate(proposer: &Proposer) {
    let token = TokenId([1; 16]);
    let admit = [
        Command::AdmitNode(node(OWNER, 8)),
        Command::PutToken(Token {
            id: token,
            public_key: [1; 32],
            team: None,
            expires_at: Stamp(u64::MAX),
            uses_left: 2,
            created_at: Stamp(0),
            created_by: "test".into(),
            revoked: false,
            redeemed: Vec::new(),
        }),
        Command::RedeemToken {
            token,
            node: node(ASKED, 0),
        },
        Command::RedeemToken {
            token,
            node: node(SPARE, 4),
        },
    ];
    for command in admit {
        proposer.propose(command).await.expect("admitted");
    }
    let template = Template {
        name: "minimal".into(),
        digest: [1; 32],
        disk: Mib(5120),
        size_bytes: 1,
        created_at: Stamp(0),
    };
    let put = proposer.propose(Command::PutTemplate(template)).await;
    put.expect("put");
}

/// A node with room for this many sandboxes.
fn node(id: NodeId, sandboxes: u32) -> Node {
    Node {
        id,
        name: format!("n{}", id.0),
        key: NodeKey([u8::try_from(id.0).unwrap(); 32]),
        capacity: Resources {
            vcpus: 8 * sandboxes,
            memory: Mib(1024 * sandboxes),
            disk: Mib(10_000 * sandboxes),
            sandboxes,
        },
        templates: [("minimal".into(), [1; 32])].into(),
        ..Node::default()
    }
}

async fn run_sandbox(proposer: &Proposer) -> Epoch {
    let id = SandboxId([9; 16]);
    let spec = SandboxSpec {
        template: "minimal".into(),
        vcpus: 1,
        memory: Mib(256),
        disk: Mib(5120),
        on_host_loss: HostLoss::Restart,
        ..SandboxSpec::default()
    };
    let create = Command::CreateSandbox {
        id,
        team: TeamId([1; 16]),
        spec,
        hints: Vec::new(),
    };
    proposer.propose(create).await.expect("placed");
    let sandbox = proposer.view().state().sandbox(id).cloned();
    let (epoch, node) = sandbox.map(|it| (it.epoch, it.owner)).expect("a record");
    assert_eq!(node, OWNER);
    let report = Report::Running(GuestVersions::default());
    let running = Command::ReportSandbox {
        id,
        epoch,
        node,
        report,
    };
    proposer.propose(running).await.expect("reported");
    epoch
}

/// The ways of a cluster of two.
#[derive(Clone)]
struct Roads {
    owner: NodeKey,
    addresses: [SocketAddr; 2],
    transport: Arc<Transport>,
}

impl std::fmt::Debug for Roads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Roads").finish_non_exhaustive()
    }
}

impl Ways for Roads {
    fn connect(
        &self,
        to: NodeId,
        lane: Lane,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<NodeKey, PeerError>> {
        let roads = self.clone();
        Box::pin(async move {
            if to != OWNER {
                return Err(PeerError::Unreachable("nobody knows it".into()));
            }
            let address = roads.addresses[usize::from(lane == Lane::Bulk)];
            let connected = roads
                .transport
                .connect(lane, address, roads.owner, deadline)
                .await;
            connected.map_err(|err| PeerError::Unreachable(err.to_string()))?;
            Ok(roads.owner)
        })
    }

    fn node_of(&self, key: NodeKey) -> Option<NodeId> {
        Some(if key == self.owner { OWNER } else { ASKED })
    }
}

/// Two transports that know each other; the first one serves.
fn connect(server: &Server) -> ([Arc<Transport>; 2], QuicPeers) {
    let loopback: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let start = || {
        let identity = Identity::ephemeral().expect("randomness");
        let started = Transport::start(&identity, Config::at(loopback, loopback));
        Arc::new(started.expect("starts"))
    };
    let (owner, asked) = (start(), start());
    let members: HashSet<_> = [owner.key(), asked.key()].into();
    for node in [&owner, &asked] {
        node.set_membership(Membership {
            index: 1,
            members: members.clone(),
            join_open: false,
        });
    }
    let at = |lane| owner.local_addr(lane).expect("bound");
    let roads = Arc::new(Roads {
        owner: owner.key(),
        addresses: [at(Lane::Control), at(Lane::Bulk)],
        transport: asked.clone(),
    });
    QuicRelay::register(&owner, server.clone(), roads.clone());
    let peers = QuicPeers::new(asked.clone(), roads);
    ([owner, asked], peers)
}

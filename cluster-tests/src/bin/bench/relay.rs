//! What a node in between costs: a call and a stream to a guest, directly and relayed.
//!
//! Two nodes' halves of the relay stand in this process, with a real transport each and QUIC on
//! loopback between them; the log is in memory, and the guest is a server on loopback. So a figure
//! here is the relay and the transport, and nothing else. Both ends, the client and the guest
//! share the machine's processors: on a real network, each has its own.
//!
//! Memory is the peak of this whole process over what it was before the first stream, both nodes,
//! the client and the guest included.

use std::collections::HashSet;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use node::base::clock::SystemClock;
use node::cluster::{MemoryLog, Proposer};
use node::guest::{Dial, Guest, TcpDial};
use node::relay::{LocalFacts, LocalGuests, PeerError, QuicPeers, QuicRelay, Relay, Ways};
use proto::epoch::Epoch;
use proto::ids::{NodeId, NodeKey, SandboxId, TeamId};
use proto::units::{Mib, Stamp};
use raft::command::{Command, Report};
use raft::state::{GuestVersions, Node, Resources, SandboxSpec, Template};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use transport::{BoxFuture, Config, Identity, Lane, Membership, Transport};

use crate::figures::{Samples, at_most, figure};
use crate::{Outcome, Run};

/// Calls of each kind for each run asked for.
const CALLS_PER_RUN: usize = 50;
/// Calls that are not counted: dials, the question for the guest's access, caches.
const WARM_UP: usize = 20;
/// The most that a node in between may add to a call, at the median.
const ADDED_GOAL_MS: f64 = 1.0;
/// What is sent in each direction: a GiB.
const STREAM_BYTES: usize = 1 << 30;
/// Bytes written at once.
const PIECE_BYTES: usize = 64 << 10;
/// The most that the process may grow meanwhile: QUIC's windows and our buffers at four ends.
const GROWTH_GOAL_MIB: f64 = 48.0;
/// Far more than a call takes.
const PATIENCE: Duration = Duration::from_secs(30);
/// Who owns the guest, and who is asked for it.
const OWNER: NodeId = NodeId(1);
const ASKED: NodeId = NodeId(2);
const SANDBOX: SandboxId = SandboxId([7; 16]);

/// Measures calls, then streams.
pub(crate) fn run(run: &Run) -> Outcome {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let agent = listen(answer_calls).await?;
        let direct = Guest::new(Arc::new(TcpDial(agent)), "token")?;
        let relay = relay(direct.clone()).await?;
        let relayed = relay.guest(SANDBOX).await?;
        run.note("calls, directly and relayed in turns");
        calls(run, &direct, &relayed).await?;
        run.note("a GiB up and down");
        streams(run, &relayed).await
    })
}

async fn calls(run: &Run, direct: &Guest, relayed: &Guest) -> Outcome {
    let (mut on_foot, mut carried, mut added) =
        (Samples::default(), Samples::default(), Samples::default());
    for number in 0..WARM_UP + run.runs * CALLS_PER_RUN {
        run.go_on()?;
        let (one, two) = (call(direct).await?, call(relayed).await?);
        if number >= WARM_UP {
            on_foot.add_ms(one);
            carried.add_ms(two);
            added.add_ms(two.saturating_sub(one));
        }
    }
    on_foot.print("relay_call_direct", "ms");
    carried.print("relay_call", "ms");
    added.print("relay_call_added", "ms");
    at_most("relay_call_added_p50", added.p50(), ADDED_GOAL_MS);
    Ok(())
}

async fn call(guest: &Guest) -> Outcome<Duration> {
    let began = Instant::now();
    guest.health(PATIENCE).await?;
    Ok(began.elapsed())
}

async fn streams(run: &Run, relayed: &Guest) -> Outcome {
    let before = peak_mib()?;
    let (sink, source) = (listen(take_all).await?, listen(give_all).await?);
    for (name, at) in [("relay_up", sink), ("relay_down", source)] {
        run.go_on()?;
        let direct = rate(name, TcpDial(at).dial().await?).await?;
        let dial = relayed.dial().at_port(at.port());
        let carried = rate(name, dial.dial().await?).await?;
        figure(&format!("{name}_direct"), direct, "MiB/s");
        figure(name, carried, "MiB/s");
    }
    let growth = peak_mib()? - before;
    figure("relay_growth", growth, "MiB");
    at_most("relay_growth", growth, GROWTH_GOAL_MIB);
    Ok(())
}

/// The most memory that this process ever had.
fn peak_mib() -> Outcome<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib: Option<f64> = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    Ok(kib.ok_or("the kernel does not tell the peak")? / 1024.0)
}

/// How fast a GiB goes through `stream`, upwards or downwards as its name says.
async fn rate(name: &str, mut stream: impl AsyncRead + AsyncWrite + Unpin) -> Outcome<f64> {
    let began = Instant::now();
    if name.ends_with("up") {
        write_all(&mut stream).await?;
        stream.shutdown().await?;
    }
    let read = read_all(&mut stream).await?;
    let expected = if name.ends_with("up") {
        8
    } else {
        STREAM_BYTES
    };
    if read != expected {
        return Err(format!("{name}: {read} of {expected} bytes came back").into());
    }
    Ok((STREAM_BYTES >> 20) as f64 / began.elapsed().as_secs_f64())
}

async fn write_all(to: &mut (impl AsyncWrite + Unpin)) -> std::io::Result<()> {
    let piece = vec![7; PIECE_BYTES];
    for _ in 0..STREAM_BYTES / PIECE_BYTES {
        to.write_all(&piece).await?;
    }
    Ok(())
}

async fn read_all(from: &mut (impl AsyncRead + Unpin)) -> std::io::Result<usize> {
    let (mut piece, mut read) = (vec![0; PIECE_BYTES], 0);
    loop {
        match from.read(&mut piece).await? {
            0 => return Ok(read),
            count => read += count,
        }
    }
}

/// A server in the guest: `serve` has each connection.
async fn listen<F>(serve: fn(TcpStream) -> F) -> Outcome<SocketAddr>
where
    F: Future<Output = std::io::Result<()>> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let _set = stream.set_nodelay(true);
            tokio::spawn(serve(stream));
        }
    });
    Ok(address)
}

/// The least an agent can be: every request is answered as if it were for its health.
async fn answer_calls(mut stream: TcpStream) -> std::io::Result<()> {
    const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 15\r\n\r\n{\"version\":\"1\"}";
    let (mut request, mut at) = ([0; 4096], 0);
    loop {
        match stream.read(&mut request[at..]).await? {
            0 => return Ok(()),
            count => at += count,
        }
        if request[..at].ends_with(b"\r\n\r\n") {
            stream.write_all(ANSWER).await?;
            at = 0;
        }
    }
}

/// Reads to the end and answers how much it was.
async fn take_all(mut stream: TcpStream) -> std::io::Result<()> {
    let read = read_all(&mut stream).await? as u64;
    stream.write_all(&read.to_be_bytes()).await
}

/// Writes it all and ends.
async fn give_all(mut stream: TcpStream) -> std::io::Result<()> {
    write_all(&mut stream).await?;
    stream.shutdown().await
}

/// The owner's only guest.
#[derive(Debug)]
struct OneGuest(Option<Guest>);

impl LocalGuests for OneGuest {
    fn guest(&self, _: SandboxId, _: Epoch) -> Option<Guest> {
        self.0.clone()
    }

    fn touch(&self, _: SandboxId) {}

    fn facts(&self, _: SandboxId) -> Option<LocalFacts> {
        None
    }

    fn console_tail(&self, _: SandboxId, _: usize) -> Option<Vec<u8>> {
        None
    }
}

/// The relay of a node that does not own `guest`, over QUIC to one that does.
async fn relay(guest: Guest) -> Outcome<Relay> {
    let proposer = Proposer::new(Arc::new(MemoryLog::default()), Arc::new(SystemClock));
    place(&proposer).await?;
    let owner = Relay::new(OWNER, proposer.view(), Arc::new(OneGuest(Some(guest))));
    let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
    let start = || -> Outcome<Arc<Transport>> {
        let config = Config::at(loopback, loopback);
        Ok(Arc::new(Transport::start(&Identity::ephemeral()?, config)?))
    };
    let (there, here) = (start()?, start()?);
    let members: HashSet<_> = [there.key(), here.key()].into();
    for node in [&there, &here] {
        node.set_membership(Membership {
            index: 1,
            members: members.clone(),
            join_open: false,
        });
    }
    let road: Arc<dyn Ways> = Arc::new(Road {
        key: there.key(),
        control: there.local_addr(Lane::Control)?,
        bulk: there.local_addr(Lane::Bulk)?,
        here: Arc::clone(&here),
        _there: Arc::clone(&there),
    });
    QuicRelay::register(&there, owner.server(), Arc::clone(&road));
    let peers = Arc::new(QuicPeers::new(here, road));
    let asked = Relay::new(ASKED, proposer.view(), Arc::new(OneGuest(None)));
    Ok(asked.with_peers(peers))
}

/// A log in which the owner runs the sandbox.
async fn place(proposer: &Proposer) -> Outcome {
    let owner = Node {
        id: OWNER,
        name: "owner".into(),
        capacity: Resources {
            vcpus: 1,
            memory: Mib(1024),
            disk: Mib(1024),
            sandboxes: 1,
        },
        templates: [("none".into(), [1; 32])].into(),
        ..Node::default()
    };
    let template = Template {
        name: "none".into(),
        digest: [1; 32],
        disk: Mib(1),
        size_bytes: 1,
        created_at: Stamp(0),
    };
    let create = Command::CreateSandbox {
        id: SANDBOX,
        team: TeamId::default(),
        spec: SandboxSpec {
            template: "none".into(),
            vcpus: 1,
            memory: Mib(1),
            disk: Mib(1),
            ..SandboxSpec::default()
        },
        hints: Vec::new(),
    };
    for command in [
        Command::AdmitNode(owner),
        Command::PutTemplate(template),
        create,
    ] {
        proposer.propose(command).await?;
    }
    let epoch = proposer.view().state().sandbox(SANDBOX).map(|it| it.epoch);
    let report = Command::ReportSandbox {
        id: SANDBOX,
        epoch: epoch.ok_or("the sandbox was not placed")?,
        node: OWNER,
        report: Report::Running(GuestVersions::default()),
    };
    proposer.propose(report).await?;
    Ok(())
}

/// The way to the owner.
#[derive(Clone)]
struct Road {
    key: NodeKey,
    control: SocketAddr,
    bulk: SocketAddr,
    here: Arc<Transport>,
    /// Kept from being dropped, which would cut it off.
    _there: Arc<Transport>,
}

impl fmt::Debug for Road {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Road").finish_non_exhaustive()
    }
}

impl Ways for Road {
    fn connect(
        &self,
        _: NodeId,
        lane: Lane,
        deadline: tokio::time::Instant,
    ) -> BoxFuture<'static, Result<NodeKey, PeerError>> {
        let road = self.clone();
        Box::pin(async move {
            let address = match lane {
                Lane::Control => road.control,
                Lane::Bulk => road.bulk,
            };
            let connected = road.here.connect(lane, address, road.key, deadline).await;
            connected.map_err(|err| PeerError::Unreachable(err.to_string()))?;
            Ok(road.key)
        })
    }

    fn node_of(&self, key: NodeKey) -> Option<NodeId> {
        Some(if key == self.key { OWNER } else { ASKED })
    }
}

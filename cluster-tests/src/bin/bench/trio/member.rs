//! One member of ours, in a process of its own that can be killed.
//!
//! ```text
//! started > prints who it is > reads who all are > (the first forms the group) > prints > serves
//! ```
//!
//! It ends when its standard input does, so that none outlives the benchmark. The link below is as
//! thin as it can be: a call of raft is a call of the transport. Syncs are counted where the log
//! and the snapshots call for them; those of the derived copy are not of the write path.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use proto::ids::{NodeId, NodeKey};
use raft::disk::{Disk, LogFile, RealDisk};
use raft::group::{Group, GroupConfig, ProposeError, Role};
use raft::link::{Link, LinkError};
use raft::snapshot::SnapshotFile;
use raft::state::State;
use raft::types::{DiskId, Node};
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines, Stdin};
use transport::{
    Call, Config, Handler, Identity, Lane, Membership, Method, RpcError, Service, Transport,
};

use super::copies::Copies;
use super::free_address;
use crate::Outcome;

/// One raft request, and its answer.
const RAFT: Method = Service::RAFT.method(1);
/// Proposes the body.
pub(crate) const PROPOSE: Method = Service::CLUSTER.method(1);
/// Asks for the number of syncs so far, big-endian.
pub(crate) const SYNCS: Method = Service::CLUSTER.method(2);
/// Asks whether this member leads; one byte.
pub(crate) const LEADS: Method = Service::CLUSTER.method(3);
/// Asks for its term, big-endian: it grows with every election.
pub(crate) const TERM: Method = Service::CLUSTER.method(4);
/// Has it seal a snapshot of as many MiB as the body says; answers with a [`Held`].
pub(crate) const HOLD: Method = Service::CLUSTER.method(5);
/// Has it fetch all of the snapshot that the [`Held`] in the body names, into an empty store.
pub(crate) const FETCH: Method = Service::CLUSTER.method(6);
/// Longest a member waits for anything.
const PATIENCE: Duration = Duration::from_secs(30);

/// Who a member is: id, key, address, disk.
pub(crate) type Who = (u64, [u8; 32], String, [u8; 16]);
/// What members are told: who all are, the key of the client, whether to form the group.
pub(crate) type Told = (Vec<Who>, [u8; 32], bool);

/// A snapshot that a member holds: its digest, the holder's key, where it hands it out.
pub(crate) type Held = ([u8; 32], [u8; 32], SocketAddr);

/// Lives until standard input ends.
pub(crate) fn run(id: &str, address: &str, folder: &str) -> Outcome {
    let (id, address) = (NodeId(id.parse()?), address.parse()?);
    tokio::runtime::Runtime::new()?.block_on(live(id, address, Path::new(folder)))
}

async fn live(id: NodeId, address: SocketAddr, folder: &Path) -> Outcome {
    let identity = Identity::load_or_create(&folder.join("identity"))?;
    let config = Config::at(address, free_address()?);
    let transport = Arc::new(Transport::start(&identity, config)?);
    let counting = Counting::default();
    let group = open(id, address, folder, &transport, &counting).await?;
    let raft = Raft(group.clone());
    transport.register(Service::RAFT, raft);
    let front = Front {
        group: group.clone(),
        syncs: Arc::clone(&counting.syncs),
        copies: Copies::new(identity, Arc::clone(&transport), folder),
    };
    transport.register(Service::CLUSTER, front);
    let who: Who = (
        id.0,
        transport.key().0,
        address.to_string(),
        group.node().disk.0,
    );
    println!("{}", serde_json::to_string(&who)?);
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let (all, client, forms) = told(&mut lines).await?;
    let members = all.iter().map(|who| NodeKey(who.1));
    transport.set_membership(Membership {
        index: 1,
        members: members.chain([NodeKey(client)]).collect(),
        join_open: false,
    });
    if forms {
        form(&group, &all).await?;
    }
    println!("ready");
    while lines.next_line().await?.is_some() {}
    Ok(())
}

async fn told(lines: &mut Lines<BufReader<Stdin>>) -> Outcome<Told> {
    let line = lines.next_line().await?.ok_or("told nothing")?;
    Ok(serde_json::from_str(&line)?)
}

async fn open(
    id: NodeId,
    address: SocketAddr,
    folder: &Path,
    transport: &Arc<Transport>,
    counting: &Counting,
) -> Outcome<Group<State>> {
    let node = Node::new(address.to_string(), transport.key());
    let layout = GroupConfig::new(folder.join("raft"), folder.join("state"), id, node);
    let link = Quic(Arc::clone(transport));
    let disk = Arc::new(counting.clone());
    Ok(Group::open_on(layout, link, disk).await?)
}

async fn form(group: &Group<State>, all: &[Who]) -> Outcome {
    group.bootstrap().await?;
    let deadline = || Instant::now() + PATIENCE;
    for (id, key, address, disk) in &all[1..] {
        let node = Node {
            disk: DiskId(*disk),
            ..Node::new(address.clone(), NodeKey(*key))
        };
        group.add_learner(NodeId(*id), node, deadline()).await?;
    }
    let voters: BTreeSet<NodeId> = all.iter().map(|who| NodeId(who.0)).collect();
    Ok(group.change_voters(voters, None, deadline()).await?)
}

/// Answers raft.
struct Raft(Group<State>);

impl Handler for Raft {
    async fn call(&self, call: Call) -> Result<Bytes, RpcError> {
        Ok(self.0.serve(&call.body).await.into())
    }
}

/// Answers the clients.
struct Front {
    group: Group<State>,
    syncs: Arc<AtomicU64>,
    copies: Copies,
}

impl Handler for Front {
    async fn call(&self, call: Call) -> Result<Bytes, RpcError> {
        match call.method {
            PROPOSE => {
                let deadline = Instant::now() + call.patience;
                let proposed = self.group.propose(call.body.to_vec(), deadline).await;
                proposed.map(|it| it.answer.into()).map_err(refusal)
            }
            SYNCS => {
                let syncs = self.syncs.load(Ordering::Relaxed);
                Ok(Bytes::copy_from_slice(&syncs.to_be_bytes()))
            }
            LEADS => Ok(Bytes::copy_from_slice(&[u8::from(
                self.group.role() == Role::Leader,
            )])),
            TERM => {
                let term = self.group.metrics().term;
                Ok(Bytes::copy_from_slice(&term.to_be_bytes()))
            }
            HOLD => self.copies.hold(&call.body).map_err(failed),
            FETCH => self.copies.fetch(&call.body).await.map_err(failed),
            method => Err(RpcError::NotServed { method }),
        }
    }
}

fn failed(err: Box<dyn std::error::Error>) -> RpcError {
    let reason = err.to_string();
    RpcError::Failed { reason }
}

fn refusal(err: ProposeError) -> RpcError {
    let reason = err.to_string();
    match err {
        ProposeError::NotLeader { .. } | ProposeError::TooLarge { .. } => {
            RpcError::Rejected { reason }
        }
        _ => RpcError::Failed { reason },
    }
}

/// Raft's network over the transport.
struct Quic(Arc<Transport>);

impl Link for Quic {
    async fn call(
        &self,
        to: NodeId,
        node: &Node,
        request: Vec<u8>,
        within: Duration,
    ) -> Result<Vec<u8>, LinkError> {
        let deadline = tokio::time::Instant::now() + within;
        let address = node.address.parse();
        let address = address.map_err(|_| LinkError::Unreachable(to))?;
        let key = NodeKey(node.key);
        let connected = self.0.connect(Lane::Control, address, key, deadline).await;
        connected.map_err(|_| LinkError::Unreachable(to))?;
        let answer = self.0.call(key, RAFT, request.into(), deadline).await;
        answer.map(Into::into).map_err(|err| match err {
            RpcError::Deadline => LinkError::TimedOut(to),
            RpcError::NotConnected { .. } => LinkError::Unreachable(to),
            _ => LinkError::Broken(to),
        })
    }

    /// The log reaches back far enough for all that is measured here.
    async fn send_snapshot(
        &self,
        to: NodeId,
        _node: &Node,
        _request: Vec<u8>,
        _file: SnapshotFile,
    ) -> Result<Vec<u8>, LinkError> {
        Err(LinkError::Unreachable(to))
    }
}

/// The real disk, and how often something was synced.
#[derive(Clone, Default)]
struct Counting {
    syncs: Arc<AtomicU64>,
}

struct CountingFile {
    file: Arc<dyn LogFile>,
    syncs: Arc<AtomicU64>,
}

impl LogFile for CountingFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_at(bytes, offset)
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        self.file.sync()
    }
}

impl Counting {
    fn counted(&self, file: Arc<dyn LogFile>) -> Arc<dyn LogFile> {
        Arc::new(CountingFile {
            file,
            syncs: Arc::clone(&self.syncs),
        })
    }
}

impl Disk for Counting {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn LogFile>> {
        RealDisk.create(path).map(|file| self.counted(file))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn LogFile>> {
        RealDisk.open(path).map(|file| self.counted(file))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        RealDisk.sync_dir(dir)
    }
}

/// Where a member of a benchmark keeps its things.
pub(crate) fn folder_of(folder: &Path, id: usize) -> PathBuf {
    folder.join(format!("member-{id}"))
}

//! Two nodes for [`super::faults`]: one holds a snapshot, the other runs the guest and has none of its
//! memory.
//!
//! What is real: both stores, both transports, the protocol between them, the daemon's half of
//! paging. What is not: the cluster, whose word on who holds what is given here.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use node::base::stop::Tasks;
use node::sandbox::NotNow;
use node::sandbox::paging::{Admitted, Bringer, NotBrought, Paging};
use node::store::fetch::{Holders, Incoming, Wire};
use node::store::serve::{Asked, Wants};
use node::store::snapshot::{GuestFacts, MachineFacts, Running};
use node::store::{
    BringError, Carried, ChunkId, ImageRef, Limits, SignedSnapshot, SnapshotDigest,
    SnapshotManifest, Store,
};
use proto::epoch::Epoch;
use proto::ids::{NodeId, NodeKey};
use proto::units::{MIB_BYTES, Mib, Stamp};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::time::Instant;
use transport::streams::{Inbound, StreamHandler};
use transport::{BoxFuture, Config, Identity, Lane, Membership, Service, Transport};

use super::faults::GUEST;
use crate::Outcome;

/// Longest anything here may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Both nodes are here.
pub(super) const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// The node that holds the snapshot.
const HOLDER: NodeId = NodeId(9);

/// Both nodes.
pub(super) struct Peer {
    /// Of the holder, and of the one that lacks the memory: each with threads of its own.
    there: Runtime,
    here: Runtime,
    far: Arc<Transport>,
    near: Arc<Transport>,
    lacking: Store,
    tasks: Tasks,
    _admitted: Admitted,
    _dir: TempDir,
}

impl Peer {
    /// The holder has `store`, with the image `memory` in it; the other one answers pagers on
    /// `socket`.
    pub(super) fn start(
        store: &Store,
        memory: ImageRef,
        dir: &Path,
        socket: &Path,
    ) -> Outcome<Self> {
        let identity = Identity::ephemeral()?;
        let digest = seal(store, memory, &identity)?;
        let (there, here) = (Runtime::new()?, Runtime::new()?);
        let far = begin(&there, &identity, LOOPBACK)?;
        let near = begin(&here, &Identity::ephemeral()?, LOOPBACK)?;
        hand_out(&far, store);
        join(&here, &near, &far, LOOPBACK)?;
        let dir = tempfile::Builder::new()
            .prefix("lacking-")
            .tempdir_in(dir)?;
        let lacking = Store::open(&dir.path().join("store"), Limits::default())?;
        let only = Only::new(&near, far.key());
        let incoming = here.block_on(lacking.fetch_lazily(digest, Arc::new(only)))?;
        let tasks = Tasks::new();
        let paging = Paging::new(lacking.clone());
        let admitted = paging.admit(GUEST, digest, Arc::new(Urgent(incoming)));
        let _old = std::fs::remove_file(socket);
        {
            let _inside = here.enter();
            paging.serve(socket, &tasks)?;
        }
        Ok(Self {
            there,
            here,
            far,
            near,
            lacking,
            tasks,
            _admitted: admitted,
            _dir: dir,
        })
    }

    /// The store without the memory.
    pub(super) fn lacking(&self) -> &Store {
        &self.lacking
    }

    /// Ends both nodes.
    pub(super) fn stop(self) {
        self.tasks.token().cancel();
        self.here.block_on(self.near.stop(soon()));
        self.there.block_on(self.far.stop(soon()));
    }
}

pub(crate) fn soon() -> Instant {
    Instant::now() + PATIENCE
}

pub(super) fn begin(
    runtime: &Runtime,
    identity: &Identity,
    listen: IpAddr,
) -> Outcome<Arc<Transport>> {
    let _inside = runtime.enter();
    let any = SocketAddr::new(listen, 0);
    Ok(Arc::new(Transport::start(identity, Config::at(any, any))?))
}

/// Has a node hand out what is in `store`.
pub(crate) fn hand_out(node: &Transport, store: &Store) {
    node.register_streams(Service::STORE, Lane::Bulk, Hands(store.clone()));
}

/// Makes two nodes one cluster, with a connection from `near` to `far`.
pub(super) fn join(here: &Runtime, near: &Transport, far: &Transport, dial: IpAddr) -> Outcome {
    for node in [near, far] {
        node.set_membership(Membership {
            index: 1,
            members: [near.key(), far.key()].into(),
            join_open: false,
        });
    }
    let address = SocketAddr::new(dial, far.local_addr(Lane::Bulk)?.port());
    here.block_on(near.connect(Lane::Bulk, address, far.key(), soon()))?;
    Ok(())
}

/// Seals a snapshot whose memory is `memory`; its disk and its device state are a few bytes.
pub(super) fn seal(
    store: &Store,
    memory: ImageRef,
    identity: &Identity,
) -> Outcome<SnapshotDigest> {
    let mut small = tempfile::tempfile()?;
    io::Write::write_all(&mut small, b"small")?;
    let seal = store.begin();
    let small = seal.image(&small, 5)?.image;
    let text = |text: &str| text.to_owned();
    let manifest = SnapshotManifest {
        sandbox: GUEST,
        epoch: Epoch(1),
        created_at: Stamp(1),
        parent: None,
        running: Some(Running {
            memory,
            device_state: small,
        }),
        disk: small,
        base: small.digest,
        working_set: None,
        machine: MachineFacts {
            driver: text("qemu"),
            driver_version: text("7.2"),
            machine_type: text("pc-q35-7.2/1"),
            cpu_model: text("tcg-1"),
            accelerator: text("tcg"),
            vcpus: 1,
            memory: Mib(u32::try_from(memory.len_bytes / MIB_BYTES)?),
        },
        guest: GuestFacts {
            kernel: text("6.1"),
            initramfs: text("0"),
            agent: text("0"),
            mac: [2, 0, 0, 0, 0, 1],
            address: Ipv4Addr::new(169, 254, 0, 21),
            prefix: 30,
            gateway: Ipv4Addr::new(169, 254, 0, 22),
            token: text("secret"),
        },
    };
    let signed = SignedSnapshot::sign(manifest, identity)?;
    let digest = signed.digest();
    drop(seal.finish(Some(&signed))?);
    Ok(digest)
}

/// The holder's half, as the daemon's wiring has it.
struct Hands(Store);

impl StreamHandler for Hands {
    async fn open(&self, inbound: Inbound) {
        let Some(asked) = Asked::read(&inbound.header) else {
            return inbound.refuse("this is no request").await;
        };
        let is_urgent = asked.wants == Wants::Urgent;
        if let Ok(mut stream) = inbound.accept().await {
            if is_urgent {
                stream.go_first();
            }
            // A fetcher that is gone has what it wanted, or says so where it matters.
            let _over = self.0.serve(asked, &mut stream).await;
        }
    }
}

/// The one holder there is.
pub(crate) struct Only {
    near: Arc<Transport>,
    holder: NodeKey,
}

impl Only {
    /// Asked by `near`.
    pub(crate) fn new(near: &Arc<Transport>, holder: NodeKey) -> Self {
        let near = Arc::clone(near);
        Self { near, holder }
    }
}

impl fmt::Debug for Only {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Only")
    }
}

impl Holders for Only {
    fn holders(&self, _: SnapshotDigest) -> Vec<NodeId> {
        vec![HOLDER]
    }

    fn open(&self, _: NodeId, header: Vec<u8>) -> BoxFuture<'static, io::Result<Box<dyn Wire>>> {
        let (near, holder) = (Arc::clone(&self.near), self.holder);
        Box::pin(async move {
            let opened =
                near.open_stream(Lane::Bulk, holder, Service::STORE, header.into(), soon());
            let stream = opened.await.map_err(io::Error::other)?;
            Ok(Box::new(stream) as Box<dyn Wire>)
        })
    }

    fn may_seal(&self, key: &NodeKey) -> bool {
        *key == self.holder
    }
}

/// Brings single chunks before all others.
#[derive(Debug)]
struct Urgent(Incoming);

impl Bringer for Urgent {
    fn bring(&self, chunk: ChunkId) -> BoxFuture<'_, Result<(), NotBrought>> {
        Box::pin(async move {
            let brought = self.0.bring(chunk).await;
            brought.map(drop).map_err(not_now)
        })
    }

    fn rush(&self, chunk: ChunkId) -> BoxFuture<'_, Result<Option<Carried>, NotBrought>> {
        Box::pin(async move {
            let came = self.0.rush(chunk).await.map_err(not_now)?;
            Ok(Some(came.carried().clone()))
        })
    }
}

fn not_now(err: BringError) -> NotBrought {
    let why = err.to_string();
    NotBrought::NotNow(NotNow {
        why,
        away: Vec::new(),
    })
}

//! Builds the rooms, joins them, starts them, and stops them in reverse.
//!
//! ```text
//! start  data dir, identity > images > accelerator > raft > transport > slots > sandboxes > facts > reconcile > API
//! stop   API > transport > reconcile, sandbox drivers > slots > raft > data dir
//! ```
//!
//! What runs on the host is looked at before anything is swept, and the replicated state is up
//! before anything is decided. Stopping leaves every sandbox running under its shim; the next
//! daemon retakes them. [`clean_up`] is the other end: nothing of this node stays on the host.

mod facts;
mod guests;
mod host;

use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use proto::ids::NodeId;
use proto::version;
use raft::group::{BootstrapError, Group, GroupConfig, OpenError};
use raft::link::NoPeers;
use raft::state::State;
use raft::types::Node;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task;
use tokio::time::Instant;
use tracing::{info, info_span, warn};
use transport::identity::IdentityError;
use transport::{Identity, Membership, Transport};

use self::host::TagClaim;
use crate::api::{self, ApiState, NodeFacts};
use crate::base::chain::chain;
use crate::base::clock::{Clock, SystemClock};
use crate::base::stop::Tasks;
use crate::cluster::{GroupLog, ProposeError, Proposer};
use crate::config::Config;
use crate::dashboard;
use crate::net::{self, Cidr, NetConfig, NetError, SlotPool, SlotTag};
use crate::reconcile::Reconciler;
use crate::relay::Relay;
use crate::sandbox::{Registry, adopt};
use crate::shim::sweep::kill_leftovers;
use crate::store::{DataDir, DataPaths, OpenDataDirError, durable};
use crate::template::{Catalog, OpenCatalogError};
use crate::vmm::Accelerator;
use crate::vmm::probe::ProbeError;

/// The id of the node that founds a cluster; later ones get theirs from the log.
const FOUNDER: NodeId = NodeId(1);
/// Longest the transport may take to say goodbye to its peers.
const TRANSPORT_STOP: Duration = Duration::from_secs(3);
/// Where a node that is ready says so, for the command line on the same host.
pub const READY_FILE: &str = "ready.json";
/// The key of the first start, readable by the node's own user.
pub const BOOTSTRAP_KEY_FILE: &str = "bootstrap.key";

/// Why a node could not start, or stopped by itself.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The data directory cannot be used.
    #[error("open the data directory")]
    Data(#[from] OpenDataDirError),
    /// The guest images are not there.
    #[error("open the guest images")]
    Images(#[from] OpenCatalogError),
    /// No hypervisor runs a guest here.
    #[error("find out how to run guests")]
    Probe(#[from] ProbeError),
    /// The hypervisor asked for does not run guests here.
    #[error("the accelerator {wanted} does not run guests here: {why}")]
    Accelerator {
        /// What the configuration asks for.
        wanted: &'static str,
        /// How it failed.
        why: String,
    },
    /// The node's key cannot be used.
    #[error("load the node's key")]
    Identity(#[from] IdentityError),
    /// The replicated log cannot be used.
    #[error("open the replicated log")]
    Raft(#[from] OpenError),
    /// The cluster of one could not be formed.
    #[error("form the cluster")]
    Bootstrap(#[from] BootstrapError),
    /// The node could not tell the cluster about itself.
    #[error("tell the cluster about this node")]
    Announce(#[from] ProposeError),
    /// The network could not be prepared.
    #[error("prepare the network")]
    Network(#[from] NetError),
    /// Another node of this host has the network slots.
    #[error("another node of this host uses the slots from {base} on; give each its own slot_base")]
    SlotsTaken {
        /// Where the range begins.
        base: u16,
    },
    /// The address for other nodes cannot be used.
    #[error("listen for other nodes")]
    Transport(#[from] transport::StartError),
    /// The API's address cannot be used.
    #[error("listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the kernel says.
        source: io::Error,
    },
    /// A file or a directory of the node's own cannot be used.
    #[error("{what}")]
    Disk {
        /// What was tried.
        what: &'static str,
        /// What the disk says.
        source: io::Error,
    },
    /// A part of the node broke; its log says which.
    #[error("the node cannot go on: {0}")]
    Broke(String),
    /// Processes of the node cannot be ended.
    #[error("end the processes of {dir:?}")]
    Processes {
        /// The sandbox's directory.
        dir: PathBuf,
        /// What stands in the way.
        source: crate::shim::error::SweepError,
    },
}

/// Runs a node until it is asked to stop (SIGTERM, SIGINT). Sandboxes keep running without it.
///
/// # Errors
/// [`RunError`]. What a failed start left on the host, the next start sweeps.
pub async fn run(config: Config) -> Result<(), RunError> {
    let mut stop = StopSignals::new()?;
    let running = Running::start(config).await?;
    let broke = tokio::select! {
        () = stop.wait() => None,
        () = running.panicked() => Some("a task ended in a panic".to_owned()),
        fault = running.group.failed() => Some(chain(&*fault)),
    };
    info!("stopping; capsules keep running");
    running.stop().await;
    broke.map_or(Ok(()), |why| Err(RunError::Broke(why)))
}

/// The two signals that ask a daemon to stop.
struct StopSignals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl StopSignals {
    fn new() -> Result<Self, RunError> {
        let install = |kind| signal(kind).map_err(disk("install a signal handler"));
        let terminate = install(SignalKind::terminate())?;
        Ok(Self {
            terminate,
            interrupt: install(SignalKind::interrupt())?,
        })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Everything that runs, in the order in which it was started.
struct Running {
    data: DataDir,
    group: Group<State>,
    /// The pool's task; it outlives the drivers, which give slots back.
    slot_tasks: Tasks,
    slots: SlotPool,
    _slot_claim: TagClaim,
    /// Sandbox drivers and the reconciler.
    tasks: Tasks,
    transport: Transport,
    api_tasks: Tasks,
}

impl Running {
    async fn start(config: Config) -> Result<Self, RunError> {
        let data = open_data(&config.data_dir)?;
        // A daemon that was killed left it.
        facts::remove_ready(data.paths())?;
        // Bound before anything slow or lasting: a taken port is the most common mistake.
        let listener = listen(config.listen).await?;
        let identity = Identity::load_or_create(&data.paths().identity())?;
        let catalog = open_catalog(&config, data.paths()).await?;
        let chosen = host::choose_vmm(&config, &catalog, data.paths()).await?;
        let group = open_group(&config, data.paths(), &identity).await?;
        let log = Arc::new(GroupLog(group.clone()));
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let proposer = Proposer::new(log, Arc::clone(&clock));

        // Before anything is made on the host: its ports may be taken as well.
        let transport = start_transport(&config, &identity)?;

        let (slot_tasks, tasks, api_tasks) = (Tasks::new(), Tasks::new(), Tasks::new());
        let leftovers = adopt::scan(data.paths())
            .await
            .map_err(disk("look for sandboxes"))?;
        let (slots, slot_claim) =
            start_slots(&config, data.paths(), &leftovers, &slot_tasks).await?;
        let host = host::of(&config, data.paths(), &catalog, &chosen, slots.clone())?;
        let registry = Arc::new(Registry::new(Arc::new(host), tasks.clone()));
        adopt::take_over(&registry, leftovers).await;

        let url = config.public_url.clone();
        facts::announce(&config, &proposer, &identity, &catalog, &chosen).await?;
        facts::bootstrap_key(data.paths(), &proposer).await?;
        Reconciler {
            here: FOUNDER,
            view: proposer.view(),
            proposer: proposer.clone(),
            registry: Arc::clone(&registry),
            catalog: Arc::clone(&catalog),
            clock: Arc::clone(&clock),
            ended_retention: config.ended_retention,
        }
        .spawn(&tasks);

        let guests = Arc::new(guests::RegistryGuests(registry));
        let relay = Relay::new(FOUNDER, proposer.view(), guests);
        let node = NodeFacts {
            id: FOUNDER,
            name: config.name.clone(),
            url: url.clone(),
            version: version::PRODUCT.to_owned(),
        };
        let state =
            ApiState::new(proposer, relay, clock, node).with_spool_dir(data.paths().cache());
        let router = api::router_with_pages(state, dashboard::routes());
        let stop = api_tasks.token().clone();
        api_tasks.spawn(info_span!("api"), api::serve(listener, router, stop));
        facts::write_ready(data.paths(), &config.name, &url)?;
        info!(%url, data = %data.paths().root().display(), "ready");
        Ok(Self {
            data,
            group,
            slot_tasks,
            slots,
            _slot_claim: slot_claim,
            tasks,
            transport,
            api_tasks,
        })
    }

    /// Waits for a panic in any task: it stops the others of its kind, and half a node is worse
    /// than a restart.
    async fn panicked(&self) {
        tokio::select! {
            () = self.tasks.token().cancelled() => {}
            () = self.slot_tasks.token().cancelled() => {}
            () = self.api_tasks.token().cancelled() => {}
        }
    }

    async fn stop(self) {
        // First, so that nobody takes a stopping node for a ready one.
        if let Err(err) = facts::remove_ready(self.data.paths()) {
            warn!(err = chain(&err), "it still looks ready");
        }
        self.api_tasks.stop_and_join().await;
        self.transport.stop(Instant::now() + TRANSPORT_STOP).await;
        self.tasks.stop_and_join().await;
        self.slots.shutdown().await;
        self.slot_tasks.stop_and_join().await;
        self.group.shutdown().await;
    }
}

fn open_data(dir: &Path) -> Result<DataDir, RunError> {
    let absolute = std::path::absolute(dir).map_err(disk("resolve the data directory"))?;
    Ok(DataDir::open(&absolute)?)
}

async fn listen(address: SocketAddr) -> Result<TcpListener, RunError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| RunError::Listen { address, source })
}

async fn open_catalog(config: &Config, paths: &DataPaths) -> Result<Arc<Catalog>, RunError> {
    let images = std::path::absolute(&config.images_dir).map_err(disk("resolve the images"))?;
    let paths = paths.clone();
    let opened = task::spawn_blocking(move || Catalog::open(&images, &paths)).await;
    let catalog = opened.map_err(|err| RunError::Broke(err.to_string()))??;
    for reason in catalog.unusable() {
        warn!(err = chain(reason), "a template cannot be used");
    }
    Ok(Arc::new(catalog))
}

async fn open_group(
    config: &Config,
    paths: &DataPaths,
    identity: &Identity,
) -> Result<Group<State>, RunError> {
    let node = Node::new(config.cluster_listen.to_string(), identity.key());
    let layout = GroupConfig::new(paths.raft(), paths.state(), FOUNDER, node);
    let group = Group::open(layout, NoPeers).await?;
    group.bootstrap().await?;
    Ok(group)
}

async fn start_slots(
    config: &Config,
    paths: &DataPaths,
    leftovers: &[adopt::Leftover],
    tasks: &Tasks,
) -> Result<(SlotPool, TagClaim), RunError> {
    let tag = host::slot_tag(config.slot_base)?;
    let base = config.slot_base;
    let claim = host::claim_tag(&tag)?.ok_or(RunError::SlotsTaken { base })?;
    leave_old_tag(paths, &tag).await?;
    durable::write(&host::tag_file(paths), tag.as_str().as_bytes())
        .map_err(disk("remember the slot tag"))?;
    let swept = net::sweep::sweep(&tag, &adopt::slots_in_use(leftovers)).await?;
    if !swept.slots.is_empty() {
        info!(
            slots = swept.slots.len(),
            "removed network slots that nobody uses"
        );
    }
    let config = NetConfig {
        tag,
        index_base: config.slot_base,
        index_count: config.slot_count,
        pool_target: usize::from(config.slot_pool),
        egress_allow: allowed(&config.egress_allow)?,
        serial_file: paths.net().join("serial"),
    };
    Ok((SlotPool::start(config, tasks).await?, claim))
}

/// Takes away what is there under another tag than `tag`: the range was moved in the
/// configuration, and from now on nobody would look for it.
async fn leave_old_tag(paths: &DataPaths, tag: &SlotTag) -> Result<(), RunError> {
    let Some(old) = host::known_tag(paths)?.filter(|old| old != tag) else {
        return Ok(());
    };
    warn!(%old, new = %tag, "the slot range has moved; capsules of the old one end");
    clear_tag(&old).await
}

/// Takes everything of `tag` off the host, unless it is another node's by now: that one has swept
/// what was left of ours.
async fn clear_tag(tag: &SlotTag) -> Result<(), RunError> {
    let Some(_claim) = host::claim_tag(tag)? else {
        warn!(%tag, "another node uses these slots; they are left to it");
        return Ok(());
    };
    net::sweep::sweep(tag, &BTreeSet::new()).await?;
    Ok(net::sweep::teardown_host(tag).await?)
}

/// The networks that guests may reach although they are private.
fn allowed(networks: &[(Ipv4Addr, u8)]) -> Result<Vec<Cidr>, RunError> {
    let parse = |(network, prefix): &(Ipv4Addr, u8)| Ok(format!("{network}/{prefix}").parse()?);
    networks.iter().map(parse).collect()
}

fn start_transport(config: &Config, identity: &Identity) -> Result<Transport, RunError> {
    let control = config.cluster_listen;
    let bulk = config.bulk_listen;
    let transport = Transport::start(identity, transport::Config::at(control, bulk))?;
    // A cluster of one: this node's own key and nobody else's.
    let members = [identity.key()].into_iter().collect();
    transport.set_membership(Membership {
        index: 1,
        members,
        join_open: false,
    });
    Ok(transport)
}

/// Ends everything that a node with this data directory left running on the host: sandboxes, their
/// shims and VMMs, namespaces, links, rules. The node itself must not run.
///
/// # Errors
/// [`RunError::Data`] where it runs, others where something resists.
pub async fn clean_up(data_dir: &Path) -> Result<(), RunError> {
    let data = open_data(data_dir)?;
    let paths = data.paths().clone();
    for id in paths
        .sandboxes_present()
        .map_err(disk("look for sandboxes"))?
    {
        let sandbox = paths.sandbox(id);
        let dir = sandbox.dir().to_owned();
        let ended = task::spawn_blocking(move || kill_leftovers(&dir).map_err(|err| (dir, err)));
        let ended = ended
            .await
            .map_err(|err| RunError::Broke(err.to_string()))?;
        ended.map_err(|(dir, source)| RunError::Processes { dir, source })?;
        sandbox
            .remove()
            .map_err(disk("remove a sandbox's directory"))?;
    }
    if let Some(tag) = host::known_tag(&paths)? {
        clear_tag(&tag).await?;
    }
    facts::remove_ready(&paths)
}

/// Finds out what runs guests on this machine by running one, and says so in a sentence. For the
/// command line: needs no node, and remembers nothing.
///
/// # Errors
/// [`RunError::Images`] and [`RunError::Probe`].
pub fn probe_accelerator(config: &Config) -> Result<String, RunError> {
    let guest = crate::template::find_guest(&config.images_dir)?;
    let outcome = crate::vmm::probe::probe(&host::probe_request(config, &guest, None))?;
    let tried = outcome.attempts.iter();
    let tried: Vec<_> = tried
        .map(|it| format!("{}: {}", it.accelerator, it.detail))
        .collect();
    Ok(format!(
        "{} ({})",
        outcome.accelerator.name(),
        tried.join("; ")
    ))
}

/// The choice of hypervisor, and what led to it.
#[derive(Clone, Debug)]
struct Chosen {
    program: PathBuf,
    version: String,
    accelerator: Accelerator,
}

/// Adds what was tried to an I/O error.
fn disk(what: &'static str) -> impl FnOnce(io::Error) -> RunError {
    move |source| RunError::Disk { what, source }
}

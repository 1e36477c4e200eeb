//! Builds the rooms, joins them, starts them, and stops them in reverse.
//!
//! ```text
//! start  data dir, identity > transport > membership (found, join) > raft > cluster > images,
//!        accelerator > slots > sandboxes > announcement > lease, reconcile, relay > API
//! stop   API > reconcile, sandbox drivers > leadership > cluster > transport > slots > raft
//! ```
//!
//! A node that was a member before waits for nobody: without a quorum it serves what it knows, its
//! own sandboxes run on, and it announces itself as soon as there is one.
//!
//! What runs on the host is looked at before anything is swept, and the replicated state is up
//! before anything is decided. Stopping leaves every sandbox running under its shim; the next
//! daemon retakes them. [`clean_up`] is the other end: nothing of this node stays on the host.

mod error;
mod facts;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod guests;
mod host;
mod hypervisor;
mod info;
mod lease;
mod member;
mod membership;
mod paging;
mod peers;
pub mod recover;
mod scrub;
mod snapshots;
mod upkeep;

use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use proto::ids::NodeId;
use proto::version;
use raft::command::Command;
use raft::group::{Group, GroupConfig};
use raft::state::{Settings, State};
use raft::types::Node;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task;
use tokio::time::{self, Instant};
use tracing::{info, info_span, warn};
use transport::{Identity, Transport};

pub use self::error::RunError;
use self::facts::Announcement;
use self::host::TagClaim;
use self::lease::{LeaseFile, MachineLoad};
use self::membership::Belonging;
use self::peers::MeshWays;
use crate::api::{self, ApiState, NodeFacts};
use crate::base::chain::chain;
use crate::base::clock::{Clock, SystemClock};
use crate::base::stop::Tasks;
use crate::build::{self, Builder};
use crate::cluster::{Cluster, Mesh, MeshLink, Proposer};
use crate::config::Config;
use crate::dashboard;
use crate::net::{self, Cidr, NetConfig, SlotPool, SlotTag};
use crate::pager;
use crate::reconcile::Reconciler;
use crate::relay::{QuicPeers, QuicRelay, Relay};
use crate::sandbox::{Registry, adopt};
use crate::shim::sweep::kill_leftovers;
use crate::store::{DataDir, DataPaths, Store, durable};
use crate::template::Catalog;
use crate::vmm::cgroup;

/// The id of the node that founds a cluster; later ones get theirs from the log.
const FOUNDER: NodeId = NodeId(1);
/// How long a node that has just joined waits for the cluster's state.
const STATE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a starting member waits for a quorum before it serves without one.
const QUORUM_PATIENCE: Duration = Duration::from_secs(5);
/// Longest the transport may take to say goodbye to its peers.
const TRANSPORT_STOP: Duration = Duration::from_secs(3);
/// Where a node that is ready says so, for the command line on the same host.
pub const READY_FILE: &str = "ready.json";
/// The key of the first start, readable by the node's own user.
pub const BOOTSTRAP_KEY_FILE: &str = "bootstrap.key";

/// Runs a node until it is asked to stop (SIGTERM, SIGINT). Sandboxes keep running without it.
///
/// # Errors
/// [`RunError`]. What a failed start left on the host, the next start sweeps.
pub async fn run(config: Config) -> Result<(), RunError> {
    let mut stop = StopSignals::new()?;
    let data_dir = config.data_dir.clone();
    let running = Running::start(config).await?;
    let ended = tokio::select! {
        () = stop.wait() => Ok(()),
        () = running.panicked() => Err(RunError::Broke("a task ended in a panic".to_owned())),
        fault = running.group.failed() => Err(RunError::Broke(chain(&*fault))),
        () = running.cluster.removed().cancelled() => Err(RunError::Removed),
    };
    let removed = matches!(ended, Err(RunError::Removed));
    if !removed {
        info!("stopping; capsules keep running");
    }
    running.stop().await;
    if removed {
        // Nobody will ask for them again, and nobody else would end them.
        clean_up(&data_dir).await?;
    }
    ended
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
    cluster: Cluster,
    /// Lease, load, leadership, the replica.
    cluster_tasks: Tasks,
    /// The pool's task; it outlives the drivers, which give slots back.
    slot_tasks: Tasks,
    slots: SlotPool,
    _slot_claim: TagClaim,
    /// Sandbox drivers and the reconciler.
    tasks: Tasks,
    transport: Arc<Transport>,
    api_tasks: Tasks,
}

impl Running {
    async fn start(config: Config) -> Result<Self, RunError> {
        let data = open_data(&config.data_dir)?;
        let paths = data.paths();
        // A daemon that was killed left it.
        facts::remove_ready(paths)?;
        // Bound before anything slow or lasting: a taken port is the most common mistake.
        let listener = listen(config.listen).await?;
        let identity = Arc::new(Identity::load_or_create(&paths.identity())?);
        let catalog = open_catalog(&config, paths).await?;
        let transport = start_transport(&config, &identity)?;
        let mut belonging = membership::establish(&config, paths, &identity, &transport).await?;
        let here = belonging.node;

        let mesh = Mesh::new(Arc::clone(&transport), here);
        let group = open_group(&config, paths, &identity, &belonging, &mesh).await?;
        recover::finish(&group, paths, &mut belonging).await?;
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let cluster = Cluster::assemble(group.clone(), mesh, &belonging.told, Arc::clone(&clock));
        let cluster_tasks = Tasks::new();
        cluster.serve(paths.cache(), Arc::clone(&clock));
        cluster.follow(belonging.told.clone(), paths.cache(), &cluster_tasks);
        await_state(&belonging, &cluster).await?;
        let remember = recover::keep_remembering(
            cluster.proposer().view(),
            paths.clone(),
            (here, belonging.told.cluster),
            cluster_tasks.token().clone(),
        );
        cluster_tasks.spawn(info_span!("membership"), remember);

        let chosen = hypervisor::choose(&config, &catalog, paths).await?;
        let (slot_tasks, tasks, api_tasks) = (Tasks::new(), Tasks::new(), Tasks::new());
        let leftovers = adopt::scan(paths)
            .await
            .map_err(disk("look for sandboxes"))?;
        let (slots, slot_claim) = start_slots(&config, paths, &leftovers, &slot_tasks).await?;
        let keeping = snapshots::keeping(paths, &cluster, identity).await?;
        let paging = paging::start(keeping.store.clone(), paths, &tasks).await?;
        let (shared, slots_too) = (keeping.clone(), slots.clone());
        let host = host::of(&config, paths, &catalog, &chosen, slots_too, shared, paging)?;
        let registry = Arc::new(Registry::new(Arc::new(host), tasks.clone()));
        adopt::take_over(&registry, leftovers).await;
        snapshots::keep_up(&keeping, &cluster, paths, &tasks)?;
        let store = keeping.store.clone();
        snapshots::share(keeping, &cluster, &tasks);

        let announcement = Announcement::new(&config, here, &group, &catalog, &chosen)?;
        announce(&belonging, announcement, &cluster, paths, &cluster_tasks).await?;
        let running = Self {
            group,
            cluster,
            cluster_tasks,
            slot_tasks,
            slots,
            _slot_claim: slot_claim,
            tasks,
            transport,
            api_tasks,
            data,
        };
        running.serve(&config, registry, store, catalog, clock, listener)?;
        Ok(running)
    }

    /// Starts what an announced node does: renew, reconcile, relay, answer.
    fn serve(
        &self,
        config: &Config,
        registry: Arc<Registry>,
        store: Store,
        catalog: Arc<Catalog>,
        clock: Arc<dyn Clock>,
        listener: TcpListener,
    ) -> Result<(), RunError> {
        let (cluster, paths) = (&self.cluster, self.data.paths());
        let (proposer, here) = (cluster.proposer().clone(), cluster.mesh().here());
        let lease = LeaseFile::open(paths, Arc::clone(&registry), proposer.view());
        let lease = Arc::new(lease.map_err(disk("open the lease file"))?);
        let load = Arc::new(MachineLoad::new(Arc::clone(&registry)));
        cluster.take_part(lease, load, &self.cluster_tasks);
        Reconciler {
            here,
            view: proposer.view(),
            proposer: proposer.clone(),
            registry: Arc::clone(&registry),
            catalog,
            clock: Arc::clone(&clock),
            ended_retention: config.ended_retention,
            leads: cluster.leads(),
        }
        .spawn(&self.tasks);

        let view = proposer.view();
        let metering = self.meter(&registry, &clock);
        let guests = guests::RegistryGuests {
            registry,
            store,
            view,
            metering,
        };
        let guests = Arc::new(guests);
        let ways = Arc::new(MeshWays(cluster.mesh().clone()));
        let peers = QuicPeers::new(Arc::clone(&self.transport), ways.clone());
        let relay = Relay::new(here, proposer.view(), guests).with_peers(Arc::new(peers));
        QuicRelay::register(&self.transport, relay.server(), ways);
        let follow = relay.clone().follow(self.api_tasks.token().clone());
        self.api_tasks.spawn(info_span!("relay"), follow);

        Builder {
            here,
            proposer: proposer.clone(),
            relay: relay.clone(),
            archives: paths.cache().join(build::ARCHIVES),
        }
        .spawn(&self.tasks);

        let url = config.public_url.clone();
        let node = NodeFacts {
            id: here,
            name: config.name.clone(),
            url: url.clone(),
            version: version::PRODUCT.to_owned(),
        };
        let info = Arc::new(info::Info(cluster.clone()));
        let state = ApiState::new(proposer, relay, clock, node)
            .with_cluster(info)
            .with_spool_dir(paths.cache())
            .with_webhook_allow(allowed(&config.webhook_allow)?);
        let router = api::router_with_pages(state.clone(), dashboard::routes());
        let stop = self.api_tasks.token().clone();
        let serve = api::serve(listener, router, stop.clone());
        self.api_tasks.spawn(info_span!("api"), serve);
        let deliver = state.clone().deliver(cluster.leads(), stop.clone());
        self.api_tasks.spawn(info_span!("channels"), deliver);
        self.api_tasks
            .spawn(info_span!("api sessions"), async move {
                stop.cancelled().await;
                state.end_sessions().await;
            });
        facts::write_ready(paths, here, &config.name, &url)?;
        info!(%url, node = %here, data = %paths.root().display(), "ready");
        Ok(())
    }

    /// Waits for a panic in any task: it stops the others of its kind, and half a node is worse
    /// than a restart.
    async fn panicked(&self) {
        tokio::select! {
            () = self.tasks.token().cancelled() => {}
            () = self.cluster_tasks.token().cancelled() => {}
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
        // Reports under way still need the leader, wherever it is.
        self.tasks.stop_and_join().await;
        self.cluster.hand_over().await;
        self.cluster_tasks.stop_and_join().await;
        self.transport.stop(Instant::now() + TRANSPORT_STOP).await;
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
    belonging: &Belonging,
    mesh: &Mesh,
) -> Result<Group<State>, RunError> {
    let node = Node::new(config.advertise.to_string(), identity.key());
    let layout = GroupConfig::new(paths.raft(), paths.state(), belonging.node, node);
    let group = Group::open(layout, MeshLink::new(mesh.clone())).await?;
    // Only ever once: a founder whose log has an entry waits for nobody.
    if belonging.is_founder() && group.metrics().last_log.is_none() {
        check_never_founded(paths)?;
        group.bootstrap().await?;
    }
    Ok(group)
}

/// An empty log of a node that has made its first key is not new, it is lost: founding anew would
/// make a second cluster of the same name, which acknowledges what the other one never hears of.
fn check_never_founded(paths: &DataPaths) -> Result<(), RunError> {
    if paths.root().join(BOOTSTRAP_KEY_FILE).exists() {
        return Err(RunError::LogLost(paths.raft()));
    }
    Ok(())
}

/// Waits until a node that has just joined knows what the cluster knew then.
async fn await_state(belonging: &Belonging, cluster: &Cluster) -> Result<(), RunError> {
    if !belonging.is_new {
        return Ok(());
    }
    let view = cluster.proposer().view();
    let deadline = Instant::now() + STATE_TIMEOUT;
    let here = belonging.node;
    let arrived = view.wait_for(deadline, |state| state.node(here).map(|_| ()));
    arrived.await.ok_or(RunError::NoState {
        node: here,
        waited: STATE_TIMEOUT,
    })
}

/// Tells the cluster about this node, and a founder what it is. A node that was a member before
/// goes on without a quorum and tells later.
async fn announce(
    belonging: &Belonging,
    announcement: Announcement,
    cluster: &Cluster,
    paths: &DataPaths,
    tasks: &Tasks,
) -> Result<(), RunError> {
    let proposer = cluster.proposer().clone();
    let tell = async {
        if belonging.is_founder() {
            found(belonging, &proposer).await?;
        }
        announcement.tell(&proposer).await?;
        if belonging.is_founder() {
            facts::bootstrap_key(paths, &proposer).await?;
        }
        Ok::<(), RunError>(())
    };
    let was_member = proposer.view().state().node(belonging.node).is_some();
    match time::timeout(QUORUM_PATIENCE, tell).await {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(err)) if !was_member => return Err(err),
        Ok(Err(err)) => warn!(
            err = chain(&err),
            "could not tell the cluster about this node"
        ),
        Err(_) => warn!("no quorum yet: serving what this node knows"),
    }
    let stop = tasks.token().clone();
    let later = announcement.keep_telling(proposer, stop);
    tasks.spawn(info_span!("announce"), later);
    Ok(())
}

/// Gives the cluster its name, once.
async fn found(belonging: &Belonging, proposer: &Proposer) -> Result<(), RunError> {
    if proposer.view().state().cluster().is_some() {
        return Ok(());
    }
    let id = belonging.told.cluster;
    let settings = Settings::default();
    let found = Command::FoundCluster { id, settings };
    proposer.propose(found).await?;
    Ok(())
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
    sweep_groups(&tag, leftovers).await?;
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

/// Ends and removes the control groups of `tag` that no directory of a sandbox answers for.
async fn sweep_groups(tag: &SlotTag, leftovers: &[adopt::Leftover]) -> Result<(), RunError> {
    let Ok(node) = cgroup::group_of_node(tag.as_str()) else {
        return Ok(());
    };
    let keep = adopt::names(leftovers);
    let swept = task::spawn_blocking(move || cgroup::sweep(&node, &keep)).await;
    match swept.map_err(|err| RunError::Broke(err.to_string()))? {
        Ok(swept) if swept.is_empty() => {}
        Ok(swept) => info!(?swept, "removed control groups that nobody uses"),
        // It holds nothing that a new sandbox needs.
        Err(err) => warn!(err = chain(&err), "a control group stays"),
    }
    Ok(())
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

/// Nobody is let in before the cluster room says who belongs to the cluster.
fn start_transport(config: &Config, identity: &Identity) -> Result<Arc<Transport>, RunError> {
    let listen = transport::Config::at(config.cluster_listen, config.bulk_listen);
    Ok(Arc::new(Transport::start(identity, listen)?))
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
    let (chosen, tried) = hypervisor::try_out(config, &guest)?;
    let (vmm, accelerator) = (chosen.driver.name(), chosen.accelerator.name());
    Ok(format!("{vmm} and {accelerator} ({})", tried.join("; ")))
}

/// Runs a guest of some bytes under KVM, by Cloud Hypervisor where it is to be used and there is one,
/// else by QEMU, and says so in a sentence. For the command line: needs no image.
///
/// # Errors
/// Why KVM does not run it, or why it cannot be saved.
pub fn prove_kvm(config: &Config) -> Result<String, String> {
    hypervisor::prove_kvm(config)
}

/// Finds out how the memory of resumed guests comes on this machine, and says so in a sentence. For
/// the command line.
///
/// # Errors
/// No pager can serve: memory is copied before a guest runs.
pub fn probe_paging() -> Result<String, pager::probe::ProbeError> {
    paging::probe().map(paging::words)
}

/// Adds what was tried to an I/O error.
fn disk(what: &'static str) -> impl FnOnce(io::Error) -> RunError {
    move |source| RunError::Disk { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_founder_that_lost_its_log_does_not_found_again() {
        let root = tempfile::tempdir().expect("a directory");
        let paths = DataPaths::new(root.path());
        check_never_founded(&paths).expect("new");
        std::fs::write(root.path().join(BOOTSTRAP_KEY_FILE), "wrn_").expect("written");
        let refused = check_never_founded(&paths);
        assert!(matches!(refused, Err(RunError::LogLost(_))), "{refused:?}");
    }
}

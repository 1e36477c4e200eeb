//! Many members in one process, joined by function calls instead of a network, with partitions
//! that are switched on and off.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proto::ids::{NodeId, NodeKey};
use tokio::time;
use wrenn_raft::disk::{Disk, RealDisk};
use wrenn_raft::group::{Group, GroupConfig, Role, Timeouts};
use wrenn_raft::link::{self, Link, LinkError};
use wrenn_raft::snapshot::SnapshotFile;
use wrenn_raft::types::Node;

use super::toy::Toy;
use super::{PATIENCE, get, soon};

/// For tests that hold on to a leader: nobody stands for election because a busy machine stood
/// still for a moment.
pub const CALM: Timeouts = Timeouts {
    heartbeat: Duration::from_millis(100),
    election_min: Duration::from_secs(2),
    election_max: Duration::from_secs(3),
};

/// What joins the members: who is there, and which ways are cut.
#[derive(Default)]
pub struct Net {
    groups: Mutex<BTreeMap<NodeId, Group<Toy>>>,
    cut: Mutex<BTreeSet<(NodeId, NodeId)>>,
    snapshots: AtomicU64,
    damages: AtomicBool,
    breaks_when_joint: AtomicBool,
}

/// One member's end of the net.
pub struct Wire {
    own: NodeId,
    net: Arc<Net>,
}

impl Wire {
    /// The other end, and whether its answers come back.
    fn reach(&self, to: NodeId) -> Result<Group<Toy>, LinkError> {
        if self.net.is_cut(self.own, to) {
            return Err(LinkError::Unreachable(to));
        }
        let groups = self.net.groups.lock().unwrap();
        let group = groups.get(&to).cloned();
        drop(groups);
        let group = group.ok_or(LinkError::Unreachable(to))?;
        let breaks = self.net.breaks_when_joint.load(Ordering::Relaxed);
        if breaks && group.metrics().is_joint && group.role() != Role::Leader {
            self.net.breaks_when_joint.store(false, Ordering::Relaxed);
            self.net.isolate(self.own.0);
            return Err(LinkError::Unreachable(to));
        }
        Ok(group)
    }

    /// What comes back, unless the way back is cut by now.
    fn answered(&self, to: NodeId, answer: Vec<u8>) -> Result<Vec<u8>, LinkError> {
        if self.net.is_cut(to, self.own) {
            return Err(LinkError::TimedOut(to));
        }
        Ok(answer)
    }
}

impl Link for Wire {
    async fn call(
        &self,
        to: NodeId,
        _node: &Node,
        request: Vec<u8>,
        within: Duration,
    ) -> Result<Vec<u8>, LinkError> {
        assert_eq!(link::sender(&request), Some(self.own));
        let group = self.reach(to)?;
        let answer = time::timeout(within, group.serve(&request)).await;
        self.answered(to, answer.map_err(|_| LinkError::TimedOut(to))?)
    }

    async fn send_snapshot(
        &self,
        to: NodeId,
        _node: &Node,
        request: Vec<u8>,
        file: SnapshotFile,
    ) -> Result<Vec<u8>, LinkError> {
        let group = self.reach(to)?;
        if let Some(refusal) = group.refuse_snapshot(&request) {
            return self.answered(to, refusal);
        }
        self.net.snapshots.fetch_add(1, Ordering::Relaxed);
        let mut bytes = fs::read(&file.path).map_err(|_| LinkError::Broken(to))?;
        if self.net.damages.load(Ordering::Relaxed) {
            bytes.truncate(bytes.len() / 2);
        }
        let received = tempfile::NamedTempFile::new().unwrap();
        fs::write(received.path(), bytes).unwrap();
        let received_path = received.path().to_owned();
        let answer = group.serve_snapshot(&request, received_path).await;
        self.answered(to, answer)
    }
}

impl Net {
    fn is_cut(&self, from: NodeId, to: NodeId) -> bool {
        self.cut.lock().unwrap().contains(&(from, to))
    }

    /// Cuts all ways between `one` and everybody else, both directions.
    pub fn isolate(&self, one: u64) {
        let everybody: Vec<NodeId> = self.groups.lock().unwrap().keys().copied().collect();
        let mut cut = self.cut.lock().unwrap();
        for other in everybody.into_iter().filter(|&other| other != NodeId(one)) {
            cut.extend([(NodeId(one), other), (other, NodeId(one))]);
        }
    }

    /// Restores every way.
    pub fn heal(&self) {
        self.cut.lock().unwrap().clear();
    }

    /// From now on, whoever sends to a member that has a joint membership is cut off at once: the
    /// leader, as it is about to say how the change goes on.
    pub fn break_when_joint(&self) {
        self.breaks_when_joint.store(true, Ordering::Relaxed);
    }

    /// Whether only half of each snapshot arrives from now on.
    pub fn damage_snapshots(&self, damages: bool) {
        self.damages.store(damages, Ordering::Relaxed);
    }

    /// Snapshots sent so far.
    pub fn snapshots(&self) -> u64 {
        self.snapshots.load(Ordering::Relaxed)
    }
}

/// The members that run, and their folders.
pub struct Cluster {
    pub net: Arc<Net>,
    pub dir: tempfile::TempDir,
    /// Those of whoever starts from now on.
    pub timeouts: Timeouts,
}

impl Cluster {
    /// Nobody yet.
    pub fn new() -> Self {
        Self {
            net: Arc::default(),
            dir: tempfile::tempdir().unwrap(),
            timeouts: Timeouts::default(),
        }
    }

    /// Members 1 to `voters`, all of them voters, 1 the first leader.
    pub async fn of(voters: u64) -> Self {
        Self::timed(Timeouts::default(), voters).await
    }

    /// [`Self::of`], for tests that need no election: [`CALM`].
    pub async fn calm(voters: u64) -> Self {
        Self::timed(CALM, voters).await
    }

    /// [`Self::of`] with given timeouts.
    pub async fn timed(timeouts: Timeouts, voters: u64) -> Self {
        let cluster = Self {
            timeouts,
            ..Self::new()
        };
        cluster.start(1).await.bootstrap().await.unwrap();
        for id in 2..=voters {
            cluster.start(id).await;
            cluster.add(id).await;
        }
        cluster.vote(1..=voters).await;
        cluster
    }

    /// The folder of a member.
    pub fn home(&self, id: u64) -> PathBuf {
        self.dir.path().join(id.to_string())
    }

    /// A member's settings; small, so that snapshots and purges come soon.
    pub fn config(&self, id: u64) -> GroupConfig {
        GroupConfig {
            timeouts: self.timeouts,
            ..config(&self.home(id), id)
        }
    }

    /// Starts, or starts again, a member.
    pub async fn start(&self, id: u64) -> Group<Toy> {
        self.start_on(id, Arc::new(RealDisk)).await
    }

    /// [`Self::start`] on a given disk.
    pub async fn start_on(&self, id: u64, disk: Arc<dyn Disk>) -> Group<Toy> {
        let wire = Wire {
            own: NodeId(id),
            net: Arc::clone(&self.net),
        };
        let group = Group::<Toy>::open_on(self.config(id), wire, disk).await;
        let group = group.unwrap();
        let mut groups = self.net.groups.lock().unwrap();
        groups.insert(NodeId(id), group.clone());
        group
    }

    /// Stops a member; its folder stays.
    pub async fn halt(&self, id: u64) {
        let group = self.net.groups.lock().unwrap().remove(&NodeId(id));
        group.unwrap().shutdown().await;
    }

    /// The member `id`.
    pub fn group(&self, id: u64) -> Group<Toy> {
        self.net.groups.lock().unwrap()[&NodeId(id)].clone()
    }

    /// All that run.
    pub fn groups(&self) -> Vec<Group<Toy>> {
        self.net.groups.lock().unwrap().values().cloned().collect()
    }

    /// A leader that its quorum answers, now.
    pub async fn leader(&self) -> Group<Toy> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            for group in self.groups() {
                let read = time::timeout(Duration::from_secs(1), group.read_index());
                if matches!(read.await, Ok(Ok(_))) {
                    return group;
                }
            }
            time::sleep(Duration::from_millis(10)).await;
        }
        panic!("nobody leads");
    }

    /// Adds a running member as a learner and waits until it has caught up.
    pub async fn add(&self, id: u64) {
        let leader = self.leader().await;
        let node = self.group(id).node().clone();
        leader.add_learner(NodeId(id), node, soon()).await.unwrap();
        self.until("the learner has caught up", || {
            let metrics = leader.metrics();
            metrics.matched.get(&NodeId(id)).copied() >= metrics.applied
        })
        .await;
    }

    /// Makes these the voters.
    pub async fn vote(&self, ids: impl IntoIterator<Item = u64>) {
        let voters: BTreeSet<NodeId> = ids.into_iter().map(NodeId).collect();
        let changed = self
            .leader()
            .await
            .change_voters(voters, None, soon())
            .await;
        changed.unwrap();
    }

    /// Proposes wherever it is taken, as a client that tries one member after the other.
    pub async fn set(&self, key: &str, value: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            for group in self.groups() {
                let proposal = format!("{key}={value}").into_bytes();
                let soon = Instant::now() + Duration::from_secs(1);
                if group.propose(proposal, soon).await.is_ok() {
                    return;
                }
            }
            assert!(Instant::now() < deadline, "nobody takes the proposal");
            time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until `holds`.
    pub async fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !holds() {
            assert!(Instant::now() < deadline, "still waiting until {what}");
            time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until all that run have applied the same.
    pub async fn agreed(&self) {
        self.until("all agree", || {
            let views = self.groups();
            let mut views = views.iter().map(|group| group.state().borrow().clone());
            let first = views.next().unwrap();
            views.all(|view| view.applied == first.applied && view.state == first.state)
        })
        .await;
    }

    /// Waits until the member `id` has `key` at `value`.
    pub async fn has(&self, id: u64, key: &str, value: &str) {
        let group = self.group(id);
        self.until(&format!("{id} has {key}"), || {
            get(&group, key).as_deref() == Some(value)
        })
        .await;
    }

    /// Who believes to lead.
    pub fn leading(&self) -> Vec<NodeId> {
        let groups = self.net.groups.lock().unwrap();
        let leading = groups
            .iter()
            .filter(|(_, group)| group.role() == Role::Leader);
        leading.map(|(&id, _)| id).collect()
    }

    /// Stops everybody.
    pub async fn stop(self) {
        let ids: Vec<u64> = self
            .net
            .groups
            .lock()
            .unwrap()
            .keys()
            .map(|id| id.0)
            .collect();
        for id in ids {
            self.halt(id).await;
        }
    }
}

/// Settings of member `id` in `home`.
pub fn config(home: &Path, id: u64) -> GroupConfig {
    let node = Node::new(format!("member {id}"), NodeKey([0; 32]));
    GroupConfig {
        segment_bytes: 16 * 1024,
        snapshot_entries: 50,
        ..GroupConfig::new(home.join("raft"), home.join("state"), NodeId(id), node)
    }
}

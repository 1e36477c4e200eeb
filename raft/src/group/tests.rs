//! Three members in one process, joined by function calls instead of a network.

use std::collections::BTreeSet;

use openraft::ChangeMembers;
use proto::ids::NodeKey;

use super::*;
use crate::link::LinkError;
use crate::toy::Toy;

const PATIENCE: Duration = Duration::from_secs(30);

/// What joins the members: who is there, and who is cut off.
#[derive(Default)]
struct Net {
    groups: BTreeMap<NodeId, Group<Toy>>,
    cut: BTreeSet<NodeId>,
}

/// One member's end of the net.
struct Wire {
    own: NodeId,
    net: Arc<Mutex<Net>>,
}

impl Wire {
    fn reach(&self, to: NodeId) -> Result<Group<Toy>, LinkError> {
        let net = self.net.lock().unwrap();
        let cut = net.cut.contains(&to) || net.cut.contains(&self.own);
        let group = net.groups.get(&to).filter(|_| !cut);
        group.cloned().ok_or(LinkError::Unreachable(to))
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
        let group = self.reach(to)?;
        let answer = time::timeout(within, group.serve(&request)).await;
        answer.map_err(|_| LinkError::TimedOut(to))
    }

    async fn send_snapshot(
        &self,
        to: NodeId,
        _node: &Node,
        request: Vec<u8>,
        file: SnapshotFile,
    ) -> Result<Vec<u8>, LinkError> {
        let group = self.reach(to)?;
        Ok(group.serve_snapshot(&request, file.path).await)
    }
}

struct Cluster {
    net: Arc<Mutex<Net>>,
    groups: Vec<Group<Toy>>,
    dir: tempfile::TempDir,
}

impl Cluster {
    /// Three voters.
    async fn form() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let net = Arc::new(Mutex::new(Net::default()));
        let mut groups = Vec::new();
        for id in 1..=3 {
            let own = NodeId(id);
            let home = dir.path().join(id.to_string());
            let node = Node::new(format!("member {id}"), NodeKey([0; 32]));
            let config = GroupConfig {
                segment_bytes: 16 * 1024,
                snapshot_entries: 50,
                ..GroupConfig::new(home.join("raft"), home.join("state"), own, node)
            };
            let wire = Wire {
                own,
                net: Arc::clone(&net),
            };
            let group = Group::<Toy>::open(config, wire).await.unwrap();
            net.lock().unwrap().groups.insert(own, group.clone());
            groups.push(group);
        }
        groups[0].bootstrap().await.unwrap();
        let raft = &groups[0].inner.raft;
        for group in &groups[1..] {
            let node = group.node().clone();
            raft.add_learner(group.inner.node_id.0, node, true)
                .await
                .unwrap();
        }
        let voters = ChangeMembers::ReplaceAllVoters(BTreeSet::from([1, 2, 3]));
        raft.change_membership(voters, false).await.unwrap();
        Self { net, groups, dir }
    }

    fn cut(&self, who: Option<&Group<Toy>>) {
        let cut = who.map(|group| group.inner.node_id);
        self.net.lock().unwrap().cut = cut.into_iter().collect();
    }

    /// Proposes wherever it is taken, as a client that tries one member after the other.
    async fn set(&self, key: &str, value: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            for group in &self.groups {
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

    async fn until(&self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !holds(self) {
            assert!(Instant::now() < deadline, "still waiting until {what}");
            time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn agree(&self) -> bool {
        let view = |group: &Group<Toy>| group.state().borrow().clone();
        let first = view(&self.groups[0]);
        let mut others = self.groups[1..].iter().map(view);
        others.all(|other| other.applied == first.applied && other.state == first.state)
    }

    async fn stop(self) {
        self.net.lock().unwrap().groups.clear();
        for group in self.groups {
            group.shutdown().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_members_agree_and_outlive_their_leader() {
    let cluster = Cluster::form().await;
    for round in 0..20 {
        cluster.set(&format!("key {round}"), "before").await;
    }
    cluster.until("all agree", Cluster::agree).await;

    cluster.cut(Some(&cluster.groups[0]));
    cluster
        .until("another leads", |cluster| {
            cluster.groups[1..]
                .iter()
                .any(|group| group.role() == Role::Leader)
        })
        .await;
    let leader = cluster.groups[1..]
        .iter()
        .find(|group| group.role() == Role::Leader);
    let deadline = Instant::now() + PATIENCE;
    let answer = leader
        .unwrap()
        .propose(b"key 0=after".to_vec(), deadline)
        .await;
    answer.unwrap();
    // The one cut off may believe what it likes; it must not confirm it.
    let read = time::timeout(Duration::from_secs(1), cluster.groups[0].linearizable()).await;
    assert!(
        !matches!(read, Ok(Ok(()))),
        "a deposed leader confirmed a stale state"
    );

    cluster.cut(None);
    cluster.until("all agree", Cluster::agree).await;
    let view = cluster.groups[0].state().borrow().clone();
    assert_eq!(view.state.map.get(&b"key 0"[..]), Some(&b"after".to_vec()));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_was_away_too_long_is_brought_back_by_a_snapshot() {
    let cluster = Cluster::form().await;
    cluster.cut(Some(&cluster.groups[2]));
    for round in 0..400 {
        cluster
            .set(&format!("key {}", round % 30), &round.to_string())
            .await;
    }
    let absent = cluster.groups[2].metrics().applied;
    cluster
        .until("the log is purged", |cluster| {
            cluster.groups[0].metrics().purged > absent
        })
        .await;
    cluster.cut(None);
    cluster.until("all agree", Cluster::agree).await;
    assert!(cluster.groups[2].metrics().snapshot > absent);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_hands_over_when_asked() {
    let cluster = Cluster::form().await;
    cluster.set("key", "value").await;
    cluster.until("all agree", Cluster::agree).await;
    let raft = &cluster.groups[0].inner.raft;
    raft.trigger().transfer_leader(2).await.unwrap();
    cluster
        .until("the second leads", |cluster| {
            cluster.groups[1].role() == Role::Leader
        })
        .await;
    cluster.set("key", "after").await;
    cluster.stop().await;
}

#[tokio::test]
async fn garbled_requests_are_answered_and_change_nothing() {
    let cluster = Cluster::form().await;
    for bytes in [
        &b""[..],
        b"\xff\xff\xff",
        &[0x0a, 0x00],
        &[0x2a, 0x02, 0x0a, 0x00],
    ] {
        let group = &cluster.groups[1];
        assert!(!group.serve(bytes).await.is_empty());
        assert!(
            !group
                .serve_snapshot(bytes, "/nowhere".into())
                .await
                .is_empty()
        );
        assert_ne!(group.role(), Role::Stopped);
    }
    cluster.stop().await;
}

#[tokio::test]
async fn a_snapshot_that_arrives_damaged_is_refused_and_stops_nobody() {
    let cluster = Cluster::form().await;
    let vote = cluster.groups[0].inner.raft.metrics().borrow_watched().vote;
    let offer = peer::snapshot_offer(&vote, &SnapshotMeta::default());
    let file = cluster.dir.path().join("received");
    std::fs::write(&file, b"half a snap").unwrap();
    let answer = cluster.groups[1].serve_snapshot(&offer, file).await;
    assert!(peer::snapshot_answer(&answer).is_err());
    cluster.set("key", "value").await;
    cluster.until("all agree", Cluster::agree).await;
    cluster.stop().await;
}

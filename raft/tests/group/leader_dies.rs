//! A leader sends entries to the others while it still writes them itself, so they can be committed
//! and acknowledged without being on its own disk. What it leads anew after its death must not take
//! the places of those.

use std::fs;
use std::sync::Arc;

use proto::ids::NodeId;
use wrenn_raft::group::Role;

use crate::common::disk::{Break, Handle, TestDisk};
use crate::common::net::{CALM, Cluster};
use crate::common::{get, soon};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_before_its_leader_wrote_it_outlives_the_leader() {
    let mut cluster = Cluster::new();
    // Nobody stands for election before the leader is back.
    cluster.timeouts = CALM;
    let disk = TestDisk::new();
    let first = cluster
        .start_on(1, Arc::new(Handle(Arc::clone(&disk))))
        .await;
    first.bootstrap().await.unwrap();
    for id in [2, 3] {
        cluster.start(id).await;
        cluster.add(id).await;
    }
    cluster.vote(1..=3).await;
    cluster.set("before", "is on all disks").await;
    cluster.agreed().await;
    assert_eq!(first.role(), Role::Leader);
    let term = first.metrics().term;

    disk.set(Break::Hangs);
    let proposing = first.propose(b"kept=by the others".to_vec(), soon());
    let acknowledged = proposing.await.unwrap();
    // It dies before its disk goes on, and is back before anybody misses it.
    cluster.net.isolate(1);
    disk.set(Break::Full);
    cluster.halt(1).await;
    // A death, unlike a halt, leaves no derived copy of what was applied a moment before.
    fs::remove_dir_all(cluster.config(1).state_dir).unwrap();
    let back = cluster.start(1).await;
    assert!(
        back.metrics().last_log < Some(acknowledged.index),
        "its own disk had the entry"
    );
    cluster.net.heal();

    // Wherever it is taken, it takes no place that is taken.
    cluster.set("after", "the death").await;
    cluster.agreed().await;
    for group in cluster.groups() {
        for (key, value) in [
            ("before", "is on all disks"),
            ("kept", "by the others"),
            ("after", "the death"),
        ] {
            let id = group.metrics().leader;
            assert_eq!(get(&group, key).as_deref(), Some(value), "led by {id:?}");
        }
        assert!(group.metrics().term > term, "the term goes on");
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_comes_back_leads_in_no_term_of_before() {
    let cluster = Cluster::calm(3).await;
    let leader = cluster.leader().await;
    let id = leader.metrics().leader.unwrap();
    for other in (1..=3).filter(|other| NodeId(*other) != id) {
        cluster.halt(other).await;
    }
    let term = leader.metrics().term;
    cluster.halt(id.0).await;
    // Whoever is open has published what it found on its disk, and what it takes itself for.
    let back = cluster.start(id.0).await;
    let metrics = back.metrics();
    assert_eq!((metrics.term, metrics.leader), (term, None));
    assert_ne!(back.role(), Role::Leader);
    cluster.stop().await;
}

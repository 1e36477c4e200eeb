//! A member that lost its disk, and what becomes of it.

use std::collections::BTreeSet;
use std::fs;

use proto::ids::NodeId;
use wrenn_raft::group::{OpenError, Role, prepare};

use crate::common::net::Cluster;
use crate::common::soon;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_back_with_a_blank_disk_takes_no_part_and_says_that_it_must_join_anew() {
    let cluster = Cluster::of(3).await;
    cluster.set("key", "before").await;
    cluster.agreed().await;
    let known = cluster.group(3).node().disk;
    let last = cluster.group(3).metrics().last_log;
    cluster.halt(3).await;
    fs::remove_dir_all(cluster.home(3)).unwrap();

    let blank = cluster.start(3).await;
    assert_ne!(blank.node().disk, known);
    let mut watch = blank.watch_metrics();
    let told = watch.wait_for(|standing| standing.known_by == Some(known));
    tokio::time::timeout(crate::common::PATIENCE, told)
        .await
        .unwrap()
        .unwrap();
    // The two others are a quorum without it.
    for round in 0..20 {
        cluster.set("key", &round.to_string()).await;
    }
    let leader = cluster.leader().await;
    let metrics = blank.metrics();
    assert_eq!((metrics.last_log, metrics.term), (None, 0));
    assert!(leader.metrics().matched.get(&NodeId(3)).copied() <= last);

    // With one of them gone there is none, and the blank one does not help out with a vote.
    let (one, other) = match leader.metrics().leader.unwrap().0 {
        1 => (1, 2),
        _ => (2, 1),
    };
    cluster.halt(one).await;
    let alone = cluster.group(other);
    tokio::time::sleep(cluster.config(1).timeouts.election_max * 6).await;
    assert_ne!(alone.role(), Role::Leader);
    assert_eq!((blank.metrics().last_log, blank.metrics().term), (None, 0));
    cluster.start(one).await;
    cluster.set("key", "after").await;
    cluster.has(other, "key", "after").await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_wiped_node_joins_anew_under_another_id_and_gets_everything() {
    let cluster = Cluster::calm(3).await;
    for round in 0..400 {
        cluster
            .set(&format!("key {}", round % 30), &round.to_string())
            .await;
    }
    let leader = cluster.leader().await;
    let (lost, new) = (NodeId(3), NodeId(4));
    if leader.metrics().leader == Some(lost) {
        leader.transfer_leader(NodeId(1)).await.unwrap();
    }
    cluster.halt(3).await;
    // What the node does before it has an id: its disk is all it can say.
    let disk = prepare(&cluster.home(4).join("raft")).unwrap();
    let joined = cluster.start(4).await;
    assert_eq!(joined.node().disk, disk);
    let leader = cluster.leader().await;
    leader
        .remove_members([lost].into(), None, soon())
        .await
        .unwrap();
    cluster
        .until("the log is purged", || leader.metrics().purged > Some(0))
        .await;
    cluster.add(new.0).await;
    cluster.vote([1, 2, 4]).await;
    cluster.set("key 0", "after").await;
    cluster.agreed().await;
    assert!(cluster.net.snapshots() > 0);
    let members: BTreeSet<NodeId> = leader.metrics().members.into_keys().collect();
    assert_eq!(members, [NodeId(1), NodeId(2), new].into());
    cluster.stop().await;
}

#[tokio::test]
async fn preparing_finds_what_it_made_and_starts_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("raft");
    let disk = prepare(&home).unwrap();
    assert_eq!(prepare(&home).unwrap(), disk);
    fs::remove_file(home.join("disk-id")).unwrap();
    // A log nobody wrote to has nothing to forget.
    assert_ne!(prepare(&home).unwrap(), disk);
    fs::remove_dir_all(home.join("log")).unwrap();
    let refused = prepare(&home).unwrap_err();
    assert!(matches!(refused, OpenError::LogGone(_)), "{refused:?}");
}

//! Several members in one process: elections, partitions, handovers, members brought back.

use std::time::{Duration, Instant};

use proto::ids::NodeId;
use tokio::time;
use wrenn_raft::group::{ChangeError, ProposeError, ReadError, Role, Timeouts};

use crate::common::net::Cluster;
use crate::common::{PATIENCE, get, soon};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_members_agree_and_outlive_their_leader() {
    let cluster = Cluster::of(3).await;
    for round in 0..20 {
        cluster.set(&format!("key {round}"), "before").await;
    }
    cluster.agreed().await;

    let old = cluster.group(1);
    cluster.net.isolate(1);
    cluster
        .until("another leads", || {
            cluster.leading().iter().any(|&id| id != NodeId(1))
        })
        .await;
    let leader = cluster.leader().await;
    leader
        .propose(b"key 0=after".to_vec(), soon())
        .await
        .unwrap();
    // The one cut off may believe what it likes; it must not confirm it.
    let read = time::timeout(Duration::from_secs(1), old.read_index()).await;
    assert!(
        !matches!(read, Ok(Ok(_))),
        "a deposed leader confirmed a stale state"
    );

    cluster.net.heal();
    cluster.agreed().await;
    assert_eq!(get(&old, "key 0").as_deref(), Some("after"));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_comes_back_from_a_partition_deposes_nobody() {
    // Only the one that goes away is quick to stand for election.
    let mut cluster = Cluster::calm(2).await;
    cluster.timeouts = Timeouts::default();
    let away = 3;
    cluster.start(away).await;
    cluster.add(away).await;
    cluster.vote(1..=away).await;
    cluster.agreed().await;
    let before = cluster.leader().await.metrics();
    cluster.net.isolate(away);
    let group = cluster.group(away);
    // Long enough to stand for election several times.
    let timeout = cluster.config(away).timeouts.election_max;
    time::sleep(timeout * 6).await;
    assert_eq!(
        group.metrics().term,
        before.term,
        "it raised its term alone"
    );

    cluster.net.heal();
    cluster.set("key", "after").await;
    cluster.has(away, "key", "after").await;
    let after = cluster.leader().await.metrics();
    assert_eq!((after.term, after.leader), (before.term, before.leader));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_without_a_quorum_acknowledges_and_confirms_nothing() {
    let cluster = Cluster::of(3).await;
    cluster.agreed().await;
    let leader = cluster.leader().await;
    cluster.net.isolate(2);
    cluster.net.isolate(3);
    cluster.net.isolate(1);
    for round in 0..5 {
        let soon = Instant::now() + Duration::from_millis(300);
        let refused = leader
            .propose(format!("key={round}").into_bytes(), soon)
            .await;
        let refused = refused.unwrap_err();
        assert!(
            matches!(
                refused,
                ProposeError::Timeout | ProposeError::NotLeader { .. }
            ),
            "{refused:?}"
        );
        let read = time::timeout(PATIENCE, leader.read_index()).await;
        let read = read.unwrap().unwrap_err();
        assert!(
            matches!(read, ReadError::NoQuorum | ReadError::NotLeader { .. }),
            "{read:?}"
        );
    }
    assert_eq!(get(&leader, "key"), None);
    cluster.net.heal();
    cluster.set("key", "after").await;
    cluster.agreed().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_hands_over_when_asked() {
    let cluster = Cluster::calm(3).await;
    for round in 0..6 {
        cluster.set("key", &round.to_string()).await;
        let leader = cluster.leader().await;
        let id = leader.metrics().leader.unwrap();
        let to = NodeId(id.0 % 3 + 1);
        let term = leader.metrics().term;
        leader.transfer_leader(to).await.unwrap();
        let next = cluster.leader().await;
        assert_eq!(next.metrics().leader, Some(to));
        // One election, won at once: nobody waited for a timeout.
        assert_eq!(next.metrics().term, term + 1);
    }
    let follower = cluster
        .groups()
        .into_iter()
        .find(|group| group.role() != Role::Leader)
        .unwrap();
    // It voted in this term, perhaps before it heard who won.
    cluster
        .until("the follower hears its leader", || {
            follower.metrics().leader.is_some()
        })
        .await;
    let refused = follower.transfer_leader(NodeId(1)).await.unwrap_err();
    assert!(
        matches!(refused, ChangeError::NotLeader { leader: Some(_) }),
        "{refused:?}"
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_proposed_in_a_term_is_taken_in_no_other() {
    let cluster = Cluster::calm(3).await;
    let leader = cluster.leader().await;
    let (id, term) = (leader.metrics().leader.unwrap(), leader.metrics().term);
    let propose = |term| leader.propose_in(term, b"key=in a term".to_vec(), soon());
    assert!(propose(term).await.is_ok());
    for other in [term - 1, term + 1] {
        let refused = propose(other).await.unwrap_err();
        assert!(
            matches!(refused, ProposeError::NotLeader { .. }),
            "{refused:?}"
        );
    }
    // It leads again, in a later term.
    leader.transfer_leader(NodeId(id.0 % 3 + 1)).await.unwrap();
    let next = cluster.leader().await;
    next.transfer_leader(id).await.unwrap();
    let again = cluster.leader().await;
    assert_eq!(again.metrics().leader, Some(id));
    assert!(again.metrics().term > term);
    assert!(propose(term).await.is_err());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_was_away_too_long_is_brought_back_by_a_snapshot() {
    let cluster = Cluster::calm(3).await;
    cluster.agreed().await;
    let away = cluster.group(3);
    cluster.net.isolate(3);
    for round in 0..400 {
        cluster
            .set(&format!("key {}", round % 30), &round.to_string())
            .await;
    }
    let leader = cluster.leader().await;
    let absent = away.metrics().applied;
    cluster
        .until("the log is purged", || leader.metrics().purged > absent)
        .await;
    cluster.net.heal();
    cluster.agreed().await;
    assert!(away.metrics().snapshot > absent);
    assert!(cluster.net.snapshots() > 0);
    cluster.stop().await;
}

#[tokio::test]
async fn garbled_requests_are_answered_and_change_nothing() {
    let cluster = Cluster::of(1).await;
    let group = cluster.group(1);
    let disk = group.node().disk.0;
    let mut named = vec![0x32, 16];
    named.extend_from_slice(&disk);
    let with = |rest: &[u8]| [&named[..], rest].concat();
    for bytes in [
        b"".to_vec(),
        b"\xff\xff\xff".to_vec(),
        with(&[]),
        with(&[0x0a, 0x00]),
        with(&[0x2a, 0x02, 0x0a, 0x00]),
    ] {
        assert!(!group.serve(&bytes).await.is_empty());
        assert!(
            !group
                .serve_snapshot(&bytes, "/nowhere".into())
                .await
                .is_empty()
        );
        assert_ne!(group.role(), Role::Stopped);
    }
    cluster.set("key", "value").await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_arrives_damaged_is_refused_and_stops_nobody() {
    let cluster = Cluster::of(1).await;
    for round in 0..400 {
        cluster
            .set(&format!("key {}", round % 30), &round.to_string())
            .await;
    }
    let leader = cluster.leader().await;
    cluster
        .until("the log is purged", || leader.metrics().purged > Some(0))
        .await;
    cluster.net.damage_snapshots(true);
    let learner = cluster.start(2).await;
    let node = learner.node().clone();
    leader.add_learner(NodeId(2), node, soon()).await.unwrap();
    cluster
        .until("it was tried twice", || cluster.net.snapshots() > 1)
        .await;
    assert_eq!(learner.metrics().applied, None);
    cluster.net.damage_snapshots(false);
    cluster.agreed().await;
    cluster.stop().await;
}

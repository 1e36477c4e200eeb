//! Who belongs to the group: adding, promoting, removing, and what is refused.

use std::collections::BTreeSet;
use std::pin::pin;
use std::time::Duration;

use proto::ids::NodeId;
use tokio::time;
use wrenn_raft::group::{ChangeError, Group, Member, Role, Timeouts};
use wrenn_raft::types::Node;

use crate::common::net::Cluster;
use crate::common::soon;
use crate::common::toy::Toy;

fn ids(ids: impl IntoIterator<Item = u64>) -> BTreeSet<NodeId> {
    ids.into_iter().map(NodeId).collect()
}

fn voters(group: &Group<Toy>) -> BTreeSet<NodeId> {
    let members = group.metrics().members.into_iter();
    let voters = members.filter(|(_, member)| member.voter);
    voters.map(|(id, _)| id).collect()
}

fn members(group: &Group<Toy>) -> BTreeSet<NodeId> {
    group.metrics().members.into_keys().collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_learner_follows_becomes_a_voter_and_stays_a_learner_when_it_loses_its_vote() {
    let cluster = Cluster::calm(1).await;
    let leader = cluster.group(1);
    let learner = cluster.start(2).await;
    cluster.set("key", "before").await;
    cluster.add(2).await;
    cluster.has(2, "key", "before").await;
    assert_eq!(learner.role(), Role::Learner);
    assert_eq!(voters(&leader), ids([1]));

    cluster.vote([1, 2]).await;
    assert_eq!(voters(&leader), ids([1, 2]));
    cluster
        .until("it votes", || learner.role() == Role::Follower)
        .await;
    cluster.vote([1]).await;
    cluster
        .until("it votes no more", || learner.role() == Role::Learner)
        .await;
    assert_eq!((voters(&leader), members(&leader)), (ids([1]), ids([1, 2])));
    cluster.set("key", "after").await;
    cluster.has(2, "key", "after").await;
    assert!(leader.metrics().heard.contains_key(&NodeId(2)));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adding_the_same_member_again_changes_nothing_and_another_record_is_a_conflict() {
    let cluster = Cluster::of(1).await;
    let leader = cluster.group(1);
    cluster.start(2).await;
    cluster.add(2).await;
    let stamp = leader.metrics().stamp;
    let node = cluster.group(2).node().clone();
    let again = leader.add_learner(NodeId(2), node.clone(), soon()).await;
    again.unwrap();
    assert_eq!(leader.metrics().stamp, stamp);

    let moved = Node {
        address: "elsewhere".into(),
        ..node.clone()
    };
    let refused = leader.add_learner(NodeId(2), moved.clone(), soon()).await;
    assert!(
        matches!(refused, Err(ChangeError::Conflict(_))),
        "{refused:?}"
    );
    // The way to change a record.
    let removed = leader.remove_members(ids([2]), stamp, soon()).await;
    removed.unwrap();
    leader
        .add_learner(NodeId(2), moved.clone(), soon())
        .await
        .unwrap();
    let known = leader.metrics().members[&NodeId(2)].clone();
    assert_eq!(
        known,
        Member {
            node: moved,
            voter: false
        }
    );
    cluster.set("key", "value").await;
    cluster.has(2, "key", "value").await;

    let blank = Node {
        disk: wrenn_raft::types::DiskId::default(),
        ..node
    };
    let refused = leader.add_learner(NodeId(3), blank, soon()).await;
    assert!(
        matches!(refused, Err(ChangeError::Refused(_))),
        "{refused:?}"
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_decided_on_an_older_membership_is_a_conflict() {
    let cluster = Cluster::calm(3).await;
    let leader = cluster.leader().await;
    let old = leader.metrics().stamp;
    leader
        .change_voters(ids([1, 2]), old, soon())
        .await
        .unwrap();
    let refused = leader.change_voters(ids([1, 3]), old, soon()).await;
    assert!(
        matches!(refused, Err(ChangeError::Conflict(_))),
        "{refused:?}"
    );
    let refused = leader.remove_members(ids([3]), old, soon()).await;
    assert!(
        matches!(refused, Err(ChangeError::Conflict(_))),
        "{refused:?}"
    );
    assert_eq!(voters(&leader), ids([1, 2]));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_changes_on_the_same_membership_exactly_one_is_made() {
    let cluster = Cluster::calm(3).await;
    cluster.agreed().await;
    let leader = cluster.leader().await;
    for _ in 0..5 {
        let stamp = leader.metrics().stamp;
        let before = voters(&leader);
        let wanted = [ids([1, 2]), ids([1, 3]), ids([1]), ids([1, 2, 3])];
        let wanted = wanted.into_iter().filter(|wanted| *wanted != before);
        let changes = wanted.map(|voters| {
            let leader = leader.clone();
            tokio::spawn(async move { leader.change_voters(voters, stamp, soon()).await })
        });
        let mut made = 0;
        for change in changes.collect::<Vec<_>>() {
            match change.await.unwrap() {
                Ok(()) => made += 1,
                Err(ChangeError::Conflict(_)) => {}
                Err(other) => panic!("{other:?}"),
            }
        }
        assert_eq!(made, 1);
        let metrics = leader.metrics();
        assert!(!metrics.is_joint && metrics.is_settled && metrics.stamp > stamp);
    }
    cluster.set("key", "value").await;
    cluster.agreed().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_whose_caller_gave_up_is_finished_all_the_same() {
    let cluster = Cluster::calm(3).await;
    let leader = cluster.leader().await;
    cluster
        .until("the other voter is heard", || {
            leader.metrics().heard.contains_key(&NodeId(2))
        })
        .await;
    // Nobody takes its entries for now, so that it cannot be done before its caller gives up.
    cluster.net.isolate(1);
    {
        let mut change = pin!(leader.change_voters(ids([1, 2]), None, soon()));
        // Polled once, so that it has begun.
        assert!(futures::poll!(change.as_mut()).is_pending());
    }
    cluster.net.heal();
    cluster
        .until("the change is made", || {
            let metrics = leader.metrics();
            voters(&leader) == ids([1, 2]) && !metrics.is_joint && metrics.is_settled
        })
        .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn voters_without_a_quorum_are_refused_before_anything_is_written() {
    // Less calm than elsewhere: it waits for a silence of twice the longest.
    let timeouts = Timeouts {
        election_min: Duration::from_secs(1),
        election_max: Duration::from_millis(1500),
        ..Timeouts::default()
    };
    let cluster = Cluster::timed(timeouts, 3).await;
    cluster.start(4).await;
    cluster.add(4).await;
    let leader = cluster.leader().await;
    cluster.halt(3).await;
    cluster.halt(4).await;
    let stamp = leader.metrics().stamp;
    cluster
        .until("the silence is noticed", || {
            let heard = leader.metrics().heard;
            [3, 4]
                .iter()
                .all(|id| heard[&NodeId(*id)] > cluster.config(1).timeouts.election_max * 2)
        })
        .await;
    for wanted in [ids([1, 3]), ids([1, 2, 3, 4]), ids([1, 3, 4])] {
        let refused = leader.change_voters(wanted, None, soon()).await;
        assert!(
            matches!(refused, Err(ChangeError::NoQuorum(_))),
            "{refused:?}"
        );
    }
    let refused = leader.remove_members(ids([2]), None, soon()).await;
    assert!(
        matches!(refused, Err(ChangeError::NoQuorum(_))),
        "{refused:?}"
    );
    let refused = leader.transfer_leader(NodeId(3)).await;
    assert!(
        matches!(refused, Err(ChangeError::NoQuorum(_))),
        "{refused:?}"
    );
    assert_eq!(leader.metrics().stamp, stamp);
    cluster.set("key", "value").await;

    // What is in the way can be removed.
    leader
        .remove_members(ids([3, 4]), stamp, soon())
        .await
        .unwrap();
    assert_eq!(
        (voters(&leader), members(&leader)),
        (ids([1, 2]), ids([1, 2]))
    );
    cluster.set("key", "after").await;
    cluster.agreed().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_makes_no_sense_is_refused_by_name() {
    let cluster = Cluster::calm(3).await;
    let leader = cluster.leader().await;
    let own = leader.metrics().leader.unwrap();
    let refusals = [
        leader.change_voters(ids([]), None, soon()).await,
        leader.change_voters(ids([1, 9]), None, soon()).await,
        leader.remove_members([own].into(), None, soon()).await,
        leader.transfer_leader(NodeId(9)).await,
    ];
    for refused in refusals {
        assert!(
            matches!(refused, Err(ChangeError::Refused(_))),
            "{refused:?}"
        );
    }
    let stamp = leader.metrics().stamp;
    leader
        .change_voters(ids([1, 2, 3]), None, soon())
        .await
        .unwrap();
    leader.remove_members(ids([9]), None, soon()).await.unwrap();
    leader.transfer_leader(own).await.unwrap();
    assert_eq!(leader.metrics().stamp, stamp);

    let follower = cluster.group(own.0 % 3 + 1);
    let node = follower.node().clone();
    let refusals = [
        follower.add_learner(NodeId(9), node, soon()).await,
        follower.change_voters(ids([1]), None, soon()).await,
        follower.remove_members(ids([1]), None, soon()).await,
    ];
    for refused in refusals {
        let leads = |err: &ChangeError| matches!(err, ChangeError::NotLeader { leader: Some((id, _)) } if *id == own);
        assert!(refused.as_ref().is_err_and(leads), "{refused:?}");
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_leader_of_the_past_is_gone_and_the_rest_goes_on() {
    let cluster = Cluster::calm(3).await;
    cluster
        .leader()
        .await
        .transfer_leader(NodeId(2))
        .await
        .unwrap();
    let leader = cluster.leader().await;
    leader.remove_members(ids([1]), None, soon()).await.unwrap();
    assert_eq!(members(&leader), ids([2, 3]));
    cluster.halt(1).await;
    cluster.set("key", "value").await;
    cluster.agreed().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_watches_sees_roles_and_memberships_change_and_nothing_else() {
    let cluster = Cluster::of(1).await;
    let group = cluster.group(1);
    let mut watch = group.watch_metrics();
    let leads = watch.wait_for(|standing| standing.role == Role::Leader && standing.is_settled);
    time::timeout(crate::common::PATIENCE, leads)
        .await
        .unwrap()
        .unwrap();
    let stamp = group.metrics().stamp;
    for round in 0..20 {
        cluster.set("key", &round.to_string()).await;
    }
    assert!(!watch.has_changed().unwrap());
    cluster.start(2).await;
    cluster.add(2).await;
    let changed = watch.wait_for(|standing| standing.membership > stamp);
    time::timeout(crate::common::PATIENCE, changed)
        .await
        .unwrap()
        .unwrap();
    group.shutdown().await;
    let stopped = watch.wait_for(|standing| standing.role == Role::Stopped);
    time::timeout(crate::common::PATIENCE, stopped)
        .await
        .unwrap()
        .unwrap();
    cluster.halt(2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leader_knows_how_far_everybody_is() {
    let cluster = Cluster::calm(3).await;
    cluster.set("key", "value").await;
    let leader = cluster.leader().await;
    cluster
        .until("all have everything", || {
            let metrics = leader.metrics();
            let last = metrics.last_log.unwrap();
            [1, 2, 3]
                .iter()
                .all(|id| metrics.matched.get(&NodeId(*id)) == Some(&last))
        })
        .await;
    assert!(leader.metrics().quorum_age.is_some());
    let follower = cluster
        .groups()
        .into_iter()
        .find(|group| group.role() != Role::Leader);
    let metrics = follower.unwrap().metrics();
    assert!(metrics.matched.is_empty() && metrics.heard.is_empty() && metrics.quorum_age.is_none());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_left_half_done_is_seen_and_finished_by_the_next_leader() {
    let cluster = Cluster::of(3).await;
    cluster.start(4).await;
    cluster.add(4).await;
    cluster.agreed().await;
    let old = cluster.leader().await;
    let lost = old.metrics().leader.unwrap();
    let kept = ids((1..=4).filter(|&id| NodeId(id) != lost));
    // The old leader wants to replace one of the others by the fourth.
    let wanted = ids((1..=4).filter(|&id| id != lost.0 % 3 + 1));
    cluster.net.break_when_joint();
    let patience = std::time::Instant::now() + Duration::from_secs(3);
    let unknown = old.change_voters(wanted, None, patience).await;
    assert!(
        matches!(
            unknown,
            Err(ChangeError::Timeout | ChangeError::LeaderChanged)
        ),
        "{unknown:?}"
    );
    cluster
        .until("another leads", || {
            cluster.leading().iter().any(|&id| id != lost)
        })
        .await;
    let next = cluster.leader().await;
    let metrics = next.metrics();
    assert!(metrics.is_joint);
    assert_eq!(voters(&next), ids(1..=4));
    cluster
        .until("the joint membership is committed", || {
            next.metrics().is_settled
        })
        .await;
    next.change_voters(kept.clone(), None, soon())
        .await
        .unwrap();
    assert!(!next.metrics().is_joint);
    assert_eq!(voters(&next), kept);
    cluster.net.heal();
    cluster.set("key", "after").await;
    cluster.agreed().await;
    assert_eq!(old.role(), Role::Learner);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_keeps_its_vote_until_it_has_handed_over() {
    let cluster = Cluster::calm(3).await;
    cluster.agreed().await;
    let old = cluster.leader().await;
    let own = old.metrics().leader.unwrap();
    let rest = ids((1..=3).filter(|&id| NodeId(id) != own));
    let refused = old.change_voters(rest.clone(), None, soon()).await;
    assert!(
        matches!(refused, Err(ChangeError::Refused(_))),
        "{refused:?}"
    );
    let heir = *rest.first().unwrap();
    old.transfer_leader(heir).await.unwrap();
    let next = cluster.leader().await;
    next.change_voters(rest.clone(), None, soon())
        .await
        .unwrap();
    cluster.set("key", "value").await;
    cluster.agreed().await;
    assert_eq!((voters(&next), old.role()), (rest.clone(), Role::Learner));
    next.remove_members([own].into(), None, soon())
        .await
        .unwrap();
    assert_eq!(members(&next), rest);
    cluster.stop().await;
}

//! A quorum is lost for good: one survivor goes on.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use proto::ids::NodeId;
use wrenn_raft::group::{Inspected, OpenError, Position, RecoverError, Role, inspect, recover};

use crate::common::disk::files;
use crate::common::net::{Cluster, config};
use crate::common::{chain, get, soon};

fn look(home: &Path) -> Inspected {
    inspect(&home.join("raft"), &home.join("state")).unwrap()
}

fn ids(ids: impl IntoIterator<Item = u64>) -> BTreeSet<NodeId> {
    ids.into_iter().map(NodeId).collect()
}

/// Three members, stopped; what was acknowledged last was on 1 and 3 only.
async fn stopped() -> Cluster {
    let cluster = Cluster::of(3).await;
    cluster.agreed().await;
    cluster.net.isolate(2);
    for round in 0..100 {
        cluster
            .set(&format!("key {round}"), &round.to_string())
            .await;
    }
    for id in 1..=3 {
        cluster.halt(id).await;
    }
    cluster.net.heal();
    cluster
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_most_advanced_survivor_serves_everything_acknowledged_and_others_join_it() {
    let cluster = stopped().await;
    let (two, three) = (look(&cluster.home(2)), look(&cluster.home(3)));
    assert!(two.last < three.last);
    assert_eq!(three.voters, ids([1, 2, 3]));
    fs::remove_dir_all(cluster.home(1)).unwrap();
    fs::remove_dir_all(cluster.home(2)).unwrap();

    let recovered = recover(&cluster.config(3), BTreeMap::new()).unwrap();
    assert_eq!(recovered.before, three.last);
    assert!(recovered.after.term > three.term);
    let after = look(&cluster.home(3));
    assert_eq!((after.last, after.voters), (recovered.after, ids([3])));

    let group = cluster.start(3).await;
    group.bootstrap().await.unwrap();
    let leader = cluster.leader().await;
    assert_eq!(leader.metrics().leader, Some(NodeId(3)));
    for round in 0..100 {
        let found = get(&leader, &format!("key {round}"));
        assert_eq!(found.as_deref(), Some(round.to_string().as_str()));
    }
    cluster.set("key", "after").await;
    for id in [4, 5] {
        cluster.start(id).await;
        cluster.add(id).await;
    }
    cluster.vote([3, 4, 5]).await;
    cluster.set("key", "last").await;
    cluster.agreed().await;
    cluster.halt(3).await;
    cluster.set("key", "without the survivor").await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kept_member_follows_as_a_learner_and_may_vote_again() {
    let cluster = stopped().await;
    fs::remove_dir_all(cluster.home(1)).unwrap();
    let node = look(&cluster.home(3)).members[&NodeId(2)].clone();
    recover(&cluster.config(3), [(NodeId(2), node)].into()).unwrap();
    // Even recovered twice.
    let node = look(&cluster.home(3)).members[&NodeId(2)].clone();
    recover(&cluster.config(3), [(NodeId(2), node)].into()).unwrap();
    let kept = cluster.start(2).await;
    cluster.start(3).await;
    cluster.set("key 0", "after").await;
    cluster.agreed().await;
    assert_eq!(kept.role(), Role::Learner);
    cluster.vote([2, 3]).await;
    cluster.set("key 0", "last").await;
    cluster.agreed().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_at_any_byte_leaves_the_old_or_the_new_membership() {
    let cluster = stopped().await;
    let home = cluster.home(3);
    let segment = files(&home.join("raft/log"), "seg").pop().unwrap();
    let before = fs::read(&segment).unwrap();
    recover(&cluster.config(3), BTreeMap::new()).unwrap();
    let newest = files(&home.join("raft/log"), "seg").pop().unwrap();
    assert_eq!(newest, segment, "the test wants it all in one segment");
    let after = fs::read(&segment).unwrap();
    let first = before.iter().zip(&after).position(|(old, new)| old != new);
    let last = before.iter().zip(&after).rposition(|(old, new)| old != new);
    let (first, last) = (first.unwrap(), last.unwrap());
    assert!(last - first < 2000);
    let mut seen = Vec::new();
    for cut in first..=last + 1 {
        let cut_off = [&after[..cut], &before[cut..]].concat();
        fs::write(&segment, &cut_off).unwrap();
        // Without the derived copy, which is of no interest here.
        let found = inspect(&home.join("raft"), &home.join("none")).unwrap();
        assert!(found.voters == ids([3]) || found.voters == ids([1, 2, 3]));
        seen.push(found.voters.len());
    }
    assert!(seen.is_sorted_by(|a, b| a >= b) && seen[0] == 3 && seen.ends_with(&[1]));

    // The vote alone: not a leader, and it does not stop the old ones from going on.
    let vote_only = seen.iter().rposition(|&voters| voters == 3).unwrap() + first;
    fs::write(
        &segment,
        [&after[..vote_only], &before[vote_only..]].concat(),
    )
    .unwrap();
    for id in 1..=3 {
        cluster.start(id).await;
    }
    cluster.set("key 0", "after").await;
    cluster.agreed().await;
    assert_eq!(cluster.group(1).metrics().members.len(), 3);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_that_is_ahead_of_the_log_is_not_lost() {
    let cluster = stopped().await;
    let home = cluster.home(3);
    let log = home.join("raft/log");
    let (kept, ahead) = (home.join("log before"), look(&home).last);
    copy(&log, &kept);
    for id in 1..=3 {
        cluster.start(id).await;
    }
    for round in 0..20 {
        cluster.set(&format!("later {round}"), "value").await;
    }
    cluster.agreed().await;
    for id in 1..=3 {
        cluster.halt(id).await;
    }
    // As after a power cut: the copy was flushed, the log's last records were not.
    fs::remove_dir_all(&log).unwrap();
    fs::rename(&kept, &log).unwrap();
    for snapshot in files(&home.join("raft/snap"), "snap") {
        let index = snapshot
            .file_stem()
            .unwrap()
            .to_str()
            .unwrap()
            .parse::<u64>();
        if index.unwrap() > ahead.index {
            fs::remove_file(snapshot).unwrap();
        }
    }
    let found = look(&home).last;
    assert!(found > ahead);
    let recovered = recover(&cluster.config(3), BTreeMap::new()).unwrap();
    assert_eq!(
        (recovered.before, recovered.after.index),
        (found, found.index + 1)
    );
    let group = cluster.start(3).await;
    group.bootstrap().await.unwrap();
    for round in 0..20 {
        assert!(get(&group, &format!("later {round}")).is_some());
    }
    cluster.set("key", "after").await;
    cluster.halt(3).await;
    cluster.start(3).await;
    cluster.has(3, "key", "after").await;
    cluster.stop().await;
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_must_not_be_recovered_is_refused_and_left_alone() {
    let cluster = Cluster::of(1).await;
    let running = recover(&cluster.config(1), BTreeMap::new()).unwrap_err();
    assert!(
        matches!(running, RecoverError::Open(OpenError::InUse(_))),
        "{}",
        chain(&running)
    );
    let node = cluster.group(1).node().clone();
    cluster.halt(1).await;

    let before = look(&cluster.home(1));
    let own = [(NodeId(1), node.clone())].into();
    let refused = recover(&cluster.config(1), own).unwrap_err();
    assert!(matches!(refused, RecoverError::Refused(_)), "{refused:?}");
    let other_id = config(&cluster.home(1), 2);
    let refused = recover(&other_id, BTreeMap::new()).unwrap_err();
    assert!(matches!(refused, RecoverError::Refused(_)), "{refused:?}");
    assert_eq!(look(&cluster.home(1)), before);

    let nowhere = cluster.dir.path().join("mistyped");
    let refused = recover(&config(&nowhere, 1), BTreeMap::new()).unwrap_err();
    assert!(matches!(refused, RecoverError::Nothing(_)), "{refused:?}");
    assert!(!nowhere.exists());
    let blank = cluster.home(7);
    wrenn_raft::group::prepare(&blank.join("raft")).unwrap();
    let refused = recover(&config(&blank, 7), BTreeMap::new()).unwrap_err();
    assert!(matches!(refused, RecoverError::Nothing(_)), "{refused:?}");
    assert_eq!(look(&blank).last, Position::default());

    let group = cluster.start(1).await;
    group.bootstrap().await.unwrap();
    group.propose(b"key=value".to_vec(), soon()).await.unwrap();
    cluster.stop().await;
}

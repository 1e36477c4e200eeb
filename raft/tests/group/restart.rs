//! A group of one, stopped and started in every way.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use wrenn_raft::group::{Group, GroupConfig, OpenError, ProposeError, Role};
use wrenn_raft::link::NoPeers;
use wrenn_raft::store::View;

use crate::common::disk::files;
use crate::common::toy::Toy;
use crate::common::{chain, config, get, set, soon, start};

async fn open(config: GroupConfig) -> Result<Group<Toy>, OpenError> {
    Group::open(config, NoPeers).await
}

async fn error_of(config: GroupConfig) -> OpenError {
    open(config).await.err().expect("is refused")
}

async fn fill(group: &Group<Toy>, rounds: usize) -> View<Toy> {
    for round in 0..rounds {
        let key = format!("key {}", round % 50);
        set(group, &key, &format!("value {round}")).await;
    }
    group.state().borrow().clone()
}

/// A group that ran, with what it knew when it stopped.
async fn stopped(dir: &Path, rounds: usize) -> View<Toy> {
    let group = start(dir).await;
    let view = fill(&group, rounds).await;
    group.shutdown().await;
    view
}

async fn expect_state(dir: &Path, expected: &View<Toy>) {
    let group = start(dir).await;
    let view = group.state().borrow().clone();
    assert!(view.state == expected.state, "another state came back");
    assert!(view.applied >= expected.applied);
    set(&group, "after", "restart").await;
    set(&group, "after", "").await;
    group.shutdown().await;
}

#[tokio::test]
async fn a_new_group_takes_proposals_at_once_and_restarts_with_everything() {
    let dir = tempfile::tempdir().unwrap();
    let group = start(dir.path()).await;
    // The first one right after the bootstrap is the test.
    let before = fill(&group, 20).await;
    let disk = group.node().disk;
    assert_eq!(group.role(), Role::Leader);
    let members = group.metrics().members;
    assert!(
        members
            .values()
            .all(|member| member.voter && member.node.disk == disk)
    );
    group.shutdown().await;

    let group = start(dir.path()).await;
    assert!(group.state().borrow().state == before.state);
    assert_eq!(group.node().disk, disk);
    set(&group, "key 0", "after").await;
    assert_eq!(get(&group, "key 0").as_deref(), Some("after"));
    group.shutdown().await;
}

#[tokio::test]
async fn bootstrapping_twice_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let group = start(dir.path()).await;
    set(&group, "key", "value").await;
    let before = group.metrics();
    group.bootstrap().await.unwrap();
    let after = group.metrics();
    assert_eq!((before.term, before.last_log), (after.term, after.last_log));
    assert_eq!(get(&group, "key").as_deref(), Some("value"));
    group.shutdown().await;
}

#[tokio::test]
async fn an_answer_tells_the_index_and_its_change_is_already_visible() {
    let dir = tempfile::tempdir().unwrap();
    let group = start(dir.path()).await;
    set(&group, "key", "first").await;
    let proposed = group.propose(b"key=second".to_vec(), soon()).await.unwrap();
    let answer = String::from_utf8(proposed.answer).unwrap();
    let applied = group.state().borrow().applied.unwrap();
    assert_eq!(answer, format!("{applied} first"));
    assert_eq!(proposed.index, applied);
    assert_eq!(get(&group, "key").as_deref(), Some("second"));
    group.shutdown().await;
}

#[tokio::test]
async fn many_proposals_at_once_are_all_answered_and_all_kept() {
    let dir = tempfile::tempdir().unwrap();
    let group = start(dir.path()).await;
    let proposals = (0..500).map(|key| {
        let group = group.clone();
        tokio::spawn(async move { set(&group, &format!("key {key}"), "value").await })
    });
    for proposal in proposals.collect::<Vec<_>>() {
        proposal.await.unwrap();
    }
    let view = group.state().borrow().clone();
    assert_eq!(view.state.map.size(), 500);
    group.shutdown().await;
    expect_state(dir.path(), &view).await;
}

#[tokio::test]
async fn without_its_derived_state_a_node_rebuilds_it_from_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let view = stopped(dir.path(), 60).await;
    fs::remove_dir_all(dir.path().join("state")).unwrap();
    expect_state(dir.path(), &view).await;
}

#[tokio::test]
async fn a_garbled_derived_state_is_put_aside_and_rebuilt() {
    let dir = tempfile::tempdir().unwrap();
    let view = stopped(dir.path(), 300).await;
    let db = dir.path().join("state/db");
    let whole = fs::read(&db).unwrap();
    let used = whole.iter().rposition(|&byte| byte != 0).unwrap();
    for eighth in 0..8 {
        let mut damaged = whole.clone();
        let at = used * eighth / 8;
        damaged[at..(at + 40).min(used)].fill(0xa5);
        fs::write(&db, &damaged).unwrap();
        expect_state(dir.path(), &view).await;
        let _ = fs::remove_dir_all(dir.path().join("state"));
        fs::create_dir(dir.path().join("state")).unwrap();
    }
    fs::write(dir.path().join("state/db"), &whole[..whole.len() / 3]).unwrap();
    expect_state(dir.path(), &view).await;
}

#[tokio::test]
async fn an_old_derived_state_is_brought_up_to_date_from_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    stopped(dir.path(), 10).await;
    let old = dir.path().join("old");
    fs::create_dir(&old).unwrap();
    for file in ["db", "conf"] {
        fs::copy(state.join(file), old.join(file)).unwrap();
    }
    let view = stopped(dir.path(), 80).await;
    fs::remove_dir_all(&state).unwrap();
    fs::rename(&old, &state).unwrap();
    expect_state(dir.path(), &view).await;
}

async fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + crate::common::PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "still waiting for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn with_snapshots(dir: &Path) -> GroupConfig {
    GroupConfig {
        snapshot_entries: 50,
        segment_bytes: 16 * 1024,
        ..config(dir)
    }
}

/// A stopped group whose log was purged up to a snapshot.
async fn purged(dir: &Path) -> View<Toy> {
    let group = open(with_snapshots(dir)).await.unwrap();
    group.bootstrap().await.unwrap();
    for _ in 0..12 {
        fill(&group, 50).await;
        let target = group.metrics().last_log.unwrap() / 50 * 50;
        wait_for("a snapshot", || {
            group.metrics().snapshot >= Some(target - 50)
        })
        .await;
    }
    wait_for("a purge", || group.metrics().purged > Some(300)).await;
    let view = group.state().borrow().clone();
    group.shutdown().await;
    view
}

#[tokio::test]
async fn snapshots_let_the_log_be_purged_and_the_state_survives_it() {
    let dir = tempfile::tempdir().unwrap();
    let view = purged(dir.path()).await;
    assert_eq!(files(&dir.path().join("raft/snap"), "snap").len(), 2);
    let segments = files(&dir.path().join("raft/log"), "seg");
    assert!(!segments[0].ends_with("00000001.seg"), "{segments:?}");

    expect_state(dir.path(), &view).await;
    fs::remove_dir_all(dir.path().join("state")).unwrap();
    expect_state(dir.path(), &view).await;
}

#[tokio::test]
async fn with_a_damaged_newest_snapshot_the_older_one_and_the_log_serve() {
    let dir = tempfile::tempdir().unwrap();
    let view = purged(dir.path()).await;
    let mut snapshots = files(&dir.path().join("raft/snap"), "snap");
    snapshots.sort_by_key(|path| {
        let stem = path.file_stem().unwrap().to_str().unwrap();
        stem.parse::<u64>().unwrap()
    });
    let newest = snapshots.last().unwrap();
    let mut bytes = fs::read(newest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(newest, bytes).unwrap();
    fs::remove_dir_all(dir.path().join("state")).unwrap();
    expect_state(dir.path(), &view).await;
}

#[tokio::test]
async fn without_any_snapshot_the_derived_state_serves_and_makes_one() {
    let dir = tempfile::tempdir().unwrap();
    let view = purged(dir.path()).await;
    let snap = dir.path().join("raft/snap");
    for path in files(&snap, "snap") {
        fs::remove_file(path).unwrap();
    }
    expect_state(dir.path(), &view).await;
    assert_eq!(files(&snap, "snap").len(), 1);
}

#[tokio::test]
async fn with_neither_the_node_says_that_its_state_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    purged(dir.path()).await;
    fs::remove_dir_all(dir.path().join("state")).unwrap();
    for path in files(&dir.path().join("raft/snap"), "snap") {
        fs::remove_file(path).unwrap();
    }
    let err = error_of(config(dir.path())).await;
    assert!(chain(&err).contains("the state is lost"), "{}", chain(&err));
}

#[tokio::test]
async fn values_of_any_size_survive_in_the_derived_state() {
    let dir = tempfile::tempdir().unwrap();
    let group = start(dir.path()).await;
    for (key, bytes) in [
        ("a", 1),
        ("b", 3999),
        ("c", 4000),
        ("d", 4001),
        ("e", 15_000),
    ] {
        set(&group, key, &"x".repeat(bytes)).await;
    }
    set(&group, "e", &"y".repeat(100)).await;
    set(&group, "d", "").await;
    let view = group.state().borrow().clone();
    group.shutdown().await;
    // With an empty log there is nothing else to take them from, and the log agrees.
    expect_state(dir.path(), &view).await;
}

#[tokio::test]
async fn two_processes_cannot_share_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let group = start(dir.path()).await;
    let err = error_of(config(dir.path())).await;
    assert!(matches!(err, OpenError::InUse(_)), "{err:?}");
    group.shutdown().await;
    drop(group);
    let group = start(dir.path()).await;
    group.shutdown().await;
}

#[tokio::test]
async fn a_removed_log_a_removed_identity_and_another_disk_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    stopped(dir.path(), 5).await;
    let raft = dir.path().join("raft");

    let id = raft.join("disk-id");
    let digits = fs::read_to_string(&id).unwrap();
    fs::remove_file(&id).unwrap();
    let err = error_of(config(dir.path())).await;
    assert!(matches!(err, OpenError::IdentityGone(_)), "{err:?}");

    fs::write(&id, "00112233445566778899aabbccddeeff\n").unwrap();
    let err = error_of(config(dir.path())).await;
    assert!(matches!(err, OpenError::OtherDisk { .. }), "{err:?}");

    fs::write(&id, digits).unwrap();
    fs::rename(raft.join("log"), raft.join("elsewhere")).unwrap();
    let err = error_of(config(dir.path())).await;
    assert!(matches!(err, OpenError::LogGone(_)), "{err:?}");
}

#[tokio::test]
async fn too_large_a_proposal_and_one_after_the_stop_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let group = start(dir.path()).await;
    let err = group.propose(vec![b'='; 20_000], soon()).await.unwrap_err();
    assert!(matches!(err, ProposeError::TooLarge { .. }), "{err:?}");
    set(&group, "still", "alive").await;
    group.shutdown().await;
    let err = group
        .propose(b"key=late".to_vec(), soon())
        .await
        .unwrap_err();
    assert!(matches!(err, ProposeError::Stopped), "{err:?}");
}

#[tokio::test]
async fn an_entry_this_version_cannot_read_stops_the_node_instead_of_being_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let group = start(dir.path()).await;
    let err = group
        .propose(b"from a newer version".to_vec(), soon())
        .await
        .unwrap_err();
    assert!(matches!(err, ProposeError::Fatal(_)), "{err:?}");
    assert!(chain(&err).contains("upgrade this node"), "{}", chain(&err));
    group.failed().await;
    assert_eq!(group.role(), Role::Stopped);
    group.shutdown().await;
}

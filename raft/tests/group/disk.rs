//! What the log costs the disk, and what happens when the disk refuses.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use wrenn_raft::fault::Fault;
use wrenn_raft::group::{ProposeError, Role};

use crate::common::disk::{Break, Handle, TestDisk};
use crate::common::{chain, config, get, open_on, set, soon, start, start_on};

#[tokio::test]
async fn proposals_share_syncs_and_none_is_answered_without_one() {
    let dir = tempfile::tempdir().unwrap();
    let disk = TestDisk::new();
    let group = start_on(dir.path(), Arc::new(Handle(Arc::clone(&disk)))).await;

    let before = disk.syncs.load(Ordering::SeqCst);
    for round in 0..20 {
        set(&group, "alone", &round.to_string()).await;
    }
    let alone = disk.syncs.load(Ordering::SeqCst) - before;
    assert!(alone >= 20, "20 answers one after the other, {alone} syncs");

    let before = disk.syncs.load(Ordering::SeqCst);
    let proposals = (0..400).map(|key| {
        let group = group.clone();
        tokio::spawn(async move { set(&group, &format!("key {key}"), "value").await })
    });
    for proposal in proposals.collect::<Vec<_>>() {
        proposal.await.unwrap();
    }
    let shared = disk.syncs.load(Ordering::SeqCst) - before;
    assert!(shared < 200, "400 answers at once, {shared} syncs");
    group.shutdown().await;
}

#[tokio::test]
async fn an_idle_group_neither_writes_nor_syncs() {
    let dir = tempfile::tempdir().unwrap();
    let disk = TestDisk::new();
    let group = start_on(dir.path(), Arc::new(Handle(Arc::clone(&disk)))).await;
    set(&group, "key", "value").await;
    let count = || {
        (
            disk.writes.load(Ordering::SeqCst),
            disk.syncs.load(Ordering::SeqCst),
        )
    };
    // The mark of the last commit is written behind its answer.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let before = count();
    // Many heartbeats and election timeouts: nothing here can be moved by a clock of ours.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(count(), before);
    group.shutdown().await;
}

#[tokio::test]
async fn a_full_disk_fails_the_proposal_by_name_and_stops_the_group() {
    let dir = tempfile::tempdir().unwrap();
    let disk = TestDisk::new();
    let group = start_on(dir.path(), Arc::new(Handle(Arc::clone(&disk)))).await;
    set(&group, "key", "before").await;

    disk.set(Break::Full);
    let err = group
        .propose(b"key=lost".to_vec(), soon())
        .await
        .unwrap_err();
    let ProposeError::Fatal(fault) = &err else {
        panic!("{err:?}")
    };
    assert!(matches!(**fault, Fault::DiskFull { .. }), "{fault:?}");
    assert!(chain(&err).contains("the disk is full"), "{}", chain(&err));
    assert!(matches!(*group.failed().await, Fault::DiskFull { .. }));
    assert_eq!(group.role(), Role::Stopped);

    // Room again: it must not go on as if nothing had been.
    disk.set(Break::Never);
    let err = group
        .propose(b"key=later".to_vec(), soon())
        .await
        .unwrap_err();
    assert!(matches!(err, ProposeError::Fatal(_)), "{err:?}");
    assert_eq!(get(&group, "key").as_deref(), Some("before"));
    group.shutdown().await;

    let group = start(dir.path()).await;
    assert_eq!(get(&group, "key").as_deref(), Some("before"));
    group.shutdown().await;
}

#[tokio::test]
async fn a_failed_sync_is_not_retried() {
    let dir = tempfile::tempdir().unwrap();
    let disk = TestDisk::new();
    let group = start_on(dir.path(), Arc::new(Handle(Arc::clone(&disk)))).await;
    set(&group, "key", "before").await;

    disk.set(Break::SyncFails);
    let before = disk.syncs.load(Ordering::SeqCst);
    let err = group
        .propose(b"key=unknown".to_vec(), soon())
        .await
        .unwrap_err();
    assert!(
        chain(&err).contains("the disk failed: sync"),
        "{}",
        chain(&err)
    );
    disk.set(Break::Never);
    for _ in 0..3 {
        let err = group
            .propose(b"key=later".to_vec(), soon())
            .await
            .unwrap_err();
        assert!(matches!(err, ProposeError::Fatal(_)), "{err:?}");
    }
    group.shutdown().await;
    assert_eq!(disk.syncs.load(Ordering::SeqCst) - before, 1);
    // Its outcome is unknown, so either value is right; anything later was never written.
    let group = start(dir.path()).await;
    let value = get(&group, "key").unwrap();
    assert!(value == "before" || value == "unknown", "{value}");
    group.shutdown().await;
}

#[tokio::test]
async fn a_group_cannot_be_made_on_a_full_disk_and_can_be_once_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let disk = TestDisk::new();
    disk.set(Break::Full);
    let handle = || Arc::new(Handle(Arc::clone(&disk)));
    let err = open_on(config(dir.path()), handle())
        .await
        .err()
        .expect("is refused");
    assert!(chain(&err).contains("the disk is full"), "{}", chain(&err));
    disk.set(Break::Never);
    let group = start_on(dir.path(), handle()).await;
    group.shutdown().await;
}

#[tokio::test]
async fn a_proposal_past_its_deadline_ends_with_an_unknown_outcome() {
    let dir = tempfile::tempdir().unwrap();
    let group = start(dir.path()).await;
    let err = group.propose(b"key=value".to_vec(), Instant::now()).await;
    assert!(matches!(err, Err(ProposeError::Timeout) | Ok(_)), "{err:?}");
    group.shutdown().await;
}

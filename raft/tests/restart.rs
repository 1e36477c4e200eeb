//! A group of one, stopped and started in every way.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{chain, config, get, set, soon, start};
use wrenn_raft::group::{Group, OpenError, ProposeError, Role};
use wrenn_raft::link::NoPeers;

#[tokio::test]
async fn a_new_group_takes_proposals_at_once_and_restarts_with_everything() {
    let dir = tempfile::tempdir().unwrap();
    let group = start(dir.path()).await;
    for round in 0..20 {
        set(&group, &format!("key {round}"), &format!("value {round}")).await;
    }
    let before = group.state().borrow().state.clone();
    let disk = group.node().disk;
    group.shutdown().await;

    let group = start(dir.path()).await;
    assert_eq!(group.state().borrow().state, before);
    assert_eq!(group.node().disk, disk);
    assert_eq!(group.role(), Role::Leader);
    set(&group, "key 0", "after").await;
    assert_eq!(get(&group, "key 0").as_deref(), Some("after"));
    group.shutdown().await;
}

//! What the tests of the group share.

#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    reason = "each test file uses a part of it"
)]

pub mod disk;
pub mod net;
pub mod toy;
pub mod writer;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::ids::{NodeId, NodeKey};
use wrenn_raft::disk::Disk;
use wrenn_raft::group::{Group, GroupConfig, OpenError};
use wrenn_raft::link::NoPeers;
use wrenn_raft::types::Node;

use self::toy::Toy;

/// Longer than anything here takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A group of one in `dir`, with small segments.
pub fn config(dir: &Path) -> GroupConfig {
    let node = Node::new("127.0.0.1:1", NodeKey([7; 32]));
    GroupConfig {
        segment_bytes: 64 * 1024,
        ..GroupConfig::new(dir.join("raft"), dir.join("state"), NodeId(1), node)
    }
}

/// Opens and bootstraps.
pub async fn start(dir: &Path) -> Group<Toy> {
    let group = Group::open(config(dir), NoPeers).await.expect("opens");
    group.bootstrap().await.expect("bootstraps");
    group
}

/// Opens on `disk` and bootstraps.
pub async fn start_on(dir: &Path, disk: Arc<dyn Disk>) -> Group<Toy> {
    let group = open_on(config(dir), disk).await.expect("opens");
    group.bootstrap().await.expect("bootstraps");
    group
}

/// Opens only.
pub async fn open_on(config: GroupConfig, disk: Arc<dyn Disk>) -> Result<Group<Toy>, OpenError> {
    Group::open_on(config, NoPeers, disk).await
}

/// A deadline that only a hang can miss.
pub fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// Sets `key` to `value`.
pub async fn set(group: &Group<Toy>, key: &str, value: &str) {
    let proposal = format!("{key}={value}").into_bytes();
    group.propose(proposal, soon()).await.expect("is applied");
}

/// What `key` is set to, here and now.
pub fn get(group: &Group<Toy>, key: &str) -> Option<String> {
    let view = group.state().borrow().clone();
    let value = view.state.map.get(key.as_bytes());
    value.map(|value| String::from_utf8(value.clone()).unwrap())
}

/// The whole chain of causes.
pub fn chain(err: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(err), |err| err.source());
    causes
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

//! A node that is no member follows by asking members for entries and snapshots.

use std::os::fd::AsRawFd;
use std::path::Path;

use wrenn_raft::group::{EntriesError, Group, OfferedSnapshot, SnapshotError};
use wrenn_raft::machine::Machine;
use wrenn_raft::snapshot;

use crate::common::net::Cluster;
use crate::common::soon;
use crate::common::toy::Toy;

/// Reads what is open: the name may be gone by now.
fn load(offer: &OfferedSnapshot) -> (Toy, u64) {
    let open = format!("/proc/self/fd/{}", offer.file.as_raw_fd());
    snapshot::load(Path::new(&open)).unwrap()
}

/// A mirror's state, and the next entry it needs.
struct Mirror {
    state: Toy,
    next: u64,
    snapshots: u32,
}

impl Mirror {
    fn new() -> Self {
        Self {
            state: Toy::empty(),
            next: 0,
            snapshots: 0,
        }
    }

    /// Asks once; whether there may be more.
    async fn pull(&mut self, member: &Group<Toy>, max_bytes: usize) -> bool {
        let entries = match member.entries(self.next, max_bytes).await {
            Ok(entries) => entries,
            Err(EntriesError::Purged { first }) => {
                assert!(first > self.next);
                let offer = member.snapshot_file().await.unwrap();
                assert_eq!(offer.file.metadata().unwrap().len(), offer.bytes);
                let (state, index) = load(&offer);
                assert_eq!(index, offer.index);
                (self.state, self.next) = (state, index + 1);
                self.snapshots += 1;
                return true;
            }
            Err(other) => panic!("{other:?}"),
        };
        for (index, proposal) in entries.entries {
            assert_eq!(index, self.next);
            if let Some(proposal) = proposal {
                self.state.apply(index, &proposal).unwrap();
            }
            self.next += 1;
        }
        Some(self.next) <= entries.applied
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_fed_by_any_member_ends_up_with_the_same_state() {
    let cluster = Cluster::calm(3).await;
    for round in 0..30 {
        cluster.set(&format!("key {round}"), "value").await;
    }
    cluster.agreed().await;
    for member in cluster.groups() {
        let mut mirror = Mirror::new();
        // So few bytes that each answer has one entry or two.
        while mirror.pull(&member, 1).await {}
        let view = member.state().borrow().clone();
        assert_eq!(
            (mirror.next, mirror.snapshots),
            (view.applied.unwrap() + 1, 0)
        );
        assert!(mirror.state == view.state);
        let none = member.entries(mirror.next + 1000, 1000).await.unwrap();
        assert!(none.entries.is_empty() && none.applied == view.applied);
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_that_lags_behind_the_log_gets_a_snapshot_and_goes_on() {
    let cluster = Cluster::of(1).await;
    let member = cluster.group(1);
    let writer = member.clone();
    let writing = tokio::spawn(async move {
        for round in 0..500 {
            let proposal = format!("key {}={round}", round % 40).into_bytes();
            writer.propose(proposal, soon()).await.unwrap();
        }
    });
    cluster
        .until("the log is purged", || member.metrics().purged > Some(0))
        .await;
    let mut mirror = Mirror::new();
    while mirror.pull(&member, 400).await || !writing.is_finished() {
        tokio::task::yield_now().await;
    }
    while mirror.pull(&member, 400).await {}
    assert!(mirror.snapshots > 0);
    assert!(mirror.state == member.state().borrow().state);
    cluster.stop().await;
}

#[tokio::test]
async fn a_snapshot_is_made_when_there_is_none_and_not_before_there_is_anything() {
    let cluster = Cluster::new();
    let group = cluster.start(1).await;
    let refused = group.snapshot_file().await.unwrap_err();
    assert!(matches!(refused, SnapshotError::NotYet), "{refused:?}");
    group.bootstrap().await.unwrap();
    cluster.set("key", "value").await;
    let offer = group.snapshot_file().await.unwrap();
    let (state, index) = load(&offer);
    assert_eq!(Some(index), group.state().borrow().applied);
    assert!(state == group.state().borrow().state);
    cluster.stop().await;
}

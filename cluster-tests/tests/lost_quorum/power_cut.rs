//! Everything went dark at once: nodes come back in any order, with any pauses, and nobody has to
//! do anything.

use std::thread;
use std::time::Duration;

use wrenn_cluster_tests::cluster::ClusterWorld;

use crate::{missing, wait_voters, write_record, write_records};

/// Pause between two hosts coming back: longer than a node waits for a quorum before it serves
/// without one.
const PAUSE: Duration = Duration::from_secs(6);

#[test]
fn a_cluster_that_lost_power_comes_up_by_itself_in_any_order() {
    let mut cluster = ClusterWorld::new(3);
    let before = wait_voters(cluster.client(1), 3);
    let mut written = write_records(&cluster, &[1, 2, 3]);
    for order in [[3, 1, 2], [2, 3, 1]] {
        for number in 1..=3 {
            cluster.kill(number);
        }
        for number in order {
            cluster.node(number).begin();
            thread::sleep(PAUSE);
        }
        for number in order {
            cluster.node(number).wait_ready();
            let seen = wait_voters(cluster.client(number), 3);
            assert_eq!(seen["id"], before["id"]);
            assert_eq!(
                missing(cluster.client(number), &written),
                Vec::<String>::new()
            );
        }
        written.push(write_record(cluster.client(order[0])));
    }
    cluster.wait_members(3);
}

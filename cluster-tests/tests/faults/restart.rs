//! All nodes are restarted one after the other, in order, while clients write.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use std::{iter, thread};

use wrenn_cluster_tests::cluster::ClusterWorld;

use crate::door::{Change, Door};
use crate::{missing, three};

/// Pause of a client between two writes, so that the machine has time for the restarts too.
const PAUSE: Duration = Duration::from_millis(10);

/// What one client came to.
#[derive(Default)]
struct Written {
    /// Ids that were acknowledged.
    acknowledged: Vec<String>,
    /// Writes that the second node refused too.
    failed: Vec<String>,
}

#[test]
fn i2_a_rolling_restart_loses_no_acknowledged_write_and_one_retry_hides_it() {
    let mut cluster = three();
    let doors = Door::all(&cluster);
    let (over, retried) = (AtomicBool::new(false), AtomicUsize::new(0));
    let begun = Instant::now();
    let (written, longest) = thread::scope(|scope| {
        let clients: Vec<_> = (0..doors.len())
            .map(|home| {
                let (doors, over, retried) = (&doors, &over, &retried);
                scope.spawn(move || write(doors, home, over, retried))
            })
            .collect();
        let ended = Ended(&over);
        for number in [2, 3, 1] {
            roll(&mut cluster, number);
        }
        drop(ended);
        let ends = clients.into_iter().map(|it| it.join().expect("a client"));
        let (written, longest): (Vec<_>, Vec<_>) = ends.unzip();
        (written, longest.into_iter().max())
    });
    let failed: Vec<&String> = written.iter().flat_map(|it| &it.failed).collect();
    let acknowledged: Vec<String> = written
        .iter()
        .flat_map(|it| it.acknowledged.clone())
        .collect();
    println!(
        "{} writes acknowledged in {:?}, {} of them by the second node, the slowest after {:?}",
        acknowledged.len(),
        begun.elapsed(),
        retried.load(Ordering::Relaxed),
        longest.unwrap_or_default(),
    );
    assert!(failed.is_empty(), "{failed:#?}\n{}", cluster.logs());
    for number in 1..=3 {
        let lost = missing(cluster.client(number), &acknowledged);
        assert!(lost.is_empty(), "node {number} lost {lost:?}");
    }
}

struct Ended<'a>(&'a AtomicBool);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn roll(cluster: &mut ClusterWorld, number: u16) {
    cluster.stop(number);
    cluster.start(number);
    cluster.wait_members(3);
}

/// One client: each write goes to its own node, and once to another one if that brings nothing.
fn write(
    doors: &[Door],
    home: usize,
    over: &AtomicBool,
    retried: &AtomicUsize,
) -> (Written, Duration) {
    let (mut written, mut longest) = (Written::default(), Duration::ZERO);
    let mut other = iter::successors(Some(home + 1), |at| Some(at + 1))
        .map(|at| at % doors.len())
        .filter(|at| *at != home);
    while !over.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let first = doors[home].make_token();
        let second = match first {
            Change::Made(answer) => Change::Made(answer),
            Change::Refused(_) | Change::Unknown => {
                retried.fetch_add(1, Ordering::Relaxed);
                doors[other.next().expect("for ever")].make_token()
            }
        };
        match second {
            Change::Made(answer) => {
                let id = answer.json()["id"].as_str().expect("an id").to_owned();
                written.acknowledged.push(id);
            }
            failed => written.failed.push(format!("{failed:?}")),
        }
        longest = longest.max(begun.elapsed());
        thread::sleep(PAUSE);
    }
    (written, longest)
}

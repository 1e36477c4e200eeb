//! Creates from everywhere at once, for more capsules than there is room: no node is ever promised
//! more than it has, whatever moment one looks at, and who gets nothing is told what was missing.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use wrenn_cluster_tests::client::{Answer, wait_for};
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::world::World;

use crate::witness::vmms;
use crate::{MEMORY_MB, PATIENCE, wait_voters};

/// Clients that ask at once.
const CLIENTS: usize = 64;
/// Capsules that fit one node; so few guests begin to boot.
const ROOM: usize = 2;
/// Nodes.
const NODES: usize = 3;
/// Pause between two looks at what is promised.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// Pause of a client that was told that there is no room.
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// How long clients go on asking while others end.
const CHURN: Duration = Duration::from_secs(5);
/// What a client of a capsule that somebody stopped while it started is told.
const STOPPED_MEANWHILE: &str = "it was stopped while it started";

#[test]
fn creates_at_once_through_all_nodes_are_promised_no_more_than_there_is() {
    let cluster = ClusterWorld::with(3, |_, world| {
        let memory = (ROOM as u64 * u64::from(MEMORY_MB)).to_string();
        world.environment.push(("WRENN_MEMORY_MIB".into(), memory));
    });
    wait_voters(&cluster, &[1, 2, 3], NODES);
    watched(&cluster, || all_at_once(&cluster));
    watched(&cluster, || while_others_end(&cluster));
    for number in 1..=3 {
        cluster.client(number).wait_only(&[]);
    }
}

/// Does something while every node is looked at all the time.
fn watched(cluster: &ClusterWorld, act: impl FnOnce()) {
    let over = AtomicBool::new(false);
    let looks = AtomicUsize::new(0);
    thread::scope(|scope| {
        let watch = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                (1..=3).for_each(|number| look(cluster, number));
                looks.fetch_add(1, Ordering::Relaxed);
                thread::sleep(LOOK_AGAIN);
            }
        });
        // The watch must end when the act fails, or nobody hears of it.
        let acted = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
        over.store(true, Ordering::Relaxed);
        watch.join().expect("nothing was promised twice");
        acted.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    println!("{} looks at all nodes", looks.into_inner());
}

/// What one node believes of all, and what one really runs.
fn look(cluster: &ClusterWorld, number: u16) {
    let world = cluster.client(number);
    let nodes = world.call("GET", "/v1/nodes", None).json();
    assert_eq!(nodes.as_array().map(Vec::len), Some(NODES), "{nodes}");
    for node in nodes.as_array().into_iter().flatten() {
        for what in ["vcpus", "memory_mb", "disk_mb", "capsules"] {
            let taken = node["reserved"][what].as_u64().expect("an amount");
            let all = node["capacity"][what].as_u64().expect("an amount");
            assert!(taken <= all, "too many {what}: {node}");
        }
    }
    let running = vmms(&world.data(), "");
    assert!(
        running.len() <= ROOM,
        "{} runs {running:?}",
        crate::name(number)
    );
}

/// Sends creates from that many clients; `then` happens while they wait. Each goes on asking until
/// it is told something else than that there is no room, for as long as `patience`.
fn create_all(
    cluster: &ClusterWorld,
    patience: Duration,
    then: impl FnOnce(&AtomicUsize),
) -> Vec<Answer> {
    let answered = AtomicUsize::new(0);
    thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let number = u16::try_from(client % NODES + 1).expect("few nodes");
                let answered = &answered;
                scope.spawn(move || {
                    let mut answer = create(cluster.client(number));
                    let deadline = Instant::now() + patience;
                    while no_room(&answer) && Instant::now() < deadline {
                        thread::sleep(ASK_AGAIN);
                        answer = create(cluster.client(number));
                    }
                    answered.fetch_add(1, Ordering::Relaxed);
                    answer
                })
            })
            .collect();
        then(&answered);
        let answers = clients.into_iter().map(|client| client.join());
        answers.map(|answer| answer.expect("an answer")).collect()
    })
}

fn create(world: &World) -> Answer {
    let request = json!({ "memory_mb": MEMORY_MB });
    world.call("POST", "/v1/capsules", Some(&request))
}

fn no_room(answer: &Answer) -> bool {
    answer.refusal().1 == "no_hosts_available"
}

fn all_at_once(cluster: &ClusterWorld) {
    let fitting = NODES * ROOM;
    let mut placed = BTreeMap::<String, usize>::new();
    let answers = create_all(cluster, Duration::ZERO, |answered| {
        // Those who got nothing are told at once; the others wait for their guests.
        let told = || answered.load(Ordering::Relaxed) >= CLIENTS - fitting;
        assert!(wait_for(PATIENCE, || told().then_some(())).is_some());
        let list = cluster
            .client(1)
            .call("GET", "/v1/capsules?consistency=linearizable", None);
        for capsule in list.json().as_array().into_iter().flatten() {
            *placed.entry(text(capsule, "node")).or_default() += 1;
        }
        stop_all(cluster);
    });
    assert_eq!(
        placed.values().copied().collect::<Vec<_>>(),
        [ROOM; NODES],
        "{placed:?}"
    );
    let (refused, taken): (Vec<_>, Vec<_>) = answers.iter().partition(|answer| no_room(answer));
    assert_eq!((refused.len(), taken.len()), (CLIENTS - fitting, fitting));
    for answer in refused {
        assert_eq!(answer.status, 503);
        assert!(
            answer.message().contains("lacks memory"),
            "{}",
            answer.message()
        );
    }
    taken.into_iter().for_each(was_taken);
}

fn text(value: &Value, key: &str) -> String {
    value[key].as_str().unwrap_or_default().to_owned()
}

fn stop_all(cluster: &ClusterWorld) {
    for (id, number) in cluster
        .client(2)
        .listed()
        .iter()
        .zip([1, 2, 3].iter().cycle())
    {
        let stopped = cluster.client(*number).about("DELETE", id, "", None);
        assert!(matches!(stopped.status, 202 | 204), "{}", stopped.json());
    }
}

/// Room is given out again the moment it is free, and not a moment earlier.
fn while_others_end(cluster: &ClusterWorld) {
    let answers = create_all(cluster, CHURN, |answered| {
        let done = wait_for(4 * PATIENCE, || {
            stop_all(cluster);
            (answered.load(Ordering::Relaxed) == CLIENTS).then_some(())
        });
        assert!(done.is_some(), "creates without an answer");
        stop_all(cluster);
    });
    let (refused, taken): (Vec<_>, Vec<_>) = answers.iter().partition(|answer| no_room(answer));
    println!(
        "{} taken and {} refused while others end",
        taken.len(),
        refused.len()
    );
    assert!(taken.len() > NODES * ROOM, "room is not given out again");
    taken.into_iter().for_each(was_taken);
}

/// Some guests came up, and the others were stopped before.
fn was_taken(answer: &Answer) {
    let stopped = answer.message().contains(STOPPED_MEANWHILE);
    assert!(matches!(answer.status, 201 | 202) || stopped, "{answer:?}");
}

//! `wrenn node recover`: what it refuses, who follows, and what becomes of the lost if they come
//! back all the same.

use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::world::{World, wrenn};

use crate::{SETTLE_TIMEOUT, ids, missing, wait_voters, write_record, write_records};

/// How long the lost are watched trying: many elections, and several load reports.
const WATCHED: Duration = Duration::from_secs(20);

/// Runs `wrenn node recover` on a node's data directory.
fn order(world: &World, arguments: &[&str]) -> Output {
    Command::new(wrenn())
        .args(["node", "recover", "--json", "--data-dir"])
        .arg(world.data())
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("the wrenn binary runs")
}

/// The output of an order that is refused, for people.
fn refusal(world: &World, arguments: &[&str]) -> String {
    let output = order(world, arguments);
    assert!(!output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn answer(world: &World, arguments: &[&str]) -> Value {
    let output = order(world, arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// The id that the cluster gave a node.
fn id_of(world: &World, name: &str) -> String {
    let nodes = world.call("GET", "/v1/nodes", None).json();
    let mut nodes = nodes.as_array().into_iter().flatten();
    let node = nodes.find(|node| node["name"] == name);
    let id = node.and_then(|node| node["id"].as_str());
    id.expect("a node of that name").to_owned()
}

/// Stops a survivor and makes it the only voter.
pub(crate) fn recover(cluster: &mut ClusterWorld, survivor: u16, lost: &[u16]) -> Value {
    let world = cluster.client(survivor);
    let lost = lost
        .iter()
        .map(|number| id_of(world, &format!("node{number}")));
    let lost = lost.collect::<Vec<_>>().join(",");
    let running = refusal(world, &["--lost", &lost, "--yes"]);
    assert!(running.contains("in use"), "{running}");
    cluster.stop(survivor);
    answer(cluster.client(survivor), &["--lost", &lost, "--yes"])
}

/// Waits until the lost have left the list of nodes, which has `left` then less this many.
pub(crate) fn give_up(cluster: &ClusterWorld, survivor: u16, lost: usize) {
    let world = cluster.client(survivor);
    let before = usize::from(cluster.len());
    let gone = wait_for(SETTLE_TIMEOUT, || {
        let nodes = ids(&world.call("GET", "/v1/nodes", None).json());
        (nodes.len() + lost == before).then_some(())
    });
    assert!(gone.is_some(), "the lost are still listed\n{}", world.log());
}

#[test]
fn an_order_that_makes_no_sense_is_refused_and_changes_nothing() {
    let mut cluster = ClusterWorld::new(3);
    let before = wait_voters(cluster.client(1), 3);
    let all: Vec<String> = (1..=3)
        .map(|it| id_of(cluster.client(1), &format!("node{it}")))
        .collect();
    for number in 1..=3 {
        cluster.stop(number);
    }
    let world = cluster.client(3);
    let shown = answer(world, &["--inspect"]);
    assert_eq!(shown["node"].as_str(), Some(all[2].as_str()));
    assert_eq!(shown["cluster"], before["id"]);
    assert_eq!(shown["voters"].as_array().map(Vec::len), Some(3));

    let others = all[..2].join(",");
    for (arguments, why) in [
        (vec!["--lost", &all[0], "--yes"], "which is a quorum"),
        (vec!["--yes"], "nobody is declared lost"),
        (vec!["--lost", &all[2], "--yes"], "is this node"),
        (
            vec!["--lost", "node-77", "--yes"],
            "node-77 is not in the log",
        ),
        (vec!["--lost", &others], "not confirmed"),
    ] {
        let said = refusal(world, &arguments);
        assert!(said.contains(why), "{arguments:?}: {said}");
    }
    let mistyped = world.dir().join("mistyped");
    let missing = Command::new(wrenn())
        .args(["node", "recover", "--inspect", "--data-dir"])
        .arg(&mistyped)
        .output()
        .expect("the wrenn binary runs");
    assert!(!missing.status.success() && !mistyped.exists());
    assert_eq!(answer(world, &["--inspect"]), shown);
    cluster.start_all(&[2, 1, 3]);
    assert_eq!(wait_voters(cluster.client(2), 3)["id"], before["id"]);
}

#[test]
fn survivors_that_are_not_lost_follow_and_vote() {
    let mut cluster = ClusterWorld::new(5);
    let voters = wait_voters(cluster.client(1), 3);
    let written = write_records(&cluster, &[1, 2, 3, 4, 5]);
    let voting = ids_of(&voters["voters"]);
    let numbers = |votes: bool| -> Vec<u16> {
        let is = |number: &u16| {
            let id = id_of(cluster.client(1), &format!("node{number}"));
            voting.contains(&id) == votes
        };
        (1..=5).filter(is).collect()
    };
    let (voting, learning) = (numbers(true), numbers(false));
    let (survivor, lost) = (voting[2], [voting[0], voting[1]]);
    for number in lost {
        cluster.lose(number);
    }
    let former = voters["id"].clone();
    recover(&mut cluster, survivor, &lost);
    cluster.start(survivor);
    give_up(&cluster, survivor, 2);
    let seen = wait_voters(cluster.client(survivor), 3);
    assert_ne!(seen["id"], former);
    for number in learning {
        let world = cluster.client(number);
        let same = wait_voters(world, 3);
        assert_eq!((&same["id"], &same["nodes"]), (&seen["id"], &seen["nodes"]));
        assert_eq!(missing(world, &written), Vec::<String>::new());
        write_record(world);
    }
}

#[test]
fn a_lost_majority_that_comes_back_with_its_old_disks_reaches_nobody() {
    let mut cluster = ClusterWorld::new(3);
    let former = wait_voters(cluster.client(3), 3);
    let written = write_records(&cluster, &[1, 2, 3]);
    cluster.kill(1);
    cluster.kill(2);
    recover(&mut cluster, 3, &[1, 2]);
    // At once, while the lost are still listed: the worst moment.
    cluster.node(3).begin();
    cluster.node(1).begin();
    cluster.node(2).begin();
    cluster.node(3).wait_ready();
    let survivor = cluster.client(3);
    let term = wait_voters(survivor, 1)["term"].clone();
    let mut later = Vec::new();
    let begun = std::time::Instant::now();
    while begun.elapsed() < WATCHED {
        later.push(write_record(survivor));
        let seen = survivor.call("GET", "/v1/cluster", None).json();
        assert_ne!(seen["id"], former["id"]);
        assert_eq!(
            (&seen["term"], &seen["voters"].as_array().map(Vec::len)),
            (&term, &Some(1))
        );
        thread::sleep(Duration::from_millis(500));
    }
    assert_eq!(missing(survivor, &written), Vec::<String>::new());
    assert_eq!(missing(survivor, &later), Vec::<String>::new());
    // They formed the old cluster among themselves, which is why they must be wiped.
    for number in [1, 2] {
        let known = ids(&cluster
            .client(number)
            .call("GET", "/v1/tokens", None)
            .json());
        assert!(!later.iter().any(|id| known.contains(id)));
        assert_eq!(
            cluster
                .client(number)
                .call("GET", "/v1/cluster", None)
                .json()["id"],
            former["id"]
        );
    }
    give_up(&cluster, 3, 2);
    for number in [1, 2] {
        cluster.kill(number);
    }
    // The survivor remembers, from the first moment of any later start.
    cluster.kill(3);
    cluster.start_all(&[1, 2, 3]);
    let again = wait_voters(cluster.client(3), 1);
    assert_eq!(again["nodes"], 1, "{again}");
    assert_eq!(missing(cluster.client(3), &later), Vec::<String>::new());
}

fn ids_of(list: &Value) -> Vec<String> {
    let items = list.as_array().into_iter().flatten();
    items
        .filter_map(|id| id.as_str().map(str::to_owned))
        .collect()
}

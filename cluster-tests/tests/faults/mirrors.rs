//! Nodes past the caps: they neither vote nor learn, and serve all the same; and who moves up when a
//! voter dies.

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::{Value, json};
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::world::{World, wrenn};

use crate::{SETTLE_TIMEOUT, missing};

#[test]
fn a_mirror_serves_and_moves_up_when_a_voter_dies() {
    let mut cluster = ClusterWorld::new(5);
    let caps = json!({ "max_voters": 3, "max_learners": 1 });
    let set = cluster.client(1).call("PATCH", "/v1/cluster", Some(&caps));
    assert_eq!(set.status, 200, "{}", set.json());
    let roles = wait_roles(cluster.client(1), |roles| count(roles) == (3, 1, 1));
    println!("{roles:?}");
    let (mirror, learner) = (only(&roles, "mirror"), only(&roles, "learner"));
    serves(&cluster, mirror);
    shown(&cluster, mirror);

    let leader = cluster.wait_leader();
    let voter = (1..=5).find(|it| *it != leader && roles[it] == "voter");
    let voter = voter.expect("three vote, one leads");
    cluster.kill(voter);
    let begun = std::time::Instant::now();
    wait_roles(cluster.client(mirror), |roles| roles[&learner] == "voter");
    println!(
        "the learner voted {:?} after the death of a voter",
        begun.elapsed()
    );
    // The dead one keeps its place as a learner for a while, unless somebody says that it is gone.
    let path = format!("/v1/nodes/node{voter}?force=true");
    let gone = wait_for(SETTLE_TIMEOUT, || {
        (cluster.client(mirror).call("DELETE", &path, None).status == 204).then_some(())
    });
    assert!(gone.is_some(), "{}", cluster.logs());
    let roles = wait_roles(cluster.client(mirror), |roles| {
        roles.get(&mirror).is_some_and(|role| role == "learner")
    });
    println!("{roles:?} {:?} after the death", begun.elapsed());
    serves(&cluster, mirror);
    // It was away when it was removed, and finds out from those who refuse it.
    cluster.node(voter).spawn();
    let out = cluster.node(voter).wait_end();
    let log = cluster.client(voter).log();
    assert!(
        !out.success() && log.contains("was removed from its cluster"),
        "{log}"
    );
}

/// It answers reads as new as any, and writes made through it are there for everybody.
fn serves(cluster: &ClusterWorld, number: u16) {
    let world = cluster.client(number);
    let made = world.call("POST", "/v1/tokens", Some(&json!({})));
    assert_eq!(made.status, 201, "{}\n{}", made.json(), world.log());
    let id = made.json()["id"].as_str().expect("an id").to_owned();
    let other = cluster.wait_leader();
    for reader in [number, other] {
        let lost = missing(cluster.client(reader), std::slice::from_ref(&id));
        assert!(lost.is_empty(), "node {reader} has not {lost:?}");
    }
    // Its own copy, without asking anybody.
    let list = world.call("GET", "/v1/tokens", None);
    assert!(crate::ids(&list.json()).contains(&id));
}

/// The command line says which part each node has.
fn shown(cluster: &ClusterWorld, number: u16) {
    let world = cluster.client(number);
    let listed = Command::new(wrenn())
        .args(["node", "ls"])
        .env("WRENN_BASE_URL", world.url())
        .env("WRENN_API_KEY", world.key())
        .output()
        .expect("the wrenn binary runs");
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    let name = format!("node{number}");
    let mut lines = text.lines();
    let line = lines.find(|line| line.contains(&name));
    assert!(line.is_some_and(|line| line.contains("mirror")), "{text}");
}

fn wait_roles(
    world: &World,
    fits: impl Fn(&BTreeMap<u16, String>) -> bool,
) -> BTreeMap<u16, String> {
    let found = wait_for(SETTLE_TIMEOUT, || Some(roles(world)).filter(|it| fits(it)));
    found.unwrap_or_else(|| panic!("{:?}\n{}", roles(world), world.log()))
}

/// The role of each node, by its number.
fn roles(world: &World) -> BTreeMap<u16, String> {
    let nodes = world.try_call("GET", "/v1/nodes", None);
    let nodes = nodes.map_or(Value::Null, |answer| answer.json());
    let all = nodes.as_array().into_iter().flatten();
    all.filter_map(|node| {
        let number = node["name"].as_str()?.strip_prefix("node")?.parse().ok()?;
        Some((number, node["role"].as_str()?.to_owned()))
    })
    .collect()
}

fn count(roles: &BTreeMap<u16, String>) -> (usize, usize, usize) {
    let of = |role: &str| roles.values().filter(|it| *it == role).count();
    (of("voter"), of("learner"), of("mirror"))
}

fn only(roles: &BTreeMap<u16, String>, role: &str) -> u16 {
    let mut found = roles.iter().filter(|(_, it)| *it == role);
    *found.next().expect("there is one").0
}

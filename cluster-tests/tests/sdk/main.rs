//! The real `wrenn` package, as its users install it, against a real cluster of three nodes. Each of its
//! behaviours asks another node than the one before.
//!
//! What users rely on is written in Python beside this file, a module a topic. One cluster serves all
//! topics, since forming one and booting guests takes longest. `deploy/clients wrenn` makes the Python that
//! has the package; without it the test is skipped, and says so. `WRENN_SDK_TOPICS` names some topics.

mod runner;
mod sources;

use std::env;
use std::path::Path;
use std::process::Command;

use wrenn_cluster_tests::clients::python_with;
use wrenn_cluster_tests::cluster::{ClusterWorld, wait_voters};
use wrenn_cluster_tests::outside::Outside;

use crate::sources::Sources;

/// Members of the cluster.
const NODES: u16 = 3;
/// What is tried, in this order.
const TOPICS: [&str; 10] = [
    "lifecycle",
    "commands",
    "files",
    "terminals",
    "repositories",
    "snapshots",
    "asynchronous",
    "code",
    "told",
    "release",
];

#[test]
fn the_wrenn_sdk_finds_everything_as_it_expects() {
    let Some(python) = python_with("wrenn") else {
        return;
    };
    let outside = Outside::new();
    let sources = Sources::new(&outside, &python);
    let cluster = ClusterWorld::with(NODES, |_, world| {
        let allowed = format!("{}/32", outside.allowed);
        world.arguments = vec!["--egress-allow".into(), allowed];
    });
    wait_voters(cluster.client(1), usize::from(NODES));

    let chosen = env::var("WRENN_SDK_TOPICS").unwrap_or_else(|_| TOPICS.join(" "));
    if chosen.split_whitespace().any(|topic| topic == "code") {
        runner::build(cluster.client(1));
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk/wrenn_client/run.py");
    let nodes: Vec<String> = (1..=NODES)
        .map(|number| address(&cluster, number))
        .collect();
    let ran = Command::new(python)
        .arg(script)
        .args(chosen.split_whitespace())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("WRENN_TEST_NODES", nodes.join(","))
        .env("WRENN_TEST_SOURCES", &sources.url)
        .env("WRENN_API_KEY", cluster.client(1).key())
        .status();
    assert!(ran.expect("Python runs").success());

    for number in 1..=NODES {
        cluster.client(number).wait_only(&[]);
    }
}

/// A node by a name, below which the addresses of capsules' ports lie.
fn address(cluster: &ClusterWorld, number: u16) -> String {
    format!("http://localhost:{}", cluster.client(number).port())
}

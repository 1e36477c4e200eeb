//! How long a host takes to become a member: from the command line with a token to `alive` in the
//! list of another node, and to an answer of its own API.
//!
//! The founder and the joiner are daemons of their own on loopback, the joiner's data directory is
//! empty. What a node finds out about its machine when it first starts, whether KVM works, is in the
//! second figure and not in the first.

use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::world::World;

use crate::figures::{Samples, at_most};
use crate::{Outcome, Run};

/// The most that a join may take, in milliseconds.
const GOAL_MS: f64 = 10_000.0;
/// The joiner's number: the founder is 1.
const JOINER: u16 = 2;
/// Joins beyond this many tell nothing new.
const MAX_JOINS: usize = 10;
/// Longest wait for a join.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pause between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Measures joins, each of a new host.
pub(crate) fn run(run: &Run) -> Outcome {
    let cluster = ClusterWorld::new(1);
    let founder = cluster.client(1);
    let (mut listed, mut serving) = (Samples::default(), Samples::default());
    let joins = run.runs.min(MAX_JOINS);
    for number in 1..=joins {
        run.go_on()?;
        run.note(&format!("join {number} of {joins}"));
        let made = founder.call("POST", "/v1/tokens", Some(&json!({}))).json();
        let token = made["token"].as_str().ok_or("no token")?;
        let known: BTreeSet<String> = nodes(founder).map(|(id, _)| id).collect();
        let mut joiner = cluster.stranger(JOINER, token);
        let began = Instant::now();
        joiner.begin();
        let id = loop {
            let alive = nodes(founder).find(|(id, alive)| *alive && !known.contains(id));
            match alive {
                Some((id, _)) => break id,
                None if began.elapsed() > PATIENCE => return Err("it did not join".into()),
                None => thread::sleep(LOOK_AGAIN),
            }
        };
        listed.add_ms(began.elapsed());
        joiner.wait_ready();
        serving.add_ms(began.elapsed());
        let removed = founder.call("DELETE", &format!("/v1/nodes/{id}"), None);
        if removed.status >= 300 {
            return Err(format!("{id} stays: {}", removed.json()).into());
        }
    }
    listed.print("join_listed", "ms");
    serving.print("join_serving", "ms");
    at_most("join_listed_p99", listed.p99(), GOAL_MS);
    Ok(())
}

/// The nodes that one node lists, and whether each is alive.
fn nodes(of: &World) -> impl Iterator<Item = (String, bool)> {
    let list = of.call("GET", "/v1/nodes", None).json();
    let rows: Vec<Value> = list.as_array().cloned().unwrap_or_default();
    rows.into_iter().filter_map(|row| {
        let id = row["id"].as_str()?.to_owned();
        Some((id, row["alive"] == true))
    })
}

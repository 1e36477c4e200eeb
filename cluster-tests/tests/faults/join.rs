//! Who gets in, who does not and is told why, and who is put out.

use std::process::Stdio;
use std::time::{Duration, Instant};

use node::cluster::token::JoinTicket;
use proto::ids::{ClusterId, TokenId};
use serde_json::{Value, json};
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::world::World;

use crate::{SETTLE_TIMEOUT, three};

/// Longest a join may take on a busy machine, from the start of the daemon until it serves as a
/// member. What is promised, a third of it, is measured by `deploy/bench join`.
const JOIN_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest a removed node that hears of it may go on. Its connections end at once; this is until
/// its process has.
const OUT_WITHIN: Duration = Duration::from_secs(15);

/// A token as the API gives it out.
fn token(world: &World, request: &Value) -> (String, String) {
    let made = world.call("POST", "/v1/tokens", Some(request));
    assert_eq!(made.status, 201, "{}", made.json());
    let text = |field: &str| made.json()[field].as_str().expect("text").to_owned();
    (text("id"), text("token"))
}

/// What a daemon that is refused says to the person who started it.
fn refusal(world: &World) -> String {
    let begun = Instant::now();
    let ended = world
        .command()
        .stdin(Stdio::null())
        .output()
        .expect("the wrenn binary runs");
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(!ended.status.success(), "{said}");
    let told = said.lines().find(|line| line.starts_with("error"));
    let last = told.unwrap_or_default().to_owned();
    println!("{:>5.1} s: {last}", begun.elapsed().as_secs_f64());
    said
}

#[test]
fn i7_strangers_are_refused_by_name_and_the_removed_are_out_at_once() {
    let mut cluster = three();
    one_use_lets_one_in(&cluster);
    refused_by_name(&cluster);
    removed_while_connected(&mut cluster);
}

/// Two hosts with the same token, started at once.
fn one_use_lets_one_in(cluster: &ClusterWorld) {
    let (id, text) = token(cluster.client(1), &json!({ "uses": 1 }));
    let mut hosts = [cluster.stranger(4, &text), cluster.stranger(5, &text)];
    let begun = Instant::now();
    for host in &mut hosts {
        host.begin();
    }
    let [first, second] = &mut hosts;
    let won = wait_for(SETTLE_TIMEOUT, || {
        if !first.is_alive() {
            return Some(1);
        }
        (!second.is_alive()).then_some(0)
    });
    let won = won.unwrap_or_else(|| panic!("both run:\n{}\n{}", first.log(), second.log()));
    let lost = &hosts[1 - won];
    assert!(lost.log().contains("used"), "{}", lost.log());
    hosts[won].wait_ready();
    let took = begun.elapsed();
    println!("a join beside another took {took:?}");
    assert!(took < JOIN_TIMEOUT, "{took:?}\n{}", hosts[won].log());
    cluster.wait_members(4);
    let tokens = cluster.client(2).call("GET", "/v1/tokens", None).json();
    let mut all = tokens.as_array().into_iter().flatten();
    let ours = all.find(|token| token["id"] == id).expect("it is kept");
    assert_eq!(ours["state"], "used", "{ours}");
    assert_eq!(ours["nodes"].as_array().map(Vec::len), Some(1), "{ours}");
    take_out(cluster, if won == 0 { "node4" } else { "node5" });
    let out = hosts[won].wait_end();
    assert!(!out.success());
}

fn take_out(cluster: &ClusterWorld, name: &str) {
    let path = format!("/v1/nodes/{name}");
    let removed = cluster.client(1).call("DELETE", &path, None);
    assert_eq!(removed.status, 204, "{}", removed.json());
}

fn refused_by_name(cluster: &ClusterWorld) {
    let founder = cluster.client(1);
    let fresh = || token(founder, &json!({ "ttl_sec": 600 })).1;
    let expired = token(founder, &json!({ "ttl_sec": 1 })).1;
    let expired_at = Instant::now() + Duration::from_secs(1);
    let (id, revoked) = token(founder, &json!({}));
    let path = format!("/v1/tokens/{id}");
    assert_eq!(founder.call("DELETE", &path, None).status, 204);
    let altered = |change: fn(&mut JoinTicket)| {
        let mut ticket = JoinTicket::from_text(&fresh()).expect("a token");
        change(&mut ticket);
        ticket.to_text()
    };
    let mut tampered = fresh();
    let middle = tampered.len() / 2;
    let other = if &tampered[middle..=middle] == "A" {
        "B"
    } else {
        "A"
    };
    tampered.replace_range(middle..=middle, other);
    let unknown = altered(|ticket| ticket.token = TokenId([7; 16]));
    let elsewhere = altered(|ticket| ticket.cluster = ClusterId([7; 16]));
    let made_up = altered(|ticket| ticket.seed = [7; 32]);
    std::thread::sleep(expired_at.saturating_duration_since(Instant::now()));
    for (text, why) in [
        (expired, "expired"),
        (revoked, "withdrawn"),
        (tampered, "damaged"),
        (unknown, "no join token"),
        (elsewhere, "another cluster"),
        (made_up, "secret is wrong"),
        ("wrj1_garbage".to_owned(), "damaged"),
        ("\u{1f980}".to_owned(), "not a join token"),
    ] {
        let said = refusal(&cluster.stranger(6, &text));
        assert!(
            said.contains(why),
            "{text} should be refused as {why}:\n{said}"
        );
    }
    assert_eq!(
        cluster
            .client(2)
            .call("GET", "/v1/nodes", None)
            .json()
            .as_array()
            .map(Vec::len),
        Some(3)
    );
}

fn removed_while_connected(cluster: &mut ClusterWorld) {
    let begun = Instant::now();
    let number = cluster.admit(2);
    println!("a join took {:?}", begun.elapsed());
    assert!(begun.elapsed() < JOIN_TIMEOUT);
    cluster.wait_members(4);
    take_out(cluster, &format!("node{number}"));
    let begun = Instant::now();
    let out = cluster.node(number).wait_end();
    println!("a removed node was out after {:?}", begun.elapsed());
    assert!(!out.success() && begun.elapsed() < OUT_WITHIN);
    let log = cluster.client(number).log();
    assert!(log.contains("was removed from its cluster"), "{log}");
    // It does not come back, neither with the key it has nor with its old token.
    cluster.node(number).spawn();
    let begun = Instant::now();
    let out = cluster.node(number).wait_end();
    println!("started again it gave up after {:?}", begun.elapsed());
    assert!(!out.success(), "{}", cluster.client(number).log());
    cluster.wait_members(3);
}

//! Garbage, strangers, and a member that has lost its mind, against a node that has work to do.
//!
//! The transport's own tests show each refusal by itself. This is the daemon as a whole: it stays up,
//! serves its clients meanwhile, holds no more memory afterwards than before and a bit, and its log
//! tells what happened without being flooded.

mod member;
mod strangers;

use std::fs;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use node::cluster::token::JoinTicket;
use proto::ids::NodeKey;
use serde_json::json;
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::world::World;

use crate::door::{Change, Door};
use crate::three_alone;

/// Most memory that may stay with the node. One member alone may cost 128 MiB by the transport's
/// limits while it is connected; all of it must be free again, but for what the allocator keeps.
const STAYS_AT_MOST_KIB: u64 = 96 * 1024;
/// Most lines in the log of the node: each kind of complaint about each peer once a minute.
const LINES_AT_MOST: usize = 200;
/// Node under attack, and the one whose identity is abused.
const VICTIM: u16 = 1;
const MAD: u16 = 3;

/// Who is attacked, as anybody with a join token knows it.
#[derive(Clone, Copy, Debug)]
struct Target {
    key: NodeKey,
    control: SocketAddr,
    bulk: SocketAddr,
}

#[test]
fn garbage_strangers_and_a_mad_member_cost_a_node_next_to_nothing() {
    let mut cluster = three_alone();
    let target = target(cluster.client(VICTIM));
    let (memory, lines) = (resident_kib(&cluster), log_lines(&cluster));
    let over = AtomicBool::new(false);
    let door = Door::of(&cluster, VICTIM);
    thread::scope(|scope| {
        let client = scope.spawn(|| work(&door, &over));
        let ended = Ended(&over);
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        strangers::send_garbage(target);
        println!("garbage: {} KiB", resident_kib(&cluster));
        runtime.block_on(strangers::speak_otherwise(target));
        runtime.block_on(strangers::open_streams(target));
        println!("strangers: {} KiB", resident_kib(&cluster));
        cluster.stop(MAD);
        let identity = cluster.client(MAD).data().join("identity");
        runtime.block_on(member::go_mad(&identity, target));
        println!("a mad member: {} KiB", resident_kib(&cluster));
        drop(ended);
        let (made, failed) = client.join().expect("a client");
        println!("meanwhile {made} writes were made through it");
        assert!(failed.is_empty() && made > 0, "{failed:#?}");
    });
    cluster.start(MAD);
    cluster.wait_members(3);
    let grown = resident_kib(&cluster).saturating_sub(memory);
    let said = log_lines(&cluster) - lines;
    println!("{grown} KiB stay, {said} lines were logged");
    assert!(grown < STAYS_AT_MOST_KIB, "{grown} KiB");
    let log = cluster.client(VICTIM).log();
    assert!(log.contains("a peer misbehaves"), "nothing is said:\n{log}");
    assert!(said < LINES_AT_MOST, "{log}");
}

/// Ends the client, also when the attack ends in a panic.
struct Ended<'a>(&'a AtomicBool);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What a join token says of the node that is attacked. The token stays open: strangers are heard.
fn target(world: &World) -> Target {
    let made = world.call("POST", "/v1/tokens", Some(&json!({ "ttl_sec": 3600 })));
    assert_eq!(made.status, 201, "{}", made.json());
    let token = made.json()["token"].as_str().expect("a token").to_owned();
    let ticket = JoinTicket::from_text(&token).expect("a token");
    let port = world.cluster_port();
    let contact = ticket
        .contacts
        .into_iter()
        .find(|it| it.control.port() == port);
    let contact = contact.expect("it names itself");
    Target {
        key: contact.key,
        control: contact.control,
        bulk: contact.bulk,
    }
}

/// A client with ordinary wishes.
fn work(door: &Door, over: &AtomicBool) -> (usize, Vec<String>) {
    let (mut made, mut failed) = (0, Vec::new());
    while !over.load(Ordering::Relaxed) {
        match door.make_token() {
            Change::Made(_) => made += 1,
            other => failed.push(format!("{other:?}")),
        }
        thread::sleep(Duration::from_millis(50));
    }
    (made, failed)
}

fn resident_kib(cluster: &ClusterWorld) -> u64 {
    let file = format!("/proc/{}/status", cluster.client(VICTIM).pid());
    let status = fs::read_to_string(file).expect("it lives");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|it| it.parse().ok()).expect("a number")
}

fn log_lines(cluster: &ClusterWorld) -> usize {
    cluster.client(VICTIM).log().lines().count()
}

//! Invariant I3, "what was paused is not lost": memory, disk and processes of a capsule go on from
//! the instant of its pause, on another node, after the host that paused it died without a word.

use serde_json::{Value, json};
use wrenn_cluster_tests::client::{Answer, wait_for};
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::contents::Contents;
use wrenn_cluster_tests::world::World;

use crate::witness::vmms;
use crate::{MEMORY_MB, PATIENCE, led_to, name, told_of, wait_state, wait_voters};

/// Where the capsule is made and paused, and which node dies then.
const DIES: u16 = 1;
/// Through which node everything is asked that the death must not disturb.
const ASKED: u16 = 2;
/// The node that is neither.
const THIRD: u16 = 3;
/// KiB of each random file: many chunks, and quickly made under emulation.
const FILE_KIB: u32 = 1536;

#[test]
fn i3_a_paused_capsule_goes_on_elsewhere_with_memory_and_disk_after_its_host_died() {
    let mut cluster = ClusterWorld::new(3);
    wait_voters(&cluster, &[1, 2, 3], 3);
    let id = led_to(&cluster, DIES, &json!({ "memory_mb": MEMORY_MB }));
    let before = Contents::make(cluster.client(ASKED), &id, FILE_KIB);
    refuses(&cluster, &id, "resume", "running");
    assert!(cluster.client(ASKED).record(&id)["replicas"].is_null());

    paused(&cluster, &id, DIES);
    cluster.kill(DIES);
    let _missing = wait_state(cluster.client(ASKED), DIES, "missing");
    let second = resumed(&cluster, &id);
    assert_ne!(second, DIES);
    before.are_there(cluster.client(ASKED), &id);
    old_interfaces_work(cluster.client(THIRD), &id);

    cluster.start(DIES);
    let _alive = wait_state(cluster.client(ASKED), DIES, "alive");
    let third = hop(&cluster, &id, second);
    before.are_there(cluster.client(ASKED), &id);
    let fourth = hop(&cluster, &id, third);
    before.are_there(cluster.client(ASKED), &id);

    paused(&cluster, &id, fourth);
    destroyed_at_once(&cluster, &id);
}

/// Pauses a capsule that runs on `host`, and waits until another node could take it over.
fn paused(cluster: &ClusterWorld, id: &str, host: u16) {
    let world = cluster.client(ASKED);
    assert_eq!(reserved(world, host), 1);
    let answer = act(world, id, "pause");
    assert_eq!(answer.status, 200, "{}\n{}", answer.json(), world.log());
    assert_eq!(answer.json()["status"], "paused");
    assert_eq!(reserved(world, host), 0);
    cluster.client(host).wait_only(&[]);
    assert_eq!(vmms(&cluster.client(host).data(), id), Vec::<u32>::new());
    refuses(cluster, id, "pause", "paused");
    let ran = world.run(id, &json!({ "cmd": "true" }));
    assert_eq!(ran.refusal(), (409, "invalid_state".into()));
    let copied = wait_for(PATIENCE, || {
        (world.record(id)["replicas"].as_u64()? >= 2).then_some(())
    });
    assert!(copied.is_some(), "{}\n{}", world.record(id), cluster.logs());
}

/// Resumes a paused capsule on whichever node can; returns its number.
fn resumed(cluster: &ClusterWorld, id: &str) -> u16 {
    let world = cluster.client(ASKED);
    let mut answer = act(world, id, "resume");
    let _taken = wait_for(PATIENCE, || {
        let refused = answer.status == 503;
        if refused {
            answer = act(world, id, "resume");
        }
        (!refused).then_some(())
    });
    assert!(
        matches!(answer.status, 200 | 202),
        "{}\n{}",
        answer.json(),
        cluster.logs()
    );
    let running = world.wait_status(id, "running");
    let host = (1..=cluster.len()).find(|number| running["node"] == name(*number));
    let host = host.expect("a node of the cluster");
    assert_eq!(reserved(world, host), 1);
    host
}

/// Pauses a capsule that runs on `host`, and resumes it on another node; returns its number.
fn hop(cluster: &ClusterWorld, id: &str, host: u16) -> u16 {
    paused(cluster, id, host);
    let world = cluster.client(ASKED);
    order(world, host, "cordon");
    let next = resumed(cluster, id);
    order(world, host, "uncordon");
    assert_ne!(next, host);
    next
}

/// Capsules that hold room on a node.
fn reserved(world: &World, number: u16) -> Value {
    told_of(world, number)["reserved"]["capsules"].clone()
}

/// Tells the cluster what to do with a node.
pub(crate) fn order(world: &World, number: u16, what: &str) {
    let path = format!("/v1/nodes/{}/{what}", name(number));
    assert_eq!(world.call("POST", &path, None).status, 200);
}

pub(crate) fn act(world: &World, id: &str, act: &str) -> Answer {
    world.about("POST", id, &format!("/{act}"), None)
}

/// Every node refuses the same, and says how the capsule is.
fn refuses(cluster: &ClusterWorld, id: &str, asked: &str, is: &str) {
    for number in 1..=cluster.len() {
        let refused = act(cluster.client(number), id, asked);
        assert_eq!(refused.refusal(), (409, "invalid_state".into()));
        let said = refused.message();
        assert!(said.contains(&format!("is {is}")), "{said}");
    }
}

fn old_interfaces_work(world: &World, id: &str) {
    assert_eq!(world.exec(id, "exit 7")["exit_code"], 7);
    let contents = b"\0\xff anew\r\n";
    let written = world.upload(id, "files/write", "/root/anew", contents);
    assert_eq!(written.status, 204, "{}", written.json());
    let path = json!({ "path": "/root/anew" });
    let read = world.about("POST", id, "/files/read", Some(&path));
    assert_eq!((read.status, read.body.as_slice()), (200, &contents[..]));
    assert_eq!(world.about("POST", id, "/ping", None).status, 204);
}

/// There is nothing to stop, so nobody waits.
fn destroyed_at_once(cluster: &ClusterWorld, id: &str) {
    let world = cluster.client(ASKED);
    assert_eq!(world.about("DELETE", id, "", None).status, 204);
    assert_eq!(world.record(id)["status"], "stopped");
    assert_eq!(world.listed(), Vec::<String>::new());
    for number in 1..=cluster.len() {
        // The others hear of it a moment later.
        let _ended = cluster.client(number).wait_ended(id);
    }
    refuses(cluster, id, "pause", "stopped");
    refuses(cluster, id, "resume", "stopped");
    for number in 1..=cluster.len() {
        cluster.client(number).wait_only(&[]);
    }
}

//! Invariant I1, "at most one node runs a sandbox's guest at any instant", where a node is cut off
//! and where its daemon hangs. Times are taken from the processes themselves and from what the
//! majority's API says: a guest is frozen before its node is called missing, and dead before the
//! majority gives it to another.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use wrenn_cluster_tests::client::{BOOT_TIMEOUT, wait_for};
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::world::World;

use crate::witness::{Report, Witness, state, vmms};
use crate::{
    MEMORY_MB, PATIENCE, led_to, name, on_node, others, shorten_leases, wait_state, wait_voters,
};

/// A lease that ends soon, and not by itself on a machine that emulates guests.
const TTL: Duration = Duration::from_secs(3);
/// How long its guests stay frozen then.
const GRACE: Duration = Duration::from_secs(3);
/// How long a node that is away keeps what it has at most: the lease and the grace of a new cluster.
const LONGEST_LEASE: Duration = Duration::from_secs(72);
/// How soon after it is found again a node's capsules must be told of as before.
const BACK_SOON: Duration = Duration::from_secs(10);

#[test]
fn i1_a_guest_is_dead_before_another_node_may_run_it() {
    let mut cluster = ClusterWorld::new(3);
    wait_voters(&cluster, &[1, 2, 3], 3);
    let leader = cluster.wait_leader();
    let moves = restarted_elsewhere(&cluster, others(&cluster, leader)[0]);
    let first = shortened(&mut cluster, &moves);
    let asked = cluster.client(1);
    let stays = asked.capsule_with(&on_node(first));
    asked.output(&stays, "echo kept > /root/file");

    let second = cut_off(&cluster, first, &moves, &stays);
    let third = hung(&cluster, second, &moves);

    let asked = cluster.client(others(&cluster, third)[0]);
    asked.destroy(&moves);
    cluster
        .client(third)
        .wait_only(&live(first == third, &stays));
    asked.destroy(&stays);
    for number in 1..=3 {
        cluster.client(number).wait_only(&[]);
    }
}

/// Leases are made shorter while a node is away that has a long one, and the leader that gave it is
/// killed: the next one honours it all the same.
fn shortened(cluster: &mut ClusterWorld, moves: &str) -> u16 {
    let leader = cluster.wait_leader();
    let cut = home(cluster, moves);
    let former = Guest::of(cluster.client(cut), moves);
    let witness = Witness::of(moves);
    cluster.isolate(cut);
    shorten_leases(cluster.client(leader), TTL, GRACE);
    cluster.kill(leader);
    cluster.start(leader);

    let watcher = others(cluster, cut).into_iter().find(|it| *it != leader);
    let watcher = cluster.client(watcher.expect("a third"));
    let told = Told::until_moved(watcher, moves, cut);
    let owner = runs_anew(cluster, moves, &former);
    judge(&witness.report(), &former, &told);
    cluster.heal();
    let _alive = wait_state(watcher, cut, "alive");
    cluster.client(cut).wait_only(&[]);
    owner
}

/// The number of the node that a capsule is on.
fn home(cluster: &ClusterWorld, id: &str) -> u16 {
    let node = cluster.client(1).record(id)["node"].clone();
    let found = (1..=3).find(|number| node == name(*number));
    found.expect("a node of the cluster")
}

fn live(here: bool, id: &str) -> Vec<&str> {
    here.then_some(id).into_iter().collect()
}

/// A running capsule that may move, on this node for now.
fn restarted_elsewhere(cluster: &ClusterWorld, number: u16) -> String {
    let request = json!({ "memory_mb": MEMORY_MB, "on_host_loss": "restart" });
    led_to(cluster, number, &request)
}

/// A partition: the guest that may move does so, the one that waits goes on where it is.
fn cut_off(cluster: &ClusterWorld, cut: u16, moves: &str, stays: &str) -> u16 {
    let alone = cluster.client(cut);
    let majority = others(cluster, cut);
    let watcher = cluster.client(majority[0]);
    let former = Guest::of(alone, moves);
    let kept = only(&vmms(&alone.data(), stays));
    let witness = Witness::of(moves);
    cluster.isolate(cut);

    let told = Told::until_moved(watcher, moves, cut);
    let missing = watcher.record(stays);
    assert_eq!(missing["status"], "missing", "{missing}");
    assert!(missing["missing_since"].is_string(), "{missing}");
    assert_eq!(alone.output(stays, "cat /root/file"), "kept");
    assert_eq!(watcher.run(stays, &json!({ "cmd": "true" })).status, 503);
    assert_eq!(state(kept), Some('R'), "the guest that waits stands still");

    let owner = runs_anew(cluster, moves, &former);
    assert!(majority.contains(&owner));
    judge(&witness.report(), &former, &told);

    cluster.heal();
    let healed = Instant::now();
    let back = wait_for(BACK_SOON, || {
        (watcher.record(stays)["status"] == "running").then_some(())
    });
    assert!(
        back.is_some(),
        "{}\n{}",
        watcher.record(stays),
        watcher.log()
    );
    println!(
        "a capsule that waited is running {:?} after the cut",
        healed.elapsed()
    );
    assert_eq!(watcher.output(stays, "cat /root/file"), "kept");
    assert_eq!(only(&vmms(&alone.data(), stays)), kept);
    alone.wait_only(&[stays]);
    owner
}

/// A daemon that stands still cannot fence anybody: its shims do.
fn hung(cluster: &ClusterWorld, hung: u16, moves: &str) -> u16 {
    let world = cluster.client(hung);
    for number in 1..=3 {
        let _alive = wait_state(cluster.client(number), hung, "alive");
    }
    let watcher = cluster.client(others(cluster, hung)[0]);
    let former = Guest::of(world, moves);
    let witness = Witness::of(moves);
    cluster.pause(hung);

    let told = Told::until_moved(watcher, moves, hung);
    let owner = runs_anew(cluster, moves, &former);
    judge(&witness.report(), &former, &told);
    assert_eq!(
        state(world.pid()),
        Some('T'),
        "the daemon was to stand still"
    );

    cluster.resume(hung);
    let _alive = wait_state(watcher, hung, "alive");
    let gone = wait_for(PATIENCE, || {
        let left = world.sandbox_dir(moves).exists() || !vmms(&world.data(), moves).is_empty();
        (!left).then_some(())
    });
    assert!(
        gone.is_some(),
        "the old guest left something\n{}",
        world.log()
    );
    assert_eq!(watcher.output(moves, "echo here"), "here");
    owner
}

/// One life of a guest.
struct Guest {
    vmm: u32,
    epoch: u64,
}

impl Guest {
    fn of(world: &World, id: &str) -> Self {
        Self {
            vmm: only(&vmms(&world.data(), id)),
            epoch: epoch(world, id),
        }
    }
}

fn only(pids: &[u32]) -> u32 {
    assert_eq!(pids.len(), 1, "there is not one VMM: {pids:?}");
    pids[0]
}

/// The epoch under which a node runs a capsule.
fn epoch(world: &World, id: &str) -> u64 {
    let record = fs::read(world.sandbox_dir(id).join("sandbox.json")).expect("a record");
    let record: Value = serde_json::from_slice(&record).expect("JSON");
    record["epoch"].as_u64().expect("an epoch")
}

/// What the majority told of a capsule whose node is away. Each instant is the last at which a
/// question was sent that was still answered otherwise.
struct Told {
    missing: Instant,
    elsewhere: Instant,
    began: Instant,
}

impl Told {
    fn until_moved(watcher: &World, id: &str, away: u16) -> Self {
        let began = Instant::now();
        let mut told = Self {
            missing: began,
            elsewhere: began,
            began,
        };
        let moved = wait_for(LONGEST_LEASE + PATIENCE, || {
            let sent = Instant::now();
            let seen = watcher.record(id);
            let here = seen["node"] == name(away);
            if here && seen["status"] == "running" {
                told.missing = sent;
            }
            if here {
                told.elsewhere = sent;
            }
            (!here && seen["node"].is_string()).then_some(())
        });
        assert!(moved.is_some(), "{}\n{}", watcher.record(id), watcher.log());
        told
    }
}

/// Waits until the guest runs on another node, under a later epoch; returns its number.
fn runs_anew(cluster: &ClusterWorld, id: &str, former: &Guest) -> u16 {
    let found = wait_for(BOOT_TIMEOUT, || {
        (1..=3).find(|number| {
            let here = vmms(&cluster.client(*number).data(), id);
            here.first().is_some_and(|vmm| *vmm != former.vmm)
        })
    });
    let owner = found.unwrap_or_else(|| panic!("it runs nowhere\n{}", cluster.logs()));
    let world = cluster.client(owner);
    let running = world.wait_status(id, "running");
    assert_eq!(running["node"], name(owner), "{running}");
    assert!(epoch(world, id) > former.epoch);
    owner
}

fn judge(seen: &Report, former: &Guest, told: &Told) {
    let after = |at: Option<Instant>| at.map(|at| at.saturating_duration_since(told.began));
    let (frozen, gone) = (seen.frozen(former.vmm), seen.gone(former.vmm));
    let anew = seen.another(former.vmm);
    let (missing, elsewhere) = (Some(told.missing), Some(told.elsewhere));
    println!(
        "frozen after {:?}, missing after {:?}, dead after {:?}, elsewhere after {:?}, started \
         anew after {:?}, alive at once: {}",
        after(frozen),
        after(missing),
        after(gone),
        after(elsewhere),
        after(anew),
        seen.most()
    );
    let before = |first: Option<Instant>, then| first.is_some_and(|first| Some(first) < then);
    assert!(
        before(frozen, missing),
        "it ran when its node was called missing"
    );
    assert!(
        before(gone, elsewhere),
        "it lived when it was given to another node"
    );
    assert!(
        before(gone, anew) && seen.most() == 1,
        "two guests lived at once"
    );
}

//! A guest that goes on after a snapshot: the next one reads what was written since, and is of all of it.

use std::fs;

use node::pager::region::Region;
use node::shim::dirty::{Basis, DirtyList};
use proto::units::Mib;
use serde_json::{Value, json};
use wrenn_cluster_tests::contents::Contents;
use wrenn_cluster_tests::world::World;

use crate::fork_crash::store;
use crate::pause_crash::{act, goes_on};

/// KiB of each file in the guest.
const FILE_KIB: u32 = 1024;
/// KiB that it writes after its resume and before the first snapshot.
const BALLAST_KIB: u32 = 16 * 1024;
/// KiB of each that are written between two snapshots.
const WRITTEN_KIB: u32 = 64;
/// Memory of the guest.
const MEMORY: Mib = Mib(256);

#[test]
fn a_snapshot_of_a_guest_that_goes_on_reads_what_was_written_since_the_last_and_has_all() {
    let mut world = World::new();
    let id = world.capsule_with(&json!({ "memory_mb": MEMORY.0 }));
    let mut contents = Contents::make(&world, &id, FILE_KIB);
    act(&world, &id, "pause");
    act(&world, &id, "resume");
    goes_on(&world, &id, &contents);
    let ballast = format!("dd if=/dev/urandom of=/dev/shm/ballast bs=1024 count={BALLAST_KIB}");
    world.output(&id, &format!("{ballast} 2>&1"));
    let mut made = Vec::new();
    for round in 1..=3 {
        contents.rewrite(&world, &id, WRITTEN_KIB, round);
        let name = format!("round-{round}");
        named(&world, &id, &name);
        made.push((name, contents.clone(), listed(&world, &id)));
    }
    let lists = made.iter().map(|(.., list)| (list.basis(), list.bytes()));
    let lists: Vec<_> = lists.collect();
    println!("{lists:?}");
    let bases = [Basis::Parent, Basis::LastSeal, Basis::LastSeal];
    assert!(lists.iter().map(|it| it.0).eq(bases), "{lists:?}");
    let ballast = u64::from(BALLAST_KIB) << 10;
    assert!(lists[0].1 > ballast && lists[1].1 < ballast && lists[2].1 < ballast);
    for (name, contents, _) in &made {
        let started = world.capsule_with(&json!({ "template": name }));
        contents.are_there(&world, &started);
        world.destroy(&started);
    }

    // Nobody needs them any more but the guest, whose next seal is a change of the last.
    for (name, ..) in &made {
        let gone = world.call("DELETE", &format!("/v1/snapshots/{name}"), None);
        assert_eq!(gone.status, 204, "{}", gone.json());
    }
    contents.rewrite(&world, &id, WRITTEN_KIB, 4);
    let _collected = store(&world, "gc");
    world.kill();
    world.start();
    world.wait_status(&id, "running");
    let _collected = store(&world, "gc");
    act(&world, &id, "pause");
    act(&world, &id, "resume");
    goes_on(&world, &id, &contents);

    named(&world, &id, "lost");
    contents.rewrite(&world, &id, WRITTEN_KIB, 5);
    lose_last_seal(&world, &id);
    act(&world, &id, "pause");
    assert_eq!(listed(&world, &id).basis(), Basis::Parent);
    act(&world, &id, "resume");
    goes_on(&world, &id, &contents);
    world.destroy(&id);
}

fn named(world: &World, id: &str, name: &str) {
    let request = json!({ "sandbox_id": id, "name": name });
    let answer = world.call("POST", "/v1/snapshots", Some(&request));
    assert_eq!(answer.status, 201, "{}", answer.json());
}

/// Has the memory that a capsule was last sealed with go from the disk.
fn lose_last_seal(world: &World, id: &str) {
    let record = fs::read(world.sandbox_dir(id).join("sandbox.json")).expect("a record");
    let record: Value = serde_json::from_slice(&record).expect("JSON");
    let last_seal = record["last_seal"].as_str().expect("it went on");
    let manifest = world.data().join("store/images").join(last_seal);
    fs::remove_file(manifest).expect("its manifest");
}

/// What the last seal of a capsule read of its memory.
fn listed(world: &World, id: &str) -> DirtyList {
    let dir = world.data().join("sandboxes").join(id);
    DirtyList::read(&dir, Region::new(MEMORY)).expect("a list")
}

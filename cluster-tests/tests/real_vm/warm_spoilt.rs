//! A warm snapshot that is of no use costs one capsule some time, and nobody else: it is given up, and
//! the next guest that boots is kept in its place.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;

use serde_json::{Value, json};
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::world::World;

use crate::PATIENCE;

/// Said when a guest was kept, and when a start from it failed.
const KEPT: &str = "its kind start warm";
const FAILED: &str = "could not start warm; boots instead";
/// Said when it was given up: by the node that could not start from it, or by its last holder.
const GIVEN_UP: [&str; 2] = [
    "nothing is started from it any more",
    "the cluster is wrong about this node's copy",
];
/// The real hypervisor.
const QEMU: &str = "qemu-system-x86_64";
/// Bytes from one flipped byte to the next, and the head of each pack, which is left alone.
const APART: usize = 64 << 10;
const PACK_HEAD: u64 = 16;

#[test]
fn a_warm_snapshot_that_is_of_no_use_is_made_anew_and_tried_once() {
    let mut world = World::asleep();
    let refuses = refusing_qemu(&mut world);
    // What two capsules would take if they filled their disks, which they do not.
    let disk = ("WRENN_DISK_MIB".into(), "65536".into());
    world.environment.push(disk);
    world.start();
    is_made(&world, 1);

    fs::write(&refuses, "").expect("written");
    let first = world.call("POST", "/v1/capsules?wait=false", Some(&request()));
    assert_eq!(first.status, 202, "{}", first.json());
    said(&world, &[FAILED], 1);
    // While that one boots instead.
    let second = created(&world, "cold");
    let first = first.json()["id"].as_str().expect("an id").to_owned();
    let record = world.wait_status(&first, "running");
    assert_eq!(record["start"], "cold", "{record}");
    said(&world, &GIVEN_UP, 1);
    assert_eq!(times(&world, &[FAILED]), 1, "{}", world.log());
    fs::remove_file(&refuses).expect("removed");
    for id in [&first, &second] {
        world.destroy(id);
    }
    is_made(&world, 2);

    damage(&world);
    let third = created(&world, "cold");
    said(&world, &GIVEN_UP, 2);
    assert_eq!(times(&world, &[FAILED]), 2, "{}", world.log());
    world.destroy(&third);
    is_made(&world, 3);
}

/// Has `world` use a hypervisor that takes nothing that was saved, as long as the file is there that is
/// returned. It is a script, and there is no shell in the root of a VMM: so the node lacks a right
/// that it needs to make one.
fn refusing_qemu(world: &mut World) -> PathBuf {
    let (program, flag) = (world.dir().join("qemu"), world.dir().join("refuses"));
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *-incoming*) [ -e {} ] && exit 3 ;; esac\nexec {} \"$@\"\n",
        flag.display(),
        real_qemu().display()
    );
    fs::write(&program, script).expect("written");
    fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).expect("its mode");
    world.launcher = ["setpriv", "--bounding-set", "-mknod"]
        .map(str::to_owned)
        .into();
    let program = program.to_str().expect("a plain path");
    // Another hypervisor would take what was saved.
    let arguments = ["--warm-create", "true", "--vmm", "qemu", "--qemu", program];
    world.arguments = arguments.map(str::to_owned).into();
    flag
}

fn real_qemu() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).map(|dir| dir.join(QEMU));
    places.find(|it| it.is_file()).expect("QEMU is installed")
}

fn request() -> Value {
    json!({ "memory_mb": 256 })
}

/// A new capsule, which started in that way.
fn created(world: &World, way: &str) -> String {
    let id = world.capsule_with(&request());
    assert_eq!(world.record(&id)["start"], way, "{}", world.log());
    assert_eq!(world.output(&id, "hostname"), id);
    id
}

/// The next that boots is kept, the `count`th, for the one after it.
fn is_made(world: &World, count: usize) {
    let booted = created(world, "cold");
    said(world, &[KEPT], count);
    world.destroy(&booted);
    let warm = created(world, "warm");
    world.destroy(&warm);
}

fn times(world: &World, words: &[&str]) -> usize {
    let log = world.log();
    words.iter().map(|it| log.matches(it).count()).sum()
}

fn said(world: &World, words: &[&str], count: usize) {
    let said = wait_for(PATIENCE, || (times(world, words) >= count).then_some(()));
    assert!(said.is_some(), "{words:?}\n{}", world.log());
}

/// Turns one byte of each chunk or so over, in all packs.
fn damage(world: &World) {
    let packs = fs::read_dir(world.data().join("store/packs")).expect("packs");
    for pack in packs {
        let path = pack.expect("an entry").path();
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let file = file.expect("a pack");
        let length = file.metadata().expect("a file").len();
        for at in (PACK_HEAD..length).step_by(APART).skip(1) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).expect("a byte");
            file.write_all_at(&[!byte[0]], at).expect("written");
        }
    }
}

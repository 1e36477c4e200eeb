//! The daemon ends at each step of a snapshot with a name, of a fork and of a warm start. The next one
//! leads everything out of there: what was sealed and reported has its name or its forks, what was not
//! has none, nobody has lost anything, and nothing else is left.

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::{Value, json};
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::contents::Contents;
use wrenn_cluster_tests::world::{World, wrenn};

use crate::PATIENCE;
use crate::crash::{arm, recover};
use crate::pause_crash::{act, goes_on, is_sound};

/// KiB of each file in the guest.
const FILE_KIB: u32 = 1024;
/// KiB of each that are written between two checkpoints.
const WRITTEN_KIB: u32 = 64;
/// The places of a checkpoint, and whether it has come about after the next daemon has seen to it. One
/// that had not begun to save begins again; of one that had, nobody was told, and the guest goes on.
const CHECKPOINT: [(&str, bool); 7] = [
    ("seal.quiesced", true),
    ("seal.saved", false),
    ("seal.stored", false),
    ("seal.finished", false),
    ("thaw.asked", true),
    ("thaw.noted", true),
    ("thaw.vmm", true),
];
/// The places of a fork's own start. Nothing of it was told to anybody, so it begins again.
const START: [&str; 7] = [
    "resume.fetched",
    "create.slot-recorded",
    "resume.files",
    "create.vmm",
    "resume.thawed",
    "resume.restored",
    "resume.ready",
];
/// The places at which a guest that has just booted is kept for others, or was.
const KEEP_WARM: [&str; 5] = [
    "seal.quiesced",
    "seal.finished",
    "warm.thawed",
    "create.guest",
    "warm.told",
];
/// The places of a start from it.
const START_WARM: [&str; 3] = ["create.vmm", "resume.restored", "resume.ready"];
/// Memory of the first kind of guest; each further one has a little more.
const MEMORY_MB: u32 = 256;

#[test]
fn i4_a_checkpoint_cut_off_at_any_step_is_whole_or_nowhere_and_costs_nothing() {
    let mut world = World::new();
    let id = world.capsule();
    let mut contents = Contents::make(&world, &id, FILE_KIB);
    // Of a guest that was resumed each seal is a change of the last.
    act(&world, &id, "pause");
    act(&world, &id, "resume");
    goes_on(&world, &id, &contents);
    let mut named = BTreeSet::new();
    for (round, (place, is_made)) in (1..).zip(CHECKPOINT) {
        contents.rewrite(&world, &id, WRITTEN_KIB, round);
        let body = json!({ "sandbox_id": id, "name": place });
        die_at(&mut world, place, "/v1/snapshots", &body);
        runs_again(&world, place, &id, &contents);
        if is_made {
            named.insert(place.to_owned());
        }
        let seen = wait_for(PATIENCE, || (names(&world) == named).then_some(()));
        assert!(
            seen.is_some(),
            "{place}: {:?}\n{}",
            names(&world),
            world.log()
        );
    }
    for (place, is_made) in [CHECKPOINT[0], CHECKPOINT[3], CHECKPOINT[4]] {
        die_at(
            &mut world,
            place,
            &format!("/v1/capsules/{id}/fork"),
            &json!({}),
        );
        runs_again(&world, place, &id, &contents);
        forks_are(&world, place, &id, &contents, is_made);
    }
    // Made at the last moment, whole all the same.
    let started = world.capsule_with(&json!({ "template": "thaw.vmm" }));
    contents.are_there(&world, &started);
    world.destroy(&started);
    for name in &named {
        let gone = world.call("DELETE", &format!("/v1/snapshots/{name}"), None);
        assert_eq!(gone.status, 204, "{name}");
    }
    world.destroy(&id);
    nothing_is_left(&mut world, 0);
}

#[test]
fn i4_a_fork_cut_off_at_any_step_starts_in_the_end_and_costs_its_origin_nothing() {
    let mut world = World::new();
    let id = world.capsule();
    let contents = Contents::make(&world, &id, FILE_KIB);
    act(&world, &id, "pause");
    for place in START {
        die_at(
            &mut world,
            place,
            &format!("/v1/capsules/{id}/fork"),
            &json!({}),
        );
        assert_eq!(world.record(&id)["status"], "paused", "{place}");
        forks_are(&world, place, &id, &contents, true);
    }
    act(&world, &id, "resume");
    goes_on(&world, &id, &contents);
    world.destroy(&id);
    nothing_is_left(&mut world, 0);
}

#[test]
fn i4_a_warm_start_cut_off_at_any_step_costs_no_capsule_its_start() {
    let mut world = World::asleep();
    world.arguments = ["--warm-create", "true"].map(str::to_owned).into();
    world.start();
    for (kind, place) in (0..).zip(KEEP_WARM) {
        let request = json!({ "memory_mb": MEMORY_MB + 8 * kind });
        die_at(&mut world, place, "/v1/capsules", &request);
        works(&world, place);
        // By now, or by one more that boots, there is one to start from.
        warm(&world, place, &request);
    }
    let request = json!({ "memory_mb": MEMORY_MB });
    for place in START_WARM {
        die_at(&mut world, place, "/v1/capsules", &request);
        works(&world, place);
    }
    warm(&world, "all of them", &request);
    // One of each kind, and of what was sealed in vain nothing.
    nothing_is_left(&mut world, KEEP_WARM.len());
}

/// Sends a request that the daemon does not survive at `place`, and starts the next.
fn die_at(world: &mut World, place: &str, path: &str, body: &Value) {
    world.stop();
    arm(world, place);
    let answer = world.try_call("POST", path, Some(body));
    // What was sealed for others is told of after the answer.
    let answered = answer.is_some() && place == "warm.told";
    assert!(answer.is_none() || answered, "{place}: {answer:?}");
    recover(world, place);
}

fn runs_again(world: &World, place: &str, id: &str, contents: &Contents) {
    let runs = wait_for(PATIENCE, || {
        (world.record(id)["status"] == "running").then_some(())
    });
    assert!(
        runs.is_some(),
        "{place}: {}\n{}",
        world.record(id),
        world.log()
    );
    contents_of(world, id, contents);
}

fn contents_of(world: &World, id: &str, contents: &Contents) {
    // The record says that it runs before a guest that stood still is told to go on.
    let served = wait_for(PATIENCE, || {
        let answer = world.run(id, &json!({ "cmd": "true" }));
        (answer.status == 200).then_some(())
    });
    assert!(served.is_some(), "{}", world.log());
    contents.are_there(world, id);
}

/// The names of this team's snapshots.
fn names(world: &World) -> BTreeSet<String> {
    let listed = world
        .call("GET", "/v1/snapshots?type=snapshot", None)
        .json();
    let listed = listed.as_array().into_iter().flatten();
    listed
        .filter_map(|it| it["name"].as_str().map(str::to_owned))
        .collect()
}

/// There is one capsule besides `origin`, or none; it has all that the origin had, and goes.
fn forks_are(world: &World, place: &str, origin: &str, contents: &Contents, expected: bool) {
    let mut others = world.listed();
    others.retain(|id| id != origin);
    assert_eq!(
        others.len(),
        usize::from(expected),
        "{place}\n{}",
        world.log()
    );
    for fork in &others {
        let record = world.wait_decided(fork);
        assert_eq!(
            record["status"],
            "running",
            "{place}: {record}\n{}",
            world.log()
        );
        contents.are_there(world, fork);
        assert_eq!(world.output(fork, "hostname"), *fork, "{place}");
        world.destroy(fork);
    }
    let is_running = world.record(origin)["status"] == "running";
    let live: Vec<&str> = is_running.then_some(origin).into_iter().collect();
    world.wait_only(&live);
}

/// The one capsule that the recovered daemon knows runs as itself, and goes.
fn works(world: &World, place: &str) {
    let listed = world.listed();
    let [id] = &listed[..] else {
        panic!("{place}: {listed:?}\n{}", world.log());
    };
    let record = world.wait_decided(id);
    assert_eq!(
        record["status"],
        "running",
        "{place}: {record}\n{}",
        world.log()
    );
    assert_eq!(world.output(id, "hostname"), *id, "{place}");
    world.wait_only(&[id]);
    world.destroy(id);
    world.wait_only(&[]);
}

/// A capsule of this kind starts warm, the second one at the latest.
fn warm(world: &World, place: &str, request: &Value) {
    let told = || world.log().matches("its kind start warm").count();
    let before = told();
    for may_boot in [true, false] {
        let id = world.capsule_with(request);
        let start = world.record(&id)["start"].clone();
        assert_eq!(world.output(&id, "hostname"), id, "{place}");
        if start == "cold" && may_boot {
            // A moment after it runs, and not of one that has ended.
            let known = wait_for(PATIENCE, || (told() > before).then_some(()));
            assert!(known.is_some(), "{place}\n{}", world.log());
        }
        world.destroy(&id);
        if start == "warm" {
            return;
        }
    }
    panic!("{place}: none starts warm\n{}", world.log());
}

/// What a chore of the store says.
pub(crate) fn store(world: &World, chore: &str) -> Value {
    let asked = Command::new(wrenn())
        .args(["--json", "store", chore, "--data-dir"])
        .arg(world.data())
        .output()
        .expect("the wrenn binary runs");
    let said = String::from_utf8_lossy(&asked.stderr).into_owned();
    assert!(asked.status.success(), "{chore}: {said}");
    serde_json::from_slice(&asked.stdout).expect("JSON")
}

/// After a collection the store has `snapshots`, which is sound, and the host nothing.
fn nothing_is_left(world: &mut World, snapshots: usize) {
    world.wait_only(&[]);
    let _collected = store(world, "gc");
    let stats = store(world, "stats");
    assert_eq!(stats["snapshots"], snapshots, "{stats}\n{}", world.log());
    if snapshots == 0 {
        assert_eq!(stats["images"], 0, "{stats}");
    }
    world.stop();
    is_sound(world);
}

//! The daemon ends at each step of a create and of a release, as a power cut of the daemon alone
//! would end it; the next one makes good.

use serde_json::json;
use wrenn_cluster_tests::client::{command_line, is_vmm};
use wrenn_cluster_tests::world::World;

/// The variable that makes the daemon abort at a place.
const ABORT: &str = "WRENN_FAULT_ABORT";
/// Places of a create at which no VMM has been started yet.
const BEFORE_VMM: [&str; 4] = [
    "create.record",
    "create.slot-taken",
    "create.slot-recorded",
    "create.disk",
];
/// Those after it.
const AFTER_VMM: [&str; 2] = ["create.vmm", "create.guest"];
/// The places of a release.
const RELEASE: [&str; 2] = ["release.vmm", "release.slot"];

/// Starts the daemon so that it aborts at `place`.
pub(crate) fn arm(world: &mut World, place: &str) {
    world.environment = vec![(ABORT.to_owned(), place.to_owned())];
    world.start();
}

/// Waits until the daemon has aborted, and starts one that does not.
pub(crate) fn recover(world: &mut World, place: &str) {
    let status = world.wait_end();
    assert!(!status.success(), "{place}: {status}");
    eprintln!("{place}: left {:#?}", world.footprint());
    world.environment.clear();
    world.start();
}

/// Creates a capsule whose create the daemon does not survive.
fn create_in_vain(world: &World) {
    let request = json!({ "memory_mb": 256 });
    let answer = world.try_call("POST", "/v1/capsules", Some(&request));
    assert_eq!(answer, None, "the daemon answered");
}

/// The one capsule that the recovered daemon knows.
fn survivor(world: &World, place: &str) -> String {
    let listed = world.listed();
    assert_eq!(listed.len(), 1, "{place}: {listed:?}\n{}", world.log());
    listed[0].clone()
}

/// A capsule that was accepted runs in the end; nothing is left of the first attempt.
fn works(world: &World, place: &str, id: &str) {
    let record = world.wait_decided(id);
    assert_eq!(
        record["status"],
        "running",
        "{place}: {record}\n{}",
        world.log()
    );
    assert_eq!(world.output(id, "echo alive"), "alive");
    world.wait_only(&[id]);
    world.destroy(id);
    world.wait_only(&[]);
}

#[test]
fn a_create_cut_off_before_its_vmm_starts_over_and_leaves_nothing() {
    let mut world = World::asleep();
    for place in BEFORE_VMM {
        arm(&mut world, place);
        create_in_vain(&world);
        recover(&mut world, place);
        let id = survivor(&world, place);
        works(&world, place, &id);
        world.stop();
    }
}

#[test]
fn a_create_cut_off_after_its_vmm_started_goes_on_with_it() {
    let mut world = World::asleep();
    for place in AFTER_VMM {
        arm(&mut world, place);
        create_in_vain(&world);
        let status = world.wait_end();
        assert!(!status.success(), "{place}: {status}");
        let vmm = only_vmm(&world);
        world.environment.clear();
        world.start();
        let id = survivor(&world, place);
        world.wait_status(&id, "running");
        assert_eq!(world.vmm_pid(&id), vmm, "{place}");
        works(&world, place, &id);
        world.stop();
    }
}

/// The process id of the one VMM that this world has.
fn only_vmm(world: &World) -> u32 {
    let footprint = world.footprint();
    let processes = footprint.iter().filter_map(|trace| {
        let rest = trace.strip_prefix("process ")?;
        rest.split_whitespace().next()?.parse::<u32>().ok()
    });
    let mut vmms = processes.filter(|pid| is_vmm(&command_line(*pid)));
    let vmm = vmms.next().expect("a VMM");
    assert_eq!(vmms.next(), None, "a second VMM");
    vmm
}

#[test]
fn a_release_cut_off_is_finished_by_the_next_daemon() {
    let mut world = World::asleep();
    for place in RELEASE {
        arm(&mut world, place);
        let id = world.capsule();
        let answer = world.try_call("DELETE", &format!("/v1/capsules/{id}"), None);
        assert_eq!(answer, None, "the daemon answered");
        recover(&mut world, place);
        assert_eq!(world.wait_ended(&id)["status"], "stopped", "{place}");
        assert!(world.listed().is_empty());
        world.wait_only(&[]);
        world.stop();
    }
}

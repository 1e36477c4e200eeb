//! The daemon ends at each step of a pause and of a resume, as a power cut of the daemon alone would
//! end it; the next one leads the capsule out of there, with all it had, and leaves nothing else.

use std::process::Command;

use serde_json::json;
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::contents::Contents;
use wrenn_cluster_tests::world::{World, wrenn};

use crate::PATIENCE;
use crate::crash::{arm, recover};

/// KiB of each file in the guest.
const FILE_KIB: u32 = 1024;
/// The places of a pause, and how the capsule is after the next daemon has seen to it. A guest that
/// stands still, whose seal was not reported, goes on.
const PAUSE: [(&str, &str); 6] = [
    ("seal.quiesced", "paused"),
    ("seal.saved", "running"),
    ("seal.stored", "running"),
    ("seal.finished", "running"),
    ("release.vmm", "paused"),
    ("release.slot", "paused"),
];
/// The same of a resume. A guest that may have run, and was not known to be right, is ended.
const RESUME: [(&str, &str); 7] = [
    ("resume.fetched", "running"),
    ("create.slot-recorded", "running"),
    ("resume.files", "running"),
    ("create.vmm", "paused"),
    ("resume.thawed", "paused"),
    ("resume.restored", "paused"),
    ("resume.ready", "running"),
];

#[test]
fn i4_a_pause_or_resume_cut_off_at_any_step_costs_the_capsule_nothing() {
    let mut world = World::new();
    let id = world.capsule();
    let contents = Contents::make(&world, &id, FILE_KIB);
    for (place, then) in PAUSE {
        cut_off(&mut world, &id, "pause", (place, then));
        if then == "paused" {
            act(&world, &id, "resume");
        }
        goes_on(&world, &id, &contents);
    }
    for (place, then) in RESUME {
        act(&world, &id, "pause");
        cut_off(&mut world, &id, "resume", (place, then));
        if then == "paused" {
            act(&world, &id, "resume");
        }
        goes_on(&world, &id, &contents);
    }
    world.destroy(&id);
    world.wait_only(&[]);
    world.stop();
    is_sound(&world);
}

/// Asks for a pause or a resume that the daemon does not survive at `place`, and starts the next.
fn cut_off(world: &mut World, id: &str, what: &str, (place, then): (&str, &str)) {
    world.stop();
    arm(world, place);
    let wanted = if what == "pause" { "running" } else { "paused" };
    world.wait_status(id, wanted);
    let answer = world.try_call("POST", &format!("/v1/capsules/{id}/{what}"), None);
    // What is released is released after the answer.
    let answered = answer.is_some() && place.starts_with("release");
    assert!(answer.is_none() || answered, "{place}: {answer:?}");
    recover(world, place);
    let settled = wait_for(PATIENCE, || {
        (world.record(id)["status"] == then).then_some(())
    });
    let record = world.record(id);
    assert!(settled.is_some(), "{place}: {record}\n{}", world.log());
    let live: Vec<&str> = (then == "running").then_some(id).into_iter().collect();
    world.wait_only(&live);
    assert_eq!(world.record(id)["status"], then, "{place}: {record}");
}

pub(crate) fn act(world: &World, id: &str, what: &str) {
    let answer = world.about("POST", id, &format!("/{what}"), None);
    assert_eq!(answer.status, 200, "{}\n{}", answer.json(), world.log());
}

pub(crate) fn goes_on(world: &World, id: &str, contents: &Contents) {
    // The record says that it runs before a guest that stood still is told to go on.
    let served = wait_for(PATIENCE, || {
        let answer = world.run(id, &json!({ "cmd": "true" }));
        let waits = answer.refusal() == (503, "host_unavailable".into());
        assert!(waits || answer.status == 200, "{}", answer.json());
        (!waits).then_some(())
    });
    assert!(served.is_some(), "{}", world.log());
    contents.are_there(world, id);
    world.wait_only(&[id]);
}

pub(crate) fn is_sound(world: &World) {
    let checked = Command::new(wrenn())
        .args(["store", "check", "--data-dir"])
        .arg(world.data())
        .output()
        .expect("the wrenn binary runs");
    let said = String::from_utf8_lossy(&checked.stderr);
    assert!(checked.status.success(), "{said}");
}

//! A request under way when its capsule is paused, destroyed or killed is told so.

use std::thread;

use nix::sys::signal::Signal;
use serde_json::json;
use wrenn_cluster_tests::client::{Answer, wait_for};
use wrenn_cluster_tests::world::{World, signal};

use crate::PATIENCE;
use crate::pause_crash::act;

#[test]
fn what_the_end_of_a_run_cuts_off_is_told_why() {
    let world = World::new();
    let id = world.capsule();
    let paused = cut_off(&world, &id, || act(&world, &id, "pause"));
    assert_eq!(paused.refusal(), (409, "invalid_state".into()));
    assert_eq!(paused.json()["error"]["detail"], "capsule_paused");

    act(&world, &id, "resume");
    // It went on, and nobody watches it any more.
    let runs = world.about("GET", &id, "/processes", None).json();
    assert_eq!(runs["processes"][0]["cmd"], "sleep", "{runs}");
    let ended = cut_off(&world, &id, || world.destroy(&id));
    assert_eq!(ended.refusal(), (409, "invalid_state".into()));
    assert_eq!(ended.json()["error"]["detail"], "capsule_ended");

    let other = world.capsule();
    let kill = || signal(world.vmm_pid(&other), Signal::SIGKILL);
    let broken = cut_off(&world, &other, kill);
    assert_eq!(broken.refusal(), (502, "agent_error".into()));
    assert!(
        broken.message().contains("signal 9"),
        "{}",
        broken.message()
    );
}

/// The answer to a command that `then` cuts off.
fn cut_off(world: &World, id: &str, then: impl FnOnce()) -> Answer {
    let sleeping = || {
        let runs = world.about("GET", id, "/processes", None).json();
        runs["processes"].as_array().map_or(0, Vec::len)
    };
    let before = sleeping();
    thread::scope(|scope| {
        let body = json!({ "cmd": "sleep", "args": ["1000"], "timeout_sec": 600 });
        let answer = scope.spawn(move || world.run(id, &body));
        let begun = wait_for(PATIENCE, || (sleeping() > before).then_some(()));
        assert!(begun.is_some(), "{}", world.log());
        then();
        answer.join().expect("an answer")
    })
}

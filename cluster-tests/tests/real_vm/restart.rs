//! Starts that must fail, and one that must not although its derived state is gone.

use std::fs;
use std::net::TcpListener;
use std::process::Stdio;

use wrenn_cluster_tests::world::World;

/// Starts a daemon that must give up; returns what it says.
fn refusal(world: &mut World) -> String {
    let before = world.log().len();
    world.spawn();
    let status = world.wait_end();
    assert!(!status.success(), "it did not complain");
    world.log().split_off(before)
}

#[test]
fn a_start_that_cannot_succeed_says_why_and_changes_nothing() {
    let mut world = World::new();
    let key = world.key();
    second_daemon(&world);
    world.stop();

    let port = TcpListener::bind(("127.0.0.1", world.port())).expect("a free port");
    let said = refusal(&mut world);
    let address = format!("listen on 127.0.0.1:{}", world.port());
    assert!(said.contains(&address) && said.contains("in use"), "{said}");
    drop(port);

    let version = world.data().join("version");
    let written = fs::read(&version).expect("a version");
    fs::write(&version, "9999\n").expect("a file");
    let said = refusal(&mut world);
    assert!(said.contains("version") && said.contains("9999"), "{said}");
    fs::write(&version, written).expect("a file");

    world.start();
    assert_eq!(world.key(), key);
    assert!(world.listed().is_empty());
    world.wait_only(&[]);
}

/// Another daemon on the data directory of a running one, with the same settings.
fn second_daemon(world: &World) {
    let refused = world
        .command()
        .stdin(Stdio::null())
        .output()
        .expect("the wrenn binary runs");
    assert!(!refused.status.success());
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("in use"), "{said}");
    assert_eq!(world.get("/healthz").map(|it| it.status), Some(200));
}

#[test]
fn derived_state_that_is_lost_is_rebuilt_from_the_log() {
    let mut world = World::new();
    let (running, ended) = (world.capsule(), world.capsule());
    world.destroy(&ended);
    let before = (world.record(&running)["created_at"].clone(), world.key());
    world.stop();
    fs::remove_dir_all(world.data().join("state")).expect("derived state");
    world.start();
    assert_eq!(
        world.wait_status(&running, "running")["created_at"],
        before.0
    );
    assert_eq!(world.record(&ended)["status"], "stopped");
    assert_eq!(world.key(), before.1);
    assert_eq!(world.listed(), std::slice::from_ref(&running));
    assert_eq!(world.output(&running, "echo known"), "known");
    world.wait_only(&[&running]);
}

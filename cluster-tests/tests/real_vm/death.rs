//! Guests, VMMs and shims that end without being asked to, and VMMs that never begin.

use std::fs;
use std::os::unix::fs::symlink;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::world::{World, lives, signal};

use crate::PATIENCE;

/// Waits for the end of a capsule and returns its status and reason.
fn end_of(world: &World, id: &str) -> (String, String) {
    let record = world.wait_ended(id);
    let text = |name: &str| record[name].as_str().unwrap_or_default().to_owned();
    (text("status"), text("reason"))
}

fn is_refused_now(world: &World, id: &str) {
    let ran = world.run(id, &json!({ "cmd": "true" }));
    assert_eq!(
        ran.refusal(),
        (409, "invalid_state".into()),
        "{}",
        ran.message()
    );
    assert_eq!(world.about("DELETE", id, "", None).status, 204);
}

#[test]
fn a_killed_vmm_or_shim_is_an_error_with_its_reason_and_frees_everything() {
    let world = World::new();
    let (first, second, bystander) = (world.capsule(), world.capsule(), world.capsule());

    signal(world.vmm_pid(&first), Signal::SIGKILL);
    let (status, reason) = end_of(&world, &first);
    assert_eq!(status, "error");
    assert!(reason.contains("killed by signal 9"), "{reason}");

    let (vmm, shim) = (world.vmm_pid(&second), world.shim_pid(&second));
    signal(shim, Signal::SIGKILL);
    assert!(
        wait_for(PATIENCE, || (!lives(vmm)).then_some(())).is_some(),
        "the VMM outlived its shim"
    );
    let (status, reason) = end_of(&world, &second);
    assert_eq!(status, "error");
    assert!(reason.contains("shim was killed"), "{reason}");

    is_refused_now(&world, &first);
    is_refused_now(&world, &second);
    world.wait_only(&[&bystander]);
    assert_eq!(world.output(&bystander, "echo unmoved"), "unmoved");
}

#[test]
fn a_guest_that_powers_off_or_reboots_is_stopped_and_says_so() {
    let world = World::new();
    for key in ["o", "b"] {
        let id = world.capsule();
        // As `poweroff -f` and `reboot -f` do, without a word to the first process.
        let line = format!("echo {key} > /proc/sysrq-trigger");
        let request = json!({ "cmd": "/bin/sh", "args": ["-c", line], "background": true });
        let asked = world.run(&id, &request);
        // It may end before it has answered.
        assert!(matches!(asked.status, 202 | 409 | 502), "{}", asked.json());
        let (status, reason) = end_of(&world, &id);
        assert_eq!(status, "stopped", "{reason}");
        assert!(reason.contains("powered itself off"), "{reason}");
        is_refused_now(&world, &id);
    }
    world.wait_only(&[]);
}

#[test]
fn a_guest_whose_kernel_panics_ends_with_a_reason() {
    let world = World::new();
    let id = world.capsule();
    let line = "echo c > /proc/sysrq-trigger";
    let request = json!({ "cmd": "/bin/sh", "args": ["-c", line], "timeout_sec": 60 });
    let asked = world.run(&id, &request);
    // Its machine is told to end where others start again.
    assert_eq!(
        asked.refusal(),
        (409, "invalid_state".into()),
        "{}",
        asked.json()
    );
    let (_, reason) = end_of(&world, &id);
    assert_ne!(reason, "");
    world.wait_only(&[]);
}

#[test]
fn a_vmm_that_cannot_start_fails_its_create_and_nothing_else() {
    let mut world = World::asleep();
    let program = world.dir().join("qemu");
    let real = which("qemu-system-x86_64");
    symlink(&real, &program).expect("a link");
    // Another hypervisor would not be broken by this.
    let program_text = program.display().to_string();
    world.arguments = ["--vmm", "qemu", "--qemu", &program_text]
        .map(str::to_owned)
        .into();
    world.start();

    let replace = |with: &str| {
        fs::remove_file(&program).expect("the link is there");
        symlink(with, &program).expect("a link");
    };
    for broken in ["/bin/false", "/nonexistent"] {
        replace(broken);
        let created = world.call("POST", "/v1/capsules", Some(&json!({ "memory_mb": 256 })));
        assert_eq!(
            created.refusal(),
            (502, "agent_error".into()),
            "{}",
            created.json()
        );
        assert!(created.message().contains("VMM"), "{}", created.message());
        assert!(world.listed().is_empty());
        world.wait_only(&[]);
    }

    let unknown = json!({ "template": "no-such-template" });
    let created = world.call("POST", "/v1/capsules", Some(&unknown));
    assert_eq!(created.refusal(), (404, "not_found".into()));

    replace(&real);
    let id = world.capsule();
    assert_eq!(world.output(&id, "echo recovered"), "recovered");
    assert_eq!(world.listed(), [id]);
}

/// Where a program lies.
fn which(program: &str) -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut places = path.split(':').map(|dir| format!("{dir}/{program}"));
    places
        .find(|place| fs::exists(place).unwrap_or(false))
        .expect("QEMU is installed")
}

#[test]
fn a_full_guest_disk_is_reported_and_leaves_the_capsule_usable() {
    let world = World::new();
    let id = world.capsule();
    // A file system of 1 MiB takes no 2 MiB; filling the root disk would take minutes.
    world.output(&id, "mkdir /small && mount -t tmpfs -o size=1m none /small");
    let answer = world.upload(&id, "files/stream/write", "/small/file", &vec![7; 2 << 20]);
    assert_eq!(
        answer.refusal(),
        (502, "agent_error".into()),
        "{}",
        answer.message()
    );
    assert_eq!(answer.json()["error"]["detail"], Value::from("no_space"));
    assert_eq!(world.output(&id, "echo usable"), "usable");
}

#[test]
fn a_capsule_destroyed_while_it_boots_leaves_nothing() {
    let world = World::new();
    let id = world.booting_capsule();
    assert_eq!(world.about("DELETE", &id, "", None).status, 204);
    assert_eq!(world.record(&id)["status"], "stopped");
    world.wait_only(&[]);
}

#[test]
fn a_guest_that_does_not_get_ready_in_time_fails_its_create() {
    let mut world = World::asleep();
    // No emulated guest makes it in this time.
    world.arguments = ["--boot-timeout", "1s"].map(str::to_owned).into();
    world.start();
    let created = world.call("POST", "/v1/capsules", Some(&json!({ "memory_mb": 256 })));
    assert_eq!(
        created.refusal(),
        (502, "agent_error".into()),
        "{}",
        created.json()
    );
    assert!(created.message().contains("guest"), "{}", created.message());
    assert!(world.listed().is_empty());
    world.wait_only(&[]);
}

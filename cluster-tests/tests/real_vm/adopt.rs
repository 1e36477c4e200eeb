//! A daemon that ends leaves its capsules running, and the next one retakes them.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use wrenn_cluster_tests::world::{World, signal};

#[test]
fn capsules_outlive_the_daemon_however_it_ends() {
    let mut world = World::new();
    let id = world.capsule();
    let (vmm, shim, key) = (world.vmm_pid(&id), world.shim_pid(&id), world.key());
    let started = world.run(
        &id,
        &json!({ "cmd": "sleep", "args": ["100000"], "background": true, "tag": "kept" }),
    );
    assert_eq!(started.status, 202, "{}", started.json());
    world.output(&id, "echo kept > /root/kept");
    let before = lasting(&world.record(&id));

    for end in [World::kill, World::stop] {
        end(&mut world);
        // Nothing but the daemon is gone.
        assert_eq!((world.vmm_pid(&id), world.shim_pid(&id)), (vmm, shim));
        world.start();
        world.wait_status(&id, "running");
        assert_eq!((world.vmm_pid(&id), world.shim_pid(&id)), (vmm, shim));
        assert_eq!(lasting(&world.record(&id)), before);
        assert_eq!(world.key(), key);
        assert_eq!(world.output(&id, "cat /root/kept"), "kept");
        let processes = world.about("GET", &id, "/processes", None).json();
        assert_eq!(processes["processes"][0]["tag"], "kept", "{processes}");
        assert_eq!(processes["processes"][0]["pid"], started.json()["pid"]);
        world.wait_only(&[&id]);
    }

    // What was retaken is ended as any other, and its slot can be given out again.
    world.destroy(&id);
    world.wait_only(&[]);
}

/// What of a capsule's record must not change by a restart.
fn lasting(record: &Value) -> Value {
    let fields = [
        "id",
        "status",
        "created_at",
        "started_at",
        "metadata",
        "node",
        "memory_mb",
    ];
    fields.iter().map(|name| record[name].clone()).collect()
}

#[test]
fn a_capsule_that_died_while_the_daemon_was_down_is_told_of_after_its_restart() {
    let mut world = World::new();
    let (by_vmm, by_shim) = (world.capsule(), world.capsule());
    world.kill();
    signal(world.vmm_pid(&by_vmm), Signal::SIGKILL);
    signal(world.shim_pid(&by_shim), Signal::SIGKILL);
    world.start();
    for id in [&by_vmm, &by_shim] {
        let record = world.wait_ended(id);
        assert_eq!(record["status"], "error", "{record}");
        assert_ne!(
            record["reason"].as_str().unwrap_or_default(),
            "",
            "{record}"
        );
    }
    world.wait_only(&[]);
}

#[test]
fn a_capsule_that_boots_while_the_daemon_ends_is_retaken_and_gets_ready() {
    let mut world = World::new();
    for end in [World::kill, World::stop] {
        let id = world.booting_capsule();
        let vmm = world.vmm_pid(&id);
        end(&mut world);
        world.start();
        world.wait_status(&id, "running");
        assert_eq!(world.vmm_pid(&id), vmm);
        assert_eq!(world.output(&id, "echo retaken"), "retaken");
        world.destroy(&id);
    }
    world.wait_only(&[]);
}

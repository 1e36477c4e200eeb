//! The Cloud Hypervisor driver with a real Cloud Hypervisor, without a shim: boot, save, go on,
//! bring back elsewhere, end.

mod ch_world;

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use ch_world::{End, Payload, World, content_of, soon};
use wrenn_node::vmm::probe::{ProbeError, ProbeRequest, probe};
use wrenn_node::vmm::{Driver, VmmError, VmmExit};

#[test]
fn a_guest_boots_and_ends_when_told() {
    let Some(world) = World::new() else { return };
    let guest = world.boot();
    let version = guest.vmm.version();
    assert!(
        version.starts_with("v53.") || version.starts_with("v54."),
        "{version}"
    );
    let hardware = guest.vmm.hardware().to_string();
    assert!(hardware.starts_with("cloud-hypervisor-5"), "{hardware}");
    guest.vmm.quit(soon()).expect("told");
    let exit = guest.vmm.wait(soon()).expect("waited").expect("ended");
    assert_eq!((exit.code, exit.reason.as_str()), (Some(0), "host-quit"));
}

#[test]
fn a_paused_guest_stands_still_and_both_orders_may_be_repeated() {
    let Some(world) = World::new() else { return };
    let guest = world.boot();
    for _ in 0..2 {
        guest.vmm.pause(soon()).expect("paused");
    }
    let before = content_of(&guest.memory);
    assert!(before == content_of(&guest.memory), "it moves");
    for _ in 0..2 {
        guest.vmm.resume(soon()).expect("goes on");
    }
    guest.await_round(guest.round() + 2);
}

#[test]
fn a_guest_that_resets_itself_or_switches_itself_off_ends_and_says_which() {
    for (end, reason) in [
        (End::Reset { after: 3 }, "guest-reset"),
        (End::PowerOff { after: 3 }, "guest-shutdown"),
    ] {
        let payload = Payload {
            end,
            ..Payload::default()
        };
        let Some(world) = World::with(payload) else {
            return;
        };
        let guest = world.boot();
        let exit = guest.vmm.wait(soon()).expect("waited").expect("ended");
        assert_eq!(exit.reason, reason, "{exit:?}");
        let starts = guest.said().matches("payload: up").count();
        assert_eq!(starts, 1, "it began anew");
    }
}

#[test]
fn a_saved_guest_goes_on_as_if_nothing_had_been_again_and_again() {
    let Some(world) = World::new() else { return };
    let guest = world.boot();
    for _ in 0..3 {
        let saved = guest.save();
        assert!(saved.memory == content_of(&guest.memory), "it moves");
        let again = guest.vmm.save_state(saved.state.as_fd(), soon());
        assert!(matches!(again, Err(VmmError::Save(_))), "{again:?}");
        guest.vmm.resume(soon()).expect("goes on");
        guest.await_round(saved.round + 2);
    }
}

#[test]
fn a_saved_guest_goes_on_in_another_vmm_where_it_was_for_generations() {
    let Some(mut world) = World::new() else {
        return;
    };
    let mut guest = world.boot();
    for generation in 0..3 {
        let saved = guest.save();
        drop(guest);
        world.move_disk(&format!("disk-{generation}.qcow2"));
        guest = world.incoming(&saved, saved.copied());
        let began = Instant::now();
        guest
            .vmm
            .load_state(saved.state.as_fd(), soon())
            .expect("loaded");
        eprintln!("generation {generation}: loaded in {:?}", began.elapsed());
        assert!(content_of(&guest.memory) == saved.memory, "it was touched");
        guest.vmm.resume(soon()).expect("goes on");
        guest.await_round(saved.round + 2);
        let said = guest.said();
        assert!(!said.contains("payload"), "it began anew: {said}");
    }
}

#[test]
fn a_vmm_that_is_killed_ends_a_save_at_once() {
    let Some(world) = World::new() else { return };
    let guest = world.boot();
    guest.vmm.kill().expect("killed");
    let began = Instant::now();
    let file = tempfile::tempfile().expect("tempfile");
    let failed = guest.vmm.save_state(file.as_fd(), soon());
    assert!(matches!(failed, Err(VmmError::Save(_))), "{failed:?}");
    assert!(began.elapsed() < Duration::from_secs(5));
    let exit = guest.vmm.wait(soon()).expect("waited").expect("ended");
    let killed = VmmExit {
        signal: Some(9),
        ..VmmExit::default()
    };
    assert_eq!(exit, killed);
}

/// The payload says nothing that the probe waits for, so the probe names what it saw: a guest that
/// ran, was saved, went on, and did not say its word.
#[test]
fn the_probe_saves_a_guest_and_tells_why_it_does_not_count() {
    let Some(world) = World::new() else { return };
    let request = ProbeRequest {
        driver: Driver::CloudHypervisor,
        program: world.spec.program.clone(),
        kernel: world.spec.kernel.clone(),
        initramfs: world.spec.initramfs.clone(),
        cache: Some(world.home.path().join("probe.json")),
        forgoable: true,
    };
    let refused = probe(&request).expect_err("not our guest");
    let told = refused.to_string();
    assert!(told.contains("did not say it runs"), "{told}");
    assert!(told.contains("round "), "it went on after its save: {told}");
    let began = Instant::now();
    let remembered = probe(&request).expect_err("as before");
    assert!(matches!(remembered, ProbeError::NoneWorks { .. }));
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "it was remembered"
    );
}

#[test]
fn a_program_that_is_not_cloud_hypervisor_is_refused_by_what_it_says() {
    let Some(world) = World::new() else { return };
    let request = ProbeRequest {
        driver: Driver::CloudHypervisor,
        program: "/usr/bin/as".into(),
        kernel: world.spec.kernel.clone(),
        initramfs: world.spec.initramfs.clone(),
        cache: None,
        forgoable: false,
    };
    let refused = probe(&request).expect_err("binutils");
    assert!(matches!(refused, ProbeError::Version { .. }), "{refused}");
}

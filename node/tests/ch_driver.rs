//! The Cloud Hypervisor driver with a real Cloud Hypervisor, without a shim: boot, save, go on,
//! bring back elsewhere, end.

mod ch_world;

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use ch_world::{End, Guest, Payload, World, content_of, counts_in, silent_program, soon};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use wrenn_node::pager::memory::GuestMemory;
use wrenn_node::vmm::probe::{ProbeError, ProbeRequest, probe};
use wrenn_node::vmm::{self, Driver, VmmError, VmmExit};

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

/// Waits until each processor beside the first has gone on from where it was in `before`.
fn await_counting(guest: &Guest, before: &[u32]) {
    let vcpus = u8::try_from(before.len() + 1).expect("few");
    let end = soon();
    loop {
        let now = counts_in(&content_of(&guest.memory), vcpus);
        let steps = now
            .iter()
            .zip(before)
            .map(|(now, then)| now.wrapping_sub(*then));
        if steps
            .clone()
            .all(|steps| (1..u32::MAX / 2).contains(&steps))
        {
            return;
        }
        assert!(Instant::now() < end, "{before:?}, then {now:?}");
    }
}

#[test]
fn all_processors_of_a_guest_stand_still_and_go_on_in_another_vmm() {
    let payload = Payload {
        vcpus: 3,
        ..Payload::default()
    };
    let Some(world) = World::with(payload) else {
        return;
    };
    let mut guest = world.boot();
    await_counting(&guest, &[0, 0]);
    for _ in 0..3 {
        let saved = guest.save();
        let counts = counts_in(&saved.memory, payload.vcpus);
        let later = counts_in(&content_of(&guest.memory), payload.vcpus);
        assert_eq!(counts, later, "one of them moves");
        drop(guest);
        guest = world.incoming(&saved, saved.copied());
        guest
            .vmm
            .load_state(saved.state.as_fd(), soon())
            .expect("loaded");
        let loaded = counts_in(&content_of(&guest.memory), payload.vcpus);
        assert_eq!(counts, loaded, "it ran before it was told");
        guest.vmm.resume(soon()).expect("goes on");
        await_counting(&guest, &counts);
        guest.await_round(saved.round + 2);
    }
}

/// Each order has its time. One that we have stopped ourselves, as for a lost lease, is to blame for
/// nothing, however long it lasts.
#[test]
fn a_vmm_that_is_stopped_holds_nobody_up_and_goes_on_later() {
    let Some(world) = World::new() else { return };
    let guest = world.boot();
    guest.vmm.freeze().expect("stopped");
    let brief = || Instant::now() + Duration::from_millis(100);
    let began = Instant::now();
    let file = tempfile::tempfile().expect("tempfile");
    let mut outcomes = vec![
        guest.vmm.pause(brief()),
        guest.vmm.save_state(file.as_fd(), brief()),
        guest.vmm.shutdown(brief()),
    ];
    outcomes.extend((0..4).map(|_| guest.vmm.resume(brief())));
    assert!(began.elapsed() < Duration::from_secs(5));
    for outcome in outcomes {
        let words = wrenn_node::base::chain::chain(&outcome.expect_err("it is silent"));
        assert!(words.contains("did not answer"), "{words}");
    }
    assert_eq!(guest.vmm.wait(brief()).expect("waited"), None);
    guest.vmm.thaw().expect("goes on");
    // It may still carry out what it was told, the button before all.
    guest.vmm.resume(soon()).expect("goes on");
    guest.await_round(guest.round() + 2);
}

/// Stopped from outside, as one that hangs.
#[test]
fn a_vmm_that_hangs_is_killed_at_the_third_order_to_go_on() {
    let Some(world) = World::new() else { return };
    let guest = world.boot();
    guest.vmm.pause(soon()).expect("paused");
    let pid = Pid::from_raw(i32::try_from(guest.vmm.pid()).expect("a pid"));
    kill(pid, Signal::SIGSTOP).expect("stopped");
    let brief = || Instant::now() + Duration::from_millis(200);
    for _ in 0..2 {
        guest.vmm.resume(brief()).expect_err("it is silent");
    }
    assert_eq!(guest.vmm.wait(brief()).expect("waited"), None);
    guest.vmm.resume(brief()).expect_err("it is silent");
    let exit = guest.vmm.wait(soon()).expect("waited").expect("ended");
    assert_eq!((exit.signal, exit.reason.as_str()), (Some(9), "vmm-silent"));
}

/// Its calls have no limit of its own: one that takes a guest in waits for ever.
#[test]
fn a_vmm_that_never_says_a_word_is_killed_when_its_time_is_over() {
    let Some(mut world) = World::new() else {
        return;
    };
    let guest = world.boot();
    let saved = guest.save();
    drop(guest);
    world.spec.program = silent_program(world.home.path());
    let name = format!("silent-{}", std::process::id());
    let memory = GuestMemory::create(world.spec.memory).expect("memory");
    let (ram, state) = (memory.as_fd(), saved.state.as_fd());
    let brief = || Instant::now() + Duration::from_millis(300);
    let began = Instant::now();
    let booted = vmm::spawn(&world.spec, &name, ram, brief()).map(drop);
    let (spec, hardware) = (&world.spec, &saved.hardware);
    let taken = vmm::spawn_incoming(spec, hardware, state, &name, ram, brief()).map(drop);
    assert!(began.elapsed() < Duration::from_secs(5));
    for outcome in [booted, taken] {
        let words = wrenn_node::base::chain::chain(&outcome.expect_err("it is silent"));
        assert!(words.contains("did not answer"), "{words}");
    }
    let processes = std::fs::read_dir("/proc").expect("listed").flatten();
    for process in processes {
        let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        assert!(!line.contains(&name), "it is left over: {line}");
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

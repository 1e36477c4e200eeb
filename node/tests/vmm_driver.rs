//! The QEMU driver by itself, without a shim around it.
//!
//! Ignored unless asked for: needs QEMU and the guest kernel (see `shim_support`).

mod shim_support;

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use shim_support::{BOOT, SOON, Sandbox, eventually, runs};
use wrenn_node::pager::memory::GuestMemory;
use wrenn_node::vmm::{self, Started, VmmError, VmmSpec};

fn soon() -> Instant {
    Instant::now() + SOON
}

fn start(spec: &VmmSpec) -> (GuestMemory, Started) {
    let memory = GuestMemory::create(spec.memory).expect("memory");
    let started = vmm::spawn(spec, "vmm-driver-test", memory.as_fd(), soon()).expect("up");
    (memory, started)
}

#[test]
#[ignore = "starts a real VMM"]
fn a_vmm_can_be_paused_resumed_and_asked_to_quit() {
    let spec = Sandbox::new().spec("test.deaf").vmm;
    let (_memory, Started { vmm, .. }) = start(&spec);
    for _ in 0..3 {
        vmm.pause(soon()).expect("paused");
        vmm.resume(soon()).expect("resumed");
    }
    assert_eq!(vmm.wait(Instant::now()).expect("asked"), None);
    vmm.quit(soon()).expect("told");
    let exit = vmm.wait(soon()).expect("asked").expect("ended");
    assert_eq!(
        (exit.code, exit.reason.as_str()),
        (Some(0), "host-qmp-quit")
    );
    // Dead is dead, and says so.
    assert!(matches!(vmm.pause(soon()), Err(VmmError::Told { .. })));
    vmm.kill().expect("killing a dead VMM is no error");
    assert_eq!(vmm.wait(soon()).expect("asked"), Some(exit));
}

#[test]
#[ignore = "boots a real guest"]
fn what_the_guest_writes_lies_in_its_owners_memory() {
    let spec = Sandbox::new().spec("test.deaf").vmm;
    let (memory, started) = start(&spec);
    let blocks = || {
        nix::sys::stat::fstat(memory.as_fd())
            .expect("fstat")
            .st_blocks
    };
    // A kernel that has unpacked itself has written some 40 MiB.
    let written = eventually(BOOT, || blocks() > 40 * 2048);
    assert!(written, "{} blocks", blocks());
    assert!(blocks() < 256 * 2048, "not touched ahead");
    let pid = started.vmm.pid();
    drop(started);
    assert!(!runs(pid), "a dropped VMM stays");
}

#[test]
#[ignore = "starts a real VMM"]
fn a_vmm_dies_with_the_thread_that_started_it() {
    let spec = Sandbox::new().spec("test.deaf").vmm;
    let (_memory, started) = std::thread::spawn(move || start(&spec))
        .join()
        .expect("started");
    let exit = started.vmm.wait(soon()).expect("asked").expect("ended");
    assert_eq!(exit.signal, Some(9));
}

#[test]
#[ignore = "starts a real VMM"]
fn a_frozen_vmm_is_told_of_by_deadline_and_can_be_killed() {
    let spec = Sandbox::new().spec("test.deaf").vmm;
    let (_memory, Started { vmm, .. }) = start(&spec);
    shim_support::signal(vmm.pid(), nix::sys::signal::Signal::SIGSTOP);
    let asked = Instant::now();
    let err = vmm
        .pause(asked + Duration::from_millis(100))
        .expect_err("silence");
    assert!(matches!(err, VmmError::Told { .. }), "{err}");
    assert!(asked.elapsed() < SOON);
    vmm.kill().expect("killed");
    assert_eq!(
        vmm.wait(soon()).expect("asked").expect("ended").signal,
        Some(9)
    );
}

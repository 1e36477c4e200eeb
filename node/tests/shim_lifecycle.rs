//! A shim and a real guest, from the first word on the console to every way it can end.
//!
//! Ignored unless asked for: needs QEMU and the guest kernel (see `shim_support`).

mod shim_support;

use std::time::Duration;

use nix::sys::signal::Signal;
use shim_support::{DISK_SECTORS, SOON, Sandbox, WRENN, eventually, runs, signal};
use tokio::time::Instant;
use wrenn_node::shim::client::{self, connect};
use wrenn_node::shim::discover::{FoundState, discover};
use wrenn_node::shim::error::CallShimError;
use wrenn_node::shim::exit::ExitRecord;

#[tokio::test]
#[ignore = "boots a real guest"]
async fn a_guest_boots_with_its_disk_and_the_shim_says_who_it_is() {
    let sandbox = Sandbox::new();
    let mut spec = sandbox.spec("");
    spec.vmm.root_disk = Some(sandbox.make_disk());
    spec.vmm.vcpus = 2;
    let shim = client::spawn(&sandbox.dir, &spec, WRENN.as_ref())
        .await
        .expect("up");
    let status = shim.status().await.expect("answers");
    assert_eq!(status.sandbox, sandbox.id);
    assert_eq!(status.epoch, spec.epoch);
    assert!(status.vmm_version.contains('.'), "{status:?}");
    assert!(runs(status.shim_pid) && runs(status.vmm_pid));
    sandbox.await_console(&format!("guest: disk {DISK_SECTORS}"));
    sandbox.await_console("guest: up");
}

#[tokio::test]
#[ignore = "boots a real guest"]
async fn a_guest_that_hears_its_button_powers_off_within_the_grace() {
    let sandbox = Sandbox::new();
    let shim = sandbox.start("").await;
    sandbox.await_console("guest: listening");
    let exit = shim.stop(Duration::from_secs(30)).await.expect("stopped");
    assert_eq!(exit.code, Some(0));
    assert!(exit.asked);
    assert_eq!(exit.reason, "guest-shutdown");
    sandbox.await_console("guest: button");
    assert_eq!(
        ExitRecord::read(&sandbox.dir).expect("readable"),
        Some(exit)
    );
}

#[tokio::test]
#[ignore = "boots a real guest"]
async fn a_deaf_guest_is_ended_when_the_grace_has_passed() {
    let sandbox = Sandbox::new();
    let shim = sandbox.start("test.deaf").await;
    sandbox.await_console("guest: up");
    let exit = shim
        .stop(Duration::from_millis(300))
        .await
        .expect("stopped");
    assert!(exit.asked);
    assert_eq!(exit.reason, "host-qmp-quit");
    let again = shim
        .stop(Duration::ZERO)
        .await
        .expect("stopping twice is no error");
    assert_eq!(again, exit);
}

#[tokio::test]
#[ignore = "boots a real guest"]
async fn a_guest_that_reboots_or_panics_ends_its_vmm() {
    for word in ["test.reboot", "test.panic"] {
        let sandbox = Sandbox::new();
        let shim = sandbox.start(word).await;
        let deadline = Instant::now() + shim_support::BOOT;
        let exit = shim
            .wait_exit(deadline)
            .await
            .expect("answers")
            .expect("ends");
        assert_eq!(
            (exit.code, exit.asked),
            (Some(0), false),
            "{word}: {exit:?}"
        );
        assert_eq!(exit.reason, "guest-reset", "{word}");
    }
}

#[tokio::test]
#[ignore = "starts a real VMM"]
async fn the_death_of_the_vmm_is_told_to_all_who_wait_and_recorded() {
    let sandbox = Sandbox::new();
    let shim = sandbox.start("test.deaf").await;
    let deadline = Instant::now() + SOON;
    let waiters: Vec<_> = (0..4)
        .map(|_| {
            let shim = shim.clone();
            tokio::spawn(async move { shim.wait_exit(deadline).await })
        })
        .collect();
    let status = shim.status().await.expect("answers");
    signal(status.vmm_pid, Signal::SIGKILL);
    for waiter in waiters {
        let exit = waiter
            .await
            .expect("no panic")
            .expect("answered")
            .expect("in time");
        assert_eq!((exit.code, exit.signal, exit.asked), (None, Some(9), false));
    }
    assert!(
        eventually(SOON, || !runs(status.shim_pid)),
        "the shim stays"
    );
    let found = discover(sandbox.parent()).await.expect("listed");
    assert!(matches!(found[0].state, FoundState::Exited(_)), "{found:?}");
    // Nobody answers any more, and yet the question has an answer.
    let late = shim
        .wait_exit(Instant::now() + SOON)
        .await
        .expect("from the file");
    assert_eq!(late.expect("recorded").signal, Some(9));
}

#[tokio::test]
#[ignore = "starts a real VMM"]
async fn a_killed_shim_takes_its_vmm_with_it() {
    let sandbox = Sandbox::new();
    let shim = sandbox.start("test.deaf").await;
    let status = shim.known_status().clone();
    signal(status.shim_pid, Signal::SIGKILL);
    assert!(eventually(SOON, || !runs(status.vmm_pid)), "the VMM stays");
    let err = shim
        .wait_exit(Instant::now() + SOON)
        .await
        .expect_err("nobody knows");
    assert!(matches!(err, CallShimError::Gone { .. }), "{err}");
    let found = discover(sandbox.parent()).await.expect("listed");
    assert!(
        matches!(found[0].state, FoundState::Dead { .. }),
        "{found:?}"
    );
    // The directory can be used again.
    let next = sandbox.start("test.deaf").await;
    assert_ne!(next.known_status().shim_pid, status.shim_pid);
}

#[tokio::test]
#[ignore = "starts a real VMM"]
async fn a_later_daemon_finds_the_same_processes() {
    let sandbox = Sandbox::new();
    let first = sandbox.start("test.deaf").await;
    let status = first.known_status().clone();
    drop(first);
    let found = discover(sandbox.parent()).await.expect("listed");
    let FoundState::Alive(adopted) = &found[0].state else {
        panic!("{found:?}");
    };
    assert_eq!(*adopted.known_status(), status);
    // Nothing of the daemon's session or family can take the shim down.
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", status.shim_pid)).expect("runs");
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .expect("stat")
        .split_whitespace()
        .collect();
    let (parent, session) = (fields[1], fields[3]);
    assert_ne!(parent, std::process::id().to_string());
    assert_eq!(session, status.shim_pid.to_string());
    let exit = adopted.stop(Duration::ZERO).await.expect("stopped");
    assert!(exit.asked);
    // It is gone, or says that it is going.
    let err = connect(&sandbox.dir).await.expect_err("not alive");
    assert!(
        matches!(
            err,
            CallShimError::Gone { .. } | CallShimError::Failed { .. }
        ),
        "{err}"
    );
}

#[tokio::test]
#[ignore = "boots a real guest"]
async fn a_guest_that_floods_its_console_costs_one_mib() {
    let sandbox = Sandbox::new();
    let shim = sandbox.start("test.flood").await;
    let older = sandbox.dir.join("console.log.1");
    assert!(
        eventually(shim_support::BOOT, || older.exists()),
        "no rotation"
    );
    for name in ["console.log", "console.log.1"] {
        let size = std::fs::metadata(sandbox.dir.join(name)).map_or(0, |meta| meta.len());
        assert!(size <= 512 * 1024, "{name} has {size} bytes");
    }
    let exit = shim
        .stop(Duration::ZERO)
        .await
        .expect("it can still be stopped");
    assert!(exit.asked);
}

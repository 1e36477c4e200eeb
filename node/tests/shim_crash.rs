//! A daemon that is killed, or gives up half way, leaves nothing that cannot be found and swept.
//!
//! Ignored unless asked for: needs QEMU and the guest kernel (see `shim_support`).

mod shim_support;

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use shim_support::{SOON, Sandbox, WRENN, eventually, runs};
use wrenn_node::shim::client::{self, connect};
use wrenn_node::shim::sweep::kill_leftovers;

#[tokio::test]
#[ignore = "starts a real VMM"]
async fn killing_the_daemons_whole_process_group_leaves_the_guest_running() {
    let sandbox = Sandbox::new();
    sandbox
        .spec("test.deaf")
        .write(&sandbox.dir)
        .expect("written");
    // A stand-in for the daemon: it starts a shim and goes on living.
    let script = format!("{WRENN} shim --dir {} && sleep 600", sandbox.dir.display());
    let mut daemon = Command::new("sh")
        .args(["-c", &script])
        .process_group(0)
        .spawn()
        .expect("sh runs");
    let up = eventually(SOON, || sandbox.dir.join("shim.sock").exists());
    let group = Pid::from_raw(i32::try_from(daemon.id()).expect("a pid"));
    killpg(group, Signal::SIGKILL).expect("killed");
    daemon.wait().expect("reaped");
    assert!(up, "the shim did not come up");
    let shim = connect(&sandbox.dir).await.expect("the shim answers");
    let status = shim.known_status();
    assert!(runs(status.vmm_pid) && runs(status.shim_pid));
    shim.stop(Duration::ZERO).await.expect("stopped");
}

#[tokio::test]
#[ignore = "starts real VMMs"]
async fn a_start_given_up_at_any_moment_can_be_swept_and_tried_again() {
    let sandbox = Sandbox::new();
    let spec = sandbox.spec("test.deaf");
    for millis in [1, 3, 5, 8, 12, 20, 30, 45, 60, 90] {
        let given_up = Duration::from_millis(millis);
        let start = client::spawn(&sandbox.dir, &spec, WRENN.as_ref());
        let _dropped_or_up = tokio::time::timeout(given_up, start).await;
        kill_leftovers(&sandbox.dir).expect("swept");
        let left = kill_leftovers(&sandbox.dir).expect("swept again");
        assert!(
            left.is_empty(),
            "{left:?} came up after the sweep at {given_up:?}"
        );
    }
    let shim = sandbox.start("test.deaf").await;
    shim.stop(Duration::ZERO).await.expect("stopped");
}

//! The VMM runs inside the sandbox's network namespace and drives its tap: with real packets.
//!
//! Ignored unless asked for: needs root, QEMU and the guest kernel (see `shim_support`).

mod shim_support;

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use shim_support::{SOON, Sandbox, WRENN, eventually};
use wrenn_node::shim::client;
use wrenn_node::vmm::NetworkSpec;

const MAC: [u8; 6] = [0x02, 0x00, 0xa9, 0xfe, 0x00, 0x15];

/// A namespace with a tap, removed when dropped.
struct Netns(String);

impl Netns {
    fn new() -> Self {
        let name = format!("vmmtest-{}", std::process::id());
        let netns = Self(name);
        run(&["netns", "add", &netns.0]);
        run(&[
            "-n", &netns.0, "tuntap", "add", "dev", "tap0", "mode", "tap",
        ]);
        run(&["-n", &netns.0, "link", "set", "tap0", "up"]);
        netns
    }

    fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.0)
    }

    /// Frames the tap has received from the guest.
    fn frames(&self) -> u64 {
        let output = Command::new("ip")
            .args(["-n", &self.0, "-j", "-s", "link", "show", "tap0"])
            .output()
            .expect("ip runs");
        let links: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        links[0]["stats64"]["rx"]["packets"]
            .as_u64()
            .expect("a number")
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _removed = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

fn run(args: &[&str]) {
    let done = Command::new("ip").args(args).status().expect("ip runs");
    assert!(done.success(), "ip {args:?}");
}

#[tokio::test]
#[ignore = "boots a real guest"]
async fn the_guest_speaks_through_the_tap_in_its_own_namespace() {
    let netns = Netns::new();
    let sandbox = Sandbox::new();
    let mut spec = sandbox.spec("");
    spec.vmm.network = Some(NetworkSpec {
        netns: netns.path(),
        tap: "tap0".into(),
        mac: MAC,
    });
    let shim = client::spawn(&sandbox.dir, &spec, WRENN.as_ref())
        .await
        .expect("up");
    let pid = shim.known_status().vmm_pid;
    let theirs = fs::metadata(format!("/proc/{pid}/ns/net")).expect("runs");
    let made = fs::metadata(netns.path()).expect("made");
    assert_eq!(
        std::os::unix::fs::MetadataExt::ino(&theirs),
        std::os::unix::fs::MetadataExt::ino(&made)
    );
    sandbox.await_console("guest: net 02:00:a9:fe:00:15");
    sandbox.await_console("guest: up");
    assert!(
        eventually(SOON, || netns.frames() > 0),
        "no frame left the guest"
    );
    shim.stop(Duration::ZERO).await.expect("stopped");
}

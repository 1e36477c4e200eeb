//! A real Debian guest with its agent, saved and brought back in another directory, namespace and
//! tap: what it had in memory and on its disk is there, and what it was doing it goes on doing.
//!
//! Ignored unless asked for: needs root, QEMU and the guest images (`WRENN_IMAGES`).

mod shim_support;

use std::process::Command;
use std::time::Duration;

use shim_support::debian::{Netns, SUMS, boot, count, debian, run};
use shim_support::{SOON, Sandbox, WRENN, copy_memory};
use tokio::time::{Instant, timeout};
use wrenn_node::pager::region::Region;
use wrenn_node::shim::client;
use wrenn_node::shim::dirty::DirtyList;
use wrenn_node::shim::saved::{GuestStand, Saved};
use wrenn_node::shim::spec::{MemoryImage, RestoreSpec, ShimSpec};
use wrenn_node::vmm::{Hardware, NetworkSpec};

/// Everything a resume elsewhere needs, in the directory of another sandbox.
fn carry_over(saved: &Saved, from: &Sandbox, to: &Sandbox) {
    let region = Region::new(proto::units::Mib(256));
    let list = DirtyList::read(&from.dir, region).expect("listed");
    let memory = saved.memory.open().expect("it can be read");
    let image = to.dir.join("memory");
    copy_memory(&memory, list.ranges(), saved.memory.bytes, &image);
    std::fs::copy(&saved.state.path, to.dir.join("state")).expect("copied");
    // Copied while the VMM has it open and stands still.
    std::fs::copy(from.dir.join("root.qcow2"), to.dir.join("root.qcow2")).expect("copied");
    let checked = Command::new("qemu-img")
        .args(["check", "-f", "qcow2"])
        .arg(to.dir.join("root.qcow2"))
        .output()
        .expect("qemu-img runs");
    let said = String::from_utf8_lossy(&checked.stdout);
    println!("{}", said.lines().next().unwrap_or_default());
    assert!(checked.status.success(), "{said}");
}

fn restoring(saved: &Saved, hardware: &Hardware, to: &Sandbox, network: NetworkSpec) -> ShimSpec {
    let mut spec = debian(to, network);
    let mut state = saved.state.clone();
    state.path = to.dir.join("state");
    spec.restore = Some(RestoreSpec {
        state,
        hardware: hardware.clone(),
        memory: MemoryImage::Flat(to.dir.join("memory")),
    });
    spec
}

fn print_times(saved: &Saved) {
    let (mib, state) = (saved.memory.dirty_bytes >> 20, saved.state.bytes);
    let (state_took, dirty_took) = (saved.state_took, saved.dirty_took);
    let sync_took = saved.sync_took;
    println!(
        "saved: {state} bytes of state in {state_took:?}, {mib} MiB of memory listed in \
         {dirty_took:?}, both synced in {sync_took:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "boots a real guest"]
async fn debian_is_saved_thawed_and_brought_back_elsewhere_with_all_it_had() {
    let (here, there) = (Sandbox::new(), Sandbox::new());
    let (home, away) = (Netns::new("tap0"), Netns::new("away7"));
    let (shim, guest) = boot(&here, &home).await;
    let hardware = shim.known_status().hardware.clone();
    let sums = run(&guest, SUMS).await;

    let before = count(&guest).await;
    print_times(&shim.save(SOON).await.expect("saved"));
    shim.thaw(false).await.expect("goes on");
    guest
        .wait_ready(Instant::now() + SOON)
        .await
        .expect("ready");
    // Ten times a second; a save takes less than that.
    let goes_on = async { while count(&guest).await <= before {} };
    let went_on = timeout(SOON, goes_on).await;
    went_on.expect("it counts on");
    assert_eq!(run(&guest, SUMS).await, sums);

    let before = count(&guest).await;
    let saved = shim.save(SOON).await.expect("saved");
    print_times(&saved);
    carry_over(&saved, &here, &there);
    shim.stop(Duration::ZERO).await.expect("stopped");
    let [closed, copied] = [&here, &there].map(|it| it.dir.join("root.qcow2"));
    let same = Command::new("cmp").args([closed, copied]).status();
    assert!(same.expect("cmp runs").success(), "the disk has changed");

    let spec = restoring(&saved, &hardware, &there, away.spec());
    let began = Instant::now();
    let shim = client::spawn(&there.dir, &spec, WRENN.as_ref()).await;
    let shim = shim.expect("back");
    let up = began.elapsed();
    assert_eq!(shim.known_status().stand, GuestStand::Still);
    shim.thaw(false).await.expect("goes on");
    let guest = away.guest();
    guest
        .wait_ready(Instant::now() + SOON)
        .await
        .expect("ready");
    println!("back after {up:?}, answers after {:?}", began.elapsed());
    let status = shim.status().await.expect("answers");
    println!("QEMU {:?}, {:?}", status.vmm_start, status.restored);
    let after = count(&guest).await;
    // What it counted between our last look and the save is unknown, and not minutes' worth.
    assert!((before..before + 600).contains(&after), "{before}, {after}");
    assert_eq!(run(&guest, SUMS).await, sums);
    // Its disk takes writes, those under way at the save as well as new ones.
    run(&guest, "echo new > /root/new && sync && cat /root/new").await;
    let rounds = "wc -l < /dev/shm/rounds";
    let before = run(&guest, rounds).await;
    run(
        &guest,
        &format!("until [ $({rounds}) -gt $(({before} + 1)) ]; do sleep 0.1; done"),
    )
    .await;
    assert_eq!(
        run(&guest, "dmesg | grep -c 'I/O error' || true").await,
        "0"
    );
    // And it can be saved from here.
    print_times(&shim.save(SOON).await.expect("saved"));
    shim.thaw(false).await.expect("goes on");
    assert_eq!(run(&guest, SUMS).await, sums);
    shim.stop(Duration::ZERO).await.expect("stopped");
}

//! A guest under Cloud Hypervisor in a real shim: saved, let go on, brought back by a pager in
//! another shim, generation after generation, and swept.

mod ch_shims;
mod ch_world;
mod pager_world;

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use ch_shims::{Bringing, Dir, merged, restoring, start};
use ch_world::{MEMORY, World};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pager_world::SOON;
use proto::units::Mib;
use wrenn_node::pager::region::Region;
use wrenn_node::shim::dirty::{Basis, DirtyList};
use wrenn_node::shim::saved::GuestStand;
use wrenn_node::shim::sweep::kill_leftovers;
use wrenn_node::store::Overlay;
use wrenn_node::store::disk::rebase;
use wrenn_node::vmm::confinement::HostConfinement;

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_from_shim_to_shim() {
    moves_from_shim_to_shim(Bringing::Watched).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_asks_for_its_pages_moves_from_shim_to_shim() {
    moves_from_shim_to_shim(Bringing::Asked).await;
}

/// As sandboxes of one host do: each with a user, a root and a control group of its own.
async fn moves_from_shim_to_shim(bringing: Bringing) {
    let Some(mut world) = World::new() else {
        return;
    };
    let host = HostConfinement::of_this_host(&format!("shim-{bringing:?}-{}", std::process::id()));
    world.spec.confinement = host.of_sandbox("first", 10);
    let mut dir = Dir::new();
    let mut shim = start(&world, &dir, None).await;
    let mut memory = vec![0; usize::try_from(MEMORY.bytes()).expect("small")];
    dir.await_round(2);
    for generation in 0..3 {
        let first = shim.save(SOON).await.expect("saved");
        // One is sealed, and its next list begins with that; the others could not be, and are tried again.
        let sealed = generation == 1;
        let as_sealed = merged(&dir, &first, &memory);
        shim.thaw(sealed).await.expect("goes on");
        dir.await_round(dir.round() + 2);
        let saved = shim.save(SOON).await.expect("saved again");
        let list = DirtyList::read(dir.path(), Region::new(MEMORY)).expect("listed");
        // Nobody notes the writes of one that asks: they are found by comparing with what it came from.
        let begins_anew = sealed && bringing == Bringing::Watched;
        assert_eq!(list.basis() == Basis::LastSeal, begins_anew, "{list:?}");
        if begins_anew {
            memory = as_sealed;
        }
        eprintln!(
            "generation {generation}: state {:?} and {:?}, {} listed, {:?} to list",
            first.state_took, saved.state_took, saved.memory.dirty_bytes, saved.dirty_took
        );
        memory = merged(&dir, &saved, &memory);
        let next = Dir::new();
        let hardware = shim.known_status().hardware.clone();
        let restore = restoring(&next, &saved, hardware, &memory, bringing);
        let exit = shim.stop(Duration::ZERO).await.expect("ended");
        let said = || fs::read_to_string(dir.path().join("shim.log"));
        assert_eq!(
            (exit.code, exit.signal),
            (Some(0), None),
            "{exit:?} {:?}",
            said()
        );
        let round = dir.round();
        world.spec.confinement = host.of_sandbox(&format!("next-{generation}"), 11 + generation);
        shim = start(&world, &next, Some(restore)).await;
        dir = next;
        let status = shim.status().await.expect("answers");
        assert!(matches!(status.stand, GuestStand::Still), "{status:?}");
        eprintln!("vmm {:?}, {:?}", status.vmm_start, status.restored);
        shim.thaw(false).await.expect("goes on");
        dir.await_round(round + 2);
        let user = fs::metadata(format!("/proc/{}", status.vmm_pid)).expect("it runs");
        let wanted = world.spec.confinement.user.unwrap_or(0);
        assert_eq!(user.uid(), wanted, "it shares its user");
    }
}

/// As one that hangs: it is asked to end, and then it is killed.
#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_falls_silent_is_killed_when_its_shim_is_told_to_stop() {
    let Some(world) = World::new() else { return };
    let dir = Dir::new();
    let shim = start(&world, &dir, None).await;
    dir.await_round(1);
    let vmm = Pid::from_raw(i32::try_from(shim.known_status().vmm_pid).expect("a pid"));
    kill(vmm, Signal::SIGSTOP).expect("stopped");
    let exit = shim.stop(Duration::ZERO).await.expect("ended");
    assert_eq!(exit.signal, Some(9), "{exit:?}");
}

/// The VMM marks the image as in use, and goes on to when it is saved.
#[test]
fn the_disk_of_a_saved_guest_is_put_on_its_image_and_serves_the_next_vmm() {
    let Some(mut world) = World::new() else {
        return;
    };
    let home = world.home.path().to_owned();
    let (base, used, next) = (home.join("image"), home.join("used"), home.join("next"));
    fs::write(&base, vec![7; 1 << 20]).expect("written");
    let (size, image) = (Mib(64), &base);
    let overlay = Overlay { base: image, size };
    overlay.create(&used).expect("made");
    world.spec.root_disk = Some(used.clone());
    let guest = world.boot();
    let saved = guest.save();
    fs::copy(&used, &next).expect("copied");
    let in_use = |path: &Path| fs::read(path).expect("read")[79] & 1;
    assert_eq!(in_use(&next), 1, "or the release has changed its habit");
    rebase(&next, &base, size).expect("taken");
    assert_eq!(in_use(&next), 0);
    let mut check = Command::new("qemu-img");
    let checked = check.args(["check", "-q"]).arg(&next).status();
    assert!(checked.expect("qemu-img runs").success());
    drop(guest);
    world.spec.root_disk = Some(next);
    let resumed = world.incoming(&saved, saved.copied());
    let loaded = resumed
        .vmm
        .load_state(saved.state.as_fd(), ch_world::soon());
    loaded.expect("loaded");
    resumed.vmm.resume(ch_world::soon()).expect("goes on");
    resumed.await_round(saved.round + 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_killed_shim_leaves_is_found_by_its_name() {
    let Some(world) = World::new() else { return };
    let dir = Dir::new();
    let shim = start(&world, &dir, None).await;
    dir.await_round(1);
    let vmm = shim.known_status().vmm_pid;
    let killed = kill_leftovers(dir.path()).expect("swept");
    assert!(killed.contains(&shim.known_status().shim_pid), "{killed:?}");
    // A zombie is dead too; who reaps it is not our affair.
    let stat = fs::read_to_string(format!("/proc/{vmm}/stat")).unwrap_or_default();
    let state = stat.rsplit(") ").next().and_then(|it| it.chars().next());
    assert!(matches!(state, None | Some('Z')), "{stat}");
}

//! Guests that are brought back by a shim, in another directory, and those that are not.
//!
//! Ignored unless asked for: needs QEMU and the guest kernel (see `shim_support`).

mod shim_support;

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use shim_support::{BOOT, SOON, Sandbox, WRENN, copy_memory, counted, eventually, signal, vmm_in};
use wrenn_node::pager::region::Region;
use wrenn_node::shim::client;
use wrenn_node::shim::dirty::{Basis, DirtyList};
use wrenn_node::shim::discover::{FoundState, discover};
use wrenn_node::shim::error::SpawnShimError;
use wrenn_node::shim::saved::{GuestStand, Saved};
use wrenn_node::shim::spec::{MemoryImage, RestoreSpec, ShimSpec};
use wrenn_node::shim::state::StateFile;
use wrenn_node::shim::sweep::kill_leftovers;
use wrenn_node::vmm::Hardware;

/// A guest that counts, was saved, and is gone.
struct Kept {
    home: Sandbox,
    state: StateFile,
    hardware: Hardware,
    count: u64,
}

impl Kept {
    async fn new() -> Self {
        let home = Sandbox::new();
        let mut spec = home.spec("test.count");
        spec.vmm.root_disk = Some(home.make_disk());
        let shim = client::spawn(&home.dir, &spec, WRENN.as_ref()).await;
        let shim = shim.expect("up");
        let counts = || counted(&home.file("console.log")).is_some_and(|it| it > 2);
        assert!(eventually(BOOT, counts), "{}", home.file("console.log"));
        let saved = shim.save(SOON).await.expect("saved");
        keep_memory(&saved, &home.dir);
        let hardware = shim.known_status().hardware.clone();
        shim.stop(Duration::ZERO).await.expect("stopped");
        let count = counted(&home.file("console.log")).expect("it counts");
        Self {
            home,
            state: saved.state,
            hardware,
            count,
        }
    }

    /// The directory it is to come back in, and what is to be told there.
    fn elsewhere(&self) -> (Sandbox, ShimSpec) {
        let there = Sandbox::new();
        for name in ["state", "memory", "root.qcow2"] {
            let into = there.dir.join(name);
            let copy = std::process::Command::new("cp")
                .args([
                    "--sparse=always".as_ref(),
                    self.home.dir.join(name).as_os_str(),
                ])
                .arg(&into)
                .status();
            assert!(copy.expect("cp runs").success());
        }
        let mut spec = there.spec("");
        // Neither is looked at.
        spec.vmm.kernel = "/nonexistent/vmlinuz".into();
        spec.vmm.initramfs = "/nonexistent/initramfs".into();
        spec.vmm.root_disk = Some(there.dir.join("root.qcow2"));
        spec.restore = Some(RestoreSpec {
            state: StateFile {
                path: there.dir.join("state"),
                ..self.state.clone()
            },
            hardware: self.hardware.clone(),
            memory: MemoryImage::Flat(there.dir.join("memory")),
        });
        (there, spec)
    }
}

fn keep_memory(saved: &Saved, dir: &Path) {
    let memory = saved.memory.open().expect("it can be read");
    let region = Region::new(proto::units::Mib(256));
    let list = DirtyList::read(dir, region).expect("listed");
    assert_eq!(
        (list.basis(), saved.memory.rest_is_zero),
        (Basis::Zeros, true)
    );
    assert_eq!(list.bytes(), saved.memory.dirty_bytes);
    let (bytes, image) = (saved.memory.bytes, dir.join("memory"));
    copy_memory(&memory, list.ranges(), bytes, &image);
}

#[tokio::test]
#[ignore = "boots a real guest"]
async fn a_guest_comes_back_stands_still_and_counts_on_when_it_is_let() {
    let kept = Kept::new().await;
    let (there, spec) = kept.elsewhere();
    let began = Instant::now();
    let shim = client::spawn(&there.dir, &spec, WRENN.as_ref()).await;
    let shim = shim.expect("back");
    let status = shim.known_status().clone();
    println!("back after {:?}: {status:?}", began.elapsed());
    assert_eq!(status.stand, GuestStand::Still);
    assert_eq!(status.hardware, kept.hardware);
    // A daemon that died in between finds it so.
    drop(shim);
    let found = discover(there.parent()).await.expect("listed");
    let FoundState::Alive(shim) = &found[0].state else {
        panic!("{found:?}");
    };
    assert_eq!(shim.known_status().stand, GuestStand::Still);
    assert_eq!(there.file("console.log"), "");
    shim.thaw(false).await.expect("goes on");
    let next = format!("guest: count {}.", kept.count + 1);
    there.await_console(&next);
    // And may be saved from there.
    let saved = shim.save(SOON).await.expect("saved");
    assert!(saved.memory.rest_is_zero);
    shim.stop(Duration::ZERO).await.expect("stopped");
}

#[tokio::test]
#[ignore = "boots a real guest"]
async fn what_is_damaged_or_of_something_else_is_refused_in_words_and_leaves_nothing() {
    let kept = Kept::new().await;
    let state = fs::read(&kept.state.path).expect("readable");
    type Spoil<'a> = (&'a str, Box<dyn Fn(&Path, &mut ShimSpec) + 'a>);
    let restore = |spec: &mut ShimSpec, change: &dyn Fn(&mut RestoreSpec)| {
        change(spec.restore.as_mut().expect("it is one"));
    };
    let cases: Vec<Spoil<'_>> = vec![
        (
            "bytes, and",
            Box::new(|dir, _| fs::write(dir.join("state"), &state[..1000]).expect("cut")),
        ),
        (
            "is damaged",
            Box::new(|dir, _| {
                let mut flipped = state.clone();
                flipped[state.len() / 2] ^= 4;
                fs::write(dir.join("state"), flipped).expect("flipped");
            }),
        ),
        (
            "read the device state",
            Box::new(|dir, _| fs::remove_file(dir.join("state")).expect("removed")),
        ),
        (
            "is of a machine \"pc-q35-7.2\"",
            Box::new(|_, spec| restore(spec, &|it| it.hardware.machine = "pc-q35-7.1/1".into())),
        ),
        (
            "this release has no machine \"pc-q35-7.2/9\"",
            Box::new(|_, spec| restore(spec, &|it| it.hardware.machine = "pc-q35-7.2/9".into())),
        ),
        (
            "this release has no processor \"tcg-0\"",
            Box::new(|_, spec| restore(spec, &|it| it.hardware.cpu = "tcg-0".into())),
        ),
        (
            "read the memory image",
            Box::new(|dir, _| fs::remove_file(dir.join("memory")).expect("removed")),
        ),
        (
            "and the guest has 268435456",
            Box::new(|dir, _| fs::write(dir.join("memory"), b"short").expect("cut")),
        ),
        (
            "root.qcow2",
            Box::new(|dir, _| fs::remove_file(dir.join("root.qcow2")).expect("removed")),
        ),
        // A state that is whole, of a guest with other devices.
        (
            "have the VMM take in a device state",
            Box::new(|_, spec| spec.vmm.root_disk = None),
        ),
    ];
    for (words, spoil) in cases {
        let (there, mut spec) = kept.elsewhere();
        spoil(&there.dir, &mut spec);
        let refused = client::spawn(&there.dir, &spec, WRENN.as_ref()).await;
        let SpawnShimError::GaveUp { reason } = refused.expect_err(words) else {
            panic!("{words}: another error");
        };
        println!("{reason}");
        assert!(reason.contains(words), "{words}: {reason}");
        let left = kill_leftovers(&there.dir).expect("swept");
        assert!(left.is_empty(), "{words}: {left:?} were left");
    }
}

#[tokio::test]
#[ignore = "boots a real guest"]
async fn a_vmm_killed_at_any_step_of_a_restore_is_told_of_and_leaves_nothing() {
    let kept = Kept::new().await;
    for millis in [0, 40, 80, 120, 160, 200, 260] {
        let (there, spec) = kept.elsewhere();
        let dir = there.dir.clone();
        let killer = thread::spawn(move || {
            assert!(eventually(SOON, || vmm_in(&dir).is_some()), "no VMM");
            thread::sleep(Duration::from_millis(millis));
            if let Some(pid) = vmm_in(&dir) {
                signal(pid, Signal::SIGKILL);
            }
        });
        let came_back = client::spawn(&there.dir, &spec, WRENN.as_ref()).await;
        killer.join().expect("killed");
        match came_back {
            Err(SpawnShimError::GaveUp { reason }) => println!("{millis} ms: {reason}"),
            Err(other) => println!("{millis} ms: {other}"),
            Ok(shim) => {
                println!("{millis} ms: back before");
                let deadline = tokio::time::Instant::now() + SOON;
                let exit = shim.wait_exit(deadline).await.expect("answered");
                assert_eq!(exit.expect("ended").signal, Some(9));
            }
        }
        assert!(eventually(SOON, || vmm_in(&there.dir).is_none()));
        let left = kill_leftovers(&there.dir).expect("swept");
        assert!(left.len() <= 1, "{left:?} were left");
    }
}

//! Invariant I3 where what a capsule is brought back from breaks: damaged packs are read around by
//! another holder's copy, and a killed pager is replaced.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use serde_json::json;
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::contents::Contents;
use wrenn_cluster_tests::world::{World, lives, signal};

use crate::durability::{STAYS, paused, resumed_on};
use crate::{MEMORY_MB, PATIENCE, led_to, wait_state};

/// The node that runs the capsule, and whose disk breaks; the other's stays good.
const BREAKS: u16 = 2;
/// KiB of each file in the guest.
const FILE_KIB: u32 = 4096;
/// Bytes from one flipped byte to the next: in every tenth chunk or so.
const APART: usize = 256 << 10;
/// Of each pack, what is left alone: its own head.
const PACK_HEAD: u64 = 16;

#[test]
fn i3_damaged_packs_and_a_killed_pager_cost_a_capsule_nothing() {
    let mut cluster = ClusterWorld::new(2);
    let id = led_to(&cluster, BREAKS, &json!({ "memory_mb": MEMORY_MB }));
    let contents = Contents::make(cluster.client(BREAKS), &id, FILE_KIB);

    paused(&cluster, &id, &[]);
    flip(&cluster.client(BREAKS).data());
    resumed_on(&cluster, &id, BREAKS);
    kill_pager(cluster.client(BREAKS), &id);
    contents.are_there(cluster.client(BREAKS), &id);

    paused(&cluster, &id, &[]);
    cluster.kill(BREAKS);
    cut_in_half(&cluster.client(BREAKS).data());
    cluster.start(BREAKS);
    let _alive = wait_state(cluster.client(STAYS), BREAKS, "alive");
    resumed_on(&cluster, &id, BREAKS);
    contents.are_there(cluster.client(BREAKS), &id);

    cluster.client(STAYS).destroy(&id);
    for number in [STAYS, BREAKS] {
        cluster.client(number).wait_only(&[]);
    }
}

/// The packs of a node, and how long each is.
fn packs(data: &Path) -> Vec<(PathBuf, u64)> {
    let packs = fs::read_dir(data.join("store/packs")).expect("packs");
    let paths = packs.map(|pack| pack.expect("an entry").path());
    let length = |path: &PathBuf| fs::metadata(path).expect("a file").len();
    paths.map(|path| (path.clone(), length(&path))).collect()
}

/// Turns one byte in [`APART`] over, in all packs.
pub(crate) fn flip(data: &Path) {
    for (path, length) in packs(data) {
        let file: File = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .expect("a pack");
        for at in (PACK_HEAD..length).step_by(APART).skip(1) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).expect("a byte");
            file.write_all_at(&[!byte[0]], at).expect("written");
        }
    }
}

/// Cuts each pack off in its middle.
fn cut_in_half(data: &Path) {
    for (path, length) in packs(data) {
        let file = OpenOptions::new().write(true).open(&path);
        file.expect("a pack").set_len(length / 2).expect("cut");
    }
}

/// Kills the process that brings a guest's memory, and waits for the next.
fn kill_pager(world: &World, id: &str) {
    let pager = || {
        let all = world.footprint();
        let line = all
            .into_iter()
            .find(|it| it.contains(" pager ") && it.contains(id))?;
        line.split_whitespace().nth(1)?.parse::<u32>().ok()
    };
    let first = pager().expect("a resumed guest has a pager");
    signal(first, Signal::SIGKILL);
    let next = wait_for(PATIENCE, || {
        pager().filter(|next| *next != first && lives(*next))
    });
    assert!(next.is_some(), "{}", world.log());
}

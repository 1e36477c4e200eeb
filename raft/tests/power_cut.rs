//! What a power cut leaves, acted out: the group runs on ext4 in a loop-mounted image, and the image
//! file is copied while it writes. The copy holds what had reached the block device, and nothing of
//! the page cache. It must hold everything that was acknowledged before the copy began.
//!
//! Needs root and loop devices: `cargo test --test power_cut -- --ignored`.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::writer;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::Rng;

const IMAGE_BYTES: u64 = 64 * 1024 * 1024;
const CUTS: usize = 12;

/// A mounted image, unmounted when dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(image: &Path, at: &Path) -> Self {
        fs::create_dir_all(at).unwrap();
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(image)
            .arg(at));
        Self(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: a panic may have left a process in it.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

fn run(command: &mut Command) {
    let status = command.status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
}

#[test]
#[ignore = "needs root and loop devices"]
fn nothing_acknowledged_is_lost_by_a_power_cut() {
    writer::become_writer_if_asked();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    File::create(&image).unwrap().set_len(IMAGE_BYTES).unwrap();
    run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image));
    for cut in 0..CUTS {
        // Each round goes on with what the last cut left.
        image_after_cut(dir.path(), &image, cut);
    }
}

fn image_after_cut(dir: &Path, image: &Path, cut: usize) {
    let notes = dir.join(format!("acknowledged {cut}"));
    let before = dir.join(format!("acknowledged {}", cut.wrapping_sub(1)));
    if before.exists() {
        fs::copy(&before, &notes).unwrap();
    }
    let after = dir.join("after");
    let last = {
        let mounted = Mounted::new(image, &dir.join("running"));
        let name = "nothing_acknowledged_is_lost_by_a_power_cut";
        let mut child = writer::spawn(name, &mounted.0, &notes);
        std::thread::sleep(Duration::from_millis(rand::rng().random_range(20..400)));
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        kill(pid, Signal::SIGSTOP).unwrap();
        let last = writer::acknowledged(&notes);
        fs::copy(image, &after).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        // It may have gone on for a moment: what it noted by then is not what the copy must hold.
        fs::write(&notes, format!("{last}\n")).unwrap();
        last
    };
    fs::rename(&after, image).unwrap();
    println!("cut {cut}: {last} writes were acknowledged");
    let mounted = Mounted::new(image, &dir.join("checked"));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async { writer::check(&mounted.0, last).await.shutdown().await });
}

//! How long a snapshot takes from one node to another: one that the other has nothing of, and the next
//! one after 5 % of its memory changed; beside scp and rsync of the same image over sshd.
//!
//! Ours is what a daemon does: both stores, both transports, the protocol between them, hashing,
//! encryption, and everything durable at the end ([`super::peer`]). Theirs is a file on the same disk,
//! synced at the end. The holder and the taker are two runtimes of one process, as sshd and scp are
//! two processes.
//!
//! Once over loopback as it is, and once over a link with 20 ms there and back and 1 % of the packets
//! lost ([`slow_link`]), with an eighth of the bytes: in a network namespace of its own, which ends with
//! the process. sshd listens there only, with keys that are made for it and thrown away. Without sshd
//! (Debian: openssh-server) ours alone is measured.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use node::store::{CHUNK_BYTES, Limits, SnapshotDigest, Store};
use proto::units::MIB_BYTES;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use transport::{Identity, Transport};

use super::peer::{Only, begin, hand_out, join, seal, soon};
use super::rounds;
use crate::figures::{Samples, figure, ratio};
use crate::sshd::Sshd;
use crate::{Outcome, Run, slow_link};

/// One window in so many is written between the two snapshots: 5 %.
const CHANGED: usize = 20;
/// The slow link moves so much less, or it would take all day.
const SLOW_SHARE: u32 = 8;
/// Most of scp's time that a cold transfer may take: nine tenths of its speed.
const COLD_GOAL: f64 = 1.0 / 0.9;
/// Most of rsync's time that the next snapshot may take.
const CHANGED_GOAL: f64 = 0.5;

/// How the two sides meet.
struct Link {
    name: &'static str,
    listen: IpAddr,
    dial: IpAddr,
}

const LOOPBACK: Link = Link {
    name: "loopback",
    listen: IpAddr::V4(Ipv4Addr::LOCALHOST),
    dial: IpAddr::V4(Ipv4Addr::LOCALHOST),
};
const SLOW: Link = Link {
    name: "slow",
    listen: slow_link::HERE,
    dial: slow_link::THERE,
};

/// Measures both links.
pub(crate) fn run(run: &Run) -> Outcome {
    measure(run, &LOOPBACK)?;
    let runs = run.runs.to_string();
    let memory = (run.memory_mib / SLOW_SHARE).to_string();
    let program = std::env::current_exe()?;
    let mut slow = Command::new("unshare");
    slow.arg("-n").arg(program);
    slow.args(["--slow-link", "--runs", &runs, "--memory", &memory]);
    match slow.status()?.success() {
        true => Ok(()),
        false => Err("the slow link could not be measured".into()),
    }
}

/// Measures the slow link, in the network namespace of this process.
pub(crate) fn run_slow(run: &Run) -> Outcome {
    slow_link::open()?;
    measure(run, &SLOW)
}

fn measure(run: &Run, link: &Link) -> Outcome {
    let bytes = u64::from(run.memory_mib) * MIB_BYTES;
    let sshd = Sshd::start_if_there(run, link.listen, link.dial)?;
    let [mut cold, mut changed, mut scp, mut rsync] = [const { Samples::new() }; 4];
    for round in 1..=rounds(run) {
        run.go_on()?;
        let mut image = Image::make(bytes)?;
        let mut pair = Pair::start(&image, link)?;
        cold.add_ms(pair.fetch(image.digest)?);
        if let Some(sshd) = &sshd {
            scp.add_ms(timed(
                &mut sshd.download(&image.path(), &image.copy()),
                &image.copy(),
            )?);
        }
        image.change(round)?;
        changed.add_ms(pair.fetch(image.digest)?);
        if let Some(sshd) = &sshd {
            rsync.add_ms(timed(
                &mut sshd.rsync(&image.path(), &image.copy()),
                &image.copy(),
            )?);
        }
        pair.stop();
        run.note(&format!("{}: round {round}", link.name));
    }
    let name = |what: &str| format!("transfer_{}_{what}", link.name);
    cold.print_p50(&name("cold"), "ms");
    let mib = f64::from(run.memory_mib);
    figure(&name("cold_speed"), mib / (cold.p50() / 1e3), "MiB/s");
    changed.print_p50(&name("changed"), "ms");
    if sshd.is_some() {
        scp.print_p50(&name("scp"), "ms");
        rsync.print_p50(&name("rsync"), "ms");
        ratio(&name("cold_over_scp"), cold.p50(), scp.p50(), COLD_GOAL);
        let over = name("changed_over_rsync");
        ratio(&over, changed.p50(), rsync.p50(), CHANGED_GOAL);
    }
    Ok(())
}

/// A memory image of windows of which half is bytes of chance and half one byte, as a file and
/// sealed in a store.
pub(crate) struct Image {
    dir: TempDir,
    file: File,
    store: Store,
    identity: Identity,
    bytes: u64,
    digest: SnapshotDigest,
}

impl Image {
    fn make(bytes: u64) -> Outcome<Self> {
        let mib = u32::try_from(bytes / MIB_BYTES)?;
        Self::make_at(&std::env::temp_dir(), mib, Identity::ephemeral()?)
    }

    /// One of so many MiB in a folder of its own in `dir`, sealed by `identity`.
    pub(crate) fn make_at(dir: &Path, mib: u32, identity: Identity) -> Outcome<Self> {
        let bytes = u64::from(mib) * MIB_BYTES;
        let dir = tempfile::Builder::new()
            .prefix("wrenn-bench-")
            .tempdir_in(dir)?;
        let mut file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(dir.path().join("image"))?;
        let mut random = File::open("/dev/urandom")?;
        let mut window = [0; CHUNK_BYTES];
        for _ in 0..bytes / CHUNK_BYTES as u64 {
            random.read_exact(&mut window[..CHUNK_BYTES / 2])?;
            file.write_all(&window)?;
        }
        file.sync_all()?;
        let store = Store::open(&dir.path().join("store"), Limits::default())?;
        let digest = sealed(&store, &file, bytes, &identity)?;
        Ok(Self {
            dir,
            file,
            store,
            identity,
            bytes,
            digest,
        })
    }

    /// Writes one window in [`CHANGED`] and seals the next snapshot.
    fn change(&mut self, seed: usize) -> Outcome {
        let mut random = File::open("/dev/urandom")?;
        let mut fresh = [0; CHUNK_BYTES / 2];
        let windows = self.bytes / CHUNK_BYTES as u64;
        for window in (0..windows).skip(seed % CHANGED).step_by(CHANGED) {
            random.read_exact(&mut fresh)?;
            self.file
                .write_all_at(&fresh, window * CHUNK_BYTES as u64)?;
        }
        self.file.sync_all()?;
        self.digest = sealed(&self.store, &self.file, self.bytes, &self.identity)?;
        Ok(())
    }

    /// Where it is sealed.
    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    /// The newest snapshot of it.
    pub(crate) fn digest(&self) -> SnapshotDigest {
        self.digest
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    /// Where scp and rsync put theirs.
    fn copy(&self) -> PathBuf {
        self.dir.path().join("copy")
    }
}

fn sealed(store: &Store, file: &File, bytes: u64, identity: &Identity) -> Outcome<SnapshotDigest> {
    let filling = store.begin();
    let memory = filling.image(file, bytes)?.image;
    let kept = filling.finish(None)?;
    let digest = seal(store, memory, identity)?;
    drop(kept);
    Ok(digest)
}

/// Two nodes: one has the image's store, the other an empty one.
struct Pair {
    there: Runtime,
    here: Runtime,
    far: Arc<Transport>,
    near: Arc<Transport>,
    taker: Store,
    _dir: TempDir,
}

impl Pair {
    fn start(image: &Image, link: &Link) -> Outcome<Self> {
        let (there, here) = (Runtime::new()?, Runtime::new()?);
        let far = begin(&there, &image.identity, link.listen)?;
        let near = begin(&here, &Identity::ephemeral()?, link.listen)?;
        hand_out(&far, &image.store);
        join(&here, &near, &far, link.dial)?;
        let dir = tempfile::Builder::new().prefix("wrenn-bench-").tempdir()?;
        let taker = Store::open(&dir.path().join("store"), Limits::default())?;
        Ok(Self {
            there,
            here,
            far,
            near,
            taker,
            _dir: dir,
        })
    }

    /// Has all of a snapshot fetched, durably.
    fn fetch(&mut self, digest: SnapshotDigest) -> Outcome<Duration> {
        let only = Only::new(&self.near, self.far.key());
        let began = Instant::now();
        let kept = self.here.block_on(self.taker.fetch(digest, &only))?;
        let took = began.elapsed();
        // Nothing is collected here: it stays for the next one to build on.
        drop(kept);
        Ok(took)
    }

    fn stop(self) {
        self.here.block_on(self.near.stop(soon()));
        self.there.block_on(self.far.stop(soon()));
    }
}

/// Runs a program that makes the file `made`, until that is durable.
fn timed(program: &mut Command, made: &Path) -> Outcome<Duration> {
    let began = Instant::now();
    let status = program.status()?;
    if !status.success() {
        return Err(format!("{program:?}: {status}").into());
    }
    File::open(made)?.sync_all()?;
    Ok(began.elapsed())
}

//! QEMU's own saving and loading of a guest, memory included, beside our pause and resume of it.
//!
//! A capsule is made, filled and paused by us, resumed, and paused again after a little was
//! written. Then, without a daemon, the very guest is brought back in a QEMU with the command line of
//! the capsule's: device state and memory from the snapshot, overlay and all. That QEMU then does
//! what it does without us: it migrates the guest to a file (*own save*), and another QEMU loads it
//! from there (*own load*), both with memory, neither compressed, on the same disk as the store,
//! synced as the store is. What is not in QEMU's figures and is in ours: the API, the log, bringing
//! the guest to a stop and telling it the time, slot and shim, hashing, compressing.

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use node::store::disk::rebase;
use node::store::{DataDir, ImageRef, Limits, Pin, SnapshotManifest, Store};
use node::vmm::qemu::qmp::Qmp;
use proto::units::Mib;
use serde_json::json;
use tempfile::TempDir;
use wrenn_cluster_tests::world::World;

use super::capsule::Capsule;
use super::{filled_mib, rounds};
use crate::figures::{Samples, figure, ms, ratio};
use crate::qemu::{Ended, inheritable_pair, with_numbers};
use crate::{Outcome, Run, process};

/// Longest QEMU may take for anything.
const PATIENCE: Duration = Duration::from_secs(120);
/// Pause between two looks at a migration.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// Share of the memory that is written before the second pause, in percent.
const SHARE: u32 = 5;
/// The overlay in a sandbox's directory, and files of our own beside it.
const OVERLAY: &str = "root.qcow2";
const STATE: &str = "state";
const MEMORY: &str = "memory";
/// Where QEMU's own file is.
const SAVED: &str = "saved";
/// The name under which QEMU keeps a file for us.
const FD_NAME: &str = "bench";
/// We pause incrementally in at most this much of the time of QEMU's own save, and resume to the
/// first answer in at most this much of its own load.
const GOAL: f64 = 1.0;

/// What we took for the same guest, in milliseconds.
struct Ours {
    full: f64,
    incremental: f64,
    first_answer: f64,
}

/// Measures rounds.
pub(crate) fn run(run: &Run) -> Outcome {
    let mut world = World::new();
    let (ours, guest) = prepare(run, &mut world)?;
    let (mut saves, mut loads) = (Samples::default(), Samples::default());
    let mut bytes = 0.0;
    for round in 1..=rounds(run) {
        run.go_on()?;
        let (save, mib) = guest.in_namespace(|| guest.save())?;
        let load = guest.in_namespace(|| guest.load())?;
        run.note(&format!("round {round}: {save:.0} ms, {load:.0} ms"));
        saves.add(save);
        loads.add(load);
        bytes = mib;
    }
    figure("qemu_memory", run.memory_mib.into(), "MiB");
    saves.print("qemu_own_save", "ms");
    loads.print("qemu_own_load", "ms");
    figure("qemu_own_file", bytes, "MiB");
    figure("qemu_pause_full", ours.full, "ms");
    figure("qemu_pause_incremental", ours.incremental, "ms");
    figure("qemu_resume_first_answer", ours.first_answer, "ms");
    let over = |name: &str, our: f64, own: &Samples| ratio(name, our, own.p50(), GOAL);
    over("qemu_pause_full_over_own_save", ours.full, &saves);
    over(
        "qemu_pause_incremental_over_own_save",
        ours.incremental,
        &saves,
    );
    over("qemu_resume_over_own_load", ours.first_answer, &loads);
    Ok(())
}

/// Makes the guest, and takes from the store what it rests as.
fn prepare(run: &Run, world: &mut World) -> Outcome<(Ours, Own)> {
    let mut capsule = Capsule::create(world, run.memory_mib)?;
    capsule.fill(filled_mib(run))?;
    let full = capsule.pause()?.took;
    let (mut firsts, mut pauses) = (Samples::default(), Samples::default());
    let mut own = None;
    for _ in 0..rounds(run) {
        run.go_on()?;
        firsts.add(capsule.resume()?.first_answer);
        capsule.write(0, run.memory_mib * SHARE / 100)?;
        let pid = world.vmm_pid(&capsule.id);
        own = Some((process::arguments(pid)?, world.sandbox_dir(&capsule.id)));
        pauses.add(capsule.pause()?.took);
    }
    let ours = Ours {
        full,
        incremental: pauses.p50(),
        first_answer: firsts.p50(),
    };
    let disk = capsule.shown()?["disk_size_mb"].as_u64();
    let disk = Mib(u32::try_from(disk.ok_or("a capsule has a disk")?)?);
    let (arguments, sandbox) = own.ok_or("there is at least one round")?;
    // The store has one owner at a time.
    world.stop();
    let guest = Own::take(&world.data(), arguments, &sandbox, disk)?;
    world.start();
    capsule.through(world)?.destroy()?;
    Ok((ours, guest))
}

/// A guest at rest, and how QEMU is started for it.
struct Own {
    arguments: Vec<String>,
    memory: Mib,
    /// Overlay, device state, memory; and what QEMU saves.
    dir: TempDir,
}

impl Own {
    /// Takes the only snapshot out of the store below `data`.
    fn take(data: &Path, arguments: Vec<String>, sandbox: &Path, disk: Mib) -> Outcome<Self> {
        let dir = tempfile::Builder::new()
            .prefix("wrenn-bench-")
            .tempdir_in(data.parent().unwrap_or(data))?;
        let opened = DataDir::open(data)?;
        let store = Store::open(&opened.paths().store(), Limits::default())?;
        let manifest = newest(&store)?;
        let put = |image: ImageRef, name: &str| -> Outcome {
            let chunks = store.image(&image.digest)?;
            store.assemble(&chunks, image.len_bytes, &dir.path().join(name))?;
            Ok(())
        };
        put(manifest.disk, OVERLAY)?;
        let running = manifest.running.ok_or("the snapshot is of a disk alone")?;
        put(running.device_state, STATE)?;
        put(running.memory, MEMORY)?;
        let base = opened.paths().template_image(manifest.base);
        rebase(&dir.path().join(OVERLAY), &base, disk)?;
        let here = dir.path().to_string_lossy().into_owned();
        let there = sandbox.to_string_lossy().into_owned();
        let moved = arguments.iter().map(|it| it.replace(&there, &here));
        Ok(Self {
            arguments: moved.collect(),
            memory: manifest.machine.memory,
            dir,
        })
    }

    /// Runs `work` on a thread of its own, in a network namespace that goes with it.
    fn in_namespace<T: Send>(&self, work: impl FnOnce() -> Outcome<T> + Send) -> Outcome<T> {
        let done = thread::scope(|scope| {
            let inside = || {
                unshare(CloneFlags::CLONE_NEWNET).map_err(|err| err.to_string())?;
                work().map_err(|err| err.to_string())
            };
            scope.spawn(inside).join()
        });
        Ok(done.map_err(|_| "a measurement broke")??)
    }

    /// Starts QEMU over `memory`, waiting for a guest to come in.
    fn start(&self, memory: &OwnedFd) -> Outcome<(Ended, Qmp)> {
        let (qmp, qmp_theirs) = inheritable_pair()?;
        let (_console, console_theirs) = inheritable_pair()?;
        let mut arguments = with_numbers(&self.arguments, &qmp_theirs, &console_theirs, memory);
        if !arguments.iter().any(|it| it == "-incoming") {
            arguments.extend(["-incoming".to_owned(), "defer".to_owned()]);
        }
        let (program, rest) = arguments.split_first().ok_or("QEMU has no arguments")?;
        let mut command = Command::new(program);
        command
            .args(rest)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let child = Ended::of(command.spawn()?);
        drop((qmp_theirs, console_theirs));
        let qmp = Qmp::connect(qmp, Instant::now() + PATIENCE)?;
        Ok((child, qmp))
    }

    /// Memory for a guest; inherited, so made without close-on-exec.
    fn empty_memory(&self) -> Outcome<OwnedFd> {
        let memory = memfd_create(c"bench", MFdFlags::empty())?;
        ftruncate(&memory, i64::try_from(self.memory.bytes())?)?;
        Ok(memory)
    }

    /// Brings the guest back and has QEMU save it; milliseconds, and MiB of the file.
    fn save(&self) -> Outcome<(f64, f64)> {
        let memory = self.empty_memory()?;
        let mut into = File::from(memory.try_clone()?);
        std::io::copy(&mut File::open(self.dir.path().join(MEMORY))?, &mut into)?;
        let (child, qmp) = self.start(&memory)?;
        let state = File::open(self.dir.path().join(STATE))?;
        migrate(&qmp, "migrate-incoming", state.as_fd(), true)?;
        let path = self.dir.path().join(SAVED);
        let _old = fs::remove_file(&path);
        let file = File::create_new(&path)?;
        let began = Instant::now();
        migrate(&qmp, "migrate", file.as_fd(), false)?;
        file.sync_data()?;
        let took = began.elapsed();
        drop(child);
        let mib = file.metadata()?.len() as f64 / f64::from(1 << 20);
        Ok((ms(took), mib))
    }

    /// Has a new QEMU load what the last one saved, from its start to a guest that runs.
    fn load(&self) -> Outcome<f64> {
        let memory = self.empty_memory()?;
        let file = File::open(self.dir.path().join(SAVED))?;
        let began = Instant::now();
        let (child, qmp) = self.start(&memory)?;
        migrate(&qmp, "migrate-incoming", file.as_fd(), false)?;
        qmp.execute("cont", json!({}), Instant::now() + PATIENCE)?;
        let took = began.elapsed();
        drop(child);
        Ok(ms(took))
    }
}

/// The snapshot that was made last.
fn newest(store: &Store) -> Outcome<SnapshotManifest> {
    let mut all = Vec::new();
    for pin in store.manifests()? {
        if let Pin::Snapshot(digest) = pin {
            all.push(store.snapshot(&digest)?.manifest().clone());
        }
    }
    let newest = all.into_iter().max_by_key(|it| it.created_at);
    Ok(newest.ok_or("the store has no snapshot")?)
}

/// One migration to its end; without memory where `devices_only`.
fn migrate(qmp: &Qmp, command: &'static str, file: BorrowedFd<'_>, devices_only: bool) -> Outcome {
    let deadline = Instant::now() + PATIENCE;
    let capability = json!({ "capability": "x-ignore-shared", "state": devices_only });
    let capabilities = json!({ "capabilities": [capability] });
    qmp.execute("migrate-set-capabilities", capabilities, deadline)?;
    // The default is meant for networks: 128 MiB/s.
    let unbounded = json!({ "max-bandwidth": 1_u64 << 40 });
    qmp.execute("migrate-set-parameters", unbounded, deadline)?;
    qmp.execute_with_fd("getfd", json!({ "fdname": FD_NAME }), file, deadline)?;
    let uri = json!({ "uri": format!("fd:{FD_NAME}") });
    qmp.execute(command, uri, deadline)?;
    loop {
        let told = qmp.execute("query-migrate", json!({}), deadline)?;
        match told["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => return Err(told.to_string().into()),
            _ if Instant::now() > deadline => return Err("QEMU does not come to an end".into()),
            _ => thread::sleep(LOOK_AGAIN),
        }
    }
}

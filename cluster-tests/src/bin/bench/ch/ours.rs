//! A guest that our driver has saved, its memory in a real store, and how it is brought back: as a
//! shim does it, with the product's own pager process.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

use node::pager::handle::{Pager, PagerSpec, Waiting};
use node::pager::memory::GuestMemory;
use node::pager::page_map::PAGES;
use node::pager::prefetch::Fill;
use node::pager::region::Region;
use node::store::{Limits, Manifest, Store};
use node::vmm::{self, Accelerator, Confinement, Driver, Hardware, Vmm, VmmSpec};
use proto::units::Mib;
use tempfile::TempDir;
use wrenn_cluster_tests::world::wrenn;

use super::payload::{Console, await_mapped, fill};
use super::{PATIENCE, Resumed};
use crate::Outcome;
use crate::snapshots::faults::map_of;

/// What its VMM is called.
const NAME: &str = "wrenn-bench-ch";

/// A guest at one instant.
pub(super) struct Image {
    home: TempDir,
    spec: VmmSpec,
    hardware: Hardware,
    store: Store,
    manifest: Manifest,
}

/// What a guest is built from.
pub(super) fn spec(program: &Path, kernel: &Path, memory: Mib) -> VmmSpec {
    VmmSpec {
        driver: Driver::CloudHypervisor,
        program: program.to_owned(),
        accelerator: Accelerator::Kvm,
        kernel: kernel.to_owned(),
        // The payload has no use for one, and any file is one.
        initramfs: kernel.to_owned(),
        cmdline: String::new(),
        vcpus: 1,
        memory,
        root_disk: None,
        network: None,
        confinement: Confinement::of_probe(),
    }
}

impl Image {
    /// Boots `kernel`, saves it, and seals its memory.
    pub(super) fn make(program: &Path, kernel: &Path, memory: Mib) -> Outcome<Self> {
        let home = tempfile::Builder::new().prefix("wrenn-bench-").tempdir()?;
        let spec = spec(program, kernel, memory);
        let ram = GuestMemory::create(memory)?;
        let started = vmm::spawn(&spec, NAME, ram.as_fd(), Instant::now() + PATIENCE)?;
        let guest = Guest::new(started.vmm);
        let console = Console::listen(started.console);
        console.await_up()?;
        let state = File::options()
            .create_new(true)
            .read(true)
            .write(true)
            .open(home.path().join("state"))?;
        guest
            .0
            .save_state(state.as_fd(), Instant::now() + PATIENCE)?;
        let hardware = guest.0.hardware().clone();
        let content = File::from(ram.as_fd().try_clone_to_owned()?);
        fill(&content, memory)?;
        let store = Store::open(&home.path().join("store"), Limits::default())?;
        let seal = store.begin();
        let sealed = seal.image(&content, memory.bytes())?;
        drop(seal.finish(None)?);
        let manifest = store.image(&sealed.image.digest)?;
        Ok(Self {
            home,
            spec,
            hardware,
            store,
            manifest,
        })
    }

    /// Brings a guest back, from the start of the VMM's process on, and has it run until its memory
    /// is whole where `whole` says so: then all of it is pushed, and else only what it touches.
    pub(super) fn resume(&self, whole: bool) -> Outcome<Resumed> {
        let dir = self.lay_out()?;
        // Each has a position of its own.
        let state = File::open(self.home.path().join("state"))?;
        let deadline = Instant::now() + PATIENCE;
        let began = Instant::now();
        let memory = GuestMemory::create(self.spec.memory)?;
        let waiting = Waiting::start(&wrenn(), dir.path())?;
        let (ram, hardware) = (memory.as_fd(), &self.hardware);
        let started =
            vmm::spawn_incoming(&self.spec, hardware, state.as_fd(), NAME, ram, deadline)?;
        let guest = Guest::new(started.vmm);
        let console = Console::listen(started.console);
        let mut pager = pager_spec(dir.path(), guest.0.pid());
        if whole {
            pager.fill = Fill::Everything {
                bytes_per_second: 0,
            };
        }
        let pager = Pager::start_by(waiting, pager, None, &memory, deadline, drop)?;
        guest.0.load_state(state.as_fd(), deadline)?;
        guest.0.resume(deadline)?;
        let first = console.first()?.saturating_duration_since(began);
        let resident = match whole {
            false => None,
            true => Some(await_mapped(guest.0.pid(), self.spec.memory)? - began),
        };
        console.await_sound(2)?;
        drop(guest);
        pager.end(deadline);
        Ok(Resumed { first, resident })
    }

    /// A sandbox's directory, as the daemon leaves it for a shim.
    pub(super) fn lay_out(&self) -> Outcome<TempDir> {
        let dir = tempfile::Builder::new().prefix("wrenn-bench-").tempdir()?;
        let region = Region::new(self.spec.memory);
        map_of(&self.store, &self.manifest, region)?.write(&dir.path().join(PAGES))?;
        Ok(dir)
    }

    /// What it was saved from.
    pub(super) fn spec(&self) -> &VmmSpec {
        &self.spec
    }

    /// What it has to be brought back on.
    pub(super) fn hardware(&self) -> &Hardware {
        &self.hardware
    }

    /// What its device state is read from.
    pub(super) fn state_path(&self) -> PathBuf {
        self.home.path().join("state")
    }
}

fn pager_spec(dir: &Path, vmm: u32) -> PagerSpec {
    let socket = dir.join("pager.sock");
    PagerSpec {
        program: wrenn(),
        ..PagerSpec::new(dir, vmm, socket, NAME.to_owned())
    }
}

/// A VMM that does not outlive this.
struct Guest(Box<dyn Vmm>);

impl Guest {
    fn new(vmm: Box<dyn Vmm>) -> Self {
        Self(vmm)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended by itself; what matters is that it is reaped.
        let _gone = self.0.kill();
        let _reaped = self.0.wait(Instant::now() + PATIENCE);
    }
}

/// From the start of the process until a guest is in it.
pub(super) fn boot(program: &Path, kernel: &Path, memory: Mib) -> Outcome<std::time::Duration> {
    let ram = GuestMemory::create(memory)?;
    let spec = spec(program, kernel, memory);
    let started = vmm::spawn(&spec, NAME, ram.as_fd(), Instant::now() + PATIENCE)?;
    let _guest = Guest::new(started.vmm);
    Ok(started.took)
}

//! What this host offers: the hypervisor that really runs guests, and how much room there is.

use std::io;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;
use nix::sys::sysinfo::sysinfo;
use proto::units::{MIB_BYTES, Mib};
use raft::state::Resources;
use tokio::task;
use tracing::info;

use super::{Chosen, RunError, disk};
use crate::config::{AcceleratorChoice, Config};
use crate::net::{SlotPool, SlotTag};
use crate::sandbox::Host;
use crate::store::DataPaths;
use crate::template::Catalog;
use crate::vmm::Accelerator;
use crate::vmm::probe::{ProbeOutcome, ProbeRequest, probe};

/// Virtual processors offered for each real one. Agents' sandboxes wait far more than they
/// compute, and a shared processor costs them time, never correctness.
const VCPUS_PER_CORE: u32 = 8;
/// Of memory and free disk, the share offered to sandboxes; the rest is for VMMs, the daemon and
/// the host. Memory is never promised twice.
const OFFERED_PERCENT: u64 = 80;
/// Digits of a slot tag, in base 36.
const TAG_DIGITS: usize = 4;

/// Decides what runs guests, by running one.
pub(super) async fn choose_vmm(
    config: &Config,
    catalog: &Catalog,
    paths: &DataPaths,
) -> Result<Chosen, RunError> {
    let request = probe_request(config, catalog, paths);
    let program = request.qemu.clone();
    let probed = task::spawn_blocking(move || probe(&request)).await;
    let outcome = probed.map_err(|err| RunError::Broke(err.to_string()))??;
    for attempt in &outcome.attempts {
        let remembered = outcome.remembered;
        let (name, ok, detail) = (&attempt.accelerator, attempt.ok, &attempt.detail);
        info!(accelerator = name, ok, detail, remembered, "tried to run a guest");
    }
    let accelerator = pick(config.accelerator, &outcome)?;
    Ok(Chosen { program, version: outcome.version, accelerator })
}

/// What the probe is to try.
pub(super) fn probe_request(config: &Config, catalog: &Catalog, paths: &DataPaths) -> ProbeRequest {
    ProbeRequest {
        qemu: config.qemu.clone(),
        kernel: catalog.guest().kernel.clone(),
        initramfs: catalog.guest().initramfs.clone(),
        cache: Some(paths.cache().join("probe.json")),
    }
}

fn pick(choice: AcceleratorChoice, outcome: &ProbeOutcome) -> Result<Accelerator, RunError> {
    let wanted = match choice {
        AcceleratorChoice::Auto => return Ok(outcome.accelerator),
        AcceleratorChoice::Kvm => Accelerator::Kvm,
        AcceleratorChoice::Tcg => Accelerator::Tcg,
    };
    let tried = outcome.attempts.iter().find(|attempt| attempt.accelerator == wanted.name());
    match tried {
        Some(attempt) if !attempt.ok => Err(RunError::Accelerator {
            wanted: wanted.name(),
            why: attempt.detail.clone(),
        }),
        // Emulation is not tried where KVM works; it needs nothing that KVM does not.
        Some(_) | None => Ok(wanted),
    }
}

/// What all sandboxes of this node share.
pub(super) fn of(
    config: &Config,
    paths: &DataPaths,
    catalog: &Catalog,
    chosen: &Chosen,
    slots: SlotPool,
) -> Result<Host, RunError> {
    let guest = catalog.guest();
    Ok(Host {
        data: paths.clone(),
        slots,
        kernel: guest.kernel.clone(),
        kernel_release: guest.kernel_release.clone(),
        initramfs: guest.initramfs.clone(),
        vmm_program: chosen.program.clone(),
        accelerator: chosen.accelerator,
        dns: config.dns.clone(),
        wrenn: std::env::current_exe().map_err(disk("find this program"))?,
        boot_timeout: config.boot_timeout,
    })
}

/// What this node offers to sandboxes: what the configuration says, else what the host has.
pub(super) fn capacity(config: &Config) -> Result<Resources, RunError> {
    let cores = std::thread::available_parallelism().map_err(disk("count the processors"))?;
    let cores = u32::try_from(cores.get()).unwrap_or(u32::MAX);
    let memory = sysinfo().map_err(io::Error::from).map_err(disk("read the size of memory"))?;
    let free = free_bytes(&config.data_dir)?;
    let told = &config.capacity;
    Ok(Resources {
        vcpus: told.vcpus.unwrap_or_else(|| cores.saturating_mul(VCPUS_PER_CORE)),
        memory: told.memory.unwrap_or_else(|| share(memory.ram_total())),
        disk: told.disk.unwrap_or_else(|| share(free)),
        sandboxes: u32::from(config.slot_count),
    })
}

fn free_bytes(dir: &Path) -> Result<u64, RunError> {
    let vfs = statvfs(dir).map_err(io::Error::from).map_err(disk("read the free disk space"))?;
    Ok(vfs.blocks_available().saturating_mul(vfs.fragment_size()))
}

fn share(bytes: u64) -> Mib {
    Mib(u32::try_from(bytes / 100 * OFFERED_PERCENT / MIB_BYTES).unwrap_or(u32::MAX))
}

/// The tag of the node whose slots begin at `base`: nodes of one host have other bases.
pub(super) fn slot_tag(base: u16) -> Result<SlotTag, RunError> {
    let mut rest = usize::from(base);
    let mut digits = [b'0'; TAG_DIGITS];
    for digit in digits.iter_mut().rev() {
        *digit = b"0123456789abcdefghijklmnopqrstuvwxyz"[rest % 36];
        rest /= 36;
    }
    tag_of(&digits.map(char::from).iter().collect::<String>())
}

/// Where the tag in use is remembered, so that a clean-up finds what belongs to it.
pub(super) fn tag_file(paths: &DataPaths) -> PathBuf {
    paths.net().join("tag")
}

/// The tag that was in use; `None` where the node never got that far.
pub(super) fn known_tag(paths: &DataPaths) -> Result<Option<SlotTag>, RunError> {
    match std::fs::read_to_string(tag_file(paths)) {
        Ok(text) => tag_of(text.trim()).map(Some),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(err) => Err(disk("read the slot tag")(err)),
    }
}

fn tag_of(text: &str) -> Result<SlotTag, RunError> {
    text.parse().map_err(|_| {
        disk("read the slot tag")(io::Error::new(io::ErrorKind::InvalidData, "not a tag"))
    })
}

//! What this host offers: the hypervisor that really runs guests, and how much room there is.

use std::fs::File;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};

use raft::state::Resources;
use tokio::task;
use tracing::info;

use super::{Chosen, RunError, disk};
use crate::config::{AcceleratorChoice, Config};
use crate::net::{SlotPool, SlotTag};
use crate::sandbox::paging::Paging;
use crate::sandbox::{Host, Keeping, WarmStarts};
use crate::store::DataPaths;
use crate::template::{Catalog, GuestImages};
use crate::vmm::probe::{ProbeOutcome, ProbeRequest, probe};
use crate::vmm::{Accelerator, Driver, hardware_of};

/// Digits of a slot tag, in base 36.
const TAG_DIGITS: usize = 4;
/// Digits of the hash by which guests of the same releases are told apart.
const IMAGES_DIGITS: usize = 16;

/// Decides what runs guests, by running one.
pub(super) async fn choose_vmm(
    config: &Config,
    catalog: &Catalog,
    paths: &DataPaths,
) -> Result<Chosen, RunError> {
    let cache = paths.cache().join("probe.json");
    let request = probe_request(config, catalog.guest(), Some(cache));
    let program = request.qemu.clone();
    let probed = task::spawn_blocking(move || probe(&request)).await;
    let outcome = probed.map_err(|err| RunError::Broke(err.to_string()))??;
    for attempt in &outcome.attempts {
        let remembered = outcome.remembered;
        let (name, ok, detail) = (&attempt.accelerator, attempt.ok, &attempt.detail);
        info!(
            accelerator = name,
            ok, detail, remembered, "tried to run a guest"
        );
    }
    let accelerator = pick(config.accelerator, &outcome)?;
    let driver = Driver::Qemu;
    Ok(Chosen {
        program,
        hardware: hardware_of(driver, &outcome.version, accelerator)?,
        version: outcome.version,
        accelerator,
        driver,
    })
}

/// What the probe is to try.
pub(super) fn probe_request(
    config: &Config,
    guest: &GuestImages,
    cache: Option<PathBuf>,
) -> ProbeRequest {
    ProbeRequest {
        qemu: find_program(&config.qemu),
        kernel: guest.kernel.clone(),
        initramfs: guest.initramfs.clone(),
        cache,
    }
}

fn pick(choice: AcceleratorChoice, outcome: &ProbeOutcome) -> Result<Accelerator, RunError> {
    let wanted = match choice {
        AcceleratorChoice::Auto => return Ok(outcome.accelerator),
        AcceleratorChoice::Kvm => Accelerator::Kvm,
        AcceleratorChoice::Tcg => Accelerator::Tcg,
    };
    let tried = outcome
        .attempts
        .iter()
        .find(|attempt| attempt.accelerator == wanted.name());
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
    keeping: Keeping,
    paging: Option<Paging>,
) -> Result<Host, RunError> {
    let guest = catalog.guest();
    Ok(Host {
        data: paths.clone(),
        keeping,
        paging,
        slots,
        kernel: guest.kernel.clone(),
        kernel_release: guest.kernel_release.clone(),
        initramfs: guest.initramfs.clone(),
        vmm_driver: chosen.driver,
        vmm_program: chosen.program.clone(),
        accelerator: chosen.accelerator,
        wrenn: std::env::current_exe().map_err(disk("find this program"))?,
        warm: warm_starts(config, guest)?,
        boot_timeout: config.boot_timeout,
    })
}

/// Which guests start from one that had just booted: those that would have booted the same kernel
/// and agent. Releases alone do not tell images apart that were built anew.
fn warm_starts(config: &Config, guest: &GuestImages) -> Result<WarmStarts, RunError> {
    if !config.warm.create {
        return Ok(WarmStarts::default());
    }
    let mut images = blake3::Hasher::new();
    for image in [&guest.kernel, &guest.initramfs] {
        let hashed = File::open(image).and_then(|file| images.update_reader(file).map(drop));
        hashed.map_err(disk("read the guest's kernel and initramfs"))?;
    }
    let (kernel, agent) = (&guest.kernel_release, &guest.agent_version);
    let images = images.finalize().to_hex();
    let named = format!("{kernel} {agent} {}", &images[..IMAGES_DIGITS]);
    Ok(WarmStarts::new(Some(named)))
}

/// What this node offers to sandboxes.
pub(super) fn capacity(config: &Config) -> Resources {
    Resources {
        vcpus: config.capacity.vcpus,
        memory: config.capacity.memory,
        disk: config.capacity.disk,
        sandboxes: u32::from(config.slot_count),
    }
}

/// Where a program lies; a bare name is looked up in `PATH`, as a shell would.
fn find_program(program: &Path) -> PathBuf {
    if program.components().count() > 1 {
        return program.to_owned();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).map(|dir| dir.join(program));
    places
        .find(|place| place.is_file())
        .unwrap_or_else(|| program.to_owned())
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

/// The right to the slots of one tag on this host, until dropped. The kernel takes it back with
/// the process, and it leaves no file behind.
#[derive(Debug)]
pub(super) struct TagClaim(#[expect(dead_code, reason = "held open, never used")] UnixListener);

/// Claims the slots of `tag`; `None` where another process has them. Without this, a second node
/// with the same range would sweep the slots from under the first one's capsules.
pub(super) fn claim_tag(tag: &SlotTag) -> Result<Option<TagClaim>, RunError> {
    let name = SocketAddr::from_abstract_name(format!("wrenn-slots-{tag}"));
    match name.and_then(|name| UnixListener::bind_addr(&name)) {
        Ok(listener) => Ok(Some(TagClaim(listener))),
        Err(err) if err.kind() == io::ErrorKind::AddrInUse => Ok(None),
        Err(err) => Err(disk("claim the network slots")(err)),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slots_of_a_tag_have_one_user_at_a_time() {
        // No base leads to a tag with these letters, and other test runs have other ids.
        let id = std::process::id() % 1000;
        let tag = tag_of(&format!("y{id:03}")).expect("a tag");
        let other = tag_of(&format!("z{id:03}")).expect("a tag");
        let held = claim_tag(&tag).expect("asked");
        assert!(held.is_some());
        assert!(claim_tag(&tag).expect("asked").is_none());
        assert!(claim_tag(&other).expect("asked").is_some());
        drop(held);
        assert!(claim_tag(&tag).expect("asked").is_some());
    }
}

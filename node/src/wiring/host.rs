//! What this host offers: the hypervisor that really runs guests, and how much room there is.

use std::fs::File;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;

use raft::state::Resources;
use tracing::warn;

use super::hypervisor::Chosen;
use super::{RunError, disk};
use crate::base::chain::chain;
use crate::config::Config;
use crate::net::{SlotPool, SlotTag};
use crate::sandbox::paging::Paging;
use crate::sandbox::{Host, Keeping, WarmStarts};
use crate::store::DataPaths;
use crate::template::{Catalog, GuestImages};
use crate::vmm::cgroup;
use crate::vmm::confinement::{self, HostConfinement};

/// Digits of a slot tag, in base 36.
const TAG_DIGITS: usize = 4;
/// Digits of the hash by which guests of the same releases are told apart.
const IMAGES_DIGITS: usize = 16;

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
        confinement: confinement(config)?,
        wrenn: std::env::current_exe().map_err(disk("find this program"))?,
        warm: warm_starts(config, guest)?,
        boot_timeout: config.boot_timeout,
    })
}

/// How far this host lets VMMs be shut off, which is told once, here.
fn confinement(config: &Config) -> Result<HostConfinement, RunError> {
    let tag = slot_tag(config.slot_base)?;
    if let Err(err) = confinement::own_users() {
        let why = chain(&err);
        warn!(
            why,
            "VMMs have no users and no root directories of their own"
        );
    }
    match cgroup::missing_limits() {
        Ok(missing) if missing.is_empty() => {}
        Ok(missing) => warn!(?missing, "control groups do not limit all that VMMs use"),
        Err(err) => warn!(
            err = chain(&err),
            "VMMs have no control groups of their own"
        ),
    }
    Ok(HostConfinement::of_this_host(tag.as_str()))
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

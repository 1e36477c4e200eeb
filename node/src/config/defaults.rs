//! What a setting is where nobody says otherwise, each with its reason.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

/// Where a system service keeps its state.
pub const DATA_DIR: &str = "/var/lib/wrenn";
/// Below the data directory, so that one directory is all there is to move or remove.
pub const IMAGES_SUBDIR: &str = "images";
/// Loopback: whoever opens the API to a network decides to.
pub const LISTEN: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 7320));
/// Beside the API; bulk transfers take the port after it. All addresses, since a second host joins
/// with its token and nothing else: whoever has no key of the cluster gets no further than the
/// handshake.
pub const CLUSTER_LISTEN: SocketAddr =
    SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 7321));
/// The same on a machine that no default route leads out of: there is nobody else to listen for.
pub const CLUSTER_LISTEN_ALONE: SocketAddr =
    SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 7321));
/// Debian's name for it, found through `PATH`.
pub const QEMU: &str = "qemu-system-x86_64";
/// Cloud Hypervisor, looked up in `PATH`.
pub const CLOUD_HYPERVISOR: &str = "cloud-hypervisor";
/// Alone on its host, a node starts at the first slot.
pub const SLOT_BASE: u16 = 0;
/// More capsules than a common host has memory for, and few enough to sweep quickly.
pub const SLOT_COUNT: u16 = 64;
/// A burst of creates takes a slot each while the next ones are made in the background.
pub const SLOT_POOL: u16 = 4;
/// Capsules of agents mostly wait, so a core carries many of their processors.
pub const VCPUS_PER_CORE: u32 = 8;
/// Memory is not shared: what is left is for the host, the VMMs and the page cache.
pub const MEMORY_PERCENT: u64 = 80;
/// What is left keeps the host's file system out of the range where it slows down.
pub const DISK_PERCENT: u64 = 80;
/// An emulated guest on a busy host needs most of a minute; twice that is broken.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(120);
/// The first capsule of a shape is sealed once, and each later one skips seconds of booting.
pub const WARM_CREATE: bool = true;
/// Long enough to read the next day why a capsule ended.
pub const ENDED_RETENTION: Duration = Duration::from_secs(24 * 3600);

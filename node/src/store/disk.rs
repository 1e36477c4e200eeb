//! A sandbox's root disk: a qcow2 overlay whose backing file is a raw image.
//!
//! The overlay is written here, byte by byte, because starting `qemu-img` for it would cost more
//! than the rest of a create. An empty one is five facts: version-3 header, name and format of
//! the backing file, one refcount table, one refcount block that counts these very clusters, and an
//! empty first-level table large enough for the disk. Both VMMs open it as it is.
//!
//! ```text
//! cluster 0       header, extension "backing format = raw", path of the backing file
//! cluster 1       refcount table, one entry: cluster 2
//! cluster 2       refcount block: 1 for each cluster up to the end of the file
//! cluster 3 ..    first-level table, all zero: every read goes to the backing file
//! ```
//!
//! The disk may be larger than the image below it; what lies past the image's end reads as zero,
//! and the guest grows its file system into it. The overlay appears under its name whole or not at
//! all, and an existing one is never written over. It is not flushed: it holds nothing yet, and a
//! guest whose host lost power starts from its template again.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use nix::sys::statvfs::statvfs;
use proto::units::{MIB_BYTES, Mib};

use super::durable;
use super::error::{CreateOverlayError, RebaseError};
use super::manifest::MAX_IMAGE_BYTES;

/// The largest disk: a manifest must be able to describe it when it is sealed.
pub const MAX_DISK: Mib = Mib(4 << 20);
const _: () = assert!(MAX_DISK.bytes() == MAX_IMAGE_BYTES);
/// No new disk is begun with less free than this: the guests that run, and the node's own log,
/// need the rest.
pub const ROOM_KEPT: Mib = Mib(256);

const CLUSTER_BITS: u32 = 16;
const CLUSTER_BYTES: u64 = 1 << CLUSTER_BITS;
/// One second-level table fills a cluster with 8-byte entries; each maps a cluster.
const BYTES_PER_L1_ENTRY: u64 = CLUSTER_BYTES / 8 * CLUSTER_BYTES;
const REFCOUNT_TABLE_AT: u64 = CLUSTER_BYTES;
const REFCOUNT_BLOCK_AT: u64 = 2 * CLUSTER_BYTES;
const L1_TABLE_AT: u64 = 3 * CLUSTER_BYTES;
/// The format's limit for the path of a backing file.
const MAX_BASE_PATH_BYTES: usize = 1023;

const MAGIC: u32 = 0x5146_49fb;
const VERSION: u32 = 3;
const HEADER_BYTES: u32 = 104;
/// Refcounts are 2^4 bits wide.
const REFCOUNT_ORDER: u32 = 4;
/// Where the header has the features without which the image must not be opened.
const FEATURES_AT: u64 = 72;
/// One of them: whoever has it open for writing may hold back tables. Cloud Hypervisor says so from
/// its start to its end, whatever it holds back.
const IN_USE: u64 = 1;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const BACKING_FORMAT: &[u8; 3] = b"raw";
const EXTENSION_END: u32 = 0;
/// Names of features, which QEMU adds.
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;

// Every first-level table we make is counted by the one refcount block we write.
const _: () = assert!(
    3 + (MAX_DISK.bytes() / BYTES_PER_L1_ENTRY * 8).div_ceil(CLUSTER_BYTES) < CLUSTER_BYTES / 2
);

/// What to make.
#[derive(Clone, Copy, Debug)]
pub struct Overlay<'a> {
    /// The raw image below, by its absolute path. It must neither change nor move while an
    /// overlay names it.
    pub base: &'a Path,
    /// Size of the disk the guest sees; at least the image's.
    pub size: Mib,
}

impl Overlay<'_> {
    /// Makes the overlay at `path`.
    ///
    /// # Errors
    /// - [`CreateOverlayError::Size`], [`CreateOverlayError::SmallerThanBase`]: ask for another
    ///   size.
    /// - [`CreateOverlayError::Exists`]: there is one; it may hold a user's data.
    /// - [`CreateOverlayError::NoRoom`]: less than [`ROOM_KEPT`] is free.
    /// - [`CreateOverlayError::BasePath`], [`CreateOverlayError::Disk`]: this node is broken.
    pub fn create(&self, path: &Path) -> Result<(), CreateOverlayError> {
        self.check()?;
        check_room(path)?;
        let temp = durable::temp_beside(path);
        let made = self
            .write_new(&temp)
            .map_err(disk("write overlay", path))
            .and_then(|()| publish(&temp, path));
        // Gone already if it could not be made; the link under its real name stays.
        let _ = fs::remove_file(&temp);
        made
    }

    fn check(&self) -> Result<(), CreateOverlayError> {
        let asked = self.size;
        if asked < Mib(1) || asked > MAX_DISK {
            return Err(CreateOverlayError::Size {
                asked,
                max: MAX_DISK,
            });
        }
        let name_bytes = self.base.as_os_str().len();
        if !self.base.is_absolute() || name_bytes > MAX_BASE_PATH_BYTES {
            return Err(CreateOverlayError::BasePath {
                path: self.base.to_owned(),
                max_bytes: MAX_BASE_PATH_BYTES,
            });
        }
        let base = fs::metadata(self.base).map_err(disk("look at image", self.base))?;
        if base.len() > asked.bytes() {
            return Err(CreateOverlayError::SmallerThanBase {
                asked,
                base_bytes: base.len(),
            });
        }
        Ok(())
    }

    fn write_new(&self, temp: &Path) -> io::Result<()> {
        let file: File = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(durable::PRIVATE_FILE)
            .open(temp)?;
        let clusters = L1_TABLE_AT / CLUSTER_BYTES + self.l1_clusters();
        // What is not written below is zero: a hole.
        file.set_len(clusters * CLUSTER_BYTES)?;
        file.write_all_at(&self.header(), 0)?;
        file.write_all_at(&REFCOUNT_BLOCK_AT.to_be_bytes(), REFCOUNT_TABLE_AT)?;
        let ones: Vec<u8> = (0..clusters).flat_map(|_| 1_u16.to_be_bytes()).collect();
        file.write_all_at(&ones, REFCOUNT_BLOCK_AT)
    }

    fn l1_entries(&self) -> u64 {
        self.size.bytes().div_ceil(BYTES_PER_L1_ENTRY)
    }

    fn l1_clusters(&self) -> u64 {
        (self.l1_entries() * 8).div_ceil(CLUSTER_BYTES)
    }

    /// Header, extensions and backing path, as they stand in cluster 0. All big-endian.
    fn header(&self) -> Vec<u8> {
        let base = self.base.as_os_str().as_bytes();
        // The extensions: backing format (8 bytes of head, 3 padded to 8), then the end mark.
        let base_at = u64::from(HEADER_BYTES) + 16 + 8;
        let mut bytes = Vec::with_capacity(MAX_BASE_PATH_BYTES + 200);
        let put_u32 = |bytes: &mut Vec<u8>, number: u32| bytes.extend(number.to_be_bytes());
        let put_u64 = |bytes: &mut Vec<u8>, number: u64| bytes.extend(number.to_be_bytes());
        put_u32(&mut bytes, MAGIC);
        put_u32(&mut bytes, VERSION);
        put_u64(&mut bytes, base_at);
        put_u32(&mut bytes, small(base.len() as u64));
        put_u32(&mut bytes, CLUSTER_BITS);
        put_u64(&mut bytes, self.size.bytes());
        put_u32(&mut bytes, 0); // not encrypted
        put_u32(&mut bytes, small(self.l1_entries()));
        put_u64(&mut bytes, L1_TABLE_AT);
        put_u64(&mut bytes, REFCOUNT_TABLE_AT);
        put_u32(&mut bytes, 1); // clusters of the refcount table
        put_u32(&mut bytes, 0); // internal snapshots
        put_u64(&mut bytes, 0); // and where they are
        put_u64(&mut bytes, 0); // incompatible features
        put_u64(&mut bytes, 0); // compatible features
        put_u64(&mut bytes, 0); // features lost by a writer who does not know them
        put_u32(&mut bytes, REFCOUNT_ORDER);
        put_u32(&mut bytes, HEADER_BYTES);
        put_u32(&mut bytes, EXTENSION_BACKING_FORMAT);
        put_u32(&mut bytes, small(BACKING_FORMAT.len() as u64));
        bytes.extend(BACKING_FORMAT);
        bytes.extend([0; 5]);
        put_u64(&mut bytes, 0); // end of the extensions
        bytes.extend(base);
        bytes
    }
}

/// Puts an overlay that came from elsewhere on the same image at another path. The image must be the
/// same: nobody notices if it is not. Whoever made the overlay may be hostile: one that names other
/// files or needs anything that ours do not, is refused.
///
/// # Errors
/// See [`RebaseError`].
pub fn rebase(overlay: &Path, base: &Path, size: Mib) -> Result<(), RebaseError> {
    let failed = |source| RebaseError::Disk {
        path: overlay.to_owned(),
        source,
    };
    let garbled = || RebaseError::NotAnOverlay {
        path: overlay.to_owned(),
    };
    let name = base.as_os_str().as_bytes();
    if !base.is_absolute() || name.len() > MAX_BASE_PATH_BYTES {
        return Err(RebaseError::BasePath {
            path: base.to_owned(),
        });
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(overlay)
        .map_err(failed)?;
    let mut header = [0; HEADER_BYTES as usize];
    file.read_exact_at(&mut header, 0).map_err(failed)?;
    let u32_at = |at: usize| {
        u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    let name_at = u64::from(u32_at(8)) << 32 | u64::from(u32_at(12));
    let room = CLUSTER_BYTES.checked_sub(name_at).ok_or_else(garbled)?;
    let u64_at = |at: usize| u64::from(u32_at(at)) << 32 | u64::from(u32_at(at + 4));
    let ours = (u32_at(0), u32_at(4), u32_at(20)) == (MAGIC, VERSION, CLUSTER_BITS)
        && u64_at(24) == size.bytes()
        // Not encrypted, no snapshots inside, no features: no data file of its own, for one.
        && (u32_at(32), u32_at(60), u64_at(72) & !IN_USE) == (0, 0, 0)
        && name_at >= u64::from(HEADER_BYTES);
    if !ours || name.len() as u64 > room || !has_our_extensions(&file, u32_at(100), name_at) {
        return Err(garbled());
    }
    file.write_all_at(name, name_at).map_err(failed)?;
    file.write_all_at(&small(name.len() as u64).to_be_bytes(), 16)
        .map_err(failed)?;
    // It was sealed with its tables written, so nothing is to be repaired.
    file.write_all_at(&0_u64.to_be_bytes(), FEATURES_AT)
        .map_err(failed)?;
    file.sync_data().map_err(failed)
}

/// Whether an overlay's header says nothing beyond the format of the image below, and what QEMU itself
/// writes for people to read.
fn has_our_extensions(file: &File, header_bytes: u32, end: u64) -> bool {
    let mut at = u64::from(header_bytes);
    while at + 8 <= end {
        let mut head = [0; 8];
        if file.read_exact_at(&mut head, at).is_err() {
            return false;
        }
        let kind = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
        let length = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
        match kind {
            EXTENSION_END => return true,
            EXTENSION_BACKING_FORMAT => {
                let mut format = [0; BACKING_FORMAT.len()];
                let read = file.read_exact_at(&mut format, at + 8);
                if read.is_err()
                    || length != small(format.len() as u64)
                    || format != *BACKING_FORMAT
                {
                    return false;
                }
                at += 16;
            }
            EXTENSION_FEATURE_NAMES => at += 8 + u64::from(length).next_multiple_of(8),
            _ => return false,
        }
    }
    false
}

/// Numbers that [`Overlay::check`] has bounded far below 2^32.
fn small(number: u64) -> u32 {
    u32::try_from(number).expect("checked sizes fit 32 bits")
}

/// Gives the finished file its name, unless there is something of that name.
fn publish(temp: &Path, path: &Path) -> Result<(), CreateOverlayError> {
    match fs::hard_link(temp, path) {
        Ok(()) => Ok(()),
        Err(err) if err.kind() == io::ErrorKind::AlreadyExists => Err(CreateOverlayError::Exists {
            path: path.to_owned(),
        }),
        Err(err) => Err(disk("name overlay", path)(err)),
    }
}

fn check_room(path: &Path) -> Result<(), CreateOverlayError> {
    let dir = path.parent().unwrap_or(path);
    let stat = statvfs(dir).map_err(|errno| disk("ask for free space in", dir)(errno.into()))?;
    // What an unprivileged process could use: the rest is kept for root's emergencies.
    let free_bytes = stat.blocks_available() * stat.fragment_size();
    let free = Mib(u32::try_from(free_bytes / MIB_BYTES).unwrap_or(u32::MAX));
    if free < ROOM_KEPT {
        return Err(CreateOverlayError::NoRoom {
            path: path.to_owned(),
            free,
            needed: ROOM_KEPT,
        });
    }
    Ok(())
}

fn disk<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> CreateOverlayError + 'a {
    move |source| CreateOverlayError::Disk {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests;

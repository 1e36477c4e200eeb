//! Opening everything a group has on disk, in the order of trust: folder and lock, log and
//! identity, snapshots, state. Blocks.

use std::path::Path;
use std::sync::Arc;

use proto::ids::NodeId;

use super::config::SEGMENT_BYTES;
use super::{GroupConfig, OpenError};
use crate::disk::{Disk, RealDisk};
use crate::fault::FaultCell;
use crate::identity::{ClaimError, Home};
use crate::log::{Log, LogOptions};
use crate::machine::Machine;
use crate::snapshot::Snapshots;
use crate::store::Store;
use crate::types::DiskId;

/// Everything on disk, open.
pub(super) struct Opened<M> {
    pub(super) home: Home,
    pub(super) disk_id: DiskId,
    pub(super) store: Store<M>,
}

impl<M: Machine> Opened<M> {
    /// Finds or makes the group's files.
    pub(super) fn open(config: &GroupConfig, disk: Arc<dyn Disk>) -> Result<Self, OpenError> {
        let home = claim(&config.dir, disk.as_ref())?;
        let fault = FaultCell::new();
        let options = LogOptions {
            segment_bytes: config.segment_bytes,
            cache_bytes: config.cache_bytes,
        };
        let (log, disk_id) = open_log(&home, options, &disk, &fault)?;
        let snapshots =
            Snapshots::open(&home.snapshot_dir(), disk).map_err(OpenError::Snapshots)?;
        let store = Store::open(snapshots, &config.state_dir, Arc::new(log), fault)?;
        check_disk(&store, config.node_id, disk_id)?;
        Ok(Self {
            home,
            disk_id,
            store,
        })
    }
}

/// Makes, or finds, the folder with a log and the disk's identity, and starts nothing. Blocks.
///
/// A node that wants to join has to name its disk before it has an id of its own, and it must not
/// have taken part in anything under the new one: the disk identity it sends is the one a later
/// [`Group::open`](super::Group::open) in the same folder finds.
///
/// # Errors
/// [`OpenError`], as for opening the group.
pub fn prepare(dir: &Path) -> Result<DiskId, OpenError> {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let home = claim(dir, disk.as_ref())?;
    let options = LogOptions {
        segment_bytes: SEGMENT_BYTES,
        cache_bytes: 0,
    };
    let (log, disk_id) = open_log(&home, options, &disk, &FaultCell::new())?;
    off_runtime(|| log.stop());
    Ok(disk_id)
}

/// Runs `work` on a thread of its own: the log's handle must not block an async runtime.
pub(super) fn off_runtime<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// Takes the folder for this process.
pub(super) fn claim(dir: &Path, disk: &dyn Disk) -> Result<Home, OpenError> {
    Home::claim(dir, disk).map_err(|err| match err {
        ClaimError::Taken => OpenError::InUse(dir.to_owned()),
        ClaimError::Io(source) => OpenError::Disk(dir.to_owned(), source),
    })
}

/// Opens the log, making it and the disk's identity on the first start.
pub(super) fn open_log(
    home: &Home,
    options: LogOptions,
    disk: &Arc<dyn Disk>,
    fault: &FaultCell,
) -> Result<(Log, DiskId), OpenError> {
    let io = |source| OpenError::Disk(home.id_path(), source);
    let known = home.disk_id().map_err(io)?;
    if known.is_some() && !home.has_log().map_err(io)? {
        return Err(OpenError::LogGone(home.log_dir()));
    }
    let log = Log::open(&home.log_dir(), options, Arc::clone(disk), fault.clone())
        .map_err(|source| OpenError::Log(home.log_dir(), source))?;
    match known {
        Some(id) => Ok((log, id)),
        None if log.was_pristine() => {
            let id = home.make_disk_id(disk.as_ref()).map_err(io)?;
            Ok((log, id))
        }
        None => Err(OpenError::IdentityGone(home.id_path())),
    }
}

fn check_disk<M: Machine>(store: &Store<M>, id: NodeId, here: DiskId) -> Result<(), OpenError> {
    let membership = store.position().membership.membership();
    match membership.get_node(&id.0) {
        Some(node) if node.disk != here => Err(OpenError::OtherDisk {
            here,
            known: node.disk,
        }),
        _ => Ok(()),
    }
}

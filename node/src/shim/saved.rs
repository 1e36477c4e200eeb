//! What the daemon is told of a guest that can be saved, was saved, or was brought back.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proto::wire::shim as wire;

use crate::pager::stats::Stats;
use crate::shim::files;
use crate::shim::state::StateFile;

/// What a guest's virtual CPUs do by order of the daemon. Whether the lease has stopped their VMM
/// is another question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestStand {
    /// They run.
    Running,
    /// A save is under way.
    Saving,
    /// They stand still until [`ShimClient::thaw`](super::client::ShimClient::thaw) or their end;
    /// [`ShimClient::save`](super::client::ShimClient::save) tells again what was saved.
    Saved,
    /// They stand still until [`ShimClient::thaw`](super::client::ShimClient::thaw): the guest was
    /// restored, or could not go on after a save that failed.
    Still,
}

impl From<wire::Stand> for GuestStand {
    fn from(stand: wire::Stand) -> Self {
        match stand {
            wire::Stand::Running => Self::Running,
            wire::Stand::Saving => Self::Saving,
            wire::Stand::Saved => Self::Saved,
            wire::Stand::Still => Self::Still,
        }
    }
}

/// How long bringing back a guest took, past the start of its VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestoreTimings {
    /// Its memory.
    pub memory: Duration,
    /// Its devices.
    pub load: Duration,
}

/// How the memory of a guest comes that was restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagingStatus {
    /// The process that brings it.
    pub pager_pid: u32,
    /// How much of it this host holds.
    pub resident_bytes: u64,
    /// What that process has done so far; `None` while it is being replaced.
    pub counters: Option<Stats>,
}

impl From<wire::Paging> for PagingStatus {
    fn from(paging: wire::Paging) -> Self {
        Self {
            pager_pid: paging.pager_pid,
            resident_bytes: paging.resident_bytes,
            counters: paging.counters.map(Stats::from),
        }
    }
}

impl From<Stats> for wire::PagerCounters {
    fn from(stats: Stats) -> Self {
        let Stats {
            faults,
            hole_faults,
            peer_faults,
            discard_faults,
            pushed_windows,
            local_bytes,
            peer_bytes,
            zero_bytes,
            p50_ns,
            p99_ns,
            max_ns,
            stalled_questions,
            pushing_done,
            takeovers,
        } = stats;
        Self {
            faults,
            hole_faults,
            peer_faults,
            discard_faults,
            pushed_windows,
            local_bytes,
            peer_bytes,
            zero_bytes,
            p50_ns,
            p99_ns,
            max_ns,
            stalled_questions,
            pushing_done,
            takeovers,
        }
    }
}

impl From<wire::PagerCounters> for Stats {
    fn from(counters: wire::PagerCounters) -> Self {
        let wire::PagerCounters {
            faults,
            hole_faults,
            peer_faults,
            discard_faults,
            pushed_windows,
            local_bytes,
            peer_bytes,
            zero_bytes,
            p50_ns,
            p99_ns,
            max_ns,
            stalled_questions,
            pushing_done,
            takeovers,
        } = counters;
        Self {
            faults,
            hole_faults,
            peer_faults,
            discard_faults,
            pushed_windows,
            local_bytes,
            peer_bytes,
            zero_bytes,
            p50_ns,
            p99_ns,
            max_ns,
            stalled_questions,
            pushing_done,
            takeovers,
        }
    }
}

/// A guest that was saved and stands still, and where what makes it up can be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Its device state.
    pub state: StateFile,
    /// Its memory, of which only `dirty` has to be read.
    pub memory: SavedMemory,
    /// How long the guest stood still until its disk was flushed and its state written.
    pub state_took: Duration,
    /// How long finding the pages took.
    pub dirty_took: Duration,
    /// How long bringing both files to the disk took.
    pub sync_took: Duration,
}

impl Saved {
    /// What the shim in `dir` has `said`; `None` if it makes no sense.
    pub(super) fn from_wire(dir: &Path, said: wire::Saved) -> Option<Self> {
        let (pid, fd) = (said.shim_pid, said.memory_fd);
        let digest: [u8; blake3::OUT_LEN] = said.state_digest.try_into().ok()?;
        Some(Self {
            state: StateFile {
                path: dir.join(files::STATE),
                bytes: said.state_bytes,
                digest: digest.into(),
            },
            memory: SavedMemory {
                bytes: said.memory_bytes,
                dirty_bytes: said.dirty_bytes,
                rest_is_zero: said.rest_is_zero,
                path: PathBuf::from(format!("/proc/{pid}/fd/{fd}")),
            },
            state_took: Duration::from_micros(said.state_us),
            dirty_took: Duration::from_micros(said.dirty_us),
            sync_took: Duration::from_micros(said.sync_us),
        })
    }
}

/// The memory of a guest that stands still.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedMemory {
    /// Its length.
    pub bytes: u64,
    /// How much of it is listed in the file `dirty` ([`super::dirty::DirtyList::read`]).
    pub dirty_bytes: u64,
    /// The rest of it is zero; otherwise the list says what it is as in.
    pub rest_is_zero: bool,
    path: PathBuf,
}

impl SavedMemory {
    /// Opens it for reading; it stays open and whole, whatever becomes of the shim.
    ///
    /// # Errors
    /// The shim is gone, or is another process by now.
    pub fn open(&self) -> io::Result<File> {
        let file = File::open(&self.path)?;
        if file.metadata()?.len() == self.bytes {
            Ok(file)
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }
}

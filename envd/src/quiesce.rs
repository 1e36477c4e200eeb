//! Getting the guest ready to be sealed.
//!
//! Today: everything written reaches the disk, so that a disk sealed right after is complete.
//! Dropping connections and freezing the file system come with snapshots.

use std::io;

/// Writes all dirty data to the disks.
///
/// # Errors
/// When the thread that waits for the disks could not run.
pub async fn prepare() -> io::Result<()> {
    tokio::task::spawn_blocking(nix::unistd::sync)
        .await
        .map_err(io::Error::other)
}

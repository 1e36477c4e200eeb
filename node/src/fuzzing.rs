//! The parsers of this crate as fuzz targets, gathered from the rooms; the room `fuzz/` of the
//! workspace runs them.

use std::fs;
use std::path::PathBuf;

use proto::fuzzing::{Target, scratch};
use tempfile::TempDir;

/// The targets of every room.
#[must_use]
pub fn targets() -> Vec<Target> {
    let rooms = [
        crate::store::fuzzing::TARGETS,
        crate::pager::fuzzing::TARGETS,
        crate::vmm::qemu::fuzzing::TARGETS,
        crate::vmm::cloud_hypervisor::fuzzing::TARGETS,
        crate::shim::fuzzing::TARGETS,
        crate::guest::fuzzing::TARGETS,
        crate::net::fuzzing::TARGETS,
        crate::sandbox::fuzzing::TARGETS,
        crate::cluster::fuzzing::TARGETS,
        crate::relay::fuzzing::TARGETS,
        crate::template::fuzzing::TARGETS,
        crate::wiring::fuzzing::TARGETS,
    ];
    rooms.concat()
}

/// A directory of its own with `bytes` in the file `name`.
pub(crate) fn file_with(name: &str, bytes: &[u8]) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir_in(scratch()).expect("a directory");
    let path = dir.path().join(name);
    fs::write(&path, bytes).expect("written");
    (dir, path)
}

/// `bytes`, whose last 32 are made the BLAKE3 of those before, as files here end: damage is to get
/// behind the hash.
pub(crate) fn hashed(bytes: &[u8]) -> Vec<u8> {
    let body = &bytes[..bytes.len().saturating_sub(blake3::OUT_LEN)];
    [body, blake3::hash(body).as_bytes()].concat()
}

/// Runs a reader to its end. Bytes in memory are always there, so it does not wait.
pub(crate) fn now<T>(reading: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    runtime.expect("a runtime").block_on(reading)
}

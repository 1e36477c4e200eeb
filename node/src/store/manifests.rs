//! The manifests a store has: small durable files, each under its digest.
//!
//! ```text
//! images/<digest>      the manifest of an image
//! snapshots/<digest>   a signed snapshot manifest
//! bad/                 files that no longer match their names, moved here by a check
//! ```
//!
//! A file appears whole or not at all. Its name is the hash of its content, so every read is
//! checked.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::durable;
use super::error::{ReadManifestError, SealError};
use super::manifest::{ImageDigest, Manifest};
use super::pin::Pin;
use super::snapshot::{MAX_SIGNED_BYTES, SignedSnapshot, SnapshotDigest};

/// The manifests in a directory.
#[derive(Debug)]
pub(super) struct Manifests {
    images: PathBuf,
    snapshots: PathBuf,
    bad: PathBuf,
}

impl Manifests {
    /// Those in `dir`; what interrupted writes left behind is removed.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        let manifests = Self {
            images: dir.join("images"),
            snapshots: dir.join("snapshots"),
            bad: dir.join("bad"),
        };
        for dir in [&manifests.images, &manifests.snapshots, &manifests.bad] {
            durable::create_dir(dir)?;
            durable::remove_leftovers(dir)?;
        }
        Ok(manifests)
    }

    /// The manifest of an image.
    pub(super) fn image(&self, digest: &ImageDigest) -> Result<Manifest, ReadManifestError> {
        let pin = Pin::Image(*digest);
        let bytes = self.read(&pin)?;
        if *blake3::hash(&bytes).as_bytes() != digest.0 {
            return Err(ReadManifestError::Corrupt { pin });
        }
        Manifest::decode(&bytes).map_err(|source| ReadManifestError::Image { pin, source })
    }

    /// A snapshot. Whether its signer may seal was decided when it came into the store.
    pub(super) fn snapshot(
        &self,
        digest: &SnapshotDigest,
    ) -> Result<SignedSnapshot, ReadManifestError> {
        let pin = Pin::Snapshot(*digest);
        let bytes = self.read(&pin)?;
        let read = SignedSnapshot::decode(&bytes, |_| true)
            .map_err(|source| ReadManifestError::Snapshot { pin, source })?;
        if read.digest() != *digest {
            return Err(ReadManifestError::Corrupt { pin });
        }
        Ok(read)
    }

    /// Keeps the manifest of an image. Returns once it would survive a power cut.
    pub(super) fn put_image(&self, digest: &ImageDigest, bytes: &[u8]) -> Result<(), SealError> {
        self.put(&Pin::Image(*digest), bytes)
    }

    /// Keeps a snapshot. Returns once it would survive a power cut.
    pub(super) fn put_snapshot(&self, snapshot: &SignedSnapshot) -> Result<(), SealError> {
        self.put(&Pin::Snapshot(snapshot.digest()), &snapshot.encode())
    }

    /// Every manifest there is, sorted.
    pub(super) fn list(&self) -> io::Result<Vec<Pin>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.images)? {
            let name = entry?.file_name();
            let digest = name.to_str().and_then(|name| name.parse().ok());
            all.extend(digest.map(Pin::Image));
        }
        for entry in fs::read_dir(&self.snapshots)? {
            let name = entry?.file_name();
            let digest = name.to_str().and_then(|name| name.parse().ok());
            all.extend(digest.map(Pin::Snapshot));
        }
        all.sort_unstable();
        Ok(all)
    }

    /// Removes a manifest; fine if it is gone. [`Self::sync_names`] makes it last.
    pub(super) fn remove(&self, pin: &Pin) -> io::Result<()> {
        match fs::remove_file(self.path(pin)) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
            _ => Ok(()),
        }
    }

    /// Moves a manifest that is not what its name says out of the way.
    pub(super) fn set_aside(&self, pin: &Pin) -> io::Result<()> {
        let path = self.path(pin);
        if let Some(name) = path.file_name() {
            fs::rename(&path, self.bad.join(name))?;
        }
        self.sync_names()
    }

    /// Makes removals survive a power cut.
    pub(super) fn sync_names(&self) -> io::Result<()> {
        durable::sync_dir(&self.images)?;
        durable::sync_dir(&self.snapshots)
    }

    /// The file of a manifest.
    pub(super) fn path(&self, pin: &Pin) -> PathBuf {
        match pin {
            Pin::Image(digest) => self.images.join(digest.to_string()),
            Pin::Snapshot(digest) => self.snapshots.join(digest.to_string()),
        }
    }

    fn read(&self, pin: &Pin) -> Result<Vec<u8>, ReadManifestError> {
        let path = self.path(pin);
        let read = match pin {
            Pin::Image(_) => fs::read(&path),
            Pin::Snapshot(_) => read_small(&path),
        };
        read.map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ReadManifestError::Missing { pin: *pin },
            _ => ReadManifestError::Disk { path, source },
        })
    }

    fn put(&self, pin: &Pin, bytes: &[u8]) -> Result<(), SealError> {
        let path = self.path(pin);
        // One that is there and whole may have been put by somebody who has not synced it yet.
        let kept = if fs::read(&path).is_ok_and(|there| there == bytes) {
            sync_there(&path)
        } else {
            durable::write(&path, bytes)
        };
        kept.map_err(|source| SealError::of_disk("write manifest", &path, source))
    }
}

/// No more than a snapshot may have, and a byte to tell.
fn read_small(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let limit = MAX_SIGNED_BYTES as u64 + 1;
    File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn sync_there(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()?;
    durable::sync_dir(path.parent().unwrap_or(path))
}

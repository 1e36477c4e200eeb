//! Snapshots on their way between nodes: the protocol, and the end that has them.
//!
//! ```text
//! fetcher  header: version, snapshot digest
//! holder   length u32, signed snapshot | 3 x length u32, image manifest
//! fetcher  count u16, that many chunk names; again, as answers come in; count 0 ends it
//! holder   for each name in turn: length u32, the chunk's bytes; length 0 for one that is not here
//! ```
//!
//! Integers are big-endian. The holder reads ahead one request at most, and its answers wait for the
//! fetcher to read: nothing is buffered whole on either side.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::{task, time};

use super::chunk::ChunkId;
use super::engine::Store;
use super::error::ReadManifestError;
use super::snapshot::SnapshotDigest;

/// What this release speaks.
const VERSION: u8 = 1;
/// Longest a fetcher may take with what it got before it asks for more.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of a stream's header.
pub const HEADER_BYTES: usize = 1 + 32;
/// Most names in one request: 4 MiB of answers, of which both ends hold one request's at most.
pub(super) const NAMES_AT_ONCE: usize = 64;

/// The header by which a snapshot is asked for.
#[must_use]
pub fn header_for(digest: SnapshotDigest) -> [u8; HEADER_BYTES] {
    let mut header = [VERSION; HEADER_BYTES];
    header[1..].copy_from_slice(&digest.0);
    header
}

/// Which snapshot a stream is about; `None` where this release does not understand it.
#[must_use]
pub fn asked_for(header: &[u8]) -> Option<SnapshotDigest> {
    match header.split_first() {
        Some((&VERSION, digest)) => digest.try_into().ok().map(SnapshotDigest),
        _ => None,
    }
}

/// Why a snapshot could not be handed out.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// It is not here, or damaged.
    #[error("read the snapshot")]
    Read(#[from] ReadManifestError),
    /// The fetcher is gone, or asks for nonsense.
    #[error("talk to the fetcher")]
    Stream(#[from] io::Error),
}

impl Store {
    /// Hands out a snapshot on `stream`, to a peer that may have it.
    ///
    /// # Errors
    /// See [`ServeError`].
    pub async fn serve<S>(&self, digest: SnapshotDigest, stream: &mut S) -> Result<(), ServeError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let store = self.clone();
        let (signed, images) = blocking(move || {
            let signed = store.snapshot(&digest)?;
            let images = signed.manifest().images();
            let encoded = images.iter().map(|image| store.image(&image.digest));
            let encoded = encoded.map(|image| image.map(|image| image.encode()));
            let images = encoded.collect::<Result<Vec<_>, ReadManifestError>>()?;
            Ok::<_, ReadManifestError>((signed.encode(), images))
        })
        .await??;
        for part in std::iter::once(signed).chain(images) {
            write_part(stream, &part).await?;
        }
        loop {
            stream.flush().await?;
            let names = time::timeout(PATIENCE, read_names(stream)).await;
            let names = names.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
            if names.is_empty() {
                break;
            }
            let store = self.clone();
            let chunks = blocking(move || {
                let found = names.iter().map(|id| store.get(id).unwrap_or_default());
                found.collect::<Vec<_>>()
            });
            for chunk in chunks.await? {
                write_part(stream, &chunk).await?;
            }
        }
        stream.shutdown().await?;
        Ok(())
    }
}

async fn write_part(stream: &mut (impl AsyncWrite + Unpin), part: &[u8]) -> io::Result<()> {
    let length = u32::try_from(part.len()).map_err(io::Error::other)?;
    stream.write_u32(length).await?;
    stream.write_all(part).await
}

async fn read_names(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<ChunkId>> {
    let count = usize::from(stream.read_u16().await?);
    if count > NAMES_AT_ONCE {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a request for too many chunks",
        ));
    }
    let mut names = vec![ChunkId([0; 32]); count];
    for name in &mut names {
        stream.read_exact(&mut name.0).await?;
    }
    Ok(names)
}

/// Runs work on the store off the runtime's workers.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    task::spawn_blocking(work).await.map_err(io::Error::other)
}

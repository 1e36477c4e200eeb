//! The end that has snapshots: hands them out to peers that may have them.
//!
//! `exchange` has the words. The holder works on one request at a time and reads the next one after
//! it: its answers wait for the fetcher to read, so nothing is buffered whole on either side. What
//! turns out damaged while it is handed out is forgotten and said not to be here; whoever watches
//! [`Store::damage`] hears of it.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time;

use super::chunk::ChunkId;
use super::engine::Store;
use super::error::ReadManifestError;
use super::exchange::{Answer, Carried, blocking, read_names, write_answer, write_part};
use super::snapshot::SnapshotDigest;
use crate::base::at_once::at_once;

pub use super::exchange::{Asked, Wants};

/// Longest a fetcher may take with what it got before it asks for more.
const PATIENCE: Duration = Duration::from_secs(60);
/// The same where single chunks are asked for as a guest needs them: it may not need any for long.
const URGENT_PATIENCE: Duration = Duration::from_secs(15 * 60);

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
    /// Hands out on `stream` what a peer that may have it asks for.
    ///
    /// # Errors
    /// See [`ServeError`].
    pub async fn serve<S>(&self, asked: Asked, stream: &mut S) -> Result<(), ServeError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let patience = match asked.wants {
            Wants::Manifests | Wants::Chunks => PATIENCE,
            Wants::Urgent => URGENT_PATIENCE,
        };
        if asked.wants == Wants::Manifests {
            let store = self.clone();
            let parts = blocking(move || store.manifests_of(asked.digest)).await??;
            for part in parts {
                write_part(stream, &part).await?;
            }
            stream.flush().await?;
        }
        loop {
            let names = time::timeout(patience, read_names(stream)).await;
            let names = names.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
            if names.is_empty() {
                break;
            }
            let store = self.clone();
            let answers = move || store.answers(&names);
            let answers = match asked.wants {
                Wants::Urgent => at_once(answers).await.map_err(io::Error::other)?,
                Wants::Manifests | Wants::Chunks => blocking(answers).await?,
            };
            for answer in answers {
                write_answer(stream, &answer).await?;
            }
            stream.flush().await?;
        }
        stream.shutdown().await?;
        Ok(())
    }

    /// The snapshot and the manifests of its images, as they are sent.
    fn manifests_of(&self, digest: SnapshotDigest) -> Result<Vec<Vec<u8>>, ReadManifestError> {
        let signed = self.snapshot(&digest)?;
        let mut parts = vec![signed.encode()];
        for image in signed.manifest().images() {
            parts.push(self.image(&image.digest)?.encode());
        }
        Ok(parts)
    }

    fn answers(&self, names: &[ChunkId]) -> Vec<Answer> {
        let answer = |id| match self.core.stored(id) {
            Ok((place, stored)) => Answer::Here(Carried {
                encoding: place.encoding,
                chunk_bytes: place.chunk_bytes,
                stored: stored.into(),
            }),
            // Whatever is the matter here, the fetcher must ask somebody else.
            Err(_) => Answer::Lacks,
        };
        names.iter().map(answer).collect()
    }
}

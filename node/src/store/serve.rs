//! The end that has snapshots: hands them out to peers that may have them.
//!
//! `exchange` has the words. The holder works on one request at a time and reads the next one after
//! it: its answers wait for the fetcher to read, so nothing is buffered whole on either side. What
//! turns out damaged while it is handed out is forgotten and said not to be here; whoever watches
//! [`Store::damage`] hears of it.
//!
//! A peer that may have every snapshot is given any chunk that it names. One that may not hears of
//! all but its snapshot's own chunks that they are not here, and nothing is looked up for it: whether
//! this node has a chunk of somebody else's is told neither by the answer nor by how long it takes.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::OnceCell;
use tokio::time;

use super::chunk::{CHUNK_BYTES, ChunkId};
use super::engine::Store;
use super::error::ReadManifestError;
use super::exchange::{Answer, Carried, blocking, read_names, write_answer, write_part};
use super::extent::Content;
use super::snapshot::SnapshotDigest;
use crate::base::at_once::at_once;

pub use super::exchange::{Asked, Wants};

/// Longest a fetcher may take with what it got before it asks for more, or reads the next piece. It
/// writes a batch down meanwhile, and may wait for 64 MiB to be synced, which takes a slow disk ten
/// seconds. Whoever is cut off all the same opens another stream and goes on from there.
const PATIENCE: Duration = Duration::from_secs(30);
/// The same between questions where single chunks are asked for as a guest needs them: it may not
/// need any for long.
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

/// The chunks that a snapshot names, in order. Looked up when somebody asks for the first one.
type Names = Arc<OnceCell<Vec<ChunkId>>>;

/// What snapshots name, for as long as streams are served that may give nothing else. Streams of one
/// snapshot share it: 32 bytes a chunk are 2 MiB for 4 GiB of memory.
#[derive(Debug, Default)]
pub struct NamedChunks {
    of: Mutex<HashMap<SnapshotDigest, Weak<OnceCell<Vec<ChunkId>>>>>,
}

impl NamedChunks {
    fn of(&self, digest: SnapshotDigest) -> Names {
        let mut of = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        of.retain(|_, names| names.strong_count() > 0);
        if let Some(names) = of.get(&digest).and_then(Weak::upgrade) {
            return names;
        }
        let names = Names::default();
        of.insert(digest, Arc::downgrade(&names));
        names
    }
}

impl Store {
    /// Hands out on `stream` what a peer that may have every snapshot asks for.
    ///
    /// # Errors
    /// See [`ServeError`].
    pub async fn serve<S>(&self, asked: Asked, stream: &mut S) -> Result<(), ServeError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        self.serve_some(asked, None, stream).await
    }

    /// The same for a peer that may have this snapshot and perhaps no other: it is given no chunk
    /// that the snapshot does not name.
    ///
    /// # Errors
    /// See [`ServeError`].
    pub async fn serve_named<S>(
        &self,
        asked: Asked,
        named: &NamedChunks,
        stream: &mut S,
    ) -> Result<(), ServeError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let names = named.of(asked.digest);
        self.serve_some(asked, Some(names), stream).await
    }

    /// Hands out any chunk, or those of `only`.
    async fn serve_some<S>(
        &self,
        asked: Asked,
        only: Option<Names>,
        stream: &mut S,
    ) -> Result<(), ServeError>
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
                send_part(stream, &part).await?;
            }
            stream.flush().await?;
        }
        loop {
            let names = patiently(patience, read_names(stream)).await?;
            if names.is_empty() {
                break;
            }
            if let Some(only) = &only {
                only.get_or_try_init(|| self.names_of(asked.digest)).await?;
            }
            let (store, only) = (self.clone(), only.clone());
            let answers = move || store.answers(&names, only.as_ref());
            let answers = match asked.wants {
                Wants::Urgent => at_once(answers).await.map_err(io::Error::other)?,
                Wants::Manifests | Wants::Chunks => blocking(answers).await?,
            };
            for answer in answers {
                patiently(PATIENCE, write_answer(stream, &answer)).await?;
            }
            stream.flush().await?;
        }
        stream.shutdown().await?;
        Ok(())
    }

    /// The chunks of all images of a snapshot, in order.
    async fn names_of(&self, digest: SnapshotDigest) -> Result<Vec<ChunkId>, ServeError> {
        let store = self.clone();
        let read = move || -> Result<Vec<ChunkId>, ReadManifestError> {
            let mut names = Vec::new();
            for image in store.snapshot(&digest)?.manifest().images() {
                let manifest = store.image(&image.digest)?;
                names.extend(manifest.extents().iter().filter_map(|it| match it.content {
                    Content::Hole => None,
                    Content::Chunk { id, .. } => Some(id),
                }));
            }
            names.sort_unstable();
            names.dedup();
            names.shrink_to_fit();
            Ok(names)
        };
        Ok(blocking(read).await??)
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

    /// What is here of these, and of `only` where that is all the peer may have.
    fn answers(&self, names: &[ChunkId], only: Option<&Names>) -> Vec<Answer> {
        let is_given = |id: &ChunkId| {
            let is_named = |only: &Names| {
                let only = only.get();
                only.is_some_and(|only| only.binary_search(id).is_ok())
            };
            only.is_none_or(is_named)
        };
        let answer = |id: &ChunkId| {
            if !is_given(id) {
                return Answer::Lacks;
            }
            match self.core.stored(id) {
                Ok((place, stored)) => Answer::Here(Carried {
                    encoding: place.encoding,
                    chunk_bytes: place.chunk_bytes,
                    stored: stored.into(),
                }),
                // Whatever is the matter here, the fetcher must ask somebody else.
                Err(_) => Answer::Lacks,
            }
        };
        names.iter().map(answer).collect()
    }
}

/// Sends a manifest in pieces, of which the fetcher has to take one after the other: a large one takes
/// a slow network long, and a fetcher that does not read must not.
async fn send_part(stream: &mut (impl AsyncWrite + Unpin), part: &[u8]) -> io::Result<()> {
    let mut framed = Vec::with_capacity(size_of::<u32>() + part.len());
    write_part(&mut framed, part).await?;
    for piece in framed.chunks(CHUNK_BYTES) {
        patiently(PATIENCE, stream.write_all(piece)).await?;
    }
    Ok(())
}

/// Does what the fetcher has its share in, as long as it may take.
async fn patiently<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let done = time::timeout(limit, work).await;
    done.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

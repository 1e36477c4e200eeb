//! The first thing to have of a snapshot: what it consists of.
//!
//! Manifests that are here are used. Else the holders are asked, the next one whenever one has
//! failed or is slow, and the first who gives all of them is believed as far as hashes and the
//! sealer's signature go.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use proto::ids::NodeId;
use tokio::io::AsyncReadExt as _;
use tokio::time;
use tracing::warn;

use super::ledger::Owed;
use super::{Failed, FetchError, Holders, Part, STALL, Wire, blocking, patiently};
use crate::base::chain::chain;
use crate::store::chunk::{CHUNK_BYTES, ChunkId};
use crate::store::disk::MAX_DISK;
use crate::store::engine::Store;
use crate::store::exchange::{Asked, Wants};
use crate::store::extent::Content;
use crate::store::manifest::{Manifest, longest_bytes};
use crate::store::seal::Seal;
use crate::store::snapshot::{MAX_SIGNED_BYTES, SignedSnapshot, SnapshotDigest};

/// Largest manifest that is taken in. Either end has it in memory whole, and from
/// [`AT_ONCE`] holders, whose word for it is all there is until it has been hashed.
const MAX_MANIFEST_BYTES: u32 = 80 << 20;
/// So this much of an image may be in use, in chunks, if it is to be copied: what was written counts,
/// however large the disk is, and a disk may be larger by far.
const LARGEST_IN_USE_BYTES: u64 = 100 << 30;
const _: () = assert!(longest_bytes(LARGEST_IN_USE_BYTES) <= MAX_MANIFEST_BYTES as u64);
const _: () = assert!(LARGEST_IN_USE_BYTES < MAX_DISK.bytes());
/// How long the first holder is waited for before the next is asked as well: the manifests of a
/// large guest take a tenth of it on a network of 1 Gbit/s.
const NEXT_AFTER: Duration = Duration::from_secs(1);
/// Holders that are asked at once at most; each may make us hold its manifests.
const AT_ONCE: usize = 3;

/// The stream that the manifests came by: it has more to give.
pub(super) type First = Option<(NodeId, Box<dyn Wire>)>;

/// What a snapshot consists of.
pub(super) struct Opened {
    pub(super) signed: SignedSnapshot,
    /// In the order of the snapshot's images: memory first.
    pub(super) manifests: Arc<Vec<Manifest>>,
    /// Keeps its chunks from collections until the manifests are here and kept.
    _held: Seal,
}

impl Opened {
    /// Bytes of all its chunks.
    pub(super) fn whole_bytes(&self) -> u64 {
        let mut chunks: HashMap<ChunkId, u64> = HashMap::new();
        for (id, bytes) in self.manifests.iter().flat_map(chunks_of) {
            let longest = chunks.entry(id).or_default();
            *longest = bytes.max(*longest);
        }
        chunks.values().sum()
    }
}

/// The chunks of an image, with as many bytes of each as the image shows.
fn chunks_of(manifest: &Manifest) -> impl Iterator<Item = (ChunkId, u64)> {
    let extents = manifest.extents().iter();
    extents.filter_map(|extent| match extent.content {
        Content::Hole => None,
        Content::Chunk { id, within_bytes } => {
            Some((id, u64::from(within_bytes) + extent.len_bytes))
        }
    })
}

/// What is missing of that part of a snapshot, each chunk once: memory last.
pub(super) fn missing(store: &Store, manifests: &[Manifest], part: Part) -> Vec<Owed> {
    let (memory, others) = manifests.split_at(1.min(manifests.len()));
    let memory = memory.iter().skip(part.skips());
    let mut owed: Vec<Owed> = Vec::new();
    let mut at: HashMap<ChunkId, usize> = HashMap::new();
    for (id, bytes) in others.iter().chain(memory).flat_map(chunks_of) {
        match at.get(&id) {
            Some(place) => owed[*place].bytes = owed[*place].bytes.max(bytes),
            None if !store.has(&id) => {
                at.insert(id, owed.len());
                owed.push(Owed { id, bytes });
            }
            None => {}
        }
    }
    owed
}

/// Learns what the snapshot consists of.
pub(super) async fn open(
    store: &Store,
    digest: SnapshotDigest,
    holders: &dyn Holders,
) -> Result<(Opened, First), FetchError> {
    let here = store.clone();
    let here = blocking(move || held_here(&here, digest)).await;
    if let Some(opened) = here.map_err(FetchError::Cut)? {
        return Ok((opened, None));
    }
    let mut tried = Vec::new();
    let mut asked = FuturesUnordered::new();
    let mut left = holders.holders(digest).into_iter();
    let mut next_at = time::Instant::now();
    loop {
        let may_ask = asked.len() < AT_ONCE && left.len() > 0;
        tokio::select! {
            biased;
            Some((node, outcome)) = asked.next(), if !asked.is_empty() => match outcome {
                Ok((opened, wire)) => return Ok((opened, Some((node, wire)))),
                Err(Failed::Store(err)) => return Err(err.into()),
                Err(err) => {
                    let why = chain(&err);
                    warn!(%digest, %node, why, "a holder did not say what a snapshot consists of");
                    tried.push(format!("{node}: {why}"));
                    next_at = time::Instant::now();
                }
            },
            () = time::sleep_until(next_at), if may_ask => {
                if let Some(node) = left.next() {
                    asked.push(async move { (node, open_at(store, node, digest, holders).await) });
                    next_at = time::Instant::now() + NEXT_AFTER;
                }
            }
            else => break,
        }
    }
    let tried = match tried.is_empty() {
        true => "there is none".to_owned(),
        false => tried.join("; "),
    };
    Err(FetchError::NoHolder { digest, tried })
}

pub(super) fn held_here(store: &Store, digest: SnapshotDigest) -> Option<Opened> {
    let signed = store.snapshot(&digest).ok()?;
    let images = signed.manifest().images();
    let manifests = images.iter().map(|image| store.image(&image.digest));
    let manifests: Vec<Manifest> = manifests.collect::<Result<_, _>>().ok()?;
    let held = store.begin();
    manifests.iter().for_each(|manifest| {
        held.put_image(manifest);
    });
    Some(Opened {
        signed,
        manifests: Arc::new(manifests),
        _held: held,
    })
}

/// How much of a snapshot is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holding {
    /// All of it.
    Whole,
    /// Its manifest, and not all of what that names.
    Part,
    /// Not even that.
    Nothing,
}

impl Store {
    /// How much of a snapshot is here, by its manifests and the index. Blocks.
    #[must_use]
    pub fn holding(&self, digest: SnapshotDigest) -> Holding {
        let Ok(signed) = self.snapshot(&digest) else {
            return Holding::Nothing;
        };
        let whole = signed.manifest().images().iter().all(|image| {
            let manifest = self.image(&image.digest);
            manifest.is_ok_and(|manifest| self.missing(&manifest).is_empty())
        });
        if whole { Holding::Whole } else { Holding::Part }
    }
}

/// Asks one holder.
async fn open_at(
    store: &Store,
    node: NodeId,
    digest: SnapshotDigest,
    holders: &dyn Holders,
) -> Result<(Opened, Box<dyn Wire>), Failed> {
    let wants = Wants::Manifests;
    let header = Asked { digest, wants }.header();
    let mut wire = patiently(STALL, holders.open(node, header)).await?;
    let most = u32::try_from(MAX_SIGNED_BYTES).unwrap_or(u32::MAX);
    let signed = read_part(&mut wire, most, Failed::TooLong).await?;
    let signed = SignedSnapshot::decode(&signed, |key| holders.may_seal(key))?;
    if signed.digest() != digest {
        return Err(Failed::Another);
    }
    let mut manifests = Vec::new();
    let mut held = store.begin();
    for image in signed.manifest().images() {
        let bytes = read_part(&mut wire, MAX_MANIFEST_BYTES, Failed::ManifestTooLong).await?;
        let taken = blocking(move || {
            let manifest = Manifest::decode(&bytes)?;
            // From now on the chunks that are here are held.
            match held.put_image(&manifest) == image.digest {
                true => Ok((manifest, held)),
                false => Err(Failed::AnotherManifest),
            }
        });
        let (manifest, still_held) = taken.await??;
        manifests.push(manifest);
        held = still_held;
    }
    let opened = Opened {
        signed,
        manifests: Arc::new(manifests),
        _held: held,
    };
    Ok((opened, wire))
}

async fn read_part(
    wire: &mut Box<dyn Wire>,
    most: u32,
    too_long: fn(u32) -> Failed,
) -> Result<Vec<u8>, Failed> {
    let length = patiently(STALL, wire.read_u32()).await?;
    if length > most {
        return Err(too_long(length));
    }
    // Memory only for what has come, or is about to.
    let (mut part, whole) = (Vec::new(), length as usize);
    while part.len() < whole {
        let from = part.len();
        part.resize(whole.min(from + CHUNK_BYTES), 0);
        patiently(STALL, wire.read_exact(&mut part[from..])).await?;
    }
    Ok(part)
}

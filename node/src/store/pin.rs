//! What must be kept: named from outside, and what is under way here.
//!
//! The replicated state says which snapshots exist; it reaches a collection as a closure that lists
//! [`Pin`]s. What a seal has written or reused, and nobody names yet, is held here until the seal's
//! owner lets go of it, which is after its commit is visible to that closure.
//!
//! A collection looks at both, one after the other, while seals come and go. So from its first
//! instruction to its last it also keeps whatever is let go of meanwhile (the *late* ones): a seal
//! that is let go before the collection began has its commit seen by the closure, one that is let
//! go after is late, and there is no third.
//!
//! Chunks are held by the first 8 bytes of their names. Two that begin alike are kept together,
//! which costs room and never data.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::chunk::ChunkId;
use super::manifest::ImageDigest;
use super::snapshot::SnapshotDigest;

/// Something that must be kept, with everything it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pin {
    /// An image: its manifest and its chunks.
    Image(ImageDigest),
    /// A snapshot: its manifest and its images.
    Snapshot(SnapshotDigest),
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(digest) => write!(f, "image {digest}"),
            Self::Snapshot(digest) => write!(f, "snapshot {digest}"),
        }
    }
}

/// A set of chunks by the beginnings of their names.
#[derive(Clone, Debug, Default)]
pub(super) struct ChunkSet(HashSet<u64>);

impl ChunkSet {
    /// True if it was not there yet.
    pub(super) fn insert(&mut self, id: &ChunkId) -> bool {
        self.0.insert(beginning(id))
    }

    pub(super) fn contains(&self, id: &ChunkId) -> bool {
        self.0.contains(&beginning(id))
    }

    fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }
}

fn beginning(id: &ChunkId) -> u64 {
    let (beginning, _) = id.0.as_chunks::<8>();
    u64::from_ne_bytes(beginning[0])
}

/// What is held at the moment.
#[derive(Debug, Default)]
pub(super) struct Pins {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    held: HashMap<u64, Held>,
    /// What was let go since the running collection began.
    late: Option<Held>,
}

#[derive(Debug, Default)]
struct Held {
    chunks: ChunkSet,
    manifests: HashSet<Pin>,
}

impl Inner {
    fn all(&self) -> impl Iterator<Item = &Held> {
        self.held.values().chain(&self.late)
    }
}

impl Pins {
    /// Something new that holds, as yet nothing.
    pub(super) fn hold(self: &Arc<Self>) -> Hold {
        let mut inner = self.inner();
        let number = inner.next;
        inner.next += 1;
        inner.held.insert(number, Held::default());
        Hold {
            pins: Arc::clone(self),
            number,
        }
    }

    /// From now on, and until the answer is dropped, whatever is let go stays held.
    pub(super) fn begin_collection(&self) -> Collecting<'_> {
        self.inner().late = Some(Held::default());
        Collecting(self)
    }

    /// Every manifest that is held.
    pub(super) fn manifests(&self) -> HashSet<Pin> {
        let inner = self.inner();
        inner
            .all()
            .flat_map(|held| held.manifests.iter().copied())
            .collect()
    }

    /// Runs `act` unless the chunk is held, and lets nobody hold it meanwhile. Says whether it ran.
    pub(super) fn unless_held(&self, id: &ChunkId, act: impl FnOnce()) -> bool {
        let inner = self.inner();
        let held = inner.all().any(|held| held.chunks.contains(id));
        if !held {
            act();
        }
        !held
    }

    /// The same for a manifest.
    pub(super) fn unless_manifest_held<T>(&self, pin: &Pin, act: impl FnOnce() -> T) -> Option<T> {
        let inner = self.inner();
        let held = inner.all().any(|held| held.manifests.contains(pin));
        (!held).then(act)
    }

    /// Runs `act` while nobody begins to hold anything.
    pub(super) fn still<T>(&self, act: impl FnOnce() -> T) -> T {
        let _inner = self.inner();
        act()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A collection is running.
pub(super) struct Collecting<'a>(&'a Pins);

impl Drop for Collecting<'_> {
    fn drop(&mut self) {
        self.0.inner().late = None;
    }
}

/// Holds chunks and manifests until it is dropped.
#[derive(Debug)]
pub(super) struct Hold {
    pins: Arc<Pins>,
    number: u64,
}

impl Hold {
    /// Holds chunks. Whoever then finds one in the index keeps it: a collection that decided to
    /// drop it did so, and took it out of the index, before.
    pub(super) fn chunks<'a>(&self, ids: impl IntoIterator<Item = &'a ChunkId>) {
        let mut inner = self.pins.inner();
        if let Some(held) = inner.held.get_mut(&self.number) {
            for id in ids {
                held.chunks.insert(id);
            }
        }
    }

    /// Holds a manifest, and what it names for every collection that begins later.
    pub(super) fn manifest(&self, pin: Pin) {
        let mut inner = self.pins.inner();
        if let Some(held) = inner.held.get_mut(&self.number) {
            held.manifests.insert(pin);
        }
    }

    /// Holds only the manifests from now on: they are durable and name the chunks.
    pub(super) fn let_chunks_go(&self) {
        let mut inner = self.pins.inner();
        let held = inner.held.get_mut(&self.number);
        let chunks = held.map(|held| std::mem::take(&mut held.chunks));
        if let (Some(late), Some(chunks)) = (&mut inner.late, chunks) {
            late.chunks.extend(chunks);
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut inner = self.pins.inner();
        let held = inner.held.remove(&self.number);
        if let (Some(late), Some(held)) = (&mut inner.late, held) {
            late.chunks.extend(held.chunks);
            late.manifests.extend(held.manifests);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: ChunkId = ChunkId([9; 32]);
    const IMAGE: Pin = Pin::Image(ImageDigest([1; 32]));

    fn is_held(pins: &Pins) -> bool {
        let chunk = !pins.unless_held(&CHUNK, || {});
        assert_eq!(chunk, pins.unless_manifest_held(&IMAGE, || {}).is_none());
        chunk
    }

    #[test]
    fn what_is_held_stays_held_until_it_is_let_go() {
        let pins = Arc::new(Pins::default());
        assert!(!is_held(&pins));
        let hold = pins.hold();
        hold.chunks(&[CHUNK]);
        hold.manifest(IMAGE);
        assert!(is_held(&pins));
        drop(hold);
        assert!(!is_held(&pins));
    }

    #[test]
    fn what_is_let_go_during_a_collection_is_kept_to_its_end() {
        let pins = Arc::new(Pins::default());
        let hold = pins.hold();
        hold.chunks(&[CHUNK]);
        hold.manifest(IMAGE);
        let collection = pins.begin_collection();
        drop(hold);
        assert!(is_held(&pins));
        assert!(pins.manifests().contains(&IMAGE));
        drop(collection);
        assert!(!is_held(&pins));
    }

    #[test]
    fn chunks_let_go_before_their_manifest_count_in_a_running_collection_only() {
        let pins = Arc::new(Pins::default());
        let hold = pins.hold();
        hold.chunks(&[CHUNK]);
        let collection = pins.begin_collection();
        hold.let_chunks_go();
        assert!(!pins.unless_held(&CHUNK, || {}));
        drop(collection);
        assert!(pins.unless_held(&CHUNK, || {}));
    }

    #[test]
    fn two_holders_of_one_chunk_must_both_let_go() {
        let pins = Arc::new(Pins::default());
        let (first, second) = (pins.hold(), pins.hold());
        first.chunks(&[CHUNK]);
        second.chunks(&[CHUNK]);
        drop(first);
        assert!(!pins.unless_held(&CHUNK, || {}));
        drop(second);
        assert!(pins.unless_held(&CHUNK, || {}));
    }
}

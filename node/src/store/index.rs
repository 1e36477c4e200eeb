//! Where each chunk lies: a sled database that is never the truth.
//!
//! The packs say it themselves, so the index is only trusted if a guard file beside it says that it
//! was closed in good order over exactly these packs, and every entry adds up to the sum written
//! there. The guard is removed before the index is changed and written after it was flushed and
//! synced (sled's own flush does not reach the medium on Linux). On any doubt, also one that arises
//! while it is open (sled fails for good once its disk is full, and is known to panic), everything
//! is filled in again from the heads of the records; where sled cannot be had at all, into memory,
//! at some 60 bytes a chunk, until the next start.
//!
//! ```text
//! key    32 bytes chunk id
//! value  u32 pack  u32 offset  u32 stored  u32 chunk  u8 encoding
//! ```

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::thread;
use std::time::{Duration, Instant};

use super::chunk::{CHUNK_BYTES, ChunkId};
use super::codec::Encoding;
use super::record::{self, Head};
use guard::Guard;

pub(super) mod guard;

/// sled's page cache. A store of 100 GiB has about 100 MiB of entries; a seal that adds to them
/// touches pages all over, a resume finds most of its chunks side by side in nothing.
const CACHE_BYTES: u64 = 16 << 20;
/// Entries written at once when everything is filled in again.
const BATCH: usize = 1000;
/// Longest sled keeps its lock after its last handle is dropped: a thread of its own lets go of it,
/// in milliseconds as a rule.
const LOCK_LAG: Duration = Duration::from_secs(5);
/// How often the lock is tried meanwhile.
const LOCK_RETRY: Duration = Duration::from_millis(5);

const VALUE_BYTES: usize = 17;

/// Where a chunk lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) pack: u32,
    /// Where its record begins.
    pub(super) offset: u32,
    pub(super) stored_bytes: u32,
    pub(super) chunk_bytes: u32,
    pub(super) encoding: Encoding,
}

impl Place {
    /// The place of the record with this head; `None` if it is void.
    pub(super) fn of(pack: u32, offset: u32, head: &Head) -> Option<Self> {
        head.encoding.map(|encoding| Self {
            pack,
            offset,
            stored_bytes: head.stored_bytes,
            chunk_bytes: head.chunk_bytes,
            encoding,
        })
    }

    /// Bytes of its record.
    pub(super) fn record_bytes(&self) -> u32 {
        record::record_bytes(self.stored_bytes)
    }

    pub(super) fn encode(&self) -> [u8; VALUE_BYTES] {
        let mut bytes = [0; VALUE_BYTES];
        bytes[..4].copy_from_slice(&self.pack.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.offset.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.stored_bytes.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.chunk_bytes.to_le_bytes());
        bytes[16] = u8::from(self.encoding == Encoding::Zstd);
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Doubt> {
        let wrong = Doubt::Wrong("a garbled entry");
        let (numbers, rest) = bytes.as_chunks::<4>();
        let &[pack, offset, stored, chunk] = numbers else {
            return Err(wrong);
        };
        let encoding = match rest {
            [0] => Encoding::Raw,
            [1] => Encoding::Zstd,
            _ => return Err(wrong),
        };
        let place = Self {
            pack: u32::from_le_bytes(pack),
            offset: u32::from_le_bytes(offset),
            stored_bytes: u32::from_le_bytes(stored),
            chunk_bytes: u32::from_le_bytes(chunk),
            encoding,
        };
        // Whoever reads the chunk sets aside as much as is stored.
        let longest = place.stored_bytes.max(place.chunk_bytes) as usize;
        if longest > CHUNK_BYTES {
            return Err(wrong);
        }
        Ok(place)
    }
}

/// Why the index is not used.
#[derive(Debug, thiserror::Error)]
pub(super) enum Doubt {
    #[error("sled refuses")]
    Sled(#[from] sled::Error),
    #[error("sled panicked")]
    Panicked,
    #[error("{0}")]
    Wrong(&'static str),
    #[error("read or write beside the index")]
    Disk(#[from] io::Error),
}

/// Hands out every chunk of the packs and where it lies, oldest first.
pub(super) type Fill<'a> = &'a dyn Fn(&mut dyn FnMut(ChunkId, Place));

enum Backend {
    Sled(sled::Db),
    Memory(Mutex<HashMap<ChunkId, Place>>),
}

/// The index.
pub(super) struct Index {
    dir: PathBuf,
    guard: PathBuf,
    backend: RwLock<Backend>,
}

impl Index {
    /// The lengths of the packs over which the index in `dir` was closed in good order, if it was.
    /// The right to trust it is used up by asking.
    pub(super) fn take_guard(guard: &Path) -> io::Result<Option<Guard>> {
        let taken = Guard::read(guard);
        if taken.is_some() {
            fs::remove_file(guard)?;
            super::durable::sync_dir(guard.parent().unwrap_or(guard))?;
        }
        Ok(taken)
    }

    /// Opens the index in `dir`, as it is if `trusted` fits it, else filled in again.
    pub(super) fn open(dir: &Path, guard: &Path, trusted: Option<&Guard>, fill: Fill<'_>) -> Self {
        let loaded = trusted.and_then(|trusted| match load(dir, trusted) {
            Ok(db) => Some(Backend::Sled(db)),
            Err(doubt) => {
                tracing::warn!(%doubt, "the chunk index is not trusted");
                None
            }
        });
        let backend = loaded.unwrap_or_else(|| {
            rebuild(dir, fill).unwrap_or_else(|doubt| {
                tracing::warn!(%doubt, "the chunk index is kept in memory until the next start");
                in_memory(fill)
            })
        });
        Self {
            dir: dir.to_owned(),
            guard: guard.to_owned(),
            backend: RwLock::new(backend),
        }
    }

    /// Where the chunk lies, as far as the index knows.
    pub(super) fn get(&self, id: &ChunkId) -> Result<Option<Place>, Doubt> {
        match &*self.backend() {
            Backend::Sled(db) => {
                let value = guarded(|| db.get(id.0))?;
                value.map(|value| Place::decode(&value)).transpose()
            }
            Backend::Memory(map) => Ok(locked(map).get(id).copied()),
        }
    }

    /// Says where the chunk lies from now on.
    pub(super) fn insert(&self, id: &ChunkId, place: &Place) -> Result<(), Doubt> {
        match &*self.backend() {
            Backend::Sled(db) => {
                guarded(|| db.insert(id.0, &place.encode()))?;
            }
            Backend::Memory(map) => {
                locked(map).insert(*id, *place);
            }
        }
        Ok(())
    }

    /// Forgets the chunk.
    pub(super) fn remove(&self, id: &ChunkId) -> Result<(), Doubt> {
        match &*self.backend() {
            Backend::Sled(db) => {
                guarded(|| db.remove(id.0))?;
            }
            Backend::Memory(map) => {
                locked(map).remove(id);
            }
        }
        Ok(())
    }

    /// Shows every entry to `visit`; what changes meanwhile may be shown or not. `visit` may use
    /// the index.
    pub(super) fn each(&self, mut visit: impl FnMut(ChunkId, Place)) -> Result<(), Doubt> {
        let db = match &*self.backend() {
            Backend::Sled(db) => db.clone(),
            Backend::Memory(map) => {
                let copy: Vec<_> = locked(map)
                    .iter()
                    .map(|(id, place)| (*id, *place))
                    .collect();
                copy.into_iter().for_each(|(id, place)| visit(id, place));
                return Ok(());
            }
        };
        each_of(&db, |id, place, _| visit(id, place))
    }

    /// Fills everything in again, into memory: sled has just failed.
    pub(super) fn refill(&self, fill: Fill<'_>) {
        let mut backend = self.backend.write().unwrap_or_else(PoisonError::into_inner);
        let failed = std::mem::replace(&mut *backend, in_memory(fill));
        // It may panic once more on its way out.
        let _ = panic::catch_unwind(AssertUnwindSafe(|| drop(failed)));
    }

    /// Puts the index down so that the next start may trust it.
    pub(super) fn close(&self, packs: BTreeMap<u32, u32>) -> Result<(), Doubt> {
        let backend = self.backend();
        let Backend::Sled(db) = &*backend else {
            return Ok(());
        };
        let (entries, sum) = total(db)?;
        guarded(|| db.flush())?;
        File::open(self.dir.join("db"))?.sync_data()?;
        File::open(&self.dir)?.sync_all()?;
        let guard = Guard {
            entries,
            sum,
            packs,
        };
        guard.write(&self.guard)?;
        Ok(())
    }

    fn backend(&self) -> RwLockReadGuard<'_, Backend> {
        self.backend.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Index").field("dir", &self.dir).finish()
    }
}

/// An index that was closed in good order and reads back as it was.
fn load(dir: &Path, trusted: &Guard) -> Result<sled::Db, Doubt> {
    let db = open_db(dir)?;
    if total(&db)? != (trusted.entries, trusted.sum) {
        return Err(Doubt::Wrong("entries are missing, stale or too many"));
    }
    Ok(db)
}

fn rebuild(dir: &Path, fill: Fill<'_>) -> Result<Backend, Doubt> {
    match fs::remove_dir_all(dir) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err.into()),
        _ => {}
    }
    let db = open_db(dir)?;
    let mut failed = None;
    let mut batch = sled::Batch::default();
    let mut waiting = 0;
    fill(&mut |id, place| {
        if failed.is_some() {
            return;
        }
        batch.insert(&id.0, &place.encode());
        waiting += 1;
        if waiting == BATCH {
            waiting = 0;
            let full = std::mem::take(&mut batch);
            failed = guarded(|| db.apply_batch(full)).err();
        }
    });
    if let Some(doubt) = failed {
        return Err(doubt);
    }
    guarded(|| db.apply_batch(batch))?;
    Ok(Backend::Sled(db))
}

fn in_memory(fill: Fill<'_>) -> Backend {
    let mut map = HashMap::new();
    fill(&mut |id, place| {
        map.insert(id, place);
    });
    Backend::Memory(Mutex::new(map))
}

/// Opens sled, waiting while its lock is held: by nobody but an earlier handle of this process,
/// since the store's own lock keeps other processes out.
fn open_db(dir: &Path) -> Result<sled::Db, Doubt> {
    let give_up = Instant::now() + LOCK_LAG;
    loop {
        let config = sled::Config::new()
            .path(dir)
            .cache_capacity(CACHE_BYTES)
            // We sync ourselves, at the end.
            .flush_every_ms(None);
        match guarded(|| config.open()) {
            Err(Doubt::Sled(sled::Error::Io(err)))
                if err.to_string().contains("could not acquire lock")
                    && Instant::now() < give_up =>
            {
                thread::sleep(LOCK_RETRY);
            }
            opened => return opened,
        }
    }
}

/// Number and sum of all entries. The sum does not depend on their order.
fn total(db: &sled::Db) -> Result<(u64, u64), Doubt> {
    let (mut entries, mut sum) = (0, 0_u64);
    each_of(db, |_, _, crc| {
        entries += 1;
        sum = sum.wrapping_add(u64::from(crc));
    })?;
    Ok((entries, sum))
}

fn each_of(db: &sled::Db, mut visit: impl FnMut(ChunkId, Place, u32)) -> Result<(), Doubt> {
    let mut entries = guarded(|| Ok(db.iter()))?;
    while let Some((key, value)) = guarded(|| entries.next().transpose())? {
        let id = <[u8; 32]>::try_from(&*key).map_err(|_| Doubt::Wrong("a garbled key"))?;
        let crc = crc32c::crc32c_append(crc32c::crc32c(&key), &value);
        visit(ChunkId(id), Place::decode(&value)?, crc);
    }
    Ok(())
}

/// Calls sled, which is known to panic on files it does not like.
fn guarded<T>(call: impl FnOnce() -> sled::Result<T>) -> Result<T, Doubt> {
    match panic::catch_unwind(AssertUnwindSafe(call)) {
        Ok(done) => Ok(done?),
        Err(_) => Err(Doubt::Panicked),
    }
}

fn locked(map: &Mutex<HashMap<ChunkId, Place>>) -> MutexGuard<'_, HashMap<ChunkId, Place>> {
    map.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;

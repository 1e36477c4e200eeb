//! The daemon's half of paging: what a guest's memory is made of, and answers for its pager.
//!
//! ```text
//! resume    memory manifest, and where each chunk lies > D/pages, working set > D/working-set; the
//!           guest is admitted
//! pause     D/working-set, as the pager has left it > the next snapshot
//! it runs   pager.sock: "chunk C of sandbox S?" > in the store? where it is
//!                                               > else brought: the chunk itself, and into the store
//! restart   a guest that is retaken is admitted again, by the parent in its record
//! ```
//!
//! A pager reads packs by itself. It asks only for what was not here when its map was written, for
//! what a collection has moved since, and for what turned out damaged. As long as a guest is
//! admitted the snapshot below it is kept. Nobody is given the place of a chunk that is not of its
//! own guest's memory. What cannot be had now is waited for, visibly and not for ever (`waits.rs`).
//!
//! One task a connection, which asks one thing at a time. A daemon that ends breaks them all; their
//! pagers ask the next one again.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use nix::unistd::geteuid;
use proto::ids::SandboxId;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time;
use tracing::{debug, info_span, warn};

use super::coming::{Coming, Source};
use super::resources::Held;
use super::snapshot::SnapshotError;
use super::spec::Host;
use super::waits::{NotNow, Waiting, Waits, longest};
use crate::base::at_once::at_once;
use crate::base::chain::chain;
use crate::base::socket;
use crate::base::stop::Tasks;
use crate::pager::ask::{self, Answer, AskError, Question, Stored};
use crate::pager::handle::WORKING_SET;
use crate::pager::page_map::{self, MappedChunk, PAGES, PageMap, PageMapError, Place};
use crate::pager::region::{ImageOffset, Region};
use crate::pager::working_set::{self, WorkingSet};
use crate::store::{
    Carried, ChunkId, Content, Encoding, ImageRef, Location, Manifest, Pin, ReadChunkError,
    ReadManifestError, Seal, SealError, SnapshotDigest, SnapshotManifest, Store,
};

/// Connections served at once. A pager keeps a handful, of a guest whose working set comes from
/// elsewhere some twenty, and drops what is closed on it.
const CONNECTIONS: usize = 1024;
/// How long a connection without a question is kept: others may wait for its place.
const IDLE: Duration = Duration::from_secs(10);
/// Longest an answer may take. The pager gives up on the connection after 30 s, and asks again.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// Pause after the kernel had no descriptor for a new connection.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Why a chunk was not brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotBrought {
    /// Asking again may help.
    NotNow(NotNow),
    /// Nobody has it any more: its guest cannot go on.
    Gone(String),
}

/// Brings chunks of one snapshot into the store of this node.
pub trait Bringer: fmt::Debug + Send + Sync + 'static {
    /// Brings `chunk` into the store. Dropping the future may give up what is under way.
    fn bring(&self, chunk: ChunkId) -> BoxFuture<'_, Result<(), NotBrought>>;

    /// The same for a guest that stands still: what has come, as it came, for whoever asked to check;
    /// it is checked here and stored after that. `None` where it is stored already.
    fn rush(&self, chunk: ChunkId) -> BoxFuture<'_, Result<Option<Carried>, NotBrought>> {
        Box::pin(async move { self.bring(chunk).await.map(|()| None) })
    }
}

/// The guests of this node whose memory comes as they touch it.
#[derive(Clone)]
pub struct Paging {
    shared: Arc<Shared>,
}

struct Shared {
    store: Store,
    guests: Mutex<HashMap<SandboxId, Arc<Memory>>>,
    /// A pager may watch over a VMM's page faults; else it can only answer one that asks.
    watches: bool,
}

/// What one guest's memory comes from.
#[derive(Debug)]
struct Memory {
    snapshot: SnapshotDigest,
    bringer: Arc<dyn Bringer>,
    /// The chunks of its memory, in order; looked up when the first question comes.
    chunks: OnceLock<Vec<ChunkId>>,
    waits: Mutex<Waits>,
}

/// A guest whose pager is answered as long as this lives.
#[derive(Debug)]
pub struct Admitted {
    paging: Paging,
    sandbox: SandboxId,
    source: Arc<Memory>,
}

impl fmt::Debug for Paging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Paging").finish_non_exhaustive()
    }
}

impl Paging {
    /// Paging out of `store`. No guest is admitted yet.
    #[must_use]
    pub fn new(store: Store) -> Self {
        Self::with(store, true)
    }

    /// The same on a host where no pager may watch over a VMM's page faults: only a VMM that asks for
    /// pages by itself gets them this way.
    #[must_use]
    pub fn by_questions(store: Store) -> Self {
        Self::with(store, false)
    }

    fn with(store: Store, watches: bool) -> Self {
        let shared = Shared {
            store,
            guests: Mutex::default(),
            watches,
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Whether a pager may watch over a VMM's page faults on this host.
    #[must_use]
    pub fn watches(&self) -> bool {
        self.shared.watches
    }

    /// Answers for the memory of `sandbox`, which comes from `snapshot`, from now on.
    pub fn admit(
        &self,
        sandbox: SandboxId,
        snapshot: SnapshotDigest,
        bringer: Arc<dyn Bringer>,
    ) -> Admitted {
        let source = Arc::new(Memory {
            snapshot,
            bringer,
            chunks: OnceLock::new(),
            waits: Mutex::default(),
        });
        self.guests().insert(sandbox, Arc::clone(&source));
        Admitted {
            paging: self.clone(),
            sandbox,
            source,
        }
    }

    /// What the guest of a sandbox stands still for, where it has for a while.
    #[must_use]
    pub fn waiting(&self, sandbox: SandboxId) -> Option<Waiting> {
        let memory = self.guests().get(&sandbox).cloned()?;
        memory.waits().shown()
    }

    /// Answers pagers on `socket` until `tasks` are stopped.
    ///
    /// # Errors
    /// The socket cannot be bound.
    pub fn serve(&self, socket: &Path, tasks: &Tasks) -> io::Result<()> {
        let listener = socket::listen(socket)?;
        let (paging, all) = (self.clone(), tasks.clone());
        let stop = tasks.token().clone();
        tasks.spawn(info_span!("pagers"), async move {
            stop.run_until_cancelled(paging.accept_all(&listener, &all))
                .await;
        });
        Ok(())
    }

    async fn accept_all(&self, listener: &UnixListener, tasks: &Tasks) {
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok((stream, _)) => self.spawn(stream, place, tasks),
                Err(err) => {
                    warn!(%err, "a pager could not be let in");
                    time::sleep(ACCEPT_AGAIN).await;
                }
            }
        }
    }

    fn spawn(&self, mut stream: UnixStream, place: OwnedSemaphorePermit, tasks: &Tasks) {
        match stream.peer_cred() {
            Ok(peer) if peer.uid() == geteuid().as_raw() => {}
            peer => {
                warn!(?peer, "one who is no pager of ours was turned away");
                return;
            }
        }
        let (paging, stop) = (self.clone(), tasks.token().clone());
        tasks.spawn(info_span!("pager"), async move {
            let served = paging.answer_all(&mut stream);
            if let Some(Err(err)) = stop.run_until_cancelled(served).await {
                // It asks again, on another connection.
                debug!(err = chain(&err), "a pager's connection broke");
            }
            drop(place);
        });
    }

    async fn answer_all(&self, stream: &mut UnixStream) -> Result<(), AskError> {
        loop {
            let Ok(question) = time::timeout(IDLE, ask::next_question(stream)).await else {
                return Ok(());
            };
            let Some(question) = question? else {
                return Ok(());
            };
            let answer = self.answer(&question).await;
            ask::answer(stream, &answer).await?;
        }
    }

    async fn answer(&self, question: &Question) -> Answer {
        let id = question.sandbox.parse();
        let source = id.ok().and_then(|id| self.guests().get(&id).cloned());
        let Some(source) = source else {
            // It may be retaken in a moment, or be on its way out.
            return Answer::NotNow("no such guest is known on this host".into());
        };
        let found = self.find(&source, question);
        let found = time::timeout(ANSWER_TIMEOUT, found).await;
        let found = found.unwrap_or_else(|_| Err(not_now("it takes long to bring it")));
        match source.unless_too_long(question.chunk, found) {
            Ok(answer) => answer,
            Err(NotBrought::NotNow(reason)) => Answer::NotNow(reason.why),
            Err(NotBrought::Gone(why)) => {
                warn!(sandbox = question.sandbox, chunk = %question.chunk, why, "memory is lost");
                Answer::Gone(why)
            }
        }
    }

    async fn find(&self, source: &Arc<Memory>, question: &Question) -> Result<Answer, NotBrought> {
        let chunk = question.chunk;
        if let Some(location) = self.look(source, chunk, question.spoiled).await? {
            return Ok(Answer::At(place(location)));
        }
        // Who was given wrong bytes is given none again: they are checked here, and holders tried, first.
        if question.takes_bytes && !question.spoiled {
            if let Some(carried) = source.bringer.rush(chunk).await? {
                return Ok(Answer::Here(given(carried)));
            }
        } else {
            source.bringer.bring(chunk).await?;
        }
        let location = self.look(source, chunk, false).await?;
        // Collected in the same instant, or damaged again.
        let lost = || not_now("it was brought, and is not here");
        location.map(place).map(Answer::At).ok_or_else(lost)
    }

    /// Where the chunk is on this node, if it is.
    async fn look(
        &self,
        source: &Arc<Memory>,
        chunk: ChunkId,
        spoiled: bool,
    ) -> Result<Option<Location>, NotBrought> {
        let (store, source) = (self.shared.store.clone(), Arc::clone(source));
        let looked = at_once(move || {
            if !source.has(&store, &chunk)? {
                let gone = "it is not of this guest's memory";
                return Err(NotBrought::Gone(gone.into()));
            }
            if spoiled {
                check(&store, &chunk)?;
            }
            Ok(store.locate(&chunk))
        });
        let cut = |err| not_now(format!("the host's daemon is ending: {err}"));
        looked.await.map_err(cut)?
    }

    fn guests(&self) -> MutexGuard<'_, HashMap<SandboxId, Arc<Memory>>> {
        let guests = &self.shared.guests;
        guests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads a chunk whose bytes someone found to be wrong: the place may have been an old one. What is
/// damaged here is forgotten, so that it is brought again.
fn check(store: &Store, chunk: &ChunkId) -> Result<(), NotBrought> {
    match store.get(chunk) {
        Ok(_) | Err(ReadChunkError::Missing { .. } | ReadChunkError::Corrupt { .. }) => Ok(()),
        Err(err) => Err(not_now(chain(&err))),
    }
}

fn not_now(why: impl Into<String>) -> NotBrought {
    NotBrought::NotNow(NotNow {
        why: why.into(),
        away: Vec::new(),
    })
}

impl Memory {
    /// Whether the chunk is of this guest's memory. Blocks.
    fn has(&self, store: &Store, chunk: &ChunkId) -> Result<bool, NotBrought> {
        let chunks = match self.chunks.get() {
            Some(chunks) => chunks,
            None => {
                let read = self.read_chunks(store);
                let read = read.map_err(|err| not_now(chain(&err)))?;
                self.chunks.get_or_init(|| read)
            }
        };
        Ok(chunks.binary_search(chunk).is_ok())
    }

    /// What came of a question for `chunk`. What was put off for too long is lost.
    fn unless_too_long<T>(
        &self,
        chunk: ChunkId,
        found: Result<T, NotBrought>,
    ) -> Result<T, NotBrought> {
        let mut waits = self.waits();
        let Err(NotBrought::NotNow(reason)) = &found else {
            waits.over(chunk);
            return found;
        };
        if !waits.note(chunk, reason.clone()) {
            return found;
        }
        let back = match reason.away.as_slice() {
            [] => "it can be had".to_owned(),
            away => format!("{} can be reached", away.join(" or ")),
        };
        let (why, longest) = (&reason.why, longest());
        let told = format!("{why}; that was waited for {longest:?} long: try again once {back}");
        Err(NotBrought::Gone(told))
    }

    fn waits(&self) -> MutexGuard<'_, Waits> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_chunks(&self, store: &Store) -> Result<Vec<ChunkId>, ReadManifestError> {
        let snapshot = store.snapshot(&self.snapshot)?;
        // What runs from a snapshot has its memory in it.
        let Some(running) = snapshot.manifest().running else {
            return Ok(Vec::new());
        };
        let memory = store.image(&running.memory.digest)?;
        let mut chunks: Vec<ChunkId> = chunks_of(&memory).map(|(id, ..)| id).collect();
        chunks.sort_unstable();
        chunks.dedup();
        Ok(chunks)
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut guests = self.paging.guests();
        // A later life of the same sandbox may have been admitted.
        let ours = guests.get(&self.sandbox);
        if ours.is_some_and(|it| Arc::ptr_eq(it, &self.source)) {
            guests.remove(&self.sandbox);
        }
    }
}

impl Held {
    /// Has the pager of `sandbox`, which goes on from `parent`, answered, if it has one.
    pub(super) fn admit_pager(&mut self, host: &Host, sandbox: SandboxId, parent: SnapshotDigest) {
        if let (Some(paging), Some(Source::Coming { coming, .. })) = (&host.paging, &self.source) {
            self.paged = Some(paging.admit(sandbox, parent, Arc::new(coming.clone())));
        }
    }

    /// What of its memory the guest stands still for, as the end of a sentence; nothing where it does
    /// not.
    pub(super) fn waits_in_words(&self) -> String {
        let waiting = self.paged.as_ref().and_then(|it| it.source.waits().shown());
        waiting.map_or_else(String::new, |it| {
            format!("; its memory was waited for: {}", it.reason.why)
        })
    }

    /// After a restart: keeps what the guest goes on from, has the rest of it follow, and has its pager
    /// answered.
    pub(super) fn find_source(&mut self, host: &Host) {
        let parent = self.record.parent.as_deref().map(str::parse);
        let Some(Ok(parent)) = parent else {
            return;
        };
        let status = self.shim.as_ref().map(|shim| shim.known_status());
        let paged = status.filter(|it| it.paging.is_some()).map(|it| it.sandbox);
        let Some(sandbox) = paged else {
            let kept = host.keeping.store.keep([Pin::Snapshot(parent)]);
            self.source = Some(Source::Whole(kept));
            return;
        };
        let mut source = Source::coming(Coming::new(&host.keeping, parent));
        source.follow();
        self.source = Some(source);
        let last_seal = self.record.last_seal.as_deref().map(str::parse);
        if let Some(Ok(last_seal)) = last_seal {
            self.last_seal = Some(host.keeping.store.keep([Pin::Image(last_seal)]));
        }
        self.admit_pager(host, sandbox, parent);
    }

    /// Ends the recording of the working set. A guest without one only comes up slower next time.
    pub(super) async fn mark_ready(&self) {
        if let Some(shim) = &self.shim
            && let Err(err) = shim.mark_ready().await
        {
            warn!(err = chain(&err), "the working set is not recorded");
        }
    }
}

/// Writes down for the pager where the memory of `snapshot` lies, and what of it to bring first.
/// Blocks.
pub(super) fn describe(
    store: &Store,
    snapshot: &SnapshotManifest,
    dir: &Path,
) -> Result<(), SnapshotError> {
    let running = snapshot.running.ok_or(SnapshotError::OtherKind)?;
    let memory = store.image(&running.memory.digest)?;
    map_of(store, &memory)?.write(&dir.join(PAGES))?;
    if let Some(set) = snapshot.working_set
        && let Err(why) = lay_out_working_set(store, set, &dir.join(WORKING_SET))
    {
        warn!(why, "resumes without its working set");
    }
    Ok(())
}

/// A guest comes up without it, so no reason is worth more than a word.
fn lay_out_working_set(store: &Store, set: ImageRef, path: &Path) -> Result<(), String> {
    if set.len_bytes > working_set::MAX_FILE_BYTES {
        return Err(format!("it has {} bytes, which is too long", set.len_bytes));
    }
    let manifest = store.image(&set.digest).map_err(|err| chain(&err))?;
    let made = store.assemble(&manifest, set.len_bytes, path);
    made.map_err(|err| chain(&err))
}

/// Puts the working set that a pager has recorded in `dir` into `seal`, or the one that it was given;
/// a guest that was never resumed has none. Blocks.
pub(super) fn seal_working_set(seal: &Seal, dir: &Path) -> Result<Option<ImageRef>, SealError> {
    let path = dir.join(WORKING_SET);
    // One that no pager would take is not worth keeping.
    let sound = WorkingSet::read(&path).is_ok_and(|set| !set.windows().is_empty());
    let Ok(file) = File::open(&path) else {
        return Ok(None);
    };
    let length = file.metadata().map_or(0, |it| it.len());
    if !sound || length > working_set::MAX_FILE_BYTES {
        return Ok(None);
    }
    Ok(Some(seal.image(&file, length)?.image))
}

/// The map of an image, with the places of those chunks that are here.
///
/// # Errors
/// [`PageMapError::Wrong`]: the image is no guest's memory.
pub fn map_of(store: &Store, memory: &Manifest) -> Result<PageMap, PageMapError> {
    let no_memory = PageMapError::Wrong {
        reason: "its size is no whole pages",
    };
    let region = Region::of_bytes(memory.image_bytes()).ok_or(no_memory)?;
    // Of a chunk that is elsewhere no more is known than what the image needs of it.
    let mut needed: HashMap<ChunkId, u64> = HashMap::new();
    for (id, within, extent) in chunks_of(memory) {
        let most = needed.entry(id).or_default();
        *most = (*most).max(u64::from(within) + extent.len_bytes);
    }
    let mut map = PageMap::builder(region);
    for (id, within, extent) in chunks_of(memory) {
        let location = store.locate(&id);
        let needed = needed.get(&id).copied().unwrap_or_default();
        let chunk = MappedChunk {
            id,
            bytes: match &location {
                Some(location) => location.chunk_bytes,
                None => u32::try_from(needed).unwrap_or(u32::MAX),
            },
            place: location.map(place),
        };
        map.push(
            ImageOffset(extent.start_bytes),
            extent.len_bytes,
            within,
            chunk,
        )?;
    }
    Ok(map.finish())
}

/// The extents of an image that lie in chunks: in which, from where on, and the extent.
fn chunks_of(manifest: &Manifest) -> impl Iterator<Item = (ChunkId, u32, &crate::store::Extent)> {
    let extents = manifest.extents().iter();
    extents.filter_map(|extent| match extent.content {
        Content::Hole => None,
        Content::Chunk { id, within_bytes } => Some((id, within_bytes, extent)),
    })
}

/// The same, as a pager says it.
fn place(location: Location) -> Place {
    Place {
        pack: location.pack.into(),
        offset: location.offset_bytes,
        stored_bytes: location.stored_bytes,
        encoding: pagers(location.encoding),
    }
}

/// A chunk as a pager is given it.
fn given(carried: Carried) -> Stored {
    Stored {
        encoding: pagers(carried.encoding),
        bytes: carried.stored,
    }
}

fn pagers(encoding: Encoding) -> page_map::Encoding {
    match encoding {
        Encoding::Raw => page_map::Encoding::Raw,
        Encoding::Zstd => page_map::Encoding::Zstd,
    }
}

#[cfg(test)]
mod tests;

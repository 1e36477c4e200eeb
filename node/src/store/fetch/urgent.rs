//! Single chunks that a guest stands still for.
//!
//! Each question has a stream of its own while it is under way, and streams are kept open for the
//! next one: a question costs one round trip. Who answers quickest is asked first. If it takes much
//! longer than it did before, another holder is asked as well, and the first answer wins. Whoever
//! asks for a chunk that is asked for already waits along.
//!
//! For somebody in a hurry, what has come is handed over as it is, and checked against the chunk's
//! name and written down after that; he has to check it himself. It is kept in memory until it is
//! written, and one that cannot be written counts as one that never came. A holder that is found to
//! have sent wrong bytes is checked first from then on, and so is every answer to somebody who says
//! that he was given wrong ones.
//!
//! A chunk is gone when all holders there are were reached and none had a sound copy of it, in two
//! rounds, by a list that the quorum has confirmed. How long to wait for holders that cannot be
//! reached is not decided here: whoever asks counts that.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt as _, Shared};
use futures::stream::{FuturesUnordered, StreamExt as _};
use proto::ids::NodeId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task;
use tokio::time::{self, Instant};
use tracing::debug;

use super::{Failed, Holders, Wire, patiently};
use crate::base::at_once::at_once;
use crate::base::chain::chain;
use crate::base::remedy::Remedy;
use crate::store::chunk::ChunkId;
use crate::store::engine::{Location, Store};
use crate::store::error::SealError;
use crate::store::exchange::{Answer, Asked, Carried, Wants, read_answer, write_names};
use crate::store::snapshot::SnapshotDigest;

/// Longest one holder may take to answer. A guest waits: whoever is slower is asked again after.
const LIMIT: Duration = Duration::from_secs(5);
/// Questions under way at once, those included whose chunk is being written down: 4 MiB of memory.
const AT_ONCE: usize = 64;
/// Streams that are kept open to each holder while nobody asks.
const WARM: usize = 4;
/// How many times its usual time a holder may take before another is asked as well.
const LATE_FACTOR: u32 = 4;
/// The least and the most that is: below, a busy machine looks like a slow one.
const LATE_AT_LEAST: Duration = Duration::from_millis(20);
const LATE_AT_MOST: Duration = Duration::from_secs(1);
/// How long a holder that failed is asked after all others.
const FAILED_FOR: Duration = Duration::from_secs(5);
/// How long after all holders lacked a chunk they are asked once more before it is called gone: one
/// may just be moving it from one pack to another, or be told of a copy that is done.
const ONCE_MORE_AFTER: Duration = Duration::from_secs(2);
/// A round that is older than this was another wait: who asks does so every second or so.
const SAME_WAIT: Duration = Duration::from_secs(60);
/// Longest a quorum may take to confirm who the holders are.
const RENEW_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a chunk could not be brought.
#[non_exhaustive]
#[derive(Clone, Debug, thiserror::Error)]
pub enum BringError {
    /// Nobody who has it could be asked just now: ask again.
    #[error("chunk {chunk} cannot be had now: {tried}")]
    NotNow {
        /// Which.
        chunk: ChunkId,
        /// What came of each holder.
        tried: String,
        /// Those that are said to have it and could not be asked.
        away: Vec<NodeId>,
    },
    /// Every node that is said to have it was asked twice and has no sound copy, or there is none.
    #[error("no host has a sound copy of chunk {chunk}: {tried}")]
    Gone {
        /// Which.
        chunk: ChunkId,
        /// What came of each holder.
        tried: String,
    },
    /// This node's store does not take it, for want of room mostly.
    #[error("store chunk {chunk}")]
    Store {
        /// Which.
        chunk: ChunkId,
        /// What the store says.
        source: Arc<SealError>,
    },
}

impl BringError {
    /// Who must act next.
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::NotNow { .. } => Remedy::RetryLater,
            Self::Gone { .. } => Remedy::NotThere,
            Self::Store { source, .. } => source.remedy(),
        }
    }
}

/// A chunk as it came from its holder, on its way into the store. Nobody has checked yet whether it is
/// the one of that name, unless [`Self::stored`] has answered.
#[derive(Clone, Debug)]
pub struct Came {
    carried: Carried,
    stored: Awaited<()>,
}

impl Came {
    /// The chunk, as it lies in the holder's pack.
    #[must_use]
    pub fn carried(&self) -> &Carried {
        &self.carried
    }

    /// Waits until it is checked and in the store, where it need not be durable yet.
    ///
    /// # Errors
    /// - [`BringError::NotNow`]: it is another chunk, or none.
    /// - [`BringError::Store`]: the store does not take it.
    pub async fn stored(self) -> Result<(), BringError> {
        self.stored.await
    }
}

/// What several wait for.
type Awaited<T> = Shared<BoxFuture<'static, Result<T, BringError>>>;

/// Brings single chunks of one snapshot.
#[derive(Debug)]
pub(super) struct Urgent {
    store: Store,
    holders: Arc<dyn Holders>,
    digest: SnapshotDigest,
    /// Asked for, or here and not written down yet.
    questions: Mutex<HashMap<ChunkId, Awaited<Came>>>,
    slots: Arc<Semaphore>,
    peers: Mutex<BTreeMap<NodeId, Peer>>,
    /// Chunks that all holders were found to lack, and when that was found first and last.
    lacking: Mutex<HashMap<ChunkId, (Instant, Instant)>>,
}

/// When what has come is checked against the chunk's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Check {
    /// Before anybody gets it, so that the next holder is asked where it is wrong.
    First,
    /// By whoever gets it, and before it is stored.
    After,
}

/// What a holder sent in a chunk's name.
struct Arrived {
    from: NodeId,
    carried: Carried,
}

/// What is known of a holder.
#[derive(Default)]
struct Peer {
    warm: Vec<Box<dyn Wire>>,
    /// How long it takes to answer, lately.
    usual: Option<Duration>,
    failed_at: Option<Instant>,
    /// It has sent wrong bytes.
    lied: bool,
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peer")
            .field("usual", &self.usual)
            .finish_non_exhaustive()
    }
}

/// Waits for an instant, and not at all for one that has come: a timer would round it up by a
/// millisecond or two, which is more than a chunk takes.
async fn until(at: Instant) {
    if Instant::now() < at {
        time::sleep_until(at).await;
    }
}

impl Urgent {
    pub(super) fn new(store: Store, holders: Arc<dyn Holders>, digest: SnapshotDigest) -> Self {
        Self {
            store,
            holders,
            digest,
            questions: Mutex::default(),
            slots: Arc::new(Semaphore::new(AT_ONCE)),
            peers: Mutex::default(),
            lacking: Mutex::default(),
        }
    }

    pub(super) async fn bring(self: &Arc<Self>, chunk: ChunkId) -> Result<Location, BringError> {
        let not_now = |tried: &str| BringError::NotNow {
            chunk,
            tried: tried.to_owned(),
            away: Vec::new(),
        };
        if let Some(location) = self.locate(chunk).await {
            return Ok(location);
        }
        // Along with somebody in a hurry, it may have been asked for without a check.
        let stored = self.ask_for(chunk, Check::First).await?.stored().await;
        if let Err(BringError::NotNow { .. }) = stored {
            self.ask_for(chunk, Check::First).await?.stored().await?;
        } else {
            stored?;
        }
        let location = self.locate(chunk).await;
        location.ok_or_else(|| not_now("it came and was lost again"))
    }

    /// Brings a chunk that is not in the store, and neither checks it nor waits until it is stored.
    pub(super) async fn rush(self: &Arc<Self>, chunk: ChunkId) -> Result<Came, BringError> {
        self.ask_for(chunk, Check::After).await
    }

    async fn ask_for(self: &Arc<Self>, chunk: ChunkId, check: Check) -> Result<Came, BringError> {
        let question = {
            let mut questions = lock(&self.questions);
            let ask = || Arc::clone(self).ask_once(chunk, check).boxed().shared();
            questions.entry(chunk).or_insert_with(ask).clone()
        };
        question.await
    }

    async fn locate(&self, chunk: ChunkId) -> Option<Location> {
        let store = self.store.clone();
        at_once(move || store.locate(&chunk)).await.ok().flatten()
    }

    /// Asks, for everybody who waits for this chunk.
    async fn ask_once(self: Arc<Self>, chunk: ChunkId, check: Check) -> Result<Came, BringError> {
        let slot = Arc::clone(&self.slots).acquire_owned().await;
        match self.ask_holders(chunk, check).await {
            Ok(arrived) => Ok(self.write_down(chunk, arrived, slot.ok())),
            Err(err) => {
                lock(&self.questions).remove(&chunk);
                Err(err)
            }
        }
    }

    /// Has it checked and written down, behind the back of whoever waits for it. Until that is done
    /// whoever else asks is answered from memory.
    fn write_down(
        self: Arc<Self>,
        chunk: ChunkId,
        arrived: Arrived,
        slot: Option<OwnedSemaphorePermit>,
    ) -> Came {
        let carried = arrived.carried.clone();
        let write = move || {
            let stored = self.store.begin().put_carried(chunk, &arrived.carried);
            let stored = stored.map_err(|err| self.not_stored(chunk, arrived.from, err));
            lock(&self.questions).remove(&chunk);
            drop(slot);
            stored
        };
        // A task of its own wakes the thread that writes, once the answer is on its way: on an idle processor
        // that takes as long as decoding the chunk.
        let written = tokio::spawn(async move { task::spawn_blocking(write).await });
        let stored = async move {
            let cut = |err: task::JoinError| BringError::NotNow {
                chunk,
                tried: err.to_string(),
                away: Vec::new(),
            };
            written.await.and_then(|it| it).map_err(cut)?
        };
        let stored = stored.boxed().shared();
        Came { carried, stored }
    }

    /// Remembers who sent it if it is wrong. Whoever brings the rest asks for it again.
    fn not_stored(&self, chunk: ChunkId, from: NodeId, source: SealError) -> BringError {
        debug!(digest = %self.digest, node = %from, %chunk, why = chain(&source), "a chunk was not stored");
        if let SealError::NotTheChunk { .. } = source {
            self.peer(from, |peer| {
                peer.lied = true;
                peer.failed_at = Some(Instant::now());
            });
            let tried = format!("{}: {}", self.holders.name(from), Failed::Wrong(chunk));
            let away = Vec::new();
            return BringError::NotNow { chunk, tried, away };
        }
        let source = Arc::new(source);
        BringError::Store { chunk, source }
    }

    /// Asks one holder after the other, the next one early where one is late. The first who has it
    /// wins.
    async fn ask_holders(&self, chunk: ChunkId, check: Check) -> Result<Arrived, BringError> {
        let listed = self.holders.holders(self.digest);
        let mut left = self.in_order(&listed).into_iter();
        let mut asked = FuturesUnordered::new();
        let mut since = BTreeMap::new();
        let mut next_at = Instant::now();
        let mut tried = Vec::new();
        loop {
            tokio::select! {
                biased;
                Some((node, outcome)) = asked.next(), if !asked.is_empty() => match outcome {
                    Ok(arrived) => {
                        since.remove(&node);
                        self.note_outrun(&since);
                        lock(&self.lacking).remove(&chunk);
                        return Ok(arrived);
                    }
                    Err(Failed::Store(source)) => {
                        let source = Arc::new(source);
                        return Err(BringError::Store { chunk, source });
                    }
                    Err(err) => {
                        since.remove(&node);
                        let why = match &err {
                            Failed::Lacks(_) => "it does not have it".to_owned(),
                            err => chain(err),
                        };
                        tried.push((node, err.is_answer(), why));
                        next_at = Instant::now();
                    }
                },
                () = until(next_at), if left.len() > 0 => {
                    if let Some(node) = left.next() {
                        since.insert(node, Instant::now());
                        next_at = Instant::now() + self.late_after(node);
                        asked.push(async move { (node, self.ask(node, chunk, check).await) });
                    }
                }
                else => break,
            }
        }
        Err(self.judge(chunk, &listed, &tried).await)
    }

    /// Whoever is listed, the quickest first and those that failed lately last; then those who gave
    /// something before and are not listed any more: one that mends its copy has most of it.
    fn in_order(&self, listed: &[NodeId]) -> Vec<NodeId> {
        let peers = lock(&self.peers);
        let mut order = listed.to_vec();
        order.sort_by_key(|node| {
            let peer = peers.get(node);
            let failed = peer.and_then(|peer| peer.failed_at);
            let failed_lately = failed.is_some_and(|at| at.elapsed() < FAILED_FOR);
            let usual = peer.and_then(|peer| peer.usual);
            (failed_lately, usual.unwrap_or_default())
        });
        let gave = peers.iter().filter(|(_, peer)| peer.usual.is_some());
        order.extend(
            gave.map(|(node, _)| *node)
                .filter(|node| !listed.contains(node)),
        );
        order
    }

    fn late_after(&self, node: NodeId) -> Duration {
        let peers = lock(&self.peers);
        let usual = peers.get(&node).and_then(|peer| peer.usual);
        usual.map_or(LATE_AT_MOST, |usual| {
            (usual * LATE_FACTOR).clamp(LATE_AT_LEAST, LATE_AT_MOST)
        })
    }

    /// These owe an answer that another has given: they take at least as long as they have had.
    fn note_outrun(&self, since: &BTreeMap<NodeId, Instant>) {
        for (node, since) in since {
            let took = since.elapsed();
            self.peer(*node, |peer| {
                peer.usual = Some(peer.usual.map_or(took, |usual| usual.max(took)));
            });
        }
    }

    async fn judge(
        &self,
        chunk: ChunkId,
        listed: &[NodeId],
        tried: &[(NodeId, bool, String)],
    ) -> BringError {
        let answered = |node: &&NodeId| tried.iter().any(|(of, had, _)| of == *node && *had);
        let away: Vec<NodeId> = listed.iter().filter(|it| !answered(it)).copied().collect();
        let told = self.in_words(tried);
        let not_now = |tried: String| BringError::NotNow {
            chunk,
            tried,
            away: away.clone(),
        };
        if !away.is_empty() {
            lock(&self.lacking).remove(&chunk);
            return not_now(told);
        }
        if !self.is_newest(listed).await {
            return not_now(format!("{told}; whether others have it is not known now"));
        }
        match self.lacked_before(chunk) {
            true => BringError::Gone { chunk, tried: told },
            false => not_now(told),
        }
    }

    fn in_words(&self, tried: &[(NodeId, bool, String)]) -> String {
        let told = |(node, _, why): &(NodeId, bool, String)| {
            format!("{}: {why}", self.holders.name(*node))
        };
        match tried.is_empty() {
            true => "none holds any of the snapshot".to_owned(),
            false => tried.iter().map(told).collect::<Vec<_>>().join("; "),
        }
    }

    /// Whether these are the holders by the cluster's newest state.
    async fn is_newest(&self, listed: &[NodeId]) -> bool {
        let renewed = time::timeout(RENEW_TIMEOUT, self.holders.renew()).await;
        let now = self.holders.holders(self.digest);
        matches!(renewed, Ok(true)) && now.iter().all(|node| listed.contains(node))
    }

    /// Notes that all holders lack the chunk; says whether they did so a while ago as well.
    fn lacked_before(&self, chunk: ChunkId) -> bool {
        let now = Instant::now();
        let mut lacking = lock(&self.lacking);
        lacking.retain(|_, (_, last)| now - *last < SAME_WAIT);
        let (first, last) = lacking.entry(chunk).or_insert((now, now));
        *last = now;
        now - *first >= ONCE_MORE_AFTER
    }

    /// Asks one holder, on a stream that is open if there is one.
    async fn ask(&self, node: NodeId, chunk: ChunkId, check: Check) -> Result<Arrived, Failed> {
        let warm = self.peer(node, |peer| peer.warm.pop());
        let was_warm = warm.is_some();
        let mut outcome = self.ask_on(node, chunk, check, warm).await;
        if was_warm && matches!(outcome, Err(Failed::Stream(_))) {
            // It was closed while nobody used it, and so were the others.
            self.peer(node, |peer| peer.warm.clear());
            outcome = self.ask_on(node, chunk, check, None).await;
        }
        match &outcome {
            Ok(_) | Err(Failed::Store(_)) => {}
            Err(err) => {
                debug!(digest = %self.digest, %node, %chunk, why = chain(err), "no chunk from a holder");
                self.peer(node, |peer| peer.failed_at = Some(Instant::now()));
            }
        }
        outcome
    }

    async fn ask_on(
        &self,
        node: NodeId,
        chunk: ChunkId,
        check: Check,
        warm: Option<Box<dyn Wire>>,
    ) -> Result<Arrived, Failed> {
        let began = Instant::now();
        let mut wire = match warm {
            Some(wire) => wire,
            None => {
                let asked = Asked {
                    digest: self.digest,
                    wants: Wants::Urgent,
                };
                patiently(LIMIT, self.holders.open(node, asked.header())).await?
            }
        };
        let exchange = async {
            write_names(&mut wire, &[chunk]).await?;
            read_answer(&mut wire).await
        };
        let answer = patiently(LIMIT, exchange).await?;
        let took = began.elapsed();
        // It has said all that it was asked for: the next question may go by the same stream.
        self.peer(node, |peer| {
            peer.usual = Some(peer.usual.map_or(took, |usual| (usual * 7 + took) / 8));
            if peer.warm.len() < WARM {
                peer.warm.push(wire);
            }
        });
        let carried = match answer {
            Answer::Here(carried) => carried,
            Answer::Lacks => return Err(Failed::Lacks(chunk)),
        };
        let doubted = check == Check::First || self.peer(node, |peer| peer.lied);
        if doubted && !self.is_it(chunk, &carried)? {
            self.peer(node, |peer| peer.lied = true);
            return Err(Failed::Wrong(chunk));
        }
        let from = node;
        Ok(Arrived { from, carried })
    }

    fn is_it(&self, chunk: ChunkId, carried: &Carried) -> io::Result<bool> {
        let (encoding, stored) = (carried.encoding, &carried.stored);
        let core = &self.store.core;
        let unpacked = core.unpack(chunk, encoding, stored, carried.chunk_bytes);
        unpacked.map(|it| it.is_some())
    }

    fn peer<T>(&self, node: NodeId, with: impl FnOnce(&mut Peer) -> T) -> T {
        with(lock(&self.peers).entry(node).or_default())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

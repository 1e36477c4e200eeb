//! A fetch from several holders at once, to its end.
//!
//! A few holders give at a time, each on two streams. Whoever fails is left alone for a while, longer each
//! time it gives nothing, and another takes its place; one that lied is left alone for long. What
//! has come is synced in steps, so that no crash takes more than the last one.

use std::collections::BTreeMap;
use std::fs::File;
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use proto::ids::NodeId;
use tokio::time::{self, Instant};
use tokio_util::task::TaskTracker;
use tracing::warn;

use super::ledger::Ledger;
use super::opening::First;
use super::progress::Meter;
use super::source::{Shared, Source};
use super::{Failed, FetchError, Holders, Wire, blocking};
use crate::base::chain::chain;
use crate::store::engine::Store;
use crate::store::error::SealError;
use crate::store::snapshot::SnapshotDigest;

/// Holders that give at once at most. A link is full with fewer; more keep one slow or bad one from
/// mattering.
const SOURCES: usize = 4;
/// Streams of one holder at once: what one has brought is stored while the other brings more. With
/// [`SOURCES`], 8 MiB of memory, and as much in QUIC's windows.
const STREAMS: usize = 2;
/// How often it is looked who could give more.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long a holder is left alone after it failed once, and at most after many times.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How long one is left alone that lied, or whose signature is not known here yet.
const LIAR_PAUSE: Duration = Duration::from_secs(60);
/// How often a holder may give nothing at all where not all time in the world is given.
const TRIES: u32 = 2;
/// Bytes of chunks after which what has come is synced. A crash costs the transfer of these at most.
const SYNC_EVERY_BYTES: u64 = 64 << 20;
/// How long every holder there is must have said that it lacks what is missing, before that is
/// believed: one that mends its copy is no holder meanwhile, and nobody stands still for the rest.
const GONE_AFTER: Duration = Duration::from_secs(60);
/// How often holders are asked again for what they lacked, where there is time.
const LACKS_AGAIN: Duration = Duration::from_secs(20);

/// What becomes of a fetch that nobody can finish now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// It fails, once every holder was tried.
    Bounded,
    /// It waits for holders to come back, and fails only where all there are lack something.
    Endless,
}

/// A fetch.
pub(super) struct Run<'a> {
    pub(super) store: &'a Store,
    pub(super) holders: &'a dyn Holders,
    pub(super) digest: SnapshotDigest,
    pub(super) patience: Patience,
    pub(super) ledger: Ledger,
    pub(super) meter: &'a Meter,
}

/// What is known of a holder.
#[derive(Debug, Default)]
struct Standing {
    streams: usize,
    /// How often in a row it gave nothing.
    strikes: u32,
    lied: bool,
    /// It could be asked, and had nothing of what is missing.
    only_lacks: bool,
    again_at: Option<Instant>,
    failed: Option<String>,
}

impl Standing {
    /// Whether it had its chances, where they are counted.
    const fn is_out(&self) -> bool {
        self.lied || self.strikes >= TRIES
    }
}

/// What became of a stream.
struct Ended {
    node: NodeId,
    gave: usize,
    lacked: usize,
    outcome: Result<(), Failed>,
}

impl Run<'_> {
    /// Gets everything there is in the ledger. `first` is a stream that is open already. When it
    /// answers, nothing works on the store for it any more.
    pub(super) async fn finish(self, first: First) -> Result<(), FetchError> {
        let shared = Shared {
            store: self.store,
            holders: self.holders,
            digest: self.digest,
            ledger: std::sync::Mutex::new(self.ledger),
            meter: self.meter,
            works: TaskTracker::new(),
        };
        let mut crew = Crew {
            shared: &shared,
            patience: self.patience,
            standings: BTreeMap::new(),
            streams: FuturesUnordered::new(),
            synced_bytes: self.meter.now().bytes_done,
            stuck_since: None,
            forget_lacks_at: Instant::now() + LACKS_AGAIN,
        };
        let outcome = crew.work(first).await;
        crew.streams.clear();
        shared.works.close();
        shared.works.wait().await;
        self.meter.sources(0);
        outcome
    }
}

/// Those that give, and those that could.
struct Crew<'a> {
    shared: &'a Shared<'a>,
    patience: Patience,
    standings: BTreeMap<NodeId, Standing>,
    streams: FuturesUnordered<BoxFuture<'a, Ended>>,
    synced_bytes: u64,
    /// Since when nobody there is could give anything.
    stuck_since: Option<Instant>,
    forget_lacks_at: Instant,
}

impl<'a> Crew<'a> {
    async fn work(&mut self, first: First) -> Result<(), FetchError> {
        if let Some((node, wire)) = first {
            self.start(node, Some(wire));
        }
        while !self.shared.ledger().is_settled() {
            let listed = self.shared.holders.holders(self.shared.digest);
            self.start_those_free(&listed);
            self.give_up_if_vain(&listed)?;
            tokio::select! {
                Some(ended) = self.streams.next() => self.note(ended)?,
                () = time::sleep(LOOK_EVERY) => {}
            }
            self.sync_in_steps().await?;
        }
        Ok(())
    }

    /// One stream for each who is free first, then a second one.
    fn start_those_free(&mut self, listed: &[NodeId]) {
        let now = Instant::now();
        for streams in 0..STREAMS {
            for node in listed {
                let standing = self.standings.entry(*node).or_default();
                let waits = standing.again_at.is_some_and(|at| at > now);
                let is_out = self.patience == Patience::Bounded && standing.is_out();
                if standing.streams != streams || waits || is_out {
                    continue;
                }
                let full = streams == 0 && self.sources() >= SOURCES;
                if !full && self.shared.ledger().has_work_for(*node) {
                    self.start(*node, None);
                }
            }
        }
    }

    fn start(&mut self, node: NodeId, wire: Option<Box<dyn Wire>>) {
        self.standings.entry(node).or_default().streams += 1;
        let shared = self.shared;
        self.streams.push(Box::pin(async move {
            let mut source = Source::new(shared, node);
            let outcome = source.give(wire).await;
            Ended {
                node,
                gave: source.gave,
                lacked: source.lacked,
                outcome,
            }
        }));
        self.shared.meter.sources(self.sources());
    }

    fn sources(&self) -> usize {
        let all = self.standings.values();
        all.filter(|standing| standing.streams > 0).count()
    }

    fn note(&mut self, ended: Ended) -> Result<(), FetchError> {
        let Ended {
            node,
            gave,
            lacked,
            outcome,
        } = ended;
        let standing = self.standings.entry(node).or_default();
        standing.streams = standing.streams.saturating_sub(1);
        if gave > 0 {
            standing.strikes = 0;
            self.stuck_since = None;
        }
        if gave > 0 || lacked > 0 {
            standing.only_lacks = gave == 0;
        }
        match outcome {
            Ok(()) => {}
            Err(Failed::Store(err)) => return Err(err.into()),
            Err(err) => {
                let why = chain(&err);
                warn!(digest = %self.shared.digest, %node, why, gave, "a holder failed");
                standing.lied |= err.is_lie();
                let pause = match err.is_lie() {
                    true => LIAR_PAUSE,
                    false => LONGEST_PAUSE.min(FIRST_PAUSE * 2_u32.pow(standing.strikes.min(10))),
                };
                let now = Instant::now();
                // Its other stream has mostly failed for the same reason.
                let is_news = standing.again_at.is_none_or(|at| at <= now);
                standing.strikes += u32::from(is_news);
                standing.again_at = Some(now + pause);
                standing.failed = Some(why);
            }
        }
        self.shared.meter.sources(self.sources());
        Ok(())
    }

    /// Fails where nobody there is can give what is missing.
    fn give_up_if_vain(&mut self, listed: &[NodeId]) -> Result<(), FetchError> {
        let now = Instant::now();
        if now >= self.forget_lacks_at && self.patience == Patience::Endless {
            self.shared.ledger().forget_lacks();
            self.forget_lacks_at = now + LACKS_AGAIN;
        }
        if !self.streams.is_empty() {
            return Ok(());
        }
        if !listed.iter().all(|node| self.is_no_help(*node)) {
            self.stuck_since = None;
            return Ok(());
        }
        let since = *self.stuck_since.get_or_insert(now);
        let limit = match self.patience {
            Patience::Bounded => Duration::ZERO,
            Patience::Endless => GONE_AFTER,
        };
        if now - since < limit {
            return Ok(());
        }
        Err(self.vain(listed))
    }

    fn is_no_help(&self, node: NodeId) -> bool {
        let standing = self.standings.get(&node);
        match self.patience {
            Patience::Endless => standing.is_some_and(|standing| standing.only_lacks),
            Patience::Bounded => {
                standing.is_some_and(Standing::is_out) || !self.shared.ledger().has_work_for(node)
            }
        }
    }

    fn lacked(&self, node: NodeId) -> Option<crate::store::ChunkId> {
        self.shared.ledger().lacked_by(node)
    }

    fn vain(&self, listed: &[NodeId]) -> FetchError {
        let told = listed.iter().map(|node| {
            let standing = self.standings.get(node);
            let failed = standing.and_then(|standing| standing.failed.clone());
            let lacks = || self.lacked(*node).map(|id| Failed::Lacks(id).to_string());
            let why = lacks().or(failed).unwrap_or_else(|| "not asked".to_owned());
            format!("{}: {why}", self.shared.holders.name(*node))
        });
        let told: Vec<String> = told.collect();
        let tried = match told.is_empty() {
            true => "there is none".to_owned(),
            false => told.join("; "),
        };
        FetchError::NoHolder {
            digest: self.shared.digest,
            tried,
        }
    }

    async fn sync_in_steps(&mut self) -> Result<(), FetchError> {
        let here = self.shared.meter.now().bytes_done;
        if here.saturating_sub(self.synced_bytes) < SYNC_EVERY_BYTES {
            return Ok(());
        }
        self.synced_bytes = here;
        let store = self.shared.store.clone();
        let synced = blocking(move || store.sync_gently()).await;
        Ok(synced.map_err(FetchError::Cut)??)
    }
}

impl Store {
    /// Makes durable what was written so far. Most of it without the lock that a sync takes: a guest
    /// may wait for a chunk to be written down.
    fn sync_gently(&self) -> Result<(), SealError> {
        let newest = self.core.packs.all().pop();
        if let Some(file) = newest.and_then(|pack| File::open(pack.path()).ok()) {
            // Whether it fails is said to the file that the pack was written by as well.
            let _told_again = file.sync_data();
        }
        self.core.sync()
    }
}

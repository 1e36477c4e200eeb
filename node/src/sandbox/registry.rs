//! The sandboxes of this node by id: the one owner of their drivers.

mod idle;

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{fmt, fs};

use proto::epoch::Epoch;
use proto::ids::SandboxId;
use raft::state::{GuestVersions, Sealed, Snapshot, SnapshotKind, Warm};
use tokio::sync::{mpsc, watch};
use tokio::task;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info_span, warn};

use super::driver::Driver;
use super::phase::{End, Phase, SealFor};
use super::record::ReadyFacts;
use super::resources::Held;
use super::seen::{Overtaken, SeenEpochs};
use super::spec::{Host, StartSpec, StartTimings};
use super::waits::Waiting;
use super::warm::WarmNews;
use crate::base::clock::BootInstant;
use crate::base::stop::Tasks;
use crate::guest::Guest;
use crate::shim::client;
use crate::shim::lease::{self, LeaseReader, LeaseTimes};
use crate::shim::saved::PagingStatus;
use crate::store::SandboxPaths;

/// What this node sees of one of its sandboxes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    /// The ownership it runs under.
    pub epoch: Epoch,
    /// Where it stands.
    pub state: ObservedState,
    /// Whether its guest was let execute its first instruction.
    pub let_begin: bool,
    /// How long nobody has used it.
    pub idle_for: Duration,
    /// Whether it gave memory back since.
    pub reclaimed: bool,
    /// Whether the cluster is to be told about a warm snapshot: made of it, or found spoilt by it.
    pub has_warm: bool,
}

/// Where a sandbox stands on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObservedState {
    /// On its way up.
    Starting,
    /// Its guest answers.
    Ready(GuestVersions),
    /// Its guest is being sealed.
    Sealing,
    /// Its guest is frozen, sealed, and never runs again under this ownership.
    Sealed(Sealed),
    /// Its guest is frozen and could not be sealed. It goes on once the cluster knows.
    Frozen {
        /// What was in the way.
        reason: String,
    },
    /// On its way out.
    Releasing,
    /// Nothing is left of it.
    Gone(End),
}

/// A sandbox whose guest runs here, as it is measured.
#[derive(Clone, Debug)]
pub struct Metered {
    /// Which one.
    pub id: SandboxId,
    /// The ownership it runs under.
    pub epoch: Epoch,
    /// Where its files are.
    pub paths: SandboxPaths,
    /// Its guest, unless it is frozen.
    pub guest: Option<Guest>,
}

/// The sandboxes of this node.
#[derive(Debug)]
pub struct Registry {
    host: Arc<Host>,
    table: Mutex<Table>,
    changed: Arc<watch::Sender<()>>,
    tasks: Tasks,
}

#[derive(Debug, Default)]
struct Table {
    entries: HashMap<SandboxId, Entry>,
    /// Of the sandboxes in `entries`, and of those that were.
    epochs: SeenEpochs,
}

#[derive(Debug)]
struct Entry {
    shared: Arc<Shared>,
    stop: CancellationToken,
    orders: mpsc::Sender<Order>,
}

/// What a driver is told to do with a guest that stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Freeze it and put its state into the store.
    Seal(SealFor),
    /// Let it go on.
    Thaw,
}

/// Orders that wait for a driver. It is told again as long as it has not obeyed, so one is enough.
const ORDERS: usize = 1;

/// What a driver tells everybody else about its sandbox.
pub(super) struct Shared {
    epoch: Epoch,
    /// Cancelled once its guest may execute its first instruction.
    begin: CancellationToken,
    paths: SandboxPaths,
    changed: Arc<watch::Sender<()>>,
    told: Mutex<Told>,
}

#[derive(Debug)]
struct Told {
    phase: Phase,
    guest: Option<Guest>,
    versions: GuestVersions,
    timings: Option<StartTimings>,
    last_used: Instant,
    /// When the guest last gave memory back for a pause that was near.
    reclaimed: Option<Instant>,
    /// Whether a pause or a stop for idleness is under way, so that nobody may begin to use the guest.
    withheld: bool,
    /// Whether the guest is frozen, and until its clock is right again after that.
    frozen: bool,
    /// What the cluster is to be told about a warm snapshot, until it knows.
    warm: Option<WarmNews>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("epoch", &self.epoch)
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// What is told of a sandbox that is on its way up.
    fn new(epoch: Epoch, paths: SandboxPaths, changed: Arc<watch::Sender<()>>) -> Self {
        let told = Told {
            phase: Phase::Starting,
            guest: None,
            versions: GuestVersions::default(),
            timings: None,
            last_used: Instant::now(),
            reclaimed: None,
            withheld: false,
            frozen: false,
            warm: None,
        };
        Self {
            epoch,
            begin: CancellationToken::new(),
            paths,
            changed,
            told: Mutex::new(told),
        }
    }

    /// Waits until the guest may execute its first instruction.
    pub(super) async fn let_begin(&self) {
        self.begin.cancelled().await;
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        // Every change under this lock is a plain assignment: a panic leaves it whole.
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_phase(&self, phase: Phase) {
        let mut told = self.told();
        // While it was frozen nobody could use it.
        if matches!(phase, Phase::Ready) {
            told.last_used = Instant::now();
            told.withheld = false;
        }
        told.phase = phase;
        drop(told);
        self.changed.send_replace(());
    }

    pub(super) fn set_warm(&self, news: WarmNews) {
        self.told().warm = Some(news);
    }

    pub(super) fn set_timings(&self, timings: StartTimings) {
        self.told().timings = Some(timings);
    }

    pub(super) fn set_ready(&self, guest: Guest, facts: ReadyFacts, kernel: &str) {
        let mut told = self.told();
        told.guest = Some(guest);
        told.versions = GuestVersions {
            kernel: kernel.to_owned(),
            vmm: facts.vmm,
            agent: facts.agent,
        };
        told.last_used = Instant::now();
    }

    pub(super) fn forget_guest(&self) {
        let mut told = self.told();
        told.guest = None;
        told.frozen = false;
    }

    pub(super) fn frozen(&self) -> bool {
        self.told().frozen
    }

    /// A thaw counts as use: while it was frozen nobody could use it.
    pub(super) fn set_frozen(&self, frozen: bool) {
        let mut told = self.told();
        if told.frozen && !frozen {
            told.last_used = Instant::now();
        }
        told.frozen = frozen;
    }

    pub(super) fn console_tail(&self, bytes: usize) -> Option<Vec<u8>> {
        tail(&self.paths.console(), bytes).ok()
    }

    /// Removes the directory of a sandbox that never held anything else.
    pub(super) async fn remove_dir(&self) -> io::Result<()> {
        let paths = self.paths.clone();
        let removed = task::spawn_blocking(move || paths.remove()).await;
        removed.map_err(io::Error::other)?
    }

    fn observed(&self) -> Observed {
        let told = self.told();
        let state = match &told.phase {
            Phase::Starting => ObservedState::Starting,
            Phase::Ready => ObservedState::Ready(told.versions.clone()),
            Phase::Sealing | Phase::Thawing => ObservedState::Sealing,
            Phase::Sealed(sealed) => ObservedState::Sealed(sealed.as_ref().clone()),
            Phase::Frozen { reason } => ObservedState::Frozen {
                reason: reason.clone(),
            },
            Phase::Releasing { .. } => ObservedState::Releasing,
            Phase::Gone { end } => ObservedState::Gone(end.clone()),
        };
        Observed {
            epoch: self.epoch,
            state,
            let_begin: self.begin.is_cancelled(),
            idle_for: told.last_used.elapsed(),
            reclaimed: told.is_reclaimed(),
            has_warm: told.warm.is_some(),
        }
    }
}

impl Registry {
    /// No sandboxes yet; drivers become tasks of `tasks`.
    #[must_use]
    pub fn new(host: Arc<Host>, tasks: Tasks) -> Self {
        let changed = Arc::new(watch::Sender::new(()));
        let table = Mutex::default();
        Self {
            host,
            table,
            changed,
            tasks,
        }
    }

    /// Wakes whenever a sandbox changes its phase.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Everything that is seen now.
    #[must_use]
    pub fn observed(&self) -> BTreeMap<SandboxId, Observed> {
        self.table()
            .entries
            .iter()
            .map(|(id, entry)| (*id, entry.shared.observed()))
            .collect()
    }

    /// The sandboxes whose guests run. Looking does not count as use.
    #[must_use]
    pub fn metered(&self) -> Vec<Metered> {
        let table = self.table();
        let measured = table.entries.iter().filter_map(|(id, entry)| {
            let told = entry.shared.told();
            let runs = matches!(told.phase, Phase::Ready | Phase::Sealing | Phase::Thawing);
            runs.then(|| Metered {
                id: *id,
                epoch: entry.shared.epoch,
                paths: entry.shared.paths.clone(),
                guest: told
                    .guest
                    .clone()
                    .filter(|_| matches!(told.phase, Phase::Ready) && !told.frozen),
            })
        });
        measured.collect()
    }

    /// Starts a sandbox; one that is known already is left alone, and one whose ownership has
    /// been given out again since is refused.
    pub fn start(&self, spec: StartSpec) {
        let id = spec.id;
        if let Some(driver) = self.enter(id, spec.epoch, spec.let_begin) {
            let span = info_span!(parent: None, "sandbox", %id, epoch = %spec.epoch);
            self.tasks.spawn(span, driver.start(spec));
        }
    }

    /// Takes over a sandbox that an earlier daemon started.
    pub(super) fn adopt(&self, id: SandboxId, held: Held) {
        let epoch = held.record.epoch();
        // What an earlier daemon left was let begin, or ends now.
        if let Some(driver) = self.enter(id, epoch, true) {
            let span = info_span!(parent: None, "sandbox", %id, %epoch);
            self.tasks.spawn(span, driver.adopt(held));
        }
    }

    /// Releases what an earlier daemon left of a sandbox that has ended.
    pub(super) fn bury(&self, id: SandboxId, held: Held, end: End) {
        let epoch = held.record.epoch();
        // What an earlier daemon left was let begin, or ends now.
        if let Some(driver) = self.enter(id, epoch, true) {
            let span = info_span!(parent: None, "sandbox", %id, %epoch);
            self.tasks.spawn(span, driver.bury(held, end));
        }
    }

    /// Lets a guest execute its first instruction.
    pub fn begin(&self, id: SandboxId) {
        if let Some(shared) = self.shared(id) {
            shared.begin.cancel();
        }
    }

    /// Ends a sandbox; its driver tells when it is gone.
    pub fn stop(&self, id: SandboxId) {
        if let Some(entry) = self.table().entries.get(&id) {
            entry.stop.cancel();
        }
    }

    /// Has as much of a sandbox sealed as `kind` says, for a pause of that number; its driver tells what
    /// came of it.
    pub fn seal(&self, id: SandboxId, pause: u64, kind: SnapshotKind) {
        self.order(id, Order::Seal(SealFor { pause, kind }));
    }

    /// Lets the guest of a sandbox go on that was frozen to be sealed.
    pub fn thaw(&self, id: SandboxId) {
        self.order(id, Order::Thaw);
    }

    fn order(&self, id: SandboxId, order: Order) {
        if let Some(entry) = self.table().entries.get(&id) {
            // Full: the same is waiting already, or the plan will say again what is to be done.
            let _waiting = entry.orders.try_send(order);
        }
    }

    /// Whether guests here start from one that had just booted, where there is one.
    #[must_use]
    pub fn starts_warm(&self) -> bool {
        self.host.warm.guest.is_some()
    }

    /// Whether a guest here would have become just that if it had booted.
    #[must_use]
    pub fn takes(&self, warm: &Warm) -> bool {
        self.host.warm.takes(warm)
    }

    /// Whether guests here boot rather than start from it, since that has failed.
    #[must_use]
    pub fn leaves_alone(&self, snapshot: &Snapshot) -> bool {
        self.host.warm.is_left_alone(snapshot)
    }

    /// What the cluster is to be told about a warm snapshot that a sandbox was made, or was to be, of.
    #[must_use]
    pub fn warm_news(&self, id: SandboxId) -> Option<WarmNews> {
        self.shared(id)?.told().warm.clone()
    }

    /// The cluster was told. What it does not know by now is not kept.
    pub fn forget_warm(&self, id: SandboxId) {
        if let Some(shared) = self.shared(id) {
            shared.told().warm = None;
        }
    }

    /// Drops what is remembered of a sandbox that is gone.
    pub fn forget(&self, id: SandboxId) {
        let mut table = self.table();
        let gone = |entry: &Entry| matches!(entry.shared.told().phase, Phase::Gone { .. });
        if table.entries.get(&id).is_some_and(gone) {
            table.entries.remove(&id);
        }
    }

    /// The guest of a sandbox that is ready here under `epoch`, unless it is [`Self::frozen`] or
    /// about to be stopped for idleness. Counts as use.
    #[must_use]
    pub fn guest(&self, id: SandboxId, epoch: Epoch) -> Option<Guest> {
        let shared = self.shared(id).filter(|shared| shared.epoch == epoch)?;
        shared.begin_use()
    }

    /// Whether a sandbox is frozen here because this node has lost touch with the cluster. It
    /// thaws when the lease is renewed, or ends as [`End::LeaseLost`].
    #[must_use]
    pub fn frozen(&self, id: SandboxId) -> bool {
        self.shared(id).is_some_and(|shared| shared.frozen())
    }

    /// Whether a guest that lives by this node's lease may run now.
    #[must_use]
    pub fn holds_lease(&self) -> bool {
        let file = lease::file_in(self.host.data.root());
        let reader = LeaseReader::new(&file).ok();
        match reader.and_then(|reader| reader.read().ok()) {
            Some(LeaseTimes::Unlimited) => true,
            Some(LeaseTimes::Limited { freeze_at, .. }) => BootInstant::now() < freeze_at,
            // What cannot be read allows nothing.
            None => false,
        }
    }

    /// How long the start of a sandbox took, where this daemon started it.
    #[must_use]
    pub fn timings(&self, id: SandboxId) -> Option<StartTimings> {
        self.shared(id)?.told().timings
    }

    /// How long 95 of 100 of the sandboxes here took to start at most, of those that this daemon
    /// started.
    #[must_use]
    pub fn start_p95(&self) -> Option<Duration> {
        let table = self.table();
        let timings = table.entries.values();
        let timings = timings.filter_map(|entry| entry.shared.told().timings);
        p95(timings.map(|timings| timings.total()).collect())
    }

    /// How the memory of a sandbox comes, if it comes as it is touched.
    pub async fn paging(&self, id: SandboxId) -> Option<PagingStatus> {
        let shared = self.shared(id)?;
        let shim = client::connect(shared.paths.dir()).await.ok()?;
        shim.known_status().paging.clone()
    }

    /// What the guest of a sandbox stands still for, where it has for a while.
    #[must_use]
    pub fn waiting(&self, id: SandboxId) -> Option<Waiting> {
        self.host.paging.as_ref()?.waiting(id)
    }

    /// Bytes that a sandbox's disk occupies.
    #[must_use]
    pub fn disk_used_bytes(&self, id: SandboxId) -> Option<u64> {
        disk_used(&self.shared(id)?.paths)
    }

    /// The last bytes of a sandbox's console.
    #[must_use]
    pub fn console_tail(&self, id: SandboxId, bytes: usize) -> Option<Vec<u8>> {
        self.shared(id)?.console_tail(bytes)
    }

    /// What all sandboxes of this node share.
    pub(super) fn host(&self) -> &Host {
        &self.host
    }

    /// Makes room for a sandbox; `None` where it is known already, or `epoch` overtaken.
    fn enter(&self, id: SandboxId, epoch: Epoch, let_begin: bool) -> Option<Driver> {
        let paths = self.host.data.sandbox(id);
        let shared = Arc::new(Shared::new(epoch, paths, Arc::clone(&self.changed)));
        if let_begin {
            shared.begin.cancel();
        }
        let stop = CancellationToken::new();
        let (orders, received) = mpsc::channel(ORDERS);
        let entry = Entry {
            shared: Arc::clone(&shared),
            stop: stop.clone(),
            orders,
        };
        match self.table().enter(id, epoch, entry) {
            Ok(true) => {}
            Ok(false) => return None,
            Err(overtaken) => {
                warn!(%id, %overtaken, "not started");
                return None;
            }
        }
        self.changed.send_replace(());
        let (host, detach) = (Arc::clone(&self.host), self.tasks.token().clone());
        Some(Driver {
            host,
            shared,
            stop,
            detach,
            orders: received,
        })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Insertions and removals are single calls: a panic leaves the table whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shared(&self, id: SandboxId) -> Option<Arc<Shared>> {
        let table = self.table();
        let entry = table.entries.get(&id)?;
        Some(Arc::clone(&entry.shared))
    }
}

impl Table {
    /// Enters `entry`; `false` where the sandbox is known already.
    fn enter(&mut self, id: SandboxId, epoch: Epoch, entry: Entry) -> Result<bool, Overtaken> {
        self.epochs.admit(id, epoch)?;
        if self.entries.contains_key(&id) {
            return Ok(false);
        }
        self.entries.insert(id, entry);
        Ok(true)
    }
}

/// The smallest of `times` that 95 of 100 do not exceed.
fn p95(mut times: Vec<Duration>) -> Option<Duration> {
    let rank = (times.len() * 95).div_ceil(100).checked_sub(1)?;
    let (_, time, _) = times.select_nth_unstable(rank);
    Some(*time)
}

/// Bytes that a sandbox's overlay occupies.
fn disk_used(paths: &SandboxPaths) -> Option<u64> {
    /// The unit of `st_blocks`, whatever the file system's own.
    const STAT_BLOCK_BYTES: u64 = 512;
    let overlay = fs::metadata(paths.overlay()).ok()?;
    Some(overlay.blocks() * STAT_BLOCK_BYTES)
}

/// The last bytes of a file.
fn tail(path: &Path, bytes: usize) -> io::Result<Vec<u8>> {
    let bytes = bytes as u64;
    let mut file = fs::File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(bytes)))?;
    let mut tail = Vec::new();
    // Bounded again: the file may grow while it is read.
    file.take(bytes).read_to_end(&mut tail)?;
    Ok(tail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::TcpDial;

    const IDLE: Duration = Duration::from_secs(60);

    #[test]
    fn the_slowest_five_of_a_hundred_starts_do_not_count() {
        let seconds = |all: std::ops::RangeInclusive<u64>| all.map(Duration::from_secs).collect();
        assert_eq!(p95(Vec::new()), None);
        assert_eq!(p95(seconds(7..=7)), Some(Duration::from_secs(7)));
        assert_eq!(p95(seconds(1..=100)), Some(Duration::from_secs(95)));
        assert_eq!(p95(seconds(1..=10)), Some(Duration::from_secs(10)));
    }

    fn starting(epoch: Epoch) -> Shared {
        let changed = Arc::new(watch::Sender::new(()));
        Shared::new(epoch, SandboxPaths::new("/nonexistent"), changed)
    }

    fn ready() -> Shared {
        let nowhere = Arc::new(TcpDial("127.0.0.1:1".parse().expect("an address")));
        let shared = starting(Epoch(1));
        shared.set_phase(Phase::Ready);
        shared.told().guest = Some(Guest::new(nowhere, "token").expect("a guest"));
        shared
    }

    #[test]
    fn a_sandbox_is_not_started_again_under_an_older_epoch_even_after_it_was_forgotten() {
        let id = SandboxId([7; 16]);
        let entry = |epoch| Entry {
            orders: mpsc::channel(ORDERS).0,
            shared: Arc::new(starting(epoch)),
            stop: CancellationToken::new(),
        };
        let mut table = Table::default();
        assert_eq!(table.enter(id, Epoch(5), entry(Epoch(5))), Ok(true));
        assert_eq!(table.enter(id, Epoch(5), entry(Epoch(5))), Ok(false));
        table.entries.remove(&id);
        assert!(table.enter(id, Epoch(4), entry(Epoch(4))).is_err());
        assert!(table.entries.is_empty());
        assert_eq!(table.enter(id, Epoch(6), entry(Epoch(6))), Ok(true));
    }

    #[tokio::test(start_paused = true)]
    async fn the_guest_of_a_frozen_sandbox_is_withheld_until_it_has_thawed() {
        let shared = ready();
        shared.set_frozen(true);
        assert!(shared.begin_use().is_none());
        tokio::time::advance(IDLE).await;
        shared.set_frozen(false);
        assert!(!shared.withhold_idle(IDLE), "nobody could use it");
        assert!(shared.begin_use().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_sandbox_is_either_stopped_for_idleness_or_used() {
        let shared = ready();
        tokio::time::advance(IDLE).await;
        assert!(shared.begin_use().is_some());
        assert!(!shared.withhold_idle(IDLE), "it was just used");
        tokio::time::advance(IDLE).await;
        assert!(shared.withhold_idle(IDLE));
        assert!(shared.begin_use().is_none(), "its stop is under way");
        assert_eq!(shared.observed().idle_for, IDLE, "a refusal is no use");
    }
}

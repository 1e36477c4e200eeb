//! Slots made ahead of need, and the one task that owns them.
//!
//! The task keeps [`NetConfig::pool_target`] slots ready, hands them out, and unmakes what comes
//! back: a used namespace never serves another sandbox. It decides; blocking threads do the work
//! and report back as `Done`, so the task always answers.
//!
//! A slot handed over to a caller who has given up meanwhile goes back to the ready ones: the
//! caller confirms receipt, and a missing confirmation means it was not received.
//!
//! Crash: slots ready or given out but not yet on record are swept at the next start. Stop: the
//! ready ones are unmade, those of sandboxes stay, and so do the host's rules.

use std::collections::{BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{self, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, info_span, warn};

use crate::base::chain::chain;
use crate::base::stop::Tasks;

use super::build::{self, raise, raze};
use super::cidr::Cidr;
use super::error::NetError;
use super::ledger::Ledger;
use super::serial::SerialBook;
use super::slot::{Serial, Slot, SlotIndex, SlotTag};
use super::sweep::{Census, blocking, census};
use super::{netns, rules};

/// Requests that may wait for the task; past it callers wait to ask.
const ASK_QUEUE: usize = 64;
/// How often the host's rules are looked after, and how long refilling rests after a failure.
/// Short, because a flushed host table leaves guests without a way out; one small message.
const ROUND_INTERVAL: Duration = Duration::from_secs(3);
/// Longest wait for a caller to confirm a slot: it does so when next polled, at once as a rule.
const RECEIPT_TIMEOUT: Duration = Duration::from_secs(5);

/// How this node cuts its slots.
#[derive(Clone, Debug)]
pub struct NetConfig {
    /// Tells this node's slots from those of other nodes on the same host.
    pub tag: SlotTag,
    /// First index of this node.
    pub index_base: u16,
    /// How many slots this node may have; ranges of nodes on one host must not overlap.
    pub index_count: u16,
    /// Slots kept ready.
    pub pool_target: usize,
    /// What guests may reach although it is private; see [`super::rules`] for the exact meaning.
    pub egress_allow: Vec<Cidr>,
    /// Remembers which serials were used.
    pub serial_file: PathBuf,
}

impl NetConfig {
    fn indexes(&self) -> Result<BTreeSet<SlotIndex>, NetError> {
        let (base, count) = (self.index_base, self.index_count);
        match count.checked_sub(1) {
            None => Ok(BTreeSet::new()),
            Some(further) => match base.checked_add(further) {
                Some(last) => Ok((base..=last).map(SlotIndex).collect()),
                None => Err(NetError::BadRange { base, count }),
            },
        }
    }
}

/// The way to the pool's task.
#[derive(Clone, Debug)]
pub struct SlotPool {
    asks: mpsc::Sender<Ask>,
}

impl SlotPool {
    /// Prepares the host, and starts the task that fills the pool.
    ///
    /// Switches IPv4 forwarding on for the whole host, and puts the node's rules in force. Slots
    /// of this tag found on the host keep their index until adopted; sweep before.
    ///
    /// # Errors
    /// [`NetError::BadRange`] for a range past the last index, [`NetError::Serials`] and
    /// [`NetError::Kernel`] if the host cannot be prepared.
    pub async fn start(config: NetConfig, tasks: &Tasks) -> Result<Self, NetError> {
        let indexes = config.indexes()?;
        let (config, census, book) = blocking(move || prepare_host(config)).await?;
        report(&config, &census, &indexes);
        let books = Ledger::new(indexes, config.pool_target, census.slots, &census.foreign);
        let (asks, inbox) = mpsc::channel(ASK_QUEUE);
        let span = info_span!("slot-pool", tag = %config.tag);
        let owner = Owner {
            config: Arc::new(config),
            book: Arc::new(Mutex::new(book)),
            books,
            waiting: VecDeque::new(),
            jobs: JoinSet::new(),
            refill: true,
        };
        tasks.spawn(span, owner.run(inbox, tasks.token().clone()));
        Ok(Self { asks })
    }

    /// A slot that no sandbox has used before. Write it down before using it.
    ///
    /// From a filled pool at once, else as soon as one is made. Dropping the future gives the slot back.
    ///
    /// # Errors
    /// [`NetError::Exhausted`] if every index of this node is in use, [`NetError::Kernel`] or
    /// [`NetError::Serials`] if one could not be made, [`NetError::Stopped`] after the stop.
    pub async fn take(&self) -> Result<Slot, NetError> {
        loop {
            let offer = self.ask(Ask::Take).await??;
            // No await between receipt and confirmation: the slot is ours, or never was, as
            // when this future was not polled for longer than the pool waits.
            if offer.received.send(()).is_ok() {
                return Ok(offer.slot);
            }
        }
    }

    /// Unmakes a slot. Its index is free for others when this returns.
    ///
    /// Processes in its namespace should have ended; they are cut off in any case.
    ///
    /// # Errors
    /// [`NetError::NotHeld`] for a slot already released; [`NetError::Kernel`] if it could not
    /// be unmade, and then it is still held: release it again.
    pub async fn release(&self, slot: Slot) -> Result<(), NetError> {
        self.ask(|reply| Ask::Release(slot.serial, reply)).await?
    }

    /// Takes over the slot of a sandbox that was found running, with today's egress rules.
    ///
    /// # Errors
    /// [`NetError::Gone`] if the host has no such slot, [`NetError::Kernel`] if its rules could
    /// not be renewed; then it may be adopted again, or released.
    pub async fn adopt(&self, serial: Serial, index: SlotIndex) -> Result<Slot, NetError> {
        self.ask(|reply| Ask::Adopt(serial, index, reply)).await?
    }

    /// How many slots are ready to be taken at once.
    ///
    /// # Errors
    /// [`NetError::Stopped`] after the stop.
    pub async fn ready(&self) -> Result<usize, NetError> {
        self.ask(Ask::Ready).await
    }

    /// Unmakes the slots that nobody uses, and ends the task. Those of sandboxes stay.
    pub async fn shutdown(&self) {
        // A task that has ended already has done all this.
        let _ended = self.ask(Ask::Shutdown).await;
    }

    async fn ask<T>(&self, ask: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Result<T, NetError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.asks.send(ask(reply)).await;
        sent.map_err(|_| NetError::Stopped)?;
        answer.await.map_err(|_| NetError::Stopped)
    }
}

type Reply<T> = oneshot::Sender<Result<T, NetError>>;

/// What callers ask of the task.
#[derive(Debug)]
enum Ask {
    Take(Reply<Offer>),
    Release(Serial, Reply<()>),
    Adopt(Serial, SlotIndex, Reply<Slot>),
    Ready(oneshot::Sender<usize>),
    Shutdown(oneshot::Sender<()>),
}

/// A slot on its way to a caller.
#[derive(Debug)]
struct Offer {
    slot: Slot,
    received: oneshot::Sender<()>,
}

/// What a job came to.
enum Done {
    Built(SlotIndex, Result<Slot, NetError>),
    Razed(Serial, Result<(), NetError>, Reply<()>),
    Renewed(Slot, Result<(), NetError>, Reply<Slot>),
    Received,
    NotReceived(Slot),
    LookedAfter(Result<bool, NetError>),
}

/// The pool's task.
struct Owner {
    config: Arc<NetConfig>,
    book: Arc<Mutex<SerialBook>>,
    books: Ledger,
    waiting: VecDeque<Reply<Offer>>,
    jobs: JoinSet<Done>,
    /// Rests after a failed build, until the next round.
    refill: bool,
}

impl Owner {
    /// `stop` cuts the wait for work; jobs under way are finished.
    async fn run(mut self, mut inbox: mpsc::Receiver<Ask>, stop: CancellationToken) {
        let mut rounds = time::interval(ROUND_INTERVAL);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let ended = loop {
            self.start_builds();
            tokio::select! {
                () = stop.cancelled() => break None,
                ask = inbox.recv() => match ask {
                    None => break None,
                    Some(Ask::Shutdown(reply)) => break Some(reply),
                    Some(ask) => self.answer(ask),
                },
                Some(done) = self.jobs.join_next() => self.settle(done),
                _ = rounds.tick() => self.look_after(),
            }
        };
        drop(inbox);
        self.close().await;
        if let Some(reply) = ended {
            // Nobody waits any more: nothing to tell.
            let _gone = reply.send(());
        }
    }

    fn start_builds(&mut self) {
        while let Some(index) = self.books.begin_build(self.waiting.len(), self.refill) {
            let (config, book) = (self.config.clone(), self.book.clone());
            self.jobs
                .spawn_blocking(move || Done::Built(index, build_one(&config, &book, index)));
        }
    }

    fn answer(&mut self, ask: Ask) {
        match ask {
            Ask::Take(reply) => self.queue(reply),
            Ask::Release(serial, reply) => self.release(serial, reply),
            Ask::Adopt(serial, index, reply) => self.adopt(serial, index, reply),
            Ask::Ready(reply) => {
                let _gave_up = reply.send(self.books.ready());
            }
            Ask::Shutdown(_) => unreachable!("the loop ends on it"),
        }
    }

    fn queue(&mut self, reply: Reply<Offer>) {
        // Callers who gave up do not count, or they would push out those who did not.
        self.waiting.retain(|waiting| !waiting.is_closed());
        if self.books.can_promise(self.waiting.len()) {
            self.waiting.push_back(reply);
            self.serve();
        } else {
            let count = u16::try_from(self.books.size()).unwrap_or(u16::MAX);
            let _gave_up = reply.send(Err(NetError::Exhausted { count }));
        }
    }

    /// Gives ready slots to waiting callers.
    fn serve(&mut self) {
        while !self.waiting.is_empty() {
            let Some(slot) = self.books.take() else {
                return;
            };
            let Some(reply) = self.waiting.pop_front() else {
                return;
            };
            let (received, confirmed) = oneshot::channel();
            let offer = Offer {
                slot: slot.clone(),
                received,
            };
            match reply.send(Ok(offer)) {
                Err(_) => self.books.return_unused(slot),
                Ok(()) => drop(self.jobs.spawn(receipt(slot, confirmed))),
            }
        }
    }

    fn release(&mut self, serial: Serial, reply: Reply<()>) {
        match self.books.index_held(serial) {
            Some(index) => {
                // By our own books: what the caller wrote down may be old or altered.
                let slot = Slot::new(&self.config.tag, serial, index);
                let job = move || Done::Razed(serial, raze(&slot), reply);
                self.jobs.spawn_blocking(job);
            }
            None => {
                let _gave_up = reply.send(Err(NetError::NotHeld(serial)));
            }
        }
    }

    fn adopt(&mut self, serial: Serial, index: SlotIndex, reply: Reply<Slot>) {
        if !self.books.adopt(serial, index) {
            let _gave_up = reply.send(Err(NetError::Gone { serial, index }));
            return;
        }
        let slot = Slot::new(&self.config.tag, serial, index);
        let config = self.config.clone();
        self.jobs.spawn_blocking(move || {
            let done = build::renew_rules(&slot, &config.egress_allow)
                .map_err(NetError::kernel("renew the rules of slot", serial));
            Done::Renewed(slot, done, reply)
        });
    }

    fn look_after(&mut self) {
        self.refill = true;
        let config = self.config.clone();
        self.jobs
            .spawn_blocking(move || Done::LookedAfter(restore_host_rules(&config)));
    }

    fn settle(&mut self, done: Result<Done, tokio::task::JoinError>) {
        let done = match done {
            Ok(done) => done,
            Err(err) if err.is_panic() => std::panic::resume_unwind(err.into_panic()),
            // The runtime is being dropped, and this task with it.
            Err(_) => return,
        };
        match done {
            Done::Built(_, Ok(slot)) => self.books.built(slot),
            Done::Built(index, Err(err)) => self.build_failed(index, err),
            Done::Razed(serial, result, reply) => {
                if result.is_ok() {
                    self.books.razed(serial);
                }
                let _gave_up = reply.send(result);
            }
            Done::Renewed(slot, result, reply) => {
                if result.is_err() {
                    self.books.adoption_failed(slot.serial);
                }
                let _gave_up = reply.send(result.map(|()| slot));
            }
            Done::Received => {}
            Done::NotReceived(slot) => self.books.return_unused(slot),
            Done::LookedAfter(Ok(false)) => {}
            Done::LookedAfter(Ok(true)) => warn!("someone removed the node's rules; restored"),
            Done::LookedAfter(Err(err)) => error!(error = chain(&err), "look after the rules"),
        }
        self.serve();
    }

    /// One waiting caller learns of it; refilling rests until the next round.
    fn build_failed(&mut self, index: SlotIndex, err: NetError) {
        self.books.build_failed(index);
        self.refill = false;
        match self.waiting.pop_front() {
            Some(reply) => {
                let _gave_up = reply.send(Err(err));
            }
            None => error!(error = chain(&err), "a slot for the pool could not be made"),
        }
    }

    /// Finishes what is under way and unmakes what nobody uses.
    async fn close(mut self) {
        self.waiting.clear();
        self.refill = false;
        while let Some(done) = self.jobs.join_next().await {
            self.settle(done);
        }
        let unused = self.books.drain_ready();
        let done = blocking(move || unused.iter().map(raze).fold(Ok(()), Result::and)).await;
        match done {
            Ok(()) => info!("unused slots are gone"),
            Err(err) => error!(
                error = chain(&err),
                "unused slots are left to the next sweep"
            ),
        }
    }
}

/// Waits for a caller to confirm that it has `slot`.
async fn receipt(slot: Slot, mut confirmed: oneshot::Receiver<()>) -> Done {
    let in_time = time::timeout(RECEIPT_TIMEOUT, &mut confirmed).await;
    // Once closed, a confirmation either has been sent or will fail for the sender.
    confirmed.close();
    match in_time {
        Ok(Ok(())) => Done::Received,
        Err(_) if confirmed.try_recv().is_ok() => Done::Received,
        Ok(Err(_)) | Err(_) => Done::NotReceived(slot),
    }
}

fn prepare_host(config: NetConfig) -> Result<(NetConfig, Census, SerialBook), NetError> {
    let host = "this host";
    netns::prepare_dir().map_err(NetError::kernel("prepare the namespace folder of", host))?;
    build::write_switch("net/ipv4/ip_forward", "1")
        .map_err(NetError::kernel("switch on IPv4 forwarding on", host))?;
    rules::install_on_host(&config.tag, &config.egress_allow)
        .map_err(NetError::kernel("install the rules of node", &config.tag))?;
    let census = census(&config.tag)?;
    let book = SerialBook::open(config.serial_file.clone(), census.highest)?;
    Ok((config, census, book))
}

fn report(config: &NetConfig, census: &Census, indexes: &BTreeSet<SlotIndex>) {
    info!(
        tag = %config.tag,
        base = config.index_base,
        count = config.index_count,
        found = census.slots.len(),
        "slot pool starts; IPv4 forwarding is on for this host"
    );
    let lost = indexes.intersection(&census.foreign).count();
    if lost > 0 {
        warn!(
            lost,
            "addresses of this node's slots are already on this host; another node's range?"
        );
    }
}

fn build_one(
    config: &NetConfig,
    book: &Mutex<SerialBook>,
    index: SlotIndex,
) -> Result<Slot, NetError> {
    // A panic elsewhere cannot have left the book wrong: it advances after the write.
    let serial = book.lock().unwrap_or_else(PoisonError::into_inner).take()?;
    let slot = Slot::new(&config.tag, serial, index);
    raise(&slot, &config.egress_allow)?;
    Ok(slot)
}

/// Puts the node's rules back if they are gone; tells whether they were.
fn restore_host_rules(config: &NetConfig) -> Result<bool, NetError> {
    let doing = "look after the rules of node";
    let gone = !rules::on_host(&config.tag).map_err(NetError::kernel(doing, &config.tag))?;
    if gone {
        rules::install_on_host(&config.tag, &config.egress_allow)
            .map_err(NetError::kernel(doing, &config.tag))?;
    }
    Ok(gone)
}

//! The task that drives one sandbox, from its start or its adoption to its end.
//!
//! It is the only holder of the sandbox's phase and resources. It takes one event at a time; a
//! step under way is finished before the next event is looked at, only the waits (for the guest
//! to boot, for something to happen) can be cut. When the daemon stops, the task ends and leaves
//! everything running for the next daemon to adopt.

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::error::AcquireError;
use super::phase::{Action, End, Event, Phase, step};
use super::record::ReadyFacts;
use super::registry::{Order, Shared};
use super::resources::Held;
use super::sealed_disk::RootDisk;
use super::spec::{Host, Origin, StartSpec, StartTimings};
use crate::base::chain::chain;
use crate::shim::client::ShimClient;
use crate::shim::error::CallShimError;
use crate::shim::exit::{ExitRecord, LEASE_LOST, MEMORY_LOST};
use crate::shim::saved::GuestStand;

/// Pause before a release that failed is tried again: what is busy now is rarely busy for long,
/// and a release that can never succeed must not fill the log.
const RELEASE_AGAIN: Duration = Duration::from_secs(5);
/// How long one watch of a shim lasts before it is renewed: rarely, and often enough that a
/// watch that the kernel lost is noticed the same hour.
const WATCH_ROUND: Duration = Duration::from_secs(1800);
/// Pause before a watch that failed is tried again.
const WATCH_AGAIN: Duration = Duration::from_secs(1);
/// Bytes of the console that are searched for a last word of a guest that did not come up.
const LAST_WORDS_BYTES: usize = 2048;

/// Drives one sandbox.
pub(super) struct Driver {
    pub(super) host: Arc<Host>,
    pub(super) shared: Arc<Shared>,
    /// Ends the sandbox.
    pub(super) stop: CancellationToken,
    /// Ends this task and leaves the sandbox as it is.
    pub(super) detach: CancellationToken,
    /// What is to be done with a guest that stays.
    pub(super) orders: mpsc::Receiver<Order>,
}

/// What a wait was cut by.
enum Cut {
    Stop,
    Detach,
}

impl Driver {
    /// Starts a sandbox from nothing, then drives it to its end.
    pub(super) async fn start(self, spec: StartSpec) {
        let asked = Instant::now();
        match Held::create(&self.host, &spec).await {
            Ok(mut held) => {
                let first = match spec.origin {
                    Origin::Snapshot(from) => self.bring_back(&spec, from, &mut held, asked).await,
                    Origin::Image(base) => {
                        let disk = RootDisk::New(base);
                        self.bring_up(&spec, disk, &mut held, asked).await
                    }
                    Origin::Disk { from, .. } => {
                        let disk = RootDisk::Sealed(from);
                        self.bring_up(&spec, disk, &mut held, asked).await
                    }
                    Origin::Fork { from, or_boots, .. } => {
                        self.start_fork(&spec, from, or_boots, &mut held, asked)
                            .await
                    }
                };
                self.drive(held, first).await;
            }
            Err(err) => {
                warn!(err = chain(&err), "could not start");
                // The directory may be half made, and nothing but itself belongs to it.
                if let Err(err) = self.shared.remove_dir().await {
                    warn!(%err, "could not remove its directory; the next start will");
                }
                self.shared.set_phase(Phase::Gone { end: failed(&err) });
            }
        }
    }

    /// Takes over a sandbox whose VMM an earlier daemon started.
    pub(super) async fn adopt(self, mut held: Held) {
        held.find_source(&self.host);
        // It may have thawed while no daemon could tell it the time: it is taken for frozen until
        // it was asked.
        let bound = held.shim.as_ref().map(|it| it.known_status().lease_bound);
        self.shared.set_frozen(bound.unwrap_or(false));
        let stand = held.shim.as_ref().map(|it| it.known_status().stand);
        let first = match held.record.ready.clone() {
            Some(facts) if stand == Some(GuestStand::Running) => self.take_over(&held, facts).await,
            // Whether the cluster was told of a seal is not known: it is asked before the guest goes
            // on.
            Some(facts) => self.ready(&held, facts).map(|event| match event {
                Event::GuestReady => Event::FoundFrozen {
                    reason: "the host's daemon ended while the guest was sealed".into(),
                },
                other => other,
            }),
            // It may be running as its own twin: nobody has confirmed that it is not.
            None if held.record.parent.is_some() => Some(Event::VmmEnded(End::Unfinished {
                reason: "the host's daemon ended while the guest was brought back".into(),
            })),
            // It was being kept as it had booted, and stands still.
            None if stand != Some(GuestStand::Running) => Some(Event::VmmEnded(End::Unfinished {
                reason: "the host's daemon ended while the guest was kept for others".into(),
            })),
            // How long it took is not known: another daemon began it.
            None => {
                self.await_guest(&mut held, &mut StartTimings::default())
                    .await
            }
        };
        self.drive(held, first).await;
    }

    /// Publishes a guest whose processors run. An earlier daemon may have ended between its quiesce and
    /// its save, or after its thaw: then the agent holds the workload, until it is told to let go. Clients
    /// need not wait for that: its agent answers them meanwhile.
    async fn take_over(&self, held: &Held, facts: ReadyFacts) -> Option<Event> {
        let first = self.ready(held, facts);
        if matches!(first, Some(Event::GuestReady)) {
            self.shared.set_phase(Phase::Ready);
        }
        // One that is frozen for want of a lease answers nobody. It is told the time once it has
        // thawed, which lets it go as well.
        if !self.shared.frozen()
            && let Ok(Some(guest)) = held.guest()
        {
            let told = self.undo_quiesce(held, &guest);
            if let Err(over) = self.unless_over(held.shim.as_ref(), told).await {
                self.shared.forget_guest();
                return over;
            }
        }
        first
    }

    /// Releases what an earlier daemon left of a sandbox that has ended.
    pub(super) async fn bury(self, held: Held, end: End) {
        self.drive(held, Some(Event::VmmEnded(end))).await;
    }

    pub(super) fn set_timings(&self, timings: StartTimings) {
        self.shared.set_timings(timings);
    }

    /// Every step of a start. `None` when the daemon is stopping.
    pub(super) async fn bring_up(
        &self,
        spec: &StartSpec,
        disk: RootDisk,
        held: &mut Held,
        asked: Instant,
    ) -> Option<Event> {
        let mut timings = StartTimings {
            record: asked.elapsed(),
            ..StartTimings::default()
        };
        let mark = Instant::now();
        if let RootDisk::Sealed(from) = disk {
            // It may take long, and nothing is acquired yet.
            match self.unless_over(None, self.fetch(from)).await {
                Ok(Ok(source)) => held.source = Some(source),
                Ok(Err(err)) => return Some(start_failed(&err.into())),
                Err(over) => return over,
            }
        }
        let fetched = mark.elapsed();
        let acquired: Result<(), AcquireError> = async {
            let mark = Instant::now();
            held.take_slot(&self.host).await?;
            timings.slot = mark.elapsed();
            let mark = Instant::now();
            match disk {
                RootDisk::New(base) => held.make_disk(&self.host, base, spec.disk).await?,
                RootDisk::Sealed(from) => self.lay_out_disk(spec, from, held).await?,
            }
            timings.disk = fetched + mark.elapsed();
            Ok(())
        }
        .await;
        if let Err(err) = acquired {
            return Some(start_failed(&err));
        }
        // Its guest boots as soon as there is a VMM.
        let mark = Instant::now();
        if let Err(over) = self.unless_over(None, self.shared.let_begin()).await {
            return over;
        }
        timings.word = mark.elapsed();
        let mark = Instant::now();
        match held.start_vmm(&self.host, spec, None).await {
            Ok(took) => timings.vmm = took,
            Err(err) => return Some(start_failed(&err)),
        }
        timings.shim = mark.elapsed().saturating_sub(timings.vmm);
        if spec.keep_warm
            && let RootDisk::New(base) = disk
            && let Some(over) = self.keep_warm(spec, base, held, &mut timings).await
        {
            return over;
        }
        let event = self.await_guest(held, &mut timings).await;
        if matches!(event, Some(Event::GuestReady)) {
            info!(?timings, "started");
            self.shared.set_timings(timings);
        }
        event
    }

    /// The wait for the guest, cut by a stop, a detach, or the VMM's end.
    async fn await_guest(&self, held: &mut Held, timings: &mut StartTimings) -> Option<Event> {
        let guest = match held.guest() {
            Ok(Some(guest)) => guest,
            Ok(None) => {
                return Some(Event::StartFailed {
                    reason: "it has no network".into(),
                });
            }
            Err(err) => return Some(start_failed(&err)),
        };
        let shim = held.shim.clone();
        let set_up = held.set_up_guest(&self.host, &guest, timings);
        let outcome = self.unless_over(shim.as_ref(), set_up).await;
        self.is_up(held, outcome)
    }

    /// The outcome of `work` on a guest, unless the sandbox is to end, or its VMM does, before.
    pub(super) async fn unless_over<T>(
        &self,
        shim: Option<&ShimClient>,
        work: impl Future<Output = T>,
    ) -> Result<T, Option<Event>> {
        let shim = shim.cloned();
        let ended = async move {
            match &shim {
                Some(shim) => vmm_end(shim).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            cut = self.cut() => Err(match cut {
                Cut::Stop => Some(Event::StopAsked),
                Cut::Detach => None,
            }),
            end = ended => {
                if matches!(end, End::LeaseLost { .. }) {
                    return Err(Some(Event::VmmEnded(end)));
                }
                let last_words = self.last_words();
                let reason = format!("{}{last_words}", words(&end));
                Err(Some(Event::StartFailed { reason }))
            }
            outcome = work => Ok(outcome),
        }
    }

    /// What an attempt to get a guest ready came to.
    pub(super) fn is_up(
        &self,
        held: &Held,
        outcome: Result<Result<ReadyFacts, AcquireError>, Option<Event>>,
    ) -> Option<Event> {
        match outcome {
            Ok(Ok(facts)) => self.ready(held, facts),
            Ok(Err(err)) => {
                let waits = held.waits_in_words();
                let reason = format!("{}{waits}{}", chain(&err), self.last_words());
                Some(Event::StartFailed { reason })
            }
            Err(over) => over,
        }
    }

    /// Publishes the guest of a sandbox that is ready.
    fn ready(&self, held: &Held, facts: ReadyFacts) -> Option<Event> {
        match held.guest() {
            Ok(Some(guest)) => {
                self.shared
                    .set_ready(guest, facts, &self.host.kernel_release);
                Some(Event::GuestReady)
            }
            Ok(None) => Some(Event::StartFailed {
                reason: "it has no network".into(),
            }),
            Err(err) => Some(start_failed(&err)),
        }
    }

    /// Takes events and carries out what they ask for, until the sandbox is gone or the daemon
    /// stops.
    async fn drive(mut self, mut held: Held, first: Option<Event>) {
        let mut phase = Phase::Starting;
        let mut next = first;
        while let Some(event) = next.take() {
            let actions = match step(phase.clone(), event) {
                Ok((after, actions)) => {
                    phase = after;
                    self.shared.set_phase(phase.clone());
                    actions
                }
                Err(refusal) => {
                    info!(%refusal, "nothing to do");
                    Vec::new()
                }
            };
            if matches!(phase, Phase::Gone { .. }) {
                return;
            }
            next = match actions.first() {
                Some(Action::Release) => Some(self.release(&mut held).await),
                Some(Action::ReleaseLater) => self.release_later(&mut held).await,
                Some(Action::Seal(what)) => Some(self.seal(&mut held, *what).await),
                Some(Action::Thaw) => Some(self.thaw(&mut held).await),
                None => self.next_event(&held, &phase).await,
            };
        }
    }

    /// One more try, after a rest. `None` when the daemon is stopping: the next one finds the
    /// directory and goes on, where waiting here for a release that never succeeds would keep
    /// this one from ever ending.
    async fn release_later(&self, held: &mut Held) -> Option<Event> {
        let rest = time::sleep(RELEASE_AGAIN);
        self.detach.run_until_cancelled(rest).await?;
        Some(self.release(held).await)
    }

    async fn release(&self, held: &mut Held) -> Event {
        self.shared.forget_guest();
        match held.release(&self.host).await {
            Ok(()) => Event::Released,
            Err(err) => {
                warn!(
                    err = chain(&err),
                    "could not release everything; will try again"
                );
                Event::ReleaseFailed
            }
        }
    }

    /// What happens next to a sandbox that waits. `None` when the daemon is stopping.
    async fn next_event(&mut self, held: &Held, phase: &Phase) -> Option<Event> {
        let Some(shim) = &held.shim else {
            return Some(Event::StopAsked);
        };
        let mut orders = std::mem::replace(&mut self.orders, mpsc::channel(1).1);
        let next = tokio::select! {
            cut = self.cut() => match cut {
                Cut::Stop => Some(Event::StopAsked),
                Cut::Detach => None,
            },
            Some(order) = orders.recv() => Some(match order {
                Order::Seal(what) => Event::SealAsked(what),
                Order::Thaw => Event::ThawAsked,
            }),
            // Of one that is sealed the VMM's end says nothing, and is not waited for twice.
            end = vmm_end(shim), if !matches!(phase, Phase::Sealed(_)) => Some(Event::VmmEnded(end)),
            never = self.follow_lease(held, shim) => match never {},
        };
        self.orders = orders;
        next
    }

    /// Publishes for ever whether the guest is frozen. One that has thawed is given out again
    /// when its clock is right.
    async fn follow_lease(&self, held: &Held, shim: &ShimClient) -> Infallible {
        if !shim.known_status().lease_bound {
            return std::future::pending().await;
        }
        loop {
            let known = self.shared.frozen();
            match shim.wait_freeze(known, Instant::now() + WATCH_ROUND).await {
                Ok(Some(true)) => {
                    warn!("frozen: this node's lease was not renewed");
                    self.shared.set_frozen(true);
                }
                Ok(Some(false)) if known => {
                    held.set_guest_clock().await;
                    info!("thawed");
                    self.shared.set_frozen(false);
                }
                Ok(_) => {}
                // Or it is ending, which is seen elsewhere.
                Err(err) => {
                    debug!(%err, "the shim cannot be asked whether its guest is frozen");
                    time::sleep(WATCH_AGAIN).await;
                }
            }
        }
    }

    async fn cut(&self) -> Cut {
        tokio::select! {
            // A stop that is asked for while the daemon stops is carried out by the next one.
            biased;
            () = self.detach.cancelled() => Cut::Detach,
            () = self.stop.cancelled() => Cut::Stop,
        }
    }

    /// The last line on the guest's console, for a reason people can use. The guest's words end
    /// up on terminals: control characters are left out.
    fn last_words(&self) -> String {
        let tail = self
            .shared
            .console_tail(LAST_WORDS_BYTES)
            .unwrap_or_default();
        last_line(&tail).map_or_else(String::new, |line| {
            format!("; the console's last line: {line}")
        })
    }
}

/// The last line of `text` that says something, without control characters.
fn last_line(text: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(text);
    let lines = text.lines().rev();
    lines
        .map(|line| line.chars().filter(|it| !it.is_control()).collect())
        .map(|line: String| line.trim().to_owned())
        .find(|line| !line.is_empty())
}

pub(super) fn start_failed(err: &AcquireError) -> Event {
    Event::StartFailed { reason: chain(err) }
}

fn failed(err: &AcquireError) -> End {
    End::Failed { reason: chain(err) }
}

fn words(end: &End) -> &str {
    match end {
        End::Stopped { reason }
        | End::Failed { reason }
        | End::Unfinished { reason }
        | End::LeaseLost { reason } => reason,
    }
}

/// Waits for the end of a VMM, however long it takes.
async fn vmm_end(shim: &ShimClient) -> End {
    loop {
        match shim.wait_exit(Instant::now() + WATCH_ROUND).await {
            Ok(Some(record)) => return end_of(&record),
            Ok(None) => {}
            Err(CallShimError::Gone { .. }) => {
                return End::Failed {
                    reason: "its shim was killed".into(),
                };
            }
            Err(err) => {
                warn!(%err, "the shim cannot be watched; will try again");
                time::sleep(WATCH_AGAIN).await;
            }
        }
    }
}

/// What the end of a VMM means for its sandbox.
pub(super) fn end_of(record: &ExitRecord) -> End {
    if record.reason == LEASE_LOST {
        return End::LeaseLost {
            reason: format!("{LEASE_LOST}: {}", record.explanation),
        };
    }
    if record.reason == MEMORY_LOST {
        return End::Failed {
            reason: format!("{MEMORY_LOST}: {}", record.explanation),
        };
    }
    match (record.signal, record.code) {
        (None, Some(0)) => End::Stopped {
            reason: "the guest powered itself off".into(),
        },
        (Some(signal), _) => End::Failed {
            reason: format!("its VMM was killed by signal {signal}"),
        },
        (None, code) => {
            let code = code.map_or_else(|| "unknown".into(), |code| code.to_string());
            let complaint = record.stderr_tail.trim();
            End::Failed {
                reason: format!("its VMM ended with code {code}: {complaint}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::last_line;

    #[test]
    fn a_guests_last_words_cannot_steer_a_terminal() {
        let console = b"booting\r\n\x1b]0;owned\x07no root\xff device\r\n \x1b\r\n";
        let expected = Some("]0;ownedno root\u{fffd} device".to_owned());
        assert_eq!(last_line(console), expected);
        assert_eq!(last_line(b"\r\n\n"), None);
    }
}

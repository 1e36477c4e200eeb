//! The owner's half: streams that other nodes open to guests here, and questions about them.
//!
//! ```text
//! header > read it > the epoch is the newest > owned here, not frozen > guest dialled > verdict > pump
//! ```
//!
//! **Whom to believe.** The newest epoch is what the log says, never what a peer claims: a header
//! with a newer one waits a moment for the log, since the peer may have applied more of it, and is
//! refused if that does not come. So a peer that lies can refuse itself and nobody else.
//!
//! **Bounds.** Streams are counted for each peer and in all; past either, a stream is refused as
//! busy before anything is looked up. Everything up to the verdict has one deadline.
//!
//! **Stopping.** A stream ends with the future that serves it. The guest's connection is made
//! through its own dial, which breaks when the guest is let go.

use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use proto::epoch::Epoch;
use proto::ids::{NodeId, SandboxId};
use tokio::time::{self, Instant};
use tracing::{debug, warn};

use super::local::LocalGuests;
use super::noted::use_again;
use super::pump::pump;
use super::refusal::Refusal;
use super::wire::{self, Header};
use crate::cluster::View;
use crate::guest::{Guest, GuestStream};

/// Streams relayed for one peer at once. Each may hold two buffers of 64 KiB: 64 MiB a peer.
pub const STREAMS_PER_PEER: usize = 512;
/// Streams relayed at once for all peers together: 256 MiB.
pub const STREAMS_IN_ALL: usize = 2048;
/// Longest from a header to its verdict. A guest is dialled within 5 s or not at all.
const VERDICT_TIMEOUT: Duration = Duration::from_secs(8);
/// How long this node's log may lie behind a peer's before the peer is told to come again.
const CATCH_UP: Duration = Duration::from_secs(1);

/// The owner's half of the relay on one node. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Server {
    pub(super) here: NodeId,
    pub(super) view: View,
    pub(super) local: Arc<dyn LocalGuests>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    streams: Mutex<HashMap<NodeId, usize>>,
    /// Whether garbage was complained of: a broken peer gets one line, not a log full.
    complained: AtomicBool,
}

impl Server {
    /// Serves the guests of node `here`.
    #[must_use]
    pub fn new(here: NodeId, view: View, local: Arc<dyn LocalGuests>) -> Self {
        let shared = Arc::default();
        Self {
            here,
            view,
            local,
            shared,
        }
    }

    /// Relays one stream that `from` opened with `header`, until it has ended. `gone` resolves
    /// when the other end will not read any more, which a quiet stream does not show; for streams
    /// that cannot tell, it may stay pending.
    ///
    /// Keeps to the contract of [`super::Peers::open`]: what ended here is shut down, what broke
    /// is dropped.
    pub async fn serve(
        &self,
        from: NodeId,
        header: Bytes,
        mut stream: GuestStream,
        gone: impl Future<Output = ()>,
    ) {
        let relay = async {
            let deadline = Instant::now() + VERDICT_TIMEOUT;
            let opened = time::timeout_at(deadline, self.open(from, &header)).await;
            let opened = opened.unwrap_or_else(|_| Err(Refusal::Guest("no answer in time".into())));
            let (admitted, near) = match opened {
                Ok(opened) => opened,
                Err(refusal) => return self.refuse(from, stream, refusal).await,
            };
            if wire::write_verdict(&mut stream, None).await.is_err() {
                return;
            }
            let (id, epoch) = (admitted.header.sandbox, admitted.header.epoch);
            let again = || use_again(self.local.as_ref(), id, epoch);
            match pump(stream, near, again).await {
                Ok((sent, received)) => debug!(%from, sandbox = %id, sent, received, "relayed"),
                Err(err) => debug!(%from, sandbox = %id, %err, "a relayed stream broke"),
            }
        };
        tokio::select! {
            () = relay => {}
            () = gone => debug!(%from, "the other end of a relayed stream has gone"),
        }
    }

    /// How many streams are relayed from here.
    #[must_use]
    pub fn streams(&self) -> usize {
        self.shared.streams().values().sum()
    }

    async fn open(&self, from: NodeId, header: &Bytes) -> Result<(Admitted, GuestStream), Refusal> {
        let room = Shared::room(&self.shared, from)?;
        let header = Header::decode(header)?;
        self.check_sight(from, header.sandbox)?;
        let guest = self.guest(header.sandbox, header.epoch).await?;
        let dial = match header.port {
            Some(port) => guest.dial().at_port(port),
            None => Arc::clone(guest.dial()),
        };
        let stream = dial.dial().await;
        let stream = stream.map_err(|err| Refusal::Guest(err.to_string()))?;
        let admitted = Admitted {
            header,
            _room: room,
        };
        Ok((admitted, stream))
    }

    /// The guest of a sandbox that runs here under `epoch`. Counts as use.
    pub(super) async fn guest(&self, id: SandboxId, epoch: Epoch) -> Result<Guest, Refusal> {
        self.check_epoch(id, epoch).await?;
        if self.local.is_frozen(id) {
            return Err(Refusal::Frozen);
        }
        self.local.guest(id, epoch).ok_or(Refusal::NotReady)
    }

    /// Checks that `from` may know of the sandbox: the host of one team sees only that team's.
    pub(super) fn check_sight(&self, from: NodeId, id: SandboxId) -> Result<(), Refusal> {
        let state = self.view.state();
        let team = state.node(from).and_then(|node| node.team);
        match (team, state.sandbox(id)) {
            (Some(team), Some(sandbox)) if sandbox.team != team => Err(Refusal::NoSuchSandbox),
            _ => Ok(()),
        }
    }

    /// Checks that `epoch` is the newest, and this node's.
    async fn check_epoch(&self, id: SandboxId, epoch: Epoch) -> Result<(), Refusal> {
        let caught_up = self.view.wait_for(Instant::now() + CATCH_UP, |state| {
            let sandbox = state.sandbox(id)?;
            (sandbox.epoch >= epoch).then_some((sandbox.epoch, sandbox.owner))
        });
        match caught_up.await {
            None if self.view.state().sandbox(id).is_none() => Err(Refusal::NoSuchSandbox),
            None => Err(Refusal::Early),
            Some((newest, _)) if newest > epoch => Err(Refusal::StaleEpoch { newest }),
            Some((_, owner)) if owner != self.here => Err(Refusal::NotOwner),
            Some(_) => Ok(()),
        }
    }

    async fn refuse(&self, from: NodeId, mut stream: GuestStream, refusal: Refusal) {
        self.note_refusal(from, &refusal);
        let tell = async {
            wire::write_verdict(&mut stream, Some(refusal)).await?;
            tokio::io::AsyncWriteExt::shutdown(&mut stream).await
        };
        // Whoever does not read its refusal has nothing else coming.
        let _told = time::timeout(VERDICT_TIMEOUT, tell).await;
    }

    /// Says what was refused, and garbage aloud, once.
    pub(super) fn note_refusal(&self, from: NodeId, refusal: &Refusal) {
        let is_garbage = matches!(refusal, Refusal::Garbled(_) | Refusal::Version(_));
        if is_garbage && !self.shared.complained.swap(true, Ordering::Relaxed) {
            warn!(%from, %refusal, "a peer's relay is not understood; further ones go unmentioned");
        } else {
            debug!(%from, %refusal, "refused to relay");
        }
    }
}

/// A stream that may be relayed, and its place among those that are.
struct Admitted {
    header: Header,
    _room: Room,
}

/// One peer's stream among those that are counted.
struct Room {
    shared: Arc<Shared>,
    peer: NodeId,
}

impl Shared {
    fn room(shared: &Arc<Self>, peer: NodeId) -> Result<Room, Refusal> {
        let mut streams = shared.streams();
        let in_all: usize = streams.values().sum();
        let of_peer = streams.get(&peer).copied().unwrap_or(0);
        if in_all >= STREAMS_IN_ALL || of_peer >= STREAMS_PER_PEER {
            return Err(Refusal::Busy);
        }
        streams.insert(peer, of_peer + 1);
        drop(streams);
        let shared = Arc::clone(shared);
        Ok(Room { shared, peer })
    }

    fn streams(&self) -> MutexGuard<'_, HashMap<NodeId, usize>> {
        // Every change is a single call: a panic leaves the table whole.
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let mut streams = self.shared.streams();
        match streams.get_mut(&self.peer) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(streams.remove(&self.peer)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_counted_for_each_peer_and_given_back() {
        let shared = Arc::new(Shared::default());
        let (one, two) = (NodeId(1), NodeId(2));
        let mut held: Vec<_> = (0..STREAMS_PER_PEER)
            .map(|_| Shared::room(&shared, one).expect("room"))
            .collect();
        assert_eq!(Shared::room(&shared, one).err(), Some(Refusal::Busy));
        let other = Shared::room(&shared, two).expect("another peer has room");
        held.pop();
        held.push(Shared::room(&shared, one).expect("given back"));
        drop((held, other));
        assert!(shared.streams().is_empty());
    }
}

//! Guests on other nodes.
//!
//! A [`RemoteDial`] opens a relay stream to the owner and waits for its verdict, so a connection
//! that exists is one to the right guest under the right epoch. The HTTP client above pools those
//! connections; [`RemoteGuests`] keeps the clients, one for each (sandbox, epoch, owner), so that a
//! call through another node costs a round trip and not a dial.
//!
//! **Epochs.** When the record of a sandbox names another epoch or owner, or is over, what was
//! opened under the old one breaks at once on this side ([`RemoteGuests::drop_stale`]). The owner
//! breaks it on its side when it lets go of the guest. Neither depends on the other.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use proto::epoch::Epoch;
use proto::ids::{NodeId, SandboxId};
use raft::state::{Sandbox, State};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OnceCell;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;

use super::error::RelayError;
use super::peers::{PeerError, Peers};
use super::wire::{self, Header};
use crate::guest::dial::DialFuture;
use crate::guest::{CutDial, Dial, Guest, GuestStream};

/// Longest from asking for a stream to the owner's verdict: the owner may take 5 s to reach its
/// guest and 1 s to catch up with the log.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// Guests of other nodes that are kept. Each costs two small pools; past the bound, the one that
/// was used least recently goes, and costs its next user a question and a dial.
const KEPT_GUESTS: usize = 1024;

/// One sandbox under one ownership, seen from another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) id: SandboxId,
    pub(super) epoch: Epoch,
    pub(super) owner: NodeId,
    /// What people call the owner.
    pub(super) host: String,
}

impl Target {
    pub(super) fn of(state: &State, sandbox: &Sandbox) -> Self {
        let owner = sandbox.owner;
        let named = state.node(owner).map(|node| node.name.clone());
        Self {
            id: sandbox.id,
            epoch: sandbox.epoch,
            owner,
            host: named.unwrap_or_else(|| owner.to_string()),
        }
    }

    /// Whether both mean one guest. A node may be renamed meanwhile.
    fn is_same_ownership(&self, other: &Self) -> bool {
        (self.id, self.epoch, self.owner) == (other.id, other.epoch, other.owner)
    }

    /// Whether it is still what the state says.
    fn is_current(&self, state: &State) -> bool {
        state.sandbox(self.id).is_some_and(|sandbox| {
            sandbox.epoch == self.epoch
                && sandbox.owner == self.owner
                && sandbox.phase.holds_resources()
        })
    }
}

/// Dials a guest through its owner.
#[derive(Clone, Debug)]
pub(super) struct RemoteDial {
    peers: Arc<dyn Peers>,
    target: Arc<Target>,
    /// The agent's own, where there is none.
    port: Option<u16>,
}

impl RemoteDial {
    /// Dials the guest's agent.
    pub(super) fn new(peers: Arc<dyn Peers>, target: Target) -> Self {
        let (target, port) = (Arc::new(target), None);
        Self {
            peers,
            target,
            port,
        }
    }

    async fn open(self) -> Result<GuestStream, RelayError> {
        let header = Header {
            sandbox: self.target.id,
            epoch: self.target.epoch,
            port: self.port,
        };
        let unreachable = |err: PeerError| RelayError::unreachable(&self.target, &err);
        let opened = self.peers.open(self.target.owner, header.encode());
        let mut stream = opened.await.map_err(unreachable)?;
        let verdict = wire::read_verdict(&mut stream).await;
        let verdict = verdict.map_err(|err| unreachable(PeerError::Broken(err.to_string())))?;
        verdict.map_err(|refusal| RelayError::refused(&self.target, refusal))?;
        Ok(GuestStream::new(RemoteStream {
            inner: stream,
            target: self.target,
        }))
    }
}

impl Dial for RemoteDial {
    fn dial(&self) -> DialFuture {
        let dial = self.clone();
        Box::pin(async move {
            let timed_out = RelayError::unreachable(&dial.target, &PeerError::TimedOut);
            let opened = time::timeout(DIAL_TIMEOUT, dial.open()).await;
            opened.unwrap_or(Err(timed_out)).map_err(io::Error::other)
        })
    }

    fn at_port(&self, port: u16) -> Arc<dyn Dial> {
        Arc::new(Self {
            port: Some(port),
            ..self.clone()
        })
    }
}

/// A relayed stream whose failures say whether the owner is gone or the guest.
struct RemoteStream {
    inner: GuestStream,
    target: Arc<Target>,
}

impl RemoteStream {
    fn named<T>(&self, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        polled.map_err(|err| match err.kind() {
            kind @ (io::ErrorKind::NotConnected | io::ErrorKind::TimedOut) => {
                let (id, host) = (self.target.id, self.target.host.clone());
                io::Error::new(kind, RelayError::HostLost { id, host })
            }
            _ => err,
        })
    }
}

impl AsyncRead for RemoteStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        self.named(polled)
    }
}

impl AsyncWrite for RemoteStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.named(polled)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_flush(cx);
        self.named(polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_shutdown(cx);
        self.named(polled)
    }
}

/// The guests of other nodes that are in use from here.
#[derive(Debug, Default)]
pub(super) struct RemoteGuests {
    table: Mutex<HashMap<SandboxId, Kept>>,
}

#[derive(Debug)]
struct Kept {
    slot: Slot,
    used: Instant,
}

/// Room for one guest. Whoever comes first fills it; the others wait for that.
#[derive(Clone, Debug)]
pub(super) struct Slot {
    pub(super) target: Target,
    pub(super) guest: Arc<OnceCell<Guest>>,
    over: CancellationToken,
}

impl Slot {
    fn new(target: Target) -> Self {
        let (guest, over) = (Arc::default(), CancellationToken::new());
        Self {
            target,
            guest,
            over,
        }
    }

    /// How the guest is dialled, until its ownership is over.
    pub(super) fn dial(&self, peers: Arc<dyn Peers>) -> CutDial {
        let dial = RemoteDial::new(peers, self.target.clone());
        CutDial::new(dial, self.over.clone())
    }
}

impl RemoteGuests {
    /// The room for `target`. Another ownership's guest of the same sandbox is cut off.
    pub(super) fn slot(&self, target: Target) -> Slot {
        let mut table = self.table();
        let used = Instant::now();
        if let Some(kept) = table.get_mut(&target.id) {
            if !kept.slot.target.is_same_ownership(&target) {
                kept.slot.over.cancel();
                kept.slot = Slot::new(target);
            }
            kept.used = used;
            return kept.slot.clone();
        }
        if table.len() >= KEPT_GUESTS {
            let oldest = table.iter().min_by_key(|(_, kept)| kept.used);
            // Whoever uses it right now goes on undisturbed.
            oldest.map(|(id, _)| *id).and_then(|id| table.remove(&id));
        }
        let (id, slot) = (target.id, Slot::new(target));
        let kept = Kept {
            slot: slot.clone(),
            used,
        };
        table.insert(id, kept);
        slot
    }

    /// Cuts off every guest whose ownership is over.
    pub(super) fn drop_stale(&self, state: &State) {
        self.table().retain(|_, kept| {
            let current = kept.slot.target.is_current(state);
            if !current {
                kept.slot.over.cancel();
            }
            current
        });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.table().is_empty()
    }

    fn table(&self) -> MutexGuard<'_, HashMap<SandboxId, Kept>> {
        // Every change is a single call: a panic leaves the table whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(id: u8, epoch: u64) -> Target {
        Target {
            id: SandboxId([id; 16]),
            epoch: Epoch(epoch),
            owner: NodeId(1),
            host: "one".into(),
        }
    }

    #[test]
    fn a_new_epoch_cuts_off_the_guest_of_the_old_one() {
        let guests = RemoteGuests::default();
        let old = guests.slot(target(1, 1));
        let again = guests.slot(target(1, 1));
        assert!(Arc::ptr_eq(&old.guest, &again.guest), "it is kept");
        let new = guests.slot(target(1, 2));
        assert!(old.over.is_cancelled());
        assert!(!new.over.is_cancelled());
        guests.drop_stale(&State::default());
        assert!(new.over.is_cancelled(), "its record is gone");
        assert!(guests.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn the_guest_used_least_recently_makes_room_without_being_cut_off() {
        let guests = RemoteGuests::default();
        let id = |number: usize| {
            let mut id = [0; 16];
            id[..8].copy_from_slice(&(number as u64).to_be_bytes());
            Target {
                id: SandboxId(id),
                ..target(0, 1)
            }
        };
        let first = guests.slot(id(0));
        for number in 1..=KEPT_GUESTS {
            time::advance(Duration::from_millis(1)).await;
            guests.slot(id(number));
        }
        assert_eq!(guests.table().len(), KEPT_GUESTS);
        assert!(!first.over.is_cancelled());
        assert!(!Arc::ptr_eq(&first.guest, &guests.slot(id(0)).guest));
    }
}

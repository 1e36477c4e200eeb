//! The open connections, numbered in the order in which they were accepted.
//!
//! A snapshot holds connections whose other end exists no more. They are told from those of the
//! new life by their numbers: the kernel hands connections out in the order of their handshakes,
//! so whatever was accepted before the connection that tells the guest of its restore belongs to
//! the past, and whatever came after it does not.
//!
//! Each connection is a task of its own ([`crate::serve`]), which watches its [`Fate`] here and
//! takes itself off the table when it ends, however it ends.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// Connections one address may have at once. The host has one address, and may run some hundred
/// commands and transfers; a program of the guest has another, and cannot take the host's share.
pub const MAX_PER_PEER: usize = 1024;

/// Numbers a connection; in the extensions of each of its requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConnectionId(u64);

impl ConnectionId {
    /// Older than every connection.
    pub const FIRST: Self = Self(0);
    /// For requests that came over no connection of the table: they never are of the past.
    pub const NEVER_PAST: Self = Self(u64::MAX);
}

/// What is to become of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is served for as long as it lasts.
    Serve,
    /// It ends after the request under way, or at once where there is none.
    Finish,
    /// It ends now, with a reset.
    Cut,
}

/// All open connections.
#[derive(Debug, Default)]
pub struct Connections {
    table: Mutex<Table>,
    lives: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Table {
    accepted: u64,
    open: BTreeMap<ConnectionId, Entry>,
}

#[derive(Debug)]
struct Entry {
    peer: IpAddr,
    fate: watch::Sender<Fate>,
    served: Arc<AtomicBool>,
}

/// One connection's place in the table; dropping it gives the place up.
#[derive(Debug)]
pub struct Admitted {
    /// Its number.
    pub id: ConnectionId,
    /// To be set at its first request.
    pub served: Arc<AtomicBool>,
    /// What is to become of it.
    pub fate: watch::Receiver<Fate>,
    connections: Arc<Connections>,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.connections.lock().open.remove(&self.id);
    }
}

impl Connections {
    /// Enters the connection that was just accepted; `None` where its peer has too many.
    pub fn admit(self: &Arc<Self>, peer: IpAddr) -> Option<Admitted> {
        let mut table = self.lock();
        let same = table.open.values().filter(|entry| entry.peer == peer);
        if same.count() >= MAX_PER_PEER {
            return None;
        }
        table.accepted += 1;
        let id = ConnectionId(table.accepted);
        let (sender, fate) = watch::channel(Fate::Serve);
        let served = Arc::new(AtomicBool::new(false));
        let entry = Entry {
            peer,
            fate: sender,
            served: served.clone(),
        };
        table.open.insert(id, entry);
        Some(Admitted {
            id,
            served,
            fate,
            connections: self.clone(),
        })
    }

    /// Lets every connection end after the request it is at, the idle ones at once. One whose first
    /// request has not come yet is spared: its client could not tell our closing from a refusal.
    pub fn finish_served(&self) {
        self.tell(Fate::Finish, |_, entry| {
            entry.served.load(Ordering::Acquire)
        });
    }

    /// Lets every connection end after the request it is at.
    pub fn finish_all(&self) {
        self.tell(Fate::Finish, |_, _| true);
    }

    /// Cuts whatever was accepted before `first_kept`, and what is forwarded; tells how many of the
    /// former there were.
    pub fn cut_before(&self, first_kept: ConnectionId) -> usize {
        self.lives.send_modify(|life| *life += 1);
        self.tell(Fate::Cut, |id, _| id < first_kept)
    }

    /// Changes when the life ends that forwarded connections belong to: those have no number, since
    /// no order ever comes over one.
    #[must_use]
    pub fn life(&self) -> watch::Receiver<u64> {
        self.lives.subscribe()
    }

    /// How many are open, `except` not counted.
    #[must_use]
    pub fn open_except(&self, except: ConnectionId) -> usize {
        let table = self.lock();
        table.open.keys().filter(|id| **id != except).count()
    }

    fn tell(&self, fate: Fate, whom: impl Fn(ConnectionId, &Entry) -> bool) -> usize {
        let mut told = 0;
        for (id, entry) in &self.lock().open {
            if whom(*id, entry) {
                entry.fate.send_replace(fate);
                told += 1;
            }
        }
        told
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // The table is whole between statements; a panic elsewhere leaves it usable.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(169, 254, 0, 22));

    fn admit(connections: &Arc<Connections>) -> Admitted {
        connections.admit(HOST).expect("room")
    }

    #[test]
    fn one_peer_cannot_take_anothers_share() {
        let connections = Arc::new(Connections::default());
        let mut open: Vec<_> = (0..MAX_PER_PEER).map(|_| admit(&connections)).collect();
        assert!(connections.admit(HOST).is_none());
        let other = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
        assert!(connections.admit(other).is_some());
        open.pop();
        assert!(connections.admit(HOST).is_some());
    }

    #[test]
    fn what_came_before_the_restore_is_cut_and_nothing_else() {
        let connections = Arc::new(Connections::default());
        let [old, own, new] = [0; 3].map(|_| admit(&connections));
        assert_eq!(connections.cut_before(own.id), 1);
        assert_eq!(*old.fate.borrow(), Fate::Cut);
        assert_eq!(*own.fate.borrow(), Fate::Serve);
        assert_eq!(*new.fate.borrow(), Fate::Serve);
    }

    #[test]
    fn a_connection_without_a_request_yet_is_not_finished() {
        let connections = Arc::new(Connections::default());
        let [used, fresh] = [0; 2].map(|_| admit(&connections));
        used.served.store(true, Ordering::Release);
        connections.finish_served();
        assert_eq!(*used.fate.borrow(), Fate::Finish);
        assert_eq!(*fresh.fate.borrow(), Fate::Serve);
    }

    #[test]
    fn a_place_is_given_up_with_its_connection() {
        let connections = Arc::new(Connections::default());
        let (one, two) = (admit(&connections), admit(&connections));
        assert_eq!(connections.open_except(one.id), 1);
        drop(two);
        assert_eq!(connections.open_except(one.id), 0);
        assert_eq!(connections.open_except(ConnectionId::FIRST), 1);
    }
}

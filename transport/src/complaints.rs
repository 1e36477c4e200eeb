//! What peers do wrong, said in the log once per peer and kind, then at most once a minute with a
//! count of what was left out.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use proto::ids::NodeKey;
use tokio::time::Instant;
use tracing::warn;

use crate::close::CloseCode;

/// How long a complaint is not repeated.
const QUIET: Duration = Duration::from_secs(60);
/// Complaints remembered; a cluster of 100 nodes that all misbehave in ten ways fits. Past it the
/// log falls silent about new ones until old ones have expired. Memory: about 100 KiB.
const MAX_REMEMBERED: usize = 1024;

/// Whom a complaint is about. Keys of strangers cost nothing to make, so a stranger is its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Subject {
    /// A member.
    Peer(NodeKey),
    /// Whoever sends from there.
    Address(IpAddr),
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Peer(key) => write!(f, "node {key}"),
            Self::Address(address) => write!(f, "{address}"),
        }
    }
}

/// What was said, and what has been left out since.
struct Said {
    at: Instant,
    left_out: u64,
}

/// The complaints of one node.
#[derive(Default)]
pub(crate) struct Complaints {
    said: Mutex<HashMap<(Subject, CloseCode), Said>>,
}

impl Complaints {
    /// Notes that `who` did what is answered with `code`, and says so unless it was said lately.
    pub(crate) fn about(&self, who: Subject, code: CloseCode) {
        if let Some(left_out) = self.note(who, code, Instant::now()) {
            warn!(%who, %code, left_out, "a peer misbehaves");
        }
    }

    /// The pure half: how many were left out, if this one is to be said.
    fn note(&self, who: Subject, code: CloseCode, now: Instant) -> Option<u64> {
        let mut all = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(said) = all.get_mut(&(who, code)) {
            if now.saturating_duration_since(said.at) < QUIET {
                said.left_out += 1;
                return None;
            }
            let left_out = said.left_out;
            *said = Said {
                at: now,
                left_out: 0,
            };
            return Some(left_out);
        }
        if all.len() >= MAX_REMEMBERED {
            all.retain(|_, said| now.saturating_duration_since(said.at) < QUIET);
        }
        if all.len() >= MAX_REMEMBERED {
            return None;
        }
        let first = Said {
            at: now,
            left_out: 0,
        };
        all.insert((who, code), first);
        Some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: Subject = Subject::Peer(NodeKey([1; 32]));

    #[test]
    fn each_kind_of_each_peer_is_said_once_a_minute_with_a_count() {
        let complaints = Complaints::default();
        let begun = Instant::now();
        assert_eq!(complaints.note(PEER, CloseCode::Flood, begun), Some(0));
        for _ in 0..1000 {
            assert_eq!(complaints.note(PEER, CloseCode::Flood, begun), None);
        }
        assert_eq!(complaints.note(PEER, CloseCode::Stalled, begun), Some(0));
        let other = Subject::Address([127, 0, 0, 1].into());
        assert_eq!(complaints.note(other, CloseCode::Flood, begun), Some(0));
        let later = begun + QUIET;
        assert_eq!(complaints.note(PEER, CloseCode::Flood, later), Some(1000));
    }

    #[test]
    fn what_is_remembered_is_bounded_and_makes_room_again() {
        let complaints = Complaints::default();
        let begun = Instant::now();
        let key = |number: u64| {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&number.to_le_bytes());
            Subject::Peer(NodeKey(key))
        };
        let said = |from: u64, now| {
            let notes =
                (from..from + 2000).map(|at| complaints.note(key(at), CloseCode::Flood, now));
            notes.flatten().count()
        };
        assert_eq!(said(0, begun), MAX_REMEMBERED);
        assert_eq!(said(10_000, begun + QUIET), MAX_REMEMBERED);
    }
}

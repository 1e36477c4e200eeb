//! When keys were used last, without a log entry for each request.
//!
//! A node notes uses in memory and tells the cluster now and then of those keys whose record is
//! [`STALE_AFTER_MS`] old. What a crash forgets is at most that.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto::ids::KeyId;
use proto::units::Stamp;
use raft::command::Command;
use raft::state::State;
use tokio::time;
use tracing::debug;

use crate::base::chain::chain;
use crate::cluster::Proposer;

/// How far a key's record may lag behind its last use: people ask "this week?", not "this minute?".
const STALE_AFTER_MS: u64 = 10 * 60 * 1000;
/// How often a node tells, so at most one entry in this time.
const TELL_INTERVAL: Duration = Duration::from_secs(60);
/// Most keys in one entry.
const MOST_AT_ONCE: usize = 1000;

/// When each key was used last at this node.
#[derive(Clone, Debug, Default)]
pub(super) struct Uses(Arc<Mutex<HashMap<KeyId, Stamp>>>);

impl Uses {
    /// A key that is known was used.
    pub(super) fn note(&self, key: KeyId, at: Stamp) {
        self.lock().insert(key, at);
    }

    /// When `key` was used last, as far as this node knows beside the state.
    pub(super) fn of(&self, key: KeyId) -> Option<Stamp> {
        self.lock().get(&key).copied()
    }

    /// Tells the cluster now and then, for ever.
    pub(super) async fn tell(self, proposer: Proposer) {
        let mut ticks = time::interval(TELL_INTERVAL);
        ticks.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        // The first tick is at once, when there is little to tell.
        ticks.tick().await;
        loop {
            ticks.tick().await;
            let due = self.due(&proposer.view().state());
            let news = Command::NoteKeyUses(due.clone());
            if due.is_empty() || !proposer.is_read(&news) {
                continue;
            }
            if let Err(err) = proposer.propose(news).await {
                debug!(err = chain(&err), "could not tell when keys were used");
            }
        }
    }

    /// What the state should be told; forgets keys that are gone.
    fn due(&self, state: &State) -> Vec<(KeyId, Stamp)> {
        let mut noted = self.lock();
        noted.retain(|key, _| state.key(*key).is_some_and(|key| !key.revoked));
        let is_due = |(key, at): &(KeyId, Stamp)| {
            let told = state.key(*key).and_then(|key| key.last_used);
            told.is_none_or(|told| at.0 >= told.0.saturating_add(STALE_AFTER_MS))
        };
        let all = noted.iter().map(|(key, at)| (*key, *at));
        let mut due: Vec<_> = all.filter(is_due).collect();
        due.sort_unstable();
        due.truncate(MOST_AT_ONCE);
        due
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<KeyId, Stamp>> {
        // A poisoned lock still guards a whole table.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use raft::command::Proposal;
    use raft::state::Key;

    use super::*;

    #[test]
    fn a_key_is_told_of_once_its_record_is_old_and_never_after_its_end() {
        let mut state = State::default();
        let mut index = 0;
        let mut apply = |state: &mut State, command| {
            index += 1;
            let at = Stamp(1000);
            let applied = state.apply(index, Proposal { at, command });
            assert!(applied.answer.is_ok(), "{:?}", applied.answer);
        };
        let id = KeyId([1; 16]);
        let key = Key {
            id,
            ..Key::default()
        };
        apply(&mut state, Command::PutKey(key));
        let uses = Uses::default();
        assert!(uses.due(&state).is_empty());
        uses.note(id, Stamp(5000));
        assert_eq!(uses.due(&state), [(id, Stamp(5000))]);
        let told = Command::NoteKeyUses(uses.due(&state));
        apply(&mut state, told);
        let later = Stamp(5000 + STALE_AFTER_MS);
        uses.note(id, Stamp(later.0 - 1));
        assert!(uses.due(&state).is_empty());
        uses.note(id, later);
        assert_eq!(uses.due(&state), [(id, later)]);
        apply(&mut state, Command::RevokeKey(id));
        assert!(uses.due(&state).is_empty());
        assert_eq!(uses.of(id), None);
    }
}

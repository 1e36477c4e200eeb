//! Watchers that keep their events until somebody asks for them by the watcher's name.
//!
//! A task per watcher reads the kernel's queue in between, so that new directories are followed at
//! once and the queue does not run over. Nobody has to come back for a watcher: once there is no
//! room for another, the one that was asked least recently, [`FORGOTTEN_AFTER`] ago or longer, goes.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::event::Event;
use super::watcher::{OpenWatcherError, WatchBrokenError, Wish};
use super::watching::{Permit, Permits, Watching};

/// How long a watcher is kept for sure that nobody asks.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(600);
/// Random bytes in a watcher's name: nobody guesses another's.
const NAME_BYTES: usize = 12;

/// Nobody by that name.
#[derive(Debug, thiserror::Error)]
#[error("watcher with id {0} not found")]
pub struct UnknownWatcher(pub String);

#[derive(Debug)]
struct Kept {
    watching: Arc<Watching>,
    reader: AbortHandle,
    asked: Instant,
    _permit: Permit,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// The watchers by name.
#[derive(Debug, Default)]
pub struct Polled {
    permits: Permits,
    kept: Mutex<HashMap<String, Kept>>,
}

impl Polled {
    /// The right to have one more watcher; streams need one, too.
    ///
    /// # Errors
    /// [`OpenWatcherError::TooMany`].
    pub fn permit(&self) -> Result<Permit, OpenWatcherError> {
        self.permits.one().or_else(|_| {
            self.forget_one();
            self.permits.one()
        })
    }

    /// Begins to watch; returns the watcher's name.
    ///
    /// # Errors
    /// [`OpenWatcherError`] says whether the path or a limit is at fault.
    pub async fn create(&self, wish: Wish) -> Result<String, OpenWatcherError> {
        let permit = self.permit()?;
        let path = wish.root.clone();
        let watching = Arc::new(Watching::open(wish).await?);
        let name = new_name().map_err(|source| OpenWatcherError::Io { path, source })?;
        let reader = Arc::clone(&watching);
        let reader = tokio::spawn(async move {
            loop {
                reader.happened().await;
                if !reader.collect().await {
                    return;
                }
            }
        });
        let kept = Kept {
            watching,
            reader: reader.abort_handle(),
            asked: Instant::now(),
            _permit: permit,
        };
        self.lock().insert(name.clone(), kept);
        Ok(name)
    }

    /// All that has happened since this was asked last.
    ///
    /// # Errors
    /// [`UnknownWatcher`]; inside, [`WatchBrokenError`] of a watcher that can tell no more.
    pub async fn events(
        &self,
        name: &str,
    ) -> Result<Result<Vec<Event>, WatchBrokenError>, UnknownWatcher> {
        let watching = {
            let mut kept = self.lock();
            let found = kept.get_mut(name);
            let found = found.ok_or_else(|| UnknownWatcher(name.to_owned()))?;
            found.asked = Instant::now();
            Arc::clone(&found.watching)
        };
        Ok(watching.take().await)
    }

    /// Ends a watcher.
    ///
    /// # Errors
    /// [`UnknownWatcher`].
    pub fn remove(&self, name: &str) -> Result<(), UnknownWatcher> {
        let removed = self.lock().remove(name);
        removed
            .map(drop)
            .ok_or_else(|| UnknownWatcher(name.to_owned()))
    }

    fn forget_one(&self) {
        let mut kept = self.lock();
        let oldest = kept.iter().min_by_key(|(_, kept)| kept.asked);
        let oldest = oldest.filter(|(_, kept)| kept.asked.elapsed() >= FORGOTTEN_AFTER);
        if let Some(name) = oldest.map(|(name, _)| name.clone()) {
            kept.remove(&name);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn new_name() -> io::Result<String> {
    let mut bytes = [0; NAME_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let digits = bytes.map(|byte| format!("{byte:02x}"));
    Ok(format!("w{}", digits.concat()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::watching::MAX_WATCHERS;

    fn wish(root: &std::path::Path) -> Wish {
        Wish {
            root: root.to_owned(),
            recursive: false,
            entries: false,
            network: true,
        }
    }

    #[tokio::test]
    async fn a_watcher_nobody_asks_makes_room_for_a_new_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let polled = Polled::default();
        let first = polled.create(wish(dir.path())).await.expect("room");
        let rest: Vec<_> = (1..MAX_WATCHERS)
            .map(|_| polled.permit().expect("room"))
            .collect();
        assert!(polled.create(wish(dir.path())).await.is_err());
        assert!(polled.events(&first).await.is_ok(), "still there");
        tokio::time::pause();
        tokio::time::advance(FORGOTTEN_AFTER).await;
        tokio::time::resume();
        let second = polled.create(wish(dir.path())).await.expect("room");
        assert!(polled.events(&first).await.is_err());
        assert!(polled.events(&second).await.is_ok());
        drop(rest);
    }
}

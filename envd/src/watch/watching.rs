//! A watcher as the runtime sees it: something to wait for, and to read where it may block.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use super::event::Event;
use super::watcher::{OpenWatcherError, WatchBrokenError, Watcher, Wish};
use crate::sys;

/// Watchers there may be at once, streams included. Each is an inotify instance, of which the
/// kernel gives each user 128 unless told otherwise; the workload wants some as well.
pub const MAX_WATCHERS: usize = 96;
/// How long events are let gather once there is one. The kernel makes one event of many alike that
/// nobody has read yet, so this spares a busy writer's audience most of the work.
const SETTLE: Duration = Duration::from_millis(10);

/// The right to have a watcher.
pub type Permit = OwnedSemaphorePermit;

/// How many more watchers there may be.
#[derive(Clone, Debug)]
pub struct Permits(Arc<Semaphore>);

impl Default for Permits {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MAX_WATCHERS)))
    }
}

impl Permits {
    /// One more, if there may be one.
    ///
    /// # Errors
    /// [`OpenWatcherError::TooMany`].
    pub fn one(&self) -> Result<Permit, OpenWatcherError> {
        let permit = Arc::clone(&self.0).try_acquire_owned();
        permit.map_err(|_| OpenWatcherError::TooMany("too many watchers"))
    }
}

/// A watcher that can be waited for.
#[derive(Debug)]
pub struct Watching {
    watcher: Arc<Mutex<Watcher>>,
    readable: AsyncFd<OwnedFd>,
}

impl Watching {
    /// Begins to watch.
    ///
    /// # Errors
    /// [`OpenWatcherError`] says whether the path or a limit is at fault.
    pub async fn open(wish: Wish) -> Result<Self, OpenWatcherError> {
        let path = wish.root.clone();
        let failed = move |source| OpenWatcherError::Io { path, source };
        let opened = spawn_blocking(move || Watcher::open(wish)).await;
        let watcher = match opened {
            Ok(opened) => opened?,
            Err(err) => return Err(failed(io::Error::other(err))),
        };
        let readable = watcher.readable().and_then(sys::watch).map_err(failed)?;
        Ok(Self {
            watcher: Arc::new(Mutex::new(watcher)),
            readable,
        })
    }

    /// Waits until something has happened, and a moment longer for what belongs to it. Dropping the
    /// future loses nothing.
    pub async fn happened(&self) {
        if let Ok(mut ready) = self.readable.readable().await {
            sleep(SETTLE).await;
            ready.clear_ready();
        }
    }

    /// Takes all that has happened until now.
    ///
    /// # Errors
    /// [`WatchBrokenError`] once nothing is left of a watcher that broke.
    pub async fn take(&self) -> Result<Vec<Event>, WatchBrokenError> {
        self.with(|watcher| {
            watcher.collect();
            watcher.take()
        })
        .await
        .unwrap_or(Err(WatchBrokenError::Unreadable))
    }

    /// Buffers all that has happened until now; tells whether more may come.
    pub async fn collect(&self) -> bool {
        let collected = self.with(|watcher| {
            watcher.collect();
            !watcher.is_broken()
        });
        collected.await.unwrap_or(false)
    }

    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Watcher) -> T + Send + 'static,
    ) -> Option<T> {
        let watcher = Arc::clone(&self.watcher);
        let done = spawn_blocking(move || work(&mut lock(&watcher))).await;
        done.ok()
    }
}

fn lock(watcher: &Mutex<Watcher>) -> MutexGuard<'_, Watcher> {
    // Between two events it is whole; after a panic it tells at worst an event twice.
    watcher.lock().unwrap_or_else(PoisonError::into_inner)
}

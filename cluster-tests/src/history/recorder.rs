//! Taking down a history while clients work.
//!
//! One [`Recorder`] for all threads, one [`Client`] for each of them. A call is noted before it is
//! sent and again when its answer is there, on the monotonic clock of this process. A [`Token`]
//! that is dropped (its thread died, its client gave up) counts as *unknown*, the only safe guess.
//!
//! The API names some objects itself. Such a call is begun with [`Client::invoke_unnamed`] and
//! named when the answer is there; without an answer it may still have made an object that shows
//! up later under a name nobody was told.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::model::Model;
use super::operation::{History, Operation, Outcome, Process};

/// Takes down operations; clones take down into the same history.
pub struct Recorder<M: Model> {
    inner: Arc<Inner<M>>,
}

struct Inner<M: Model> {
    start: Instant,
    clients: AtomicU32,
    history: Mutex<History<M>>,
}

impl<M: Model> Clone for Recorder<M> {
    fn clone(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
        }
    }
}

impl<M: Model> Default for Recorder<M> {
    fn default() -> Self {
        Self::new()
    }
}

impl<M: Model> Recorder<M> {
    /// Starts with nothing.
    #[must_use]
    pub fn new() -> Self {
        Self {
            inner: Arc::new(Inner {
                start: Instant::now(),
                clients: AtomicU32::new(0),
                history: Mutex::new(History::default()),
            }),
        }
    }

    /// A new client.
    #[must_use]
    pub fn client(&self) -> Client<M> {
        let process = self.inner.clients.fetch_add(1, Ordering::Relaxed);
        Client {
            process: Process(process),
            recorder: self.clone(),
        }
    }

    /// What was taken down so far; calls under way are not in it, so stop the clients first.
    #[must_use]
    pub fn history(&self) -> History<M> {
        self.with(|history| history.clone())
    }

    fn now(&self) -> Duration {
        self.inner.start.elapsed()
    }

    fn with<T>(&self, act: impl FnOnce(&mut History<M>) -> T) -> T {
        let history = self.inner.history.lock();
        // A thread that panicked while it held this had added its operation or had not.
        act(&mut history.unwrap_or_else(PoisonError::into_inner))
    }
}

/// Who asks: one thing after the other.
pub struct Client<M: Model> {
    process: Process,
    recorder: Recorder<M>,
}

impl<M: Model> Client<M> {
    /// Notes that `action` on `key` is about to be sent.
    #[must_use = "dropping it says that the outcome is unknown"]
    pub fn invoke(&self, key: impl Into<String>, action: M::Action) -> Token<M> {
        self.invoke_unnamed(action).named(key)
    }

    /// Notes that `action` is about to be sent, on an object that the answer will name.
    #[must_use = "dropping it says that the outcome is unknown"]
    pub fn invoke_unnamed(&self, action: M::Action) -> Unnamed<M> {
        Unnamed(Some(Pending {
            recorder: self.recorder.clone(),
            process: self.process,
            action,
            invoked: self.recorder.now(),
        }))
    }
}

struct Pending<M: Model> {
    recorder: Recorder<M>,
    process: Process,
    action: M::Action,
    invoked: Duration,
}

/// A call under way on an object that has no name yet.
pub struct Unnamed<M: Model>(Option<Pending<M>>);

impl<M: Model> Unnamed<M> {
    /// The answer, or whoever sent the call, names the object.
    #[must_use = "dropping it says that the outcome is unknown"]
    pub fn named(mut self, key: impl Into<String>) -> Token<M> {
        Token {
            pending: self.0.take(),
            key: key.into(),
        }
    }

    /// It was definitely not done.
    pub fn refused(mut self) {
        self.0 = None;
    }

    /// It may have been done; nobody knows to what object.
    pub fn unknown(self) {
        drop(self);
    }
}

impl<M: Model> Drop for Unnamed<M> {
    fn drop(&mut self) {
        if let Some(pending) = self.0.take() {
            let invoked = pending.invoked;
            let unnamed = |history: &mut History<M>| history.unnamed.push(invoked);
            pending.recorder.with(unnamed);
        }
    }
}

/// A call under way.
pub struct Token<M: Model> {
    pending: Option<Pending<M>>,
    key: String,
}

impl<M: Model> Token<M> {
    /// Notes what came of it, now.
    pub fn returned(mut self, outcome: Outcome<M::Answer>) {
        self.note(outcome);
    }

    /// It was done, and this is the answer.
    pub fn answered(self, answer: M::Answer) {
        self.returned(Outcome::Ok(answer));
    }

    /// It was definitely not done.
    pub fn refused(self) {
        self.returned(Outcome::Refused);
    }

    /// Nobody knows.
    pub fn unknown(self) {
        self.returned(Outcome::Unknown);
    }

    fn note(&mut self, outcome: Outcome<M::Answer>) {
        let Some(pending) = self.pending.take() else {
            return;
        };
        let returned = pending.recorder.now();
        let operation = Operation {
            process: pending.process,
            key: std::mem::take(&mut self.key),
            action: pending.action,
            invoked: pending.invoked,
            returned,
            outcome,
        };
        pending
            .recorder
            .with(|history| history.operations.push(operation));
    }
}

impl<M: Model> Drop for Token<M> {
    fn drop(&mut self) {
        self.note(Outcome::Unknown);
    }
}

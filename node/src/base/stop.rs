//! Stopping: a token that asks and a tracker that joins, handed to every task.

use std::future::Future;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, Span, error};

/// The right to start tasks that end when asked to, and are joined.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    stop: CancellationToken,
}

impl Tasks {
    /// Tasks that nobody has asked to stop.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The token that tasks wait on.
    #[must_use]
    pub fn token(&self) -> &CancellationToken {
        &self.stop
    }

    /// Starts `task` under `span`; a panic in it asks everything else to stop.
    pub fn spawn<F>(&self, span: Span, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let guard = PanicGuard {
            stop: self.stop.clone(),
        };
        let run = async move {
            let _guard = guard;
            task.await;
        };
        self.tracker.spawn(run.instrument(span));
    }

    /// Asks every task to stop and waits until all have.
    pub async fn stop_and_join(&self) {
        self.stop.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }
}

/// Stops the whole node when a task panics: half a node is worse than a restart.
struct PanicGuard {
    stop: CancellationToken,
}

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            error!("a task panicked; the node stops");
            self.stop.cancel();
        }
    }
}

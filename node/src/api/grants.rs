//! What goes on under a key, and its end with the key.
//!
//! Each request, stream and session holds its key's [`Grant`]. One watcher follows the replicated state and
//! ends the grants of keys that were revoked or have expired, so a key that a quorum revoked ends what goes
//! on under it on every node as soon as that node has applied the entry.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use proto::ids::KeyId;
use proto::units::Stamp;
use raft::state::State;
use tokio::time;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::auth::is_good;
use crate::base::clock::Clock;
use crate::cluster::View;

/// How late the end of a key that expires is noticed. Nothing in the state changes by it.
const EXPIRY_CHECK: Duration = Duration::from_secs(1);

/// The keys under which something goes on at this node.
#[derive(Clone, Debug, Default)]
pub(super) struct Grants(Arc<Mutex<HashMap<KeyId, Weak<Grant>>>>);

/// The word of one key, for as long as it holds.
#[derive(Debug, Default)]
pub(super) struct Grant(CancellationToken);

impl Grant {
    /// Waits for the key's end.
    pub(super) async fn ended(&self) {
        self.0.cancelled().await;
    }

    /// Whether the key has come to its end.
    pub(super) fn is_over(&self) -> bool {
        self.0.is_cancelled()
    }
}

impl Grants {
    /// The grant of `key`; one that is over already where the key is.
    pub(super) fn hold(&self, key: KeyId, view: &View, clock: &dyn Clock) -> Arc<Grant> {
        let grant = {
            let mut held = self.lock();
            let known = held.get(&key).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let grant = Arc::new(Grant::default());
                held.insert(key, Arc::downgrade(&grant));
                grant
            })
        };
        // The watcher may have seen the key's end just before it could see this grant.
        if !is_good(&view.state(), key, clock.now()) {
            grant.0.cancel();
        }
        grant
    }

    /// Ends the grants of keys that are no good any more, until nothing changes any more.
    pub(super) async fn watch(self, mut view: View, clock: Arc<dyn Clock>) {
        loop {
            self.end_bad(&view.state(), clock.now());
            match time::timeout(EXPIRY_CHECK, view.changed()).await {
                Ok(true) | Err(_) => {}
                Ok(false) => return,
            }
        }
    }

    fn end_bad(&self, state: &State, now: Stamp) {
        self.lock().retain(|key, grant| {
            let Some(grant) = grant.upgrade() else {
                return false;
            };
            let good = is_good(state, *key, now);
            if !good {
                grant.0.cancel();
            }
            good
        });
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<KeyId, Weak<Grant>>> {
        // A poisoned lock still guards a whole table.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A body that breaks off once its caller's key is over.
struct Granted {
    body: Body,
    over: Pin<Box<WaitForCancellationFutureOwned>>,
    _grant: Arc<Grant>,
}

/// `body` for as long as `grant` holds.
pub(super) fn until_ended(
    body: Body,
    grant: Arc<Grant>,
) -> impl http_body::Body<Data = Bytes, Error = axum::Error> + Send + 'static {
    Granted {
        body,
        over: Box::pin(grant.0.clone().cancelled_owned()),
        _grant: grant,
    }
}

impl http_body::Body for Granted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.over.as_mut().poll(context).is_ready() {
            let why = std::io::Error::other("the API key was revoked, or has expired");
            return Poll::Ready(Some(Err(axum::Error::new(why))));
        }
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

//! Who may begin something while the guest is being sealed.
//!
//! A closed gate holds requests back instead of refusing them: whoever calls during a pause that
//! fails, or a moment before a resumed guest has been told who it is, waits and is then served.
//! The calls that end the wait pass always. A request is let in by counting it first and looking
//! at the gate afterwards, so whoever closes the gate and then finds nobody counted knows that
//! nobody is inside.
//!
//! When a restore opens the gate, requests of connections older than its own are turned away even
//! if they were held: they belong to the life before the snapshot, and in each fork of it they
//! would be carried out once more.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::header::CONNECTION;
use axum::http::{HeaderValue, StatusCode, Version};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout_at};

use crate::agent::Agent;
use crate::connections::ConnectionId;
use crate::http::error::ApiError;

/// How long a request is held. Longer than any good pause or resume takes, shorter than callers
/// wait before they take the guest for dead.
const HOLD_TIMEOUT: Duration = Duration::from_secs(30);

/// What a request may do while the guest is sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// It ends the wait, or must not wait.
    Control,
    /// It starts a process: under way, it must not meet a frozen control group.
    Fork,
    /// It only moves bytes to a process that runs already.
    Feed,
    /// Anything else; it may write to the disk.
    Work,
}

impl Kind {
    fn of(path: &str) -> Self {
        match path {
            "/health" | "/init" | "/poweroff" => Self::Control,
            "/process.Process/Start" => Self::Fork,
            "/process.Process/SendInput" | "/process.Process/StreamInput" => Self::Feed,
            _ if path.starts_with("/snapshot/") => Self::Control,
            _ => Self::Work,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Sign {
    closed: bool,
    /// The oldest connection that is of this life.
    oldest: ConnectionId,
}

/// The gate.
#[derive(Debug)]
pub struct Gate {
    sign: watch::Sender<Sign>,
    forks: AtomicUsize,
    work: AtomicUsize,
    left: Notify,
}

impl Default for Gate {
    fn default() -> Self {
        let open = Sign {
            closed: false,
            oldest: ConnectionId::FIRST,
        };
        Self {
            sign: watch::Sender::new(open),
            forks: AtomicUsize::new(0),
            work: AtomicUsize::new(0),
            left: Notify::new(),
        }
    }
}

/// Requests that were let in and have not been answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inside {
    /// Those that start a process.
    pub forks: usize,
    /// Those that may write to the disk.
    pub work: usize,
}

/// A request's right to be inside.
struct Pass<'a>(&'a Gate, Kind);

impl<'a> Pass<'a> {
    fn count(gate: &'a Gate, kind: Kind) -> Self {
        if let Some(counter) = gate.counter(kind) {
            counter.fetch_add(1, Ordering::SeqCst);
        }
        Self(gate, kind)
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if let Some(counter) = self.0.counter(self.1) {
            counter.fetch_sub(1, Ordering::SeqCst);
            self.0.left.notify_waiters();
        }
    }
}

impl Gate {
    /// Holds back whoever comes from now on.
    pub fn close(&self) {
        self.sign.send_modify(|sign| sign.closed = true);
    }

    /// Lets those in who wait, and whoever comes.
    pub fn open(&self) {
        self.sign.send_modify(|sign| sign.closed = false);
    }

    /// As [`Self::open`], but for connections older than `oldest`, which are of a past life.
    pub fn open_from(&self, oldest: ConnectionId) {
        self.sign.send_replace(Sign {
            closed: false,
            oldest,
        });
    }

    /// Whether requests are held back.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.sign.borrow().closed
    }

    /// Waits until nobody is inside, or until `deadline`; tells who still is.
    pub async fn settle(&self, deadline: Instant) -> Inside {
        loop {
            let mut left = std::pin::pin!(self.left.notified());
            // From here on no leaving is missed.
            left.as_mut().enable();
            let inside = Inside {
                forks: self.forks.load(Ordering::SeqCst),
                work: self.work.load(Ordering::SeqCst),
            };
            if inside == Inside::default() || timeout_at(deadline, left).await.is_err() {
                return inside;
            }
        }
    }

    fn counter(&self, kind: Kind) -> Option<&AtomicUsize> {
        match kind {
            Kind::Fork => Some(&self.forks),
            Kind::Work => Some(&self.work),
            Kind::Control | Kind::Feed => None,
        }
    }

    async fn pass(&self, kind: Kind, connection: ConnectionId) -> Option<Pass<'_>> {
        let mut sign = self.sign.subscribe();
        let deadline = Instant::now() + HOLD_TIMEOUT;
        loop {
            let pass = Pass::count(self, kind);
            let now = *sign.borrow_and_update();
            if kind == Kind::Control {
                return Some(pass);
            }
            if connection < now.oldest {
                return None;
            }
            if !now.closed {
                return Some(pass);
            }
            drop(pass);
            timeout_at(deadline, sign.changed()).await.ok()?.ok()?;
        }
    }
}

/// Lets a request through the gate. An answer given while it is closed ends its connection: what
/// stays open would be one more to cut after a restore.
pub async fn layer(
    State(agent): State<std::sync::Arc<Agent>>,
    request: Request,
    next: Next,
) -> Response {
    let gate = &agent.snapshots.gate;
    let connection = request.extensions().get().copied();
    let connection = connection.unwrap_or(ConnectionId::NEVER_PAST);
    let kind = Kind::of(request.uri().path());
    let version = request.version();
    let Some(_pass) = gate.pass(kind, connection).await else {
        let words = "the guest is being sealed or restored";
        return ApiError::new(StatusCode::SERVICE_UNAVAILABLE, words).into_response();
    };
    let mut response = next.run(request).await;
    if gate.is_closed() && version <= Version::HTTP_11 {
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(CONNECTION, close);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connections::Connections;
    use futures::FutureExt;
    use std::sync::Arc;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(1)
    }

    #[tokio::test(start_paused = true)]
    async fn a_closed_gate_holds_work_and_lets_control_through() {
        let gate = Gate::default();
        let id = ConnectionId::NEVER_PAST;
        gate.close();
        assert!(gate.pass(Kind::Control, id).await.is_some());
        let mut held = std::pin::pin!(gate.pass(Kind::Work, id));
        assert!(held.as_mut().now_or_never().is_none());
        assert_eq!(
            gate.settle(soon()).await,
            Inside::default(),
            "held is outside"
        );
        gate.open();
        assert!(held.await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_held_for_ever() {
        let gate = Gate::default();
        gate.close();
        let id = ConnectionId::NEVER_PAST;
        assert!(gate.pass(Kind::Fork, id).await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn settling_waits_for_those_inside_and_names_who_stays() {
        let gate = Gate::default();
        let id = ConnectionId::NEVER_PAST;
        let work = gate.pass(Kind::Work, id).await.expect("open");
        let _feed = gate.pass(Kind::Feed, id).await.expect("open");
        gate.close();
        let inside = Inside { forks: 0, work: 1 };
        assert_eq!(gate.settle(soon()).await, inside);
        let mut settling = std::pin::pin!(gate.settle(soon()));
        assert!(settling.as_mut().now_or_never().is_none());
        drop(work);
        assert_eq!(settling.await, Inside::default());
    }

    #[tokio::test(start_paused = true)]
    async fn a_held_request_of_the_past_life_is_never_carried_out() {
        let gate = Gate::default();
        let connections = Arc::new(Connections::default());
        let [old, own, new] =
            [[127, 0, 0, 1]; 3].map(|peer| connections.admit(peer.into()).expect("room"));
        gate.close();
        let mut of_old = std::pin::pin!(gate.pass(Kind::Fork, old.id));
        let mut of_new = std::pin::pin!(gate.pass(Kind::Fork, new.id));
        assert!(of_old.as_mut().now_or_never().is_none());
        assert!(of_new.as_mut().now_or_never().is_none());
        gate.open_from(own.id);
        assert!(of_old.await.is_none());
        assert!(of_new.await.is_some());
        assert!(gate.pass(Kind::Work, old.id).await.is_none(), "nor later");
    }

    #[test]
    fn the_calls_that_end_the_wait_are_control() {
        for path in ["/health", "/init", "/snapshot/restore", "/snapshot/undo"] {
            assert_eq!(Kind::of(path), Kind::Control, "{path}");
        }
        for path in ["/files", "/metrics", "/filesystem.Filesystem/Move", "/x"] {
            assert_eq!(Kind::of(path), Kind::Work, "{path}");
        }
    }
}

//! One client's stream of events: from the replicated state, until either side ends it.

use std::collections::VecDeque;
use std::time::Duration;

use futures::Stream;
use proto::ids::TeamId;
use raft::state::{EventId, State};
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;

use super::super::auth::Caller;
use super::super::state::ApiState;
use super::story::{self, Message};
use crate::cluster::View;

/// Silence after which a comment is sent: below the idle limits of common proxies, 30 s and more.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Events that are taken from the state at once; a client that reads slowly makes the others wait
/// there, where they are kept anyway.
const BATCH: usize = 64;

/// What is sent in silence.
const COMMENT: &str = ": alive\n\n";

/// One client, between two messages.
struct Reader {
    view: View,
    team: TeamId,
    /// The last event that was taken.
    seen: EventId,
    /// What was taken and is not sent yet.
    waiting: VecDeque<String>,
    stop: CancellationToken,
}

/// The messages of one client, each as it is sent; those behind `last`, if it names one.
pub(super) fn messages(
    api: &ApiState,
    caller: Caller,
    last: Option<EventId>,
) -> impl Stream<Item = String> + Send + use<> {
    let state = api.view.state();
    let seen = last.unwrap_or_else(|| state.newest_event(caller.team));
    let missed = last.is_some_and(|id| state.events_after(caller.team, id, 0).missed);
    let hello = Message::connected(api.clock.now(), missed);
    let reader = Reader {
        view: api.view.clone(),
        team: caller.team,
        seen,
        waiting: VecDeque::from([hello.framed(None)]),
        stop: api.sessions.stopping(),
    };
    futures::stream::unfold(reader, async |mut reader| {
        let message = reader.next().await?;
        Some((message, reader))
    })
}

impl Reader {
    async fn next(&mut self) -> Option<String> {
        let stop = self.stop.clone();
        stop.run_until_cancelled(self.next_message())
            .await
            .flatten()
    }

    async fn next_message(&mut self) -> Option<String> {
        let silent_at = Instant::now() + HEARTBEAT;
        loop {
            if let Some(message) = self.waiting.pop_front() {
                return Some(message);
            }
            // Before the state is looked at, so that no change is slept through.
            let state = self.view.latest();
            if self.take(&state) {
                continue;
            }
            match time::timeout_at(silent_at, self.view.changed()).await {
                Ok(true) => {}
                Ok(false) => return None,
                Err(_) => return Some(COMMENT.to_owned()),
            }
        }
    }

    /// Takes the next events; whether there were any.
    fn take(&mut self, state: &State) -> bool {
        let since = state.events_after(self.team, self.seen, BATCH);
        for event in &since.events {
            self.seen = event.id;
            let told = story::tell(state, event);
            let last = told.len().saturating_sub(1);
            let framed = told.iter().enumerate().map(|(at, message)| {
                // One that was cut off between two messages is sent both again.
                message.framed((at == last).then_some(event.id))
            });
            self.waiting.extend(framed);
        }
        !since.events.is_empty()
    }
}

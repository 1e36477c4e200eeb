//! Delivers events to channels, on whichever node leads: at least once, each channel in order.
//!
//! ```text
//! events behind the cursor > those of its kinds > POST, signed > TellChannel (the cursor moves)
//!                                                  '-- failed > later: 1 s, 2 s, ... 5 min; given up after a day
//! ```
//!
//! How far a channel has been told is replicated, so the next leader goes on there. A leader that
//! dies between a delivery and its record makes the next one deliver again: the id of a delivery is
//! the same then. One receiver that is slow or dead makes no other wait.

use std::collections::HashMap;
use std::time::Duration;

use proto::ids::ChannelId;
use raft::command::{Command, TellChannel};
use raft::state::{Channel, Event, State};
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::super::events::{Message, tell};
use super::super::state::ApiState;
use super::post::{Delivery, PostError, post};
use crate::base::chain::chain;

/// Events that are looked at before the cursor is moved: so many are delivered again at most.
const BATCH: usize = 16;
/// First wait after a failure; it doubles up to [`LONGEST_WAIT`].
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// A receiver that is back hears of it within this.
const LONGEST_WAIT: Duration = Duration::from_secs(300);
/// What cannot be delivered for so long is given up: its receiver is gone.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(24 * 3600);
/// How long a leader without work sleeps where nothing changes.
const IDLE: Duration = Duration::from_secs(60);

/// What this leader knows of a channel beside its record.
#[derive(Debug, Default)]
struct Courier {
    busy: bool,
    failures: u32,
    not_before: Option<Instant>,
}

/// What came of one round with one channel.
#[derive(Debug, PartialEq, Eq)]
enum Round {
    /// There may be more.
    Went,
    /// It is tried again later.
    Failed,
}

/// Delivers while this node leads, until `stop`.
pub(in crate::api) async fn run(
    api: ApiState,
    mut leads: watch::Receiver<bool>,
    stop: CancellationToken,
) {
    let work = async {
        while leads.wait_for(|leads| *leads).await.is_ok() {
            // What is under way ends with the leadership: the next leader begins at the record.
            tokio::select! {
                () = lead(&api) => {}
                _ = leads.wait_for(|leads| !*leads) => {}
            }
        }
    };
    stop.run_until_cancelled(work).await;
}

async fn lead(api: &ApiState) {
    let mut view = api.view.clone();
    let mut couriers: HashMap<ChannelId, Courier> = HashMap::new();
    let mut rounds: JoinSet<(ChannelId, Round)> = JoinSet::new();
    loop {
        let state = view.latest();
        couriers.retain(|id, _| state.channel(*id).is_some());
        send_off(api, &state, &mut couriers, &mut rounds);
        let waits = couriers.values().filter_map(|it| it.not_before);
        let wake = waits.min().unwrap_or_else(|| Instant::now() + IDLE);
        tokio::select! {
            Some(done) = rounds.join_next() => {
                if let Ok((id, round)) = done {
                    couriers.entry(id).or_default().done(round);
                }
            }
            changed = view.changed() => if !changed {
                return;
            },
            () = time::sleep_until(wake) => {}
        }
    }
}

/// Begins a round with each channel that has something to be told and is not busy.
fn send_off(
    api: &ApiState,
    state: &State,
    couriers: &mut HashMap<ChannelId, Courier>,
    rounds: &mut JoinSet<(ChannelId, Round)>,
) {
    for channel in state.channels().filter(|it| it.enabled) {
        let courier = couriers.entry(channel.id).or_default();
        courier.not_before = courier.not_before.filter(|then| *then > Instant::now());
        let has_news = channel.cursor < state.newest_event(channel.team);
        if courier.busy || courier.not_before.is_some() || !has_news {
            continue;
        }
        courier.busy = true;
        let (api, state, channel) = (api.clone(), state.clone(), channel.clone());
        rounds.spawn(async move {
            let id = channel.id;
            (id, round(&api, &state, &channel).await)
        });
    }
}

impl Courier {
    fn done(&mut self, round: Round) {
        self.busy = false;
        match round {
            Round::Went => (self.failures, self.not_before) = (0, None),
            Round::Failed => {
                let wait = FIRST_WAIT * 2_u32.saturating_pow(self.failures.min(16));
                self.not_before = Some(Instant::now() + wait.min(LONGEST_WAIT));
                self.failures = self.failures.saturating_add(1);
            }
        }
    }
}

/// Delivers the next events of one channel, and records how far it came.
async fn round(api: &ApiState, state: &State, channel: &Channel) -> Round {
    let since = state.events_after(channel.team, channel.cursor, BATCH);
    if since.missed {
        warn!(channel = %channel.id, "events went by before they could be delivered");
    }
    let mut told = TellChannel {
        id: channel.id,
        from: channel.cursor,
        upto: channel.cursor,
        delivered: 0,
        given_up: 0,
        failure: String::new(),
    };
    let mut failed = false;
    for event in &since.events {
        match deliver(api, state, channel, event).await {
            Ok(sent) => told.delivered += u32::from(sent),
            Err(err) => {
                told.failure = chain(&err).to_string();
                debug!(channel = %channel.id, event = %event.id, err = chain(&err), "not delivered");
                if api.clock.now().since(event.at) < GIVEN_UP_AFTER {
                    failed = true;
                    break;
                }
                told.given_up += 1;
            }
        }
        told.upto = event.id;
    }
    record(api, channel, told).await;
    if failed { Round::Failed } else { Round::Went }
}

/// Moves the cursor, and says why it stands where it does.
async fn record(api: &ApiState, channel: &Channel, told: TellChannel) {
    if told.upto == told.from && told.failure == channel.failure {
        return;
    }
    if let Err(err) = api.proposer.propose(Command::TellChannel(told)).await {
        // What was delivered is delivered again.
        warn!(channel = %channel.id, err = chain(&err), "could not record a delivery");
    }
}

/// Delivers what a channel is told of one event; whether that was anything.
async fn deliver(
    api: &ApiState,
    state: &State,
    channel: &Channel,
    event: &Event,
) -> Result<bool, PostError> {
    let told = tell(state, event);
    let mut sent = false;
    for (part, message) in told.iter().enumerate() {
        if is_wanted(channel, message) {
            let id = format!("{}-{part}", event.id);
            send(api, channel, message, &id).await?;
            sent = true;
        }
    }
    Ok(sent)
}

fn is_wanted(channel: &Channel, message: &Message) -> bool {
    channel.kinds.is_empty() || channel.kinds.contains(message.kind())
}

/// Sends one message under the name `id`.
pub(super) async fn send(
    api: &ApiState,
    channel: &Channel,
    message: &Message,
    id: &str,
) -> Result<(), PostError> {
    let mut body = serde_json::to_value(message).unwrap_or_default();
    body["id"] = Value::from(id);
    let delivery = Delivery {
        url: &channel.url,
        secret: &channel.secret,
        id: id.to_owned(),
        kind: message.kind(),
        body: body.to_string().into(),
        at: api.clock.now(),
    };
    post(&delivery, &api.webhook_allow).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn waits_double_and_end_with_the_first_success() {
        let mut courier = Courier::default();
        let mut waits = Vec::new();
        for _ in 0..12 {
            courier.done(Round::Failed);
            let then = courier.not_before.expect("it waits");
            waits.push((then - Instant::now()).as_secs());
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]);
        courier.done(Round::Went);
        assert_eq!(courier.not_before, None);
        courier.done(Round::Failed);
        assert_eq!(courier.failures, 1);
    }
}

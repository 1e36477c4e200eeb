//! From what happened to what clients are told. Pure.
//!
//! | happened | told |
//! |---|---|
//! | any change of a capsule's phase | `capsule.state.changed` from, to |
//! | starting > running, error | `capsule.create` success, error |
//! | pausing > paused or resuming (it moves), running | `capsule.pause` success, error |
//! | resuming > running, paused or error | `capsule.resume` success, error |
//! | any > stopped; any that ran > error | `capsule.destroy` success, error |
//! | a snapshot's name came, went | `template.snapshot.create`, `.delete` |
//! | a host is heard again, is missed | `host.up`, `host.down` |

use std::collections::BTreeMap;

use jiff::Timestamp;
use proto::units::Stamp;
use raft::command::StopCause;
use raft::state::{Actor, Event, EventId, Happening, Phase, Sandbox, State};
use serde::Serialize;
use utoipa::ToSchema;

use super::super::wire::{Capsule, status, timestamp};

/// Every kind of message about an event.
pub(in crate::api) const KINDS: [&str; 9] = [
    "capsule.create",
    "capsule.pause",
    "capsule.resume",
    "capsule.destroy",
    "capsule.state.changed",
    "template.snapshot.create",
    "template.snapshot.delete",
    "host.up",
    "host.down",
];

/// What clients are told about one event.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(in crate::api) struct Message {
    /// What happened, such as `capsule.create`.
    #[schema(value_type = String)]
    event: &'static str,
    /// `success` or `error`, of what was asked for.
    #[schema(value_type = Option<String>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    outcome: Option<&'static str>,
    /// What it happened to.
    #[serde(skip_serializing_if = "Option::is_none")]
    resource: Option<Resource>,
    /// Who did it.
    actor: By,
    /// More of it: `from` and `to`, `reason`, `detail`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    metadata: BTreeMap<&'static str, String>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// The capsule, in the status that it had come to; nothing once its record is gone.
    #[serde(skip_serializing_if = "Option::is_none")]
    sandbox: Option<Box<Capsule>>,
    /// When.
    #[schema(value_type = Option<String>, format = DateTime)]
    timestamp: Option<Timestamp>,
}

/// What something happened to.
#[derive(Clone, Debug, Serialize, ToSchema)]
struct Resource {
    id: String,
    /// `capsule`, `template` or `host`.
    #[serde(rename = "type")]
    #[schema(value_type = String)]
    kind: &'static str,
}

/// Who did something.
#[derive(Clone, Debug, Serialize, ToSchema)]
struct By {
    /// `api_key`, or `system` where nobody asked.
    #[serde(rename = "type")]
    #[schema(value_type = String)]
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
}

impl From<&Actor> for By {
    fn from(actor: &Actor) -> Self {
        match actor {
            Actor::System => Self {
                kind: "system",
                id: None,
                name: None,
            },
            Actor::Key { id, name, .. } => Self {
                kind: "api_key",
                id: Some(id.to_string()),
                name: Some(name.clone()),
            },
        }
    }
}

/// An action and what came of it.
struct Action {
    event: &'static str,
    failed: bool,
}

const fn done(event: &'static str) -> Option<Action> {
    let failed = false;
    Some(Action { event, failed })
}

const fn failed(event: &'static str) -> Option<Action> {
    let failed = true;
    Some(Action { event, failed })
}

/// Everything that clients are told about `event`, in order.
pub(in crate::api) fn tell(state: &State, event: &Event) -> Vec<Message> {
    let mut told = told(state, event);
    for message in &mut told {
        message.actor = (&event.actor).into();
    }
    told
}

fn told(state: &State, event: &Event) -> Vec<Message> {
    match &event.what {
        Happening::Sandbox { from, to, .. } => {
            let changed = changed(state, event, *from, *to);
            let action = action(*from, *to).map(|action| acted(changed.clone(), action));
            [Some(changed), action].into_iter().flatten().collect()
        }
        Happening::Named { name, gone } => {
            let kind = match gone {
                true => "template.snapshot.delete",
                false => "template.snapshot.create",
            };
            let message = Message::of(kind, event.at, resource("template", name));
            let outcome = Some("success");
            vec![Message { outcome, ..message }]
        }
        Happening::Node { id, name, down } => {
            let kind = if *down { "host.down" } else { "host.up" };
            let metadata = BTreeMap::from([("name", name.clone())]);
            let message = Message::of(kind, event.at, resource("host", &id.to_string()));
            vec![Message {
                metadata,
                ..message
            }]
        }
    }
}

/// What came to its end by a change of phase, if something did.
const fn action(from: Option<Phase>, to: Phase) -> Option<Action> {
    use Phase::{Error, Paused, Pausing, Resuming, Running, Starting, Stopped};
    match (from, to) {
        (Some(Starting), Running) => done("capsule.create"),
        (Some(Starting), Error) => failed("capsule.create"),
        (Some(Pausing), Paused | Resuming) => done("capsule.pause"),
        (Some(Pausing), Running) => failed("capsule.pause"),
        (Some(Resuming), Running) => done("capsule.resume"),
        (Some(Resuming), Paused | Error) => failed("capsule.resume"),
        (_, Stopped) => done("capsule.destroy"),
        (_, Error) => failed("capsule.destroy"),
        _ => None,
    }
}

fn changed(state: &State, event: &Event, from: Option<Phase>, to: Phase) -> Message {
    let Happening::Sandbox { id, reason, .. } = &event.what else {
        return Message::of("capsule.state.changed", event.at, None);
    };
    let mut metadata = BTreeMap::from([("to", status(to).to_owned())]);
    metadata.extend(from.map(|from| ("from", status(from).to_owned())));
    if !reason.is_empty() {
        metadata.insert("detail", reason.clone());
    }
    metadata.extend(known_reason(from, to, reason).map(|word| ("reason", word.to_owned())));
    let capsule = state.sandbox(*id).map(|known| {
        let then = Sandbox {
            phase: to,
            ..known.clone()
        };
        Box::new(Capsule::of(state, &then, None))
    });
    Message {
        metadata,
        sandbox: capsule,
        ..Message::of(
            "capsule.state.changed",
            event.at,
            resource("capsule", &id.to_string()),
        )
    }
}

/// The word that clients know for why something changed, where there is one.
fn known_reason(from: Option<Phase>, to: Phase, reason: &str) -> Option<&'static str> {
    let ran = matches!(
        from,
        Some(Phase::Running | Phase::Pausing | Phase::Snapshotting)
    );
    if reason == StopCause::Idle.in_words() {
        Some("ttl_expired")
    } else if from == Some(Phase::Starting) && to == Phase::Error {
        Some("cleanup_after_create_error")
    } else if ran
        && matches!(to, Phase::Error | Phase::Starting | Phase::Resuming)
        && reason.contains("its host")
    {
        Some("host_failure")
    } else {
        None
    }
}

fn acted(changed: Message, action: Action) -> Message {
    let detail = changed.metadata.get("detail").cloned();
    let (outcome, error) = match action.failed {
        true => ("error", Some(detail.unwrap_or_else(|| "it failed".into()))),
        false => ("success", None),
    };
    Message {
        event: action.event,
        outcome: Some(outcome),
        error,
        ..changed
    }
}

fn resource(kind: &'static str, id: &str) -> Option<Resource> {
    let id = id.to_owned();
    Some(Resource { id, kind })
}

impl Message {
    fn of(event: &'static str, at: Stamp, resource: Option<Resource>) -> Self {
        Self {
            event,
            outcome: None,
            resource,
            actor: (&Actor::System).into(),
            metadata: BTreeMap::new(),
            error: None,
            sandbox: None,
            timestamp: timestamp(at),
        }
    }

    /// The first of a stream.
    pub(in crate::api) fn connected(at: Stamp, missed: bool) -> Self {
        let missed = missed.then(|| ("missed", "true".to_owned()));
        Self {
            metadata: missed.into_iter().collect(),
            ..Self::of("connected", at, None)
        }
    }

    /// What happened, in a word.
    pub(in crate::api) const fn kind(&self) -> &'static str {
        self.event
    }

    /// As it is sent in a stream.
    pub(super) fn framed(&self, id: Option<EventId>) -> String {
        // Plain words and text: there is nothing in it that cannot be JSON.
        let json = serde_json::to_string(self).unwrap_or_default();
        let id = id.map(|id| format!("id: {id}\n")).unwrap_or_default();
        format!("event: {}\n{id}data: {json}\n\n", self.event)
    }
}

#[cfg(test)]
mod tests {
    use proto::ids::{NodeId, SandboxId, TeamId};
    use raft::state::TeamLoad;

    use super::*;

    fn event(from: Option<Phase>, to: Phase, reason: &str) -> Event {
        Event {
            id: EventId { index: 9, part: 1 },
            at: Stamp(1_700_000_000_000),
            team: TeamId::default(),
            load: TeamLoad::default(),
            actor: Actor::System,
            what: Happening::Sandbox {
                id: SandboxId([1; 16]),
                from,
                to,
                reason: reason.into(),
                node: NodeId(1),
            },
        }
    }

    fn kinds(from: Phase, to: Phase, reason: &str) -> Vec<(&'static str, Option<&'static str>)> {
        let told = tell(&State::default(), &event(Some(from), to, reason));
        told.iter().map(|it| (it.event, it.outcome)).collect()
    }

    #[test]
    fn what_was_asked_for_is_told_when_it_has_come_to_an_end() {
        let changed = ("capsule.state.changed", None);
        let cases = [
            (
                Phase::Starting,
                Phase::Running,
                Some(("capsule.create", Some("success"))),
            ),
            (
                Phase::Starting,
                Phase::Error,
                Some(("capsule.create", Some("error"))),
            ),
            (Phase::Running, Phase::Pausing, None),
            (
                Phase::Pausing,
                Phase::Paused,
                Some(("capsule.pause", Some("success"))),
            ),
            (
                Phase::Pausing,
                Phase::Running,
                Some(("capsule.pause", Some("error"))),
            ),
            (
                Phase::Resuming,
                Phase::Running,
                Some(("capsule.resume", Some("success"))),
            ),
            (
                Phase::Stopping,
                Phase::Stopped,
                Some(("capsule.destroy", Some("success"))),
            ),
            (
                Phase::Running,
                Phase::Error,
                Some(("capsule.destroy", Some("error"))),
            ),
        ];
        for (from, to, action) in cases {
            let expected: Vec<_> = [Some(changed), action].into_iter().flatten().collect();
            assert_eq!(kinds(from, to, ""), expected, "{from:?} to {to:?}");
        }
    }

    #[test]
    fn a_message_is_one_line_of_json_between_its_names_and_an_empty_line() {
        let event = event(Some(Phase::Pausing), Phase::Running, "no\nroom");
        let told = tell(&State::default(), &event);
        let framed = told[1].framed(Some(event.id));
        let lines: Vec<&str> = framed.split('\n').collect();
        assert_eq!(lines[..2], ["event: capsule.pause", "id: 9-1"]);
        assert_eq!(lines[3..], ["", ""]);
        let json: serde_json::Value =
            serde_json::from_str(&lines[2]["data: ".len()..]).expect("JSON");
        assert_eq!(json["error"], "no\nroom");
        assert_eq!(json["timestamp"], "2023-11-14T22:13:20Z");
    }

    #[test]
    fn the_words_that_clients_know_are_used_for_reasons() {
        let word = |from, to, reason: &str| {
            let told = tell(&State::default(), &event(Some(from), to, reason));
            told[0].metadata.get("reason").cloned().unwrap_or_default()
        };
        let idle = StopCause::Idle.in_words();
        assert_eq!(word(Phase::Pausing, Phase::Paused, idle), "ttl_expired");
        assert_eq!(
            word(Phase::Starting, Phase::Error, "no"),
            "cleanup_after_create_error"
        );
        assert_eq!(
            word(Phase::Running, Phase::Error, "its host a was lost"),
            "host_failure"
        );
        assert_eq!(word(Phase::Running, Phase::Error, "it broke"), "");
    }
}

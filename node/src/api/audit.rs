//! The audit log: who asked for what, when, and from where.
//!
//! Records are made by the replicated state itself (`raft/src/apply/audit.rs`); this only shows them. What
//! happens inside a capsule, commands and files, changes nothing of the cluster and is not in it.

use std::collections::{BTreeMap, BTreeSet};

use axum::Json;
use axum::extract::State;
use jiff::Timestamp;
use proto::ids::{AuditId, NodeId, ParseIdError, TeamId};
use raft::state::{Actor, AuditRecord, State as Replicated};
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use super::auth::{Admin, Caller};
use super::error::{ApiError, Code};
use super::extract::QueryOf;
use super::reading::{Answered, Reading};
use super::state::ApiState;
use super::teams::known_team;
use super::wire::timestamp;

/// Records in an answer for which nothing is said.
const DEFAULT_LIMIT: usize = 50;
/// Most records in an answer.
const MAX_LIMIT: usize = 200;

/// One record.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AuditShape {
    /// Later records have greater ones.
    #[schema(example = "log-0000000000000000000000001")]
    id: String,
    /// Whose log it is in.
    team_id: String,
    /// `user` (a member by a key), `api_key` or `system`.
    #[schema(value_type = String)]
    actor_type: &'static str,
    /// The member, or the key.
    #[serde(skip_serializing_if = "Option::is_none")]
    actor_id: Option<String>,
    /// What the member, or the key, is called.
    #[serde(skip_serializing_if = "Option::is_none")]
    actor_name: Option<String>,
    /// The key it was asked with.
    #[serde(skip_serializing_if = "Option::is_none")]
    api_key_id: Option<String>,
    /// Where the request came from.
    #[serde(skip_serializing_if = "Option::is_none")]
    source_ip: Option<String>,
    /// The kind of what was changed, such as `capsule`.
    #[schema(value_type = String)]
    resource_type: &'static str,
    /// Its id, or its name where it has no id.
    resource_id: String,
    /// What people call it.
    #[serde(skip_serializing_if = "Option::is_none")]
    resource_name: Option<String>,
    /// What was asked for, such as `create`.
    #[schema(value_type = String)]
    action: &'static str,
    /// `admin` for what only administrators of the cluster see, `team` for all else.
    #[schema(value_type = String)]
    scope: &'static str,
    /// `success`, or `error` where it was refused.
    #[schema(value_type = String)]
    status: &'static str,
    /// Why it was refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// What else there is to say.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    metadata: BTreeMap<String, String>,
    /// When it was asked for.
    #[schema(value_type = Option<String>, format = DateTime)]
    created_at: Option<Timestamp>,
}

/// A page of records, the newest first.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AuditPage {
    items: Vec<AuditShape>,
    /// For `before`, where there may be more.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    next_before: Option<Timestamp>,
    /// For `before_id`, which is exact.
    #[serde(skip_serializing_if = "Option::is_none")]
    next_before_id: Option<String>,
}

/// Which records. Words may be repeated, or separated by commas.
#[derive(Debug, Default, IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(
    dead_code,
    reason = "describes what `Wanted` reads, since words may be repeated"
)]
pub(super) struct AuditQuery {
    /// Only those before this instant.
    #[param(value_type = Option<String>, format = DateTime)]
    before: Option<String>,
    /// Only those before this record.
    before_id: Option<String>,
    /// How many at most; 50 where absent, 200 at most.
    limit: Option<usize>,
    /// Only about these kinds of things.
    resource_type: Option<String>,
    /// Only about the thing of this id.
    resource_id: Option<String>,
    /// Only these actions, such as `create` or `capsule.create`.
    action: Option<String>,
    /// Only by this member or key.
    actor_id: Option<String>,
    /// Those of this team, for administrators of the cluster.
    team_id: Option<String>,
}

/// Lists what was changed of the team's, the newest first.
#[utoipa::path(
    get, path = "/v1/audit-logs", tag = "teams", params(AuditQuery),
    responses((status = 200, body = AuditPage))
)]
pub(super) async fn list(
    State(api): State<ApiState>,
    caller: Caller,
    reading: Reading,
    QueryOf(query): QueryOf<Words>,
) -> Result<Answered<Json<AuditPage>>, ApiError> {
    let wanted = Wanted::read(query)?;
    refuse_where_none_is_kept(&api.view.state(), api.facts.id)?;
    let team = known_team(&api, &caller, wanted.team.as_deref()).await?;
    let state = api.view.state();
    Ok(reading.answer(Json(wanted.page(state.audit_of(team).rev()))))
}

/// Lists what was changed of all teams' and the cluster's, the newest first.
#[utoipa::path(
    get, path = "/v1/admin/audit-logs", tag = "teams", params(AuditQuery),
    responses((status = 200, body = AuditPage))
)]
pub(super) async fn list_all(
    State(api): State<ApiState>,
    _: Admin,
    reading: Reading,
    QueryOf(query): QueryOf<Words>,
) -> Result<Answered<Json<AuditPage>>, ApiError> {
    let wanted = Wanted::read(query)?;
    let state = api.view.state();
    let parsed = wanted.team.as_deref().map(str::parse).transpose();
    let team: Option<TeamId> =
        parsed.map_err(|err: ParseIdError| ApiError::invalid(err.to_string()))?;
    let all = state.audit_after(0).rev();
    let all = all.filter(|record| team.is_none_or(|team| record.team == team));
    Ok(reading.answer(Json(wanted.page(all))))
}

/// A host of one team is not sent the log.
fn refuse_where_none_is_kept(state: &Replicated, here: NodeId) -> Result<(), ApiError> {
    if state.node(here).is_none_or(|node| node.team.is_none()) {
        return Ok(());
    }
    let why = "a host of one team keeps no audit log: ask a full member of the cluster";
    Err(ApiError::new(Code::NotImplemented, why))
}

/// A query whose names may come more than once.
type Words = Vec<(String, String)>;

/// What a query asks for.
#[derive(Debug, Default)]
struct Wanted {
    before: Option<Timestamp>,
    before_id: Option<AuditId>,
    limit: usize,
    kinds: BTreeSet<String>,
    object: Option<String>,
    actions: BTreeSet<String>,
    actor: Option<String>,
    team: Option<String>,
}

impl Wanted {
    fn read(query: Words) -> Result<Self, ApiError> {
        let mut wanted = Self {
            limit: DEFAULT_LIMIT,
            ..Self::default()
        };
        let bad = |name: &str, why: &str| ApiError::invalid(format!("{name} {why}"));
        for (name, value) in query {
            let words = || value.split(',').map(str::trim).map(str::to_owned);
            match name.as_str() {
                "before" => {
                    let at = value.parse();
                    wanted.before =
                        Some(at.map_err(|_| bad("before", "must be an instant (RFC 3339)"))?);
                }
                "before_id" => {
                    let id = value.parse();
                    let id = id.map_err(|err: ParseIdError| ApiError::invalid(err.to_string()))?;
                    wanted.before_id = Some(id);
                }
                "limit" => {
                    let limit = value.parse().ok().filter(|limit| *limit > 0);
                    let limit = limit.ok_or_else(|| bad("limit", "must be a positive number"))?;
                    wanted.limit = MAX_LIMIT.min(limit);
                }
                "resource_type" => wanted.kinds.extend(words().filter(|it| !it.is_empty())),
                "resource_id" => wanted.object = Some(value),
                "action" => wanted.actions.extend(words().filter(|it| !it.is_empty())),
                "actor_id" => wanted.actor = Some(value),
                "team_id" => wanted.team = Some(value),
                _ => {}
            }
        }
        Ok(wanted)
    }

    /// The first page of `records`, which come newest first.
    fn page<'a>(&self, records: impl Iterator<Item = &'a AuditRecord>) -> AuditPage {
        let mut fitting = records.filter(|record| self.takes(record)).peekable();
        let mut page = Vec::new();
        while page.len() < self.limit
            && let Some(record) = fitting.next()
        {
            page.push(record);
        }
        let next = page.last().filter(|_| fitting.peek().is_some());
        AuditPage {
            next_before: next.and_then(|record| timestamp(record.at)),
            next_before_id: next.map(|record| record.id().to_string()),
            items: page.into_iter().map(AuditShape::from).collect(),
        }
    }

    fn takes(&self, record: &AuditRecord) -> bool {
        let action = record.action;
        self.is_before(record)
            && (self.kinds.is_empty() || self.kinds.contains(action.kind()))
            && (self.actions.is_empty()
                || self.actions.contains(action.verb())
                || self.actions.contains(action.word()))
            && self.object.as_ref().is_none_or(|it| *it == record.object)
            && self.actor.as_ref().is_none_or(|it| is_by(record, it))
    }

    /// An id is exact; clocks of nodes differ, and many records may share a millisecond.
    fn is_before(&self, record: &AuditRecord) -> bool {
        match (self.before_id, self.before) {
            (Some(id), _) => record.id() < id,
            (None, Some(at)) => timestamp(record.at).is_some_and(|made| made < at),
            (None, None) => true,
        }
    }
}

fn is_by(record: &AuditRecord, who: &str) -> bool {
    match &record.actor {
        Actor::System => who == "system",
        Actor::Key { id, holder, .. } => {
            id.to_string() == who || holder.is_some_and(|user| user.to_string() == who)
        }
    }
}

impl From<&AuditRecord> for AuditShape {
    fn from(record: &AuditRecord) -> Self {
        let (actor_type, actor_id) = match &record.actor {
            Actor::System => ("system", None),
            Actor::Key {
                holder: Some(user), ..
            } => ("user", Some(user.to_string())),
            Actor::Key { id, .. } => ("api_key", Some(id.to_string())),
        };
        let (key, name, address) = match &record.actor {
            Actor::System => (None, None, None),
            Actor::Key {
                id, name, address, ..
            } => (Some(id.to_string()), Some(name), Some(address)),
        };
        let said = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
        let platform = record.team == TeamId::default();
        Self {
            id: record.id().to_string(),
            team_id: record.team.to_string(),
            actor_type,
            actor_id,
            actor_name: name.and_then(said),
            api_key_id: key,
            source_ip: address.and_then(said),
            resource_type: record.action.kind(),
            resource_id: record.object.clone(),
            resource_name: said(&record.object_name),
            action: record.action.verb(),
            scope: if platform { "admin" } else { "team" },
            status: if record.error.is_some() {
                "error"
            } else {
                "success"
            },
            error: record.error.clone(),
            metadata: record.metadata.clone(),
            created_at: timestamp(record.at),
        }
    }
}

#[cfg(test)]
mod tests {
    use proto::units::Stamp;
    use raft::state::Action;

    use super::*;

    fn record(entry: u64, action: Action) -> AuditRecord {
        AuditRecord {
            entry,
            at: Stamp(1_700_000_000_000 + entry / 2),
            team: TeamId([1; 16]),
            actor: Actor::System,
            action,
            object: format!("cl-{entry}"),
            object_name: String::new(),
            error: None,
            metadata: BTreeMap::new(),
        }
    }

    fn records() -> Vec<AuditRecord> {
        let all = (1..=9).map(|entry| {
            let odd = entry % 2 == 1;
            let action = if odd {
                Action::CapsuleCreate
            } else {
                Action::KeyCreate
            };
            record(entry, action)
        });
        all.collect()
    }

    fn words(query: &str) -> Words {
        let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        pairs
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    fn listed(query: &str) -> (Vec<String>, Option<String>) {
        let records = records();
        let page = Wanted::read(words(query))
            .expect("a query")
            .page(records.iter().rev());
        let ids = page.items.iter().map(|item| item.resource_id.clone());
        (ids.collect(), page.next_before_id)
    }

    #[test]
    fn pages_follow_on_each_other_without_a_gap_although_records_share_instants() {
        let (first, next) = listed("limit=4");
        assert_eq!(first, ["cl-9", "cl-8", "cl-7", "cl-6"]);
        let next = next.expect("there is more");
        let (second, next) = listed(&format!("limit=4&before_id={next}"));
        assert_eq!(second, ["cl-5", "cl-4", "cl-3", "cl-2"]);
        let next = next.expect("there is more");
        let (last, next) = listed(&format!("limit=4&before_id={next}"));
        assert_eq!((last.len(), next), (1, None));
    }

    #[test]
    fn filters_take_kinds_verbs_and_whole_words_repeated_or_with_commas() {
        assert_eq!(listed("resource_type=capsule").0.len(), 5);
        assert_eq!(listed("action=api_key.create&limit=2").0, ["cl-8", "cl-6"]);
        assert_eq!(
            listed("action=create&resource_type=api_key,team").0.len(),
            4
        );
        assert_eq!(listed("resource_type=a&resource_type=capsule").0.len(), 5);
        assert_eq!(listed("actor_id=system&resource_id=cl-3").0, ["cl-3"]);
        assert!(listed("actor_id=key-1").0.is_empty());
        assert_eq!(listed("before=2023-11-14T22:13:20.002Z").0.len(), 3);
    }

    #[test]
    fn a_query_that_makes_no_sense_is_refused() {
        for bad in [
            "before=yesterday",
            "limit=0",
            "limit=-1",
            "limit=x",
            "before_id=7",
        ] {
            assert!(Wanted::read(words(bad)).is_err(), "{bad}");
        }
    }
}

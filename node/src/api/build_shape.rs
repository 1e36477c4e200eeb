//! A build as clients see it.

use std::collections::BTreeMap;

use jiff::Timestamp;
use raft::state::{Build, BuildStatus, State};
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::wire::timestamp;
use crate::template::log;

/// The building of a template.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct BuildShape {
    id: String,
    /// Name of the template to be.
    name: String,
    /// The template it is built upon, by the name it was asked for under.
    base_template: String,
    /// The recipe, a directive each.
    recipe: Vec<String>,
    /// When it counts as ready.
    healthcheck: Option<String>,
    vcpus: u32,
    memory_mb: u32,
    /// `pending`, `running`, `success`, `failed` or `cancelled`.
    #[schema(value_type = String)]
    status: &'static str,
    /// What is being done, in a word; empty once it has ended.
    phase: String,
    /// The step that is under way or was last, from 1.
    current_step: u32,
    total_steps: u32,
    /// How often it was taken up.
    attempt: u32,
    /// What each step wrote; empty in lists.
    #[schema(value_type = Vec<Object>)]
    logs: Vec<Value>,
    /// Why it failed.
    error: Option<String>,
    /// The capsule it is being built in.
    sandbox_id: Option<String>,
    /// The node that sees to it.
    host_id: String,
    /// The user of whatever starts from it.
    default_user: Option<String>,
    /// Its environment.
    default_env: BTreeMap<String, String>,
    #[schema(value_type = Option<String>, format = DateTime)]
    created_at: Option<Timestamp>,
    #[schema(value_type = Option<String>, format = DateTime)]
    started_at: Option<Timestamp>,
    #[schema(value_type = Option<String>, format = DateTime)]
    completed_at: Option<Timestamp>,
}

/// A build with its log.
pub(super) fn shown(state: &State, build: &Build) -> BuildShape {
    BuildShape {
        logs: steps_of(state, build),
        ..build.into()
    }
}

/// What its steps wrote.
pub(super) fn steps_of(state: &State, build: &Build) -> Vec<Value> {
    let pieces = (0..build.log_pieces).filter_map(|piece| state.build_log(build.id, piece));
    log::by_step(&log::entries(pieces))
}

impl From<&Build> for BuildShape {
    fn from(build: &Build) -> Self {
        let spec = &build.spec;
        let unless_empty = |text: &str| Some(text.to_owned()).filter(|it| !it.is_empty());
        Self {
            id: build.id.to_string(),
            name: spec.name.clone(),
            base_template: spec.sandbox.template_as_asked().to_owned(),
            recipe: spec.recipe.clone(),
            healthcheck: unless_empty(&spec.healthcheck),
            vcpus: spec.sandbox.vcpus,
            memory_mb: spec.sandbox.memory.0,
            status: status(build.status),
            phase: build.phase.clone(),
            current_step: build.step,
            total_steps: spec.total_steps,
            attempt: build.attempt,
            logs: Vec::new(),
            error: unless_empty(&build.error),
            sandbox_id: build.sandbox.map(|id| id.to_string()),
            host_id: build.owner.to_string(),
            default_user: unless_empty(&build.default_user),
            default_env: build.default_env.clone(),
            created_at: timestamp(build.created_at),
            started_at: build.started_at.and_then(timestamp),
            completed_at: build.completed_at.and_then(timestamp),
        }
    }
}

const fn status(status: BuildStatus) -> &'static str {
    match status {
        BuildStatus::Pending => "pending",
        BuildStatus::Running => "running",
        BuildStatus::Success => "success",
        BuildStatus::Failed => "failed",
        BuildStatus::Cancelled => "cancelled",
    }
}

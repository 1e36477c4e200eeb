//! The building of templates: what was asked for, who is at it, how far it is, and its log.
//!
//! The log lies here in pieces, each a row of its own and each a few lines of JSON that only the nodes
//! read: so any node can show it, and it outlives the node that builds. It is bounded
//! ([`Build::LOG_BYTES`]), as is the number of builds that are remembered ([`Build::KEPT`]).
//!
//! What a build has done so far is kept as snapshots with names that no client can choose
//! ([`STEP_PREFIX`], [`Build::context_name`]).

use std::collections::BTreeMap;

use prost::Message as _;
use proto::ids::{BuildId, NodeId, SandboxId, TeamId};
use proto::units::Stamp;
use proto::wire::raft as pb;

use super::rows::BadRow;
use super::{SandboxSpec, State};
use crate::wire::{array, optional, some};

/// What the names of kept steps begin with. No name that a client chooses begins with a low line.
pub const STEP_PREFIX: &str = "_step.";
/// The same of a build whose files were just brought in.
const CONTEXT_PREFIX: &str = "_context.";

/// The building of a template.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Build {
    /// Chosen by the proposer.
    pub id: BuildId,
    /// Whose it is, and will be.
    pub team: TeamId,
    /// What was asked for.
    pub spec: BuildSpec,
    /// The node that sees to it.
    pub owner: NodeId,
    /// How often it was taken up; its fencing token.
    pub attempt: u32,
    /// Where it stands.
    pub status: BuildStatus,
    /// What is being done, in a word.
    pub phase: String,
    /// The step that is under way, from 1; 0 before the first.
    pub step: u32,
    /// The sandbox of the present attempt.
    pub sandbox: Option<SandboxId>,
    /// Why it failed; empty otherwise.
    pub error: String,
    /// The user of whatever starts from it.
    pub default_user: String,
    /// Its environment.
    pub default_env: BTreeMap<String, String>,
    /// Pieces of its log, from 0.
    pub log_pieces: u32,
    /// Bytes of them all.
    pub log_bytes: u64,
    /// When it was asked for.
    pub created_at: Stamp,
    /// When it was first taken up.
    pub started_at: Option<Stamp>,
    /// When it ended.
    pub completed_at: Option<Stamp>,
}

/// What is to be built.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BuildSpec {
    /// Name of the template to be.
    pub name: String,
    /// Whether it may take the name of another.
    pub overwrite: bool,
    /// The sandbox it is built in; its template is the one to build upon.
    pub sandbox: SandboxSpec,
    /// The recipe, a directive each.
    pub recipe: Vec<String>,
    /// When it counts as ready, as written; empty where nobody asks.
    pub healthcheck: String,
    /// Whether what usually comes before and after the recipe is left out.
    pub skip_pre_post: bool,
    /// Whether steps that were done before are done anew.
    pub no_cache: bool,
    /// For each directive the hash of the files it takes along; empty where it takes none.
    pub files: Vec<Vec<u8>>,
    /// Steps in all.
    pub total_steps: u32,
}

/// Where a build stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BuildStatus {
    /// Nobody has begun.
    #[default]
    Pending,
    /// Its owner is at it.
    Running,
    /// The template is there.
    Success,
    /// It came to nothing.
    Failed,
    /// It was called off.
    Cancelled,
}

/// A piece of a build's log, as its row has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildLog {
    /// Of which build.
    pub build: BuildId,
    /// Its place, from 0.
    pub piece: u32,
    /// Whole lines.
    pub text: Vec<u8>,
}

impl Build {
    /// Most bytes of one build's log. A node leaves output out before; this is the last bound.
    pub const LOG_BYTES: u64 = 1 << 20;
    /// Builds that are remembered once they have ended.
    pub const KEPT: usize = 64;
    /// Builds of one team that may be under way.
    pub const OPEN_PER_TEAM: usize = 16;
    /// Steps that are kept for one team, for builds to come.
    pub const STEPS_KEPT: usize = 32;

    /// The name of the snapshot that has this build's files in it.
    #[must_use]
    pub fn context_name(id: BuildId) -> String {
        format!("{CONTEXT_PREFIX}{id}")
    }
}

impl BuildStatus {
    /// Whether nothing will change any more.
    #[must_use]
    pub const fn is_ended(self) -> bool {
        matches!(self, Self::Success | Self::Failed | Self::Cancelled)
    }

    pub(crate) const fn to_wire(self) -> pb::BuildStatus {
        match self {
            Self::Pending => pb::BuildStatus::Pending,
            Self::Running => pb::BuildStatus::Running,
            Self::Success => pb::BuildStatus::Success,
            Self::Failed => pb::BuildStatus::Failed,
            Self::Cancelled => pb::BuildStatus::Cancelled,
        }
    }

    pub(crate) const fn from_wire(wire: pb::BuildStatus) -> Result<Self, BadRow> {
        match wire {
            pb::BuildStatus::Pending => Ok(Self::Pending),
            pb::BuildStatus::Running => Ok(Self::Running),
            pb::BuildStatus::Success => Ok(Self::Success),
            pb::BuildStatus::Failed => Ok(Self::Failed),
            pb::BuildStatus::Cancelled => Ok(Self::Cancelled),
            pb::BuildStatus::Unspecified => Err(BadRow::Unknown("build status")),
        }
    }
}

impl BuildLog {
    pub(super) fn encode(build: BuildId, piece: u32, text: &[u8]) -> Vec<u8> {
        pb::BuildLogRow {
            build: build.0.to_vec(),
            piece,
            text: text.to_vec(),
        }
        .encode_to_vec()
    }
}

impl State {
    /// Every build that is remembered, by id.
    pub fn builds(&self) -> impl Iterator<Item = &Build> {
        self.builds.values()
    }

    /// One build.
    #[must_use]
    pub fn build(&self, id: BuildId) -> Option<&Build> {
        self.builds.get(&id)
    }

    /// A piece of a build's log.
    #[must_use]
    pub fn build_log(&self, id: BuildId, piece: u32) -> Option<&[u8]> {
        self.build_logs.get(&(id, piece)).map(Vec::as_slice)
    }

    /// Where the pieces of all logs lie.
    pub(super) fn build_logs(&self) -> impl Iterator<Item = (BuildId, u32)> {
        self.build_logs.keys().copied()
    }

    pub(crate) fn put_build(&mut self, build: Build) {
        self.builds.insert_mut(build.id, build);
    }

    pub(crate) fn drop_build(&mut self, id: BuildId) {
        self.builds.remove_mut(&id);
    }

    pub(crate) fn put_build_log(&mut self, log: BuildLog) {
        self.build_logs.insert_mut((log.build, log.piece), log.text);
    }

    pub(crate) fn drop_build_log(&mut self, id: BuildId, piece: u32) {
        self.build_logs.remove_mut(&(id, piece));
    }
}

impl From<&BuildSpec> for pb::BuildSpec {
    fn from(spec: &BuildSpec) -> Self {
        Self {
            name: spec.name.clone(),
            overwrite: spec.overwrite,
            sandbox: Some((&spec.sandbox).into()),
            recipe: spec.recipe.clone(),
            healthcheck: spec.healthcheck.clone(),
            skip_pre_post: spec.skip_pre_post,
            no_cache: spec.no_cache,
            files: spec.files.clone(),
            total_steps: spec.total_steps,
        }
    }
}

impl TryFrom<pb::BuildSpec> for BuildSpec {
    type Error = BadRow;

    fn try_from(row: pb::BuildSpec) -> Result<Self, BadRow> {
        Ok(Self {
            name: row.name,
            overwrite: row.overwrite,
            sandbox: some("sandbox of a build", row.sandbox)?.into(),
            recipe: row.recipe,
            healthcheck: row.healthcheck,
            skip_pre_post: row.skip_pre_post,
            no_cache: row.no_cache,
            files: row.files,
            total_steps: row.total_steps,
        })
    }
}

impl From<&Build> for pb::BuildRow {
    fn from(build: &Build) -> Self {
        Self {
            id: build.id.0.to_vec(),
            team: build.team.0.to_vec(),
            spec: Some((&build.spec).into()),
            owner: build.owner.0,
            attempt: build.attempt,
            status: build.status.to_wire().into(),
            phase: build.phase.clone(),
            step: build.step,
            sandbox: build.sandbox.map(|id| id.0.to_vec()).unwrap_or_default(),
            error: build.error.clone(),
            default_user: build.default_user.clone(),
            default_env: build.default_env.clone(),
            log_pieces: build.log_pieces,
            log_bytes: build.log_bytes,
            created_at_ms: build.created_at.0,
            started_at_ms: build.started_at.unwrap_or_default().0,
            completed_at_ms: build.completed_at.unwrap_or_default().0,
        }
    }
}

impl TryFrom<pb::BuildRow> for Build {
    type Error = BadRow;

    fn try_from(row: pb::BuildRow) -> Result<Self, BadRow> {
        let stamp = |ms: u64| (ms > 0).then_some(Stamp(ms));
        Ok(Self {
            id: BuildId(array("build id", &row.id)?),
            team: TeamId(array("team id", &row.team)?),
            status: BuildStatus::from_wire(row.status())?,
            spec: some("spec of a build", row.spec)?.try_into()?,
            owner: NodeId(row.owner),
            attempt: row.attempt,
            phase: row.phase,
            step: row.step,
            sandbox: optional("sandbox id", &row.sandbox)?.map(SandboxId),
            error: row.error,
            default_user: row.default_user,
            default_env: row.default_env,
            log_pieces: row.log_pieces,
            log_bytes: row.log_bytes,
            created_at: Stamp(row.created_at_ms),
            started_at: stamp(row.started_at_ms),
            completed_at: stamp(row.completed_at_ms),
        })
    }
}

impl TryFrom<pb::BuildLogRow> for BuildLog {
    type Error = BadRow;

    fn try_from(row: pb::BuildLogRow) -> Result<Self, BadRow> {
        Ok(Self {
            build: BuildId(array("build id", &row.build)?),
            piece: row.piece,
            text: row.text,
        })
    }
}

//! Building templates: taking a recipe in, showing how far it is, and its log as it is written.
//!
//! The node that is asked keeps the archive and proposes the build with itself as owner; the room `build`
//! does it. Whatever is shown comes from the replicated state, so any node shows the same.

use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get as on_get, post};
use axum::{Router, extract::FromRequest as _};
use futures::{Stream, StreamExt as _};
use proto::ids::{BuildId, ParseIdError};
use raft::command::{BuildChange, Command, Refusal};
use raft::state::{Build, BuildSpec, SandboxSpec, State as Replicated};
use serde::Deserialize;
use serde_json::Value;
use tokio::fs;
use tokio::time::Instant;
use tracing::info;
use utoipa::{IntoParams, ToSchema};

use super::auth::Caller;
use super::build_archive::Archive;
use super::build_shape::{BuildShape, shown, steps_of};
use super::create::{CreateCapsule, check_name};
use super::error::{ApiError, Code};
use super::extract::{JsonBody, PathName, QueryOf};
use super::form::Form;
use super::retry::{RetryKey, used_otherwise};
use super::snapshots::refuse_platforms;
use super::state::ApiState;
use crate::build::archive_path;
use crate::cluster::{ProposeError, View};
use crate::template::health::HealthCheck;
use crate::template::import::Imported;
use crate::template::plan;
use crate::template::recipe::{self, Directive};

/// Largest archive, as it is sent: 100 MB by the specification.
const ARCHIVE_BYTES: u64 = 100 << 20;
/// Largest archive of a root file system or an image, as it is sent.
const ROOTFS_BYTES: u64 = 2 << 30;
/// Largest description of a build in a form.
const CONFIG_BYTES: usize = 1 << 20;
/// Most bytes of all directives together. They are replicated to every node.
const RECIPE_BYTES: usize = 128 << 10;
/// Longest that a log without news stays silent before a sign of life goes out.
const SIGN_OF_LIFE: Duration = Duration::from_secs(15);
/// Longest wait for one piece of news. Every change of the cluster wakes it.
const NEWS_TIMEOUT: Duration = Duration::from_secs(3600);

/// A template to build.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub(super) struct CreateBuild {
    /// Its name.
    name: String,
    /// The template to build upon; `minimal` where absent.
    base_template: Option<String>,
    /// What to do, a directive each: `RUN`, `START`, `ENV`, `WORKDIR`, `USER`, `COPY`. It may be left out
    /// where a root file system is sent.
    #[serde(default)]
    recipe: Vec<String>,
    /// When it is ready: `[--interval=3s] [--timeout=10s] [--start-period=0s] [--retries=0] COMMAND`.
    healthcheck: Option<String>,
    /// Virtual processors; 1 where absent or not positive.
    vcpus: Option<i64>,
    /// Memory in MiB; 512 where absent or not positive.
    memory_mb: Option<i64>,
    /// Leaves out what usually comes before and after the recipe.
    skip_pre_post: Option<bool>,
    /// Replaces the team's template of that name, if there is one.
    overwrite: Option<bool>,
    /// Does steps anew that were done before.
    no_cache: Option<bool>,
}

/// Which part of a log.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(default)]
pub(super) struct LogQuery {
    /// The piece to begin with: the `id` of the last event that was seen, and one more.
    from: u32,
    /// Whether to go on until the build has ended.
    follow: bool,
}

/// The same routes under the paths that administrators know, for the interface's description.
pub(super) const ALIASES: [(&str, &str); 3] = [
    ("/v1/admin/builds", "/v1/builds"),
    ("/v1/admin/builds/{id}", "/v1/builds/{id}"),
    ("/v1/admin/builds/{id}/cancel", "/v1/builds/{id}/cancel"),
];

/// The same routes where an administrator's client looks for them.
pub(super) fn admin_routes() -> Router<ApiState> {
    Router::new()
        .route("/v1/admin/builds", post(create).get(list))
        .route("/v1/admin/builds/{id}", on_get(get))
        .route("/v1/admin/builds/{id}/cancel", post(cancel))
}

/// Starts building a template. With files to copy: a form with the same JSON in part `config`, and a tar
/// or zip file in part `archive`. Of a root file system, or of an image as `docker save` and OCI tools
/// write it: the same, with it in part `rootfs`; the recipe, if there is one, follows.
#[utoipa::path(
    post, path = "/v1/builds", tag = "templates",
    request_body(content_type = "application/json", content = CreateBuild),
    params(("Idempotency-Key" = Option<String>, Header)),
    responses((status = 201, description = "It was accepted.", body = BuildShape))
)]
pub(super) async fn create(
    State(api): State<ApiState>,
    caller: Caller,
    retry: RetryKey,
    request: Request,
) -> Result<(StatusCode, Json<BuildShape>), ApiError> {
    refuse_on_team_host(&api)?;
    let (asked, sent) = read(&api, request).await?;
    let ids = retry.ids(&caller, &["build"]);
    let id = BuildId(ids.sandbox(0).0);
    let (spec, archive) = match sent {
        Sent::Rootfs(sent) => {
            let (rootfs, imported) = sent.import().await?;
            let asked = importing(asked, &imported)?;
            let spec = checked(&api, &caller, asked, Files::Rootfs(imported.digest)).await?;
            (spec, Some(rootfs))
        }
        Sent::Files(archive) => {
            refuse_import(&asked.recipe)?;
            let archive = match archive {
                Some(archive) => Some(archive.into_tar().await?),
                None => None,
            };
            let spec = checked(&api, &caller, asked, Files::Archive(archive.as_ref())).await?;
            (spec, archive)
        }
    };
    // One that comes again has its archive here, or has it in its capsule.
    let is_new = api.view.state().build(id).is_none();
    if let Some(archive) = archive.filter(|_| is_new) {
        archive.keep(&api.archives(), id).await?;
    }
    let build = Build {
        id,
        team: caller.team,
        spec,
        owner: api.facts.id,
        ..Build::default()
    };
    let start = Command::Build(BuildChange::Start(Box::new(build)));
    match api.propose(&caller, start).await {
        Ok(_) => {}
        Err(ProposeError::Refused(Refusal::IdTaken(_))) if ids.may_come_again() => {
            return Err(used_otherwise());
        }
        // No answer is not a no.
        Err(_) if api.view.state().build(id).is_some() => {}
        Err(err) => {
            // There may be none; what is left is swept with the cache.
            let _ = fs::remove_file(archive_path(&api.archives(), id)).await;
            return Err(err.into());
        }
    }
    info!(build = %id, "build accepted");
    let seen = api.view.wait_for(Instant::now() + NEWS_TIMEOUT, |state| {
        state.build(id).map(|build| shown(state, build))
    });
    let shape = seen.await.ok_or_else(|| no_build(id))?;
    Ok((StatusCode::CREATED, Json(shape)))
}

/// Lists the team's builds, the newest first, without their logs.
#[utoipa::path(
    get, path = "/v1/builds", tag = "templates",
    responses((status = 200, body = Vec<BuildShape>))
)]
pub(super) async fn list(State(api): State<ApiState>, caller: Caller) -> Json<Vec<BuildShape>> {
    let state = api.view.state();
    let own = state.builds().filter(|it| it.team == caller.team);
    let mut own: Vec<&Build> = own.collect();
    own.sort_by_key(|it| std::cmp::Reverse((it.created_at, it.id)));
    Json(own.into_iter().map(BuildShape::from).collect())
}

/// One build, with its log by steps.
#[utoipa::path(
    get, path = "/v1/builds/{id}", tag = "templates", params(("id" = String, Path)),
    responses((status = 200, body = BuildShape))
)]
pub(super) async fn get(
    State(api): State<ApiState>,
    caller: Caller,
    PathName(id): PathName,
) -> Result<Json<BuildShape>, ApiError> {
    let id = parse(&id)?;
    let shape = api.found(|state| Ok(shown(&state, owned(&state, &caller, id)?)));
    Ok(Json(shape.await?))
}

/// Calls a build off; its capsule ends.
#[utoipa::path(
    post, path = "/v1/builds/{id}/cancel", tag = "templates", params(("id" = String, Path)),
    responses((status = 204, description = "It is called off."))
)]
pub(super) async fn cancel(
    State(api): State<ApiState>,
    caller: Caller,
    PathName(id): PathName,
) -> Result<StatusCode, ApiError> {
    let id = parse(&id)?;
    known(&api, &caller, id).await?;
    let cancel = Command::Build(BuildChange::Cancel(id));
    api.propose(&caller, cancel).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What each step of a build wrote.
#[utoipa::path(
    get, path = "/v1/builds/{id}/logs", tag = "templates", params(("id" = String, Path)),
    responses((status = 200, body = Vec<Object>))
)]
pub(super) async fn logs(
    State(api): State<ApiState>,
    caller: Caller,
    PathName(id): PathName,
) -> Result<Json<Vec<Value>>, ApiError> {
    let id = parse(&id)?;
    let steps = api.found(|state| Ok(steps_of(&state, owned(&state, &caller, id)?)));
    Ok(Json(steps.await?))
}

/// The log of a build as server-sent events: `log`, each with lines of JSON, then `end` with the build.
#[utoipa::path(
    get, path = "/v1/builds/{id}/stream", tag = "templates",
    params(("id" = String, Path), LogQuery),
    responses((status = 200, content_type = "text/event-stream", body = String))
)]
pub(super) async fn stream(
    State(api): State<ApiState>,
    caller: Caller,
    PathName(id): PathName,
    QueryOf(query): QueryOf<LogQuery>,
) -> Result<Response, ApiError> {
    let id = parse(&id)?;
    known(&api, &caller, id).await?;
    // A node that stops does not wait for logs: their readers ask again.
    let events = events(api.view.clone(), id, query).take_until(api.sessions.ending());
    let events = Sse::new(events);
    let alive = KeepAlive::new().interval(SIGN_OF_LIFE);
    Ok(events.keep_alive(alive).into_response())
}

/// What comes next of a log.
enum News {
    Piece(String),
    End(Box<BuildShape>),
}

fn events(
    view: View,
    id: BuildId,
    query: LogQuery,
) -> impl Stream<Item = Result<Event, Infallible>> + Send {
    futures::stream::unfold(Some(query.from), move |at| {
        let view = view.clone();
        async move {
            let at = at?;
            let found = view.wait_for(Instant::now() + NEWS_TIMEOUT, |state| {
                let build = state.build(id)?;
                if let Some(piece) = state.build_log(id, at) {
                    let text = String::from_utf8_lossy(piece);
                    return Some(News::Piece(text.trim_end().to_owned()));
                }
                let is_over = build.status.is_ended() || !query.follow;
                is_over.then(|| News::End(Box::new(build.into())))
            });
            let event = match found.await? {
                News::Piece(text) => {
                    let event = Event::default().event("log").id(at.to_string());
                    return Some((Ok(event.data(text)), Some(at + 1)));
                }
                News::End(build) => Event::default().event("end").json_data(build).ok()?,
            };
            Some((Ok(event), None))
        }
    })
}

/// A host of one team sees no builds, and could not show them.
fn refuse_on_team_host(api: &ApiState) -> Result<(), ApiError> {
    let state = api.view.state();
    if state.node(api.facts.id).is_some_and(|it| it.team.is_some()) {
        let why = "a host of one team builds no templates: ask one of the cluster's members";
        return Err(ApiError::new(Code::NotImplemented, why));
    }
    Ok(())
}

/// Reads the request: JSON, or a form with an archive.
async fn read(api: &ApiState, request: Request) -> Result<(CreateBuild, Sent), ApiError> {
    let kind = request.headers().get(CONTENT_TYPE);
    let kind = kind.and_then(|it| it.to_str().ok()).unwrap_or_default();
    if !kind.to_ascii_lowercase().starts_with("multipart/") {
        let JsonBody(asked) = JsonBody::from_request(request, &()).await?;
        return Ok((asked, Sent::Files(None)));
    }
    let headers = request.headers().clone();
    read_form(api, Form::new(&headers, request.into_body())?).await
}

async fn read_form(api: &ApiState, mut form: Form) -> Result<(CreateBuild, Sent), ApiError> {
    let (mut asked, mut archive, mut rootfs) = (None, None, None);
    while let Some(name) = form.next_part().await? {
        match name.as_str() {
            "config" => {
                let text = form.text("config", CONFIG_BYTES).await?;
                let JsonBody(it) =
                    JsonBody::from_request(Request::new(Body::from(text)), &()).await?;
                asked = Some(it);
            }
            "archive" if archive.is_none() => {
                archive = Some(Archive::receive(api, &mut form, ARCHIVE_BYTES).await?);
            }
            "rootfs" if rootfs.is_none() => {
                rootfs = Some(Archive::receive(api, &mut form, ROOTFS_BYTES).await?);
            }
            "archive" | "rootfs" => return Err(ApiError::invalid("the form has a part twice")),
            _ => {}
        }
    }
    let asked = asked.ok_or_else(|| ApiError::invalid("the form lacks field config"))?;
    match (archive, rootfs) {
        (Some(_), Some(_)) => {
            let why = "a root file system and files to copy are two builds: import first, then build on it";
            Err(ApiError::invalid(why))
        }
        (None, Some(rootfs)) => Ok((asked, Sent::Rootfs(rootfs))),
        (archive, None) => Ok((asked, Sent::Files(archive))),
    }
}

/// What came with a build.
enum Sent {
    /// Files to copy, if any.
    Files(Option<Archive>),
    /// What is to become its root file system.
    Rootfs(Archive),
}

/// What the steps of a build may take along.
#[derive(Clone, Copy)]
enum Files<'a> {
    Archive(Option<&'a Archive>),
    /// A root file system, by its hash.
    Rootfs([u8; 32]),
}

/// The recipe of an import: the root file system, what its image says, what was asked for, and what the
/// image runs. What usually surrounds a recipe is left out: it is another's system.
fn importing(asked: CreateBuild, imported: &Imported) -> Result<CreateBuild, ApiError> {
    refuse_import(&asked.recipe)?;
    let has_start = match asked.recipe.as_slice() {
        [] => false,
        lines => {
            let parsed = recipe::parse(lines).map_err(|err| ApiError::invalid(err.to_string()))?;
            parsed
                .iter()
                .any(|it| matches!(it.directive, Directive::Start { .. }))
        }
    };
    let (mut recipe, start) = imported.config.directives(has_start);
    recipe.extend(asked.recipe);
    recipe.extend(start);
    Ok(CreateBuild {
        recipe,
        skip_pre_post: Some(true),
        ..asked
    })
}

/// `IMPORT` is ours to write: where there is nothing to import it could do nothing.
fn refuse_import(lines: &[String]) -> Result<(), ApiError> {
    let imports = |line: &String| {
        let parsed = recipe::parse(std::slice::from_ref(line));
        parsed.is_ok_and(|it| matches!(it[0].directive, Directive::Import { .. }))
    };
    if lines.iter().any(imports) {
        let why =
            "IMPORT is written by the node: send the root file system as part rootfs of a form";
        return Err(ApiError::invalid(why));
    }
    Ok(())
}

/// What to build, checked: nothing is proposed before all of it holds.
async fn checked(
    api: &ApiState,
    caller: &Caller,
    asked: CreateBuild,
    archive: Files<'_>,
) -> Result<BuildSpec, ApiError> {
    check_name("name", &asked.name)?;
    refuse_platforms(&api.view.state(), &asked.name)?;
    let bytes: usize = asked.recipe.iter().map(String::len).sum();
    if bytes > RECIPE_BYTES {
        let why = format!("a recipe may have {RECIPE_BYTES} bytes at most, not {bytes}");
        return Err(ApiError::new(Code::TooLarge, why));
    }
    let healthcheck = asked.healthcheck.unwrap_or_default().trim().to_owned();
    if !healthcheck.is_empty() {
        HealthCheck::parse(&healthcheck).map_err(|err| ApiError::invalid(err.to_string()))?;
    }
    let files = files_of(&asked.recipe, archive).await?;
    let skip_pre_post = asked.skip_pre_post.unwrap_or(false);
    let steps = plan::steps(&asked.recipe, &files, skip_pre_post);
    let steps = steps.map_err(|err| ApiError::invalid(err.to_string()))?;
    let capsule = CreateCapsule {
        template: asked.base_template,
        vcpus: asked.vcpus,
        memory_mb: asked.memory_mb,
        ..CreateCapsule::default()
    };
    let sandbox = api.found(|state| capsule.to_spec(&state, caller.team));
    let sandbox: SandboxSpec = sandbox.await?;
    Ok(BuildSpec {
        name: asked.name,
        overwrite: asked.overwrite.unwrap_or(false),
        sandbox,
        recipe: asked.recipe,
        healthcheck,
        skip_pre_post,
        no_cache: asked.no_cache.unwrap_or(false),
        files,
        total_steps: u32::try_from(steps.len()).unwrap_or(u32::MAX),
    })
}

/// For each directive the hash of the files it takes along.
async fn files_of(lines: &[String], files: Files<'_>) -> Result<Vec<Vec<u8>>, ApiError> {
    let parsed = recipe::parse(lines).map_err(|err| ApiError::invalid(err.to_string()))?;
    let is_copy = |it: &recipe::Line| matches!(it.directive, Directive::Copy { .. });
    let archive = match files {
        Files::Rootfs(_) if parsed.iter().any(is_copy) => {
            let why = "a recipe that follows a root file system copies no files: import first, then build on it";
            return Err(ApiError::invalid(why));
        }
        Files::Rootfs(digest) => {
            let of = |line: &recipe::Line| match line.directive {
                Directive::Import { .. } => digest.to_vec(),
                _ => Vec::new(),
            };
            return Ok(parsed.iter().map(of).collect());
        }
        Files::Archive(archive) => archive,
    };
    let contents = match archive {
        _ if !parsed.iter().any(is_copy) => return Ok(Vec::new()),
        None => {
            let why =
                "the recipe copies files, and no archive was sent: send a form with a part archive";
            return Err(ApiError::invalid(why));
        }
        Some(archive) => archive.contents().await?,
    };
    let hash = |(at, line): (usize, &recipe::Line)| match &line.directive {
        Directive::Copy { sources, .. } => contents.hash_of(sources).map_err(|source| {
            let line = at + 1;
            ApiError::invalid(format!("recipe line {line}: the archive has no {source:?}"))
        }),
        _ => Ok(Vec::new()),
    };
    parsed.iter().enumerate().map(hash).collect()
}

/// Refuses where the caller has no such build.
async fn known(api: &ApiState, caller: &Caller, id: BuildId) -> Result<(), ApiError> {
    api.found(|state| owned(&state, caller, id).map(drop)).await
}

/// The caller's build.
fn owned<'a>(state: &'a Replicated, caller: &Caller, id: BuildId) -> Result<&'a Build, ApiError> {
    let known = state.build(id).filter(|it| it.team == caller.team);
    known.ok_or_else(|| no_build(id))
}

fn no_build(id: BuildId) -> ApiError {
    ApiError::new(Code::NotFound, format!("no build {id}"))
}

fn parse(id: &str) -> Result<BuildId, ApiError> {
    id.parse()
        .map_err(|err: ParseIdError| ApiError::invalid(err.to_string()))
}

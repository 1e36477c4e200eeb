//! Where an attempt begins: at the furthest step whose outcome was kept, if what follows can be done
//! from there.
//!
//! A step that takes files along needs the build's archive, which lies with the node that was asked for
//! the build, and in every outcome that this build itself has kept.

use std::collections::BTreeMap;

use proto::ids::BuildId;
use raft::state::{Build, Named, STEP_PREFIX, State};

use super::Stop;
use super::around::Around;
use crate::template::plan::{self, Key, Origin, Step};

/// The label that says which build kept an outcome.
const BUILD_LABEL: &str = "build";
/// The label with what surrounds the next step.
const AROUND_LABEL: &str = "around";
/// The label with the number of steps that were done.
const DONE_LABEL: &str = "done";

/// Where an attempt begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Start {
    /// Steps that are done already.
    pub(super) done: usize,
    /// The snapshot it begins from; `None` for the template that was asked for.
    pub(super) from: Option<Named>,
    /// What surrounds the next step, where something is done already.
    pub(super) around: Option<Around>,
    /// Whether the archive is in the guest.
    pub(super) has_archive: bool,
}

/// What is known of a build's steps.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known<'a> {
    pub(super) state: &'a State,
    pub(super) build: &'a Build,
    pub(super) steps: &'a [Step],
    pub(super) keys: &'a [Key],
    /// Whether its archive lies on this node.
    pub(super) has_archive: bool,
}

/// The name of a kept outcome.
pub(super) fn step_name(key: &Key) -> String {
    format!("{STEP_PREFIX}{}", key.digits())
}

/// The labels of an outcome that build `id` keeps after `done` steps.
pub(super) fn labels(id: BuildId, done: usize, around: &Around) -> BTreeMap<String, String> {
    let around = serde_json::to_string(around).unwrap_or_default();
    BTreeMap::from([
        (BUILD_LABEL.to_owned(), id.to_string()),
        (AROUND_LABEL.to_owned(), around),
        (DONE_LABEL.to_owned(), done.to_string()),
    ])
}

/// At the template that was asked for.
pub(super) const fn at_base() -> Start {
    Start {
        done: 0,
        from: None,
        around: None,
        has_archive: false,
    }
}

/// What the outcomes of steps are kept as.
pub(super) fn keys(state: &State, build: &Build, steps: &[Step]) -> Result<Vec<Key>, Stop> {
    let asked = &build.spec.sandbox;
    let named = state.named(build.team, &asked.template);
    let base = match (named, state.template(&asked.template)) {
        (Some(named), _) => named.snapshot.0.to_vec(),
        (None, Some(template)) => template.digest.to_vec(),
        (None, None) => {
            let why = format!("there is no template {:?} any more", asked.template);
            return Err(Stop::Failed(why));
        }
    };
    let shape = (asked.vcpus, asked.memory.0, asked.disk.0);
    let base = &base;
    Ok(plan::keys(Origin { base, shape }, steps))
}

/// Where to begin; `None` where the files that are needed are nowhere.
pub(super) fn choose(known: Known<'_>) -> Option<Start> {
    let Known { build, steps, .. } = known;
    let own = build.id.to_string();
    let kept = (1..=steps.len()).rev().filter_map(|done| {
        let name = step_name(&known.keys[done - 1]);
        outcome(known, &name, done)
    });
    let context = Build::context_name(build.id);
    let context = known.state.named(build.team, &context);
    let context = context.and_then(|named| {
        let done = named.metadata.get(DONE_LABEL)?.parse().ok()?;
        outcome(known, &named.name, done)
    });
    let fits = |start: &Start| {
        let left = steps.get(start.done..).unwrap_or_default();
        start.has_archive || known.has_archive || !left.iter().any(Step::takes_files)
    };
    let is_wanted = |start: &Start| {
        let by = start
            .from
            .as_ref()
            .and_then(|it| it.metadata.get(BUILD_LABEL));
        !build.spec.no_cache || by == Some(&own)
    };
    kept.chain(context)
        .filter(is_wanted)
        .chain([at_base()])
        .find(fits)
}

/// What lies under `name`, if it can be read.
fn outcome(known: Known<'_>, name: &str, done: usize) -> Option<Start> {
    let named = known.state.named(known.build.team, name)?;
    let around = named.metadata.get(AROUND_LABEL)?;
    let own = known.build.id.to_string();
    Some(Start {
        done,
        around: Some(serde_json::from_str(around).ok()?),
        has_archive: named.metadata.get(BUILD_LABEL) == Some(&own),
        from: Some(named.clone()),
    })
}

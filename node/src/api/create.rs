//! What a create request asks for, checked: pure, so that every rule can be tested alone.
//!
//! Nothing is proposed before all of it holds, so a bad request never leaves half a capsule.

use std::collections::BTreeMap;
use std::time::Duration;

use proto::ids::{NodeId, TeamId};
use proto::units::Mib;
use raft::state::{HostLoss, IdleAction, Named, SandboxSpec, SnapshotKind, State, Template};
use serde::Deserialize;
use utoipa::ToSchema;

use super::error::{ApiError, Code};
use super::nodes::{named, no_node};
use super::wire::RESERVED_KEYS;

/// The template of a request that names none.
pub(super) const DEFAULT_TEMPLATE: &str = "minimal";
/// What later versions of the specification call the default template.
const DEFAULT_TEMPLATE_ALIAS: &str = "minimal-ubuntu";
/// Processors of a request that names none.
const DEFAULT_VCPUS: u32 = 1;
/// Memory of a request that names none.
const DEFAULT_MEMORY: Mib = Mib(512);
/// Most processors of one guest. Neither driver is tested past it.
const MAX_VCPUS: u32 = 64;
/// Least memory of a guest: below it the guest kernel and its initramfs do not fit.
const MIN_MEMORY: Mib = Mib(128);
/// Most memory of one guest, 1 TiB: past it sums over a node's guests could leave 32 bits of MiB.
const MAX_MEMORY: Mib = Mib(1 << 20);
/// Shortest inactivity timeout; shorter ones are raised to it.
const MIN_IDLE_SECS: i64 = 60;
/// Longest inactivity timeout, a year. Whoever wants more means 0: never.
const MAX_IDLE_SECS: i64 = 365 * 24 * 3600;
/// Most labels of one capsule. Labels are replicated to every node.
const MAX_LABELS: usize = 20;
/// Most tags of a node, or asked of one. Tags are replicated to every node.
const MAX_TAGS: usize = 32;
/// Longest name of a template or label, and longest value of a label.
const MAX_NAME_CHARS: usize = 64;

/// A create request as sent. All fields are optional and unknown ones are ignored.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub(super) struct CreateCapsule {
    /// Name of the template to start from; `minimal` where absent.
    pub(super) template: Option<String>,
    /// Virtual processors; 1 where absent or not positive.
    pub(super) vcpus: Option<i64>,
    /// Memory in MiB; 512 where absent or not positive.
    pub(super) memory_mb: Option<i64>,
    /// Seconds without activity after which the capsule is paused; 0 keeps it up for ever.
    pub(super) timeout_sec: Option<i64>,
    /// What becomes of it after that time: `pause`, where absent, or `destroy`.
    #[schema(value_type = Option<String>)]
    pub(super) timeout_action: Option<TimeoutAction>,
    /// Labels.
    pub(super) metadata: Option<BTreeMap<String, String>>,
    /// What becomes of it when its host is lost: `wait` for the host, where absent, or `restart`
    /// from its template on another one.
    #[schema(value_type = Option<String>)]
    pub(super) on_host_loss: Option<OnHostLoss>,
    /// Only nodes with all of these tags may run it.
    pub(super) node_tags: Option<BTreeMap<String, String>>,
    /// Only this node may run it: its id or name.
    pub(super) on_node: Option<String>,
    /// Who may visit its ports: `private` (a key of the team, or a link), where absent, or `public`.
    #[schema(value_type = Option<String>)]
    pub(super) ports: Option<Ports>,
    /// Whether a visit to one of its ports resumes it.
    pub(super) auto_resume: Option<bool>,
}

/// Who may visit the ports of a capsule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Ports {
    /// Whoever has a key of its team, or a link.
    Private,
    /// Anybody.
    Public,
}

/// What may be changed of a capsule. What is left out stays as it is.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub(super) struct ChangeCapsule {
    /// Who may visit its ports: `private` or `public`.
    #[schema(value_type = Option<String>)]
    pub(super) ports: Option<Ports>,
    /// Whether a visit to one of its ports resumes it.
    pub(super) auto_resume: Option<bool>,
}

/// What becomes of a capsule that nobody uses for its timeout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum TimeoutAction {
    /// It is paused.
    Pause,
    /// It ends.
    Destroy,
}

/// What becomes of a capsule when its host is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum OnHostLoss {
    /// It waits for its host.
    Wait,
    /// It is started anew on another one.
    Restart,
}

impl CreateCapsule {
    /// The checked request, with what `state` knows under the template's name: a snapshot of the
    /// team's, whose shape is its own, or a disk, of the team's or the platform's. What `state` does
    /// not know is not found.
    pub(super) fn to_spec(&self, state: &State, team: TeamId) -> Result<SandboxSpec, ApiError> {
        let name = self.template.as_deref().unwrap_or(DEFAULT_TEMPLATE);
        check_name("template", name)?;
        let vcpus = size("vcpus", self.vcpus, DEFAULT_VCPUS, 1..=MAX_VCPUS)?;
        let memory_range = MIN_MEMORY.0..=MAX_MEMORY.0;
        let memory = size("memory_mb", self.memory_mb, DEFAULT_MEMORY.0, memory_range)?;
        let idle_timeout = idle_timeout(self.timeout_sec.unwrap_or(0))?;
        let metadata = self.metadata.clone().unwrap_or_default();
        check_labels(&metadata)?;
        let shape = match state.named(team, name) {
            Some(named) if named.kind == SnapshotKind::Snapshot => Shape::of(named),
            known => Shape {
                vcpus,
                memory: Mib(memory),
                ..match known {
                    Some(base) => Shape::of(base),
                    None => Shape::from(resolve(state, name)?),
                }
            },
        };
        let node_tags = self.node_tags.clone().unwrap_or_default();
        check_tags("node_tags", &node_tags)?;
        let on_node = self.on_node.as_deref();
        Ok(SandboxSpec {
            on_host_loss: on_host_loss(self.on_host_loss),
            node_tags,
            on_node: on_node.map(|name| node(state, name)).transpose()?,
            disk: shape.disk,
            asked_template: other_than(&shape.template, name),
            template: shape.template,
            vcpus: shape.vcpus,
            memory: shape.memory,
            idle_timeout,
            on_idle: match self.timeout_action {
                None | Some(TimeoutAction::Pause) => IdleAction::Pause,
                Some(TimeoutAction::Destroy) => IdleAction::Destroy,
            },
            metadata,
            ports_open: self.ports == Some(Ports::Public),
            wakes: self.auto_resume.unwrap_or(false),
        })
    }
}

/// What a template makes of a capsule.
struct Shape {
    template: String,
    vcpus: u32,
    memory: Mib,
    disk: Mib,
}

impl Shape {
    /// A guest that was sealed keeps what it had.
    fn of(named: &Named) -> Self {
        Self {
            template: named.name.clone(),
            vcpus: named.vcpus,
            memory: named.memory,
            disk: named.disk,
        }
    }
}

impl From<&Template> for Shape {
    fn from(template: &Template) -> Self {
        Self {
            template: template.name.clone(),
            vcpus: DEFAULT_VCPUS,
            memory: DEFAULT_MEMORY,
            disk: template.disk,
        }
    }
}

/// What a template was asked for as, where that is not its name.
fn other_than(template: &str, asked: &str) -> String {
    match asked == template {
        true => String::new(),
        false => asked.to_owned(),
    }
}

const fn on_host_loss(asked: Option<OnHostLoss>) -> HostLoss {
    match asked {
        None | Some(OnHostLoss::Wait) => HostLoss::Wait,
        Some(OnHostLoss::Restart) => HostLoss::Restart,
    }
}

fn node(state: &State, name: &str) -> Result<NodeId, ApiError> {
    let node = named(state, name).ok_or_else(|| no_node(name))?;
    Ok(node.id)
}

fn resolve<'a>(state: &'a State, name: &str) -> Result<&'a Template, ApiError> {
    let is_alias = name == DEFAULT_TEMPLATE_ALIAS;
    let meant = || is_alias.then(|| state.template(DEFAULT_TEMPLATE)).flatten();
    state
        .template(name)
        .or_else(meant)
        .ok_or_else(|| ApiError::new(Code::NotFound, format!("no template {name:?}")))
}

/// Template names and label keys: a letter or digit, then letters, digits, `.`, `_` and `-`.
///
/// The rule keeps separators, control characters and `..` at the start out; a name that holds two
/// dots further on is harmless as one path element.
pub(super) fn check_name(what: &str, name: &str) -> Result<(), ApiError> {
    let mut chars = name.chars();
    let first = chars
        .next()
        .is_some_and(|first| first.is_ascii_alphanumeric());
    let rest = chars.all(|it| it.is_ascii_alphanumeric() || matches!(it, '.' | '_' | '-'));
    if first && rest && name.len() <= MAX_NAME_CHARS {
        return Ok(());
    }
    let shown: String = name.chars().take(MAX_NAME_CHARS).collect();
    Err(ApiError::invalid(format!(
        "{what} {shown:?} is not a name: 1 to {MAX_NAME_CHARS} characters, letters, digits, \
         '.', '_' and '-', starting with a letter or digit"
    )))
}

fn size(
    what: &str,
    asked: Option<i64>,
    default: u32,
    range: std::ops::RangeInclusive<u32>,
) -> Result<u32, ApiError> {
    let asked = asked.filter(|asked| *asked > 0);
    let Some(asked) = asked else {
        return Ok(default);
    };
    let (least, most) = (*range.start(), *range.end());
    u32::try_from(asked)
        .ok()
        .filter(|size| range.contains(size))
        .ok_or_else(|| ApiError::invalid(format!("{what} must be {least} to {most}, not {asked}")))
}

fn idle_timeout(asked: i64) -> Result<Option<Duration>, ApiError> {
    if asked == 0 {
        return Ok(None);
    }
    let raised = asked.max(MIN_IDLE_SECS);
    u64::try_from(raised)
        .ok()
        .filter(|_| (1..=MAX_IDLE_SECS).contains(&asked))
        .map(|secs| Some(Duration::from_secs(secs)))
        .ok_or_else(|| {
            ApiError::invalid(format!(
                "timeout_sec must be 0 (never) to {MAX_IDLE_SECS}, not {asked}"
            ))
        })
}

pub(super) fn check_labels(labels: &BTreeMap<String, String>) -> Result<(), ApiError> {
    if labels.len() > MAX_LABELS {
        return Err(ApiError::invalid(format!(
            "metadata may have {MAX_LABELS} keys at most, not {}",
            labels.len()
        )));
    }
    for (key, value) in labels {
        check_name("metadata key", key)?;
        if RESERVED_KEYS.contains(&key.as_str()) {
            return Err(ApiError::invalid(format!(
                "metadata key {key} is set by the server"
            )));
        }
        if value.chars().count() > MAX_NAME_CHARS {
            return Err(ApiError::invalid(format!(
                "the value of metadata key {key} is longer than {MAX_NAME_CHARS} characters"
            )));
        }
    }
    Ok(())
}

/// Tags of a node, or asked of one: keys and values of letters, digits, `.`, `_`, `-` and `/`.
pub(super) fn check_tags(what: &str, tags: &BTreeMap<String, String>) -> Result<(), ApiError> {
    let plain = |it: char| it.is_ascii_alphanumeric() || matches!(it, '.' | '_' | '-' | '/');
    let fits =
        |text: &str| !text.is_empty() && text.len() <= MAX_NAME_CHARS && text.chars().all(plain);
    if tags.len() > MAX_TAGS {
        return Err(ApiError::invalid(format!(
            "{what} may have {MAX_TAGS} keys at most, not {}",
            tags.len()
        )));
    }
    let bad = tags.iter().find(|(key, value)| !fits(key) || !fits(value));
    bad.map_or(Ok(()), |(key, value)| {
        let shown: String = format!("{key}={value}")
            .chars()
            .take(MAX_NAME_CHARS)
            .collect();
        Err(ApiError::invalid(format!(
            "{what}: {shown:?} does not fit: keys and values have 1 to {MAX_NAME_CHARS} letters, \
             digits, '.', '_', '-' and '/'"
        )))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proto::units::Stamp;
    use raft::command::{Command, Proposal};

    fn state() -> State {
        let mut state = State::default();
        let template = Template {
            name: DEFAULT_TEMPLATE.into(),
            digest: [0; 32],
            disk: Mib(5120),
            size_bytes: 1,
            created_at: Stamp(1),
        };
        let command = Command::PutTemplate(template);
        let put = state.apply(
            1,
            Proposal {
                at: Stamp(1),
                command,
            },
        );
        assert!(put.answer.is_ok());
        state
    }

    fn spec(json: serde_json::Value) -> Result<SandboxSpec, ApiError> {
        serde_json::from_value::<CreateCapsule>(json)
            .expect("a request")
            .to_spec(&state(), TeamId::default())
    }

    fn code(json: serde_json::Value) -> Code {
        spec(json).expect_err("it was accepted").code
    }

    #[test]
    fn an_empty_request_asks_for_the_defaults() {
        let spec = spec(serde_json::json!({})).expect("defaults");
        assert_eq!(
            (spec.vcpus, spec.memory, spec.disk),
            (1, Mib(512), Mib(5120))
        );
        assert_eq!(
            (spec.template.as_str(), spec.idle_timeout),
            ("minimal", None)
        );
    }

    #[test]
    fn sizes_that_are_not_positive_mean_the_defaults() {
        let json = serde_json::json!({"vcpus": 0, "memory_mb": i64::MIN, "unknown": [1]});
        let spec = spec(json).expect("defaults");
        assert_eq!((spec.vcpus, spec.memory), (1, Mib(512)));
    }

    #[test]
    fn huge_and_tiny_sizes_are_refused() {
        for json in [
            serde_json::json!({"vcpus": 65}),
            serde_json::json!({"vcpus": i64::MAX}),
            serde_json::json!({"memory_mb": 127}),
            serde_json::json!({"memory_mb": (1 << 20) + 1}),
            serde_json::json!({"timeout_sec": -1}),
            serde_json::json!({"timeout_sec": i64::MIN}),
            serde_json::json!({"timeout_sec": i64::MAX}),
        ] {
            assert_eq!(code(json.clone()), Code::InvalidRequest, "{json}");
        }
    }

    #[test]
    fn short_timeouts_are_raised_to_a_minute() {
        for (asked, kept) in [(1, 60), (59, 60), (60, 60), (61, 61)] {
            let spec = spec(serde_json::json!({"timeout_sec": asked})).expect("a timeout");
            assert_eq!(spec.idle_timeout, Some(Duration::from_secs(kept)));
        }
    }

    #[test]
    fn the_later_name_of_the_default_template_means_the_same_one() {
        let spec = spec(serde_json::json!({"template": "minimal-ubuntu"})).expect("an alias");
        assert_eq!(
            (spec.template.as_str(), spec.template_as_asked()),
            ("minimal", "minimal-ubuntu")
        );
    }

    #[test]
    fn bad_template_names_are_invalid_and_unknown_ones_not_found() {
        let long = "a".repeat(65);
        for bad in [
            "",
            "..",
            "../minimal",
            "a/b",
            "a\0b",
            "a\nb",
            "-a",
            "mini mal",
            &long,
        ] {
            let json = serde_json::json!({"template": bad});
            assert_eq!(code(json), Code::InvalidRequest, "{bad:?}");
        }
        assert_eq!(
            code(serde_json::json!({"template": "nope"})),
            Code::NotFound
        );
    }

    #[test]
    fn labels_past_their_bounds_are_refused() {
        let many: BTreeMap<String, String> =
            (0..21).map(|i| (format!("k{i}"), String::new())).collect();
        for labels in [
            serde_json::json!(many),
            serde_json::json!({"": "empty key"}),
            serde_json::json!({"a b": "space"}),
            serde_json::json!({"kernel_version": "mine"}),
            serde_json::json!({"long": "ä".repeat(65)}),
        ] {
            let json = serde_json::json!({"metadata": labels});
            assert_eq!(code(json.clone()), Code::InvalidRequest, "{json}");
        }
        let fits = serde_json::json!({"metadata": {"fits": "ä".repeat(64)}});
        assert!(spec(fits).is_ok());
    }

    #[test]
    fn a_capsule_waits_for_its_host_unless_it_may_be_restarted() {
        let asked = spec(serde_json::json!({"on_host_loss": "restart"})).expect("a spec");
        assert_eq!(asked.on_host_loss, HostLoss::Restart);
        let silent = spec(serde_json::json!({})).expect("a spec");
        assert_eq!(silent.on_host_loss, HostLoss::Wait);
        let other = serde_json::json!({"on_host_loss": "panic"});
        assert!(serde_json::from_value::<CreateCapsule>(other).is_err());
    }

    #[test]
    fn tags_and_nodes_that_cannot_be_are_refused() {
        let tags = |json| spec(serde_json::json!({"node_tags": json}));
        let fits = tags(serde_json::json!({"zone": "eu/1"})).expect("tags");
        assert_eq!(fits.node_tags.len(), 1);
        for bad in [
            serde_json::json!({"": "a"}),
            serde_json::json!({"a": ""}),
            serde_json::json!({"a b": "c"}),
            serde_json::json!({"a": "b".repeat(65)}),
        ] {
            assert_eq!(tags(bad).expect_err("accepted").code, Code::InvalidRequest);
        }
        let on_node = serde_json::json!({"on_node": "node-7"});
        assert_eq!(code(on_node), Code::NotFound);
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_keeps_every_bound(
            template in "\\PC{0,70}",
            vcpus: Option<i64>,
            memory_mb: Option<i64>,
            timeout_sec in proptest::option::of(prop_oneof![any::<i64>(), -10..100_i64]),
            metadata in proptest::option::of(proptest::collection::btree_map(".{0,70}", ".{0,70}", 0..25)),
            named: bool,
        ) {
            let template = named.then_some(template);
            let request = CreateCapsule {
                template, vcpus, memory_mb, timeout_sec, metadata, ..CreateCapsule::default()
            };
            if let Ok(spec) = request.to_spec(&state(), TeamId::default()) {
                prop_assert!((1..=MAX_VCPUS).contains(&spec.vcpus));
                prop_assert!((MIN_MEMORY..=MAX_MEMORY).contains(&spec.memory));
                prop_assert!(spec.idle_timeout.is_none_or(|it| it.as_secs() >= 60));
                prop_assert!(spec.metadata.len() <= MAX_LABELS);
                prop_assert_eq!(spec.template, DEFAULT_TEMPLATE);
            }
        }
    }
}

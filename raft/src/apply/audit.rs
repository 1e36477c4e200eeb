//! Writing down who asked for what: one record for each entry that changes what people care about.
//!
//! What a change is about is looked up before it is carried out, since it may be gone afterwards. A
//! change that somebody asked for is recorded also where it is refused; one that comes again and finds
//! its work done is not, nor is what nodes report. Giving out a link changes nothing but who may come in,
//! so its record is all that its entry makes.

use std::collections::BTreeMap;

use proto::ids::{NodeId, SandboxId, TeamId};
use proto::units::Stamp;

use super::Applied;
use crate::command::{BuildChange, CheckpointSandbox, Command, StopCause, Verdict};
use crate::state::{Action, Actor, AuditRecord, Channel, Purpose, RowKey, Settings, State};

/// Longest text of a record. Names are shorter; it bounds what a proposer may claim.
const TEXT_CHARS: usize = 128;
/// Longest reason of a refusal.
const ERROR_CHARS: usize = 256;
/// What stands in `reason` where an inactivity timeout passed.
const TTL_EXPIRED: &str = "ttl_expired";

/// What a change is about.
struct Subject {
    team: TeamId,
    action: Action,
    object: String,
    object_name: String,
    metadata: BTreeMap<String, String>,
}

impl Subject {
    fn new(team: TeamId, action: Action, object: impl ToString) -> Self {
        Self {
            team,
            action,
            object: object.to_string(),
            object_name: String::new(),
            metadata: BTreeMap::new(),
        }
    }

    /// Something of the platform's.
    fn platform(action: Action, object: impl ToString) -> Self {
        Self::new(TeamId::default(), action, object)
    }

    fn called(mut self, name: &str) -> Self {
        name.clone_into(&mut self.object_name);
        self
    }

    fn with(mut self, key: &str, value: impl ToString) -> Self {
        self.metadata.insert(key.to_owned(), value.to_string());
        self
    }

    fn because_of(self, cause: StopCause) -> Self {
        match cause {
            StopCause::Asked => self,
            StopCause::Idle => self.with("reason", TTL_EXPIRED),
        }
    }
}

impl State {
    /// Carries out a change, and records it. `actor` is nobody where a rule made it.
    pub(super) fn audited(
        &mut self,
        at: Stamp,
        index: u64,
        actor: Option<Actor>,
        change: Command,
    ) -> Applied {
        let subject = self.subject(&change);
        let is_link = matches!(change, Command::LinkSandbox { .. });
        let mut applied = self.act(at, index, change);
        let error = applied.answer.as_ref().err().map(ToString::to_string);
        let is_news = match error {
            None if is_link => true,
            None => !applied.touched.is_empty(),
            Some(_) => actor.is_some(),
        };
        if let Some(subject) = subject.filter(|_| is_news) {
            let record = AuditRecord {
                entry: index,
                at,
                team: subject.team,
                actor: shortened(actor.unwrap_or_default()),
                action: subject.action,
                object: first(&subject.object, TEXT_CHARS),
                object_name: first(&subject.object_name, TEXT_CHARS),
                error: error.map(|error| first(&error, ERROR_CHARS)),
                metadata: subject.metadata,
            };
            if !(is_link && self.has_kept(&record)) {
                applied.touched.extend(self.keep(record));
            }
        }
        applied
    }

    /// Whether the log has the same already, of an entry that was proposed before: all that is said of a link makes
    /// its word, so two that are the same are one.
    fn has_kept(&self, record: &AuditRecord) -> bool {
        let is_same = |it: &AuditRecord| {
            it.action == record.action
                && it.object == record.object
                && it.actor == record.actor
                && it.error == record.error
                && it.metadata == record.metadata
        };
        self.audit_of(record.team).any(is_same)
    }

    fn keep(&mut self, record: AuditRecord) -> Vec<RowKey> {
        let (team, entry) = (record.team, record.entry);
        self.put_audit(record);
        let mut touched = vec![RowKey::Audit(team, entry)];
        if let Some((team, oldest)) = self.surplus_audit(team) {
            self.drop_audit(team, oldest);
            touched.push(RowKey::Audit(team, oldest));
        }
        touched
    }

    /// What `change` is about; `None` where people do not care, or it is about nothing there is.
    fn subject(&self, change: &Command) -> Option<Subject> {
        match change {
            Command::PutSettings(settings) => Some(changed_settings(self.settings(), *settings)),
            Command::PutToken(_)
            | Command::RevokeToken(_)
            | Command::RedeemToken { .. }
            | Command::ChangeNode { .. }
            | Command::JudgeNode { .. }
            | Command::RemoveNode { .. } => self.subject_of_fleet(change),
            Command::PutKey(_)
            | Command::RevokeKey(_)
            | Command::PutTeam(_)
            | Command::DropTeam(_)
            | Command::PutMember(_)
            | Command::DropMember { .. } => self.subject_of_team(change),
            Command::PutTemplate(it) => Some(Subject::platform(Action::TemplatePublish, &it.name)),
            Command::DropNamed(it) => Some(Subject::new(it.team, Action::SnapshotDelete, &it.name)),
            Command::CreateSandbox { id, team, spec, .. } => {
                let made = Subject::new(*team, Action::CapsuleCreate, id);
                Some(made.with("template", &spec.template))
            }
            Command::CheckpointSandbox(asked) => self.checkpointed(asked),
            Command::PutChannel(it) => Some(self.about_channel(it)),
            Command::DropChannel { team, id } => {
                Some(Subject::new(*team, Action::ChannelDelete, id))
            }
            Command::Build(change) => self.subject_of_build(change),
            Command::ChangeSandbox { .. }
            | Command::LinkSandbox { .. }
            | Command::StopSandbox { .. }
            | Command::PauseSandbox { .. }
            | Command::ResumeSandbox { .. } => self.subject_of_sandbox(change),
            Command::FoundCluster { .. }
            | Command::RecoverCluster { .. }
            | Command::AdmitNode(_)
            | Command::PutWarm(_)
            | Command::RetireWarm(_)
            | Command::HoldSnapshot { .. }
            | Command::ReportSandbox { .. }
            | Command::PruneSandboxes { .. }
            | Command::NoteKeyUses(_)
            | Command::TellChannel(_)
            | Command::By(_) => None,
        }
    }

    fn subject_of_sandbox(&self, change: &Command) -> Option<Subject> {
        match change {
            Command::ChangeSandbox { id, .. } => self.about(*id, Action::CapsuleUpdate),
            Command::LinkSandbox { id, port, until } => {
                let subject = self.about(*id, Action::CapsuleLink)?.with("port", port);
                Some(subject.with("expires_at_unix_ms", until.0))
            }
            Command::StopSandbox { id, cause } => {
                let subject = self.about(*id, Action::CapsuleDestroy)?;
                Some(subject.because_of(*cause))
            }
            Command::PauseSandbox {
                id, cause, then_on, ..
            } => match then_on {
                None => {
                    let subject = self.about(*id, Action::CapsulePause)?;
                    Some(subject.because_of(*cause))
                }
                Some(to) => {
                    let subject = self.about(*id, Action::CapsuleMigrate)?;
                    Some(subject.with("to", to))
                }
            },
            Command::ResumeSandbox { id, to, .. } => {
                let subject = self.about(*id, Action::CapsuleResume)?;
                Some(match to {
                    Some(to) => subject.with("to", to),
                    None => subject,
                })
            }
            _ => None,
        }
    }

    fn about_channel(&self, channel: &Channel) -> Subject {
        let action = match self.channel(channel.id) {
            Some(_) => Action::ChannelUpdate,
            None => Action::ChannelCreate,
        };
        Subject::new(channel.team, action, channel.id).called(&channel.name)
    }

    /// Asking for a build and calling it off; how far it is is no news to people.
    fn subject_of_build(&self, change: &BuildChange) -> Option<Subject> {
        match change {
            BuildChange::Start(build) => {
                let asked = Subject::new(build.team, Action::TemplateBuild, build.id);
                Some(asked.called(&build.spec.name))
            }
            BuildChange::Cancel(id) => {
                let known = self.build(*id)?;
                let asked = Subject::new(known.team, Action::TemplateCancel, id);
                Some(asked.called(&known.spec.name))
            }
            BuildChange::Claim { .. } | BuildChange::Progress { .. } | BuildChange::End(_) => None,
        }
    }

    fn about(&self, id: SandboxId, action: Action) -> Option<Subject> {
        let known = self.sandbox(id)?;
        Some(Subject::new(known.team, action, id))
    }

    fn checkpointed(&self, asked: &CheckpointSandbox) -> Option<Subject> {
        let team = self.sandbox(asked.id)?.team;
        Some(match &asked.checkpoint.purpose {
            Purpose::Name { name, .. } => {
                Subject::new(team, Action::SnapshotCreate, name).with("capsule", asked.id)
            }
            Purpose::Fork { ids } => {
                Subject::new(team, Action::CapsuleFork, asked.id).with("count", ids.len())
            }
        })
    }

    fn subject_of_fleet(&self, change: &Command) -> Option<Subject> {
        match change {
            Command::PutToken(it) => Some(Subject::platform(Action::TokenCreate, it.id)),
            Command::RevokeToken(id) => Some(Subject::platform(Action::TokenRevoke, id)),
            Command::RedeemToken { token, node } => {
                let joined = Subject::platform(Action::HostJoin, &node.name);
                Some(joined.with("join_token", token))
            }
            Command::ChangeNode {
                node,
                cordoned,
                draining,
                tags,
            } => {
                let mut subject = self.about_node(*node, Action::HostUpdate)?;
                for (what, asked) in [("cordoned", cordoned), ("draining", draining)] {
                    if let Some(asked) = asked {
                        subject = subject.with(what, asked);
                    }
                }
                if tags.is_some() {
                    subject = subject.with("tags", "replaced");
                }
                Some(subject)
            }
            Command::JudgeNode { node, verdict, .. } => self.about_node(
                *node,
                match verdict {
                    Verdict::Back => Action::HostUp,
                    Verdict::Missing => Action::HostDown,
                    Verdict::Lost => Action::HostLost,
                },
            ),
            Command::RemoveNode {
                node,
                declared_dead,
            } => {
                let subject = self.about_node(*node, Action::HostRemove)?;
                Some(subject.with("declared_dead", declared_dead))
            }
            _ => None,
        }
    }

    fn about_node(&self, node: NodeId, action: Action) -> Option<Subject> {
        let known = self.node(node)?;
        Some(Subject::platform(action, node).called(&known.name))
    }

    fn subject_of_team(&self, change: &Command) -> Option<Subject> {
        match change {
            Command::PutKey(key) => {
                let made = Subject::new(key.team, Action::KeyCreate, key.id).called(&key.name);
                Some(made.with("scope", key.scope.word()))
            }
            Command::RevokeKey(id) => {
                let key = self.key(*id)?;
                Some(Subject::new(key.team, Action::KeyRevoke, id).called(&key.name))
            }
            Command::PutTeam(team) => {
                let action = match self.team(team.id) {
                    Some(_) => Action::TeamUpdate,
                    None => Action::TeamCreate,
                };
                Some(Subject::platform(action, team.id).called(&team.name))
            }
            Command::DropTeam(id) => {
                let team = self.team(*id)?;
                Some(Subject::platform(Action::TeamDelete, id).called(&team.name))
            }
            Command::PutMember(it) => {
                let action = match self.member(it.team, it.user) {
                    Some(_) => Action::MemberUpdate,
                    None => Action::MemberAdd,
                };
                let subject = Subject::new(it.team, action, it.user).called(&it.email);
                Some(subject.with("role", it.role.word()))
            }
            Command::DropMember { team, user } => {
                let known = self.member(*team, *user)?;
                let gone = Subject::new(*team, Action::MemberRemove, user);
                Some(gone.called(&known.email))
            }
            _ => None,
        }
    }
}

/// Names those that change, with their new values.
fn changed_settings(known: Settings, asked: Settings) -> Subject {
    let figures = [
        ("max_voters", known.max_voters, asked.max_voters),
        ("max_learners", known.max_learners, asked.max_learners),
        ("replicas", known.replicas, asked.replicas),
        ("key_rate", known.key_rate, asked.key_rate),
        ("key_burst", known.key_burst, asked.key_burst),
    ];
    let times = [
        ("lease_ttl", known.lease_ttl, asked.lease_ttl),
        ("lease_grace", known.lease_grace, asked.lease_grace),
    ];
    let mut subject = Subject::platform(Action::ClusterUpdate, "settings");
    for (name, _, asked) in figures.iter().filter(|(_, known, asked)| known != asked) {
        subject = subject.with(name, asked);
    }
    for (name, _, asked) in times.iter().filter(|(_, known, asked)| known != asked) {
        subject = subject.with(name, format!("{asked:?}"));
    }
    subject
}

fn shortened(actor: Actor) -> Actor {
    match actor {
        Actor::System => Actor::System,
        Actor::Key {
            id,
            name,
            holder,
            address,
        } => Actor::Key {
            id,
            holder,
            name: first(&name, TEXT_CHARS),
            address: first(&address, TEXT_CHARS),
        },
    }
}

fn first(text: &str, chars: usize) -> String {
    text.chars().take(chars).collect()
}

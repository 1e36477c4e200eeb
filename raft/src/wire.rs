//! Commands and answers as bytes: the log's own format, independent of any library's.

mod builds;
mod channels;
mod keys;
mod named;
mod snapshots;

use std::collections::BTreeMap;

use prost::Message;
use proto::epoch::Epoch;
use proto::ids::{ClusterId, KeyId, NodeId, SandboxId, TeamId, TokenId};
use proto::units::Stamp;
use proto::wire::raft as pb;

use crate::command::{Answer, Command, Proposal, Receipt, Refusal, Report, StopCause, Verdict};
use crate::placement::{Lack, LoadHint};
use crate::state::{BadRow, Node, SandboxSpec, Settings, Template};

/// `bytes` as an id of fixed length.
pub(crate) fn array<const N: usize>(what: &'static str, bytes: &[u8]) -> Result<[u8; N], BadRow> {
    bytes.try_into().map_err(|_| BadRow::Length(what))
}

/// The same for a field that may be left out.
pub(crate) fn optional<const N: usize>(
    what: &'static str,
    bytes: &[u8],
) -> Result<Option<[u8; N]>, BadRow> {
    if bytes.is_empty() {
        return Ok(None);
    }
    array(what, bytes).map(Some)
}

/// A message field that our writers always set.
pub(crate) fn some<T>(what: &'static str, field: Option<T>) -> Result<T, BadRow> {
    field.ok_or(BadRow::Missing(what))
}

impl Proposal {
    /// The proposal as log bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        pb::Proposal {
            at_ms: self.at.0,
            command: Some(command_to_wire(&self.command)),
        }
        .encode_to_vec()
    }

    /// Reads log bytes.
    ///
    /// # Errors
    /// [`BadRow`] where the bytes are no proposal of this version.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadRow> {
        let wire = pb::Proposal::decode(bytes).map_err(|_| BadRow::Garbled)?;
        let command = command_from_wire(some("command", wire.command)?)?;
        Ok(Self {
            at: Stamp(wire.at_ms),
            command,
        })
    }
}

/// A node's record as bytes, for nodes that tell each other of themselves.
#[must_use]
pub fn encode_node(node: &Node) -> Vec<u8> {
    pb::NodeRow::from(node).encode_to_vec()
}

/// Reads a node's record.
///
/// # Errors
/// [`BadRow`] where the bytes are none of this version.
pub fn decode_node(bytes: &[u8]) -> Result<Node, BadRow> {
    pb::NodeRow::decode(bytes)
        .map_err(|_| BadRow::Garbled)?
        .try_into()
}

#[allow(clippy::too_many_lines)] // an arm for each command, and nothing else
fn command_to_wire(command: &Command) -> pb::proposal::Command {
    use pb::proposal::Command as Wire;
    match command {
        Command::FoundCluster { id, settings } => Wire::FoundCluster(found_to_wire(*id, *settings)),
        Command::RecoverCluster { id, last, lost } => recovered_to_wire(*id, *last, lost),
        Command::PutSettings(settings) => Wire::PutSettings((*settings).into()),
        Command::PutToken(token) => Wire::PutToken(pb::PutToken {
            token: Some(token.into()),
        }),
        Command::RevokeToken(id) => Wire::RevokeToken(pb::RevokeToken { id: id.0.to_vec() }),
        Command::RedeemToken { token, node } => Wire::RedeemToken(pb::RedeemToken {
            token: token.0.to_vec(),
            node: Some(node.into()),
        }),
        Command::AdmitNode(node) => Wire::AdmitNode(pb::AdmitNode {
            node: Some(node.into()),
        }),
        Command::ChangeNode {
            node,
            cordoned,
            draining,
            tags,
        } => Wire::ChangeNode(change_to_wire(*node, *cordoned, *draining, tags.as_ref())),
        Command::JudgeNode {
            node,
            incarnation,
            verdict,
        } => judged_to_wire(*node, *incarnation, *verdict),
        Command::RemoveNode {
            node,
            declared_dead,
        } => removed_to_wire(*node, *declared_dead),
        Command::PutTemplate(template) => template_to_wire(template),
        Command::PutKey(key) => keys::key_to_wire(key),
        Command::NoteKeyUses(uses) => keys::uses_to_wire(uses),
        Command::PutTeam(team) => keys::team_to_wire(team),
        Command::DropTeam(id) => Wire::DropTeam(pb::DropTeam { id: id.0.to_vec() }),
        Command::PutMember(member) => keys::member_to_wire(member),
        Command::DropMember { team, user } => keys::no_member_to_wire(*team, *user),
        Command::By(attributed) => keys::attributed_to_wire(attributed),
        Command::RevokeKey(id) => Wire::RevokeKey(pb::RevokeKey { id: id.0.to_vec() }),
        Command::CreateSandbox {
            id,
            team,
            spec,
            hints,
        } => created_to_wire(*id, *team, spec, hints),
        Command::ChangeSandbox {
            id,
            ports_open,
            wakes,
        } => sandbox_changed_to_wire(*id, *ports_open, *wakes),
        Command::LinkSandbox { id, port, until } => Wire::LinkSandbox(pb::LinkSandbox {
            id: id.0.to_vec(),
            port: (*port).into(),
            until_ms: until.0,
        }),
        Command::StopSandbox { id, cause } => stopped_to_wire(*id, *cause),
        Command::PauseSandbox {
            id,
            epoch,
            cause,
            then_on,
        } => snapshots::paused_to_wire((*id, *epoch), *cause, *then_on),
        Command::ResumeSandbox {
            id,
            snapshot,
            to,
            hints,
        } => snapshots::resumed_to_wire((*id, *snapshot), *to, hints),
        Command::HoldSnapshot { id, node, holds } => snapshots::held_to_wire(*id, *node, *holds),
        Command::CheckpointSandbox(asked) => named::checkpoint_to_wire(asked),
        Command::DropNamed(which) => named::unnamed_to_wire(which),
        Command::PutWarm(snapshot) => named::warm_to_wire(snapshot),
        Command::RetireWarm(id) => named::retired_to_wire(*id),
        Command::ReportSandbox {
            id,
            epoch,
            node,
            report,
        } => Wire::ReportSandbox(reported_to_wire(*id, *epoch, *node, report)),
        Command::PutChannel(channel) => channels::put_to_wire(channel),
        Command::DropChannel { team, id } => channels::drop_to_wire(*team, *id),
        Command::TellChannel(told) => channels::told_to_wire(told),
        Command::PruneSandboxes { ended_before } => Wire::PruneSandboxes(pb::PruneSandboxes {
            ended_before_ms: ended_before.0,
        }),
        Command::Build(change) => builds::build_to_wire(change),
    }
}

fn template_to_wire(template: &Template) -> pb::proposal::Command {
    pb::proposal::Command::PutTemplate(pb::PutTemplate {
        template: Some(template.into()),
    })
}

fn judged_to_wire(node: NodeId, incarnation: u64, verdict: Verdict) -> pb::proposal::Command {
    pb::proposal::Command::JudgeNode(pb::JudgeNode {
        node: node.0,
        incarnation,
        liveness: verdict_to_wire(verdict).into(),
    })
}

fn removed_to_wire(node: NodeId, declared_dead: bool) -> pb::proposal::Command {
    pb::proposal::Command::RemoveNode(pb::RemoveNode {
        node: node.0,
        declared_dead,
    })
}

fn recovered_to_wire(id: ClusterId, last: u64, lost: &[NodeId]) -> pb::proposal::Command {
    pb::proposal::Command::RecoverCluster(pb::RecoverCluster {
        id: id.0.to_vec(),
        last,
        lost: lost.iter().map(|node| node.0).collect(),
    })
}

fn recovered_from_wire(wire: pb::RecoverCluster) -> Result<Command, BadRow> {
    Ok(Command::RecoverCluster {
        id: ClusterId(array("cluster id", &wire.id)?),
        last: wire.last,
        lost: wire.lost.into_iter().map(NodeId).collect(),
    })
}

fn found_to_wire(id: ClusterId, settings: Settings) -> pb::FoundCluster {
    pb::FoundCluster {
        id: id.0.to_vec(),
        settings: Some(settings.into()),
    }
}

fn created_to_wire(
    id: SandboxId,
    team: TeamId,
    spec: &SandboxSpec,
    hints: &[LoadHint],
) -> pb::proposal::Command {
    pb::proposal::Command::CreateSandbox(pb::CreateSandbox {
        id: id.0.to_vec(),
        team: team.0.to_vec(),
        spec: Some(spec.into()),
        hints: hints.iter().map(hint_to_wire).collect(),
    })
}

fn sandbox_changed_to_wire(
    id: SandboxId,
    ports_open: Option<bool>,
    wakes: Option<bool>,
) -> pb::proposal::Command {
    pb::proposal::Command::ChangeSandbox(pb::ChangeSandbox {
        id: id.0.to_vec(),
        ports_open,
        wakes,
    })
}

fn stopped_to_wire(id: SandboxId, cause: StopCause) -> pb::proposal::Command {
    pb::proposal::Command::StopSandbox(pb::StopSandbox {
        id: id.0.to_vec(),
        cause: cause_to_wire(cause).into(),
    })
}

fn reported_to_wire(
    id: SandboxId,
    epoch: Epoch,
    node: NodeId,
    report: &Report,
) -> pb::ReportSandbox {
    pb::ReportSandbox {
        id: id.0.to_vec(),
        epoch: epoch.0,
        node: node.0,
        report: Some(report_to_wire(report)),
    }
}

fn change_to_wire(
    node: NodeId,
    cordoned: Option<bool>,
    draining: Option<bool>,
    tags: Option<&BTreeMap<String, String>>,
) -> pb::ChangeNode {
    pb::ChangeNode {
        node: node.0,
        cordoned,
        draining,
        tags: tags.map(|tags| pb::Tags { tags: tags.clone() }),
    }
}

const fn verdict_to_wire(verdict: Verdict) -> pb::Liveness {
    match verdict {
        Verdict::Back => pb::Liveness::Alive,
        Verdict::Missing => pb::Liveness::Missing,
        Verdict::Lost => pb::Liveness::Lost,
    }
}

fn verdict_from_wire(liveness: i32) -> Result<Verdict, BadRow> {
    match pb::Liveness::try_from(liveness) {
        Ok(pb::Liveness::Alive) => Ok(Verdict::Back),
        Ok(pb::Liveness::Missing) => Ok(Verdict::Missing),
        Ok(pb::Liveness::Lost) => Ok(Verdict::Lost),
        // Read as zero, a newer version's verdict would bring a node back.
        Err(_) => Err(BadRow::Unknown("verdict")),
    }
}

const fn cause_from_wire(cause: pb::StopCause) -> Result<StopCause, BadRow> {
    match cause {
        pb::StopCause::Asked => Ok(StopCause::Asked),
        pb::StopCause::Idle => Ok(StopCause::Idle),
        pb::StopCause::Unspecified => Err(BadRow::Unknown("stop cause")),
    }
}

const fn cause_to_wire(cause: StopCause) -> pb::StopCause {
    match cause {
        StopCause::Asked => pb::StopCause::Asked,
        StopCause::Idle => pb::StopCause::Idle,
    }
}

const fn hint_to_wire(hint: &LoadHint) -> pb::LoadHint {
    pb::LoadHint {
        node: hint.node.0,
        busy_permille: hint.busy_permille,
    }
}

fn hints_from_wire(hints: Vec<pb::LoadHint>) -> Vec<LoadHint> {
    let hints = hints.into_iter().map(|hint| LoadHint {
        node: NodeId(hint.node),
        busy_permille: hint.busy_permille,
    });
    hints.collect()
}

#[allow(clippy::too_many_lines)] // an arm for each command, and nothing else
fn command_from_wire(wire: pb::proposal::Command) -> Result<Command, BadRow> {
    use pb::proposal::Command as Wire;
    Ok(match wire {
        Wire::FoundCluster(it) => Command::FoundCluster {
            id: ClusterId(array("cluster id", &it.id)?),
            settings: some("settings", it.settings)?.into(),
        },
        Wire::RecoverCluster(it) => recovered_from_wire(it)?,
        Wire::PutSettings(it) => Command::PutSettings(it.into()),
        Wire::PutToken(it) => Command::PutToken(some("token", it.token)?.try_into()?),
        Wire::RevokeToken(it) => Command::RevokeToken(TokenId(array("token id", &it.id)?)),
        Wire::RedeemToken(it) => Command::RedeemToken {
            token: TokenId(array("token id", &it.token)?),
            node: some("node", it.node)?.try_into()?,
        },
        Wire::ChangeNode(it) => Command::ChangeNode {
            node: NodeId(it.node),
            cordoned: it.cordoned,
            draining: it.draining,
            tags: it.tags.map(|tags| tags.tags),
        },
        Wire::JudgeNode(it) => Command::JudgeNode {
            node: NodeId(it.node),
            incarnation: it.incarnation,
            verdict: verdict_from_wire(it.liveness)?,
        },
        Wire::RemoveNode(it) => Command::RemoveNode {
            node: NodeId(it.node),
            declared_dead: it.declared_dead,
        },
        Wire::AdmitNode(it) => Command::AdmitNode(some("node", it.node)?.try_into()?),
        Wire::PutTemplate(it) => Command::PutTemplate(some("template", it.template)?.try_into()?),
        Wire::PutKey(it) => Command::PutKey(some("key", it.key)?.try_into()?),
        Wire::PutScopedKey(it) => Command::PutKey(some("key", it.key)?.try_into()?),
        Wire::NoteKeyUses(it) => keys::uses_from_wire(&it)?,
        Wire::PutTeam(it) => Command::PutTeam(some("team", it.team)?.try_into()?),
        Wire::DropTeam(it) => Command::DropTeam(TeamId(array("team id", &it.id)?)),
        Wire::PutMember(it) => Command::PutMember(some("member", it.member)?.try_into()?),
        Wire::DropMember(it) => keys::no_member_from_wire(&it)?,
        Wire::Attributed(it) => Command::By(keys::attributed_from_wire(*it)?),
        Wire::RevokeKey(it) => Command::RevokeKey(KeyId(array("key id", &it.id)?)),
        Wire::CreateSandbox(it) => Command::CreateSandbox {
            id: SandboxId(array("sandbox id", &it.id)?),
            team: TeamId(array("team id", &it.team)?),
            spec: some("sandbox spec", it.spec)?.into(),
            hints: hints_from_wire(it.hints),
        },
        Wire::PauseSandbox(it) => snapshots::paused_from_wire(&it)?,
        Wire::ResumeSandbox(it) => snapshots::resumed_from_wire(it)?,
        Wire::HoldSnapshot(it) => snapshots::held_from_wire(&it)?,
        Wire::CheckpointSandbox(it) => Command::CheckpointSandbox(named::checkpoint_from_wire(it)?),
        Wire::DropNamed(it) => Command::DropNamed(named::unnamed_from_wire(it)?),
        Wire::PutWarm(it) => Command::PutWarm(some("snapshot", it.snapshot)?.try_into()?),
        Wire::RetireWarm(it) => named::retired_from_wire(&it)?,
        Wire::ChangeSandbox(it) => Command::ChangeSandbox {
            id: SandboxId(array("sandbox id", &it.id)?),
            ports_open: it.ports_open,
            wakes: it.wakes,
        },
        Wire::LinkSandbox(it) => Command::LinkSandbox {
            id: SandboxId(array("sandbox id", &it.id)?),
            port: u16::try_from(it.port).map_err(|_| BadRow::Unknown("port"))?,
            until: Stamp(it.until_ms),
        },
        Wire::StopSandbox(it) => Command::StopSandbox {
            id: SandboxId(array("sandbox id", &it.id)?),
            cause: cause_from_wire(it.cause())?,
        },
        Wire::ReportSandbox(it) => Command::ReportSandbox {
            id: SandboxId(array("sandbox id", &it.id)?),
            epoch: Epoch(it.epoch),
            node: NodeId(it.node),
            report: report_from_wire(some("report", it.report)?)?,
        },
        Wire::PutChannel(it) => channels::put_from_wire(it)?,
        Wire::DropChannel(it) => channels::drop_from_wire(&it)?,
        Wire::TellChannel(it) => channels::told_from_wire(it)?,
        Wire::PruneSandboxes(it) => Command::PruneSandboxes {
            ended_before: Stamp(it.ended_before_ms),
        },
        Wire::Build(it) => builds::build_from_wire(it)?,
    })
}

fn report_to_wire(report: &Report) -> pb::report_sandbox::Report {
    use pb::report_sandbox::Report as Wire;
    match report {
        Report::Begins => Wire::Begins(pb::Begins {}),
        Report::Running(versions) => Wire::Running(versions.into()),
        Report::Stopped { reason } => Wire::Stopped(pb::Ended {
            reason: reason.clone(),
        }),
        Report::Failed { reason } => Wire::Failed(pb::Ended {
            reason: reason.clone(),
        }),
        Report::Sealed(sealed) => Wire::Sealed(sealed.into()),
        Report::Thawed { reason } => Wire::Thawed(pb::Ended {
            reason: reason.clone(),
        }),
    }
}

fn report_from_wire(wire: pb::report_sandbox::Report) -> Result<Report, BadRow> {
    use pb::report_sandbox::Report as Wire;
    Ok(match wire {
        Wire::Begins(pb::Begins {}) => Report::Begins,
        Wire::Running(versions) => Report::Running(versions.into()),
        Wire::Stopped(ended) => Report::Stopped {
            reason: ended.reason,
        },
        Wire::Failed(ended) => Report::Failed {
            reason: ended.reason,
        },
        Wire::Sealed(sealed) => Report::Sealed(sealed.try_into()?),
        Wire::Thawed(thawed) => Report::Thawed {
            reason: thawed.reason,
        },
    })
}

/// An answer as bytes.
#[must_use]
pub fn encode_answer(answer: &Answer) -> Vec<u8> {
    use pb::answer::Answer as Wire;
    let wire = match answer {
        Ok(Receipt::Done(count)) => Wire::Done(pb::Done { count: *count }),
        Ok(Receipt::Placed { node, epoch }) => Wire::Placed(pb::Placed {
            node: node.0,
            epoch: epoch.0,
        }),
        Ok(Receipt::Admitted(node)) => Wire::Admitted(node.0),
        Err(refusal) => Wire::Refusal(refusal_to_wire(refusal)),
    };
    pb::Answer { answer: Some(wire) }.encode_to_vec()
}

/// Reads an answer; bytes of another version become [`Refusal::Unreadable`].
///
/// # Errors
/// The refusal that the state machine gave.
pub fn decode_answer(bytes: &[u8]) -> Answer {
    use pb::answer::Answer as Wire;
    let unreadable = || Refusal::Unreadable("it is of another version".into());
    let wire = pb::Answer::decode(bytes).map_err(|_| unreadable())?;
    match wire.answer.ok_or_else(unreadable)? {
        Wire::Done(done) => Ok(Receipt::Done(done.count)),
        Wire::Placed(placed) => Ok(Receipt::Placed {
            node: NodeId(placed.node),
            epoch: Epoch(placed.epoch),
        }),
        Wire::Admitted(node) => Ok(Receipt::Admitted(NodeId(node))),
        Wire::Refusal(refusal) => Err(refusal_from_wire(refusal)),
    }
}

fn refusal_to_wire(refusal: &Refusal) -> pb::Refusal {
    use pb::RefusalKind as Kind;
    let (kind, detail, epoch) = match refusal {
        Refusal::Unreadable(text) => (Kind::Unreadable, text.clone(), 0),
        Refusal::NoSuchSandbox(id) => (Kind::NoSuchSandbox, id.clone(), 0),
        Refusal::NoSuchSnapshot(id) => (Kind::NoSuchSnapshot, id.clone(), 0),
        Refusal::NoSuchTemplate(name) => (Kind::NoSuchTemplate, name.clone(), 0),
        Refusal::NoSuchKey(id) => (Kind::NoSuchKey, id.clone(), 0),
        Refusal::NoRoom(lack) => (Kind::NoRoom, lack.0.clone(), 0),
        Refusal::IdTaken(id) => (Kind::IdTaken, id.clone(), 0),
        Refusal::NameTaken(name) => (Kind::NameTaken, name.clone(), 0),
        Refusal::NoSuchBuild(id) => (Kind::NoSuchBuild, id.clone(), 0),
        Refusal::Fenced { newest } => (Kind::Fenced, String::new(), newest.0),
        Refusal::NoSuchNode(id) => (Kind::NoSuchNode, id.clone(), 0),
        Refusal::NoSuchToken(id) => (Kind::NoSuchToken, id.clone(), 0),
        Refusal::TokenExpired(id) => (Kind::TokenExpired, id.clone(), 0),
        Refusal::TokenUsed(id) => (Kind::TokenUsed, id.clone(), 0),
        Refusal::Unfit(why) => (Kind::Unfit, why.clone(), 0),
        Refusal::NoSuchTeam(id) => (Kind::NoSuchTeam, id.clone(), 0),
        Refusal::NoSuchMember(id) => (Kind::NoSuchMember, id.clone(), 0),
    };
    pb::Refusal {
        kind: kind.into(),
        detail,
        epoch,
    }
}

fn refusal_from_wire(wire: pb::Refusal) -> Refusal {
    use pb::RefusalKind as Kind;
    match wire.kind() {
        Kind::Unreadable | Kind::Unspecified => Refusal::Unreadable(wire.detail),
        Kind::NoSuchSandbox => Refusal::NoSuchSandbox(wire.detail),
        Kind::NoSuchSnapshot => Refusal::NoSuchSnapshot(wire.detail),
        Kind::NoSuchTemplate => Refusal::NoSuchTemplate(wire.detail),
        Kind::NoSuchKey => Refusal::NoSuchKey(wire.detail),
        Kind::NoRoom => Refusal::NoRoom(Lack(wire.detail)),
        Kind::IdTaken => Refusal::IdTaken(wire.detail),
        Kind::NameTaken => Refusal::NameTaken(wire.detail),
        Kind::NoSuchBuild => Refusal::NoSuchBuild(wire.detail),
        Kind::NoSuchNode => Refusal::NoSuchNode(wire.detail),
        Kind::NoSuchToken => Refusal::NoSuchToken(wire.detail),
        Kind::TokenExpired => Refusal::TokenExpired(wire.detail),
        Kind::TokenUsed => Refusal::TokenUsed(wire.detail),
        Kind::Unfit => Refusal::Unfit(wire.detail),
        Kind::NoSuchTeam => Refusal::NoSuchTeam(wire.detail),
        Kind::NoSuchMember => Refusal::NoSuchMember(wire.detail),
        Kind::Fenced => Refusal::Fenced {
            newest: Epoch(wire.epoch),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever was asked for may have happened: whoever reads this must not take it for a plain no.
    #[test]
    fn an_answer_that_cannot_be_read_does_not_say_that_nothing_happened() {
        for bytes in [&b""[..], b"\xff\xff"] {
            let refused = decode_answer(bytes).expect_err("no answer");
            assert!(refused.to_string().contains("may have been made"));
        }
    }
}

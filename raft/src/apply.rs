//! The state machine: a pure function of a state and a command.
//!
//! Time comes inside the proposal, randomness inside ids. A command that does not fit changes
//! nothing and says why.
//!
//! ```text
//! (create) -> Starting -> Running -> Stopping -> Stopped      a stop was asked for
//!                 |          |--------------> Stopped | Error  the guest ended or broke
//!                 '------------> Error                         the start failed
//! ```

use proto::epoch::Epoch;
use proto::ids::{KeyId, NodeId, SandboxId, TeamId};
use proto::units::Stamp;

use crate::command::{Answer, Command, Proposal, Receipt, Refusal, Report, StopCause};
use crate::placement;
use crate::state::{
    Desired, GuestVersions, Key, Node, Phase, RowKey, Sandbox, SandboxSpec, State, Template,
};

/// What one command did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// What the proposer is told.
    pub answer: Answer,
    /// The rows that changed or went.
    pub touched: Vec<RowKey>,
}

impl Applied {
    fn untouched(answer: Answer) -> Self {
        Self {
            answer,
            touched: Vec::new(),
        }
    }

    fn touched(receipt: Receipt, key: RowKey) -> Self {
        Self {
            answer: Ok(receipt),
            touched: vec![key],
        }
    }
}

impl State {
    /// Applies the command at log position `index`.
    pub fn apply(&mut self, index: u64, proposal: Proposal) -> Applied {
        let at = proposal.at;
        match proposal.command {
            Command::AdmitNode(node) => self.admit_node(at, node),
            Command::PutTemplate(template) => self.replace_template(at, template),
            Command::PutKey(key) => self.add_key(at, key),
            Command::RevokeKey(id) => self.revoke_key(id),
            Command::CreateSandbox { id, team, spec } => {
                self.create_sandbox(at, Epoch(index), id, team, spec)
            }
            Command::StopSandbox { id, cause } => self.stop_sandbox(at, id, cause),
            Command::ReportSandbox {
                id,
                epoch,
                node,
                report,
            } => self.report_sandbox(at, id, epoch, node, report),
            Command::PruneSandboxes { ended_before } => self.prune_sandboxes(ended_before),
        }
    }

    fn admit_node(&mut self, at: Stamp, mut node: Node) -> Applied {
        let other_key = self
            .node(node.id)
            .is_some_and(|known| known.key != node.key);
        let other_id = self
            .nodes()
            .any(|known| known.key == node.key && known.id != node.id);
        if other_key || other_id {
            return Applied::untouched(Err(Refusal::IdTaken(node.id.to_string())));
        }
        node.admitted_at = self.node(node.id).map_or(at, |known| known.admitted_at);
        let id = node.id;
        self.put_node(node);
        Applied::touched(Receipt::Done(1), RowKey::Node(id))
    }

    fn replace_template(&mut self, at: Stamp, mut template: Template) -> Applied {
        template.created_at = self
            .template(&template.name)
            .map_or(at, |known| known.created_at);
        let name = template.name.clone();
        self.put_template(template);
        Applied::touched(Receipt::Done(1), RowKey::Template(name))
    }

    fn add_key(&mut self, at: Stamp, mut key: Key) -> Applied {
        key.created_at = at;
        if let Some(known) = self.key(key.id) {
            let same = known.hash == key.hash;
            let refusal = Refusal::IdTaken(key.id.to_string());
            return Applied::untouched(if same {
                Ok(Receipt::Done(1))
            } else {
                Err(refusal)
            });
        }
        // A secret has one record: under another id, a revoked one would come alive again.
        if self.keys().any(|known| known.hash == key.hash) {
            return Applied::untouched(Err(Refusal::IdTaken(key.id.to_string())));
        }
        let id = key.id;
        self.put_key(key);
        Applied::touched(Receipt::Done(1), RowKey::Key(id))
    }

    fn revoke_key(&mut self, id: KeyId) -> Applied {
        let Some(known) = self.key(id) else {
            return Applied::untouched(Err(Refusal::NoSuchKey(id.to_string())));
        };
        let revoked = Key {
            revoked: true,
            ..known.clone()
        };
        self.put_key(revoked);
        Applied::touched(Receipt::Done(1), RowKey::Key(id))
    }

    fn create_sandbox(
        &mut self,
        at: Stamp,
        epoch: Epoch,
        id: SandboxId,
        team: TeamId,
        spec: SandboxSpec,
    ) -> Applied {
        if let Some(known) = self.sandbox(id) {
            let same = known.team == team && known.spec == spec;
            let placed = Receipt::Placed {
                node: known.owner,
                epoch: known.epoch,
            };
            let taken = Refusal::IdTaken(id.to_string());
            return Applied::untouched(if same { Ok(placed) } else { Err(taken) });
        }
        if self.template(&spec.template).is_none() {
            return Applied::untouched(Err(Refusal::NoSuchTemplate(spec.template)));
        }
        let owner = match placement::place(self, spec.resources()) {
            Ok(owner) => owner,
            Err(lack) => return Applied::untouched(Err(Refusal::NoRoom(lack))),
        };
        self.put_sandbox(Sandbox {
            id,
            team,
            spec,
            desired: Desired::Running,
            phase: Phase::Starting,
            reason: String::new(),
            owner,
            epoch,
            created_at: at,
            started_at: None,
            updated_at: at,
            versions: GuestVersions::default(),
        });
        Applied::touched(Receipt::Placed { node: owner, epoch }, RowKey::Sandbox(id))
    }

    fn stop_sandbox(&mut self, at: Stamp, id: SandboxId, cause: StopCause) -> Applied {
        let Some(known) = self.sandbox(id) else {
            return Applied::untouched(Err(Refusal::NoSuchSandbox(id.to_string())));
        };
        if known.desired == Desired::Stopped || !known.phase.holds_resources() {
            return Applied::untouched(Ok(Receipt::Done(0)));
        }
        let reason = match cause {
            StopCause::Asked => String::new(),
            StopCause::Idle => "inactivity timeout passed".into(),
        };
        self.put_sandbox(Sandbox {
            desired: Desired::Stopped,
            phase: Phase::Stopping,
            reason,
            updated_at: at,
            ..known.clone()
        });
        Applied::touched(Receipt::Done(1), RowKey::Sandbox(id))
    }

    fn report_sandbox(
        &mut self,
        at: Stamp,
        id: SandboxId,
        epoch: Epoch,
        node: NodeId,
        report: Report,
    ) -> Applied {
        let Some(known) = self.sandbox(id) else {
            return Applied::untouched(Err(Refusal::NoSuchSandbox(id.to_string())));
        };
        if known.epoch != epoch || known.owner != node {
            return Applied::untouched(Err(Refusal::Fenced {
                newest: known.epoch,
            }));
        }
        let Some(next) = after_report(at, known, report) else {
            return Applied::untouched(Ok(Receipt::Done(0)));
        };
        self.put_sandbox(next);
        Applied::touched(Receipt::Done(1), RowKey::Sandbox(id))
    }

    fn prune_sandboxes(&mut self, ended_before: Stamp) -> Applied {
        let gone: Vec<SandboxId> = self
            .sandboxes()
            .filter(|sandbox| !sandbox.phase.holds_resources())
            .filter(|sandbox| sandbox.updated_at < ended_before)
            .map(|sandbox| sandbox.id)
            .collect();
        for id in &gone {
            self.drop_sandbox(*id);
        }
        let count = u64::try_from(gone.len()).unwrap_or(u64::MAX);
        let touched = gone.into_iter().map(RowKey::Sandbox).collect();
        Applied {
            answer: Ok(Receipt::Done(count)),
            touched,
        }
    }
}

/// The record after its owner's report, or `None` where the report says nothing new.
fn after_report(at: Stamp, known: &Sandbox, report: Report) -> Option<Sandbox> {
    let ended = |phase, reason: String| {
        // The first reason explains more than a later one: an idle stop stays an idle stop.
        let reason = if known.reason.is_empty() {
            reason
        } else {
            known.reason.clone()
        };
        let desired = Desired::Stopped;
        Some(Sandbox {
            desired,
            phase,
            reason,
            updated_at: at,
            ..known.clone()
        })
    };
    match (known.phase, report) {
        (Phase::Stopped | Phase::Error, _) => None,
        (Phase::Stopping, Report::Running(_)) => None,
        (Phase::Running, Report::Running(versions)) if versions == known.versions => None,
        (Phase::Starting | Phase::Running, Report::Running(versions)) => Some(Sandbox {
            phase: Phase::Running,
            started_at: known.started_at.or(Some(at)),
            updated_at: at,
            versions,
            ..known.clone()
        }),
        (_, Report::Stopped { reason }) => ended(Phase::Stopped, reason),
        (Phase::Stopping, Report::Failed { reason }) => ended(Phase::Stopped, reason),
        (_, Report::Failed { reason }) => ended(Phase::Error, reason),
    }
}

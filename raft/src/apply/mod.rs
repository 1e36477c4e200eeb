//! The state machine: a pure function of a state and a command.
//!
//! Time comes inside the proposal, randomness inside ids. A command that does not fit changes
//! nothing and says why.
//!
//! ```text
//! (create) -> Starting -> Running -> Stopping -> Stopped      a stop was asked for
//!                 |          |--------------> Stopped | Error  the guest ended or broke
//!                 '------------> Error                         the start failed
//!
//! Running -> Pausing -> Paused -> Resuming -> Running         sealed, and given out again
//!    '----------' Thawed   ^---------' Failed                 what fails leads back
//! Running | Pausing -> Paused                                the guest is lost: as at the last pause, if any
//! Running -> Snapshotting -> Running                         a checkpoint, whatever comes of it
//! ```
//!
//! `nodes` has the commands about nodes, tokens and the cluster, `sandboxes` those about sandboxes,
//! `snapshots` those about pausing and resuming, `named` those about names, forks and what is kept
//! warm.

mod named;
mod nodes;
mod sandboxes;
mod snapshots;

use proto::epoch::Epoch;
use proto::ids::{KeyId, NodeId};
use proto::units::Stamp;

use self::sandboxes::{NewSandbox, Seen};
use crate::command::{Answer, Command, Proposal, Receipt, Refusal};
use crate::state::{Key, RowKey, State, Template};

/// The earliest instant there is. A row that says zero says "never", so a proposer whose clock
/// stands at the beginning of time would leave a state that its own rows do not describe.
const FIRST: Stamp = Stamp(1);

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
        let at = proposal.at.max(FIRST);
        match proposal.command {
            Command::FoundCluster { id, settings } => self.found_cluster(at, id, settings),
            Command::RecoverCluster { id, last, lost } => self.recover_cluster(at, id, last, &lost),
            Command::PutSettings(settings) => self.put_settings(at, settings),
            Command::PutToken(token) => self.add_token(at, token),
            Command::RevokeToken(id) => self.revoke_token(id),
            Command::RedeemToken { token, node } => {
                self.redeem_token(at, NodeId(index), token, node)
            }
            Command::AdmitNode(node) => self.admit_node(at, index, node),
            Command::ChangeNode {
                node,
                cordoned,
                draining,
                tags,
            } => self.change_node(node, cordoned, draining, tags),
            Command::JudgeNode {
                node,
                incarnation,
                verdict,
            } => self.judge_node(at, Epoch(index), node, incarnation, verdict),
            Command::RemoveNode {
                node,
                declared_dead,
            } => self.remove_node(at, Epoch(index), node, declared_dead),
            Command::PutTemplate(template) => self.replace_template(at, template),
            Command::PutKey(key) => self.add_key(at, key),
            Command::RevokeKey(id) => self.revoke_key(id),
            Command::CreateSandbox {
                id,
                team,
                spec,
                hints,
            } => {
                let new = NewSandbox { id, team, spec };
                self.create_sandbox(at, Epoch(index), new, &hints)
            }
            Command::ChangeSandbox {
                id,
                ports_open,
                wakes,
            } => self.change_sandbox(at, id, ports_open, wakes),
            Command::StopSandbox { id, cause } => self.stop_sandbox(at, id, cause),
            Command::ReportSandbox {
                id,
                epoch,
                node,
                report,
            } => self.report_sandbox(at, index, Seen { id, epoch, node }, report),
            Command::PauseSandbox {
                id,
                epoch,
                cause,
                then_on,
            } => self.pause_sandbox(at, index, (id, epoch), (cause, then_on)),
            Command::ResumeSandbox {
                id,
                snapshot,
                to,
                hints,
            } => self.resume_sandbox(at, Epoch(index), id, (snapshot, to), &hints),
            Command::CheckpointSandbox(asked) => self.checkpoint_sandbox(at, index, asked),
            Command::DropNamed(which) => self.drop_name(&which),
            Command::PutWarm(snapshot) => self.put_warm(at, snapshot),
            Command::RetireWarm(id) => self.give_up_warm(id),
            Command::HoldSnapshot { id, node, holds } => self.hold_snapshot(id, node, holds),
            Command::PruneSandboxes { ended_before } => self.prune_sandboxes(ended_before),
        }
    }

    fn replace_template(&mut self, at: Stamp, mut template: Template) -> Applied {
        template.created_at = self
            .template(&template.name)
            .map_or(at, |known| known.created_at);
        let mut touched = vec![RowKey::Template(template.name.clone())];
        self.put_template(template);
        touched.extend(self.retire_warm());
        Applied {
            answer: Ok(Receipt::Done(1)),
            touched,
        }
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
        if self.has_key_hash(&key.hash) {
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
}

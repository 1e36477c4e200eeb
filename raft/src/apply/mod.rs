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
//! warm, `builds` those about building templates, `keys` those about keys, teams and members. `audit`
//! writes down who asked for what. `noted` looks at what any of them changed: it counts what guests
//! took, and makes events.

mod audit;
mod builds;
mod channels;
mod keys;
mod named;
mod nodes;
mod noted;
mod sandboxes;
mod snapshots;

use proto::epoch::Epoch;
use proto::ids::NodeId;
use proto::units::Stamp;

use self::sandboxes::{NewSandbox, Seen};
use crate::command::{Answer, Attributed, Command, Proposal, Receipt, Refusal};
use crate::state::{Actor, RowKey, State, Template};

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
        // Costs as much as a dozen reference counts.
        let before = self.clone();
        let actor = match &proposal.command {
            Command::By(attributed) => attributed.actor.clone(),
            _ => Actor::System,
        };
        let mut applied = self.recorded(at, index, proposal.command);
        // Nodes of releases that note nothing cannot have come this far: they stop at the first change
        // that names who asked for it.
        if self.keeps_audit() {
            self.note(&before, (index, at, actor), &mut applied.touched);
        }
        applied
    }

    fn recorded(&mut self, at: Stamp, index: u64, command: Command) -> Applied {
        match command {
            Command::By(Attributed { actor, change }) => {
                self.audited(at, index, Some(actor), *change)
            }
            // What rules do is recorded too, once there is a log.
            change if self.keeps_audit() => self.audited(at, index, None, change),
            change => self.act(at, index, change),
        }
    }

    #[allow(clippy::too_many_lines)] // an arm for each command, and nothing else
    fn act(&mut self, at: Stamp, index: u64, command: Command) -> Applied {
        match command {
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
            Command::LinkSandbox { id, .. } => self.link_sandbox(id),
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
            Command::PutChannel(channel) => self.set_channel(at, channel),
            Command::DropChannel { team, id } => self.remove_channel(team, id),
            Command::TellChannel(told) => self.tell_channel(told),
            Command::PruneSandboxes { ended_before } => self.prune_sandboxes(ended_before),
            Command::NoteKeyUses(uses) => self.note_key_uses(&uses),
            Command::PutTeam(team) => self.set_team(at, team),
            Command::DropTeam(id) => self.remove_team(id),
            Command::PutMember(member) => self.set_member(at, member),
            Command::DropMember { team, user } => self.remove_member(team, user),
            // None is read from the log: its bytes cannot say this.
            Command::By(_) => {
                let why = "a change has one author".into();
                Applied::untouched(Err(Refusal::Unfit(why)))
            }
            Command::Build(change) => self.change_build(at, change),
        }
    }

    fn replace_template(&mut self, at: Stamp, mut template: Template) -> Applied {
        let known = self.template(&template.name);
        template.created_at = known.map_or(at, |known| known.created_at);
        if known == Some(&template) {
            return Applied::untouched(Ok(Receipt::Done(1)));
        }
        let mut touched = vec![RowKey::Template(template.name.clone())];
        self.put_template(template);
        touched.extend(self.retire_warm());
        Applied {
            answer: Ok(Receipt::Done(1)),
            touched,
        }
    }
}

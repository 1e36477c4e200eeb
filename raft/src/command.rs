//! Every change there is.
//!
//! A command names what it creates by an id that the proposer chose, so proposing it again after
//! a lost answer finds the first one's work and answers the same: no command acts twice.

use std::collections::BTreeMap;

use proto::epoch::Epoch;
use proto::ids::{
    BuildId, ChannelId, ClusterId, KeyId, NodeId, SandboxId, SnapshotId, TeamId, TokenId, UserId,
};
use proto::units::Stamp;

use crate::placement::{Lack, LoadHint};
use crate::state::{
    Actor, Build, BuildStatus, Channel, Checkpoint, EventId, GuestVersions, Key, Liveness, Member,
    Node, SandboxSpec, Sealed, Settings, Snapshot, Team, Template, Token,
};

/// A command and the proposer's clock when it was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proposal {
    /// The proposer's wall clock. The state machine has none of its own.
    pub at: Stamp,
    /// What to do.
    pub command: Command,
}

/// One change of the replicated state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Names the cluster, once.
    FoundCluster {
        /// Chosen by the founder.
        id: ClusterId,
        /// What the founder was told.
        settings: Settings,
    },
    /// The cluster lost its quorum for good and goes on from one survivor, which proposes this first
    /// of all: under a new id, and without the keys of those that were declared lost. Their rows
    /// stay, cordoned, until their leases are over and the leader removes them.
    RecoverCluster {
        /// Chosen by the survivor.
        id: ClusterId,
        /// The survivor's last entry before it was made the only voter.
        last: u64,
        /// Who is dead for good.
        lost: Vec<NodeId>,
    },
    /// Replaces what operators set for all nodes.
    PutSettings(Settings),
    /// Adds a join token.
    PutToken(Token),
    /// Withdraws a join token.
    RevokeToken(TokenId),
    /// Lets a node in by a token, whose use is burned by the same entry; the node's id becomes the
    /// index of this entry, whatever the record says.
    RedeemToken {
        /// By which token. Whoever proposes this has checked the proof of its secret.
        token: TokenId,
        /// The joiner.
        node: Node,
    },
    /// The first node, or what a node that is known says of itself: addresses, capacity,
    /// versions, templates. What operators and the leader decided about it stays, its tags too.
    AdmitNode(Node),
    /// What an operator decided about a node; `None` leaves things as they are.
    ChangeNode {
        /// Which one.
        node: NodeId,
        /// Whether it takes new sandboxes.
        cordoned: Option<bool>,
        /// Whether it is being emptied.
        draining: Option<bool>,
        /// All of its tags.
        tags: Option<BTreeMap<String, String>>,
    },
    /// What the leader found out about a node's lease. The leader alone proposes it, to itself and
    /// never by way of another: once it is deposed, its verdict may be older than a renewal that
    /// its successor has answered.
    JudgeNode {
        /// Which one.
        node: NodeId,
        /// Which start of its daemon; a verdict about an earlier one changes nothing.
        incarnation: u64,
        /// The verdict; its instant is that of the proposal.
        verdict: Verdict,
    },
    /// Takes a node out. Its key never comes back.
    RemoveNode {
        /// Which one.
        node: NodeId,
        /// A person says that the host is dead for good: what it had is given up.
        declared_dead: bool,
    },
    /// Adds a template or replaces the one of that name.
    PutTemplate(Template),
    /// Adds an API key.
    PutKey(Key),
    /// Makes a key useless at once and for ever.
    RevokeKey(KeyId),
    /// Places a new sandbox and gives its ownership out.
    CreateSandbox {
        /// Chosen by the proposer.
        id: SandboxId,
        /// Whose it is.
        team: TeamId,
        /// What it asks for.
        spec: SandboxSpec,
        /// How busy nodes were when the proposer last heard; placement's second thought.
        hints: Vec<LoadHint>,
    },
    /// What its team decided about the ways into a sandbox; `None` leaves things as they are.
    ChangeSandbox {
        /// Which one.
        id: SandboxId,
        /// Whether its ports may be visited without a key.
        ports_open: Option<bool>,
        /// Whether a visit resumes it.
        wakes: Option<bool>,
    },
    /// Somebody is given a link to a port, which whoever has it may visit. Links are words that nodes check by
    /// themselves: this is for the audit log alone, and the same link is kept there once.
    LinkSandbox {
        /// Which one.
        id: SandboxId,
        /// Which port of it.
        port: u16,
        /// When the link ends.
        until: Stamp,
    },
    /// From now on the sandbox is wanted stopped.
    StopSandbox {
        /// Which one.
        id: SandboxId,
        /// Who wanted it.
        cause: StopCause,
    },
    /// From now on the sandbox is wanted paused.
    PauseSandbox {
        /// Which one.
        id: SandboxId,
        /// Which run of it; a later one is not meant.
        epoch: Epoch,
        /// Who wanted it.
        cause: StopCause,
        /// Where it shall go on once it is sealed; `None` leaves it paused.
        then_on: Option<NodeId>,
    },
    /// Gives a paused sandbox out again, to whichever node resumes it best.
    ResumeSandbox {
        /// Which one.
        id: SandboxId,
        /// What it rests as; a later pause is not meant.
        snapshot: SnapshotId,
        /// The only node that will do; `None` leaves the choice.
        to: Option<NodeId>,
        /// How busy nodes were when the proposer last heard.
        hints: Vec<LoadHint>,
    },
    /// Seals a running sandbox, which goes on then, or takes what a paused one rests as: for a name,
    /// or for others that start from it. Proposed again it is known by its ask.
    CheckpointSandbox(CheckpointSandbox),
    /// Takes a name off a snapshot.
    DropNamed(DropNamed),
    /// A node has sealed a guest that had just booted, for others to start from: [`Snapshot::warm`].
    PutWarm(Snapshot),
    /// A node could not start anything from a snapshot that is kept warm: nobody does any more, and the
    /// next guest that boots is kept in its place.
    RetireWarm(SnapshotId),
    /// Whether a node has all of a snapshot; that node proposes it.
    HoldSnapshot {
        /// Which one.
        id: SnapshotId,
        /// Who.
        node: NodeId,
        /// Whether it has it, or has it no more.
        holds: bool,
    },
    /// What the owner saw.
    ReportSandbox {
        /// Which one.
        id: SandboxId,
        /// Under which ownership it was seen.
        epoch: Epoch,
        /// Who saw it.
        node: NodeId,
        /// What was seen.
        report: Report,
    },
    /// Adds a channel, or replaces what its team says of it: how far it has been told stays.
    PutChannel(Channel),
    /// Takes a channel away.
    DropChannel {
        /// Whose.
        team: TeamId,
        /// Which one.
        id: ChannelId,
    },
    /// How far a channel has been told.
    TellChannel(TellChannel),
    /// Forgets sandboxes that ended before an instant.
    PruneSandboxes {
        /// Everything that ended earlier goes.
        ended_before: Stamp,
    },
    /// When keys were used last, as one node saw it; later uses win.
    NoteKeyUses(Vec<(KeyId, Stamp)>),
    /// Adds a team, or gives it another name.
    PutTeam(Team),
    /// Removes a team that has nothing any more, with its members; its keys are revoked.
    DropTeam(TeamId),
    /// Adds a member to a team, or changes the member's role and name.
    PutMember(Member),
    /// Takes a member out of a team, and revokes the keys held.
    DropMember {
        /// Of which team.
        team: TeamId,
        /// Whom.
        user: UserId,
    },
    /// Something about the building of a template.
    Build(BuildChange),
    /// A change that somebody asked for. The audit log keeps who.
    By(Attributed),
}

impl Command {
    /// What is to be done, whoever asked for it.
    #[must_use]
    pub fn change(&self) -> &Self {
        match self {
            Self::By(attributed) => &attributed.change,
            change => change,
        }
    }

    /// Whether nodes of releases before the audit log stop at it.
    #[must_use]
    pub fn needs_readers(&self) -> bool {
        match self {
            Self::PutKey(key) => !key.is_plain(),
            Self::NoteKeyUses(_)
            | Self::PutTeam(_)
            | Self::DropTeam(_)
            | Self::PutMember(_)
            | Self::DropMember { .. }
            | Self::PutChannel(_)
            | Self::DropChannel { .. }
            | Self::TellChannel(_)
            | Self::LinkSandbox { .. }
            | Self::Build(_)
            | Self::By(_) => true,
            _ => false,
        }
    }
}

/// A change and who asked for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attributed {
    /// Who asked.
    pub actor: Actor,
    /// For what. Nothing that names somebody itself.
    pub change: Box<Command>,
}

/// How far a channel has been told, by whoever leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TellChannel {
    /// Which one.
    pub id: ChannelId,
    /// Where it stood; where it stands elsewhere, nothing happens.
    pub from: EventId,
    /// Where it stands.
    pub upto: EventId,
    /// How many of the events between were delivered.
    pub delivered: u32,
    /// How many were given up.
    pub given_up: u32,
    /// Why the last try failed; empty where it did not.
    pub failure: String,
}

/// A change of the building of a template. All but the first and the last name the attempt they come
/// from: what an owner says that was replaced is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BuildChange {
    /// Puts it on record; proposed again it is known by its id and what it asks for.
    Start(Box<Build>),
    /// A node takes it up: its owner when it begins or has begun anew, another one when the owner is away.
    Claim {
        /// Which one.
        id: BuildId,
        /// The attempt that is over; 0 where there was none.
        attempt: u32,
        /// Who takes it up.
        node: NodeId,
    },
    /// How far it is, and what there is to add to its log.
    Progress {
        /// Which one.
        id: BuildId,
        /// Whose word it is.
        attempt: u32,
        /// What is being done.
        phase: String,
        /// The step that is under way, from 1; 0 before the first.
        step: u32,
        /// The sandbox it is built in.
        sandbox: Option<SandboxId>,
        /// Lines for the log.
        log: Vec<u8>,
    },
    /// It is over: its sandbox is stopped.
    End(BuildEnd),
    /// Whoever asked for it does not want it any more.
    Cancel(BuildId),
}

/// How the building of a template ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildEnd {
    /// Which one.
    pub id: BuildId,
    /// Whose word it is.
    pub attempt: u32,
    /// Success or failure.
    pub status: BuildStatus,
    /// Why it failed, for people.
    pub error: String,
    /// The user of whatever starts from it.
    pub default_user: String,
    /// Its environment.
    pub default_env: BTreeMap<String, String>,
    /// Lines for the log.
    pub log: Vec<u8>,
}

/// Of which sandbox a checkpoint is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointSandbox {
    /// Which one.
    pub id: SandboxId,
    /// Which run of it, or the run before its rest.
    pub epoch: Epoch,
    /// What for.
    pub checkpoint: Checkpoint,
    /// How busy nodes were when the proposer last heard.
    pub hints: Vec<LoadHint>,
}

/// Which name is to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DropNamed {
    /// Whose name.
    pub team: TeamId,
    /// Which.
    pub name: String,
    /// What it stands for; where it has come to stand for another, nothing happens.
    pub snapshot: SnapshotId,
}

/// What the leader found out about a node's lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is renewed again. Of a lost node nothing: that comes back by [`Command::AdmitNode`].
    Back,
    /// It has run out.
    Missing,
    /// It ran out so long ago that the node has killed what was bound to it.
    Lost,
}

impl Verdict {
    /// The liveness it leads to from `known`, at `at`.
    #[must_use]
    pub fn applied_to(self, known: Liveness, at: Stamp) -> Liveness {
        let since = known.since().unwrap_or(at);
        match self {
            Self::Back => Liveness::Alive,
            Self::Missing => Liveness::Missing { since },
            Self::Lost => Liveness::Lost { since },
        }
    }
}

/// Why a sandbox is to be stopped or paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopCause {
    /// A client asked.
    Asked,
    /// Its inactivity timeout passed.
    Idle,
}

impl StopCause {
    /// What the record says of it; nothing where it was asked for.
    #[must_use]
    pub const fn in_words(self) -> &'static str {
        match self {
            Self::Asked => "",
            Self::Idle => "inactivity timeout passed",
        }
    }
}

/// What the owner of a sandbox saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// Everything is ready for the guest's first instruction, which the answer allows: from then on
    /// nobody else gets the sandbox because its node is away.
    Begins,
    /// The guest answered and is ready for work.
    Running(GuestVersions),
    /// Everything it used is released; `reason` is empty when a stop was asked for.
    Stopped {
        /// Why it ended, for people.
        reason: String,
    },
    /// It could not be started, or it broke; everything it used is released.
    Failed {
        /// What broke, for people.
        reason: String,
    },
    /// It was sealed: it can be had back from here, whatever becomes of the guest.
    Sealed(Sealed),
    /// It could not be sealed, and its guest goes on.
    Thawed {
        /// What was in the way, for people.
        reason: String,
    },
}

/// What applying a command gave.
pub type Answer = Result<Receipt, Refusal>;

/// A command that was carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Receipt {
    /// Done; the count of objects it touched where that is of interest.
    Done(u64),
    /// The sandbox belongs to this node under this epoch.
    Placed {
        /// The owner.
        node: NodeId,
        /// Its fencing token.
        epoch: Epoch,
    },
    /// The node was let in under this id.
    Admitted(NodeId),
}

/// A command that does not fit the state it met. Nothing was changed, but see [`Self::Unreadable`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The answer is of another version. Alone of all refusals it leaves open what was changed.
    #[error(
        "the answer could not be read ({0}), so the change may have been made; look before trying \
         again, and bring all nodes to one version"
    )]
    Unreadable(String),
    /// No sandbox of that id.
    #[error("no capsule {0}")]
    NoSuchSandbox(String),
    /// No snapshot of that id.
    #[error("no snapshot {0}")]
    NoSuchSnapshot(String),
    /// No template of that name.
    #[error("no template {0:?}")]
    NoSuchTemplate(String),
    /// No key of that id.
    #[error("no API key {0}")]
    NoSuchKey(String),
    /// No team of that id.
    #[error("no team {0}")]
    NoSuchTeam(String),
    /// No member of that id.
    #[error("no member {0}")]
    NoSuchMember(String),
    /// No node has room for it.
    #[error("no host can take this capsule: {0}")]
    NoRoom(Lack),
    /// No node of that id.
    #[error("no node {0}")]
    NoSuchNode(String),
    /// No join token of that id.
    #[error("no join token {0}: it was withdrawn or forgotten, or is another cluster's")]
    NoSuchToken(String),
    /// The join token came too late.
    #[error("the join token {0} has expired; create a new one with `wrenn token create`")]
    TokenExpired(String),
    /// The join token has no uses left.
    #[error("the join token {0} is used up; create a new one with `wrenn token create`")]
    TokenUsed(String),
    /// It does not fit how things stand; the text says what does.
    #[error("{0}")]
    Unfit(String),
    /// No build of that id.
    #[error("no build {0}")]
    NoSuchBuild(String),
    /// The team has given the name to something else.
    #[error("the name {0:?} is taken")]
    NameTaken(String),
    /// The id stands for something else already.
    #[error("the id {0} is taken")]
    IdTaken(String),
    /// The effect was made under an ownership that is no longer the newest.
    #[error("epoch is over; the newest is {newest}")]
    Fenced {
        /// The epoch that now counts.
        newest: Epoch,
    },
}

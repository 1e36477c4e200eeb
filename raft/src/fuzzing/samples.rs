//! Bytes as this crate writes them, from which damaged ones are made.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;

use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, TransferLeaderRequest, VoteRequest, VoteResponse,
};
use prost::Message as _;
use proto::epoch::Epoch;
use proto::fuzzing::scratch;
use proto::ids::{
    BuildId, ClusterId, KeyId, NodeId, NodeKey, SandboxId, SnapshotId, TeamId, TokenId, UserId,
};
use proto::units::{Mib, Stamp};
use proto::wire::raftlog as pb;

use crate::codec;
use crate::command::{
    Attributed, BuildChange, BuildEnd, Command, Proposal, Receipt, Refusal, Report, StopCause,
    Verdict,
};
use crate::derived;
use crate::disk::RealDisk;
use crate::peer::{self, Envelope};
use crate::snapshot::Snapshots;
use crate::state::{
    Actor, Build, BuildSpec, BuildStatus, GuestVersions, HostLoss, Key, Member, Needs, Node,
    Resources, Role, SandboxSpec, Scope, SealTimes, Sealed, Settings, State, Team, Template, Token,
};
use crate::types::{DiskId, Entry, LogId, SnapshotMeta, Vote};
use crate::wire;

/// The last entry of [`founded`].
pub(super) const FOUNDED_AT: u64 = 3;

const SANDBOX: SandboxId = SandboxId([0x51; 16]);
const SNAPSHOT: SnapshotId = SnapshotId([0x52; 16]);
const TOKEN: TokenId = TokenId([0x53; 16]);

/// A cluster of one node with one template.
pub(super) fn founded() -> State {
    let mut state = State::default();
    let founding = [found(), Command::AdmitNode(node(1)), template()];
    for (at, command) in founding.into_iter().enumerate() {
        let applied = state.apply(at as u64 + 1, at_noon(command));
        assert!(applied.answer.is_ok(), "{:?}", applied.answer);
    }
    state
}

fn at_noon(command: Command) -> Proposal {
    Proposal {
        at: Stamp(1_700_000_000_000),
        command,
    }
}

fn found() -> Command {
    Command::FoundCluster {
        id: ClusterId([0xc1; 16]),
        settings: Settings::default(),
    }
}

fn template() -> Command {
    Command::PutTemplate(Template {
        name: "minimal".into(),
        digest: [1; 32],
        disk: Mib(512),
        size_bytes: 300 << 20,
        created_at: Stamp(0),
    })
}

fn node(n: u8) -> Node {
    Node {
        id: NodeId(1),
        name: format!("host{n}"),
        key: NodeKey([n; 32]),
        api_url: format!("http://10.0.0.{n}:7320"),
        cluster_address: format!("10.0.0.{n}:7321"),
        bulk_address: format!("10.0.0.{n}:7322"),
        disk: [n; 16],
        capacity: Resources {
            vcpus: 8,
            memory: Mib(4096),
            disk: Mib(40_960),
            sandboxes: 10,
        },
        vmm: "qemu".into(),
        machine: "q35/1".into(),
        cpu: "tcg-1".into(),
        version: "0.1.0".into(),
        incarnation: 1,
        tags: BTreeMap::from([("zone".into(), "a".into())]),
        templates: BTreeMap::from([("minimal".into(), [1; 32])]),
        ..Node::default()
    }
}

fn spec() -> SandboxSpec {
    SandboxSpec {
        template: "minimal".into(),
        vcpus: 1,
        memory: Mib(256),
        disk: Mib(512),
        on_host_loss: HostLoss::Restart,
        ..SandboxSpec::default()
    }
}

fn report(epoch: u64, report: Report) -> Command {
    Command::ReportSandbox {
        id: SANDBOX,
        epoch: Epoch(epoch),
        node: NodeId(1),
        report,
    }
}

fn sealed() -> Report {
    Report::Sealed(Sealed {
        id: SNAPSHOT,
        digest: [3; 32],
        memory_bytes: 64 << 20,
        disk_bytes: 1 << 20,
        new_bytes: 9 << 20,
        needs: Needs {
            vmm: "qemu".into(),
            machine: "q35/1".into(),
            cpu: "tcg-1".into(),
            base: [1; 32],
        },
        pause: FOUNDED_AT + 3,
        took: SealTimes {
            quiesce_ms: 5,
            save_ms: 20,
            store_ms: 300,
        },
    })
}

/// A sandbox from its creation through a pause and a resume to its end.
fn life() -> Vec<Command> {
    let created = FOUNDED_AT + 1;
    let resumed = created + 4;
    vec![
        Command::CreateSandbox {
            id: SANDBOX,
            team: TeamId([0; 16]),
            spec: spec(),
            hints: vec![],
        },
        report(created, Report::Running(GuestVersions::default())),
        Command::PauseSandbox {
            id: SANDBOX,
            epoch: Epoch(created),
            cause: StopCause::Asked,
            then_on: None,
        },
        report(created, sealed()),
        Command::ResumeSandbox {
            id: SANDBOX,
            snapshot: SNAPSHOT,
            to: Some(NodeId(1)),
            hints: vec![],
        },
        report(resumed, Report::Running(GuestVersions::default())),
        Command::HoldSnapshot {
            id: SNAPSHOT,
            node: NodeId(1),
            holds: true,
        },
        Command::ChangeSandbox {
            id: SANDBOX,
            ports_open: Some(true),
            wakes: None,
        },
        Command::StopSandbox {
            id: SANDBOX,
            cause: StopCause::Asked,
        },
        report(
            resumed,
            Report::Stopped {
                reason: "why".into(),
            },
        ),
        Command::PruneSandboxes {
            ended_before: Stamp(u64::MAX),
        },
    ]
}

/// A template that is built.
fn building() -> Vec<Command> {
    let id = BuildId([0xb1; 16]);
    let build = Build {
        id,
        owner: NodeId(FOUNDED_AT + 1),
        spec: BuildSpec {
            name: "mine".into(),
            recipe: vec!["RUN true".into()],
            files: vec![vec![]],
            ..BuildSpec::default()
        },
        ..Build::default()
    };
    let changes = [
        BuildChange::Start(Box::new(build)),
        BuildChange::Claim {
            id,
            attempt: 0,
            node: NodeId(FOUNDED_AT + 1),
        },
        BuildChange::Progress {
            id,
            attempt: 1,
            phase: "recipe".into(),
            step: 1,
            sandbox: Some(SandboxId([2; 16])),
            log: b"{}\n".to_vec(),
        },
        BuildChange::End(BuildEnd {
            id,
            attempt: 1,
            status: BuildStatus::Failed,
            error: "why".into(),
            default_user: "root".into(),
            default_env: BTreeMap::from([("A".into(), "1".into())]),
            log: vec![],
        }),
        BuildChange::Cancel(id),
    ];
    changes.map(Command::Build).into()
}

/// Nodes that come, are looked after, and go.
fn fleet() -> Vec<Command> {
    let second = NodeId(FOUNDED_AT + 2);
    vec![
        Command::PutToken(token()),
        Command::RedeemToken {
            token: TOKEN,
            node: node(2),
        },
        Command::ChangeNode {
            node: second,
            cordoned: Some(true),
            draining: Some(true),
            tags: Some(BTreeMap::from([("disk".into(), "fast".into())])),
        },
        Command::JudgeNode {
            node: second,
            incarnation: second.0,
            verdict: Verdict::Missing,
        },
        Command::JudgeNode {
            node: second,
            incarnation: second.0,
            verdict: Verdict::Lost,
        },
        Command::RemoveNode {
            node: second,
            declared_dead: true,
        },
        Command::RevokeToken(TOKEN),
        Command::RevokeKey(KeyId([4; 16])),
        Command::PutSettings(Settings::default()),
        Command::RecoverCluster {
            id: ClusterId([0xc2; 16]),
            last: 7,
            lost: vec![second],
        },
    ]
}

/// A team that comes, has people and keys, and goes.
fn people() -> Vec<Command> {
    let (team, user, key) = (TeamId([0x61; 16]), UserId([0x62; 16]), KeyId([0x63; 16]));
    let asked = |change| {
        Command::By(Attributed {
            actor: Actor::Key {
                id: key,
                name: "a person's".into(),
                holder: Some(user),
                address: "10.0.0.7".into(),
            },
            change: Box::new(change),
        })
    };
    vec![
        asked(Command::PutTeam(Team {
            id: team,
            name: "Acme".into(),
            slug: "012345-6789ab".into(),
            created_at: Stamp(0),
        })),
        asked(Command::PutMember(Member {
            team,
            user,
            email: "a@example.com".into(),
            name: "A".into(),
            role: Role::Owner,
            joined_at: Stamp(0),
        })),
        asked(Command::PutKey(Key {
            id: key,
            team,
            hash: [8; 32],
            scope: Scope::Run,
            expires_at: Some(Stamp(u64::MAX)),
            holder: Some(user),
            ..Key::default()
        })),
        Command::NoteKeyUses(vec![(key, Stamp(9))]),
        asked(Command::DropMember { team, user }),
        asked(Command::DropTeam(team)),
    ]
}

fn token() -> Token {
    Token {
        id: TOKEN,
        public_key: [7; 32],
        team: None,
        expires_at: Stamp(u64::MAX),
        uses_left: 2,
        created_at: Stamp(0),
        created_by: "a person".into(),
        revoked: false,
        redeemed: vec![],
    }
}

pub(super) fn proposals() -> Vec<Vec<u8>> {
    let all = [found(), Command::AdmitNode(node(1)), template()];
    let all = all
        .into_iter()
        .chain(life())
        .chain(fleet())
        .chain(people())
        .chain(building());
    all.map(|command| at_noon(command).encode()).collect()
}

/// Whole histories, each proposal behind its length.
pub(super) fn histories() -> Vec<Vec<u8>> {
    [life(), fleet(), people(), building()].map(history).into()
}

fn history(commands: Vec<Command>) -> Vec<u8> {
    let proposals = commands.into_iter().map(at_noon);
    let framed = proposals.flat_map(|proposal| {
        let bytes = proposal.encode();
        let length = u16::try_from(bytes.len()).expect("a small proposal");
        [length.to_le_bytes().to_vec(), bytes].concat()
    });
    framed.collect()
}

/// The state after both histories.
fn state() -> State {
    let mut state = founded();
    let commands = life()
        .into_iter()
        .take(6)
        .chain(fleet().into_iter().take(4))
        .chain(people().into_iter().take(4));
    for (at, command) in commands.enumerate() {
        state.apply(FOUNDED_AT + 1 + at as u64, at_noon(command));
    }
    state
}

pub(super) fn answers() -> Vec<Vec<u8>> {
    let answers = [
        Ok(Receipt::Done(3)),
        Ok(Receipt::Admitted(NodeId(9))),
        Ok(Receipt::Placed {
            node: NodeId(1),
            epoch: Epoch(7),
        }),
        Err(Refusal::NoSuchTemplate("minimal".into())),
        Err(Refusal::Fenced { newest: Epoch(8) }),
    ];
    answers.iter().map(wire::encode_answer).collect()
}

pub(super) fn node_rows() -> Vec<Vec<u8>> {
    vec![wire::encode_node(&node(1))]
}

/// CRC-32C as files here end with it.
pub(super) fn checksum(body: &[u8]) -> [u8; 4] {
    crc32c::crc32c(body).to_le_bytes()
}

fn log_id(index: u64) -> LogId {
    codec::log_id_from_wire(&pb::LogId {
        term: 2,
        leader: 1,
        index,
    })
}

fn vote() -> Vote {
    codec::vote_from_wire(&pb::Vote {
        term: 2,
        node: 1,
        committed: true,
    })
}

fn membership() -> pb::Membership {
    pb::Membership {
        configs: vec![pb::Voters { ids: vec![1] }],
        members: vec![pb::Member {
            id: 1,
            node: Some(pb::Node {
                address: "10.0.0.1:7321".into(),
                key: vec![1; 32],
                disk: vec![2; 16],
            }),
        }],
    }
}

fn meta() -> SnapshotMeta {
    let head = pb::SnapshotHead {
        last_applied: Some(codec::log_id_to_wire(&log_id(13))),
        membership: Some(pb::StoredMembership {
            log_id: Some(codec::log_id_to_wire(&log_id(1))),
            membership: Some(membership()),
        }),
    };
    crate::snapshot::meta(head).expect("a sound head")
}

pub(super) fn snapshot_files() -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir_in(scratch()).expect("a directory");
    let opened = Snapshots::open(dir.path(), Arc::new(RealDisk));
    let (snapshots, _) = opened.expect("an empty directory");
    let written = snapshots.write(&meta(), state().rows()).expect("written");
    vec![fs::read(written.path).expect("just written")]
}

pub(super) fn derived_parts() -> Vec<Vec<u8>> {
    let rows = state().rows().collect::<Vec<_>>();
    let sound = rows.into_iter().map(|(key, value)| {
        let short = &key[..key.len().min(8)];
        let crc = derived::checksum(b'r', short, &value).to_be_bytes();
        let count = u16::try_from((value.len() + 6).div_ceil(40)).unwrap_or(0);
        [short, &count.to_be_bytes(), &crc, &value].concat()
    });
    sound.collect()
}

fn to() -> Envelope {
    Envelope {
        sender: 1,
        target_disk: DiskId([2; 16]),
    }
}

fn entries() -> Vec<Entry> {
    use pb::entry::Payload;
    let payloads = [
        Payload::Blank(pb::Blank {}),
        Payload::Proposal(at_noon(template()).encode()),
        Payload::Membership(membership()),
    ];
    let entries = payloads.into_iter().zip(1..).map(|(payload, index)| {
        let entry = pb::Entry {
            log_id: Some(codec::log_id_to_wire(&log_id(index))),
            payload: Some(payload),
        };
        codec::entry_from_wire(entry).expect("a sound entry")
    });
    entries.collect()
}

pub(super) fn peer_requests() -> Vec<Vec<u8>> {
    let entries = entries();
    let wires = entries.iter().map(codec::entry_to_wire);
    let mut all: Vec<_> = wires.map(|wire| wire.encode_to_vec()).collect();
    let append = AppendEntriesRequest {
        vote: vote(),
        prev_log_id: Some(log_id(3)),
        entries,
        leader_commit: Some(log_id(2)),
    };
    all.extend([
        peer::append_request(to(), &append),
        peer::vote_request(to(), &VoteRequest::new(vote(), Some(log_id(3))), false),
        peer::transfer_request(
            to(),
            &TransferLeaderRequest::new(vote(), 2, Some(log_id(3))),
        ),
        peer::snapshot_offer(to(), &vote(), &meta()),
    ]);
    all
}

pub(super) fn peer_answers() -> Vec<Vec<u8>> {
    vec![
        peer::answer_append(&AppendEntriesResponse::PartialSuccess(Some(log_id(3)))),
        peer::answer_append(&AppendEntriesResponse::HigherVote(vote())),
        peer::answer_vote(&VoteResponse::new(vote(), Some(log_id(3)), true)),
        peer::answer_transfer(&Ok(())),
        peer::answer_snapshot(&vote()),
        peer::answer_stopped("why".into()),
        peer::answer_other_disk(DiskId([9; 16])),
    ]
}

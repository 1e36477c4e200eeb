//! Histories: what is asked for in the life of a sandbox, a node, a team, a channel, a snapshot and a build.

use std::collections::BTreeMap;

use proto::epoch::Epoch;
use proto::ids::{
    BuildId, ChannelId, ClusterId, KeyId, NodeId, SandboxId, SnapshotId, TeamId, TokenId, UserId,
};
use proto::units::{Mib, Stamp};

use super::{FOUNDED_AT, node};
use crate::command::{
    Attributed, BuildChange, BuildEnd, CheckpointSandbox, Command, DropNamed, Report, StopCause,
    TellChannel, Verdict,
};
use crate::state::{
    Actor, Build, BuildSpec, BuildStatus, Channel, Checkpoint, EventId, GuestVersions, HostLoss,
    Key, Member, Needs, Purpose, Role, SandboxSpec, Scope, SealTimes, Sealed, Settings, Snapshot,
    SnapshotKind, Team, Token, Warm,
};

const SANDBOX: SandboxId = SandboxId([0x51; 16]);
const SNAPSHOT: SnapshotId = SnapshotId([0x52; 16]);
const TOKEN: TokenId = TokenId([0x53; 16]);

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

fn seal() -> Sealed {
    Sealed {
        id: SNAPSHOT,
        digest: [3; 32],
        kind: SnapshotKind::Snapshot,
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
    }
}

/// A sandbox from its creation through a pause and a resume to its end.
pub(super) fn life() -> Vec<Command> {
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
        report(created, Report::Sealed(seal())),
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
        Command::LinkSandbox {
            id: SANDBOX,
            port: 8080,
            until: Stamp(u64::MAX),
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
pub(super) fn building() -> Vec<Command> {
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
pub(super) fn fleet() -> Vec<Command> {
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
pub(super) fn people() -> Vec<Command> {
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

/// A channel of the platform's that is told of the node's coming, and goes.
pub(super) fn channels() -> Vec<Command> {
    let (team, id) = (TeamId([0; 16]), ChannelId([0x71; 16]));
    let channel = Channel {
        id,
        team,
        name: "ops".into(),
        url: "https://example.com/hook".into(),
        secret: "whsec".into(),
        kinds: ["host.up".into()].into(),
        enabled: true,
        ..Channel::default()
    };
    let first = EventId {
        index: FOUNDED_AT + 1,
        part: 0,
    };
    vec![
        by_platform(Command::PutChannel(channel)),
        Command::TellChannel(TellChannel {
            id,
            from: EventId::FIRST,
            upto: first,
            delivered: 1,
            given_up: 2,
            failure: "answered 503".into(),
        }),
        Command::DropChannel { team, id },
    ]
}

fn by_platform(change: Command) -> Command {
    Command::By(Attributed {
        actor: Actor::Key {
            id: KeyId([4; 16]),
            name: "bootstrap".into(),
            holder: None,
            address: "::1".into(),
        },
        change: Box::new(change),
    })
}

fn failed(epoch: u64, node: NodeId) -> Command {
    Command::ReportSandbox {
        id: SANDBOX,
        epoch: Epoch(epoch),
        node,
        report: Report::Failed {
            reason: "no memory".into(),
        },
    }
}

/// Snapshots: kept warm, named, forked from, and a resume that fails on one host and goes to the next. On record
/// from the first change on, so that usage and events come of it.
pub(super) fn copies() -> Vec<Command> {
    let second = NodeId(FOUNDED_AT + 2);
    let created = FOUNDED_AT + 3;
    let sealed = seal();
    let paused = Sealed {
        pause: created + 2,
        ..sealed.clone()
    };
    let [name, fork] = checkpoints(created);
    vec![
        by_platform(Command::PutToken(token())),
        Command::RedeemToken {
            token: TOKEN,
            node: node(2),
        },
        by_platform(Command::CreateSandbox {
            id: SANDBOX,
            team: TeamId([0; 16]),
            spec: SandboxSpec {
                on_node: Some(NodeId(1)),
                asked_template: "minimal-ubuntu".into(),
                ..spec()
            },
            hints: vec![],
        }),
        report(created, Report::Running(GuestVersions::default())),
        Command::PauseSandbox {
            id: SANDBOX,
            epoch: Epoch(created),
            cause: StopCause::Idle,
            then_on: None,
        },
        report(created, Report::Sealed(paused)),
        Command::HoldSnapshot {
            id: SNAPSHOT,
            node: second,
            holds: true,
        },
        name,
        fork,
        Command::ResumeSandbox {
            id: SANDBOX,
            snapshot: SNAPSHOT,
            to: None,
            hints: vec![],
        },
        // Whichever has it: the other's word is refused.
        failed(created + 7, NodeId(1)),
        failed(created + 7, second),
        Command::PutWarm(warm(sealed)),
        Command::RetireWarm(SnapshotId([0x56; 16])),
        Command::DropNamed(DropNamed {
            team: TeamId([0; 16]),
            name: "mine".into(),
            snapshot: SNAPSHOT,
        }),
    ]
}

/// A capsule is given a name's snapshot, and one to fork from.
fn checkpoints(created: u64) -> [Command; 2] {
    let checkpoint = |ask, purpose| {
        Command::CheckpointSandbox(CheckpointSandbox {
            id: SANDBOX,
            epoch: Epoch(created),
            checkpoint: Checkpoint {
                ask: SnapshotId([ask; 16]),
                purpose,
            },
            hints: vec![],
        })
    };
    let name = Purpose::Name {
        name: "mine".into(),
        kind: SnapshotKind::Snapshot,
        overwrite: true,
        metadata: BTreeMap::from([("a".into(), "b".into())]),
    };
    let fork = Purpose::Fork {
        ids: vec![SandboxId([0x59; 16])],
    };
    [checkpoint(0x54, name), checkpoint(0x55, fork)]
}

/// What a node keeps warm of a template.
fn warm(sealed: Sealed) -> Snapshot {
    Snapshot {
        sealed: Sealed {
            id: SnapshotId([0x56; 16]),
            ..sealed
        },
        team: TeamId([0; 16]),
        sandbox: SANDBOX,
        epoch: Epoch(1),
        sealed_by: NodeId(1),
        sealed_at: Stamp(0),
        holders: [NodeId(1)].into(),
        warm: Some(Warm {
            vcpus: 1,
            memory: Mib(256),
            disk: Mib(512),
            version: "0.1.0".into(),
            guest: "6.1".into(),
            retired: false,
        }),
    }
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

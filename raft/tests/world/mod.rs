//! A state driven as the log drives it, for the tests of the state machine.

#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "each test file uses a part of it"
)]

pub mod history;
pub mod people;
pub mod promises;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::epoch::Epoch;
use proto::ids::{ClusterId, NodeId, NodeKey, SandboxId, SnapshotId, TeamId, TokenId};
use proto::units::{Mib, Stamp};
use wrenn_raft::apply::Applied;
use wrenn_raft::command::{
    Answer, CheckpointSandbox, Command, Proposal, Receipt, Report, StopCause, Verdict,
};
use wrenn_raft::state::{
    Checkpoint, GuestVersions, HostLoss, Named, Needs, Node, Purpose, Resources, Sandbox,
    SandboxSpec, SealTimes, Sealed, Settings, Snapshot, SnapshotKind, State, Template, Token, Warm,
};

pub const FOUNDER: NodeId = NodeId(1);
pub const TEAM: TeamId = TeamId([0; 16]);
/// Far from zero, so that clocks can be behind.
const START_MS: u64 = 1_000_000_000;
pub const HOUR_MS: u64 = 3_600_000;

/// Bytes that look like nothing else: no two of a kind and number are alike.
pub fn mark<const N: usize>(kind: u8, number: u8) -> [u8; N] {
    let mut seed = u64::from_be_bytes([kind, number, 0x9e, 0x37, kind, 0x79, number, 0xb9]);
    std::array::from_fn(|_| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        seed.to_be_bytes()[0]
    })
}

pub fn sandbox_id(n: u8) -> SandboxId {
    SandboxId(mark(b's', n))
}

pub fn snapshot_id(n: u8) -> SnapshotId {
    SnapshotId(mark(b'z', n))
}

/// A snapshot as a node reports it; one that does not fit needs a hypervisor that nobody has.
pub fn sealed(n: u8, fits: bool) -> Sealed {
    let known = node(1);
    Sealed {
        id: snapshot_id(n),
        digest: mark(b'm', n),
        kind: SnapshotKind::Snapshot,
        memory_bytes: 64 << 20,
        disk_bytes: 1 << 20,
        new_bytes: 9 << 20,
        needs: Needs {
            vmm: if fits { known.vmm } else { "another".into() },
            machine: known.machine,
            cpu: known.cpu,
            base: [1; 32],
        },
        pause: 0,
        took: SealTimes {
            quiesce_ms: 20,
            save_ms: 30,
            store_ms: 400,
        },
    }
}

/// What a node made of a guest that had just booted with this much memory.
pub fn warm(n: u8, by: NodeId, memory: u32) -> Snapshot {
    let spec = waiting(memory);
    Snapshot {
        sealed: sealed(n, true),
        team: TEAM,
        sandbox: sandbox_id(n),
        epoch: Epoch(1),
        sealed_by: by,
        sealed_at: Stamp(0),
        holders: BTreeSet::from([by]),
        warm: Some(Warm {
            vcpus: spec.vcpus,
            memory: spec.memory,
            disk: spec.disk,
            version: node(1).version,
            guest: "6.1".into(),
            retired: false,
        }),
    }
}

/// A checkpoint for a name.
pub fn name(name: &str, overwrite: bool) -> Purpose {
    name_of(SnapshotKind::Snapshot, name, overwrite)
}

/// A checkpoint for a name of that kind.
pub fn name_of(kind: SnapshotKind, name: &str, overwrite: bool) -> Purpose {
    Purpose::Name {
        name: name.into(),
        kind,
        overwrite,
        metadata: BTreeMap::new(),
    }
}

/// A checkpoint for forks.
pub fn fork(ids: impl IntoIterator<Item = u8>) -> Purpose {
    Purpose::Fork {
        ids: ids.into_iter().map(sandbox_id).collect(),
    }
}

pub fn token_id(n: u8) -> TokenId {
    TokenId(mark(b'j', n))
}

pub fn node_key(n: u8) -> NodeKey {
    NodeKey(mark(b'n', n))
}

/// A node as it tells of itself; `n` makes its key.
pub fn node(n: u8) -> Node {
    Node {
        id: FOUNDER,
        name: format!("host{n}"),
        key: node_key(n),
        api_url: format!("http://10.0.0.{n}:7320"),
        cluster_address: format!("10.0.0.{n}:7321"),
        bulk_address: format!("10.0.0.{n}:7322"),
        disk: mark(b'd', n),
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
        templates: BTreeMap::from([("minimal".into(), [1; 32])]),
        ..Node::default()
    }
}

pub fn template(name: &str, digest: u8) -> Template {
    Template {
        name: name.into(),
        digest: [digest; 32],
        disk: Mib(5120),
        size_bytes: 300 << 20,
        created_at: Stamp(0),
    }
}

/// A sandbox that waits for its node.
pub fn waiting(memory: u32) -> SandboxSpec {
    SandboxSpec {
        template: "minimal".into(),
        vcpus: 1,
        memory: Mib(memory),
        disk: Mib(5120),
        ..SandboxSpec::default()
    }
}

/// A sandbox that is bound to its node's lease.
pub fn bound(memory: u32) -> SandboxSpec {
    SandboxSpec {
        on_host_loss: HostLoss::Restart,
        ..waiting(memory)
    }
}

pub fn token(n: u8, uses: u32, expires_at: Stamp) -> Token {
    Token {
        id: token_id(n),
        public_key: mark(b'p', n),
        team: None,
        expires_at,
        uses_left: uses,
        created_at: Stamp(0),
        created_by: "a person".into(),
        revoked: false,
        redeemed: vec![],
    }
}

pub fn redeem(token: u8, node: Node) -> Command {
    Command::RedeemToken {
        token: token_id(token),
        node,
    }
}

pub fn cordon(node: NodeId) -> Command {
    Command::ChangeNode {
        node,
        cordoned: Some(true),
        draining: None,
        tags: None,
    }
}

pub fn remove(node: NodeId, declared_dead: bool) -> Command {
    Command::RemoveNode {
        node,
        declared_dead,
    }
}

pub fn stop(n: u8) -> Command {
    Command::StopSandbox {
        id: sandbox_id(n),
        cause: StopCause::Asked,
    }
}

pub fn ended() -> Report {
    Report::Stopped {
        reason: String::new(),
    }
}

/// A state with its position in the log and a wall clock.
#[derive(Clone, Debug)]
pub struct World {
    pub state: State,
    pub index: u64,
    pub now: Stamp,
}

impl World {
    pub fn empty() -> Self {
        Self {
            state: State::default(),
            index: 0,
            now: Stamp(START_MS),
        }
    }

    /// A cluster of one node that holds the template `minimal`.
    pub fn founded() -> Self {
        let mut world = Self::empty();
        let found = Command::FoundCluster {
            id: ClusterId(mark(b'c', 0)),
            settings: Settings::default(),
        };
        for command in [
            found,
            Command::AdmitNode(node(1)),
            Command::PutTemplate(template("minimal", 1)),
        ] {
            world.act(command).expect("a first node founds a cluster");
        }
        world
    }

    /// The same with two more nodes.
    pub fn of_three() -> (Self, NodeId, NodeId) {
        let mut world = Self::founded();
        let second = world.join(2);
        let third = world.join(3);
        (world, second, third)
    }

    /// One second later.
    pub fn step(&mut self, command: Command) -> Applied {
        self.index += 1;
        self.now.0 += 1000;
        let at = self.now;
        self.state.apply(self.index, Proposal { at, command })
    }

    pub fn act(&mut self, command: Command) -> Answer {
        self.step(command).answer
    }

    /// Lets a node in by a token of its own.
    pub fn join(&mut self, n: u8) -> NodeId {
        let expires_at = Stamp(self.now.0 + HOUR_MS);
        let token_number = 200 + n;
        self.act(Command::PutToken(token(token_number, 1, expires_at)))
            .expect("a token is put");
        match self.act(redeem(token_number, node(n))) {
            Ok(Receipt::Admitted(id)) => id,
            other => panic!("not let in: {other:?}"),
        }
    }

    pub fn judge(&mut self, node: NodeId, verdict: Verdict) -> Answer {
        let incarnation = self.state.node(node).map_or(0, |node| node.incarnation);
        self.act(Command::JudgeNode {
            node,
            incarnation,
            verdict,
        })
    }

    /// The node, which joined as the `n`th, starts again.
    pub fn announce(&mut self, id: NodeId, n: u8) {
        let again = Node { id, ..node(n) };
        let known = self.act(Command::AdmitNode(again));
        assert_eq!(known, Ok(Receipt::Done(1)));
    }

    /// The lease of a node runs out for good.
    pub fn lose(&mut self, node: NodeId) {
        for verdict in [Verdict::Missing, Verdict::Lost] {
            assert_eq!(self.judge(node, verdict), Ok(Receipt::Done(1)));
        }
    }

    pub fn create(&mut self, n: u8, spec: SandboxSpec) -> Answer {
        self.act(Command::CreateSandbox {
            id: sandbox_id(n),
            team: TEAM,
            spec,
            hints: vec![],
        })
    }

    /// The same, on one node.
    pub fn create_on(&mut self, node: NodeId, n: u8, spec: SandboxSpec) -> Epoch {
        let others: Vec<NodeId> = self.state.nodes().map(|node| node.id).collect();
        let change = |id, cordoned| Command::ChangeNode {
            node: id,
            cordoned: Some(cordoned),
            draining: None,
            tags: None,
        };
        for id in &others {
            self.act(change(*id, *id != node)).expect("cordoned");
        }
        let placed = self.create(n, spec);
        for id in others {
            self.act(change(id, false)).expect("uncordoned");
        }
        match placed {
            Ok(Receipt::Placed { node: owner, epoch }) if owner == node => epoch,
            other => panic!("not placed on {node}: {other:?}"),
        }
    }

    /// What the owner under the newest epoch saw.
    pub fn report(&mut self, n: u8, report: Report) -> Answer {
        let known = self.sandbox(n);
        let (epoch, node) = (known.epoch, known.owner);
        self.act(Command::ReportSandbox {
            id: sandbox_id(n),
            epoch,
            node,
            report,
        })
    }

    /// Its guest answers.
    pub fn run(&mut self, n: u8) {
        let running = Report::Running(GuestVersions::default());
        assert_eq!(self.report(n, running), Ok(Receipt::Done(1)));
    }

    pub fn pause(&mut self, n: u8) -> Answer {
        self.pause_then(n, None)
    }

    /// Asks for a move.
    pub fn pause_to(&mut self, n: u8, to: NodeId) -> Answer {
        self.pause_then(n, Some(to))
    }

    fn pause_then(&mut self, n: u8, then_on: Option<NodeId>) -> Answer {
        let epoch = self.sandbox(n).epoch;
        let id = sandbox_id(n);
        self.act(Command::PauseSandbox {
            id,
            epoch,
            cause: StopCause::Asked,
            then_on,
        })
    }

    /// Pauses it as the snapshot `by`.
    pub fn rest(&mut self, n: u8, by: u8) {
        self.pause(n).expect("it runs");
        let sealed = self.seal(n, by, true);
        assert_eq!(self.report(n, sealed), Ok(Receipt::Done(1)));
    }

    /// What its owner reports of the pause that is under way.
    pub fn seal(&self, n: u8, by: u8, fits: bool) -> Report {
        Report::Sealed(Sealed {
            pause: self.sandbox(n).pause,
            ..sealed(by, fits)
        })
    }

    pub fn resume(&mut self, n: u8, from: u8) -> Answer {
        self.act(Command::ResumeSandbox {
            id: sandbox_id(n),
            snapshot: snapshot_id(from),
            to: None,
            hints: vec![],
        })
    }

    /// Asks for a checkpoint of it by the ask `ask`.
    pub fn checkpoint(&mut self, n: u8, ask: u8, purpose: Purpose) -> Answer {
        let epoch = self.sandbox(n).epoch;
        self.act(Command::CheckpointSandbox(CheckpointSandbox {
            id: sandbox_id(n),
            epoch,
            checkpoint: Checkpoint {
                ask: snapshot_id(ask),
                purpose,
            },
            hints: vec![],
        }))
    }

    /// A checkpoint of it, as the snapshot `by`, that is done.
    pub fn checkpointed(&mut self, n: u8, by: u8, purpose: Purpose) {
        assert_eq!(self.checkpoint(n, by, purpose), Ok(Receipt::Done(1)));
        let sealed = self.seal(n, by, true);
        assert_eq!(self.report(n, sealed), Ok(Receipt::Done(1)));
        self.run(n);
    }

    pub fn named(&self, name: &str) -> Option<&Named> {
        self.state.named(TEAM, name)
    }

    pub fn hold(&mut self, by: u8, node: NodeId, holds: bool) -> Answer {
        let id = snapshot_id(by);
        self.act(Command::HoldSnapshot { id, node, holds })
    }

    pub fn snapshot(&self, n: u8) -> Option<&Snapshot> {
        self.state.snapshot(snapshot_id(n))
    }

    pub fn sandbox(&self, n: u8) -> &Sandbox {
        self.state
            .sandbox(sandbox_id(n))
            .expect("the sandbox is known")
    }

    pub fn wait(&mut self, time: Duration) {
        self.now.0 += u64::try_from(time.as_millis()).expect("small");
    }
}

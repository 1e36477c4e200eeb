//! A state that the first version wrote, before there were clusters of several nodes.

use prost::Message as _;
use proto::epoch::Epoch;
use proto::ids::ClusterId;
use proto::wire::raft as pb;
use wrenn_raft::command::{Command, Receipt, Refusal, Report, Verdict};
use wrenn_raft::state::{
    GuestVersions, HostLoss, Liveness, Node, Phase, Row, RowKey, Settings, State,
};

use crate::world::*;

/// Fields that the first version did not have are left at their defaults, which are not encoded.
fn rows() -> Vec<Row> {
    let resources = pb::Resources {
        vcpus: 8,
        memory_mib: 4096,
        disk_mib: 40_960,
        sandboxes: 10,
    };
    let node = pb::NodeRow {
        id: 1,
        name: "host1".into(),
        key: node_key(1).0.to_vec(),
        api_url: "http://10.0.0.1:7320".into(),
        cluster_address: "10.0.0.1:7321".into(),
        capacity: Some(resources),
        vmm: "qemu".into(),
        version: "0.0.9".into(),
        admitted_at_ms: 5,
        ..pb::NodeRow::default()
    };
    let template = pb::TemplateRow {
        name: "minimal".into(),
        digest: vec![1; 32],
        disk_mib: 5120,
        ..pb::TemplateRow::default()
    };
    let sandbox = pb::SandboxRow {
        id: sandbox_id(1).0.to_vec(),
        team: TEAM.0.to_vec(),
        spec: Some(pb::SandboxSpec {
            template: "minimal".into(),
            vcpus: 1,
            memory_mib: 512,
            disk_mib: 5120,
            idle_timeout_s: 60,
            ..pb::SandboxSpec::default()
        }),
        desired: pb::Desired::Running.into(),
        phase: pb::Phase::Running.into(),
        owner: 1,
        epoch: 7,
        ..pb::SandboxRow::default()
    };
    vec![
        (RowKey::Node(FOUNDER).encode(), node.encode_to_vec()),
        (
            RowKey::Template("minimal".into()).encode(),
            template.encode_to_vec(),
        ),
        (
            RowKey::Sandbox(sandbox_id(1)).encode(),
            sandbox.encode_to_vec(),
        ),
    ]
}

fn upgraded() -> World {
    World {
        state: State::from_rows(rows()).expect("rows of the first version"),
        index: 100,
        ..World::empty()
    }
}

#[test]
fn new_fields_of_old_rows_mean_what_was_true_then() {
    let world = upgraded();
    let node = world.state.node(FOUNDER).expect("known");
    assert_eq!(
        (node.liveness, node.cordoned, node.team),
        (Liveness::Alive, false, None)
    );
    let sandbox = world.sandbox(1);
    assert_eq!(sandbox.spec.on_host_loss, HostLoss::Wait);
    assert_eq!((sandbox.epoch, sandbox.phase), (Epoch(7), Phase::Running));
    assert_eq!(world.state.settings(), Settings::default());
    assert_eq!(world.state.reserved(FOUNDER).sandboxes, 1);
}

#[test]
fn the_only_node_of_the_first_version_founds_a_cluster_and_goes_on() {
    let mut world = upgraded();
    assert!(matches!(
        world.create(2, waiting(512)),
        Err(Refusal::NoRoom(_))
    ));
    let found = Command::FoundCluster {
        id: ClusterId(mark(b'c', 0)),
        settings: Settings::default(),
    };
    assert_eq!(world.act(found), Ok(Receipt::Done(1)));
    let again = Node {
        incarnation: 1,
        ..node(1)
    };
    assert_eq!(world.act(Command::AdmitNode(again)), Ok(Receipt::Done(1)));
    let kept = world.state.node(FOUNDER).expect("known");
    assert_eq!(kept.admitted_at.0, 5);
    world
        .create(2, waiting(512))
        .expect("it holds the template now");
    let running = Report::Running(GuestVersions {
        agent: "1".into(),
        ..GuestVersions::default()
    });
    assert_eq!(
        world.report(1, running),
        Ok(Receipt::Done(1)),
        "the old epoch counts"
    );
    let second = world.join(2);
    world.lose(FOUNDER);
    assert_eq!(world.sandbox(1).owner, FOUNDER, "it waits");
    world.announce(FOUNDER, 1);
    assert_eq!(world.judge(FOUNDER, Verdict::Back), Ok(Receipt::Done(1)));
    assert!(second > FOUNDER);
}

#[test]
fn a_liveness_of_a_newer_version_is_refused_instead_of_read_as_alive() {
    let newer = pb::NodeRow {
        id: 1,
        key: vec![1; 32],
        capacity: Some(pb::Resources::default()),
        liveness: 9,
        ..pb::NodeRow::default()
    };
    let rows = [(RowKey::Node(FOUNDER).encode(), newer.encode_to_vec())];
    let refused = State::from_rows(rows).expect_err("it is unknown");
    assert_eq!(refused.to_string(), "liveness is unknown to this version");
    let verdict = pb::Proposal {
        at_ms: 1,
        command: Some(pb::proposal::Command::JudgeNode(pb::JudgeNode {
            node: 1,
            incarnation: 1,
            liveness: 9,
        })),
    };
    let refused = wrenn_raft::command::Proposal::decode(&verdict.encode_to_vec());
    assert!(refused.is_err(), "{refused:?}");
}

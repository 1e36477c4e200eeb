//! Which node is chosen, and what is said where none is.

use std::collections::BTreeMap;

use proto::ids::TeamId;
use proto::units::{Mib, Stamp};
use wrenn_raft::command::{Command, Receipt, Refusal, Report, Verdict};
use wrenn_raft::placement::LoadHint;
use wrenn_raft::state::{Node, Resources, SandboxSpec, Token};

use crate::world::*;

fn lack(answer: Result<Receipt, Refusal>) -> String {
    match answer {
        Err(Refusal::NoRoom(lack)) => lack.0,
        other => panic!("not refused for want of room: {other:?}"),
    }
}

#[test]
fn a_lack_names_the_nearest_node_and_counts_the_others_by_reason() {
    let (mut world, second, third) = World::of_three();
    for id in [FOUNDER, second] {
        world.act(cordon(id)).expect("known");
    }
    world.create(1, waiting(3584)).expect("there is room");
    assert_eq!(world.sandbox(1).owner, third);
    let big = SandboxSpec {
        vcpus: 9,
        ..waiting(1024)
    };
    assert_eq!(
        lack(world.create(2, big)),
        "host3 lacks vCPUs (9 wanted, 7 free), memory (1024 MiB wanted, 512 MiB free); 2 hosts are \
         cordoned"
    );
}

#[test]
fn each_reason_that_bars_a_node_is_named() {
    let (mut world, second, third) = World::of_three();
    let tagged = |tag: &str| SandboxSpec {
        node_tags: BTreeMap::from([("zone".into(), tag.into())]),
        ..waiting(512)
    };
    assert_eq!(
        lack(world.create(1, tagged("a"))),
        "3 hosts are without the tags asked for"
    );
    world
        .act(Command::ChangeNode {
            node: second,
            cordoned: None,
            draining: None,
            tags: Some(BTreeMap::from([("zone".into(), "a".into())])),
        })
        .expect("known");
    world.create(1, tagged("a")).expect("one has the tags");
    assert_eq!(world.sandbox(1).owner, second);

    let pinned = SandboxSpec {
        on_node: Some(third),
        ..waiting(512)
    };
    world.create(2, pinned.clone()).expect("it is alive");
    assert_eq!(world.sandbox(2).owner, third);
    world.judge(third, Verdict::Missing).expect("judged");
    assert_eq!(
        lack(world.create(3, pinned)),
        "1 host is not reachable; 2 hosts are not the one asked for"
    );
    world
        .act(Command::PutTemplate(template("debian", 2)))
        .expect("put");
    let other = SandboxSpec {
        template: "debian".into(),
        ..waiting(512)
    };
    assert_eq!(
        lack(world.create(4, other)),
        "1 host is not reachable; 2 hosts are without the template"
    );
}

#[test]
fn an_outdated_template_counts_as_none() {
    let mut world = World::founded();
    world
        .act(Command::PutTemplate(template("minimal", 2)))
        .expect("put");
    assert_eq!(
        lack(world.create(1, waiting(512))),
        "1 host is without the template"
    );
}

#[test]
fn a_host_of_a_team_takes_that_teams_sandboxes_only_and_nobody_else_learns_how_it_fares() {
    let mut world = World::founded();
    let expires_at = Stamp(world.now.0 + HOUR_MS);
    let team = TeamId([7; 16]);
    let scoped = Token {
        team: Some(team),
        ..token(1, 1, expires_at)
    };
    world.act(Command::PutToken(scoped)).expect("put");
    let Ok(Receipt::Admitted(host)) = world.act(redeem(1, node(2))) else {
        panic!("not let in");
    };
    let create = |team, n| Command::CreateSandbox {
        id: sandbox_id(n),
        team,
        spec: SandboxSpec {
            on_node: Some(host),
            ..waiting(512)
        },
        hints: vec![],
    };
    world.act(cordon(host)).expect("known");
    assert_eq!(
        lack(world.act(create(TEAM, 1))),
        "1 host is not the one asked for; 1 host is of another team"
    );
    assert_eq!(
        lack(world.act(create(team, 1))),
        "1 host is cordoned; 1 host is not the one asked for"
    );
    let uncordon = Command::ChangeNode {
        node: host,
        cordoned: Some(false),
        draining: None,
        tags: None,
    };
    world.act(uncordon).expect("known");
    world.act(create(team, 1)).expect("its own team's");
}

#[test]
fn load_chooses_between_equals_and_never_makes_room() {
    let (mut world, second, third) = World::of_three();
    let hints = |busy: [u32; 3]| {
        let nodes = [FOUNDER, second, third].into_iter().zip(busy);
        nodes.map(|(node, busy_permille)| LoadHint {
            node,
            busy_permille,
        })
    };
    let mut placed = |n, memory, busy| {
        let command = Command::CreateSandbox {
            id: sandbox_id(n),
            team: TEAM,
            spec: waiting(memory),
            hints: hints(busy).collect(),
        };
        match world.act(command) {
            Ok(Receipt::Placed { node, .. }) => Some(node),
            _ => None,
        }
    };
    assert_eq!(placed(1, 512, [900, 10, 500]), Some(second));
    assert_eq!(placed(2, 4096, [u32::MAX, 0, 500]), Some(third));
    assert_eq!(placed(3, 4096, [u32::MAX, 0, 0]), Some(FOUNDER));
    assert_eq!(placed(4, 4096, [0, 0, 0]), None);
}

#[test]
fn a_node_that_shrank_below_what_it_holds_takes_nothing_and_breaks_nothing() {
    let mut world = World::founded();
    world.create(1, waiting(2048)).expect("there is room");
    let smaller = Node {
        capacity: Resources {
            memory: Mib(1024),
            ..node(1).capacity
        },
        ..node(1)
    };
    world.act(Command::AdmitNode(smaller)).expect("known");
    assert_eq!(
        lack(world.create(2, waiting(1))),
        "host1 lacks memory (1 MiB wanted, 0 MiB free)"
    );
    world
        .report(1, Report::Stopped { reason: "x".into() })
        .expect("reported");
    world.create(2, waiting(1024)).expect("there is room again");
}

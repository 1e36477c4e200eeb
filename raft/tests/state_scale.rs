//! How long the state machine takes where the state is large. Prints figures and fails only where
//! one is off by a power of ten; run with
//! `cargo test --release -p wrenn-raft --test state_scale -- --ignored --nocapture`.

mod world;

use std::collections::BTreeSet;
use std::hint::black_box;
use std::time::{Duration, Instant};

use proto::epoch::Epoch;
use proto::ids::{NodeId, SandboxId, TeamId};
use proto::units::{Mib, Stamp};
use world::*;
use wrenn_raft::command::{Command, Proposal, Receipt, Report, StopCause, Verdict};
use wrenn_raft::placement::LoadHint;
use wrenn_raft::state::{GuestVersions, Node, Resources, State, Token};

/// Without optimization, which is how the suite runs it, only the path is tried: a tenth of them.
const SANDBOXES: u32 = if cfg!(debug_assertions) {
    10_000
} else {
    100_000
};
/// Of which this share has ended.
const ENDED_EVERY: u32 = 4;
const TEAMS: u32 = 100;

fn id(n: u32) -> SandboxId {
    let mut bytes = [0; 16];
    // Random ids are spread: consecutive ones would all touch the same nodes of a tree.
    bytes[..4].copy_from_slice(&n.wrapping_mul(0x9e37_79b9).to_be_bytes());
    bytes[4..8].copy_from_slice(&n.to_be_bytes());
    SandboxId(bytes)
}

fn team(n: u32) -> TeamId {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&(n % TEAMS).to_be_bytes());
    TeamId(bytes)
}

/// A cluster of `nodes`, the second of which is a host of team 1.
fn cluster(nodes: u32) -> World {
    let mut world = World::founded();
    let expires_at = Stamp(u64::MAX);
    world
        .act(Command::PutToken(token(1, nodes, expires_at)))
        .expect("put");
    let scoped = Token {
        team: Some(team(1)),
        ..token(2, 1, expires_at)
    };
    world.act(Command::PutToken(scoped)).expect("put");
    for n in 1..nodes {
        let mut joiner = Node {
            capacity: Resources {
                vcpus: 1 << 16,
                memory: Mib(1 << 24),
                disk: Mib(u32::MAX),
                sandboxes: 1 << 14,
            },
            name: format!("host-{n}"),
            ..node(2)
        };
        joiner.key.0[..4].copy_from_slice(&n.to_be_bytes());
        let by = if n == 1 { 2 } else { 1 };
        world.act(redeem(by, joiner)).expect("let in");
    }
    world
}

fn create(n: u32, hints: Vec<LoadHint>) -> Command {
    Command::CreateSandbox {
        id: id(n),
        team: team(n),
        spec: if n.is_multiple_of(2) {
            bound(512)
        } else {
            waiting(512)
        },
        hints,
    }
}

fn report(state: &State, n: u32, report: Report) -> Command {
    let (epoch, node) = state
        .sandbox(id(n))
        .map_or((Epoch(0), NodeId(0)), |it| (it.epoch, it.owner));
    Command::ReportSandbox {
        id: id(n),
        epoch,
        node,
        report,
    }
}

fn filled(nodes: u32) -> World {
    let mut world = cluster(nodes);
    for n in 0..SANDBOXES {
        world.act(create(n, vec![])).expect("there is room");
        let seen = Report::Running(GuestVersions::default());
        let seen = if n.is_multiple_of(ENDED_EVERY) {
            ended()
        } else {
            seen
        };
        let command = report(&world.state, n, seen);
        world.act(command).expect("reported");
    }
    world
}

fn line(what: &str, times: u32, took: Duration) -> Duration {
    let each = took / times;
    println!("{what:<58} {each:>12.2?}");
    each
}

/// Applies `command(n)` for many `n`, as the log does: from bytes, changed rows encoded.
fn timed(
    world: &mut World,
    what: &str,
    times: u32,
    command: impl Fn(&State, u32) -> Command,
) -> Duration {
    let mut took = Duration::ZERO;
    for n in 0..times {
        let at = Stamp(world.now.0 + 1);
        let bytes = Proposal {
            at,
            command: command(&world.state, n),
        }
        .encode();
        world.index += 1;
        let began = Instant::now();
        // The view that readers hold: what is shared with it must be copied.
        let view = world.state.clone();
        let proposal = Proposal::decode(&bytes).expect("own bytes");
        let applied = world.state.apply(world.index, proposal);
        for key in &applied.touched {
            black_box((key.encode(), world.state.row(key)));
        }
        took += began.elapsed();
        drop(view);
        assert!(applied.answer.is_ok(), "{what}: {:?}", applied.answer);
    }
    line(what, times, took)
}

fn once<T>(what: &str, act: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let given = act();
    line(what, 1, began.elapsed());
    given
}

fn commands(world: &mut World) {
    let nodes: Vec<NodeId> = world.state.nodes().map(|node| node.id).collect();
    let hints: Vec<LoadHint> = nodes
        .iter()
        .map(|node| LoadHint {
            node: *node,
            busy_permille: 100,
        })
        .collect();
    let first = SANDBOXES;
    timed(world, "create, no hints", 1000, |_, n| {
        create(first + n, vec![])
    });
    timed(world, "create, a hint per node", 200, |_, n| {
        create(first + 1000 + n, hints.clone())
    });
    let each = timed(world, "report running", 1000, |state, n| {
        report(state, first + n, Report::Running(GuestVersions::default()))
    });
    assert!(each < Duration::from_millis(1), "a report takes {each:?}");
    timed(world, "stop", 1000, |_, n| Command::StopSandbox {
        id: id(first + n),
        cause: StopCause::Asked,
    });
    timed(world, "report stopped", 1000, |state, n| {
        report(state, first + n, ended())
    });
    let judge = |verdict| {
        move |state: &State, _: u32| {
            let last = state.nodes().last().expect("there are nodes");
            let (node, incarnation) = (last.id, last.incarnation);
            Command::JudgeNode {
                node,
                incarnation,
                verdict,
            }
        }
    };
    let last = *nodes.last().expect("there are nodes");
    let held = world.state.sandboxes_on(last).count();
    timed(world, "judge missing", 1, judge(Verdict::Missing));
    timed(
        world,
        &format!("judge lost, {held} sandboxes there"),
        1,
        judge(Verdict::Lost),
    );
    let before = Stamp(
        world
            .state
            .ended_sandboxes()
            .nth(1000)
            .expect("many have ended")
            .0
            .0,
    );
    timed(world, "prune the first 1,000", 1, move |_, _| {
        Command::PruneSandboxes {
            ended_before: before,
        }
    });
    timed(world, "prune nothing", 100, move |_, _| {
        Command::PruneSandboxes {
            ended_before: before,
        }
    });
}

fn reads(world: &World) {
    let state = &world.state;
    let host = state
        .nodes()
        .find(|node| node.team.is_some())
        .expect("a host")
        .id;
    let last = state.nodes().last().expect("there are nodes");
    once("node_by_key", || {
        black_box(state.node_by_key(&last.key)).is_some()
    });
    once("count what one node holds", || {
        black_box(state.sandboxes_on(host).count())
    });
    once("count all sandboxes", || {
        black_box(state.sandboxes().count())
    });
    once("filter all by owner", || {
        black_box(state.sandboxes().filter(|it| it.owner == host).count())
    });
    let voters: BTreeSet<NodeId> = state.nodes().map(|node| node.id).take(5).collect();
    let slice = once("cut a slice", || state.sliced(host, &voters)).expect("a host");
    println!("   of {} sandboxes", slice.sandboxes().count());
    let mut newer = world.clone();
    let stop = Command::StopSandbox {
        id: id(1),
        cause: StopCause::Asked,
    };
    assert_eq!(newer.act(stop), Ok(Receipt::Done(1)));
    let newer = newer.state.sliced(host, &voters).expect("a host");
    let changes = once("changes between two slices", || newer.changes_since(&slice));
    assert_eq!(changes.len(), 1);
    let rows: Vec<_> = once("all rows", || state.rows().collect());
    let bytes: usize = rows
        .iter()
        .map(|(key, value)| key.len() + value.len())
        .sum();
    println!("   {} rows of {} MiB in all", rows.len(), bytes >> 20);
    let read = once("read all rows", || State::from_rows(rows)).expect("own rows");
    assert!(read == *state);
}

fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = kib.and_then(|text| text.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or_default() >> 10
}

#[test]
#[ignore = "a measurement; run it in release mode"]
fn a_state_of_many_sandboxes_is_measured() {
    for nodes in [10, 100, 1000] {
        println!("\n{nodes} nodes, {SANDBOXES} sandboxes");
        let mut world = once("fill", || filled(nodes));
        println!("   {} MiB resident", resident_mib());
        commands(&mut world);
        reads(&world);
    }
}

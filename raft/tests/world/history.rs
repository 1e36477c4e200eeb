//! Random histories: what people, nodes and the leader may ask for, in any order.
//!
//! A move names what it is about by a number that is looked up in the state it meets, so that most
//! moves hit something: the third sandbox there is, its owner or another node, its epoch or one
//! before it ([`commands`]).

mod commands;

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::sample::Index;
use proto::ids::{NodeId, TeamId};
use proto::units::{Mib, Stamp};
use wrenn_raft::command::{Command, Report, Verdict};
use wrenn_raft::state::{GuestVersions, Node, Resources, Token};

use super::people::{BuildMove, PeopleMove, any_of_builds, any_of_people};
use super::{HOUR_MS, World, bound, mark, node, node_key, redeem, sealed, template, token};

/// Teams there are; the first is the platform.
pub const TEAMS: u8 = 3;
/// Keys that machines may come with.
const MACHINES: u8 = 8;
const TOKENS: u8 = 6;
const SANDBOXES: u8 = 24;
const SNAPSHOTS: u8 = 200;
const TEMPLATES: [&str; 2] = ["debian", "minimal"];
/// Names that snapshots get.
const NAMES: u8 = 3;
/// Forks have ids from here on.
const FORKS: u8 = 40;

pub fn team(n: u8) -> TeamId {
    match n % TEAMS {
        0 => TeamId::default(),
        n => TeamId(mark(b't', n)),
    }
}

/// A word that names a machine and stands in its tags.
pub fn tag_of(machine: u8) -> String {
    format!("tag-of-machine-{machine}")
}

/// Uses, team and expiry are the token's own: made again, it is the same.
pub fn token_of(n: u8) -> Token {
    let start = World::empty().now;
    let scope = (!n.is_multiple_of(3)).then(|| team(n));
    Token {
        team: scope,
        ..token(
            n,
            1 + u32::from(n % 3),
            Stamp(start.0 + (10 + 10 * u64::from(n)) * HOUR_MS),
        )
    }
}

/// One move.
#[derive(Clone, Debug)]
pub enum Move {
    Found,
    PutSettings(u32),
    Template(u8, u8),
    Key {
        n: u8,
        revoke: bool,
    },
    PutToken(u8),
    RevokeToken(u8),
    Redeem {
        token: u8,
        machine: u8,
    },
    Restart {
        node: Index,
        incarnation: u64,
        room: u32,
        held: u8,
    },
    StrangerSays {
        id: u64,
        machine: u8,
    },
    Change {
        node: Index,
        cordoned: Option<bool>,
        draining: Option<bool>,
        tagged: Option<bool>,
    },
    Judge {
        node: Index,
        /// `None` is the next step from where the node is.
        verdict: Option<Verdict>,
        stale: bool,
    },
    Remove {
        node: Index,
        declared_dead: bool,
    },
    RemoveAgain {
        id: u64,
    },
    Create {
        n: u8,
        spec: Asked,
        busy: Vec<u32>,
    },
    Stop {
        n: u8,
        idle: bool,
    },
    Pause {
        sandbox: Index,
        epoch_back: u64,
        /// To go on there.
        then_on: Option<Index>,
    },
    Resume {
        sandbox: Index,
        /// Another snapshot than the one it rests as.
        other: Option<u8>,
        busy: Vec<u32>,
    },
    Checkpoint {
        sandbox: Index,
        epoch_back: u64,
        ask: u8,
        /// A name, or else forks.
        named: bool,
        overwrite: bool,
    },
    DropName {
        named: Index,
        /// Another snapshot than the one it stands for.
        other: Option<u8>,
    },
    CreateFrom {
        n: u8,
        named: Index,
        other_shape: bool,
    },
    Warm {
        n: u8,
        node: Index,
        memory: u32,
    },
    RetireWarm {
        warm: Index,
    },
    Hold {
        snapshot: Index,
        node: Index,
        holds: bool,
    },
    Report {
        sandbox: Index,
        epoch_back: u64,
        by: Option<Index>,
        what: Report,
    },
    Prune {
        before_ms: u64,
    },
    /// The owner's word that it cannot resume one.
    ResumeFails(Index),
    People(PeopleMove),
    Build(BuildMove),
}

/// What a client asks for.
#[derive(Clone, Debug)]
pub struct Asked {
    team: u8,
    template: u8,
    bound: bool,
    vcpus: u32,
    memory: u32,
    tag: Option<Index>,
    pin: Option<Index>,
}

fn any_report() -> impl Strategy<Value = Report> {
    let running = "[a-b]{0,1}".prop_map(|agent| {
        Report::Running(GuestVersions {
            agent,
            ..GuestVersions::default()
        })
    });
    prop_oneof![
        3 => running,
        3 => Just(Report::Begins),
        4 => (0..SNAPSHOTS, prop::bool::weighted(0.9))
            .prop_map(|(n, fits)| Report::Sealed(sealed(n, fits))),
        1 => "[a-z ]{0,8}".prop_map(|reason| Report::Thawed { reason }),
        1 => "[a-z ]{0,8}".prop_map(|reason| Report::Stopped { reason }),
        1 => "[a-z ]{0,8}".prop_map(|reason| Report::Failed { reason }),
    ]
}

fn any_spec() -> impl Strategy<Value = Asked> {
    let rarely = || prop::option::weighted(0.15, any::<Index>());
    let amounts = (1_u32..4, prop::sample::select(vec![1_u32, 256, 256, 3000]));
    (
        0..TEAMS,
        0_u8..2,
        prop::bool::weighted(0.7),
        amounts,
        rarely(),
        rarely(),
    )
        .prop_map(|(team, template, bound, (vcpus, memory), tag, pin)| Asked {
            team,
            template,
            bound,
            vcpus,
            memory,
            tag,
            pin,
        })
}

fn about_the_cluster() -> impl Strategy<Value = Move> {
    prop_oneof![
        1 => Just(Move::Found),
        1 => (0_u32..9).prop_map(Move::PutSettings),
        1 => (0_u8..2, 1_u8..3).prop_map(|(name, digest)| Move::Template(name, digest)),
        3 => (0_u8..6, any::<bool>()).prop_map(|(n, revoke)| Move::Key { n, revoke }),
        4 => (0..TOKENS).prop_map(Move::PutToken),
        2 => (0..TOKENS).prop_map(Move::RevokeToken),
    ]
}

fn about_nodes() -> impl Strategy<Value = Move> {
    let choice = || prop::option::of(any::<bool>());
    let verdict = prop::sample::select(vec![Verdict::Back, Verdict::Missing, Verdict::Lost]);
    let verdict = prop::option::weighted(0.3, verdict);
    let held = prop_oneof![5 => Just(3_u8), 1 => 0_u8..3];
    prop_oneof![
        5 => (0..TOKENS, 2..MACHINES).prop_map(|(token, machine)| Move::Redeem { token, machine }),
        2 => (any::<Index>(), 1_u64..4, 0_u32..10, held).prop_map(
            |(node, incarnation, room, held)| Move::Restart { node, incarnation, room, held }
        ),
        1 => (0_u64..40, 1..MACHINES)
            .prop_map(|(id, machine)| Move::StrangerSays { id, machine }),
        2 => (any::<Index>(), choice(), choice(), choice()).prop_map(
            |(node, cordoned, draining, tagged)| Move::Change { node, cordoned, draining, tagged }
        ),
        9 => (any::<Index>(), verdict, prop::bool::weighted(0.2))
            .prop_map(|(node, verdict, stale)| Move::Judge { node, verdict, stale }),
        1 => (any::<Index>(), any::<bool>())
            .prop_map(|(node, declared_dead)| Move::Remove { node, declared_dead }),
        1 => (0_u64..40).prop_map(|id| Move::RemoveAgain { id }),
    ]
}

fn about_sandboxes() -> impl Strategy<Value = Move> {
    let stale = || prop_oneof![4 => Just(0), 1 => 1_u64..20];
    let stranger = prop::option::weighted(0.2, any::<Index>());
    prop_oneof![
        6 => (0..SANDBOXES, any_spec(), prop::collection::vec(0_u32..1500, 0..4))
            .prop_map(|(n, spec, busy)| Move::Create { n, spec, busy }),
        4 => (0..SANDBOXES, any::<bool>()).prop_map(|(n, idle)| Move::Stop { n, idle }),
        4 => (any::<Index>(), stale(), prop::option::weighted(0.3, any::<Index>())).prop_map(
            |(sandbox, epoch_back, then_on)| Move::Pause { sandbox, epoch_back, then_on }
        ),
        5 => (
            any::<Index>(),
            prop::option::weighted(0.2, 0..SNAPSHOTS),
            prop::collection::vec(0_u32..1500, 0..4),
        )
            .prop_map(|(sandbox, other, busy)| Move::Resume { sandbox, other, busy }),
        5 => (
            any::<Index>(),
            stale(),
            0..SNAPSHOTS,
            prop::bool::weighted(0.6),
            any::<bool>(),
        )
            .prop_map(|(sandbox, epoch_back, ask, named, overwrite)| {
                Move::Checkpoint { sandbox, epoch_back, ask, named, overwrite }
            }),
        1 => (any::<Index>(), prop::option::weighted(0.2, 0..SNAPSHOTS))
            .prop_map(|(named, other)| Move::DropName { named, other }),
        4 => (0..SANDBOXES, any::<Index>(), prop::bool::weighted(0.1)).prop_map(
            |(n, named, other_shape)| Move::CreateFrom { n, named, other_shape }
        ),
        2 => (0..SNAPSHOTS, any::<Index>(), prop::sample::select(vec![1_u32, 256, 256]))
            .prop_map(|(n, node, memory)| Move::Warm { n, node, memory }),
        1 => any::<Index>().prop_map(|warm| Move::RetireWarm { warm }),
        3 => (any::<Index>(), any::<Index>(), prop::bool::weighted(0.7)).prop_map(
            |(snapshot, node, holds)| Move::Hold { snapshot, node, holds }
        ),
        8 => (any::<Index>(), stale(), stranger, any_report()).prop_map(
            |(sandbox, epoch_back, by, what)| Move::Report { sandbox, epoch_back, by, what }
        ),
        1 => (0_u64..40_000).prop_map(|before_ms| Move::Prune { before_ms }),
        2 => any::<Index>().prop_map(Move::ResumeFails),
    ]
}

/// A move and how many milliseconds pass before it; proposers' clocks may be behind each other.
pub fn any_move() -> impl Strategy<Value = (i64, Move)> {
    let pause = prop_oneof![
        20 => -500_i64..2000,
        1 => Just(20 * 3_600_000_i64),
    ];
    let what = prop_oneof![
        2 => about_the_cluster(),
        6 => about_nodes(),
        10 => about_sandboxes(),
        3 => any_of_people().prop_map(Move::People),
        2 => any_of_builds().prop_map(Move::Build),
    ];
    (pause, what)
}

pub fn any_history(length: usize) -> impl Strategy<Value = Vec<(i64, Move)>> {
    prop::collection::vec(any_move(), 1..length)
}

/// A founded cluster in which most moves mean something: tokens are there and two templates.
pub fn busy_world() -> World {
    let mut world = World::founded();
    let put = |world: &mut World, command| {
        world.act(command).expect("it fits");
    };
    put(&mut world, Command::PutTemplate(template("debian", 2)));
    for n in 2..5 {
        let token = token_of(n);
        put(&mut world, Command::PutToken(token));
    }
    for machine in 2..5 {
        let joiner = machine_says(machine, 10, 3, 1);
        put(&mut world, redeem(machine, joiner));
    }
    resumed_before(&mut world);
    world
}

/// Two sandboxes that were paused and run again, bound to their nodes; others hold them too.
fn resumed_before(world: &mut World) {
    for n in 0..2 {
        let sandbox = SANDBOXES + n;
        world.create(sandbox, bound(256)).expect("there is room");
        world.run(sandbox);
        let by = SNAPSHOTS + n;
        world.rest(sandbox, by);
        let all: Vec<NodeId> = world.state.nodes().map(|node| node.id).collect();
        for node in all {
            world.hold(by, node, true).expect("both are known");
        }
        world.resume(sandbox, by).expect("there is room");
        world.run(sandbox);
    }
}

/// What a machine tells of itself; bit by bit, `held` says which templates it has.
fn machine_says(machine: u8, room: u32, held: u8, incarnation: u64) -> Node {
    let holds =
        |(n, name): (u8, &&str)| (held >> n & 1 == 1).then(|| ((*name).into(), [2 - n; 32]));
    Node {
        capacity: Resources {
            vcpus: room,
            memory: Mib(room * 700),
            disk: Mib(40_960),
            sandboxes: room.min(4),
        },
        templates: (0..).zip(&TEMPLATES).filter_map(holds).collect(),
        tags: BTreeMap::from([("machine".into(), tag_of(machine))]),
        incarnation,
        // Some are of a release that does not ask yet.
        asks_first: !machine.is_multiple_of(3),
        ..node(machine)
    }
}

/// Which machine has this node's key.
pub fn machine_of(known: &Node) -> u8 {
    let mut machines = 0..MACHINES;
    machines
        .find(|n| node_key(*n) == known.key)
        .expect("all nodes are machines")
}

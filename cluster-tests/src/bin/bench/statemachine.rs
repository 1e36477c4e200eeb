//! The replicated state with many capsules: what a command costs, what a snapshot costs, what a
//! list costs, and the memory of it all.
//!
//! First the bare machine, as the store drives it: bytes in, rows out, and a clone published after
//! each command. Then a real group of one that is filled with the same, for snapshots and starts
//! from disk. The list is what the API does for one, without the JSON. One node for each hundred
//! capsules, since placement looks at every node.

use std::path::Path;
use std::time::{Duration, Instant};

use proto::ids::{NodeId, NodeKey, SandboxId, TeamId, TokenId};
use proto::units::{Mib, Stamp};
use raft::command::{Command, Proposal, Receipt, Report};
use raft::group::{Group, GroupConfig};
use raft::link::NoPeers;
use raft::machine::Machine;
use raft::state::{GuestVersions, Node, Resources, Sandbox, SandboxSpec, State, Template, Token};
use raft::wire::decode_answer;
use tokio::runtime::Runtime;
use tokio::time;

use crate::figures::{Samples, figure, ms, ratio};
use crate::process;
use crate::{Outcome, Run};

/// Capsules: the size of a large cluster, and ten times that.
const SIZES: [u64; 2] = [10_000, 100_000];
/// Capsules of one node.
const PER_NODE: u64 = 100;
/// Commands timed at the full size.
const TIMED: u64 = 2000;
/// Proposals under way while a group is filled, so that they share syncs.
const FILLERS: u8 = 255;
/// Longest anything here may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pause between two looks at whether a snapshot is there.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// Ten times the capsules may make a command this much dearer: maps are trees, and placement looks
/// at ten times the nodes.
const REPORT_GROWTH_GOAL: f64 = 2.0;
const CREATE_GROWTH_GOAL: f64 = 12.0;
const TEMPLATE: &str = "minimal";
const TOKEN: TokenId = TokenId([7; 16]);

/// What one size came to.
struct Sized {
    create_us: f64,
    report_us: f64,
}

/// Measures both sizes.
pub(crate) fn run(run: &Run) -> Outcome {
    let mut sizes = Vec::new();
    for count in SIZES {
        run.go_on()?;
        run.note(&format!("{count} capsules in memory"));
        let name = format!("statemachine_{count}");
        let (state, sized) = in_memory(&name, count)?;
        list(&name, &state, run.runs);
        drop(state);
        sizes.push(sized);
        run.go_on()?;
        run.note(&format!("{count} capsules on disk"));
        on_disk(&name, count)?;
    }
    if let [small, large] = &sizes[..] {
        let growth = |name: &str, large, small, goal| {
            ratio(&format!("statemachine_{name}_growth"), large, small, goal);
        };
        growth(
            "create",
            large.create_us,
            small.create_us,
            CREATE_GROWTH_GOAL,
        );
        growth(
            "report",
            large.report_us,
            small.report_us,
            REPORT_GROWTH_GOAL,
        );
    }
    Ok(())
}

/// Fills a machine and times the last commands.
fn in_memory(name: &str, count: u64) -> Outcome<(State, Sized)> {
    let before = process::memory(std::process::id())?.anonymous;
    let mut state = State::empty();
    let mut published = state.clone();
    let mut index = 0;
    let mut apply = |command: Command| -> Outcome<(Receipt, f64)> {
        index += 1;
        let bytes = proposal(command);
        let start = Instant::now();
        let applied = apply_bytes(&mut state, index, &bytes)?;
        published = state.clone();
        let took = start.elapsed();
        Ok((decode_answer(&applied)?, ms(took) * 1e3))
    };
    for command in furniture(count) {
        apply(command)?;
    }
    let (mut create, mut report) = (Samples::default(), Samples::default());
    for number in 0..count {
        let (receipt, create_us) = apply(create_of(number))?;
        let (_, report_us) = apply(report_of(number, receipt)?)?;
        if number + TIMED >= count {
            create.add(create_us);
            report.add(report_us);
        }
    }
    create.print(&format!("{name}_create"), "us");
    report.print(&format!("{name}_report"), "us");
    let memory = process::memory(std::process::id())?.anonymous - before;
    figure(&format!("{name}_memory"), memory, "MiB");
    let sized = Sized {
        create_us: create.p50(),
        report_us: report.p50(),
    };
    Ok((published, sized))
}

/// One command as the store applies it.
fn apply_bytes(state: &mut State, index: u64, bytes: &[u8]) -> Outcome<Vec<u8>> {
    let applied = Machine::apply(state, index, bytes)?;
    // The store hands them to the derived copy.
    std::hint::black_box(applied.rows);
    Ok(applied.answer)
}

/// What the API does for a list: all of a team's, newest first.
fn list(name: &str, state: &State, runs: usize) {
    let mut times = Samples::default();
    for _ in 0..runs {
        let start = Instant::now();
        let mine = |it: &&Sandbox| it.team == team(0) && it.phase.holds_resources();
        let mut live: Vec<&Sandbox> = state.sandboxes().filter(mine).collect();
        live.sort_by_key(|it| std::cmp::Reverse((it.created_at, it.epoch)));
        std::hint::black_box(&live);
        times.add_ms(start.elapsed());
    }
    times.print_p50(&format!("{name}_list"), "ms");
}

/// Fills a group, takes a snapshot, and starts from what is on disk.
fn on_disk(name: &str, count: u64) -> Outcome {
    let folder = tempfile::Builder::new().prefix("wrenn-bench-").tempdir()?;
    let runtime = Runtime::new()?;
    let group = runtime.block_on(open(folder.path()))?;
    runtime.block_on(group.bootstrap())?;
    let start = Instant::now();
    runtime.block_on(fill(&group, count))?;
    let filled = start.elapsed().as_secs_f64();
    figure(
        &format!("{name}_fill"),
        2.0 * count as f64 / filled,
        "commands/s",
    );
    let took = runtime.block_on(snapshot(&group))?;
    figure(&format!("{name}_snapshot_time"), ms(took), "ms");
    let bytes = newest_bytes(&folder.path().join("raft/snap"))?;
    let mib = bytes as f64 / f64::from(1 << 20);
    figure(&format!("{name}_snapshot_size"), mib, "MiB");
    runtime.block_on(group.shutdown());
    drop(group);
    let timed_open = || -> Outcome<f64> {
        let start = Instant::now();
        let group = runtime.block_on(open(folder.path()))?;
        let took = ms(start.elapsed());
        let found = group.state().borrow().state.sandboxes().count();
        runtime.block_on(group.shutdown());
        if found as u64 != count {
            return Err(format!("{found} of {count} capsules came back").into());
        }
        Ok(took)
    };
    figure(&format!("{name}_start"), timed_open()?, "ms");
    std::fs::remove_dir_all(folder.path().join("state"))?;
    let from_snapshot = timed_open()?;
    figure(&format!("{name}_start_from_snapshot"), from_snapshot, "ms");
    Ok(())
}

async fn open(folder: &Path) -> Outcome<Group<State>> {
    let node = raft::types::Node::new("127.0.0.1:1", NodeKey([1; 32]));
    let layout = GroupConfig {
        // The one that is timed is the only one.
        snapshot_entries: 10 * SIZES[1],
        ..GroupConfig::new(folder.join("raft"), folder.join("state"), NodeId(1), node)
    };
    Ok(Group::open(layout, NoPeers).await?)
}

async fn fill(group: &Group<State>, count: u64) -> Outcome {
    for command in furniture(count) {
        propose(group, command).await?;
    }
    let mut filling = tokio::task::JoinSet::new();
    for filler in 0..FILLERS {
        let group = group.clone();
        filling.spawn(async move {
            for number in (u64::from(filler)..count).step_by(usize::from(FILLERS)) {
                let receipt = propose(&group, create_of(number)).await;
                let receipt = receipt.map_err(|err| err.to_string())?;
                let report = report_of(number, receipt).map_err(|err| err.to_string())?;
                let done = propose(&group, report).await;
                done.map_err(|err| err.to_string())?;
            }
            Ok::<(), String>(())
        });
    }
    while let Some(filled) = filling.join_next().await {
        filled??;
    }
    Ok(())
}

async fn propose(group: &Group<State>, command: Command) -> Outcome<Receipt> {
    let deadline = Instant::now() + PATIENCE;
    let proposed = group.propose(proposal(command), deadline).await?;
    Ok(decode_answer(&proposed.answer)?)
}

/// Has a snapshot written and waits until it is there.
async fn snapshot(group: &Group<State>) -> Outcome<Duration> {
    let start = Instant::now();
    let wanted = group.metrics().applied;
    group.snapshot().await?;
    while group.metrics().snapshot < wanted {
        if start.elapsed() > PATIENCE {
            return Err("no snapshot comes".into());
        }
        time::sleep(LOOK_AGAIN).await;
    }
    Ok(start.elapsed())
}

fn newest_bytes(folder: &Path) -> Outcome<u64> {
    let mut largest = 0;
    for entry in std::fs::read_dir(folder)? {
        largest = largest.max(entry?.metadata()?.len());
    }
    Ok(largest)
}

fn proposal(command: Command) -> Vec<u8> {
    let at = Stamp(1_700_000_000_000);
    Proposal { at, command }.encode()
}

/// Two teams, so that a list has something to leave out.
fn team(number: u64) -> TeamId {
    TeamId([u8::try_from(number % 2).unwrap_or(0); 16])
}

fn id(number: u64) -> SandboxId {
    // Ids are random: spread over the tree, not in order.
    let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut id = [0; 16];
    id[..8].copy_from_slice(&mixed.to_be_bytes());
    id[8..].copy_from_slice(&number.to_be_bytes());
    SandboxId(id)
}

fn key_of(node: u64) -> NodeKey {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&node.to_be_bytes());
    NodeKey(key)
}

/// The template, and the nodes that all capsules fit on.
fn furniture(count: u64) -> Vec<Command> {
    let digest = [9; 32];
    let template = Template {
        name: TEMPLATE.into(),
        digest,
        disk: Mib(1024),
        size_bytes: 1 << 28,
        created_at: Stamp(0),
    };
    let room = u32::try_from(2 * PER_NODE).unwrap_or(u32::MAX);
    let node = |id: u64| Node {
        id: NodeId(id),
        name: format!("node-{id}"),
        key: key_of(id),
        api_url: format!("http://10.0.0.{id}:8420"),
        cluster_address: format!("10.0.0.{id}:8421"),
        capacity: Resources {
            vcpus: room,
            memory: Mib(512 * room),
            disk: Mib(1024 * room),
            sandboxes: room,
        },
        version: "0.1.0".into(),
        templates: [(TEMPLATE.to_owned(), digest)].into(),
        ..Node::default()
    };
    let uses = u32::try_from(count).unwrap_or(u32::MAX);
    let joiners = (2..=count / PER_NODE).map(|id| Command::RedeemToken {
        token: TOKEN,
        node: node(id),
    });
    let first = [
        Command::PutTemplate(template),
        Command::AdmitNode(node(1)),
        Command::PutToken(token(uses)),
    ];
    first.into_iter().chain(joiners).collect()
}

fn token(uses_left: u32) -> Token {
    Token {
        id: TOKEN,
        public_key: [5; 32],
        team: None,
        expires_at: Stamp(u64::MAX),
        uses_left,
        created_at: Stamp(0),
        created_by: String::new(),
        revoked: false,
        redeemed: Vec::new(),
    }
}

fn create_of(number: u64) -> Command {
    Command::CreateSandbox {
        id: id(number),
        team: team(number),
        spec: SandboxSpec {
            template: TEMPLATE.into(),
            vcpus: 1,
            memory: Mib(256),
            disk: Mib(1024),
            metadata: [("job".to_owned(), format!("job-{number}"))].into(),
            ..SandboxSpec::default()
        },
        hints: Vec::new(),
    }
}

fn report_of(number: u64, receipt: Receipt) -> Outcome<Command> {
    let Receipt::Placed { node, epoch } = receipt else {
        return Err("a create was not placed".into());
    };
    Ok(Command::ReportSandbox {
        id: id(number),
        epoch,
        node,
        report: Report::Running(GuestVersions {
            kernel: "6.1.0".into(),
            vmm: "qemu 7.2".into(),
            agent: "0.1.0".into(),
        }),
    })
}

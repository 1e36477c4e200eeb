//! Durable proposals of a raft group of one, beside bare `fdatasync` on the same disk.
//!
//! A proposal is an API key put again: a command of the usual size that does not let the state
//! grow. It is answered when it is durable and applied. The baseline writes as many bytes into a
//! file that is full of zeroes already, as the log does, and syncs. Both run in turns, in short
//! rounds, so that a disk whose mood changes changes it for both. A proposal's cost is told in
//! median syncs, so that a stall of the disk during the baseline does not flatter us.
//!
//! One client shows what we add to a sync; many show whether they share syncs.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use proto::ids::{KeyId, NodeId, NodeKey, TeamId};
use proto::units::Stamp;
use raft::command::{Command, Proposal};
use raft::group::{Group, GroupConfig};
use raft::link::NoPeers;
use raft::state::{Key, State};
use raft::types::Node;
use tokio::runtime::Runtime;

use crate::figures::{Samples, figure, ms, ratio};
use crate::{Outcome, Run};

/// Clients at once, and what a proposal of theirs may cost, in syncs: a lone one waits for a sync
/// and for the way there through three threads, a few must not be worse off than with a sync each,
/// many have to share.
const CLIENTS: [(u8, f64); 3] = [(1, 2.0), (8, 1.0), (64, 0.25)];
/// How long one part of a round lasts.
const PART: Duration = Duration::from_millis(500);
/// Longest a proposal may take on a busy disk.
const PATIENCE: Duration = Duration::from_secs(30);
/// Size of the baseline's file, written over from the start when it is full.
const FILE_BYTES: u64 = 16 << 20;

/// What one number of clients came to.
struct Load {
    clients: u8,
    /// The most a proposal may cost.
    goal: f64,
    latency: Samples,
    per_second: Samples,
}

/// Measures rounds.
pub(crate) fn run(run: &Run) -> Outcome {
    let folder = tempfile::Builder::new().prefix("wrenn-bench-").tempdir()?;
    let runtime = Runtime::new()?;
    let group = runtime.block_on(open(folder.path()))?;
    let bytes = proposal(0).len();
    let baseline = Baseline::new(folder.path(), bytes)?;
    let (mut sync_time, mut syncs_per_second) = (Samples::default(), Samples::default());
    let mut loads = CLIENTS.map(|(clients, goal)| Load {
        clients,
        goal,
        latency: Samples::default(),
        per_second: Samples::default(),
    });
    for round in 1..=run.runs {
        run.go_on()?;
        syncs_per_second.add(baseline.run(&mut sync_time)?);
        for load in &mut loads {
            let (count, took) = runtime.block_on(propose_all(&group, load))?;
            load.per_second.add(count as f64 / took.as_secs_f64());
        }
        run.note(&format!("round {round} of {}", run.runs));
    }
    runtime.block_on(group.shutdown());
    figure("log_proposal_size", bytes as f64, "bytes");
    sync_time.print("log_bare_sync", "ms");
    syncs_per_second.print_p50("log_bare_syncs_per_second", "/s");
    for load in &loads {
        load.print(sync_time.p50());
    }
    Ok(())
}

impl Load {
    /// Prints it beside what a sync takes, in milliseconds.
    fn print(&self, sync_ms: f64) {
        let name = format!("log_{}_clients", self.clients);
        self.per_second
            .print_p50(&format!("{name}_proposals"), "/s");
        self.latency.print(&name, "ms");
        // A lone client waits for each proposal; of many, only their number counts.
        let cost_ms = if self.clients == 1 {
            self.latency.p50()
        } else {
            1e3 / self.per_second.p50()
        };
        ratio(
            &format!("{name}_cost_in_syncs"),
            cost_ms,
            sync_ms,
            self.goal,
        );
    }
}

async fn open(folder: &Path) -> Outcome<Group<State>> {
    let node = Node::new("127.0.0.1:1", NodeKey([1; 32]));
    let layout = GroupConfig::new(folder.join("raft"), folder.join("state"), NodeId(1), node);
    let group = Group::open(layout, NoPeers).await?;
    group.bootstrap().await?;
    Ok(group)
}

/// Proposes for [`PART`], each client one thing after the other.
async fn propose_all(group: &Group<State>, load: &mut Load) -> Outcome<(usize, Duration)> {
    let start = Instant::now();
    let mut working = tokio::task::JoinSet::new();
    for client in 0..load.clients {
        working.spawn(propose_in_turn(group.clone(), client, start + PART));
    }
    let mut count = 0;
    while let Some(worked) = working.join_next().await {
        let times = worked??;
        count += times.len();
        times.into_iter().for_each(|time| load.latency.add_ms(time));
    }
    Ok((count, start.elapsed()))
}

async fn propose_in_turn(
    group: Group<State>,
    client: u8,
    until: Instant,
) -> Result<Vec<Duration>, raft::group::ProposeError> {
    let mut times = Vec::new();
    while Instant::now() < until {
        let start = Instant::now();
        group.propose(proposal(client), start + PATIENCE).await?;
        times.push(start.elapsed());
    }
    Ok(times)
}

fn proposal(client: u8) -> Vec<u8> {
    let key = Key {
        id: KeyId([client; 16]),
        team: TeamId::default(),
        name: format!("bench {client}"),
        hash: [client; 32],
        shown: "wrn_123456".into(),
        ..Key::default()
    };
    let command = Command::PutKey(key);
    Proposal {
        at: Stamp(0),
        command,
    }
    .encode()
}

/// A file that is written and synced as the log would, without anything around it.
struct Baseline {
    file: File,
    piece: Vec<u8>,
}

impl Baseline {
    fn new(folder: &Path, bytes: usize) -> Outcome<Self> {
        let file = File::create(folder.join("baseline"))?;
        file.write_all_at(&vec![0; usize::try_from(FILE_BYTES)?], 0)?;
        file.sync_all()?;
        let piece = vec![1; bytes];
        Ok(Self { file, piece })
    }

    /// Syncs for [`PART`]; returns how many a second.
    fn run(&self, times: &mut Samples) -> Outcome<f64> {
        let begin = Instant::now();
        let mut count = 0_u32;
        let mut at = 0;
        while begin.elapsed() < PART {
            let start = Instant::now();
            self.file.write_all_at(&self.piece, at)?;
            self.file.sync_data()?;
            times.add(ms(start.elapsed()));
            count += 1;
            at = (at + self.piece.len() as u64) % (FILE_BYTES - self.piece.len() as u64);
        }
        Ok(f64::from(count) / begin.elapsed().as_secs_f64())
    }
}
